// What a product will read, fetched before it is needed. Every file that includes this has it for
// itself: what is compiled for one instruction set must not be shared with another.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "unroll.h"

namespace pliant {
namespace {

// Goes through the plies of the supertiles [first, last) of a block, strip after strip of `size`,
// and in a strip group after group, some way ahead of the product that reads them in this order. A
// ply of a task is a few KB, too short for the processor to find a stream in it, and the next one,
// of another depth, is somewhere else.
class Scout {
  public:
    // Begins with what is on its way at any time: a core gets 25 to 30 bytes a nanosecond, and a
    // line takes 100 to 200.
    Scout(const CodedBlock& block, int first, int last, int size)
        : block_(block),
          run_(block.runs.data()),
          end_(run_ + block.runs.size()),
          size_(size),
          first_(first),
          last_(std::min(first + size, last)),
          stop_(last) {
        if (run_ == end_) return;
        enter(run_->first);
        go(kAhead);
    }

    // The product goes on by so many pieces, each the 256 bytes of a ply of a supertile.
    PLIANT_INLINE void go(int pieces) {
        due_ += pieces;
        if (due_ > 0) advance();
    }

  private:
    static constexpr int kAhead = 28;  // pieces: 7 KB, of a first cache of 32 or 48

    // Not inlined: every depth has a product of its own, and all of them have to fit into the cache
    // of instructions.
    [[gnu::noinline]] void advance() {
        for (; due_ > 0 && run_ != end_; due_ -= depth_) {
            fetch_supertile();
            if (++supertile_ == last_) leave();
        }
    }
    PLIANT_INLINE void fetch_supertile() const {
        const size_t at = static_cast<size_t>(supertile_) * 256;
        const auto fetch = [&](int ply) PLIANT_LAMBDA {
            const uint8_t* const piece = planes_[ply] + at;
            __builtin_prefetch(piece);
            __builtin_prefetch(piece + 64);
            __builtin_prefetch(piece + 128);
            __builtin_prefetch(piece + 192);
        };
        switch (depth_) {
            case 8:
                fetch(7);
                [[fallthrough]];
            case 7:
                fetch(6);
                [[fallthrough]];
            case 6:
                fetch(5);
                [[fallthrough]];
            case 5:
                fetch(4);
                [[fallthrough]];
            case 4:
                fetch(3);
                [[fallthrough]];
            case 3:
                fetch(2);
                [[fallthrough]];
            case 2:
                fetch(1);
                [[fallthrough]];
            default:
                fetch(0);
        }
        __builtin_prefetch(codes_ + static_cast<size_t>(supertile_) * 16);
    }
    void enter(int group) {
        group_ = group;
        supertile_ = first_;
        depth_ = run_->depth;
        planes_ = &block_.planes[static_cast<size_t>(group * kMaxDepth)];
        codes_ = block_.codes[static_cast<size_t>(group)];
    }
    void leave() {
        if (group_ + 1 < run_->first + run_->count)
            enter(group_ + 1);
        else if (++run_ != end_)
            enter(run_->first);
        else if (last_ < stop_) {
            first_ = last_;
            last_ = std::min(first_ + size_, stop_);
            run_ = block_.runs.data();
            enter(run_->first);
        }
    }

    const CodedBlock& block_;
    const Run *run_, *end_;
    int size_, first_, last_, stop_;
    const uint8_t* const* planes_ = nullptr;
    const uint8_t* codes_ = nullptr;
    int group_ = 0, supertile_ = 0, depth_ = 0;
    int due_ = 0;  // pieces to be fetched; what was fetched beyond them counts
};

// Supertiles whose sums, [supertiles][tokens][32], are made together.
struct Strip {
    const CodedProduct& p;
    int first, last;
    float* sums;
    Scout& scout;
};

// The plies of a group, from a supertile on.
template <int N>
PLIANT_INLINE void planes_of(const CodedBlock& block, int g, int supertile,
                             const uint8_t** planes) {
    for (int i = 0; i < N; ++i)
        planes[i] = block.planes[static_cast<size_t>(g * kMaxDepth + i)] +
                    static_cast<size_t>(supertile) * 256;
}

// The pointers to plies and codes, and the scales of the rows: since they were used last, all the
// other plies have gone through the caches. Inlined by force: GCC takes away calls of functions
// that do nothing but fetch.
PLIANT_INLINE void fetch_pointers(const CodedBlock& block, int first, int last) {
    for (int s = first; s < last; ++s) {
        __builtin_prefetch(block.row_scale + s * kSupertile, 0, 2);
        __builtin_prefetch(block.row_scale + s * kSupertile + 16, 0, 2);
    }
    for (int g = 0; g < block.groups; ++g) {
        __builtin_prefetch(&block.planes[static_cast<size_t>(g * kMaxDepth)]);
        if (g % 8 == 0) __builtin_prefetch(&block.codes[static_cast<size_t>(g)]);
    }
}

}  // namespace
}  // namespace pliant
