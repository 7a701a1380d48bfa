// Groups of a supertile, decoded to memory for the products with many tokens.
#pragma once

#include "ops.h"
#include "scout.h"
#include "sums_256.h"

namespace pliant::avx2 {

// f<T>(t) for all tokens from t = 0 on, Block at a time.
template <int Block, typename F>
PLIANT_INLINE void in_blocks(int tokens, F&& f) {
    int t = 0;
    for (; t + Block <= tokens; t += Block) f.template operator()<Block>(t);
    repeat<Block - 1>([&]<int i>() PLIANT_LAMBDA {
        if (tokens - t == i + 1) f.template operator()<i + 1>(t);
    });
}

// f(part, quad, levels of 8 rows × 4 columns) for a group of a supertile.
template <int N, typename F>
PLIANT_INLINE void each_level(const uint8_t* const* planes, const Levels<N>& levels, F&& f) {
    for (int part = 0; part < 4; ++part)
        for (int h = 0; h < 2; ++h) {
            const Bits<N> bits(planes, place(part, h));
            repeat<8>([&]<int j>()
                          PLIANT_LAMBDA { f(part, 8 * h + j, levels.template look_up<j>(bits)); });
        }
}

// A decoded group of a supertile, and its products with many tokens, which are added to
// sums[token][32]; in functions of their own, so that their sums have all registers. Bytes: [16
// quads of columns][4 parts][8 rows][4 columns].
template <typename Dot, int N>
struct NarrowBytes {
    using Kind = For<Dot, N>;
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
    PLIANT_INLINE void decode(const uint8_t* const* planes, const Levels<N>& table) {
        each_level<N>(planes, table, [&](int part, int quad, __m256i w) PLIANT_LAMBDA {
            store(levels + quad * 128 + 32 * part, w);
        });
    }
    [[gnu::noinline]] void multiply(const float* factors, const __m256* step, float* sums) const {
        constexpr int kStep = Kind::kPairs ? 2 : 1;  // quads at once
        for (int half = 0; half < 2; ++half)
            in_blocks<Dot::kTokens>(p.tokens, [&]<int T>(int t) PLIANT_LAMBDA {
                Sums<Kind, T> sum;
                sum.start(starts + t);
                const int8_t* from = x + t * kGroup;
                const uint8_t* at = levels + 64 * half;
                for (int quad = 0; quad < kQuads; quad += kStep, from += 4 * kStep) {
                    __m256i w[2 * kStep];
                    for (int i = 0; i < kStep; ++i, at += 128) {
                        w[2 * i] = load(at);
                        w[2 * i + 1] = load(at + 32);
                    }
                    sum.add(from, w);
                }
                sum.finish(factors + t, step + 2 * half, sums + t * kSupertile + 2 * kPart * half);
            });
    }
};

// The same with wide levels and inputs.
template <typename Dot, int N>
struct WideBytes {
    static constexpr int kFlip = Dot::kFlip;
    alignas(64) uint8_t high[kSupertile * kGroup], low[kSupertile * kGroup];
    const CodedProduct& p;
    size_t first = 0;  // of the tokens in the inputs

    explicit WideBytes(const Strip& strip) : p(strip.p) {}
    void begin(int group) { first = p.x->at(group, 0); }
    PLIANT_INLINE void decode(const uint8_t* const* planes, const Levels<N>& table) {
        const __m256i flip = bytes(kFlip);
        each_level<N>(planes, table, [&](int part, int quad, const Deep& w) PLIANT_LAMBDA {
            const int at = quad * 128 + 32 * part;
            store(high + at, _mm256_add_epi8(_mm256_sign_epi8(w.hi, w.sign), flip));
            store(low + at, _mm256_add_epi8(_mm256_sign_epi8(w.lo, w.sign), flip));
        });
    }
    [[gnu::noinline]] void multiply(const float* factors, const __m256* step, float* sums) const {
        for (int half = 0; half < 2; ++half)
            in_blocks<Dot::kTokens / 2>(p.tokens, [&]<int T>(int t) PLIANT_LAMBDA {
                const size_t token = first + static_cast<size_t>(t);
                const int8_t *xh = p.x->hi + token * kGroup, *xl = p.x->lo + token * kGroup;
                WideSums<Dot, T> sum;
                sum.start(p.x->sum_hi + token, p.x->sum_lo + token);
                for (int at = 64 * half; at < kSupertile * kGroup; at += 128, xh += 4, xl += 4) {
                    const __m256i w[] = {load(high + at), load(high + at + 32)};
                    const __m256i l[] = {load(low + at), load(low + at + 32)};
                    sum.add(xh, xl, w, l);
                }
                sum.finish(factors + t, step + 2 * half, sums + t * kSupertile + 2 * kPart * half);
            });
    }
};

// Deep groups by products of 16 bits. With w = 16 hi + lo and x = 16 xh + xl, what is wanted is
// Σ (16 hi · xh + hi · xl + lo · xh) / 16 = Σ (w · x - lo · xl) / 256. Rounded to a float it is
// what the two sums of Sums are.

// Four bytes of each row, as 16 · high + low: those of columns 0 and 2, and those of 1 and 3.
struct Words {
    __m256i even, odd;
    PLIANT_INLINE Words(__m256i high, __m256i low)
        : even(_mm256_add_epi16(_mm256_srai_epi16(_mm256_slli_epi16(high, 8), 4),
                                _mm256_srai_epi16(_mm256_slli_epi16(low, 8), 8))),
          odd(_mm256_add_epi16(
              _mm256_srai_epi16(_mm256_and_si256(high, _mm256_set1_epi16(-256)), 4),
              _mm256_srai_epi16(low, 8))) {}
};

// The sums of T tokens and a part.
template <int T>
struct WordSums {
    static constexpr int kFlip = kMostLow + 1;  // is added to lo
    static constexpr int kFit = 8;              // products of lo and xl into 16 bits
    __m256i sum, low = _mm256_setzero_si256();
    WordSums<T - 1> rest;

    PLIANT_INLINE void start(const int32_t* sum_lo) {
        sum = _mm256_set1_epi32(kFlip * *sum_lo);
        rest.start(sum_lo + 1);
    }
    PLIANT_INLINE void add(const int32_t* x, const int8_t* xl, const __m256i* w) {
        add32(sum, _mm256_madd_epi16(w[0], _mm256_set1_epi32(x[0])));
        add32(sum, _mm256_madd_epi16(w[1], _mm256_set1_epi32(x[kQuads])));
        add16(low, _mm256_maddubs_epi16(w[2], broadcast(xl)));
        rest.add(x + 2 * kQuads, xl + kGroup, w);
    }
    PLIANT_INLINE void take_low() {
        sum = _mm256_sub_epi32(sum, _mm256_madd_epi16(low, _mm256_set1_epi16(1)));
        low = _mm256_setzero_si256();
        rest.take_low();
    }
    PLIANT_INLINE void finish(const float* factors, __m256 step, float* sums) const {
        const __m256 value =
            _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(1.0f / (kSixteen * kSixteen)));
        add_scaled(value, step, _mm256_set1_ps(*factors), sums);
        rest.finish(factors + 1, step, sums + kSupertile);
    }
};
template <>
struct WordSums<0> {
    PLIANT_INLINE void start(const int32_t*) {}
    PLIANT_INLINE void add(const int32_t*, const int8_t*, const __m256i*) {}
    PLIANT_INLINE void take_low() {}
    PLIANT_INLINE void finish(const float*, __m256, float*) const {}
};

// As these, in words: [4 parts][16 quads of columns]: words of even and of odd columns, lo + kFlip.
template <int N>
struct InWords {
    static constexpr int kFlip = 0;
    alignas(64) uint8_t words[4 * kQuads * 3 * 32];
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
            for (int half = 0; half < 2; ++half) {
                const Words w(load(p.x->hi + at + 32 * half), load(p.x->lo + at + 32 * half));
                int32_t* to = x + 2 * kQuads * t + 8 * half;
                store(to, w.even);
                store(to + kQuads, w.odd);
            }
        }
    }

    PLIANT_INLINE void decode(const uint8_t* const* planes, const Levels<N>& table) {
        each_level<N>(planes, table, [&](int part, int quad, const Deep& w) PLIANT_LAMBDA {
            const __m256i low = _mm256_sign_epi8(w.lo, w.sign);
            const Words both(_mm256_sign_epi8(w.hi, w.sign), low);
            uint8_t* to = words + (part * kQuads + quad) * 3 * 32;
            store(to, both.even);
            store(to + 32, both.odd);
            store(to + 64, _mm256_add_epi8(low, bytes(WordSums<1>::kFlip)));
        });
    }

    [[gnu::noinline]] void multiply(const float* factors, const __m256* step, float* sums) const {
        const size_t first = p.x->at(g, 0);
        for (int part = 0; part < 4; ++part)
            in_blocks<4>(p.tokens, [&]<int T>(int t) PLIANT_LAMBDA {
                const size_t token = first + static_cast<size_t>(t);
                const uint8_t* from = words + part * kQuads * 3 * 32;
                const int32_t* both = x + 2 * kQuads * t;
                const int8_t* xl = p.x->lo + token * kGroup;
                WordSums<T> sum;
                sum.start(p.x->sum_lo + token);
                for (int some = 0; some < kQuads; some += WordSums<T>::kFit) {
                    for (int i = 0; i < WordSums<T>::kFit; ++i, from += 3 * 32, ++both, xl += 4) {
                        const __m256i w[] = {load(from), load(from + 32), load(from + 64)};
                        sum.add(both, xl, w);
                    }
                    sum.take_low();
                }
                sum.finish(factors + t, step[part], sums + t * kSupertile + kPart * part);
            });
    }
};

}  // namespace pliant::avx2
