// From plies to levels with AVX2, and products of them; for the kernels that go on with them.
//
// Bits are brought together with shifts and masks and looked up with byte shuffles, 16 levels at a
// time; lanes are rows.
#pragma once

#include <immintrin.h>

#include "kernels.h"
#include "unroll.h"

namespace pliant::avx2 {

PLIANT_INLINE __m256i bytes(int value) { return _mm256_set1_epi8(static_cast<char>(value)); }
template <int S>
PLIANT_INLINE __m256i left(__m256i a) {  // by S bits inside bytes, garbage in the bits that come in
    if constexpr (S == 0)
        return a;
    else if constexpr (S > 0)
        return _mm256_slli_epi16(a, S);
    else
        return _mm256_srli_epi16(a, -S);
}
PLIANT_INLINE __m256i load(const void* from) {
    return _mm256_load_si256(static_cast<const __m256i*>(from));
}
PLIANT_INLINE void store(void* to, __m256i a) { _mm256_store_si256(static_cast<__m256i*>(to), a); }
PLIANT_INLINE __m256i broadcast(const int8_t* x) {
    int32_t four;
    __builtin_memcpy(&four, x, 4);
    return _mm256_set1_epi32(four);
}

// Where the mask has a bit, that of `a` shifted left by S, elsewhere that of b; and in `rest` where
// it has none that of b shifted right, elsewhere that of a. The mask has S bits, then none of S.
template <int S>
PLIANT_INLINE __m256i exchange(__m256i mask, __m256i a, __m256i b, __m256i& rest) {
    const __m256i change = _mm256_and_si256(_mm256_xor_si256(left<S>(a), b), mask);
    rest = _mm256_xor_si256(a, left<-S>(change));
    return _mm256_xor_si256(b, change);
}

// Brings the bits of two to four plies together: the low nibbles of out[j] are from bit j of the
// bytes, the high ones from bit j + 4, the first ply on top; bits of plies that are not there are
// garbage.
template <int Count>
PLIANT_INLINE void nibbles(const __m256i* v, __m256i* out) {
    const __m256i odd_bits = bytes(0xAA), pair_bits = bytes(0xCC);
    __m256i odd;
    const __m256i even = exchange<1>(odd_bits, v[0], v[1], odd);
    if constexpr (Count == 2) {
        out[0] = left<2>(even);
        out[2] = even;
        out[1] = left<2>(odd);
        out[3] = odd;
    } else {
        __m256i even2, odd2 = v[2];
        if constexpr (Count == 3)
            even2 = left<1>(v[2]);
        else
            even2 = exchange<1>(odd_bits, v[2], v[3], odd2);
        out[0] = exchange<2>(pair_bits, even, even2, out[2]);
        out[1] = exchange<2>(pair_bits, odd, odd2, out[3]);
    }
}

// From this depth on the sign, ply 1, is looked at apart: negative levels are the positive ones,
// mirrored, so that half of a table is enough.
constexpr int kMirrored = kWideDepth;

// The collected bits of 8 rows × 32 columns; j has columns 4 j … 4 j + 3. Four plies that a shuffle
// looks up, the first ones, or those after the sign; and the others. With a sign all of them are as
// for a positive level, and the others are upside down, 1 where a ply is not set, followed by 1
// where the level is negative.
template <int N>
struct Bits {
    __m256i low[4], high[N <= 5 ? 1 : 4];

    PLIANT_INLINE Bits(const uint8_t* const* planes, size_t at) {
        constexpr int kNone = N < 4 ? 4 - N : 0;  // zeros above the first ply: no mask is needed
        __m256i v[kNone + N];
        for (int i = 0; i < kNone; ++i) v[i] = bytes(0);
        if constexpr (N >= kMirrored) {
            const __m256i positive = load(planes[0] + at);
            const __m256i negative = _mm256_xor_si256(positive, bytes(-1));
            for (int i = 1; i < N; ++i)
                v[i - 1] = _mm256_xor_si256(load(planes[i] + at), i < 5 ? negative : positive);
            v[N - 1] = negative;
        } else {
            for (int i = 0; i < N; ++i) v[kNone + i] = load(planes[i] + at);
        }
        nibbles<4>(v, low);
        if constexpr (N == 5)
            high[0] = v[4];
        else if constexpr (N > 5)
            nibbles<N - 4>(v + 4, high);
    }
    // Four plies, or fewer, in the low nibbles; garbage above, but no bit 7 with fewer than four.
    template <int j>
    PLIANT_INLINE __m256i lower() const {
        return left<(j < 4 ? 0 : -4)>(low[j % 4]);
    }
    // The others, the first of them on top; garbage below them.
    template <int j>
    PLIANT_INLINE __m256i upper() const {
        if constexpr (N < 5)
            return bytes(0);
        else if constexpr (N == 5)
            return left<7 - j>(high[0]);
        else
            return left<(j < 4 ? 4 : 0)>(high[j % 4]);
    }
};

// Levels of 8 bits of a depth, plus `flip`: with 0x80 they are unsigned, level + 128.
template <int N>
struct Table {
    static constexpr int kBits = N < 5 ? 0 : N == 5 ? 1 : N - 5;  // that choose a part
    __m256i part[1 << kBits];
    __m256i flip;

    // `levels`: hi or rounded of LevelTables. Their rows are looked up by plies 1-4, and chosen by
    // the others; with fewer than four plies every 2nd, 4th or 8th level is another one.
    PLIANT_INLINE Table(const int8_t* levels, int flipped) : flip(bytes(flipped)) {
        const auto row = [&](int k) PLIANT_LAMBDA {
            return _mm_load_si128(reinterpret_cast<const __m128i*>(levels) + k);
        };
        if constexpr (N < 4) {
            const __m128i at = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            const __m128i every = _mm_shuffle_epi8(row(0), _mm_slli_epi16(at, 4 - N));
            part[0] = _mm256_add_epi8(flip, _mm256_broadcastsi128_si256(every));
        } else if constexpr (N < kMirrored) {
            for (int k = 0; k < 1 << kBits; ++k)
                part[k] = _mm256_add_epi8(flip, _mm256_broadcastsi128_si256(row(k)));
        } else {
            constexpr int kFifth = N == 6 ? 2 : 8, kStep = N == 7 ? 2 : 1;  // of ply 5, of the last
            for (int k = 0; k < 1 << kBits; ++k)  // the positive ones, by plies 2-5
                part[k] = _mm256_broadcastsi128_si256(
                    _mm_unpackhi_epi8(row(k * kStep), row(k * kStep + kFifth)));
            for (int bit = 1; bit < 1 << kBits; bit *= 2)
                for (int k = 0; k < 1 << kBits; ++k)
                    if (k & bit) part[k] = _mm256_xor_si256(part[k], part[k ^ bit]);
        }
    }
    template <int j>
    PLIANT_INLINE __m256i look_up(const Bits<N>& bits) const {
        const __m256i lower = bits.template lower<j>(), upper = bits.template upper<j>();
        const __m256i four = bytes(0x0F);
        if constexpr (N < 4) {
            return _mm256_shuffle_epi8(part[0], lower);
        } else if constexpr (N == 4) {
            return _mm256_shuffle_epi8(part[0], _mm256_and_si256(lower, four));
        } else if constexpr (N == 5) {
            const __m256i at = _mm256_and_si256(lower, four);
            return _mm256_blendv_epi8(_mm256_shuffle_epi8(part[0], at),
                                      _mm256_shuffle_epi8(part[1], at), upper);
        } else {
            // A part says what changes where all its bits are set: a polynomial of them. Where one
            // is not, the index has bit 7, for which a shuffle gives zero. Blends are slow on
            // Intel.
            __m256i at[1 << kBits];
            at[0] = _mm256_and_si256(lower, four);
            __m256i level = _mm256_shuffle_epi8(part[0], at[0]);
            repeat<kBits>([&]<int b>() PLIANT_LAMBDA {
                const __m256i unset = _mm256_and_si256(left<kBits - 1 - b>(upper), bytes(0x80));
                repeat<1 << b>([&]<int i>() PLIANT_LAMBDA {
                    constexpr int k = (1 << b) + i;
                    at[k] = _mm256_or_si256(at[i], unset);
                    level = _mm256_xor_si256(level, _mm256_shuffle_epi8(part[k], at[k]));
                });
            });
            const __m256i negative = _mm256_cmpgt_epi8(bytes(0), left<kBits>(upper));
            return _mm256_add_epi8(_mm256_xor_si256(level, negative),
                                   _mm256_sub_epi8(flip, negative));
        }
    }
};

// Deep levels without their signs, hi + lo / 16, and the signs, 1 or -1.
struct Deep {
    __m256i hi, lo, sign;
};

template <int N>
struct DeepTable {
    __m256i hi[4], lo[4], eight, last_hi;

    PLIANT_INLINE explicit DeepTable(const DeepLevels& levels) {
        const auto all = [](const int8_t* row) PLIANT_LAMBDA {
            return _mm256_broadcastsi128_si256(
                _mm_load_si128(reinterpret_cast<const __m128i*>(row)));
        };
        for (int i = 0; i < 4; ++i) {
            hi[i] = all(levels.hi[i]);
            lo[i] = all(levels.lo[i]);
        }
        eight = all(levels.eight);
        // By plies 6-8 upside down, and the sign.
        const __m128i turned =
            _mm_setr_epi8(15, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8, 8);
        last_hi = _mm256_shuffle_epi8(all(levels.last_hi), _mm256_broadcastsi128_si256(turned));
    }
    template <int j>
    PLIANT_INLINE Deep look_up(const Bits<N>& bits) const {
        const __m256i at = _mm256_and_si256(bits.template lower<j>(), bytes(0x0F));
        const __m256i upper = _mm256_and_si256(bits.template upper<j>(), bytes(-0x10));
        Deep w{_mm256_shuffle_epi8(hi[0], at), _mm256_shuffle_epi8(lo[0], at), {}};
        const auto add = [](__m256i& sum, __m256i table, __m256i index) PLIANT_LAMBDA {
            sum = _mm256_add_epi8(sum, _mm256_shuffle_epi8(table, index));
        };
        // Bit 7 where the next ply is not set: for such an index a shuffle gives zero.
        __m256i unset = upper;
        const auto next = [&]() PLIANT_LAMBDA { return unset = _mm256_add_epi8(unset, unset); };
        const __m256i six = _mm256_or_si256(at, upper);
        add(w.hi, hi[1], six);
        add(w.lo, lo[1], six);
        if constexpr (N > 6) {
            const __m256i seven = _mm256_or_si256(at, next());
            add(w.lo, lo[2], seven);
            if constexpr (N == 7) {
                const __m256i both = _mm256_or_si256(six, seven);
                add(w.hi, hi[2], seven);
                add(w.hi, hi[3], both);
                add(w.lo, lo[3], both);
            } else {
                add(w.lo, eight, _mm256_or_si256(at, next()));
                const __m256i other = _mm256_cmpgt_epi8(bytes(0x0F), at);
                add(w.hi, last_hi, _mm256_or_si256(left<-4>(upper), other));
            }
        }
        w.sign = _mm256_or_si256(next(), bytes(1));
        return w;
    }
};

// In assembly, so that sums stay in their registers.
PLIANT_INLINE void add32(__m256i& sum, __m256i product) {
    asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(product));
}
PLIANT_INLINE void add16(__m256i& sum, __m256i product) {
    asm("vpaddw %1, %0, %0" : "+x"(sum) : "x"(product));
}

PLIANT_INLINE __m256 both_parts(__m256i top, __m256i middle) {
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(middle), _mm256_set1_ps(1.0f / kSixteen),
                           _mm256_cvtepi32_ps(top));
}

// Products of four neighbouring bytes each, added to 32-bit sums. Levels have kFlip added where
// that makes them unsigned.

// vpmaddubsw adds two products in 16 bits. Levels of at most 63, with 64 added, leave room for two
// more if inputs are narrow, and the others, with 128 added, for none.
template <int Flip>
struct Flipped {
    static constexpr int kFlip = Flip;
    static constexpr bool kPairs = Flip == 64;
    static PLIANT_INLINE int32_t start(int32_t sum) { return -kFlip * sum; }
    static PLIANT_INLINE void add(__m256i& sum, __m256i w, __m256i x) {
        add32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
    }
    static PLIANT_INLINE void add(__m256i& sum, __m256i w0, __m256i w1, __m256i x0, __m256i x1) {
        static_assert(kPairs);
        const __m256i four =
            _mm256_add_epi16(_mm256_maddubs_epi16(w0, x0), _mm256_maddubs_epi16(w1, x1));
        add32(sum, _mm256_madd_epi16(four, _mm256_set1_epi16(1)));
    }
};

// Where one of the factors must be unsigned, the sign of the input moves to the level.
struct Signed {
    using Small = Flipped<64>;   // up to kSmallDepth
    using Large = Flipped<128>;  // from there to kWideDepth; only with narrow inputs
    static constexpr int kFlip = 0;
    static constexpr int kTokens = 4;     // whose sums of 16 rows fit into registers
    static constexpr bool kWords = true;  // products of 16 bits are cheaper than three of 8
    static PLIANT_INLINE int32_t start(int32_t) { return 0; }
    static PLIANT_INLINE void add(__m256i& sum, __m256i w, __m256i x) {
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(w, x));
        add32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    // Of an input that is not negative with signed levels.
    static PLIANT_INLINE void add_positive(__m256i& sum, __m256i w, __m256i x) {
        const __m256i pairs = _mm256_maddubs_epi16(x, w);
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    // Of deep levels, in sixteenths.
    struct DeepSum {
        __m256i sum = _mm256_setzero_si256();

        PLIANT_INLINE void add(const Deep& w, __m256i high, __m256i low) {
            const __m256i top = _mm256_maddubs_epi16(w.hi, high);
            const __m256i middle =
                _mm256_add_epi16(_mm256_maddubs_epi16(w.hi, low), _mm256_maddubs_epi16(w.lo, high));
            add32(sum, _mm256_madd_epi16(top, _mm256_set1_epi16(kSixteen)));
            add32(sum, _mm256_madd_epi16(middle, _mm256_set1_epi16(1)));
        }
        PLIANT_INLINE __m256 value() const {
            return _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(1.0f / kSixteen));
        }
    };
};

// Levels are unsigned, level + 128; the 128 is taken out again through the sum of the inputs.
struct Unsigned {
    using Small = Unsigned;
    using Large = Unsigned;
    static constexpr int kFlip = 0x80;
    static constexpr bool kPairs = false;
    static constexpr int kTokens = 6;
    static constexpr bool kWords = false;
    static PLIANT_INLINE int32_t start(int32_t sum) { return -128 * sum; }
    // Of AVX-VNNI. In assembly, as in coded_avx512.cpp; and so only the assembler has to know it.
    static PLIANT_INLINE void add(__m256i& sum, __m256i w, __m256i x) {
        asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(w), "xm"(x));
    }
    static PLIANT_INLINE void add_positive(__m256i& sum, __m256i w, __m256i x) { add(sum, x, w); }
    struct DeepSum {
        __m256i top = _mm256_setzero_si256(), middle = _mm256_setzero_si256();

        PLIANT_INLINE void add(const Deep& w, __m256i high, __m256i low) {
            Unsigned::add(top, w.hi, high);
            Unsigned::add(middle, w.hi, low);
            Unsigned::add(middle, w.lo, high);
        }
        PLIANT_INLINE __m256 value() const { return both_parts(top, middle); }
    };
};

}  // namespace pliant::avx2
