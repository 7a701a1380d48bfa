#include "reading.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <string>
#include <system_error>
#include <thread>

#include "crc32.h"
#include "error.h"

namespace pliant {

namespace {

constexpr uint64_t kPage = 4096;

// Read at once; between chunks a read may end. What is read beside a shrink may be in memory for a
// moment after it, so this times the number of threads is kept small.
constexpr uint64_t kChunk = uint64_t{1} << 20;

// Is most of this range in the kernel's cache, so that reading it copies memory? True where the
// kernel cannot tell (before Linux 6.5).
bool is_cached(int fd, uint64_t offset, uint64_t bytes) {
    constexpr long kCacheStat = 451;
    struct {
        uint64_t offset, bytes;
    } range{offset, bytes};
    uint64_t found[5] = {};  // pages in the cache come first
    if (syscall(kCacheStat, fd, &range, found, 0u) != 0) return true;
    return found[0] * kPage * 2 > bytes;
}

double seconds(clockid_t clock) {
    timespec now{};
    clock_gettime(clock, &now);
    return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

}  // namespace

Pace::Pace(double share)
    : share_(share),
      waiting_(open("/proc/thread-self/schedstat", O_RDONLY | O_CLOEXEC)),
      busy_(seconds(CLOCK_THREAD_CPUTIME_ID)),
      began_(seconds(CLOCK_MONOTONIC)) {}

Pace::~Pace() {
    if (waiting_ >= 0) close(waiting_);
}

void Pace::keep() {
    if (share_ >= 1.0) return;
    const double busy = seconds(CLOCK_THREAD_CPUTIME_ID) - busy_;
    const double due = (busy + hidden_) / share_ - (seconds(CLOCK_MONOTONIC) - began_);
    if (due > 0) std::this_thread::sleep_for(std::chrono::duration<double>(due));
    busy_ += busy;
    hidden_ = 0;
    began_ = seconds(CLOCK_MONOTONIC);
}

void Pace::populate(uint8_t* to, uint64_t bytes) {
    const double began = seconds(CLOCK_MONOTONIC), before = known();
    constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, since Linux 5.14
    (void)madvise(to, bytes, kPopulateWrite);
    hidden_ += std::max(seconds(CLOCK_MONOTONIC) - began - (known() - before), 0.0);
}

double Pace::known() const {
    char text[96];
    const ssize_t got = waiting_ < 0 ? 0 : pread(waiting_, text, sizeof text - 1, 0);
    text[std::max<ssize_t>(got, 0)] = 0;
    long long ran = 0, waited = 0;
    if (std::sscanf(text, "%lld %lld", &ran, &waited) != 2) waited = 0;  // the kernel does not say
    return seconds(CLOCK_THREAD_CPUTIME_ID) + 1e-9 * static_cast<double>(waited);
}

DirectFile::DirectFile(int fd) {
    const std::string path = "/proc/self/fd/" + std::to_string(fd);
    fd_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
}

DirectFile::~DirectFile() {
    if (fd_ >= 0) close(fd_);
}

bool read_rung(const RungSource& source, int direct, uint8_t* to, int index, Pace& pace,
               const std::function<bool()>& ended) {
    int fd = direct >= 0 && !is_cached(source.fd, source.offset, source.bytes) ? direct : source.fd;
    uint64_t done = 0;
    uint32_t crc = 0;
    while (done < source.bytes) {
        pace.keep();
        if (ended()) return false;
        const uint64_t most = std::min(source.bytes - done, kChunk);
        pace.populate(to + done, most);
        const ssize_t got = pread(fd, to + done, most, static_cast<off_t>(source.offset + done));
        if (got < 0 && errno == EINTR) continue;
        if (got < 0 && errno == EINVAL && fd != source.fd) {  // not aligned as this disk wants it
            fd = source.fd;
            continue;
        }
        if (got < 0)
            throw std::system_error(errno, std::generic_category(),
                                    "reading rung " + std::to_string(index));
        if (got == 0)
            throw ChecksumError("rung " + std::to_string(index) + " ends after " +
                                std::to_string(done) + " of " + std::to_string(source.bytes) +
                                " bytes: its shard was cut while it was open; get the shard again");
        // While it is still in the cache of the processor.
        crc = crc32(to + done, static_cast<size_t>(got), crc);
        done += static_cast<uint64_t>(got);
    }
    if (crc != source.crc)
        throw ChecksumError("rung " + std::to_string(index) + " has checksum " +
                            std::to_string(crc) + ", the manifest says " +
                            std::to_string(source.crc) +
                            ": the shard was altered or damaged; get it again");
    return true;
}

}  // namespace pliant
