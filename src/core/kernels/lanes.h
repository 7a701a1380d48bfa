// Tokens, one in each lane: a channel of all of them is a vector, so that nothing is added up or
// compared across lanes.
#pragma once

#include <algorithm>
#include <cstddef>

#include "ops.h"
#include "simd.h"
#include "unroll.h"
#if defined(PLIANT_AVX512) || defined(PLIANT_AVX2)
#include "bytes.h"
#endif

namespace pliant::PLIANT_ISA {

// The largest value of a group becomes this whole number.
inline constexpr float kTop = 127.0f * kSixteen;
inline constexpr int kSixteenShift = 4, kNarrowShift = 5, kNarrowStep = kSixteen * kNarrowUnit;
static_assert(1 << kSixteenShift == kSixteen && 1 << kNarrowShift == kNarrowStep);

#if defined(PLIANT_AVX512) || defined(PLIANT_AVX2)
using LaneBytes = PLIANT_BYTES::B;  // four neighbouring channels of every lane

#if defined(PLIANT_AVX512)
using Lanes = V;
inline constexpr int kTokens = 16;
inline constexpr int kWorthwhile = 6;  // tokens from which on this is faster than one by one

PLIANT_INLINE Lanes load_lanes(const float* p) { return load(p); }
PLIANT_INLINE Lanes all_lanes(float x) { return set1(x); }
PLIANT_INLINE Lanes unpack_low(Lanes a, Lanes b) { return {_mm512_unpacklo_ps(a.v, b.v)}; }
PLIANT_INLINE Lanes unpack_high(Lanes a, Lanes b) { return {_mm512_unpackhi_ps(a.v, b.v)}; }
PLIANT_INLINE Lanes low_pairs(Lanes a, Lanes b) { return {_mm512_shuffle_ps(a.v, b.v, 0x44)}; }
PLIANT_INLINE Lanes high_pairs(Lanes a, Lanes b) { return {_mm512_shuffle_ps(a.v, b.v, 0xEE)}; }

// Four channels of every fourth token; row(i): where those of token i begin.
template <typename F>
PLIANT_INLINE Lanes load_parts(int first, F&& row) {
    __m512 a = _mm512_castps128_ps512(_mm_loadu_ps(row(first)));
    a = _mm512_mask_broadcast_f32x4(a, 0x00F0, _mm_loadu_ps(row(first + 4)));
    a = _mm512_mask_broadcast_f32x4(a, 0x0F00, _mm_loadu_ps(row(first + 8)));
    return {_mm512_mask_broadcast_f32x4(a, 0xF000, _mm_loadu_ps(row(first + 12)))};
}
#else
struct Lanes {
    __m256 v;
};
inline constexpr int kTokens = 8, kWorthwhile = 4;

PLIANT_INLINE Lanes load_lanes(const float* p) { return {_mm256_loadu_ps(p)}; }
PLIANT_INLINE Lanes all_lanes(float x) { return {_mm256_set1_ps(x)}; }
PLIANT_INLINE void store(float* p, Lanes a) { _mm256_storeu_ps(p, a.v); }
PLIANT_INLINE Lanes add(Lanes a, Lanes b) { return {_mm256_add_ps(a.v, b.v)}; }
PLIANT_INLINE Lanes sub(Lanes a, Lanes b) { return {_mm256_sub_ps(a.v, b.v)}; }
PLIANT_INLINE Lanes mul(Lanes a, Lanes b) { return {_mm256_mul_ps(a.v, b.v)}; }
PLIANT_INLINE Lanes abs(Lanes a) { return {abs(a.v)}; }
PLIANT_INLINE Lanes max_bits(Lanes a, Lanes b) { return {max_bits(a.v, b.v)}; }
PLIANT_INLINE Lanes unpack_low(Lanes a, Lanes b) { return {_mm256_unpacklo_ps(a.v, b.v)}; }
PLIANT_INLINE Lanes unpack_high(Lanes a, Lanes b) { return {_mm256_unpackhi_ps(a.v, b.v)}; }
PLIANT_INLINE Lanes low_pairs(Lanes a, Lanes b) { return {_mm256_shuffle_ps(a.v, b.v, 0x44)}; }
PLIANT_INLINE Lanes high_pairs(Lanes a, Lanes b) { return {_mm256_shuffle_ps(a.v, b.v, 0xEE)}; }

template <typename F>
PLIANT_INLINE Lanes load_parts(int first, F&& row) {
    const __m256 a = _mm256_castps128_ps256(_mm_loadu_ps(row(first)));
    return {_mm256_insertf128_ps(a, _mm_loadu_ps(row(first + 4)), 1)};
}
#endif

// Vectors of four lanes each, transposed in each part of 16 bytes: v[i] lane j <- v[j] lane i.
PLIANT_INLINE void transpose_parts(Lanes (&v)[4]) {
    const Lanes low0 = unpack_low(v[0], v[1]), high0 = unpack_high(v[0], v[1]);
    const Lanes low1 = unpack_low(v[2], v[3]), high1 = unpack_high(v[2], v[3]);
    v[0] = low_pairs(low0, low1);
    v[1] = high_pairs(low0, low1);
    v[2] = low_pairs(high0, high1);
    v[3] = high_pairs(high0, high1);
}

// x[token][columns], rows `stride` apart, to to[columns][kTokens], aligned to 64. Where there are
// fewer tokens the last one is repeated. change(channel, vector): what becomes of it on the way.
template <bool Full, typename F>
inline void transpose(const float* x, size_t stride, int count, int columns, float* to,
                      F&& change) {
    constexpr int kAhead = 64;  // channels; the other threads have written half of them
    constexpr int kLine = 16;
    const auto row = [&](int i) PLIANT_LAMBDA {
        return x + static_cast<size_t>(Full ? i : std::min(i, count - 1)) * stride;
    };
    const auto four = [&](int c) PLIANT_LAMBDA {
        Lanes a[4];
        for (int e = 0; e < 4; ++e)
            a[e] = load_parts(e, [&](int i) PLIANT_LAMBDA { return row(i) + c; });
        transpose_parts(a);
        for (int i = 0; i < 4; ++i) store(to + (c + i) * kTokens, change(c + i, a[i]));
    };
    int c = 0;
    for (; c + kLine <= columns; c += kLine) {
        for (int i = 0; i < kTokens; ++i) __builtin_prefetch(row(i) + c + kAhead);
        for (int i = 0; i < kLine; i += 4) four(c + i);
    }
    for (; c + 4 <= columns; c += 4) four(c);
    for (; c < columns; ++c) {
        for (int i = 0; i < kTokens; ++i) to[c * kTokens + i] = row(i)[c];
        store(to + c * kTokens, change(c, load_lanes(to + c * kTokens)));
    }
}

// The sum of each lane.
PLIANT_INLINE LaneBytes lane_sums(const LaneBytes (&v)[kGroup / 4]) {
    using namespace PLIANT_BYTES;
    LaneBytes pairs = bytes(0);
    for (const LaneBytes& part : v) pairs = add_words(pairs, pair_products(bytes(1), part));
    return word_products(pairs, words(1));
}

// A LaneCoder makes whole numbers of the inputs of a group, four channels at a time; zeros where
// the peak of a lane cannot be coded.
#if defined(PLIANT_AVX512)
class LaneCoder {
  public:
    explicit LaneCoder(Lanes peak)
        : coded_(_mm512_cmp_ps_mask(peak.v, _mm512_set1_ps(kLeastPeak), _CMP_GT_OQ) &
                 _mm512_cmp_ps_mask(peak.v, _mm512_set1_ps(FLT_MAX), _CMP_LE_OQ)),
          factor_(_mm512_div_ps(_mm512_set1_ps(kTop), peak.v)) {}

    PLIANT_INLINE LaneBytes narrow(const float (*x)[kTokens]) const {
        __m512i q[4];
        for (int i = 0; i < 4; ++i) q[i] = rounded(x[i], kNarrowStep);
        return bytes<kNarrowShift>(q);
    }
    PLIANT_INLINE void wide(const float (*x)[kTokens], LaneBytes& hi, LaneBytes& lo) const {
        __m512i q[4];
        for (int i = 0; i < 4; ++i) q[i] = rounded(x[i], kSixteen);
        hi = bytes<kSixteenShift>(q);
        lo = _mm512_sub_epi8(_mm512_and_si512(bytes<0>(q), _mm512_set1_epi8(kSixteen - 1)),
                             _mm512_set1_epi8(kSixteen / 2));
    }

  private:
    // Whole numbers and half a `step`, in the low bits.
    PLIANT_INLINE __m512i rounded(const float* x, int step) const {
        return _mm512_castps_si512(
            _mm512_add_ps(_mm512_maskz_mul_ps(coded_, _mm512_load_ps(x), factor_),
                          _mm512_set1_ps(kMagic + static_cast<float>(step / 2))));
    }
    // Of each of four channels a byte, from bit `From` on.
    template <int From>
    static PLIANT_INLINE __m512i bytes(const __m512i (&q)[4]) {
        const auto to = [&](int i) PLIANT_LAMBDA {  // bit From to byte i
            const int by = 8 * i - From;
            return by < 0    ? _mm512_srli_epi32(q[i], static_cast<unsigned>(-by))
                   : by == 0 ? q[i]
                             : _mm512_slli_epi32(q[i], static_cast<unsigned>(by));
        };
        const __m512i even = _mm512_mask_blend_epi8(0x2222222222222222, to(0), to(1));
        const __m512i odd = _mm512_mask_blend_epi8(0x8888888888888888, to(2), to(3));
        return _mm512_mask_blend_epi16(0xAAAAAAAA, even, odd);
    }
    __mmask16 coded_;
    __m512 factor_;
};

// Quarters of four vectors, transposed.
PLIANT_INLINE void exchange_quarters(__m512 (&a)[4]) {
    const __m512 even0 = _mm512_shuffle_f32x4(a[0], a[1], 0x88);
    const __m512 odd0 = _mm512_shuffle_f32x4(a[0], a[1], 0xDD);
    const __m512 even1 = _mm512_shuffle_f32x4(a[2], a[3], 0x88);
    const __m512 odd1 = _mm512_shuffle_f32x4(a[2], a[3], 0xDD);
    a[0] = _mm512_shuffle_f32x4(even0, even1, 0x88);
    a[1] = _mm512_shuffle_f32x4(odd0, odd1, 0x88);
    a[2] = _mm512_shuffle_f32x4(even0, even1, 0xDD);
    a[3] = _mm512_shuffle_f32x4(odd0, odd1, 0xDD);
}

// Rows of 64 bytes of `count` tokens from their columns, four in a vector, and their sums.
template <bool Full>
PLIANT_INLINE void write_bytes(const LaneBytes (&v)[kGroup / 4], int count, int8_t* out,
                               int32_t* sums) {
    Lanes a[4][4];  // [vector / 4][vector % 4], then [vector / 4][token % 4]
    for (int i = 0; i < kGroup / 4; ++i) a[i / 4][i % 4].v = _mm512_castsi512_ps(v[i]);
    for (auto& four : a) transpose_parts(four);
    for (int e = 0; e < 4; ++e) {
        __m512 row[4] = {a[0][e].v, a[1][e].v, a[2][e].v, a[3][e].v};
        exchange_quarters(row);
        for (int i = 0; i < 4; ++i)
            if (Full || 4 * i + e < count) _mm512_store_ps(out + (4 * i + e) * kGroup, row[i]);
    }
    _mm512_mask_storeu_epi32(sums, static_cast<__mmask16>((1u << count) - 1), lane_sums(v));
}
#else
class LaneCoder {
  public:
    explicit LaneCoder(Lanes peak)
        : coded_(_mm256_castps_si256(
              _mm256_and_ps(_mm256_cmp_ps(peak.v, _mm256_set1_ps(kLeastPeak), _CMP_GT_OQ),
                            _mm256_cmp_ps(peak.v, _mm256_set1_ps(FLT_MAX), _CMP_LE_OQ)))),
          factor_(_mm256_div_ps(_mm256_set1_ps(kTop), peak.v)) {}

    PLIANT_INLINE LaneBytes narrow(const float (*x)[kTokens]) const {
        __m256i q[4];
        for (int i = 0; i < 4; ++i) q[i] = shifted<kNarrowShift>(rounded(x[i]));
        return bytes(q);
    }
    PLIANT_INLINE void wide(const float (*x)[kTokens], LaneBytes& hi, LaneBytes& lo) const {
        __m256i high[4], low[4];
        for (int i = 0; i < 4; ++i) {
            const __m256i q = rounded(x[i]);
            high[i] = shifted<kSixteenShift>(q);
            low[i] = _mm256_sub_epi32(q, _mm256_slli_epi32(high[i], kSixteenShift));
        }
        hi = bytes(high);
        lo = bytes(low);
    }

  private:
    PLIANT_INLINE __m256i rounded(const float* x) const {
        return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(x), factor_));
    }
    template <int Shift>
    static PLIANT_INLINE __m256i shifted(__m256i q) {
        return _mm256_srai_epi32(_mm256_add_epi32(q, _mm256_set1_epi32(1 << (Shift - 1))), Shift);
    }
    // Of each of four channels a byte.
    PLIANT_INLINE __m256i bytes(const __m256i (&q)[4]) const {
        const __m256i channels =
            _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
        const __m256i lanes = _mm256_broadcastsi128_si256(
            _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
        return _mm256_and_si256(_mm256_shuffle_epi8(channels, lanes), coded_);
    }
    __m256i coded_;
    __m256 factor_;
};

template <bool Full>
PLIANT_INLINE void write_bytes(const LaneBytes (&v)[kGroup / 4], int count, int8_t* out,
                               int32_t* sums) {
    for (int half = 0; half < 2; ++half) {
        Lanes a[2][4];  // [vector / 4][vector % 4], then [vector / 4][token % 4]
        for (int i = 0; i < 8; ++i) a[i / 4][i % 4].v = _mm256_castsi256_ps(v[8 * half + i]);
        for (auto& four : a) transpose_parts(four);
        for (int e = 0; e < 4; ++e) {
            float* to = reinterpret_cast<float*>(out + e * kGroup + half * kGroup / 2);
            if (Full || e < count)
                _mm256_store_ps(to, _mm256_permute2f128_ps(a[0][e].v, a[1][e].v, 0x20));
            if (Full || e + 4 < count)
                _mm256_store_ps(to + kGroup, _mm256_permute2f128_ps(a[0][e].v, a[1][e].v, 0x31));
        }
    }
    alignas(32) int32_t sum[kTokens];
    PLIANT_BYTES::store(sum, lane_sums(v));
    std::copy_n(sum, count, sums);
}
#endif
#endif

}  // namespace pliant::PLIANT_ISA
