// Vectors of bytes, 32 of AVX2 or 64 of AVX-512, for the instruction set that this file is compiled
// for. What is written in terms of them looks levels up with shuffles, 16 at a time.
#pragma once

#include <immintrin.h>

#include <cstddef>

#include "kernels.h"
#include "unroll.h"

#if defined(PLIANT_AVX512)
#define PLIANT_BYTES bytes64
#else
#define PLIANT_BYTES bytes32
#endif

namespace pliant::PLIANT_BYTES {

#if defined(PLIANT_AVX512)

using B = __m512i;
using F = __m512;
using Signs = __mmask64;  // which bytes are negative

PLIANT_INLINE B bytes(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }
PLIANT_INLINE B words(int value) { return _mm512_set1_epi16(static_cast<int16_t>(value)); }
PLIANT_INLINE B integers(int32_t value) { return _mm512_set1_epi32(value); }
PLIANT_INLINE B load(const void* from) { return _mm512_load_si512(from); }
PLIANT_INLINE void store(void* to, B a) { _mm512_store_si512(to, a); }
PLIANT_INLINE B repeated(__m128i row) { return _mm512_broadcast_i32x4(row); }

// Words shifted: to the left, to the right, and to the right with their signs.
template <int S>
PLIANT_INLINE B words_left(B a) {
    return _mm512_slli_epi16(a, S);
}
template <int S>
PLIANT_INLINE B words_right(B a) {
    return _mm512_srli_epi16(a, S);
}
template <int S>
PLIANT_INLINE B words_divided(B a) {
    return _mm512_srai_epi16(a, S);
}
PLIANT_INLINE B add_bytes(B a, B b) { return _mm512_add_epi8(a, b); }
PLIANT_INLINE B add_words(B a, B b) { return _mm512_add_epi16(a, b); }
PLIANT_INLINE B subtract(B a, B b) { return _mm512_sub_epi32(a, b); }
PLIANT_INLINE B shuffle(B table, B index) { return _mm512_shuffle_epi8(table, index); }
PLIANT_INLINE B pair_products(B is_unsigned, B is_signed) {
    return _mm512_maddubs_epi16(is_unsigned, is_signed);
}
PLIANT_INLINE B word_products(B a, B b) { return _mm512_madd_epi16(a, b); }
PLIANT_INLINE B magnitude(B a) { return _mm512_abs_epi8(a); }
PLIANT_INLINE Signs signs(B a) { return _mm512_movepi8_mask(a); }  // bit 7
PLIANT_INLINE B negated(B a, Signs where) { return _mm512_mask_sub_epi8(a, where, bytes(0), a); }

// Where the mask has a bit, that of a, elsewhere that of b.
PLIANT_INLINE B choose(B mask, B a, B b) { return _mm512_ternarylogic_epi64(mask, a, b, 0xCA); }
PLIANT_INLINE B either(B mask, B a, B b) {  // mask and a, or b
    return _mm512_ternarylogic_epi64(mask, a, b, 0xEA);
}
// Where the byte of `which` has bit 7, a, elsewhere b.
PLIANT_INLINE B choose_bytes(B which, B a, B b) {
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(which), b, a);
}

// Unsigned bytes times signed ones, four neighbours added. Of AVX512-VNNI; in assembly, and so only
// the assembler has to know it.
PLIANT_INLINE void add_dot(B& sum, B is_unsigned, B is_signed) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(is_unsigned), "vm"(is_signed));
}

PLIANT_INLINE F all(float value) { return _mm512_set1_ps(value); }
PLIANT_INLINE F multiply(F a, F b) { return _mm512_mul_ps(a, b); }
PLIANT_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
PLIANT_INLINE F to_float(B a) { return _mm512_cvtepi32_ps(a); }
PLIANT_INLINE F load_floats(const float* from) { return _mm512_load_ps(from); }
PLIANT_INLINE void store_floats(float* to, F a) { _mm512_store_ps(to, a); }

// The steps of rows, by their scale codes.
class Steps {
  public:
    explicit Steps(const float* steps) : steps_(_mm512_load_ps(steps)) {}
    // Of the rows of a part of a supertile.
    PLIANT_INLINE F of(const uint8_t* codes, int part) const {
        const __m512i code =
            _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
        return _mm512_permutexvar_ps(part == 0 ? code : _mm512_srli_epi32(code, 4), steps_);
    }

  private:
    __m512 steps_;
};

#else

using B = __m256i;
using F = __m256;
using Signs = __m256i;

PLIANT_INLINE B bytes(int value) { return _mm256_set1_epi8(static_cast<char>(value)); }
PLIANT_INLINE B words(int value) { return _mm256_set1_epi16(static_cast<int16_t>(value)); }
PLIANT_INLINE B integers(int32_t value) { return _mm256_set1_epi32(value); }
PLIANT_INLINE B load(const void* from) { return _mm256_load_si256(static_cast<const B*>(from)); }
PLIANT_INLINE void store(void* to, B a) { _mm256_store_si256(static_cast<B*>(to), a); }
PLIANT_INLINE B repeated(__m128i row) { return _mm256_broadcastsi128_si256(row); }

template <int S>
PLIANT_INLINE B words_left(B a) {
    return _mm256_slli_epi16(a, S);
}
template <int S>
PLIANT_INLINE B words_right(B a) {
    return _mm256_srli_epi16(a, S);
}
template <int S>
PLIANT_INLINE B words_divided(B a) {
    return _mm256_srai_epi16(a, S);
}
PLIANT_INLINE B add_bytes(B a, B b) { return _mm256_add_epi8(a, b); }
PLIANT_INLINE B add_words(B a, B b) { return _mm256_add_epi16(a, b); }
PLIANT_INLINE B subtract(B a, B b) { return _mm256_sub_epi32(a, b); }
PLIANT_INLINE B shuffle(B table, B index) { return _mm256_shuffle_epi8(table, index); }
PLIANT_INLINE B pair_products(B is_unsigned, B is_signed) {
    return _mm256_maddubs_epi16(is_unsigned, is_signed);
}
PLIANT_INLINE B word_products(B a, B b) { return _mm256_madd_epi16(a, b); }
PLIANT_INLINE B magnitude(B a) { return _mm256_abs_epi8(a); }
PLIANT_INLINE Signs signs(B a) { return _mm256_or_si256(a, bytes(1)); }
PLIANT_INLINE B negated(B a, Signs where) { return _mm256_sign_epi8(a, where); }

PLIANT_INLINE B either(B mask, B a, B b) { return _mm256_or_si256(_mm256_and_si256(mask, a), b); }
PLIANT_INLINE B choose_bytes(B which, B a, B b) { return _mm256_blendv_epi8(b, a, which); }

// Of AVX-VNNI.
PLIANT_INLINE void add_dot(B& sum, B is_unsigned, B is_signed) {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(is_unsigned), "xm"(is_signed));
}

PLIANT_INLINE F all(float value) { return _mm256_set1_ps(value); }
PLIANT_INLINE F multiply(F a, F b) { return _mm256_mul_ps(a, b); }
PLIANT_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
PLIANT_INLINE F to_float(B a) { return _mm256_cvtepi32_ps(a); }
PLIANT_INLINE F load_floats(const float* from) { return _mm256_load_ps(from); }
PLIANT_INLINE void store_floats(float* to, F a) { _mm256_store_ps(to, a); }

class Steps {
  public:
    explicit Steps(const float* steps)
        : low_(_mm256_load_ps(steps)), high_(_mm256_load_ps(steps + 8)) {}
    PLIANT_INLINE F of(const uint8_t* codes, int part) const {
        __m256i code = _mm256_cvtepu8_epi32(
            _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + part % 2 * 8)));
        if (part >= 2) code = _mm256_srli_epi32(code, 4);
        const __m256 above = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));  // bit 3: the sign
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low_, code),
                                _mm256_permutevar8x32_ps(high_, code), above);
    }

  private:
    __m256 low_, high_;
};

#endif

constexpr int kBytes = sizeof(B);
constexpr int kPart = kBytes / 4;           // rows of a vector: a part of a supertile
constexpr int kParts = kSupertile / kPart;  // two or four
constexpr int kBeside = 64 / kBytes;        // parts that lie beside each other

// Where the bytes of a part are in a ply of a supertile, for columns 32 h … 32 h + 31.
constexpr size_t place(int part, int h) {
    return static_cast<size_t>(128 * (part / kBeside) + 64 * h + kBytes * (part % kBeside));
}

// By S bits inside bytes, garbage in the bits that come in.
template <int S>
PLIANT_INLINE B left(B a) {
    if constexpr (S == 0)
        return a;
    else if constexpr (S > 0)
        return words_left<S>(a);
    else
        return words_right<-S>(a);
}
// Where the mask has a bit, that of a shifted left by S, elsewhere that of b; and in `rest` where
// it has none that of b shifted right, elsewhere that of a. The mask has S bits, then none of S.
template <int S>
PLIANT_INLINE B exchange(B mask, B a, B b, B& rest) {
#if defined(PLIANT_AVX512)
    rest = choose(mask, a, left<-S>(b));
    return choose(mask, left<S>(a), b);
#else
    const B change = (left<S>(a) ^ b) & mask;
    rest = a ^ left<-S>(change);
    return b ^ change;
#endif
}

// In assembly, so that sums stay in their registers.
PLIANT_INLINE void add32(B& sum, B product) { asm("vpaddd %1, %0, %0" : "+v"(sum) : "v"(product)); }
PLIANT_INLINE void add16(B& sum, B product) { asm("vpaddw %1, %0, %0" : "+v"(sum) : "v"(product)); }

PLIANT_INLINE B broadcast(const int8_t* x) {
    int32_t four;
    __builtin_memcpy(&four, x, 4);
    return integers(four);
}

}  // namespace pliant::PLIANT_BYTES
