// Sixteen floats at a time, for the instruction set that this file is compiled for. Every function
// is the same IEEE operation in each of them, so kernels built on it give the same bits everywhere.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../coded.h"

#if defined(PLIANT_AVX512)
#include <immintrin.h>
#define PLIANT_ISA avx512
#elif defined(PLIANT_AVX2)
#include <immintrin.h>
#define PLIANT_ISA avx2
#else
#define PLIANT_ISA plain
#endif

namespace pliant::PLIANT_ISA {

inline constexpr int kLanes = 16;

#if defined(PLIANT_AVX512)

struct V {
    __m512 v;
};
inline V load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline V load_part(const float* p, int n) {
    return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p)};
}
inline void store(float* p, V a) { _mm512_storeu_ps(p, a.v); }
inline void store_part(float* p, V a, int n) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), a.v);
}
inline __m256 lower(V a) { return _mm512_castps512_ps256(a.v); }
inline __m256 upper(V a) { return _mm512_extractf32x8_ps(a.v, 1); }
inline V set1(float x) { return {_mm512_set1_ps(x)}; }
inline V add(V a, V b) { return {_mm512_add_ps(a.v, b.v)}; }
inline V sub(V a, V b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline V mul(V a, V b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline V div(V a, V b) { return {_mm512_div_ps(a.v, b.v)}; }
inline V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// sum += a · b in place: with the intrinsic GCC 12 keeps a second copy of every sum of a long loop
// in memory.
inline void fma_to(V& sum, V a, V b) {
    asm("vfmadd231ps %2, %1, %0" : "+v"(sum.v) : "v"(a.v), "v"(b.v));
}
inline V max(V a, V b) { return {_mm512_max_ps(a.v, b.v)}; }
inline V min(V a, V b) { return {_mm512_min_ps(a.v, b.v)}; }
inline V round(V a) { return {_mm512_roundscale_ps(a.v, 0)}; }
inline V scale2(V a, V n) { return {_mm512_scalef_ps(a.v, n.v)}; }  // a · 2^n, n a whole number
inline V one_from(V a, float limit) {                               // a >= limit ? 1 : 0
    const __mmask16 above = _mm512_cmp_ps_mask(a.v, _mm512_set1_ps(limit), _CMP_GE_OQ);
    return {_mm512_maskz_mov_ps(above, _mm512_set1_ps(1.0f))};
}
inline V zero_below(V a, V x, float limit) {  // x < limit ? 0 : a
    const __mmask16 keep = _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(limit), _CMP_NLT_UQ);
    return {_mm512_maskz_mov_ps(keep, a.v)};
}
inline V add_below(V sum, V a, V x, float limit) {  // x < limit ? sum + a : sum
    const __mmask16 below = _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(limit), _CMP_LT_OQ);
    return {_mm512_mask_add_ps(sum.v, below, sum.v, a.v)};
}
inline unsigned lanes_below(V a, float limit) {  // bit i: lane i < limit
    return _mm512_cmp_ps_mask(a.v, _mm512_set1_ps(limit), _CMP_LT_OQ);
}
inline V abs(V a) { return {_mm512_abs_ps(a.v)}; }
// The larger one of values that are not negative; what is no number is larger than all numbers.
inline V max_bits(V a, V b) {
    return {
        _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a.v), _mm512_castps_si512(b.v)))};
}
inline V load_half(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline void store_half(uint16_t* p, V a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, 0));
}
inline V load_bf16(const uint16_t* p) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16))};
}
inline void store_int(int32_t* p, V a) { _mm512_storeu_si512(p, _mm512_cvtps_epi32(a.v)); }
inline V load_int(const int32_t* p) { return {_mm512_cvtepi32_ps(_mm512_loadu_si512(p))}; }
inline void store_bytes(int8_t* p, V a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)));
}
inline V kv_scales(const uint8_t* codes) {
    const __m512i code =
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    // The first octave twice: the index is taken by its low four bits.
    const __m512i octave = _mm512_castps_si512(
        _mm512_permutexvar_ps(code, _mm512_broadcast_f32x8(_mm256_loadu_ps(kKvScales))));
    return {_mm512_castsi512_ps(
        _mm512_add_epi32(octave, _mm512_slli_epi32(_mm512_srli_epi32(code, 3), 23)))};
}
template <int S>
inline V butterfly(V a) {  // lanes i, i ^ S: sum in the lower, difference in the upper
    __m512 swapped;
    if constexpr (S == 1) swapped = _mm512_permute_ps(a.v, 0xB1);
    if constexpr (S == 2) swapped = _mm512_permute_ps(a.v, 0x4E);
    if constexpr (S == 4) swapped = _mm512_shuffle_f32x4(a.v, a.v, 0xB1);
    if constexpr (S == 8) swapped = _mm512_shuffle_f32x4(a.v, a.v, 0x4E);
    constexpr __mmask16 upper = S == 1 ? 0xAAAA : S == 2 ? 0xCCCC : S == 4 ? 0xF0F0 : 0xFF00;
    return {_mm512_mask_sub_ps(_mm512_add_ps(swapped, a.v), upper, swapped, a.v)};
}

#elif defined(PLIANT_AVX2)

struct V {
    __m256 a, b;
};
inline V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline V load_part(const float* p, int n) {
    alignas(32) float t[16] = {};
    std::memcpy(t, p, sizeof(float) * static_cast<size_t>(n));
    return load(t);
}
inline void store(float* p, V x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
inline void store_part(float* p, V x, int n) {
    alignas(32) float t[16];
    store(t, x);
    std::memcpy(p, t, sizeof(float) * static_cast<size_t>(n));
}
inline __m256 lower(V x) { return x.a; }
inline __m256 upper(V x) { return x.b; }
inline V set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline V add(V x, V y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline V sub(V x, V y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline V mul(V x, V y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline V div(V x, V y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline V fma(V x, V y, V z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline void fma_to(V& sum, V x, V y) {
    asm("vfmadd231ps %2, %1, %0" : "+x"(sum.a) : "x"(x.a), "x"(y.a));
    asm("vfmadd231ps %2, %1, %0" : "+x"(sum.b) : "x"(x.b), "x"(y.b));
}
inline V max(V x, V y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline V min(V x, V y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline V round(V x) { return {_mm256_round_ps(x.a, 0), _mm256_round_ps(x.b, 0)}; }
inline V scale2(V x, V n) {
    const __m256i bias = _mm256_set1_epi32(127);
    const auto power = [&](__m256 e) {
        return _mm256_castsi256_ps(
            _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(e), bias), 23));
    };
    return {_mm256_mul_ps(x.a, power(n.a)), _mm256_mul_ps(x.b, power(n.b))};
}
inline V one_from(V x, float limit) {
    const __m256 l = _mm256_set1_ps(limit), one = _mm256_set1_ps(1.0f);
    return {_mm256_and_ps(one, _mm256_cmp_ps(x.a, l, _CMP_GE_OQ)),
            _mm256_and_ps(one, _mm256_cmp_ps(x.b, l, _CMP_GE_OQ))};
}
inline V zero_below(V a, V x, float limit) {
    const __m256 l = _mm256_set1_ps(limit);
    return {_mm256_and_ps(a.a, _mm256_cmp_ps(x.a, l, _CMP_NLT_UQ)),
            _mm256_and_ps(a.b, _mm256_cmp_ps(x.b, l, _CMP_NLT_UQ))};
}
inline V add_below(V sum, V a, V x, float limit) {  // sums are not negative: + 0 changes nothing
    const __m256 l = _mm256_set1_ps(limit);
    return {_mm256_add_ps(sum.a, _mm256_and_ps(a.a, _mm256_cmp_ps(x.a, l, _CMP_LT_OQ))),
            _mm256_add_ps(sum.b, _mm256_and_ps(a.b, _mm256_cmp_ps(x.b, l, _CMP_LT_OQ)))};
}
inline unsigned lanes_below(V x, float limit) {
    const auto part = [&](__m256 p) {
        const __m256 below = _mm256_cmp_ps(p, _mm256_set1_ps(limit), _CMP_LT_OQ);
        return static_cast<unsigned>(_mm256_movemask_ps(below));
    };
    return part(x.a) | part(x.b) << 8;
}
inline __m256 abs(__m256 x) {
    return _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff)));
}
inline V abs(V x) { return {abs(x.a), abs(x.b)}; }
inline __m256 max_bits(__m256 x, __m256 y) {
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(x), _mm256_castps_si256(y)));
}
inline V max_bits(V x, V y) { return {max_bits(x.a, y.a), max_bits(x.b, y.b)}; }
inline V load_half(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline void store_half(uint16_t* p, V x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.a, 0));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(x.b, 0));
}
inline V load_bf16(const uint16_t* p) {
    const auto widen = [](const uint16_t* q) {
        const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
    };
    return {widen(p), widen(p + 8)};
}
inline void store_int(int32_t* p, V x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_cvtps_epi32(x.a));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), _mm256_cvtps_epi32(x.b));
}
inline V load_int(const int32_t* p) {
    const auto part = [](const int32_t* q) {
        return _mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(q)));
    };
    return {part(p), part(p + 8)};
}
inline void store_bytes(int8_t* p, V x) {
    const __m256i a = _mm256_cvtps_epi32(x.a), b = _mm256_cvtps_epi32(x.b);
    const __m128i low = _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    const __m128i high = _mm_packs_epi32(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(low, high));
}
inline V kv_scales(const uint8_t* codes) {
    const __m256 octave = _mm256_loadu_ps(kKvScales);
    const auto part = [&](const uint8_t* c) {
        const __m256i code =
            _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(c)));
        return _mm256_castsi256_ps(_mm256_add_epi32(  // the index is taken by its low three bits
            _mm256_castps_si256(_mm256_permutevar8x32_ps(octave, code)),
            _mm256_slli_epi32(_mm256_srli_epi32(code, 3), 23)));
    };
    return {part(codes), part(codes + 8)};
}
template <int S>
inline V butterfly(V x) {
    if constexpr (S == 8) {
        return {_mm256_add_ps(x.b, x.a), _mm256_sub_ps(x.a, x.b)};
    } else {
        const auto one = [](__m256 v) {
            __m256 swapped;
            if constexpr (S == 1) swapped = _mm256_permute_ps(v, 0xB1);
            if constexpr (S == 2) swapped = _mm256_permute_ps(v, 0x4E);
            if constexpr (S == 4) swapped = _mm256_permute2f128_ps(v, v, 1);
            constexpr int upper = S == 1 ? 0xAA : S == 2 ? 0xCC : 0xF0;
            return _mm256_blend_ps(_mm256_add_ps(swapped, v), _mm256_sub_ps(swapped, v), upper);
        };
        return {one(x.a), one(x.b)};
    }
}

#else

struct V {
    float f[16];
};
#define PLIANT_EACH(expression)                           \
    V r;                                                  \
    for (int i = 0; i < kLanes; ++i) r.f[i] = expression; \
    return r
inline V load(const float* p) { PLIANT_EACH(p[i]); }
inline V load_part(const float* p, int n) { PLIANT_EACH(i < n ? p[i] : 0.0f); }
inline void store(float* p, const V& a) { std::memcpy(p, a.f, sizeof a.f); }
inline void store_part(float* p, const V& a, int n) {
    std::memcpy(p, a.f, sizeof(float) * static_cast<size_t>(n));
}
inline V set1(float x) { PLIANT_EACH(x); }
inline V add(const V& a, const V& b) { PLIANT_EACH(a.f[i] + b.f[i]); }
inline V sub(const V& a, const V& b) { PLIANT_EACH(a.f[i] - b.f[i]); }
inline V mul(const V& a, const V& b) { PLIANT_EACH(a.f[i] * b.f[i]); }
inline V div(const V& a, const V& b) { PLIANT_EACH(a.f[i] / b.f[i]); }
inline V fma(const V& a, const V& b, const V& c) { PLIANT_EACH(std::fmaf(a.f[i], b.f[i], c.f[i])); }
// The order of operands is that of the vector instructions: the second one where they do not
// compare.
inline void fma_to(V& sum, V a, V b) { sum = fma(a, b, sum); }
inline V max(const V& a, const V& b) { PLIANT_EACH(a.f[i] > b.f[i] ? a.f[i] : b.f[i]); }
inline V min(const V& a, const V& b) { PLIANT_EACH(a.f[i] < b.f[i] ? a.f[i] : b.f[i]); }
inline V round(const V& a) { PLIANT_EACH(std::nearbyintf(a.f[i])); }
inline V scale2(const V& a, const V& n) {
    PLIANT_EACH(std::ldexp(a.f[i], static_cast<int>(n.f[i])));
}
inline V one_from(const V& a, float limit) { PLIANT_EACH(a.f[i] >= limit ? 1.0f : 0.0f); }
inline V zero_below(const V& a, const V& x, float limit) {
    PLIANT_EACH(x.f[i] < limit ? 0.0f : a.f[i]);
}
inline V add_below(const V& sum, const V& a, const V& x, float limit) {
    PLIANT_EACH(x.f[i] < limit ? sum.f[i] + a.f[i] : sum.f[i]);
}
inline unsigned lanes_below(const V& a, float limit) {
    unsigned below = 0;
    for (unsigned i = 0; i < kLanes; ++i) below |= (a.f[i] < limit ? 1u : 0u) << i;
    return below;
}
inline V abs(const V& a) { PLIANT_EACH(std::fabs(a.f[i])); }
inline V max_bits(const V& a, const V& b) {
    PLIANT_EACH(a.f[i] > b.f[i] || std::isnan(a.f[i]) ? a.f[i] : b.f[i]);
}

inline float half_to_float(uint16_t h) {
    const uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
    uint32_t bits;
    if (exponent == 0) {
        const float value = static_cast<float>(mantissa) * 0x1p-24f;
        return sign ? -value : value;
    }
    bits = exponent == 31 ? (sign | 0x7f800000u | (mantissa << 13))
                          : (sign | ((exponent + 112) << 23) | (mantissa << 13));
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline uint16_t float_to_half(float value) {  // round to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return sign | 0x7e00;
    if (bits >= 0x477ff000u) return sign | 0x7c00;
    if (bits < 0x38800000u) {
        float magnitude;
        std::memcpy(&magnitude, &bits, 4);
        return static_cast<uint16_t>(sign |
                                     static_cast<uint16_t>(std::nearbyintf(magnitude * 0x1p24f)));
    }
    bits += 0xfffu + ((bits >> 13) & 1u);
    return static_cast<uint16_t>(sign | ((bits - 0x38000000u) >> 13));
}
inline V load_half(const uint16_t* p) { PLIANT_EACH(half_to_float(p[i])); }
inline void store_half(uint16_t* p, const V& a) {
    for (int i = 0; i < kLanes; ++i) p[i] = float_to_half(a.f[i]);
}
inline V load_int(const int32_t* p) { PLIANT_EACH(static_cast<float>(p[i])); }
inline V load_bf16(const uint16_t* p) {
    V r;
    for (int i = 0; i < kLanes; ++i) {
        const uint32_t bits = static_cast<uint32_t>(p[i]) << 16;
        std::memcpy(&r.f[i], &bits, 4);
    }
    return r;
}
inline void store_int(int32_t* p, const V& a) {
    for (int i = 0; i < kLanes; ++i) {
        const float f = std::nearbyintf(a.f[i]);  // as cvtps2dq: what does not fit is INT32_MIN
        p[i] = f >= -2147483648.0f && f < 2147483648.0f ? static_cast<int32_t>(f) : INT32_MIN;
    }
}
inline void store_bytes(int8_t* p, const V& a) {
    for (int i = 0; i < kLanes; ++i) p[i] = static_cast<int8_t>(std::nearbyintf(a.f[i]));
}
inline V kv_scales(const uint8_t* codes) { PLIANT_EACH(kKvScales[codes[i]]); }
template <int S>
inline V butterfly(const V& a) {
    PLIANT_EACH((i & S) ? a.f[i ^ S] - a.f[i] : a.f[i ^ S] + a.f[i]);
}
#undef PLIANT_EACH

#endif

inline V zero() { return set1(0.0f); }

// Whether values up to this peak can be coded as integers relative to it: nothing, or no numbers,
// must not become integers, whose sums would overflow.
constexpr float kLeastPeak = 1e-30f;  // 32512 / peak must be a number
inline bool can_be_coded(float peak) { return peak > kLeastPeak && peak <= FLT_MAX; }

// Folds the lanes, always in the same order: halves are brought together, four times.
#if defined(PLIANT_AVX512) || defined(PLIANT_AVX2)
inline float sum(V a) {
    const __m256 eight = _mm256_add_ps(lower(a), upper(a));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float largest(V a) {
    const __m256 eight = _mm256_max_ps(lower(a), upper(a));
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
inline float largest_bits(V a) {  // as max_bits
    const auto bits = [](__m256 x) { return _mm256_castps_si256(x); };
    const __m256i eight = _mm256_max_epi32(bits(lower(a)), bits(upper(a)));
    const __m128i four =
        _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    const __m128i two = _mm_max_epi32(four, _mm_unpackhi_epi64(four, four));
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epi32(two, _mm_shuffle_epi32(two, 1))));
}
inline float first_lane(V a) { return _mm256_cvtss_f32(lower(a)); }
#else
inline float first_lane(const V& a) { return a.f[0]; }
inline float sum(V a) {
    for (int width = kLanes / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) a.f[i] += a.f[i + width];
    return a.f[0];
}
inline float largest_bits(V a) {
    for (int i = 1; i < kLanes; ++i)
        if (a.f[i] > a.f[0] || std::isnan(a.f[i])) a.f[0] = a.f[i];
    return a.f[0];
}
inline float largest(V a) {
    for (int width = kLanes / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) a.f[i] = a.f[i] > a.f[i + width] ? a.f[i] : a.f[i + width];
    return a.f[0];
}
#endif

// Codes N vectors, times `factor`, as whole numbers of a byte, [N · kLanes]; returns their sum.
template <int N>
inline int32_t code_bytes(const V* v, float factor, int8_t* out) {
    for (int i = 0; i < N; ++i) store_bytes(out + i * kLanes, mul(v[i], set1(factor)));
    int32_t sum = 0;
    for (int i = 0; i < N * kLanes; ++i) sum += out[i];
    return sum;
}

// e^x to about 2 ulp: 2^n · e^r with |r| <= ln 2 / 2, and a polynomial of degree 6 (coefficients:
// Taylor's, the last two shifted to halve the error at the ends). Zero below -87.3, e^88.3
// above 88.3.
inline V exp(V x) {
    const V clamped = min(max(x, set1(-87.3f)), set1(88.3f));
    const V n = round(mul(clamped, set1(1.44269504f)));
    V r = fma(n, set1(-0.693359375f), clamped);
    r = fma(n, set1(2.12194440e-4f), r);
    V p = set1(1.3888889e-3f);
    p = fma(p, r, set1(8.3333333e-3f));
    p = fma(p, r, set1(4.1666667e-2f));
    p = fma(p, r, set1(1.6666667e-1f));
    p = fma(p, r, set1(0.5f));
    p = fma(p, r, set1(1.0f));
    p = fma(p, r, set1(1.0f));
    return zero_below(scale2(p, n), x, -87.3f);
}

inline V tanh(V x) {  // 1 - 2 / (e^2x + 1)
    const V e = exp(add(x, x));
    return sub(set1(1.0f), div(set1(2.0f), add(e, set1(1.0f))));
}

}  // namespace pliant::PLIANT_ISA
