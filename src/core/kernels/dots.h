// Products of four neighbouring bytes each, added to 32-bit sums: the ways to make them, with
// levels that were looked up (plies_shuffle.h).
#pragma once

#include <type_traits>

#include "plies_shuffle.h"

namespace pliant::PLIANT_BYTES {

PLIANT_INLINE F both_parts(B top, B middle) {
    return fma(to_float(middle), all(1.0f / kSixteen), to_float(top));
}

// Levels have kFlip added where that makes them unsigned.

// vpmaddubsw adds two products in 16 bits. Levels of at most 63, with 64 added, leave room for two
// more if inputs are narrow, and the others, with 128 added, for none.
template <int Flip>
struct Flipped {
    static constexpr int kFlip = Flip;
    static constexpr bool kPairs = Flip == 64;
    static PLIANT_INLINE int32_t start(int32_t sum) { return -kFlip * sum; }
    static PLIANT_INLINE void add(B& sum, B w, B x) {
        add32(sum, word_products(pair_products(w, x), words(1)));
    }
    static PLIANT_INLINE void add(B& sum, B w0, B w1, B x0, B x1) {
        static_assert(kPairs);
        const B four = add_words(pair_products(w0, x0), pair_products(w1, x1));
        add32(sum, word_products(four, words(1)));
    }
};

// Where one of the factors must be unsigned, the sign of the input moves to the level.
struct Signed {
    using Small = Flipped<64>;   // up to kSmallDepth
    using Large = Flipped<128>;  // from there to kWideDepth; only with narrow inputs
    static constexpr int kFlip = 0;
    static constexpr int kTokens = kBytes / 8;  // whose sums of two parts fit into registers
    static constexpr bool kWords = true;        // products of 16 bits are cheaper than three of 8
    static PLIANT_INLINE int32_t start(int32_t) { return 0; }
    static PLIANT_INLINE void add(B& sum, B w, B x) {
        const B pairs = pair_products(magnitude(x), negated(w, signs(x)));
        add32(sum, word_products(pairs, words(1)));
    }
    // Of an input that is not negative with signed levels.
    static PLIANT_INLINE void add_positive(B& sum, B w, B x) {
        add32(sum, word_products(pair_products(x, w), words(1)));
    }
    // Of deep levels, in sixteenths.
    struct DeepSum {
        B sum = bytes(0);

        PLIANT_INLINE void add(const Deep& w, B high, B low) {
            const B top = pair_products(w.hi, high);
            const B middle = add_words(pair_products(w.hi, low), pair_products(w.lo, high));
            add32(sum, word_products(top, words(kSixteen)));
            add32(sum, word_products(middle, words(1)));
        }
        PLIANT_INLINE F value() const { return multiply(to_float(sum), all(1.0f / kSixteen)); }
    };
};

// Levels are unsigned, level + 128; the 128 is taken out again through the sum of the inputs.
struct Unsigned {
    using Small = Unsigned;
    using Large = Unsigned;
    static constexpr int kFlip = 0x80;
    static constexpr bool kPairs = false;
    static constexpr int kTokens = kBytes == 64 ? 13 : 6;
    static constexpr bool kWords = false;
    static PLIANT_INLINE int32_t start(int32_t sum) { return -128 * sum; }
    static PLIANT_INLINE void add(B& sum, B w, B x) { add_dot(sum, w, x); }
    static PLIANT_INLINE void add_positive(B& sum, B w, B x) { add_dot(sum, x, w); }
    struct DeepSum {
        B top = bytes(0), middle = bytes(0);

        PLIANT_INLINE void add(const Deep& w, B high, B low) {
            add_dot(top, w.hi, high);
            add_dot(middle, w.hi, low);
            add_dot(middle, w.lo, high);
        }
        PLIANT_INLINE F value() const { return both_parts(top, middle); }
    };
};

// How products with levels of N plies are made.
template <typename Dot, int N>
using For = std::conditional_t<(N > kSmallDepth),
                               std::conditional_t<(N < kWideDepth), typename Dot::Large, Dot>,
                               typename Dot::Small>;

}  // namespace pliant::PLIANT_BYTES
