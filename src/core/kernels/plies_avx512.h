// From plies to levels with AVX-512 and VBMI; for the kernels that go on with them.
//
// Bits are brought together with shifts and ternary logic and looked up with byte permutes; lanes
// are rows.
#pragma once

#include <immintrin.h>

#include <algorithm>

#include "bytes.h"

namespace pliant::avx512 {

using bytes64::bytes;
using bytes64::choose;
using bytes64::left;

// Brings the bits of one to four plies together: the low nibbles of out[j] are from bit j of the
// bytes, the high ones from bit j + 4, ply 1 on top; bits of plies that are not there are garbage.
template <int Count>
PLIANT_INLINE void nibbles(const __m512i* v, __m512i* out) {
    const __m512i odd_bits = bytes(0xAA), pair_bits = bytes(0xCC);
    __m512i even, odd;
    if constexpr (Count == 1) {
        even = left<1>(v[0]);
        odd = v[0];
    } else {
        even = choose(odd_bits, left<1>(v[0]), v[1]);
        odd = choose(odd_bits, v[0], left<-1>(v[1]));
    }
    if constexpr (Count <= 2) {
        out[0] = left<2>(even);
        out[2] = even;
        out[1] = left<2>(odd);
        out[3] = odd;
    } else {
        __m512i even2, odd2;
        if constexpr (Count == 3) {
            even2 = left<1>(v[2]);
            odd2 = v[2];
        } else {
            even2 = choose(odd_bits, left<1>(v[2]), v[3]);
            odd2 = choose(odd_bits, v[2], left<-1>(v[3]));
        }
        out[0] = choose(pair_bits, left<2>(even), even2);
        out[2] = choose(pair_bits, even, left<-2>(even2));
        out[1] = choose(pair_bits, left<2>(odd), odd2);
        out[3] = choose(pair_bits, odd, left<-2>(odd2));
    }
}

// The collected bits (see LevelTables) of 16 rows × 32 columns: at<j>() has columns 4 j … 4 j + 3
// of each row. The last steps are left to at(), so that fewer registers are held.
template <int N>
struct Bits {
    __m512i low[4], high[N <= 4 ? 1 : N <= 6 ? 2 : 4];

    PLIANT_INLINE Bits(const uint8_t* const* planes, size_t offset) {
        __m512i v[N];
        repeat<N>([&]<int i>() PLIANT_LAMBDA {
            v[i] = _mm512_load_si512(planes[i] + offset);
            asm("" : "+v"(v[i]));
        });
        nibbles<(N < 4 ? N : 4)>(v, low);
        if constexpr (N == 5) {  // one or two bits for each vector, at bit 0, 2, 4, 6 of the bytes
            high[0] = v[4];
            high[1] = left<-1>(v[4]);
        } else if constexpr (N == 6) {
            high[0] = choose(bytes(0xAA), left<1>(v[4]), v[5]);
            high[1] = choose(bytes(0xAA), v[4], left<-1>(v[5]));
        } else if constexpr (N > 6) {
            nibbles<N - 4>(v + 4, high);
        }
    }

    template <int j>
    PLIANT_INLINE __m512i at() const {
        const __m512i below = left<(j < 4 ? 0 : -4)>(low[j % 4]);
        if constexpr (N <= 4)
            return below;
        else if constexpr (N <= 6)
            return choose(bytes(0x30), left<4 - j / 2 * 2>(high[j % 2]), below);
        else
            return choose(bytes(0xF0), left<(j < 4 ? 4 : 0)>(high[j % 4]), below);
    }
};

PLIANT_INLINE void fetch(const void* line) { _mm_prefetch(line, _MM_HINT_T0); }

// A table of 64 or 256 levels in registers; each is given as a byte, xor `flip`: with 0x80 they are
// unsigned, level + 128.
template <int N>
struct Table {
    __m512i part[N <= 6 ? 1 : 4];
    Table(const int8_t* levels, int flip) {
        for (int i = 0; i < (N <= 6 ? 1 : 4); ++i)
            part[i] = _mm512_xor_si512(_mm512_load_si512(levels + 64 * i), bytes(flip));
    }
    PLIANT_INLINE __m512i operator()(__m512i index) const {
        if constexpr (N <= 6) {
            return _mm512_permutexvar_epi8(index, part[0]);
        } else {
            const __m512i below = _mm512_permutex2var_epi8(part[0], index, part[1]);
            const __m512i above = _mm512_permutex2var_epi8(part[2], index, part[3]);
            return _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), below, above);
        }
    }
};

PLIANT_INLINE void row_steps(const uint8_t* codes, size_t supertile, __m512 steps, __m512* out) {
    const __m512i code = _mm512_cvtepu8_epi32(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + supertile * 16)));
    out[0] = _mm512_permutexvar_ps(code, steps);  // reads the low four bits only
    out[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(code, 4), steps);
}

template <bool Wide>
PLIANT_INLINE __m512 to_float(__m512i top, __m512i middle) {
    const __m512 value = _mm512_cvtepi32_ps(top);
    if constexpr (!Wide) return value;
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(middle), _mm512_set1_ps(1.0f / kSixteen), value);
}

// The factors of some tokens, padded to 16.
PLIANT_INLINE void factors_of(const CodedProduct& p, int g, int depth, int first, int tokens,
                              float* out) {
    const float* scale = p.x->scale + p.x->at(g, first);
    const __m512 group = _mm512_set1_ps(p.block->group_scale[g]);
    const __m512 level = _mm512_set1_ps(p.levels->unit[depth]);
    for (int t = 0; t < tokens; t += 16) {
        const int rest = std::min(tokens - t, 16);
        const __mmask16 some = static_cast<__mmask16>((1u << rest) - 1);
        const __m512 x = _mm512_maskz_loadu_ps(some, scale + t);
        _mm512_store_ps(out + t, _mm512_mul_ps(_mm512_mul_ps(x, group), level));
    }
}

// A group of a supertile for many tokens: `wh` (and `wl`) become [16 quads of columns][2 tiles][16
// rows][4 columns], bytes.
template <int N>
PLIANT_INLINE void decode(const uint8_t* const* planes, const Table<N>& hi, const Table<N>& lo,
                          uint8_t* wh, uint8_t* wl) {
    for (int half = 0; half < 2; ++half)
        for (int h = 0; h < 2; ++h) {
            const Bits<N> bits(planes, static_cast<size_t>(128 * half + 64 * h));
            repeat<8>([&]<int j>() PLIANT_LAMBDA {
                const int at = ((8 * h + j) * 2 + half) * 64;
                const __m512i index = bits.template at<j>();
                _mm512_store_si512(wh + at, hi(index));
                if constexpr (N >= kWideDepth) _mm512_store_si512(wl + at, lo(index));
            });
        }
}

// The sums of a supertile, [tokens][32], times the scales of its rows, to the result.
inline void scale_rows(const CodedProduct& p, int s, const float* sums) {
    const float* scale = p.block->row_scale + s * kSupertile;
    const __m512 scale0 = _mm512_loadu_ps(scale), scale1 = _mm512_loadu_ps(scale + 16);
    for (int t = 0; t < p.tokens; ++t, sums += kSupertile) {
        float* out = p.out + static_cast<size_t>(t) * p.stride + (s - p.first) * kSupertile;
        _mm512_storeu_ps(out, _mm512_mul_ps(_mm512_load_ps(sums), scale0));
        _mm512_storeu_ps(out + 16, _mm512_mul_ps(_mm512_load_ps(sums + 16), scale1));
    }
}

}  // namespace pliant::avx512
