// Attention over pages of the KV cache in half precision, and what parts of attention have in
// common. Compiled once for each instruction set (see simd.h).
//
// A part of the positions goes through three loops: the scores with all its pages, the softmax, the
// weighted values. Loops of many independent steps keep the processor busy; page after page would
// wait for each softmax.
#include "attention.h"

#include "ops.h"
#include "vectors.h"

namespace pliant::PLIANT_ISA {

namespace {

constexpr int kPair = 2 * kLanes;

constexpr int kSlice = 64;  // channels whose factors lie together
// Pages on their way: one is computed in less time than it takes to come.
constexpr int kFetched = 3;
// Rows whose sums fit into registers: one vector of each, and two.
#if defined(PLIANT_AVX512)
constexpr int kRows = 12, kRowsOfTwo = 12;
#else
constexpr int kRows = 6, kRowsOfTwo = 3;
#endif

// One or two vectors of sums for each of Q rows. Members of nested structs become registers;
// elements of arrays that live through a loop stay in memory. Factors of the rows are `Stride`
// apart.
template <int Q, int Stride, bool Two>
struct RowSums {
    V x, y;
    RowSums<Q - 1, Stride, Two> rest;

    PLIANT_INLINE void clear() {
        x = y = zero();
        rest.clear();
    }
    PLIANT_INLINE void read(const Attended* rows, int first, int second) {
        x = load(rows->values + first);
        if constexpr (Two) y = load(rows->values + second);
        rest.read(rows + 1, first, second);
    }
    PLIANT_INLINE void add(V a, V b, const float* factors) {
        const V factor = set1(*factors);
        fma_to(x, a, factor);
        if constexpr (Two) fma_to(y, b, factor);
        rest.add(a, b, factors + Stride);
    }
    PLIANT_INLINE void write(const Attended* rows, int first, int second) const {
        store(rows->values + first, x);
        if constexpr (Two) store(rows->values + second, y);
        rest.write(rows + 1, first, second);
    }
    PLIANT_INLINE void write(float (*rows)[kPartTokens], int at) const {
        store(rows[0] + at, x);
        if constexpr (Two) store(rows[0] + at + kLanes, y);
        rest.write(rows + 1, at);
    }
};
template <int Stride, bool Two>
struct RowSums<0, Stride, Two> {
    PLIANT_INLINE void clear() {}
    PLIANT_INLINE void read(const Attended*, int, int) {}
    PLIANT_INLINE void add(V, V, const float*) {}
    PLIANT_INLINE void write(const Attended*, int, int) const {}
    PLIANT_INLINE void write(float (*)[kPartTokens], int) const {}
};

template <int Q>
void attend_some(const Attention& a) {
    constexpr bool kTwo = Q <= kRowsOfTwo;
    constexpr int kStep = kTwo ? kPair : kLanes;
    const int dims = a.head_dim, padded = (dims + kLanes - 1) / kLanes * kLanes;
    alignas(64) float scores[Q][kPartTokens], queries[kMaxHeadDim / kSlice][Q][kSlice];
    for (int d = 0; d < dims; d += kSlice)
        for (int q = 0; q < Q; ++q)
            std::copy_n(a.q[q] + d, std::min(kSlice, dims - d), queries[d / kSlice][q]);
    const Seen seen(a);
    const int count = seen.count(), base = seen.begin * kPageTokens;
    const uint16_t* const* k = a.k + (seen.begin - a.first_page);
    const uint16_t* const* v = a.v + (seen.begin - a.first_page);
    // Keys and then values, a line with each of the loops' steps.
    const auto later = [&](int i) { return i < count ? k[i] : v[std::min(i - count, count - 1)]; };
    for (int i = 0; i < std::min(kFetched, 2 * count); ++i)
        for (int line = 0; line < dims; ++line)
            __builtin_prefetch(later(i) + line * kPageTokens, 0, 1);
    for (int i = 0; i < count; ++i) {
        const uint16_t* next = later(i + kFetched);
        for (int token = 0; token < kPageTokens; token += kStep) {
            const uint16_t* key = k[i] + token;
            RowSums<Q, kSlice, kTwo> page;
            page.clear();
            for (int d = 0; d < dims; d += kSlice) {
                const float* query = queries[d / kSlice][0];
                for (const float* end = query + std::min(kSlice, dims - d); query != end; ++query) {
                    if (token == 0) __builtin_prefetch(next, 0, 1);
                    page.add(load_half(key), kTwo ? load_half(key + kLanes) : zero(), query);
                    key += kPageTokens;
                    next += kPageTokens;
                }
            }
            page.write(scores, i * kPageTokens + token);
        }
    }
    for (int q = 0; q < Q; ++q)
        find_best(scores[q], count, base, a.position[q], a.window, a.softcap, a.out[q]);
    for (int q = 0; q < Q; ++q) soften(scores[q], count, a.out[q]);
    for (int q = 0; q < Q; ++q) std::fill(a.out[q].values, a.out[q].values + padded, 0.0f);
    for (int i = 0; i < count; ++i) {
        const int tokens = std::min(kPageTokens, seen.last + 1 - base - i * kPageTokens);
        const uint16_t* next = later(count + i + kFetched);
        for (int d = 0; d < padded; d += kStep) {
            // The last of an odd number of vectors is computed twice.
            const int e = std::min(d + kLanes, padded - kLanes);
            RowSums<Q, kPartTokens, kTwo> drawn;
            drawn.read(a.out, d, e);
            const uint16_t* value = v[i];
            const float* weight = scores[0] + i * kPageTokens;
            for (const float* end = weight + tokens; weight != end; ++weight) {
                if (d % kPair == 0) {
                    __builtin_prefetch(next, 0, 1);
                    next += kPair;
                }
                drawn.add(load_half(value + d), kTwo ? load_half(value + e) : zero(), weight);
                value += padded;
            }
            drawn.write(a.out, d, e);
        }
    }
}

// The first `count` of the queries, at least Q.
template <int Q = 1>
void attend_first(const Attention& a, int count) {
    if constexpr (Q < kRows)
        if (count > Q) return attend_first<Q + 1>(a, count);
    attend_some<Q>(a);
}

void attend(const Attention& a) {
    Attention left = a;
    for (int count; left.queries > 0; left.queries -= count) {
        count = std::min(left.queries, kRows);
        attend_first(left, count);
        left.q += count;
        left.position += count;
        left.out += count;
    }
}

void attend_more(const Attended& more, int dims, const Attended& sum) {
    if (*more.total == 0.0f) return;
    // What has the larger score stays as it is.
    const bool larger = *more.best > *sum.best;
    const float less = larger ? *sum.best - *more.best : *more.best - *sum.best;
    const float factor = first_lane(exp(set1(less)));
    const float before = larger ? factor : 1.0f, after = larger ? 1.0f : factor;
    if (larger) *sum.best = *more.best;
    *sum.total = std::fmaf(*sum.total, before, *more.total * after);
    const V kept = set1(before), added = set1(after);
    for (int d = 0; d < dims; d += kLanes)
        store(sum.values + d, fma(load(sum.values + d), kept, mul(load(more.values + d), added)));
}

void attend_mean(const Attended& sum, int dims, float* out) {
    const V factor = set1(1.0f / *sum.total);
    each_vector(dims,
                [&](int d, int n) { store_n(out + d, mul(load(sum.values + d), factor), n); });
}

}  // namespace

void fill_attention(Kernels& k) {
    k.attend = attend;
    k.attend_coded = attend_coded;
    k.attend_more = attend_more;
    k.attend_mean = attend_mean;
}

}  // namespace pliant::PLIANT_ISA
