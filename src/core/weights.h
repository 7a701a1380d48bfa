// The coded matrices of a model and the arena with their resident plies.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "arena.h"
#include "coded.h"
#include "reading.h"

namespace pliant {

// How rungs are read.
struct Reading {
    uint64_t ticket = UINT64_MAX;  // see Weights::overtake
    int goal = 0;                  // rungs that there will be at the end of this and further reads
    int threads = 1;               // each has one read in flight
    bool direct = false;           // what the kernel does not have in its cache is read past it
    DutyCycle* beside = nullptr;   // of the steps that go on meanwhile, if any do
};

// Every rung has a fixed place in one arena, in ladder order, so the resident rungs are always its
// beginning: growing appends, shrinking cuts off, and nothing is ever moved or fragmented.
class Weights {
  public:
    // Building, in this order: levels, matrices in manifest order, the ladder.
    LevelTables levels;
    int add_input(std::vector<uint16_t> order);
    int add_matrix(int rows, int columns, int input, const std::vector<int>& block_rows,
                   const float* row_scale, const float* group_scale, const uint32_t* row_order);
    void set_ladder(std::vector<uint32_t> units, const std::vector<uint32_t>& rung_plies,
                    const std::vector<uint64_t>& rung_bytes);

    const CodedMatrix& matrix(int index) const { return matrices_[static_cast<size_t>(index)]; }
    const std::vector<uint16_t>& order(int input) const {
        return orders_[static_cast<size_t>(input)];
    }
    // Does any matrix with this input have groups below kWideDepth now, or others?
    bool narrow(int input) const { return narrow_[static_cast<size_t>(input)]; }
    bool wide(int input) const { return wide_[static_cast<size_t>(input)]; }

    int rungs() const { return static_cast<int>(rung_end_ply_.size()); }
    int read_rungs() const { return read_; }            // in memory
    int published_rungs() const { return published_; }  // in use
    uint64_t rung_bytes(int first, int last) const {
        return rung_begin_[static_cast<size_t>(last)] - rung_begin_[static_cast<size_t>(first)];
    }
    std::vector<uint8_t> depths() const;  // of each unit
    uint64_t arena_bytes() const;         // touched by the rungs that were read
    uint64_t table_bytes() const;         // pointers, orders, scales

    // Says that a newer change was asked for: reads with a smaller ticket end soon.
    void overtake(uint64_t ticket);
    // Reads the rungs from `first` on to the end of those in memory and checks them. May run beside
    // steps and publish(), but not beside another read. False if the ticket was overtaken, and then
    // the first of them that are complete may stay, or if `first` is not the end. Throws
    // ChecksumError, UsageError, or std::system_error for a failed read, and then none stays.
    bool read(int first, const std::vector<RungSource>& sources, const Reading& how);
    // Gives back what was read beyond `rungs` rungs and not published. May run beside steps.
    void discard(int rungs);
    // Makes the kernels use exactly the first `rungs` rungs, and gives the memory of the rest back.
    // Not beside steps.
    void publish(int rungs);

  private:
    struct Unit {
        int matrix, block, group;
    };
    std::vector<CodedMatrix> matrices_;
    std::vector<std::vector<uint16_t>> orders_;
    std::vector<bool> narrow_, wide_;  // of each input
    std::vector<Unit> units_;
    std::vector<uint32_t> ladder_;
    std::vector<size_t> rung_end_ply_;     // plies up to and with each rung
    std::vector<uint64_t> rung_begin_{0};  // offsets in the arena, one more than rungs
    Arena arena_;
    std::mutex moving_;         // of the arena's end
    std::atomic<int> read_{0};  // rungs that are in memory and checked
    int reading_ = 0;           // up to which rung a read in progress goes,
    int cut_ = 0;               // and how far what it read may stay
    int published_ = 0;
    std::atomic<uint64_t> newest_{0};
};

}  // namespace pliant
