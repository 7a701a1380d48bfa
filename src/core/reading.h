// Reading rungs into memory: out of the kernel's cache or past it, checked, and with no more of the
// processors than is left for it.
#pragma once

#include <cstdint>
#include <functional>

#include "duty.h"

namespace pliant {

// Where the bytes of a rung are: an open file, and what they must add up to.
struct RungSource {
    int fd;
    uint64_t offset;
    uint64_t bytes;
    uint32_t crc;
};

// Is most of this range of a file in the kernel's cache, so that reading it copies memory? Before
// Linux 6.5 its first byte stands for all. True where the kernel cannot tell.
bool is_cached(int fd, uint64_t offset, uint64_t bytes);

// A second way to an open file that leaves the kernel's cache alone.
class DirectFile {
  public:
    explicit DirectFile(int fd);
    ~DirectFile();
    DirectFile(const DirectFile&) = delete;
    DirectFile& operator=(const DirectFile&) = delete;
    int fd() const { return fd_; }  // -1 if there is none

  private:
    int fd_;
};

// Reads all of the rung `index`, past the cache if `direct` is a DirectFile's and most of it is not
// there, beside steps if there is a cycle; gives up, which is false, if `ended` becomes true.
// Throws std::system_error, ChecksumError.
bool read_rung(const RungSource& source, int direct, uint8_t* to, int index, DutyCycle* beside,
               const std::function<bool()>& ended);

}  // namespace pliant
