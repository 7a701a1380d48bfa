// Groups of a supertile, decoded to memory for the products with many tokens.
#pragma once

#include "ops.h"
#include "scout.h"
#include "sums_shuffle.h"

namespace pliant::PLIANT_BYTES {

// f<T>(t) for all tokens from t = 0 on, Block at a time.
template <int Block, typename F>
PLIANT_INLINE void in_blocks(int tokens, F&& f) {
    int t = 0;
    for (; t + Block <= tokens; t += Block) f.template operator()<Block>(t);
    repeat<Block - 1>([&]<int i>() PLIANT_LAMBDA {
        if (tokens - t == i + 1) f.template operator()<i + 1>(t);
    });
}

// f(part, quad, levels of the rows of a part × 4 columns) for a group of a supertile.
template <int N, typename F>
PLIANT_INLINE void each_level(const uint8_t* const* planes, const Levels<N>& levels, F&& f) {
    for (int part = 0; part < kParts; ++part)
        for (int h = 0; h < 2; ++h) {
            const Bits<N> bits(planes, place(part, h));
            repeat<8>([&]<int j>()
                          PLIANT_LAMBDA { f(part, 8 * h + j, levels.template look_up<j>(bits)); });
        }
}

// A decoded group of a supertile, and its products with many tokens, which are added to
// sums[token][32]; in functions of their own, so that their sums have all registers. Bytes: [16
// quads of columns][32 rows][4 columns].
template <typename Dot, typename Kind>
struct NarrowBytes {
    static constexpr int kFlip = Kind::kFlip;
    alignas(64) uint8_t levels[kSupertile * kGroup];
    const CodedProduct& p;
    const int8_t* x = nullptr;
    int32_t starts[kMaxTokens];

    explicit NarrowBytes(const Strip& strip) : p(strip.p) {}
    void begin(int group) {
        const size_t first = p.x->at(group, 0);
        x = p.x->narrow + first * kGroup;
        for (int t = 0; t < p.tokens; ++t)
            starts[t] = Kind::start(p.x->sum_narrow[first + static_cast<size_t>(t)]);
    }
    template <int N>
    PLIANT_INLINE void decode(const uint8_t* const* planes, const Levels<N>& table) {
        each_level<N>(planes, table, [&](int part, int quad, B w) PLIANT_LAMBDA {
            store(levels + quad * 4 * kSupertile + kBytes * part, w);
        });
    }
    [[gnu::noinline]] void multiply(const float* factors, const F* step, float* sums) const {
        constexpr int kStep = Kind::kPairs ? 2 : 1;  // quads at once
        for (int part = 0; part < kParts; part += 2)
            in_blocks<Dot::kTokens>(p.tokens, [&]<int T>(int t) PLIANT_LAMBDA {
                Sums<Kind, T> sum;
                sum.start(starts + t);
                const int8_t* from = x + t * kGroup;
                const uint8_t* at = levels + kBytes * part;
                for (int quad = 0; quad < kQuads; quad += kStep, from += 4 * kStep) {
                    B w[2 * kStep];
                    for (int i = 0; i < kStep; ++i, at += 4 * kSupertile) {
                        w[2 * i] = load(at);
                        w[2 * i + 1] = load(at + kBytes);
                    }
                    sum.add(from, w);
                }
                sum.finish(factors + t, step + part, sums + t * kSupertile + kPart * part);
            });
    }
};

// The same with wide levels and inputs.
template <typename Dot>
struct WideBytes {
    static constexpr int kFlip = Dot::kFlip;
    alignas(64) uint8_t high[kSupertile * kGroup], low[kSupertile * kGroup];
    const CodedProduct& p;
    size_t first = 0;  // of the tokens in the inputs

    explicit WideBytes(const Strip& strip) : p(strip.p) {}
    void begin(int group) { first = p.x->at(group, 0); }
    template <int N>
    PLIANT_INLINE void decode(const uint8_t* const* planes, const Levels<N>& table) {
        const B flip = bytes(kFlip);
        each_level<N>(planes, table, [&](int part, int quad, const Deep& w) PLIANT_LAMBDA {
            const int at = quad * 4 * kSupertile + kBytes * part;
            store(high + at, add_bytes(negated(w.hi, w.sign), flip));
            store(low + at, add_bytes(negated(w.lo, w.sign), flip));
        });
    }
    [[gnu::noinline]] void multiply(const float* factors, const F* step, float* sums) const {
        for (int part = 0; part < kParts; part += 2)
            in_blocks<Dot::kTokens / 2>(p.tokens, [&]<int T>(int t) PLIANT_LAMBDA {
                const size_t token = first + static_cast<size_t>(t);
                const int8_t *xh = p.x->hi + token * kGroup, *xl = p.x->lo + token * kGroup;
                WideSums<Dot, T> sum;
                sum.start(p.x->sum_hi + token, p.x->sum_lo + token);
                for (int at = kBytes * part; at < kSupertile * kGroup;
                     at += 4 * kSupertile, xh += 4, xl += 4) {
                    const B w[] = {load(high + at), load(high + at + kBytes)};
                    const B l[] = {load(low + at), load(low + at + kBytes)};
                    sum.add(xh, xl, w, l);
                }
                sum.finish(factors + t, step + part, sums + t * kSupertile + kPart * part);
            });
    }
};

// Deep groups by products of 16 bits. With w = 16 hi + lo and x = 16 xh + xl, what is wanted is
// Σ (16 hi · xh + hi · xl + lo · xh) / 16 = Σ (w · x - lo · xl) / 256. Rounded to a float it is
// what the two sums of Sums are.

// Four bytes of each row, as 16 · high + low: those of columns 0 and 2, and those of 1 and 3.
struct Words {
    B even, odd;
    PLIANT_INLINE Words(B high, B low)
        : even(add_words(words_divided<4>(words_left<8>(high)),
                         words_divided<8>(words_left<8>(low)))),
          odd(add_words(words_divided<4>(high & words(-256)), words_divided<8>(low))) {}
};

// The sums of T tokens and a part.
template <int T>
struct WordSums {
    static constexpr int kFlip = kMostLow + 1;  // is added to lo
    static constexpr int kFit = 8;              // products of lo and xl into 16 bits
    B sum, low = bytes(0);
    WordSums<T - 1> rest;

    PLIANT_INLINE void start(const int32_t* sum_lo) {
        sum = integers(kFlip * *sum_lo);
        rest.start(sum_lo + 1);
    }
    PLIANT_INLINE void add(const int32_t* x, const int8_t* xl, const B* w) {
        add32(sum, word_products(w[0], integers(x[0])));
        add32(sum, word_products(w[1], integers(x[kQuads])));
        add16(low, pair_products(w[2], broadcast(xl)));
        rest.add(x + 2 * kQuads, xl + kGroup, w);
    }
    PLIANT_INLINE void take_low() {
        sum = subtract(sum, word_products(low, words(1)));
        low = bytes(0);
        rest.take_low();
    }
    PLIANT_INLINE void finish(const float* factors, F step, float* sums) const {
        const F value = multiply(to_float(sum), all(1.0f / (kSixteen * kSixteen)));
        add_scaled(value, step, all(*factors), sums);
        rest.finish(factors + 1, step, sums + kSupertile);
    }
};
template <>
struct WordSums<0> {
    PLIANT_INLINE void start(const int32_t*) {}
    PLIANT_INLINE void add(const int32_t*, const int8_t*, const B*) {}
    PLIANT_INLINE void take_low() {}
    PLIANT_INLINE void finish(const float*, F, float*) const {}
};

// As these, in words: [parts][16 quads of columns]: words of even and of odd columns, lo + kFlip.
struct InWords {
    static constexpr int kFlip = 0;
    static constexpr int kTokens = kBytes / 8;  // whose sums fit into registers
    static constexpr int kPlace = 3 * kBytes;
    alignas(64) uint8_t both[kParts * kQuads * kPlace];
    const CodedProduct& p;
    int32_t* const x;  // [tokens][even, odd][16 quads], behind the sums of the strip
    int g = 0;

    explicit InWords(const Strip& strip)
        : p(strip.p), x(reinterpret_cast<int32_t*>(strip.sums + kMaxTokens * kSupertile)) {
        static_assert(kScratchBytes >= kMaxTokens * (kSupertile + 2 * kQuads) * sizeof(int32_t));
    }
    void begin(int group) {
        g = group;
        for (int t = 0; t < p.tokens; ++t) {
            const size_t at = p.x->at(group, t) * kGroup;
            for (int c = 0; c < kGroup; c += kBytes) {
                const size_t from = at + static_cast<size_t>(c);
                const Words w(load(p.x->hi + from), load(p.x->lo + from));
                int32_t* to = x + 2 * kQuads * t + c / 4;
                store(to, w.even);
                store(to + kQuads, w.odd);
            }
        }
    }

    template <int N>
    PLIANT_INLINE void decode(const uint8_t* const* planes, const Levels<N>& table) {
        each_level<N>(planes, table, [&](int part, int quad, const Deep& w) PLIANT_LAMBDA {
            const B low = negated(w.lo, w.sign);
            const Words both(negated(w.hi, w.sign), low);
            uint8_t* to = this->both + (part * kQuads + quad) * kPlace;
            store(to, both.even);
            store(to + kBytes, both.odd);
            store(to + 2 * kBytes, add_bytes(low, bytes(WordSums<1>::kFlip)));
        });
    }

    [[gnu::noinline]] void multiply(const float* factors, const F* step, float* sums) const {
        const size_t first = p.x->at(g, 0);
        for (int part = 0; part < kParts; ++part)
            in_blocks<kTokens>(p.tokens, [&]<int T>(int t) PLIANT_LAMBDA {
                const size_t token = first + static_cast<size_t>(t);
                const uint8_t* from = both + part * kQuads * kPlace;
                const int32_t* at = x + 2 * kQuads * t;
                const int8_t* xl = p.x->lo + token * kGroup;
                WordSums<T> sum;
                sum.start(p.x->sum_lo + token);
                for (int some = 0; some < kQuads; some += WordSums<T>::kFit) {
                    for (int i = 0; i < WordSums<T>::kFit; ++i, from += kPlace, ++at, xl += 4) {
                        const B w[] = {load(from), load(from + kBytes), load(from + 2 * kBytes)};
                        sum.add(at, xl, w);
                    }
                    sum.take_low();
                }
                sum.finish(factors + t, step[part], sums + t * kSupertile + kPart * part);
            });
    }
};

}  // namespace pliant::PLIANT_BYTES
