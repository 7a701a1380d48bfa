// Everything but the product with coded matrices. Compiled once for each instruction set (see
// simd.h).
#include "ops.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>

#include "kernels.h"
#include "simd.h"

namespace pliant::PLIANT_ISA {

namespace {

#define PLIANT_INLINE inline __attribute__((always_inline))

constexpr float kLeastPeak = 1e-30f;  // 32512 / peak must be a number

template <typename F>
inline void each_vector(int n, F&& f) {  // f(offset, lanes)
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) f(i, kLanes);
    if (i < n) f(i, n - i);
}
inline V load_n(const float* p, int n) { return n == kLanes ? load(p) : load_part(p, n); }
inline void store_n(float* p, V a, int n) { n == kLanes ? store(p, a) : store_part(p, a, n); }

void prepare(const float* x, const uint16_t* order, int columns, bool wide, Prepared* out,
             int token) {
    for (int g = 0; g < out->groups; ++g) {
        alignas(64) float in[kGroup];
        const int first = g * kGroup, count = std::min(kGroup, columns - first);
        for (int c = 0; c < count; ++c) in[c] = x[order[first + c]];
        for (int c = count; c < kGroup; ++c) in[c] = 0.0f;

        // H = H4 ⊗ H16, in natural order: strides 1, 2, 4, 8 inside a vector, then 16 and 32
        // between them.
        V v[4];
        for (int i = 0; i < 4; ++i)
            v[i] = butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(load(in + 16 * i)))));
        const V s01 = add(v[0], v[1]), d01 = sub(v[0], v[1]);
        const V s23 = add(v[2], v[3]), d23 = sub(v[2], v[3]);
        v[0] = add(s01, s23);
        v[1] = add(d01, d23);
        v[2] = sub(s01, s23);
        v[3] = sub(d01, d23);
        const float peak = largest(max(max(abs(v[0]), abs(v[1])), max(abs(v[2]), abs(v[3]))));

        const size_t at = out->at(g, token);
        int8_t* hi = out->hi + at * kGroup;
        int8_t* lo = out->lo + at * kGroup;
        out->sum_hi[at] = out->sum_lo[at] = 0;
        if (!(peak > kLeastPeak && peak <= FLT_MAX)) {
            // Nothing, or no numbers: these must not become integers, whose sums would overflow.
            std::memset(hi, 0, kGroup);
            if (wide) std::memset(lo, 0, kGroup);
            out->scale[at] = peak <= kLeastPeak ? 0.0f : NAN;
            continue;
        }
        const V factor = set1(32512.0f / peak);  // 32512 = 127 · 256
        alignas(64) int32_t q[kGroup];
        for (int i = 0; i < 4; ++i) store_int(q + 16 * i, mul(v[i], factor));
        int32_t sum_hi = 0, sum_lo = 0;
        for (int c = 0; c < kGroup; ++c) {
            const int32_t h = (q[c] + 128) >> 8;
            hi[c] = static_cast<int8_t>(h);
            sum_hi += h;
        }
        if (wide) {
            for (int c = 0; c < kGroup; ++c) {
                const int32_t l = q[c] - ((q[c] + 128) >> 8) * 256;
                lo[c] = static_cast<int8_t>(l);
                sum_lo += l;
            }
        }
        out->scale[at] = peak * (0.125f / 127.0f);  // 1/8 is the norm of the transform
        out->sum_hi[at] = sum_hi;
        out->sum_lo[at] = sum_lo;
    }
}

template <bool BF16>
inline V load_weight(const void* weight, size_t at, int n) {
    if constexpr (BF16) {
        const uint16_t* p = static_cast<const uint16_t*>(weight) + at;
        if (n == kLanes) return load_bf16(p);
        uint16_t part[kLanes] = {};
        std::copy(p, p + n, part);
        return load_bf16(part);
    } else {
        return load_n(static_cast<const float*>(weight) + at, n);
    }
}

template <bool BF16>
void plain_rows(const PlainProduct& p) {
    for (int r = p.first; r < p.last; ++r)
        for (int t = 0; t < p.tokens; ++t) {
            const float* x = p.x + static_cast<size_t>(t) * p.x_stride;
            const size_t row = static_cast<size_t>(r) * static_cast<size_t>(p.columns);
            V total = zero();
            each_vector(p.columns, [&](int i, int n) {
                total = fma(load_weight<BF16>(p.weight, row + static_cast<size_t>(i), n),
                            load_n(x + i, n), total);
            });
            p.out[static_cast<size_t>(t) * p.stride + static_cast<size_t>(r - p.first)] =
                sum(total);
        }
}

void plain_product(const PlainProduct& p) { p.bf16 ? plain_rows<true>(p) : plain_rows<false>(p); }

void rms_norm(const float* x, const float* weight, int n, float eps, float* out) {
    V squares = zero();
    each_vector(n, [&](int i, int k) {
        const V v = load_n(x + i, k);
        squares = fma(v, v, squares);
    });
    const float mean = sum(squares) / static_cast<float>(n);
    const V factor = set1(1.0f / std::sqrt(mean + eps));
    each_vector(n, [&](int i, int k) {
        store_n(out + i, mul(mul(load_n(x + i, k), factor), load_n(weight + i, k)), k);
    });
}

void rope(float* x, const float* cosine, const float* sine, int n) {
    const int half = n / 2;
    each_vector(half, [&](int i, int k) {
        const V a = load_n(x + i, k), b = load_n(x + half + i, k);
        const V c = load_n(cosine + i, k), s = load_n(sine + i, k);
        store_n(x + i, sub(mul(a, c), mul(b, s)), k);
        store_n(x + half + i, add(mul(b, c), mul(a, s)), k);
    });
}

void gate(const float* g, const float* up, int n, Activation activation, float* out) {
    each_vector(n, [&](int i, int k) {
        const V x = load_n(g + i, k);
        V y;
        switch (activation) {
            case Activation::kSilu:
                y = div(x, add(set1(1.0f), exp(sub(zero(), x))));
                break;
            case Activation::kGeluTanh: {
                const V cubed = mul(mul(x, x), x);
                const V inner = mul(set1(0.7978845608f), fma(set1(0.044715f), cubed, x));
                y = mul(mul(set1(0.5f), x), add(set1(1.0f), tanh(inner)));
                break;
            }
            default: {
                float f[kLanes];
                store(f, x);
                for (float& v : f) v = 0.5f * v * (1.0f + std::erf(v * 0.70710678f));
                y = load(f);
            }
        }
        store_n(out + i, mul(y, load_n(up + i, k)), k);
    });
}

void softcap(float* x, int n, float cap) {
    const V c = set1(cap);
    each_vector(n,
                [&](int i, int k) { store_n(x + i, mul(c, tanh(div(load_n(x + i, k), c))), k); });
}

void to_half(const float* x, int n, uint16_t* out) {
    const V top = set1(65504.0f), bottom = set1(-65504.0f);
    each_vector(n, [&](int i, int k) {
        uint16_t part[kLanes];
        store_half(part, min(max(load_n(x + i, k), bottom), top));
        std::copy(part, part + k, out + i);
    });
}

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

// Softmax over pages as they come (Milakov and Gimelshein 2018): the largest score so far, the sum,
// and the weighted values are kept and rescaled when a larger score appears. The blocks are whole
// pages counted from the beginning of the sequence, so a query gets the same bits however its
// neighbours are grouped.
template <int Q>
void attend_some(const Attention& a) {
    const int dims = a.head_dim, padded = (dims + kLanes - 1) / kLanes * kLanes;
    float best[Q], total[Q], alpha[Q];
    alignas(64) float p[Q][kPageTokens];
    const float* weights[Q];
    int last = 0, first = a.position[0];
    for (int q = 0; q < Q; ++q) {
        best[q] = -INFINITY;
        total[q] = 0.0f;
        weights[q] = p[q];
        last = std::max(last, a.position[q]);
        first = std::min(first, a.window > 0 ? std::max(0, a.position[q] - a.window + 1) : 0);
        std::fill(a.out[q].values, a.out[q].values + padded, 0.0f);
    }
    const int begin = std::max(first / kPageTokens, a.first_page);
    const int end = std::min(last / kPageTokens + 1, a.first_page + a.pages);
    for (int page = begin; page < end; ++page) {
        const int base = page * kPageTokens;
        const uint16_t* k = a.k[page - a.first_page];
        RowSums<Q> scores;
        scores.clear();
        for (int d = 0; d < dims; ++d, k += kPageTokens)
            scores.add(load_half(k), load_half(k + kLanes), a.q, d);
        scores.write(p);
        for (int q = 0; q < Q; ++q) {
            if (a.softcap > 0.0f)
                for (int i = 0; i < kPageTokens; i += kLanes) {
                    const V cap = set1(a.softcap);
                    store(p[q] + i, mul(cap, tanh(div(load(p[q] + i), cap))));
                }
            const int from = a.window > 0 ? a.position[q] - a.window + 1 - base : 0;
            const int to = a.position[q] + 1 - base;
            for (int j = 0; j < std::min(from, kPageTokens); ++j) p[q][j] = -INFINITY;
            for (int j = std::max(to, 0); j < kPageTokens; ++j) p[q][j] = -INFINITY;
            const float top = largest(max(load(p[q]), load(p[q] + 16)));
            alpha[q] = 1.0f;
            if (top == -INFINITY) {  // this query sees nothing of the page
                std::fill(p[q], p[q] + kPageTokens, 0.0f);
                continue;
            }
            const float now = std::max(best[q], top);
            alpha[q] = first_lane(exp(set1(best[q] - now)));
            const V e0 = exp(sub(load(p[q]), set1(now))), e1 = exp(sub(load(p[q] + 16), set1(now)));
            store(p[q], e0);
            store(p[q] + 16, e1);
            total[q] = std::fmaf(total[q], alpha[q], sum(add(e0, e1)));
            best[q] = now;
        }
        const uint16_t* v = a.v[page - a.first_page];
        const int tokens = std::min(kPageTokens, last + 1 - base);
        for (int d = 0; d < padded; d += 2 * kLanes) {
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
        *a.out[q].best = best[q];
        *a.out[q].total = total[q];
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
    each_vector(dims,
                [&](int d, int n) { store_n(out + d, mul(load(sum.values + d), factor), n); });
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

}  // namespace

void fill_ops(Kernels& k) {
    k.prepare = prepare;
    k.plain_product = plain_product;
    k.rms_norm = rms_norm;
    k.rope = rope;
    k.gate = gate;
    k.softcap = softcap;
    k.to_half = to_half;
    k.attend = attend;
    k.attend_more = attend_more;
    k.attend_mean = attend_mean;
}

}  // namespace pliant::PLIANT_ISA
