// From plies to levels with byte shuffles, for the kernels that go on with them.
//
// Bits are brought together with shifts and masks and looked up 16 levels at a time; lanes are
// rows.
#pragma once

#include "bytes.h"

namespace pliant::PLIANT_BYTES {

// Brings the bits of two to four plies together: the low nibbles of out[j] are from bit j of the
// bytes, the high ones from bit j + 4, the first ply on top; bits of plies that are not there are
// garbage.
template <int Count>
PLIANT_INLINE void nibbles(const B* v, B* out) {
    const B odd_bits = bytes(0xAA), pair_bits = bytes(0xCC);
    B odd;
    const B even = exchange<1>(odd_bits, v[0], v[1], odd);
    if constexpr (Count == 2) {
        out[0] = left<2>(even);
        out[2] = even;
        out[1] = left<2>(odd);
        out[3] = odd;
    } else {
        B even2, odd2 = v[2];
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

// The collected bits of a part, 8 or 16 rows, and 32 columns; j has columns 4 j … 4 j + 3. Four
// plies that a shuffle looks up, the first ones, or those after the sign; and the others. With a
// sign all of them are as for a positive level, and the others are upside down, 1 where a ply is
// not set, followed by 1 where the level is negative.
template <int N>
struct Bits {
    B low[4], high[N <= 5 ? 1 : 4];

    PLIANT_INLINE Bits(const uint8_t* const* planes, size_t at) {
        constexpr int kNone = N < 4 ? 4 - N : 0;  // zeros above the first ply: no mask is needed
        B v[kNone + N];
        for (int i = 0; i < kNone; ++i) v[i] = bytes(0);
        if constexpr (N >= kMirrored) {
            const B positive = load(planes[0] + at);
            const B negative = positive ^ bytes(-1);
            for (int i = 1; i < N; ++i)
                v[i - 1] = load(planes[i] + at) ^ (i < 5 ? negative : positive);
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
    PLIANT_INLINE B lower() const {
        return left<(j < 4 ? 0 : -4)>(low[j % 4]);
    }
    // The others, the first of them on top; garbage below them.
    template <int j>
    PLIANT_INLINE B upper() const {
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
    B part[1 << kBits];
    B flip;

    // `levels`: hi or rounded of LevelTables. Their rows are looked up by plies 1-4, and chosen by
    // the others; with fewer than four plies every 2nd, 4th or 8th level is another one.
    PLIANT_INLINE Table(const int8_t* levels, int flipped) : flip(bytes(flipped)) {
        const auto row = [&](int k) PLIANT_LAMBDA {
            return _mm_load_si128(reinterpret_cast<const __m128i*>(levels) + k);
        };
        if constexpr (N < 4) {
            const __m128i at = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            const __m128i every = _mm_shuffle_epi8(row(0), _mm_slli_epi16(at, 4 - N));
            part[0] = add_bytes(flip, repeated(every));
        } else if constexpr (N < kMirrored) {
            for (int k = 0; k < 1 << kBits; ++k) part[k] = add_bytes(flip, repeated(row(k)));
        } else {
            constexpr int kFifth = N == 6 ? 2 : 8, kStep = N == 7 ? 2 : 1;  // of ply 5, of the last
            for (int k = 0; k < 1 << kBits; ++k)  // the positive ones, by plies 2-5
                part[k] = repeated(_mm_unpackhi_epi8(row(k * kStep), row(k * kStep + kFifth)));
            for (int bit = 1; bit < 1 << kBits; bit *= 2)
                for (int k = 0; k < 1 << kBits; ++k)
                    if (k & bit) part[k] = part[k] ^ part[k ^ bit];
        }
    }
    template <int j>
    PLIANT_INLINE B look_up(const Bits<N>& bits) const {
        const B lower = bits.template lower<j>(), upper = bits.template upper<j>();
        const B four = bytes(0x0F);
        if constexpr (N < 4) {
            return shuffle(part[0], lower);
        } else if constexpr (N == 4) {
            return shuffle(part[0], lower & four);
        } else if constexpr (N == 5) {
            const B at = lower & four;
            return choose_bytes(upper, shuffle(part[1], at), shuffle(part[0], at));
        } else {
            // A part says what changes where all its bits are set: a polynomial of them. Where one
            // is not, the index has bit 7, for which a shuffle gives zero. Blends are slow on
            // Intel.
            B at[1 << kBits];
            at[0] = lower & four;
            B level = shuffle(part[0], at[0]);
            repeat<kBits>([&]<int b>() PLIANT_LAMBDA {
                const B next = left<kBits - 1 - b>(upper);
                repeat<1 << b>([&]<int i>() PLIANT_LAMBDA {
                    constexpr int k = (1 << b) + i;
                    at[k] = either(bytes(0x80), next, at[i]);
                    level = level ^ shuffle(part[k], at[k]);
                });
            });
            return add_bytes(negated(level, signs(left<kBits>(upper))), flip);
        }
    }
};

// Deep levels without their signs, hi + lo / 16, and the signs.
struct Deep {
    B hi, lo;
    Signs sign;
};

template <int N>
struct DeepTable {
    B hi[4], lo[4], eight, last_hi;

    PLIANT_INLINE explicit DeepTable(const DeepLevels& levels) {
        const auto all = [](const int8_t* row) PLIANT_LAMBDA {
            return repeated(_mm_load_si128(reinterpret_cast<const __m128i*>(row)));
        };
        for (int i = 0; i < 4; ++i) {
            hi[i] = all(levels.hi[i]);
            lo[i] = all(levels.lo[i]);
        }
        eight = all(levels.eight);
        // By plies 6-8 upside down, and the sign.
        const __m128i turned =
            _mm_setr_epi8(15, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8, 8);
        last_hi = shuffle(all(levels.last_hi), repeated(turned));
    }
    template <int j>
    PLIANT_INLINE Deep look_up(const Bits<N>& bits) const {
        const B at = bits.template lower<j>() & bytes(0x0F);
        const B upper = bits.template upper<j>() & bytes(-0x10);
        Deep w{shuffle(hi[0], at), shuffle(lo[0], at), {}};
        const auto add = [](B& sum, B table, B index)
                             PLIANT_LAMBDA { sum = add_bytes(sum, shuffle(table, index)); };
        // Bit 7 where the next ply is not set: for such an index a shuffle gives zero.
        B unset = upper;
        const auto next = [&]() PLIANT_LAMBDA { return unset = add_bytes(unset, unset); };
        const B six = at | upper;
        add(w.hi, hi[1], six);
        add(w.lo, lo[1], six);
        if constexpr (N > 6) {
            const B seven = at | next();
            add(w.lo, lo[2], seven);
            if constexpr (N == 7) {
                const B both = six | seven;
                add(w.hi, hi[2], seven);
                add(w.hi, hi[3], both);
                add(w.lo, lo[3], both);
            } else {
                add(w.lo, eight, at | next());
                const B other = add_bytes(at, bytes(-15));  // bit 7 below 15
                add(w.hi, last_hi, left<-4>(upper) | other);
            }
        }
        w.sign = signs(next());
        return w;
    }
};

}  // namespace pliant::PLIANT_BYTES
