// What the machine and this process have: processors, memory, bandwidth.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pliant {

// Processors that this process may really use: its affinity and the CPU quota of its cgroup (v1 or
// v2), at least 1.
int usable_cpus();

struct Resident {
    uint64_t now, peak;  // VmRSS and VmHWM in bytes
};
Resident resident();

// Bytes per second of reading `mebibytes` of anonymous memory with `threads` threads: the best of
// `repeats`.
double read_bandwidth(size_t mebibytes, int threads, int repeats);

}  // namespace pliant
