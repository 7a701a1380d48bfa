// Products with coded matrices in plain C++: the definition that the other kernels are held to, bit
// for bit.
#include <array>
#include <cmath>

#include "ops.h"

namespace pliant::plain {

namespace {

// Where the bits of a weight are in each ply of a group.
size_t byte_of(size_t supertile, int row, int c) {
    return supertile * 256 + static_cast<size_t>(row / 16) * 128 +
           static_cast<size_t>(c / 32) * 64 + static_cast<size_t>(row % 16) * 4 +
           static_cast<size_t>(c % 4);
}

// The collected bits (see LevelTables) of the weight in `row` of a supertile, stored column c.
int collect(const uint8_t* const* planes, int depth, size_t supertile, int row, int c) {
    const size_t byte = byte_of(supertile, row, c);
    const int shift = (c % 32) / 4;
    const auto bit = [&](int ply) { return planes[ply][byte] >> shift & 1; };
    int bits = 0;
    for (int ply = 0; ply < 4; ++ply) bits = bits << 1 | (ply < depth ? bit(ply) : 0);
    if (depth <= 4) return bits;
    int upper = 0;
    const int width = depth <= 6 ? depth - 4 : 4;
    for (int ply = 4; ply < 4 + width; ++ply) upper = upper << 1 | (ply < depth ? bit(ply) : 0);
    return bits | upper << 4;
}

// Bit j of a byte as byte j.
constexpr std::array<uint64_t, 256> kSpread = [] {
    std::array<uint64_t, 256> spread{};
    for (size_t byte = 0; byte < 256; ++byte)
        for (size_t bit = 0; bit < 8; ++bit)
            spread[byte] |= static_cast<uint64_t>(byte >> bit & 1) << 8 * bit;
    return spread;
}();

// The same of columns c, c + 4, … c + 28, from the lowest byte on; c is the first of its kind in a
// half of the group.
uint64_t collect_eight(const uint8_t* const* planes, int depth, size_t supertile, int row, int c) {
    const size_t byte = byte_of(supertile, row, c);
    const int upper = depth <= 6 ? depth : 8;
    uint64_t bits = 0;
    for (int ply = 0; ply < depth; ++ply)
        bits |= kSpread[planes[ply][byte]] << (ply < 4 ? 3 - ply : 3 + upper - ply);
    return bits;
}

int scale_code(const uint8_t* codes, size_t supertile, int row) {
    const uint8_t byte = codes[supertile * 16 + static_cast<size_t>(row % 16)];
    return row < 16 ? byte & 15 : byte >> 4;
}

}  // namespace

void coded_product(const CodedProduct& p) {
    const CodedBlock& block = *p.block;
    for (int s = p.first; s < p.last; ++s) {
        const size_t tile = static_cast<size_t>(s);
        const size_t at_row = static_cast<size_t>(s - p.first) * kSupertile;
        for (int t = 0; t < p.tokens; ++t)
            for (int r = 0; r < kSupertile; ++r)
                p.out[static_cast<size_t>(t) * p.stride + at_row + static_cast<size_t>(r)] = 0.0f;
        for (const Run& run : block.runs)
            for (int g = run.first; g < run.first + run.count; ++g) {
                const size_t group = static_cast<size_t>(g);
                const uint8_t* const* planes = block.planes.data() + group * kMaxDepth;
                const bool wide = run.depth >= kWideDepth;
                int8_t hi[kSupertile][kGroup], lo[kSupertile][kGroup];
                for (int r = 0; r < kSupertile; ++r)
                    for (int c = 0; c < kGroup; ++c) {
                        const int bits = collect(planes, run.depth, tile, r, c);
                        hi[r][c] = p.levels->hi[run.depth][bits];
                        lo[r][c] = p.levels->lo[run.depth][bits];
                    }
                for (int t = 0; t < p.tokens; ++t) {
                    const size_t at = p.x->at(g, t);
                    const int8_t* xh = p.x->top(wide) + at * kGroup;
                    const int8_t* xl = p.x->lo + at * kGroup;
                    const float factor =
                        (p.x->scale[at] * block.group_scale[g]) * p.levels->unit[run.depth];
                    float* out = p.out + static_cast<size_t>(t) * p.stride + at_row;
                    for (int r = 0; r < kSupertile; ++r) {
                        int32_t top = 0, middle = 0;
                        for (int c = 0; c < kGroup; ++c) top += hi[r][c] * xh[c];
                        float value = static_cast<float>(top);
                        if (wide) {
                            for (int c = 0; c < kGroup; ++c)
                                middle += hi[r][c] * xl[c] + lo[r][c] * xh[c];
                            value = std::fmaf(static_cast<float>(middle), 1.0f / kSixteen, value);
                        }
                        const float step = p.levels->steps[scale_code(block.codes[group], tile, r)];
                        out[r] = std::fmaf(value * step, factor, out[r]);
                    }
                }
            }
        for (int t = 0; t < p.tokens; ++t)
            for (int r = 0; r < kSupertile; ++r) {
                p.out[static_cast<size_t>(t) * p.stride + at_row + static_cast<size_t>(r)] *=
                    block.row_scale[tile * kSupertile + static_cast<size_t>(r)];
            }
    }
}

void page_product(const PlyProduct& p) {
    const int8_t* x = p.x;
    int32_t* out = p.out;
    for (int page = 0; page < p.pages; ++page, x += p.x_stride, out += p.vectors * kHalf) {
        const uint8_t* planes[kMaxDepth] = {};
        for (int i = 0; i < p.depth; ++i) planes[i] = p.plies[page] + i * kUnitPly;
        for (int r = 0; r < kHalf; ++r) {
            int32_t level[kHalf];
            // The two vectors of a unit lie as the two halves of 16 rows of weights.
            for (int c = 0; c < kHalf; ++c)
                level[c] =
                    p.levels
                        ->rounded[p.depth][collect(planes, p.depth, 0, r % 16, r / 16 * kHalf + c)];
            for (int v = 0; v < p.vectors; ++v) {
                int32_t sum = 0;
                for (int c = 0; c < kHalf; ++c) sum += level[c] * x[v * kHalf + c];
                out[v * kHalf + r] = sum;
            }
        }
    }
}

void coded_row(const CodedBlock& block, const LevelTables& levels, int row, const uint16_t* order,
               int columns, float* out) {
    const size_t tile = static_cast<size_t>(row / kSupertile);
    const int r = row % kSupertile;
    for (size_t group = 0; group < static_cast<size_t>(block.groups); ++group)
        for (int ply = 0; ply < block.depth[group]; ++ply)
            for (int c = 0; c < kGroup; c += kGroup / 2)
                __builtin_prefetch(block.planes[group * kMaxDepth + static_cast<size_t>(ply)] +
                                   byte_of(tile, r, c));
    for (int g = 0; g < block.groups; ++g) {
        const size_t group = static_cast<size_t>(g);
        const int depth = block.depth[group];
        const int first = g * kGroup;
        const int count = columns - first < kGroup ? columns - first : kGroup;
        float v[kGroup] = {};
        if (depth > 0) {
            const uint8_t* const* planes = block.planes.data() + group * kMaxDepth;
            // As in the product: scales of the group and the level, then of the row.
            const float factor = block.group_scale[g] * levels.scale[depth] *
                                 levels.steps[scale_code(block.codes[group], tile, r)] *
                                 block.row_scale[row] * 0.125f;
            for (int c = 0; c < kGroup; c += c % 4 == 3 ? kGroup / 2 - 3 : 1) {
                uint64_t eight = collect_eight(planes, depth, tile, r, c);
                for (int i = 0; i < kGroup / 2; i += 4, eight >>= 8) {
                    const size_t bits = eight & 255;
                    v[c + i] = (static_cast<float>(levels.hi[depth][bits]) +
                                static_cast<float>(levels.lo[depth][bits]) / kSixteen) *
                               factor;
                }
            }
            for (int stride = 1; stride < kGroup; stride *= 2)
                for (int i = 0; i < kGroup; ++i)
                    if ((i & stride) == 0) {
                        const float a = v[i], b = v[i + stride];
                        v[i] = a + b;
                        v[i + stride] = a - b;
                    }
        }
        for (int c = 0; c < count; ++c) out[order[first + c]] = v[c];
    }
}

}  // namespace pliant::plain
