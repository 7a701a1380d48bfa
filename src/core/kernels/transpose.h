// Sixteen tokens, one in each lane: a channel of all of them is a vector.
#pragma once

#if defined(PLIANT_AVX512)
#include <immintrin.h>

#include <algorithm>
#include <cstddef>

#include "simd.h"

namespace pliant::avx512 {

// Vectors of four lanes each, transposed in each quarter: a[i] lane j <- a[j] lane i.
inline __attribute__((always_inline)) void transpose_quarters(__m512 (&a)[4]) {
    const __m512 low0 = _mm512_unpacklo_ps(a[0], a[1]), high0 = _mm512_unpackhi_ps(a[0], a[1]);
    const __m512 low1 = _mm512_unpacklo_ps(a[2], a[3]), high1 = _mm512_unpackhi_ps(a[2], a[3]);
    a[0] = _mm512_shuffle_ps(low0, low1, 0x44);
    a[1] = _mm512_shuffle_ps(low0, low1, 0xEE);
    a[2] = _mm512_shuffle_ps(high0, high1, 0x44);
    a[3] = _mm512_shuffle_ps(high0, high1, 0xEE);
}

// Four channels of the tokens 0, 4, 8, 12 after the first one.
inline __attribute__((always_inline)) __m512 load_quarters(const float* x0, const float* x4,
                                                           const float* x8, const float* x12) {
    __m512 a = _mm512_castps128_ps512(_mm_loadu_ps(x0));
    a = _mm512_mask_broadcast_f32x4(a, 0x00F0, _mm_loadu_ps(x4));
    a = _mm512_mask_broadcast_f32x4(a, 0x0F00, _mm_loadu_ps(x8));
    return _mm512_mask_broadcast_f32x4(a, 0xF000, _mm_loadu_ps(x12));
}

// x[token][columns], rows `stride` apart, to to[columns][16], aligned to 64. Where there are fewer
// tokens the last one is repeated. change(channel, vector): what becomes of it on the way.
template <bool Full, typename F>
inline void transpose(const float* x, size_t stride, int count, int columns, float* to,
                      F&& change) {
    constexpr int kAhead = 64;  // channels; the other threads have written half of them
    const auto row = [&](int i) {
        return x + static_cast<size_t>(Full ? i : std::min(i, count - 1)) * stride;
    };
    const auto four = [&](int c) {
        __m512 a[4];
        for (int e = 0; e < 4; ++e)
            a[e] = load_quarters(row(e) + c, row(e + 4) + c, row(e + 8) + c, row(e + 12) + c);
        transpose_quarters(a);
        for (int i = 0; i < 4; ++i) store(to + (c + i) * kLanes, change(c + i, V{a[i]}));
    };
    int c = 0;
    for (; c + kLanes <= columns; c += kLanes) {
        for (int i = 0; i < kLanes; ++i) __builtin_prefetch(row(i) + c + kAhead);
        for (int i = 0; i < kLanes; i += 4) four(c + i);
    }
    for (; c + 4 <= columns; c += 4) four(c);
    for (; c < columns; ++c) {
        for (int i = 0; i < kLanes; ++i) to[c * kLanes + i] = row(i)[c];
        store(to + c * kLanes, change(c, load(to + c * kLanes)));
    }
}

}  // namespace pliant::avx512
#endif
