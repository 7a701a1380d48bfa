// A matrix in plies, and the inputs that it is multiplied with, as the kernels see them.
// docs/format.md, section 4.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace pliant {

constexpr int kGroup = 64;      // input channels of a group
constexpr int kSupertile = 32;  // rows that are decoded together: two tiles of 16
constexpr int kMaxDepth = 8;
constexpr int kWideDepth = 6;   // from this depth on, levels and inputs are wide: 12 bits
constexpr int kSixteen = 16;    // parts of a step of 8 bits, which the other 4 bits count
constexpr int kNarrowUnit = 2;  // a step of a narrow input, in steps of 8 bits

// The positive levels of a depth from kWideDepth on, hi + lo / 16, as sums of what plies add;
// negative ones mirror them. Those of depths 6 and 7 are exact, those of depth 8 near to what is
// wanted (docs/format.md, section 4).
struct DeepLevels {
    // By plies 2-5, the block: what is there, what plies 6 and 7 add, and what both add besides.
    alignas(16) int8_t hi[4][16] = {}, lo[4][16] = {};
    // At depth 8, where ply 7 adds to lo alone, and plies 6 and 7 nothing together: what ply 8 adds
    // to lo, and what is added to hi in the last block, by 1 and plies 6-8.
    alignas(16) int8_t eight[16] = {}, last_hi[16] = {};

    // `levels`: the positive ones. Throws FormatError unless such sums are near to them.
    void build(const float* levels, int depth);

  private:
    // In sixteenths; `level`: without plies 6 and 7, with 6, with 7, with both.
    void put(const std::array<int, 4>& level, int block);
    bool put_sums(const std::array<double, 8>& want, int block);
};
// So that lo · 127 twice, and hi · 8 twice, fit into 16 bits together.
constexpr int kMostLow = 119;

// Up to this depth levels are at most 63, so that with 64 added to them four products with narrow
// inputs fit into 16 bits together.
constexpr int kSmallDepth = 4;
// The largest level of each depth as an integer: the one with which all are nearest to integers.
constexpr int kPeak[kMaxDepth + 1] = {0, 63, 42, 62, 63, 127, 127, 127, 127};

// The levels of the Gaussian tree as integers: level ≈ (hi + lo / 16) · scale[depth], lo only from
// kWideDepth on; and rounded to 8 bits at any depth, for the KV cache.
//
// Kernels collect the bits of a weight in the order that is cheapest to collect: plies 1-4 in bits
// 3-0 (ply 1 in bit 3), the later ones above: at depth 5 ply 5 in bit 4; at depth 6 plies 5, 6 in
// bits 5, 4; at depths 7 and 8 plies 5-8 in bits 7-4. The tables are indexed by that byte, and
// repeat over the bits that a depth does not use.
struct LevelTables {
    alignas(64) int8_t hi[kMaxDepth + 1][256] = {};
    alignas(64) int8_t lo[kMaxDepth + 1][256] = {};
    alignas(64) int8_t rounded[kMaxDepth + 1][256] = {};
    DeepLevels deep[kMaxDepth + 1];
    float scale[kMaxDepth + 1] = {};
    float unit[kMaxDepth + 1] = {};    // of a product of whole numbers: scale · what x counts in
    alignas(64) float steps[16] = {};  // what the scale codes stand for

    // `levels`: 510 values as in the tensor `tree` of a pack; `steps`: 16 values.
    void build(const float* levels, const float* scale_steps);
};

// A scale of the KV cache is one byte: 2^((code - 160) / 8), from 2^-20 to 2^11.875.
extern const float* const kKvScales;

// Neighbouring groups of one depth: kernels work on a run at a time.
struct Run {
    int first, count, depth;
};

// One row block of a coded matrix. Pointers lead into the arena of the weights and stay the same
// for ever; `runs` says which of them may be followed.
struct CodedBlock {
    int rows = 0;    // of the block; a multiple of 32 except in the last block
    int first = 0;   // stored row that it begins with
    int padded = 0;  // rounded up to supertiles
    int groups = 0;
    const float* group_scale = nullptr;  // [groups]
    const float* row_scale = nullptr;    // [padded]; zero beyond rows
    std::vector<const uint8_t*> codes;   // [groups] scale codes
    std::vector<const uint8_t*> planes;  // [groups * 8]
    std::vector<uint8_t> depth;          // [groups]
    std::vector<Run> runs;               // without groups of depth 0, in rising order

    void update_runs();
};

struct CodedMatrix {
    int rows = 0, columns = 0, groups = 0;
    int input = 0;  // index of its channel order
    std::vector<CodedBlock> blocks;
    std::vector<float> row_scale;    // of all blocks; the last one padded
    std::vector<float> group_scale;  // [blocks][groups]
    std::vector<uint32_t> position;  // source row -> stored row; empty if they are the same
};

// Input vectors of some tokens after gathering, rotating and coding, with 7 bits and a sign (at
// most 64) for shallow groups, with 12 for those of kWideDepth and more: value ≈ narrow ·
// kNarrowUnit · scale ≈ (hi + lo / 16) · scale. What no group needs is not made. The tokens of a
// group lie together, so kernels reach all of them from one pointer.
struct Prepared {
    int groups = 0;
    int capacity = 0;                     // tokens that there is room for
    int8_t* narrow = nullptr;             // [groups][capacity][64], aligned to 64
    int8_t *hi = nullptr, *lo = nullptr;  // the same
    float* scale = nullptr;               // [groups][capacity]
    int32_t* sum_narrow = nullptr;        // [groups][capacity]: the sum of narrow
    int32_t *sum_hi = nullptr, *sum_lo = nullptr;

    size_t at(int group, int token) const {
        return static_cast<size_t>(group) * static_cast<size_t>(capacity) +
               static_cast<size_t>(token);
    }
    // What the levels, or their high parts, are multiplied with, and its sums.
    const int8_t* top(bool wide) const { return wide ? hi : narrow; }
    const int32_t* sum_top(bool wide) const { return wide ? sum_hi : sum_narrow; }
    // The same without the tokens before this one.
    Prepared from(int token) const {
        const size_t values = static_cast<size_t>(token) * kGroup;
        return {groups,        capacity,           narrow + values, hi + values,   lo + values,
                scale + token, sum_narrow + token, sum_hi + token,  sum_lo + token};
    }
};

}  // namespace pliant
