// Keys and values of the KV cache to plies and back (docs/kv.md). Compiled once for each
// instruction set (see simd.h).
#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels.h"
#include "ops.h"
#include "rotate.h"
#include "simd.h"

namespace pliant::PLIANT_ISA {

namespace {

constexpr int kVectors = kGroup / kLanes;

// The code whose scale is nearest to a root mean square, by ratio.
uint8_t scale_code(float rms) {
    const float* end = kKvScales + 256;
    const float half_step = 1.0442738f;  // 2^(1/16)
    const float* found = std::lower_bound(kKvScales, end, rms / half_step);
    return static_cast<uint8_t>(std::min<long>(found - kKvScales, 255));
}

// Turned rows of the tokens, as indices into the tree at `depth`: to leaf[token][64], and the codes
// of their scales.
void quantise(float (*x)[kGroup], const float* thresholds, int depth, uint8_t (*leaf)[kGroup],
              uint8_t* codes) {
    for (int t = 0; t < kPageTokens; ++t) {
        V v[kVectors];
        for (int i = 0; i < kVectors; ++i) v[i] = load(x[t] + i * kLanes);
        rotate(v);
        V squares = mul(v[0], v[0]);
        for (int i = 1; i < kVectors; ++i) squares = fma(v[i], v[i], squares);
        // 1/8 of the norm of the transform, 1/8 of the mean.
        const float rms = std::sqrt(sum(squares)) * (1.0f / 64.0f);
        codes[t] = scale_code(rms);
        const V factor = set1(0.125f / kKvScales[codes[t]]);
        alignas(64) float z[kGroup];
        for (int i = 0; i < kVectors; ++i) store(z + i * kLanes, mul(v[i], factor));
        int32_t node[kGroup];
        for (int& n : node) n = 1;
        for (int bit = 0; bit < depth; ++bit)
            for (int i = 0; i < kGroup; ++i) node[i] = 2 * node[i] + (z[i] >= thresholds[node[i]]);
        for (int i = 0; i < kGroup; ++i) leaf[t][i] = static_cast<uint8_t>(node[i] - (1 << depth));
    }
}

// Writes the plies of one vector, 16 rows × 32 columns, in the order of docs/format.md, section 4.
// at(row, column): an index into the tree.
template <typename At>
void write_plies(int depth, uint8_t* slot, const uint32_t* places, size_t vector, At&& at) {
    for (int r = 0; r < 16; ++r)
        for (int k = 0; k < 4; ++k) {
            uint64_t eight = 0;  // columns k, k + 4, …
            for (int j = 0; j < 8; ++j) eight |= static_cast<uint64_t>(at(r, 4 * j + k)) << (8 * j);
            const size_t byte = vector * 64 + static_cast<size_t>(r * 4 + k);
            for (int ply = 0; ply < depth; ++ply) {
                const uint64_t bits = eight >> (depth - 1 - ply) & 0x0101010101010101u;
                slot[places[ply] + byte] = static_cast<uint8_t>(bits * 0x0102040810204080u >> 56);
            }
        }
}

// `half_at(channel, token)`: what is to be coded.
template <typename Half>
void code_unit(const PageCoding& p, const Turn& turn, int group, int unit, bool values,
               Half&& half_at) {
    const int depth = p.depths[unit];
    if (depth == 0) return;
    const int first = group * kGroup, count = std::min(kGroup, p.head_dim - first);
    const uint16_t* order = turn.order + first;
    alignas(64) float mean[kGroup] = {}, scale[kGroup] = {};
    for (int i = 0; i < count; ++i) mean[i] = turn.mean[order[i]], scale[i] = turn.scale[order[i]];
    alignas(64) float x[kPageTokens][kGroup];
    for (int t = 0; t < kPageTokens; ++t) {
        uint16_t halves[kGroup] = {};
        for (int i = 0; i < count; ++i) halves[i] = half_at(order[i], t);
        for (int i = 0; i < kGroup; i += kLanes)
            store(x[t] + i, mul(sub(load_half(halves + i), load(mean + i)), load(scale + i)));
    }
    uint8_t leaf[kPageTokens][kGroup];
    quantise(x, p.thresholds, depth, leaf, p.slot + static_cast<size_t>(unit) * kPageTokens);
    const uint32_t* places = p.places + unit * kMaxDepth;
    for (int vector = 0; vector < 4; ++vector)
        if (values)  // rows are channels
            write_plies(depth, p.slot, places, static_cast<size_t>(vector),
                        [&](int r, int c) { return leaf[c][16 * vector + r]; });
        else
            write_plies(depth, p.slot, places, static_cast<size_t>(vector), [&](int r, int c) {
                return leaf[16 * (vector / 2) + r][32 * (vector % 2) + c];
            });
}

void code_page(const PageCoding& p) {
    const size_t stride = (static_cast<size_t>(p.head_dim) + kLanes - 1) / kLanes * kLanes;
    for (int g = 0; g < p.groups; ++g) {
        code_unit(p, p.key, g, p.keys + g, false, [&](int channel, int t) {
            return p.k[static_cast<size_t>(channel) * kPageTokens + static_cast<size_t>(t)];
        });
        code_unit(p, p.value, g, p.values + g, true, [&](int channel, int t) {
            return p.v[static_cast<size_t>(t) * stride + static_cast<size_t>(channel)];
        });
    }
}

void turn_back(const Turn& turn, int head_dim, int groups, const Attended& drawn) {
    alignas(64) float values[kMaxHeadDim];
    for (int g = 0; g < groups; ++g) {
        V v[kVectors];
        for (int i = 0; i < kVectors; ++i) v[i] = load(drawn.values + g * kGroup + i * kLanes);
        rotate(v);
        for (int i = 0; i < kVectors; ++i)
            store(values + g * kGroup + i * kLanes, mul(v[i], set1(0.125f)));
    }
    for (int i = 0; i < groups * kGroup; ++i) drawn.values[i] = 0.0f;
    for (int i = 0; i < head_dim; ++i) {
        const int channel = turn.order[i];
        drawn.values[channel] =
            std::fmaf(turn.mean[channel], *drawn.total, values[i] * turn.inverse[channel]);
    }
}

}  // namespace

void fill_coding(Kernels& k) {
    k.code_page = code_page;
    k.turn_back = turn_back;
}

}  // namespace pliant::PLIANT_ISA
