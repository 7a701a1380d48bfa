#include "machine.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "arena.h"
#include "error.h"

namespace pliant {

namespace {

// The CPU quota of the cgroup in processors, or infinity.
double cgroup_cpus() {
    std::ifstream max("/sys/fs/cgroup/cpu.max");  // v2: "QUOTA PERIOD" or "max PERIOD"
    std::string quota;
    double period = 0.0;
    if (max >> quota >> period && quota != "max" && period > 0.0) return std::stod(quota) / period;
    for (const char* root : {"/sys/fs/cgroup/cpu/", "/sys/fs/cgroup/cpu,cpuacct/"}) {
        std::ifstream quota_file(std::string(root) + "cpu.cfs_quota_us");
        std::ifstream period_file(std::string(root) + "cpu.cfs_period_us");
        double q = 0.0;
        if (quota_file >> q && period_file >> period && q > 0.0 && period > 0.0) return q / period;
    }
    return INFINITY;
}

}  // namespace

int usable_cpus() {
    int count = static_cast<int>(std::thread::hardware_concurrency());
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) count = CPU_COUNT(&set);
    const double quota = cgroup_cpus();
    if (quota < count) count = static_cast<int>(std::ceil(quota));
    return std::max(count, 1);
}

Resident resident() {
    Resident result{0, 0};
    std::ifstream status("/proc/self/status");
    for (std::string line; std::getline(status, line);) {
        if (line.starts_with("VmRSS:")) result.now = std::stoull(line.substr(6)) * 1024;
        if (line.starts_with("VmHWM:")) result.peak = std::stoull(line.substr(6)) * 1024;
    }
    return result;
}

double read_bandwidth(size_t mebibytes, int threads, int repeats) {
    if (mebibytes < 1 || threads < 1 || repeats < 1)
        throw UsageError("a bandwidth probe needs at least 1 MiB, 1 thread and 1 repeat");
    const size_t bytes = mebibytes << 20;
    Arena arena(bytes);
    arena.prefer_huge(bytes);
    std::fill_n(arena.data(), bytes, uint8_t{1});
    double best = 0.0;
    std::atomic<uint64_t> sink{0};
    for (int i = 0; i < repeats; ++i) {
        const auto begin = std::chrono::steady_clock::now();
        std::vector<std::thread> workers;
        for (int t = 0; t < threads; ++t)
            workers.emplace_back([&, t] {
                const size_t count = bytes / 64;
                const size_t first = count * static_cast<size_t>(t) / static_cast<size_t>(threads);
                const size_t last =
                    count * static_cast<size_t>(t + 1) / static_cast<size_t>(threads);
                typedef uint64_t Line __attribute__((vector_size(64)));
                const Line* line = reinterpret_cast<const Line*>(arena.data());
                Line sum[4] = {};
                for (size_t at = first; at + 4 <= last; at += 4)
                    for (size_t k = 0; k < 4; ++k) sum[k] += line[at + k];
                const Line total = sum[0] + sum[1] + sum[2] + sum[3];
                sink += total[0] + total[7];
            });
        for (auto& worker : workers) worker.join();
        const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - begin;
        best = std::max(best, static_cast<double>(bytes) / elapsed.count());
    }
    return best;
}

}  // namespace pliant
