// Products with coded matrices for AVX-512 with VNNI and VBMI.
//
// Levels are unsigned, level + 128, and multiplied with vpdpbusd; lanes are rows. The 128 is taken
// out again through the sum of the inputs.
#include "ops.h"
#include "plies_avx512.h"

namespace pliant::avx512 {

namespace {

// sum += w · x, in place: with the intrinsic GCC 12 keeps a second copy of every sum of a long loop
// in memory.
PLIANT_INLINE void add_product(__m512i& sum, __m512i w, __m512i x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
}

PLIANT_INLINE __m512i broadcast(const int8_t* x) {
    int32_t four;
    __builtin_memcpy(&four, x, 4);
    return _mm512_set1_epi32(four);
}

// One token: plies go from memory through registers straight into the sums. Group after group, so
// that every ply is read as one stream.
template <int N>
void run_vector(const CodedProduct& p, const Run& run) {
    const CodedBlock& block = *p.block;
    const __m512 steps = _mm512_load_ps(p.levels->steps);
    const Table<N> hi(p.levels->hi[N], 0x80), lo(p.levels->lo[N], 0x80);
    for (int g = run.first; g < run.first + run.count; ++g) {
        const size_t at_x = p.x->at(g, 0);
        const int8_t* xh = p.x->hi + at_x * kGroup;
        const int8_t* xl = p.x->lo + at_x * kGroup;
        const int32_t bias_top = -128 * p.x->sum_hi[at_x];
        const int32_t bias_middle = -128 * (p.x->sum_lo[at_x] + p.x->sum_hi[at_x]);
        const __m512 factor = _mm512_set1_ps(factor_of(p, 0, g, N));
        const uint8_t* const codes = block.codes[static_cast<size_t>(g)];
        const bool more = g + 1 < run.first + run.count;
        const uint8_t *planes[N], *following[N];
        for (int i = 0; i < N; ++i) {
            const size_t at = static_cast<size_t>(g * kMaxDepth + i);
            planes[i] = block.planes[at] + static_cast<size_t>(p.first) * 256;
            following[i] =
                !more ? nullptr : block.planes[at + kMaxDepth] + static_cast<size_t>(p.first) * 256;
        }
        float* out = p.out;
        for (int s = p.first; s < p.last; ++s, out += kSupertile) {
            // The rows after the last are another thread's; this one goes on with the next group.
            if (const int beyond = s + kAhead - p.last; beyond < 0)
                fetch<N>(planes, kAhead);
            else if (more && p.first + beyond < p.last)
                fetch<N>(following, beyond);
            __m512 step[2];
            row_steps(codes, static_cast<size_t>(s), steps, step);
            repeat<2>([&]<int half>() PLIANT_LAMBDA {
                __m512i top[2] = {_mm512_set1_epi32(bias_top), _mm512_setzero_si512()};
                __m512i middle[2] = {_mm512_set1_epi32(bias_middle), _mm512_setzero_si512()};
                repeat<2>([&]<int h>() PLIANT_LAMBDA {
                    __m512i index[8];
                    collect<N>(planes, static_cast<size_t>(128 * half + 64 * h), index);
                    repeat<8>([&]<int j>() PLIANT_LAMBDA {
                        const __m512i x = broadcast(xh + 32 * h + 4 * j);
                        const __m512i w = hi(index[j]);
                        top[h] = _mm512_dpbusd_epi32(top[h], w, x);
                        if constexpr (N >= kWideDepth) {
                            const __m512i y = broadcast(xl + 32 * h + 4 * j);
                            middle[0] = _mm512_dpbusd_epi32(middle[0], w, y);
                            middle[1] = _mm512_dpbusd_epi32(middle[1], lo(index[j]), x);
                        }
                    });
                });
                const __m512 value = to_float<(N >= kWideDepth)>(
                    _mm512_add_epi32(top[0], top[1]), _mm512_add_epi32(middle[0], middle[1]));
                _mm512_storeu_ps(out + 16 * half,
                                 _mm512_fmadd_ps(_mm512_mul_ps(value, step[half]), factor,
                                                 _mm512_loadu_ps(out + 16 * half)));
            });
            repeat<N>([&]<int i>() PLIANT_LAMBDA { planes[i] += 256; });
        }
    }
}

// The sums of T tokens and two tiles. Members of nested structs become registers; elements of
// arrays that live through a loop stay in memory.
template <bool Wide, int T>
struct Sums {
    __m512i top0, top1, middle0, middle1;
    Sums<Wide, T - 1> rest;

    PLIANT_INLINE void start(const int32_t* sum_hi, const int32_t* sum_lo) {
        top0 = top1 = _mm512_set1_epi32(-128 * *sum_hi);
        if constexpr (Wide) middle0 = middle1 = _mm512_set1_epi32(-128 * (*sum_lo + *sum_hi));
        rest.start(sum_hi + 1, sum_lo + 1);
    }
    PLIANT_INLINE void add(const int8_t* xh, const int8_t* xl, __m512i w0, __m512i w1, __m512i l0,
                           __m512i l1) {
        const __m512i x = broadcast(xh);
        add_product(top0, w0, x);
        add_product(top1, w1, x);
        if constexpr (Wide) {
            const __m512i y = broadcast(xl);
            add_product(middle0, w0, y);
            add_product(middle1, w1, y);
            add_product(middle0, l0, x);
            add_product(middle1, l1, x);
        }
        rest.add(xh + kGroup, xl + kGroup, w0, w1, l0, l1);
    }
    PLIANT_INLINE void finish(const float* factors, __m512 step0, __m512 step1, float* sums) {
        const __m512 factor = _mm512_set1_ps(*factors);
        const __m512 value0 = to_float<Wide>(top0, middle0), value1 = to_float<Wide>(top1, middle1);
        _mm512_store_ps(
            sums, _mm512_fmadd_ps(_mm512_mul_ps(value0, step0), factor, _mm512_load_ps(sums)));
        _mm512_store_ps(sums + 16, _mm512_fmadd_ps(_mm512_mul_ps(value1, step1), factor,
                                                   _mm512_load_ps(sums + 16)));
        rest.finish(factors + 1, step0, step1, sums + kSupertile);
    }
};
template <bool Wide>
struct Sums<Wide, 0> {
    PLIANT_INLINE void start(const int32_t*, const int32_t*) {}
    PLIANT_INLINE void add(const int8_t*, const int8_t*, __m512i, __m512i, __m512i, __m512i) {}
    PLIANT_INLINE void finish(const float*, __m512, __m512, float*) {}
};

// Adds the products of T tokens from `first` on with the decoded group to sums[token][32].
template <int N, int T>
void tokens_block(const CodedProduct& p, int g, int first, const uint8_t* wh, const uint8_t* wl,
                  const float* factors, const __m512* step, float* sums) {
    constexpr bool kWide = N >= kWideDepth;
    const size_t begin = p.x->at(g, first);
    const int8_t* xh = p.x->hi + begin * kGroup;
    const int8_t* xl = p.x->lo + begin * kGroup;
    Sums<kWide, T> sum;
    sum.start(p.x->sum_hi + begin, p.x->sum_lo + begin);
    for (int q = 0; q < 16; ++q, wh += 128, wl += 128, xh += 4, xl += 4) {
        const __m512i w0 = _mm512_load_si512(wh), w1 = _mm512_load_si512(wh + 64);
        __m512i l0 = w0, l1 = w1;
        if constexpr (kWide) {
            l0 = _mm512_load_si512(wl);
            l1 = _mm512_load_si512(wl + 64);
        }
        sum.add(xh, xl, w0, w1, l0, l1);
    }
    sum.finish(factors + first, step[0], step[1], sums + first * kSupertile);
}

// … of all tokens.
template <int N>
void all_tokens(const CodedProduct& p, int g, const uint8_t* wh, const uint8_t* wl,
                const float* factors, const __m512* step, float* sums) {
    constexpr int kBlock = N >= kWideDepth ? 6 : 12;  // as many sums as there are registers
    int t = 0;
    for (; t + kBlock <= p.tokens; t += kBlock)
        tokens_block<N, kBlock>(p, g, t, wh, wl, factors, step, sums);
    if constexpr (kBlock > 6)
        if (t + 6 <= p.tokens) {
            tokens_block<N, 6>(p, g, t, wh, wl, factors, step, sums);
            t += 6;
        }
    switch (p.tokens - t) {
        case 1:
            return tokens_block<N, 1>(p, g, t, wh, wl, factors, step, sums);
        case 2:
            return tokens_block<N, 2>(p, g, t, wh, wl, factors, step, sums);
        case 3:
            return tokens_block<N, 3>(p, g, t, wh, wl, factors, step, sums);
        case 4:
            return tokens_block<N, 4>(p, g, t, wh, wl, factors, step, sums);
        case 5:
            return tokens_block<N, 5>(p, g, t, wh, wl, factors, step, sums);
        default:
            return;
    }
}

// Sums of Q vectors with 16 rows of a unit of a page. Either factor can be the unsigned one:
// levels, as level + 128, or inputs that are not negative.
template <bool Signed, int Q>
struct PageSums {
    __m512i sum;
    PageSums<Signed, Q - 1> rest;
    PLIANT_INLINE void start(const int32_t* sums) {
        if constexpr (Signed)
            sum = _mm512_set1_epi32(-128 * *sums);
        else
            sum = _mm512_setzero_si512();
        rest.start(sums + 1);
    }
    PLIANT_INLINE void add(__m512i w, const int8_t* x) {
        if constexpr (Signed)
            add_product(sum, w, broadcast(x));
        else
            add_product(sum, broadcast(x), w);
        rest.add(w, x + kHalf);
    }
    PLIANT_INLINE void write(int32_t* out) const {
        _mm512_storeu_si512(out, sum);
        rest.write(out + kHalf);
    }
};
template <bool Signed>
struct PageSums<Signed, 0> {
    PLIANT_INLINE void start(const int32_t*) {}
    PLIANT_INLINE void add(__m512i, const int8_t*) {}
    PLIANT_INLINE void write(int32_t*) const {}
};

template <bool Signed, int N, int Q>
void page_pages(const PlyProduct& p) {
    const Table<N> table(p.levels->hi[N], Signed ? 0x80 : 0);
    const int8_t* x = p.x;
    int32_t* out = p.out;
    for (int page = 0; page < p.pages; ++page, x += p.x_stride, out += Q * kHalf) {
        fetch(p.ahead[page]);
        const uint8_t* planes[N];
        for (int i = 0; i < N; ++i) planes[i] = p.plies[page] + i * kUnitPly;
        for (int tile = 0; tile < 2; ++tile) {
            PageSums<Signed, Q> sums;
            sums.start(p.sum);
            __m512i index[8];
            collect<N>(planes, static_cast<size_t>(64 * tile), index);
            repeat<8>([&]<int j>() PLIANT_LAMBDA { sums.add(table(index[j]), x + 4 * j); });
            sums.write(out + 16 * tile);
        }
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

void coded_product(const CodedProduct& p) {
    const CodedBlock& block = *p.block;
    if (p.tokens == 1) {
        const int rows = (p.last - p.first) * kSupertile;
        float* out = p.out;
        const float* scale = block.row_scale + p.first * kSupertile;
        for (int r = 0; r < rows; r += 16) _mm512_storeu_ps(out + r, _mm512_setzero_ps());
        for (const Run& run : block.runs)
            with_depth(run.depth, [&]<int N>() { run_vector<N>(p, run); });
        for (int r = 0; r < rows; r += 16)
            _mm512_storeu_ps(out + r,
                             _mm512_mul_ps(_mm512_loadu_ps(out + r), _mm512_loadu_ps(scale + r)));
        return;
    }
    many_tokens(p, 0x80,
                [&]<int N>(int g, const uint8_t* wh, const uint8_t* wl, const float* factors,
                           const __m512* step,
                           float* sums) { all_tokens<N>(p, g, wh, wl, factors, step, sums); });
}

}  // namespace pliant::avx512
