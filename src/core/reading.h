// Reading rungs into memory: out of the kernel's cache or past it, checked, and with no more of the
// processors than is left for it.
#pragma once

#include <cstdint>
#include <functional>

namespace pliant {

// Where the bytes of a rung are: an open file, and what they must add up to.
struct RungSource {
    int fd;
    uint64_t offset;
    uint64_t bytes;
    uint32_t crc;
};

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

// Keeps a thread from using more than a share of a processor. Made by the thread itself.
class Pace {
  public:
    explicit Pace(double share);
    ~Pace();
    Pace(const Pace&) = delete;
    Pace& operator=(const Pace&) = delete;

    // Sleeps as long as is due since the last call.
    void keep();
    // Takes memory for what will be written. In a virtual machine the host may have to find it
    // first: the processor stands still meanwhile, and the clock of the thread does not count that.
    void populate(uint8_t* to, uint64_t bytes);

  private:
    double known() const;  // seconds in which this thread had a processor or waited for one

    double share_;
    int waiting_;  // the file that says how long it has waited for a processor
    double hidden_ = 0, busy_, began_;
};

// Reads all of the rung `index`, past the cache if `direct` is a DirectFile's and most of it is not
// there; gives up, which is false, if `ended` becomes true. Throws std::system_error,
// ChecksumError.
bool read_rung(const RungSource& source, int direct, uint8_t* to, int index, Pace& pace,
               const std::function<bool()>& ended);

}  // namespace pliant
