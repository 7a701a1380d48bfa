#include "reading.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <string>
#include <system_error>

#include "crc32.h"
#include "error.h"

namespace pliant {

namespace {

constexpr uint64_t kPage = 4096;
constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, since Linux 5.14

// Read at once; between chunks a read may end. What is read beside a shrink may be in memory for a
// moment after it, so this times the number of threads is kept small.
constexpr uint64_t kChunk = uint64_t{1} << 20;

}  // namespace

bool is_cached(int fd, uint64_t offset, uint64_t bytes) {
    constexpr long kCacheStat = 451;
    struct {
        uint64_t offset, bytes;
    } range{offset, bytes};
    uint64_t found[5] = {};  // pages in the cache come first
    if (syscall(kCacheStat, fd, &range, found, 0u) == 0) return found[0] * kPage * 2 > bytes;
    char first = 0;
    const iovec to{&first, 1};
    return preadv2(fd, &to, 1, static_cast<off_t>(offset), RWF_NOWAIT) == 1 || errno != EAGAIN;
}

DirectFile::DirectFile(int fd) {
    const std::string path = "/proc/self/fd/" + std::to_string(fd);
    fd_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
}

DirectFile::~DirectFile() {
    if (fd_ >= 0) close(fd_);
}

bool read_rung(const RungSource& source, int direct, uint8_t* to, int index, DutyCycle* beside,
               const std::function<bool()>& ended) {
    // It matters only where there are two ways, or steps.
    const bool cached =
        (direct < 0 && beside == nullptr) || is_cached(source.fd, source.offset, source.bytes);
    int fd = direct >= 0 && !cached ? direct : source.fd;
    uint64_t done = 0;
    uint32_t crc = 0;
    while (done < source.bytes) {
        DutyCycle::Turn turn(beside);
        if (ended()) return false;
        const uint64_t most = std::min(source.bytes - done, kChunk);
        (void)madvise(to + done, most, kPopulateWrite);
        if (!cached) turn.end();  // the disk works now
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
