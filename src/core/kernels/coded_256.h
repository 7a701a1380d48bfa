// Products with coded matrices in vectors of 32 bytes, in terms of a way to multiply bytes
// (plies_avx2.h). They go as those for AVX-512 do.
#pragma once

#include <algorithm>
#include <array>
#include <type_traits>

#include "ops.h"
#include "plies_avx2.h"
#include "scout.h"

namespace pliant::avx2 {

constexpr int kPart = 8;  // rows of a vector of sums

// The steps of the rows of a part.
PLIANT_INLINE __m256 row_steps(const uint8_t* codes, int part, __m256 low, __m256 high) {
    __m256i code = _mm256_cvtepu8_epi32(
        _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + part % 2 * kPart)));
    if (part >= 2) code = _mm256_srli_epi32(code, 4);
    const __m256 above = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));  // bit 3 to the sign
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, code),
                            _mm256_permutevar8x32_ps(high, code), above);
}

// sums[8 rows] += value · step · factor.
PLIANT_INLINE void add_scaled(__m256 value, __m256 step, __m256 factor, float* sums) {
    _mm256_store_ps(sums,
                    _mm256_fmadd_ps(_mm256_mul_ps(value, step), factor, _mm256_load_ps(sums)));
}

// The sums of T tokens and two parts; of two neighbouring quads of columns at once if Pair. Members
// of nested structs become registers; elements of arrays that live through a loop stay in memory.
template <typename Dot, bool Pair, int T>
struct Sums {
    __m256i sum0, sum1;
    Sums<Dot, Pair, T - 1> rest;

    PLIANT_INLINE void start(const int32_t* from) {
        sum0 = sum1 = _mm256_set1_epi32(*from);
        rest.start(from + 1);
    }
    PLIANT_INLINE void add(const int8_t* at, const __m256i* w) {
        const __m256i x = broadcast(at);
        if constexpr (Pair) {
            const __m256i y = broadcast(at + 4);
            Dot::add(sum0, w[0], w[2], x, y);
            Dot::add(sum1, w[1], w[3], x, y);
        } else {
            Dot::add(sum0, w[0], x);
            Dot::add(sum1, w[1], x);
        }
        rest.add(at + kGroup, w);
    }
    PLIANT_INLINE void finish(const float* factors, const __m256* step, float* sums) const {
        const __m256 factor = _mm256_set1_ps(*factors);
        add_scaled(_mm256_cvtepi32_ps(sum0), step[0], factor, sums);
        add_scaled(_mm256_cvtepi32_ps(sum1), step[1], factor, sums + kPart);
        rest.finish(factors + 1, step, sums + kSupertile);
    }
};
template <typename Dot, bool Pair>
struct Sums<Dot, Pair, 0> {
    PLIANT_INLINE void start(const int32_t*) {}
    PLIANT_INLINE void add(const int8_t*, const __m256i*) {}
    PLIANT_INLINE void finish(const float*, const __m256*, float*) const {}
};

// The same with wide levels and inputs.
template <typename Dot, int T>
struct WideSums {
    __m256i top0, top1, middle0, middle1;
    WideSums<Dot, T - 1> rest;

    PLIANT_INLINE void start(const int32_t* sum_hi, const int32_t* sum_lo) {
        top0 = top1 = _mm256_set1_epi32(Dot::start(*sum_hi));
        middle0 = middle1 = _mm256_set1_epi32(Dot::start(*sum_lo + *sum_hi));
        rest.start(sum_hi + 1, sum_lo + 1);
    }
    PLIANT_INLINE void add(const int8_t* xh, const int8_t* xl, const __m256i* w, const __m256i* l) {
        const __m256i x = broadcast(xh), y = broadcast(xl);
        Dot::add(top0, w[0], x);
        Dot::add(top1, w[1], x);
        Dot::add(middle0, w[0], y);
        Dot::add(middle1, w[1], y);
        Dot::add(middle0, l[0], x);
        Dot::add(middle1, l[1], x);
        rest.add(xh + kGroup, xl + kGroup, w, l);
    }
    PLIANT_INLINE void finish(const float* factors, const __m256* step, float* sums) const {
        const __m256 factor = _mm256_set1_ps(*factors);
        add_scaled(both_parts(top0, middle0), step[0], factor, sums);
        add_scaled(both_parts(top1, middle1), step[1], factor, sums + kPart);
        rest.finish(factors + 1, step, sums + kSupertile);
    }
};
template <typename Dot>
struct WideSums<Dot, 0> {
    PLIANT_INLINE void start(const int32_t*, const int32_t*) {}
    PLIANT_INLINE void add(const int8_t*, const int8_t*, const __m256i*, const __m256i*) {}
    PLIANT_INLINE void finish(const float*, const __m256*, float*) const {}
};

constexpr int kQuads = kGroup / 4;

// The sums of T tokens and a part, for inputs that were spread: [token][kQuads].
template <typename Dot, int T>
struct SpreadSums {
    __m256i sum;
    SpreadSums<Dot, T - 1> rest;

    PLIANT_INLINE void start(const int32_t* from) {
        sum = _mm256_set1_epi32(*from);
        rest.start(from + 1);
    }
    PLIANT_INLINE void add(__m256i w0, __m256i w1, const __m256i* x) {
        if constexpr (Dot::kPairs) {
            Dot::add(sum, w0, w1, x[0], x[1]);
        } else {
            Dot::add(sum, w0, x[0]);
            Dot::add(sum, w1, x[1]);
        }
        rest.add(w0, w1, x + kQuads);
    }
    PLIANT_INLINE void finish(const float* factors, __m256 step, float* sums) const {
        add_scaled(_mm256_cvtepi32_ps(sum), step, _mm256_set1_ps(*factors), sums);
        rest.finish(factors + 1, step, sums + kSupertile);
    }
};
template <typename Dot>
struct SpreadSums<Dot, 0> {
    PLIANT_INLINE void start(const int32_t*) {}
    PLIANT_INLINE void add(__m256i, __m256i, const __m256i*) {}
    PLIANT_INLINE void finish(const float*, __m256, float*) const {}
};

// The sums of T tokens with deep levels of a part. The sign of a level moves to the input.
template <typename Dot, int T>
struct DeepSums {
    typename Dot::DeepSum sum;
    DeepSums<Dot, T - 1> rest;

    PLIANT_INLINE void add(const Deep& w, const int8_t* xh, const int8_t* xl) {
        sum.add(w, _mm256_sign_epi8(broadcast(xh), w.sign),
                _mm256_sign_epi8(broadcast(xl), w.sign));
        rest.add(w, xh + kGroup, xl + kGroup);
    }
    PLIANT_INLINE void finish(const float* factors, __m256 step, float* sums) const {
        add_scaled(sum.value(), step, _mm256_set1_ps(*factors), sums);
        rest.finish(factors + 1, step, sums + kSupertile);
    }
};
template <typename Dot>
struct DeepSums<Dot, 0> {
    PLIANT_INLINE void add(const Deep&, const int8_t*, const int8_t*) {}
    PLIANT_INLINE void finish(const float*, __m256, float*) const {}
};

template <typename Dot, int N>
using For = std::conditional_t < N <= kSmallDepth,
      typename Dot::Small, std::conditional_t<N<kWideDepth, typename Dot::Large, Dot>>;

template <int N>
using Levels = std::conditional_t<N >= kWideDepth, DeepTable<N>, Table<N>>;
template <int N>
PLIANT_INLINE Levels<N> levels_of(const CodedProduct& p, int flip) {
    if constexpr (N >= kWideDepth)
        return DeepTable<N>(p.levels->deep[N]);
    else
        return Table<N>(p.levels->hi[N], flip);
}

PLIANT_INLINE void factors_of(const CodedProduct& p, int g, int depth, int first, int tokens,
                              float* out) {
    const float* scale = p.x->scale + p.x->at(g, first);
    const float group = p.block->group_scale[g], level = p.levels->unit[depth];
    for (int t = 0; t < tokens; ++t) out[t] = (scale[t] * group) * level;
}

// Where the bytes of a part are in a ply of a supertile, for columns 32 h … 32 h + 31.
constexpr size_t place(int part, int h) {
    return static_cast<size_t>(128 * (part / 2) + 64 * h + 32 * (part % 2));
}

// The products of T tokens with a group, straight out of its plies.
template <typename Dot, int N, int T>
struct FewShallow {
    using Kind = For<Dot, N>;
    const Prepared& x;
    const Table<N> table;
    __m256i spread[T * kQuads];
    int32_t starts[T];

    explicit FewShallow(const CodedProduct& p) : x(*p.x), table(levels_of<N>(p, Kind::kFlip)) {}
    void begin(int group) {
        for (int t = 0; t < T; ++t) {
            const size_t at = x.at(group, t);
            for (int i = 0; i < kQuads; ++i)
                store(&spread[t * kQuads + i], broadcast(x.narrow + at * kGroup + 4 * i));
            starts[t] = Kind::start(x.sum_narrow[at]);
        }
    }
    // Parts in the order of place(). Bits are collected before those of the part before are used: a
    // processor looks ahead as far as its schedulers have room, and must not wait for what it finds
    // there.
    PLIANT_INLINE void add(const Strip& strip, const uint8_t* const* planes, const uint8_t* codes,
                           __m256 low, __m256 high, const float* factors, float* sums) const {
        const size_t end = static_cast<size_t>(strip.last - strip.first) * 256;
        Bits<N> first(planes, 0);
        for (size_t at = 0; at < end; codes += 16, sums += T * kSupertile) {
            strip.scout.go(N);
            for (int part = 0; part < 4; part += 2) {
                SpreadSums<Kind, T> sum0, sum1;
                sum0.start(starts);
                sum1.start(starts);
                // A loop: all depths together have to fit into the cache of instructions.
                for (int h = 0; h < 2; ++h) {
                    const __m256i* const input = spread + 8 * h;
                    const auto add = [&](auto& sum, const Bits<N>& bits) PLIANT_LAMBDA {
                        repeat<4>([&]<int j>() PLIANT_LAMBDA {
                            sum.add(table.template look_up<2 * j>(bits),
                                    table.template look_up<2 * j + 1>(bits), input + 2 * j);
                        });
                    };
                    const Bits<N> second(planes, at + 32);
                    add(sum0, first);
                    const size_t next = at + 64;
                    first = Bits<N>(planes, next < end ? next : at);
                    add(sum1, second);
                    at = next;
                }
                sum0.finish(factors, row_steps(codes, part, low, high), sums + kPart * part);
                sum1.finish(factors, row_steps(codes, part + 1, low, high),
                            sums + kPart * (part + 1));
            }
        }
    }
};
template <typename Dot, int N, int T>
struct FewDeep {
    const Prepared& x;
    const DeepTable<N> table;
    const int8_t *xh = nullptr, *xl = nullptr;

    explicit FewDeep(const CodedProduct& p) : x(*p.x), table(levels_of<N>(p, 0)) {}
    void begin(int group) {
        xh = x.hi + x.at(group, 0) * kGroup;
        xl = x.lo + x.at(group, 0) * kGroup;
    }
    PLIANT_INLINE void add(const Strip& strip, const uint8_t* const* planes, const uint8_t* codes,
                           __m256 low, __m256 high, const float* factors, float* sums) const {
        const size_t end = static_cast<size_t>(strip.last - strip.first) * 256;
        for (size_t at = 0; at < end; at += 256, codes += 16, sums += T * kSupertile) {
            strip.scout.go(N);
            for (int part = 0; part < 4; ++part) {
                DeepSums<Dot, T> sum;
                for (int h = 0; h < 2; ++h) {
                    const Bits<N> bits(planes, at + place(part, h));
                    repeat<8>([&]<int j>() PLIANT_LAMBDA {
                        const int column = 32 * h + 4 * j;
                        sum.add(table.template look_up<j>(bits), xh + column, xl + column);
                    });
                }
                sum.finish(factors, row_steps(codes, part, low, high), sums + kPart * part);
            }
        }
    }
};

// Adds the products of T tokens with a run: plies go from memory through registers
// straight into the sums. Group after group, so that every ply is read as one stream.
template <typename Dot, int N, int T>
void multiply(const Strip& strip, const Run& run) {
    using Few = std::conditional_t<N >= kWideDepth, FewDeep<Dot, N, T>, FewShallow<Dot, N, T>>;
    const CodedProduct& p = strip.p;
    const CodedBlock& block = *p.block;
    const __m256 low = _mm256_load_ps(p.levels->steps), high = _mm256_load_ps(p.levels->steps + 8);
    Few few(p);
    for (int g = run.first, end = g + run.count; g < end; ++g) {
        few.begin(g);
        float factors[T];
        factors_of(p, g, N, 0, T, factors);
        const uint8_t* codes =
            block.codes[static_cast<size_t>(g)] + static_cast<size_t>(strip.first) * 16;
        const uint8_t* planes[N];
        planes_of<N>(block, g, strip.first, planes);
        few.add(strip, planes, codes, low, high, factors, strip.sums);
    }
}

constexpr int kFew = 4;  // tokens for which plies are not decoded to memory first

template <typename Dot, int N>
void few_tokens(const Strip& strip, const Run& run) {
    using Block = void (*)(const Strip&, const Run&);
    static constexpr auto kBlocks = []<int... T>(std::integer_sequence<int, T...>) {
        return std::array<Block, kFew>{multiply<Dot, N, T + 1>...};
    }(std::make_integer_sequence<int, kFew>{});
    kBlocks[static_cast<size_t>(strip.p.tokens - 1)](strip, run);
}

// f<T>(t) for all tokens from t = 0 on, Block at a time.
template <int Block, typename F>
PLIANT_INLINE void in_blocks(int tokens, F&& f) {
    int t = 0;
    for (; t + Block <= tokens; t += Block) f.template operator()<Block>(t);
    repeat<Block - 1>([&]<int i>() PLIANT_LAMBDA {
        if (tokens - t == i + 1) f.template operator()<i + 1>(t);
    });
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
    PLIANT_INLINE void decode(const uint8_t* const* planes, const Table<N>& table) {
        for (int part = 0; part < 4; ++part)
            for (int h = 0; h < 2; ++h) {
                const Bits<N> bits(planes, place(part, h));
                repeat<8>([&]<int j>() PLIANT_LAMBDA {
                    store(levels + (8 * h + j) * 128 + 32 * part, table.template look_up<j>(bits));
                });
            }
    }
    [[gnu::noinline]] void multiply(const float* factors, const __m256* step, float* sums) const {
        constexpr int kStep = Kind::kPairs ? 2 : 1;  // quads at once
        for (int half = 0; half < 2; ++half)
            in_blocks<Dot::kTokens>(p.tokens, [&]<int T>(int t) PLIANT_LAMBDA {
                Sums<Kind, Kind::kPairs, T> sum;
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
    PLIANT_INLINE void decode(const uint8_t* const* planes, const DeepTable<N>& table) {
        const __m256i flip = bytes(kFlip);
        for (int part = 0; part < 4; ++part)
            for (int h = 0; h < 2; ++h) {
                const Bits<N> bits(planes, place(part, h));
                repeat<8>([&]<int j>() PLIANT_LAMBDA {
                    const int at = (8 * h + j) * 128 + 32 * part;
                    const Deep w = table.template look_up<j>(bits);
                    store(high + at, _mm256_add_epi8(_mm256_sign_epi8(w.hi, w.sign), flip));
                    store(low + at, _mm256_add_epi8(_mm256_sign_epi8(w.lo, w.sign), flip));
                });
            }
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

    PLIANT_INLINE void decode(const uint8_t* const* planes, const Levels<N>& levels) {
        for (int part = 0; part < 4; ++part)
            for (int h = 0; h < 2; ++h) {
                const Bits<N> bits(planes, place(part, h));
                repeat<8>([&]<int j>() PLIANT_LAMBDA {
                    const Deep w = levels.template look_up<j>(bits);
                    const __m256i low = _mm256_sign_epi8(w.lo, w.sign);
                    const Words both(_mm256_sign_epi8(w.hi, w.sign), low);
                    uint8_t* to = words + (part * kQuads + 8 * h + j) * 3 * 32;
                    store(to, both.even);
                    store(to + 32, both.odd);
                    store(to + 64, _mm256_add_epi8(low, bytes(WordSums<1>::kFlip)));
                });
            }
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

// Many tokens: as many at a time as there are registers for their sums.
template <typename Dot, int N>
using Decoded =
    std::conditional_t < N<kWideDepth, NarrowBytes<Dot, N>,
                           std::conditional_t<Dot::kWords, InWords<N>, WideBytes<Dot, N>>>;
template <typename Dot, int N>
void many_tokens(const Strip& strip, const Run& run) {
    using Group = Decoded<Dot, N>;
    const CodedProduct& p = strip.p;
    const CodedBlock& block = *p.block;
    const __m256 low = _mm256_load_ps(p.levels->steps), high = _mm256_load_ps(p.levels->steps + 8);
    const Levels<N> levels = levels_of<N>(p, Group::kFlip);
    Group group(strip);
    float factors[kMaxTokens];
    __m256 step[4];
    for (int g = run.first; g < run.first + run.count; ++g) {
        factors_of(p, g, N, 0, p.tokens, factors);
        group.begin(g);
        const uint8_t* planes[N];
        planes_of<N>(block, g, strip.first, planes);
        float* sums = strip.sums;
        for (int s = strip.first; s < strip.last; ++s, sums += p.tokens * kSupertile) {
            strip.scout.go(N);
            group.decode(planes, levels);
            const uint8_t* codes =
                block.codes[static_cast<size_t>(g)] + static_cast<size_t>(s) * 16;
            for (int part = 0; part < 4; ++part) step[part] = row_steps(codes, part, low, high);
            group.multiply(factors, step, sums);
            repeat<N>([&]<int i>() PLIANT_LAMBDA { planes[i] += 256; });
        }
    }
}

// A strip of supertiles, as many as their sums have room for, goes through the groups together.
template <typename Dot>
void multiply_strips(const CodedProduct& p) {
    float* sums = reinterpret_cast<float*>(p.scratch);
    const int size = std::max(1, kMaxTokens / p.tokens);
    fetch_pointers(*p.block, p.first, p.last);
    Scout scout(*p.block, p.first, p.last, size);
    for (int first = p.first; first < p.last; first += size) {
        const int last = std::min(first + size, p.last);
        const Strip strip{p, first, last, sums, scout};
        std::fill_n(sums, (last - first) * p.tokens * kSupertile, 0.0f);
        for (const Run& run : p.block->runs)
            with_depth(run.depth, [&]<int N>() {
                p.tokens <= kFew ? few_tokens<Dot, N>(strip, run) : many_tokens<Dot, N>(strip, run);
            });
        const float* sum = sums;
        for (int s = first; s < last; ++s)
            for (int t = 0; t < p.tokens; ++t, sum += kSupertile) {
                const float* scale = p.block->row_scale + s * kSupertile;
                float* out = p.out + static_cast<size_t>(t) * p.stride + (s - p.first) * kSupertile;
                for (int r = 0; r < kSupertile; ++r) out[r] = sum[r] * scale[r];
            }
    }
}

// Inputs of pages have 8 bits.
template <typename Dot, int N>
using ForPage = std::conditional_t<N <= kSmallDepth, typename Dot::Small, Dot>;

// Sums of Q vectors with 16 rows of a unit of a page, in two parts.
template <typename Dot, bool Positive, int N, int Q>
struct PageSums {
    __m256i sum0, sum1;
    PageSums<Dot, Positive, N, Q - 1> rest;

    PLIANT_INLINE void start(const int32_t* sums) {
        if constexpr (Positive)
            sum0 = sum1 = _mm256_setzero_si256();
        else
            sum0 = sum1 = _mm256_set1_epi32(ForPage<Dot, N>::start(*sums));
        rest.start(sums + 1);
    }
    PLIANT_INLINE void add(__m256i w0, __m256i w1, const int8_t* at) {
        const __m256i x = broadcast(at);
        if constexpr (Positive) {
            Dot::add_positive(sum0, w0, x);
            Dot::add_positive(sum1, w1, x);
        } else {
            ForPage<Dot, N>::add(sum0, w0, x);
            ForPage<Dot, N>::add(sum1, w1, x);
        }
        rest.add(w0, w1, at + kHalf);
    }
    PLIANT_INLINE void write(int32_t* out) const {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), sum0);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + kPart), sum1);
        rest.write(out + kHalf);
    }
};
template <typename Dot, bool Positive, int N>
struct PageSums<Dot, Positive, N, 0> {
    PLIANT_INLINE void start(const int32_t*) {}
    PLIANT_INLINE void add(__m256i, __m256i, const int8_t*) {}
    PLIANT_INLINE void write(int32_t*) const {}
};

constexpr int kPageVectors = 4;  // whose sums of 16 rows fit into registers

// Q vectors from `first` on, with all pages.
template <typename Dot, bool Positive, int N, int Q>
void page_vectors(const PlyProduct& p, int first) {
    const Table<N> table(p.levels->rounded[N], Positive ? 0 : ForPage<Dot, N>::kFlip);
    const int8_t* x = p.x + first * kHalf;
    int32_t* out = p.out + first * kHalf;
    for (int page = 0; page < p.pages; ++page, x += p.x_stride, out += p.vectors * kHalf) {
        if (first == 0) fetch(p.ahead[page]);
        const uint8_t* planes[N];
        for (int i = 0; i < N; ++i) planes[i] = p.plies[page] + i * kUnitPly;
        for (int row = 0; row < kHalf; row += 2 * kPart) {
            PageSums<Dot, Positive, N, Q> sums;
            sums.start(Positive ? nullptr : p.sum + first);
            const size_t at = static_cast<size_t>(4 * row);
            const Bits<N> bits0(planes, at), bits1(planes, at + 4 * kPart);
            repeat<8>([&]<int j>() PLIANT_LAMBDA {
                sums.add(table.template look_up<j>(bits0), table.template look_up<j>(bits1),
                         x + 4 * j);
            });
            sums.write(out + row);
        }
    }
}

template <typename Dot>
void multiply_pages(const PlyProduct& p) {
    using Some = void (*)(const PlyProduct&, int);
    with_depth(p.depth, [&]<int N>() {
        static constexpr Some kSigned[] = {
            page_vectors<Dot, false, N, 1>, page_vectors<Dot, false, N, 2>,
            page_vectors<Dot, false, N, 3>, page_vectors<Dot, false, N, 4>};
        static constexpr Some kPositive[] = {
            page_vectors<Dot, true, N, 1>, page_vectors<Dot, true, N, 2>,
            page_vectors<Dot, true, N, 3>, page_vectors<Dot, true, N, 4>};
        for (int first = 0; first < p.vectors; first += kPageVectors) {
            const int last = std::min(p.vectors - first, kPageVectors) - 1;
            (p.sum == nullptr ? kPositive : kSigned)[last](p, first);
        }
    });
}

}  // namespace pliant::avx2
