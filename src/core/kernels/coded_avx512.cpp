// Products with coded matrices for AVX-512 with VNNI and VBMI.
//
// Levels are unsigned, level + 128, and multiplied with vpdpbusd; lanes are rows. The 128 is taken
// out again through the sum of the inputs.
#include <array>

#include "ops.h"
#include "plies_avx512.h"
#include "scout.h"

namespace pliant::avx512 {

namespace {

// sum += w · x, in place: with the intrinsic GCC 12 keeps a second copy of every sum of a long loop
// in memory.
PLIANT_INLINE void add_product(__m512i& sum, __m512i w, __m512i x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
}

using bytes64::broadcast;

// The sums of T tokens and one or two tiles. Members of nested structs become registers; elements
// of arrays that live through a loop stay in memory.
template <bool Wide, int Tiles, int T>
struct Sums {
    __m512i top0, top1, middle0, middle1;
    Sums<Wide, Tiles, T - 1> rest;

    PLIANT_INLINE void start(const int32_t* sum_hi, const int32_t* sum_lo) {
        top0 = top1 = _mm512_set1_epi32(-128 * *sum_hi);
        if constexpr (Wide) middle0 = middle1 = _mm512_set1_epi32(-128 * (*sum_lo + *sum_hi));
        rest.start(sum_hi + 1, sum_lo + 1);
    }
    PLIANT_INLINE void add(const int8_t* xh, const int8_t* xl, const __m512i* w, const __m512i* l) {
        const __m512i x = broadcast(xh);
        add_product(top0, w[0], x);
        if constexpr (Tiles > 1) add_product(top1, w[1], x);
        if constexpr (Wide) {
            const __m512i y = broadcast(xl);
            add_product(middle0, w[0], y);
            if constexpr (Tiles > 1) add_product(middle1, w[1], y);
            add_product(middle0, l[0], x);
            if constexpr (Tiles > 1) add_product(middle1, l[1], x);
        }
        rest.add(xh + kGroup, Wide ? xl + kGroup : nullptr, w, l);
    }
    PLIANT_INLINE void finish(const float* factors, const __m512* step, float* sums) const {
        const __m512 factor = _mm512_set1_ps(*factors);
        finish(to_float<Wide>(top0, middle0), factor, step[0], sums);
        if constexpr (Tiles > 1) finish(to_float<Wide>(top1, middle1), factor, step[1], sums + 16);
        rest.finish(factors + 1, step, sums + kSupertile);
    }

  private:
    static PLIANT_INLINE void finish(__m512 value, __m512 factor, __m512 step, float* sums) {
        _mm512_store_ps(sums,
                        _mm512_fmadd_ps(_mm512_mul_ps(value, step), factor, _mm512_load_ps(sums)));
    }
};
template <bool Wide, int Tiles>
struct Sums<Wide, Tiles, 0> {
    PLIANT_INLINE void start(const int32_t*, const int32_t*) {}
    PLIANT_INLINE void add(const int8_t*, const int8_t*, const __m512i*, const __m512i*) {}
    PLIANT_INLINE void finish(const float*, const __m512*, float*) const {}
};

// Adds the products of T tokens from `token` on with a run: plies go from memory through registers
// straight into the sums. Group after group, so that every ply is read as one stream.
template <int N, int T>
void multiply(const Strip& strip, const Run& run, int token) {
    constexpr bool kWide = N >= kWideDepth;
    constexpr int kTiles = kWide && T > 2 ? 1 : 2;  // at once: there are 32 registers
    const CodedProduct& p = strip.p;
    const CodedBlock& block = *p.block;
    const __m512 steps = _mm512_load_ps(p.levels->steps);
    const Table<N> hi(p.levels->hi[N], 0x80), lo(p.levels->lo[N], 0x80);
    for (int g = run.first, end = g + run.count; g < end; ++g) {
        const size_t begin = p.x->at(g, token);
        const int8_t* const xh = p.x->top(kWide) + begin * kGroup;
        const int8_t* const xl = p.x->lo + begin * kGroup;
        const int32_t* const sum_hi = p.x->sum_top(kWide) + begin;
        const int32_t* const sum_lo = p.x->sum_lo + begin;
        alignas(64) float factors[16];
        factors_of(p, g, N, token, T, factors);
        const uint8_t* const codes = block.codes[static_cast<size_t>(g)];
        const uint8_t* planes[N];
        planes_of<N>(block, g, strip.first, planes);
        float* sums = strip.sums + token * kSupertile;
        for (int s = strip.first; s < strip.last; ++s, sums += p.tokens * kSupertile) {
            if (token == 0) strip.scout.go(N);
            __m512 step[2];
            row_steps(codes, static_cast<size_t>(s), steps, step);
            repeat<2 / kTiles>([&]<int half>() PLIANT_LAMBDA {
                Sums<kWide, kTiles, T> sum;
                sum.start(sum_hi, sum_lo);
                repeat<2>([&]<int h>() PLIANT_LAMBDA {
                    constexpr size_t kAt = 128 * half + 64 * h;
                    const Bits<N> first(planes, kAt), second(planes, kTiles > 1 ? kAt + 128 : kAt);
                    repeat<8>([&]<int j>() PLIANT_LAMBDA {
                        constexpr int kX = 32 * h + 4 * j;
                        const __m512i index[] = {first.template at<j>(), second.template at<j>()};
                        const __m512i w[] = {hi(index[0]), hi(index[1])};
                        if constexpr (kWide) {
                            const __m512i l[] = {lo(index[0]), lo(index[1])};
                            sum.add(xh + kX, xl + kX, w, l);
                        } else {
                            sum.add(xh + kX, nullptr, w, nullptr);
                        }
                    });
                });
                sum.finish(factors, step + half, sums + 16 * half);
            });
            repeat<N>([&]<int i>() PLIANT_LAMBDA { planes[i] += 256; });
        }
    }
}

constexpr int kFew = 8;  // tokens for which plies are not decoded to memory first

// … of few tokens, in one go or, with deep groups, in two: there are 32 registers.
template <int N>
void few_tokens(const Strip& strip, const Run& run) {
    constexpr int kBlock = N < 7 ? kFew : kFew / 2;
    using Block = void (*)(const Strip&, const Run&, int);
    static constexpr auto kBlocks = []<int... T>(std::integer_sequence<int, T...>) {
        return std::array<Block, kBlock>{multiply<N, T + 1>...};
    }(std::make_integer_sequence<int, kBlock>{});
    const int tokens = strip.p.tokens;
    for (int token = 0; token < tokens; token += kBlock)
        kBlocks[static_cast<size_t>(std::min(kBlock, tokens - token) - 1)](strip, run, token);
}

// A decoded group of a supertile.
struct Decoded {
    alignas(64) uint8_t high[kSupertile * kGroup], low[kSupertile * kGroup];
    alignas(64) float factors[kMaxTokens];
    __m512 step[2];
};

// Adds the products of T tokens from `token` on with it to sums[token][32].
template <int N, int T>
void multiply(const Prepared& x, int g, int token, const Decoded& group, float* sums) {
    constexpr bool kWide = N >= kWideDepth;
    const size_t begin = x.at(g, token);
    const int8_t* xh = x.top(kWide) + begin * kGroup;
    const int8_t* xl = x.lo + begin * kGroup;
    Sums<kWide, 2, T> sum;
    sum.start(x.sum_top(kWide) + begin, x.sum_lo + begin);
    for (int at = 0; at < kSupertile * kGroup; at += 128, xh += 4, xl += 4) {
        const __m512i w[] = {_mm512_load_si512(group.high + at),
                             _mm512_load_si512(group.high + at + 64)};
        if constexpr (kWide) {
            const __m512i l[] = {_mm512_load_si512(group.low + at),
                                 _mm512_load_si512(group.low + at + 64)};
            sum.add(xh, xl, w, l);
        } else {
            sum.add(xh, nullptr, w, nullptr);
        }
    }
    sum.finish(group.factors + token, group.step, sums + token * kSupertile);
}

// Many tokens: as many at a time as there are registers for their sums.
template <int N>
void many_tokens(const Strip& strip, const Run& run) {
    constexpr int kBlock = N < kWideDepth ? 13 : 6;
    using Block = void (*)(const Prepared&, int, int, const Decoded&, float*);
    static constexpr auto kBlocks = []<int... T>(std::integer_sequence<int, T...>) {
        return std::array<Block, kBlock>{multiply<N, T + 1>...};
    }(std::make_integer_sequence<int, kBlock>{});
    const int blocks = (strip.p.tokens + kBlock - 1) / kBlock;
    const CodedProduct& p = strip.p;
    const CodedBlock& block = *p.block;
    const __m512 steps = _mm512_load_ps(p.levels->steps);
    const Table<N> hi(p.levels->hi[N], 0x80), lo(p.levels->lo[N], 0x80);
    Decoded decoded;
    for (int g = run.first; g < run.first + run.count; ++g) {
        factors_of(p, g, N, 0, p.tokens, decoded.factors);
        const uint8_t* planes[N];
        planes_of<N>(block, g, strip.first, planes);
        float* sums = strip.sums;
        for (int s = strip.first; s < strip.last; ++s, sums += p.tokens * kSupertile) {
            strip.scout.go(N);
            decode<N>(planes, hi, lo, decoded.high, decoded.low);
            row_steps(block.codes[static_cast<size_t>(g)], static_cast<size_t>(s), steps,
                      decoded.step);
            for (int t = 0, block = 0; block < blocks; ++block) {
                const int size = p.tokens / blocks + (block < p.tokens % blocks);
                kBlocks[static_cast<size_t>(size - 1)](*p.x, g, t, decoded, sums);
                t += size;
            }
            repeat<N>([&]<int i>() PLIANT_LAMBDA { planes[i] += 256; });
        }
    }
}

// Sums of Q vectors with a unit of a page. Either factor can be the unsigned one: levels, as
// level + 128, or inputs that are not negative.
template <bool Signed, int Q>
struct PageSums {
    __m512i sum0, sum1;
    PageSums<Signed, Q - 1> rest;
    PLIANT_INLINE void start(const int32_t* sums) {
        if constexpr (Signed)
            sum0 = sum1 = _mm512_set1_epi32(-128 * *sums);
        else
            sum0 = sum1 = _mm512_setzero_si512();
        rest.start(sums + 1);
    }
    PLIANT_INLINE void add(__m512i w0, __m512i w1, const int8_t* at) {
        const __m512i x = broadcast(at);
        if constexpr (Signed) {
            add_product(sum0, w0, x);
            add_product(sum1, w1, x);
        } else {
            add_product(sum0, x, w0);
            add_product(sum1, x, w1);
        }
        rest.add(w0, w1, at + kHalf);
    }
    PLIANT_INLINE void write(int32_t* out) const {
        _mm512_store_si512(out, sum0);
        _mm512_store_si512(out + 16, sum1);
        rest.write(out + kHalf);
    }
};
template <bool Signed>
struct PageSums<Signed, 0> {
    PLIANT_INLINE void start(const int32_t*) {}
    PLIANT_INLINE void add(__m512i, __m512i, const int8_t*) {}
    PLIANT_INLINE void write(int32_t*) const {}
};

template <bool Signed, int N, int Q>
void page_pages(const PlyProduct& p) {
    const Table<N> table(p.levels->rounded[N], Signed ? 0x80 : 0);
    const int8_t* x = p.x;
    int32_t* out = p.out;
    for (int page = 0; page < p.pages; ++page, x += p.x_stride, out += Q * kHalf) {
        fetch(p.ahead[page]);
        const uint8_t* planes[N];
        for (int i = 0; i < N; ++i) planes[i] = p.plies[page] + i * kUnitPly;
        PageSums<Signed, Q> sums;
        sums.start(p.sum);
        const Bits<N> first(planes, 0), second(planes, 64);
        repeat<8>([&]<int j>() PLIANT_LAMBDA {
            sums.add(table(first.template at<j>()), table(second.template at<j>()), x + 4 * j);
        });
        sums.write(out);
    }
}

template <int N, int Q>
void page_vectors(const PlyProduct& p) {
    p.sum != nullptr ? page_pages<true, N, Q>(p) : page_pages<false, N, Q>(p);
}

template <int N>
void page_depth(const PlyProduct& p) {
    switch (p.vectors) {
        case 1:
            return page_vectors<N, 1>(p);
        case 2:
            return page_vectors<N, 2>(p);
        case 3:
            return page_vectors<N, 3>(p);
        case 4:
            return page_vectors<N, 4>(p);
        case 5:
            return page_vectors<N, 5>(p);
        case 6:
            return page_vectors<N, 6>(p);
        case 7:
            return page_vectors<N, 7>(p);
        default:
            return page_vectors<N, 8>(p);
    }
}

}  // namespace

void page_product(const PlyProduct& p) {
    with_depth(p.depth, [&]<int N>() { page_depth<N>(p); });
}

// A strip of supertiles, as many as their sums have room for, goes through the groups together, so
// that plies are read as streams.
void coded_product(const CodedProduct& p) {
    float* sums = reinterpret_cast<float*>(p.scratch);
    const int size = std::max(1, kMaxTokens / p.tokens), stride = p.tokens * kSupertile;
    fetch_pointers(*p.block, p.first, p.last);
    Scout scout(*p.block, p.first, p.last, size);
    for (int first = p.first; first < p.last; first += size) {
        const int last = std::min(first + size, p.last);
        const Strip strip{p, first, last, sums, scout};
        std::fill_n(sums, (last - first) * stride, 0.0f);
        for (const Run& run : p.block->runs)
            with_depth(run.depth, [&]<int N>() {
                p.tokens <= kFew ? few_tokens<N>(strip, run) : many_tokens<N>(strip, run);
            });
        for (int s = first; s < last; ++s) scale_rows(p, s, sums + (s - first) * stride);
    }
}

}  // namespace pliant::avx512
