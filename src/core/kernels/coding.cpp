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

constexpr int kVectors = kGroup / kLanes, kHalfVectors = kHalf / kLanes;
constexpr int kCounted = 4;  // levels of the tree at which counting is cheaper than going down

// The code whose scale is nearest to a root mean square, by ratio.
uint8_t scale_code(float rms) {
    const float* end = kKvScales + 256;
    const float half_step = 1.0442738f;  // 2^(1/16)
    const float* found = std::lower_bound(kKvScales, end, rms / half_step);
    return static_cast<uint8_t>(std::min<long>(found - kKvScales, 255));
}

// Which of the 2^depth leaves of the tree a vector's values belong to. Thresholds rise with the
// nodes of one depth, so as many of them are passed as there are leaves below.
void find_leaves(const V* v, const float* thresholds, int depth, int32_t* leaf) {
    V passed[kHalfVectors];
    for (int i = 0; i < kHalfVectors; ++i) passed[i] = zero();
    for (int node = 1; node < 1 << std::min(depth, kCounted); ++node)
        for (int i = 0; i < kHalfVectors; ++i)
            passed[i] = add(passed[i], one_from(v[i], thresholds[node]));
    for (int i = 0; i < kHalfVectors; ++i) store_int(leaf + i * kLanes, passed[i]);
    if (depth <= kCounted) return;
    alignas(64) float values[kHalf];
    for (int i = 0; i < kHalfVectors; ++i) store(values + i * kLanes, v[i]);
    for (int i = 0; i < kHalf; ++i) {
        int node = leaf[i] + (1 << kCounted);
        for (int bit = kCounted; bit < depth; ++bit)
            node = 2 * node + (values[i] >= thresholds[node]);
        leaf[i] = node - (1 << depth);
    }
}

// Turned rows of the tokens in one group, as indices into the tree, which is the same for both
// halves but not to the same depth: to leaf[token][64], and the codes of their scales. The second
// of the `halves` may be empty.
void quantise(float (*x)[kGroup], int halves, const float* thresholds, const uint8_t* depths,
              uint8_t (*leaf)[kGroup], uint8_t* codes) {
    const float per_value = kHalfNorm / std::sqrt(static_cast<float>(halves * kHalf));
    for (int t = 0; t < kPageTokens; ++t) {
        V v[kVectors];
        for (int i = 0; i < kVectors; ++i) v[i] = load(x[t] + i * kLanes);
        rotate_halves(v);
        V squares = mul(v[0], v[0]);
        for (int i = 1; i < kVectors; ++i) squares = fma(v[i], v[i], squares);
        codes[t] = scale_code(std::sqrt(sum(squares)) * per_value);
        const V factor = set1(kHalfNorm / kKvScales[codes[t]]);
        for (V& part : v) part = mul(part, factor);
        for (int half = 0; half < 2; ++half) {
            alignas(64) int32_t found[kHalf];
            find_leaves(v + half * kHalfVectors, thresholds, depths[half], found);
            for (int i = 0; i < kHalf; ++i)
                leaf[t][half * kHalf + i] = static_cast<uint8_t>(found[i]);
        }
    }
}

// Writes the plies of one vector, 16 rows × 32 columns, in the order of docs/format.md, section 4.
// at(row, column): an index into the tree.
template <typename At>
void write_plies(int depth, uint8_t* plies, int vector, At&& at) {
    for (int r = 0; r < 16; ++r)
        for (int k = 0; k < 4; ++k) {
            uint64_t eight = 0;  // columns k, k + 4, …
            for (int j = 0; j < 8; ++j) eight |= static_cast<uint64_t>(at(r, 4 * j + k)) << (8 * j);
            uint8_t* to = plies + vector * 64 + r * 4 + k;
            for (int ply = 0; ply < depth; ++ply, to += kUnitPly) {
                const uint64_t bits = eight >> (depth - 1 - ply) & 0x0101010101010101u;
                *to = static_cast<uint8_t>(bits * 0x0102040810204080u >> 56);
            }
        }
}

// `half_at(channel, token)`: what is to be coded. `unit`: the first of the group.
template <typename Half>
void code_group(const PageCoding& p, const Turn& turn, int group, int unit, bool values,
                Half&& half_at) {
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
    quantise(x, count > kHalf ? 2 : 1, p.thresholds, p.map.depths + unit, leaf,
             p.slot + p.map.codes[unit / 2]);
    for (int half = 0; half < 2; ++half)
        for (int vector = 0; vector < 2; ++vector) {
            const auto at = [&](int r, int c) {
                const int row = 16 * vector + r;
                return values ? leaf[c][half * kHalf + row] : leaf[row][half * kHalf + c];
            };
            write_plies(p.map.depths[unit + half], p.slot + p.map.plies[unit + half], vector, at);
        }
}

void code_page(const PageCoding& p) {
    const size_t stride = (static_cast<size_t>(p.head_dim) + kLanes - 1) / kLanes * kLanes;
    for (int g = 0; g < p.groups; ++g) {
        code_group(p, p.key, g, p.keys + 2 * g, false, [&](int channel, int t) {
            return p.k[static_cast<size_t>(channel) * kPageTokens + static_cast<size_t>(t)];
        });
        code_group(p, p.value, g, p.values + 2 * g, true, [&](int channel, int t) {
            return p.v[static_cast<size_t>(t) * stride + static_cast<size_t>(channel)];
        });
    }
}

void turn_query(const Turn& turn, int head_dim, int groups, const float* query, int slot,
                const CodedQueries& out) {
    V of_mean = zero();
    for (int i = 0; i < head_dim; i += kLanes) {
        const int n = std::min(kLanes, head_dim - i);
        of_mean = fma(load_part(query + i, n), load_part(turn.mean + i, n), of_mean);
    }
    out.mean[slot] = sum(of_mean);
    for (int g = 0; g < groups; ++g) {
        alignas(64) float in[kGroup] = {};
        const int first = g * kGroup, count = std::min(kGroup, head_dim - first);
        for (int i = 0; i < count; ++i) {
            const int channel = turn.order[first + i];
            in[i] = query[channel] * turn.inverse[channel];
        }
        V v[kVectors];
        for (int i = 0; i < kVectors; ++i) v[i] = load(in + i * kLanes);
        rotate_halves(v);
        const float peak = largest(max(max(abs(v[0]), abs(v[1])), max(abs(v[2]), abs(v[3]))));
        const bool codable = can_be_coded(peak);
        if (!codable)
            for (V& part : v) part = zero();
        out.scale[g * kMaxQueries + slot] = peak * (kHalfNorm / 127.0f);
        for (int half = 0; half < 2; ++half) {
            const int at = (2 * g + half) * kMaxQueries + slot;
            out.sum[at] = code_bytes<kHalfVectors>(
                v + half * kHalfVectors, codable ? 127.0f / peak : 0.0f, out.x + at * kHalf);
        }
    }
}

void turn_back(const Turn& turn, int head_dim, int groups, const Attended& drawn) {
    alignas(64) float values[kMaxHeadDim];
    for (int g = 0; g < groups; ++g) {
        V v[kVectors];
        for (int i = 0; i < kVectors; ++i) v[i] = load(drawn.values + g * kGroup + i * kLanes);
        rotate_halves(v);
        for (int i = 0; i < kVectors; ++i)
            store(values + g * kGroup + i * kLanes, mul(v[i], set1(kHalfNorm)));
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
    k.turn_query = turn_query;
    k.turn_back = turn_back;
}

}  // namespace pliant::PLIANT_ISA
