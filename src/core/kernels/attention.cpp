// Attention over pages of the KV cache, in half precision and in plies. Compiled once for each
// instruction set (see simd.h).
//
// Softmax over pages as they come (Milakov and Gimelshein 2018): the largest score so far, the sum,
// and the weighted values are kept and rescaled when a larger score appears. Pages are counted from
// the beginning of the sequence, so a query gets the same bits however its neighbours are grouped.
#include <algorithm>
#include <cfloat>
#include <cmath>

#include "kernels.h"
#include "ops.h"
#include "simd.h"

namespace pliant::PLIANT_ISA {

namespace {

#define PLIANT_INLINE inline __attribute__((always_inline))

constexpr int kPair = 2 * kLanes;

// Two vectors of sums for each of Q rows. Members of nested structs become registers; elements of
// arrays that live through a loop stay in memory.
template <int Q>
struct RowSums {
    V x, y;
    RowSums<Q - 1> rest;

    PLIANT_INLINE void clear() {
        x = y = zero();
        rest.clear();
    }
    // The vectors at `first` and `second` of rows, times a factor for each row.
    PLIANT_INLINE void load_scaled(const Attended* rows, int first, int second,
                                   const float* factors) {
        const V factor = set1(*factors);
        x = mul(load(rows->values + first), factor);
        y = mul(load(rows->values + second), factor);
        rest.load_scaled(rows + 1, first, second, factors + 1);
    }
    PLIANT_INLINE void add(V a, V b, const float* const* factors, int column) {
        const V factor = set1(factors[0][column]);
        fma_to(x, a, factor);
        fma_to(y, b, factor);
        rest.add(a, b, factors + 1, column);
    }
    PLIANT_INLINE void write(const Attended* rows, int first, int second) const {
        store(rows->values + first, x);
        store(rows->values + second, y);
        rest.write(rows + 1, first, second);
    }
    PLIANT_INLINE void write(float (*rows)[kPageTokens]) const {
        store(rows[0], x);
        store(rows[0] + kLanes, y);
        rest.write(rows + 1);
    }
};
template <>
struct RowSums<0> {
    PLIANT_INLINE void clear() {}
    PLIANT_INLINE void load_scaled(const Attended*, int, int, const float*) {}
    PLIANT_INLINE void add(V, V, const float* const*, int) {}
    PLIANT_INLINE void write(const Attended*, int, int) const {}
    PLIANT_INLINE void write(float (*)[kPageTokens]) const {}
};

// The pages [begin, end) of those that were given which some of the queries see.
template <typename A>
struct Seen {
    int begin, end, last;
    explicit Seen(const A& a) {
        int first = a.position[0];
        last = 0;
        for (int q = 0; q < a.queries; ++q) {
            last = std::max(last, a.position[q]);
            first = std::min(first, a.window > 0 ? std::max(0, a.position[q] - a.window + 1) : 0);
        }
        begin = std::max(first / kPageTokens, a.first_page);
        end = std::min(last / kPageTokens + 1, a.first_page + a.pages);
    }
};

// What a query has seen so far.
struct Softmax {
    float best = -INFINITY, total = 0.0f;

    // Turns the scores of a page, whose first position is `base`, into weights relative to `best`;
    // returns the factor for what was drawn before.
    float take(float* p, int base, int position, int window, float softcap) {
        if (softcap > 0.0f)
            for (int i = 0; i < kPageTokens; i += kLanes) {
                const V cap = set1(softcap);
                store(p + i, mul(cap, tanh(div(load(p + i), cap))));
            }
        const int from = window > 0 ? position - window + 1 - base : 0, to = position + 1 - base;
        for (int j = 0; j < std::min(from, kPageTokens); ++j) p[j] = -INFINITY;
        for (int j = std::max(to, 0); j < kPageTokens; ++j) p[j] = -INFINITY;
        const float top = largest(max(load(p), load(p + kLanes)));
        if (top == -INFINITY) {  // this query sees nothing of the page
            std::fill(p, p + kPageTokens, 0.0f);
            return 1.0f;
        }
        const float now = std::max(best, top);
        const float alpha = first_lane(exp(set1(best - now)));
        const V e0 = exp(sub(load(p), set1(now))), e1 = exp(sub(load(p + kLanes), set1(now)));
        store(p, e0);
        store(p + kLanes, e1);
        total = std::fmaf(total, alpha, sum(add(e0, e1)));
        best = now;
        return alpha;
    }
};

template <int Q>
void attend_some(const Attention& a) {
    const int dims = a.head_dim, padded = (dims + kLanes - 1) / kLanes * kLanes;
    Softmax softmax[Q];
    float alpha[Q];
    alignas(64) float p[Q][kPageTokens];
    const float* weights[Q];
    for (int q = 0; q < Q; ++q) {
        weights[q] = p[q];
        std::fill(a.out[q].values, a.out[q].values + padded, 0.0f);
    }
    const Seen seen(a);
    for (int page = seen.begin; page < seen.end; ++page) {
        const int base = page * kPageTokens;
        const uint16_t* k = a.k[page - a.first_page];
        RowSums<Q> scores;
        scores.clear();
        for (int d = 0; d < dims; ++d, k += kPageTokens)
            scores.add(load_half(k), load_half(k + kLanes), a.q, d);
        scores.write(p);
        for (int q = 0; q < Q; ++q)
            alpha[q] = softmax[q].take(p[q], base, a.position[q], a.window, a.softcap);
        const uint16_t* v = a.v[page - a.first_page];
        const int tokens = std::min(kPageTokens, seen.last + 1 - base);
        for (int d = 0; d < padded; d += kPair) {
            // The last of an odd number of vectors is computed twice.
            const int e = std::min(d + kLanes, padded - kLanes);
            RowSums<Q> drawn;
            drawn.load_scaled(a.out, d, e, alpha);
            const uint16_t* value = v;
            for (int j = 0; j < tokens; ++j, value += padded)
                drawn.add(load_half(value + d), load_half(value + e), weights, j);
            drawn.write(a.out, d, e);
        }
    }
    for (int q = 0; q < Q; ++q) {
        *a.out[q].best = softmax[q].best;
        *a.out[q].total = softmax[q].total;
    }
}

void attend(const Attention& a) {
    switch (a.queries) {
        case 1:
            return attend_some<1>(a);
        case 2:
            return attend_some<2>(a);
        case 3:
            return attend_some<3>(a);
        case 4:
            return attend_some<4>(a);
        case 5:
            return attend_some<5>(a);
        case 6:
            return attend_some<6>(a);
        case 7:
            return attend_some<7>(a);
        default:
            return attend_some<8>(a);
    }
}

// The scales of the tokens of a unit.
struct Scales {
    V first, second;
    explicit Scales(const uint8_t* codes) {
        alignas(64) float values[kPageTokens];
        for (int i = 0; i < kPageTokens; ++i) values[i] = kKvScales[codes[i]];
        first = load(values);
        second = load(values + kLanes);
    }
};

// The product of a unit with vectors of int8, if it has any plies.
bool multiply(const CodedAttention& a, const uint8_t* slot, const SlotMap& map, int unit,
              const int8_t* x, const int32_t* sum, int32_t* out) {
    const int depth = map.depths[unit];
    if (depth > 0) page_product({slot + map.plies[unit], depth, a.levels, a.queries, x, sum, out});
    return depth > 0;
}

// Adds the scores of one group of channels to p.
void add_scores(const CodedAttention& a, const uint8_t* slot, const SlotMap& map, int group,
                float (*p)[kPageTokens]) {
    alignas(64) int32_t products[kMaxQueries * kPageTokens];
    const Scales scales(slot + map.codes[a.keys / 2 + group]);
    for (int half = 2 * group; half < 2 * group + 2; ++half) {
        const int8_t* x = a.q->x + half * kMaxQueries * kHalf;
        const int32_t* sum = a.q->sum + half * kMaxQueries;
        if (!multiply(a, slot, map, a.keys + half, x, sum, products)) continue;
        const float level = a.levels->scale[map.depths[a.keys + half]];
        for (int q = 0; q < a.queries; ++q) {
            const V factor = set1(a.q->scale[group * kMaxQueries + q] * level);
            const int32_t* product = products + q * kPageTokens;
            store(p[q], fma(mul(load_int(product), scales.first), factor, load(p[q])));
            store(p[q] + kLanes,
                  fma(mul(load_int(product + kLanes), scales.second), factor, load(p[q] + kLanes)));
        }
    }
}

// Adds the weighted values of one group of channels to what was drawn before, times alpha.
void add_values(const CodedAttention& a, const uint8_t* slot, const SlotMap& map, int group,
                const float (*p)[kPageTokens], const float* alpha) {
    alignas(64) int8_t x[kMaxQueries * kPageTokens];
    alignas(64) int32_t products[kMaxQueries * kHalf];
    int32_t sums[kMaxQueries];
    float factors[kMaxQueries];
    const Scales scales(slot + map.codes[a.values / 2 + group]);
    for (int q = 0; q < a.queries; ++q) {
        const V w0 = mul(load(p[q]), scales.first), w1 = mul(load(p[q] + kLanes), scales.second);
        const float peak = largest(max(w0, w1));  // none is negative
        // Nothing, or no numbers: these must not become integers.
        const bool usable = peak > 1e-30f && peak <= FLT_MAX;
        const V factor = set1(usable ? 127.0f / peak : 0.0f);
        alignas(64) int32_t whole[kPageTokens] = {};
        if (usable) {
            store_int(whole, mul(w0, factor));
            store_int(whole + kLanes, mul(w1, factor));
        }
        int32_t sum = 0;
        for (int i = 0; i < kPageTokens; ++i) {
            x[q * kPageTokens + i] = static_cast<int8_t>(whole[i]);
            sum += whole[i];
        }
        sums[q] = sum;
        factors[q] = peak * (1.0f / 127.0f);
    }
    for (int half = 0; half < 2; ++half) {
        const int unit = a.values + 2 * group + half;
        const bool some = multiply(a, slot, map, unit, x, sums, products);
        const float level = a.levels->scale[map.depths[unit]];
        for (int q = 0; q < a.queries; ++q) {
            float* to = a.out[q].values + group * kGroup + half * kHalf;
            const V factor = set1(factors[q] * level), before = set1(alpha[q]);
            for (int i = 0; i < kHalf; i += kLanes) {
                V value = mul(load(to + i), before);
                if (some) value = fma(load_int(products + q * kHalf + i), factor, value);
                store(to + i, value);
            }
        }
    }
}

// What a head has in a slot lies together, from the codes of its keys to the last ply of its
// values; it is fetched a page ahead.
void fetch(const CodedAttention& a, const uint8_t* slot, const SlotMap& map) {
    const int last = a.values + 2 * a.groups - 1;
    const uint8_t* end = slot + map.plies[last] + map.depths[last] * kUnitPly;
    for (const uint8_t* line = slot + map.codes[a.keys / 2]; line < end; line += 64)
        __builtin_prefetch(line);
}

void attend_coded(const CodedAttention& a) {
    Softmax softmax[kMaxQueries];
    float alpha[kMaxQueries];
    alignas(64) float p[kMaxQueries][kPageTokens];
    const int dims = a.groups * kGroup;
    for (int q = 0; q < a.queries; ++q) std::fill(a.out[q].values, a.out[q].values + dims, 0.0f);
    const Seen seen(a);
    for (int page = seen.begin; page < seen.end; ++page) {
        const uint8_t* slot = a.slot[page - a.first_page];
        const SlotMap& map = a.map[page - a.first_page];
        if (page + 1 < seen.end) {
            const int next = page + 1 - a.first_page;
            fetch(a, a.slot[next], a.map[next]);
        }
        for (int q = 0; q < a.queries; ++q) std::fill(p[q], p[q] + kPageTokens, a.q->mean[q]);
        for (int g = 0; g < a.groups; ++g) add_scores(a, slot, map, g, p);
        for (int q = 0; q < a.queries; ++q)
            alpha[q] =
                softmax[q].take(p[q], page * kPageTokens, a.position[q], a.window, a.softcap);
        for (int g = 0; g < a.groups; ++g) add_values(a, slot, map, g, p, alpha);
    }
    for (int q = 0; q < a.queries; ++q) {
        *a.out[q].best = softmax[q].best;
        *a.out[q].total = softmax[q].total;
    }
}

void attend_more(const Attended& more, int dims, const Attended& sum) {
    if (*more.total == 0.0f) return;
    const float best = std::max(*sum.best, *more.best);
    const V before = exp(set1(*sum.best - best)), after = exp(set1(*more.best - best));
    *sum.best = best;
    *sum.total = std::fmaf(*sum.total, first_lane(before), *more.total * first_lane(after));
    for (int d = 0; d < dims; d += kLanes)
        store(sum.values + d, fma(load(sum.values + d), before, mul(load(more.values + d), after)));
}

void attend_mean(const Attended& sum, int dims, float* out) {
    const V factor = set1(1.0f / *sum.total);
    for (int d = 0; d < dims; d += kLanes) {
        const int n = std::min(kLanes, dims - d);
        store_part(out + d, mul(load(sum.values + d), factor), n);
    }
}

}  // namespace

void fill_attention(Kernels& k) {
    k.attend = attend;
    k.attend_coded = attend_coded;
    k.attend_more = attend_more;
    k.attend_mean = attend_mean;
}

}  // namespace pliant::PLIANT_ISA
