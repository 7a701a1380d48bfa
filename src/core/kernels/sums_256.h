// Sums of products in vectors of 32 bytes, of some tokens at once, in terms of a way to multiply
// bytes (plies_avx2.h).
#pragma once

#include <type_traits>

#include "ops.h"
#include "plies_avx2.h"

namespace pliant::avx2 {

constexpr int kPart = 8;  // rows of a vector of sums

// The steps of the rows of a part.
PLIANT_INLINE __m256 row_steps(const uint8_t* codes, int part, __m256 low, __m256 high) {
    __m256i code = _mm256_cvtepu8_epi32(
        _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + part % 2 * kPart)));
    if (part >= 2) code = _mm256_srli_epi32(code, 4);
    const __m256 above = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));  // bit 3 to the sign
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, code),
                            _mm256_permutevar8x32_ps(high, code), above);
}

// sums[8 rows] += value · step · factor.
PLIANT_INLINE void add_scaled(__m256 value, __m256 step, __m256 factor, float* sums) {
    _mm256_store_ps(sums,
                    _mm256_fmadd_ps(_mm256_mul_ps(value, step), factor, _mm256_load_ps(sums)));
}

// The sums of T tokens and two parts, of two neighbouring quads of columns at once where Dot takes
// pairs. Members of nested structs become registers; elements of arrays that live through a loop
// stay in memory.
template <typename Dot, int T>
struct Sums {
    __m256i sum0, sum1;
    Sums<Dot, T - 1> rest;

    PLIANT_INLINE void start(const int32_t* from) {
        sum0 = sum1 = _mm256_set1_epi32(*from);
        rest.start(from + 1);
    }
    PLIANT_INLINE void add(const int8_t* at, const __m256i* w) {
        const __m256i x = broadcast(at);
        if constexpr (Dot::kPairs) {
            const __m256i y = broadcast(at + 4);
            Dot::add(sum0, w[0], w[2], x, y);
            Dot::add(sum1, w[1], w[3], x, y);
        } else {
            Dot::add(sum0, w[0], x);
            Dot::add(sum1, w[1], x);
        }
        rest.add(at + kGroup, w);
    }
    PLIANT_INLINE void finish(const float* factors, const __m256* step, float* sums) const {
        const __m256 factor = _mm256_set1_ps(*factors);
        add_scaled(_mm256_cvtepi32_ps(sum0), step[0], factor, sums);
        add_scaled(_mm256_cvtepi32_ps(sum1), step[1], factor, sums + kPart);
        rest.finish(factors + 1, step, sums + kSupertile);
    }
};
template <typename Dot>
struct Sums<Dot, 0> {
    PLIANT_INLINE void start(const int32_t*) {}
    PLIANT_INLINE void add(const int8_t*, const __m256i*) {}
    PLIANT_INLINE void finish(const float*, const __m256*, float*) const {}
};

// The same with wide levels and inputs.
template <typename Dot, int T>
struct WideSums {
    __m256i top0, top1, middle0, middle1;
    WideSums<Dot, T - 1> rest;

    PLIANT_INLINE void start(const int32_t* sum_hi, const int32_t* sum_lo) {
        top0 = top1 = _mm256_set1_epi32(Dot::start(*sum_hi));
        middle0 = middle1 = _mm256_set1_epi32(Dot::start(*sum_lo + *sum_hi));
        rest.start(sum_hi + 1, sum_lo + 1);
    }
    PLIANT_INLINE void add(const int8_t* xh, const int8_t* xl, const __m256i* w, const __m256i* l) {
        const __m256i x = broadcast(xh), y = broadcast(xl);
        Dot::add(top0, w[0], x);
        Dot::add(top1, w[1], x);
        Dot::add(middle0, w[0], y);
        Dot::add(middle1, w[1], y);
        Dot::add(middle0, l[0], x);
        Dot::add(middle1, l[1], x);
        rest.add(xh + kGroup, xl + kGroup, w, l);
    }
    PLIANT_INLINE void finish(const float* factors, const __m256* step, float* sums) const {
        const __m256 factor = _mm256_set1_ps(*factors);
        add_scaled(both_parts(top0, middle0), step[0], factor, sums);
        add_scaled(both_parts(top1, middle1), step[1], factor, sums + kPart);
        rest.finish(factors + 1, step, sums + kSupertile);
    }
};
template <typename Dot>
struct WideSums<Dot, 0> {
    PLIANT_INLINE void start(const int32_t*, const int32_t*) {}
    PLIANT_INLINE void add(const int8_t*, const int8_t*, const __m256i*, const __m256i*) {}
    PLIANT_INLINE void finish(const float*, const __m256*, float*) const {}
};

constexpr int kQuads = kGroup / 4;

// The sums of T tokens and a part, for inputs that were spread: [token][kQuads].
template <typename Dot, int T>
struct SpreadSums {
    __m256i sum;
    SpreadSums<Dot, T - 1> rest;

    PLIANT_INLINE void start(const int32_t* from) {
        sum = _mm256_set1_epi32(*from);
        rest.start(from + 1);
    }
    PLIANT_INLINE void add(__m256i w0, __m256i w1, const __m256i* x) {
        if constexpr (Dot::kPairs) {
            Dot::add(sum, w0, w1, x[0], x[1]);
        } else {
            Dot::add(sum, w0, x[0]);
            Dot::add(sum, w1, x[1]);
        }
        rest.add(w0, w1, x + kQuads);
    }
    PLIANT_INLINE void finish(const float* factors, __m256 step, float* sums) const {
        add_scaled(_mm256_cvtepi32_ps(sum), step, _mm256_set1_ps(*factors), sums);
        rest.finish(factors + 1, step, sums + kSupertile);
    }
};
template <typename Dot>
struct SpreadSums<Dot, 0> {
    PLIANT_INLINE void start(const int32_t*) {}
    PLIANT_INLINE void add(__m256i, __m256i, const __m256i*) {}
    PLIANT_INLINE void finish(const float*, __m256, float*) const {}
};

// The sums of T tokens with deep levels of a part. The sign of a level moves to the input.
template <typename Dot, int T>
struct DeepSums {
    typename Dot::DeepSum sum;
    DeepSums<Dot, T - 1> rest;

    PLIANT_INLINE void add(const Deep& w, const int8_t* xh, const int8_t* xl) {
        sum.add(w, _mm256_sign_epi8(broadcast(xh), w.sign),
                _mm256_sign_epi8(broadcast(xl), w.sign));
        rest.add(w, xh + kGroup, xl + kGroup);
    }
    PLIANT_INLINE void finish(const float* factors, __m256 step, float* sums) const {
        add_scaled(sum.value(), step, _mm256_set1_ps(*factors), sums);
        rest.finish(factors + 1, step, sums + kSupertile);
    }
};
template <typename Dot>
struct DeepSums<Dot, 0> {
    PLIANT_INLINE void add(const Deep&, const int8_t*, const int8_t*) {}
    PLIANT_INLINE void finish(const float*, __m256, float*) const {}
};

// How products with levels of N plies are made.
template <typename Dot, int N>
using For = std::conditional_t<(N > kSmallDepth),
                               std::conditional_t<(N < kWideDepth), typename Dot::Large, Dot>,
                               typename Dot::Small>;

template <int N>
using Levels = std::conditional_t<(N >= kWideDepth), DeepTable<N>, Table<N>>;
template <int N>
PLIANT_INLINE Levels<N> levels_of(const CodedProduct& p, int flip) {
    if constexpr (N >= kWideDepth)
        return DeepTable<N>(p.levels->deep[N]);
    else
        return Table<N>(p.levels->hi[N], flip);
}

PLIANT_INLINE void factors_of(const CodedProduct& p, int g, int depth, int first, int tokens,
                              float* out) {
    const float* scale = p.x->scale + p.x->at(g, first);
    const float group = p.block->group_scale[g], level = p.levels->unit[depth];
    for (int t = 0; t < tokens; ++t) out[t] = (scale[t] * group) * level;
}

// Where the bytes of a part are in a ply of a supertile, for columns 32 h … 32 h + 31.
constexpr size_t place(int part, int h) {
    return static_cast<size_t>(128 * (part / 2) + 64 * h + 32 * (part % 2));
}

}  // namespace pliant::avx2
