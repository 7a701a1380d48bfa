// Products with coded matrices for AVX2: a group of a supertile is decoded to signed bytes, then
// multiplied with all tokens. vpmaddubsw wants one unsigned factor, so the sign of the input moves
// to the weight.
#include <immintrin.h>

#include "ops.h"

namespace pliant::avx2 {

namespace {

#define PLIANT_INLINE inline __attribute__((always_inline))

PLIANT_INLINE __m256i bytes(int value) { return _mm256_set1_epi8(static_cast<char>(value)); }
PLIANT_INLINE __m256i select(__m256i mask, __m256i a, __m256i b) {
    return _mm256_or_si256(_mm256_and_si256(mask, a), _mm256_andnot_si256(mask, b));
}
template <int S>
PLIANT_INLINE __m256i left(__m256i a) {  // by S bits inside bytes, garbage in the bits that come in
    if constexpr (S >= 0)
        return _mm256_slli_epi16(a, S);
    else
        return _mm256_srli_epi16(a, -S);
}

// Brings the bits of one to four plies together: the low nibbles of out[j] are from bit j of the
// bytes, the high ones from bit j + 4, ply 1 on top; bits of plies that are not there are garbage.
template <int Count>
PLIANT_INLINE void nibbles(const __m256i* v, __m256i* out) {
    const __m256i odd_bits = bytes(0xAA), pair_bits = bytes(0xCC);
    const __m256i zero = _mm256_setzero_si256();
    const auto merge = [&](int first, __m256i* even, __m256i* odd) {
        const __m256i a = first < Count ? v[first] : zero;
        const __m256i b = first + 1 < Count ? v[first + 1] : zero;
        *even = select(odd_bits, left<1>(a), b);
        *odd = select(odd_bits, a, left<-1>(b));
    };
    __m256i even, odd, even2, odd2;
    merge(0, &even, &odd);
    merge(2, &even2, &odd2);
    out[0] = select(pair_bits, left<2>(even), even2);
    out[2] = select(pair_bits, even, left<-2>(even2));
    out[1] = select(pair_bits, left<2>(odd), odd2);
    out[3] = select(pair_bits, odd, left<-2>(odd2));
}

// The collected bits (see LevelTables) of 8 rows × 32 columns, split in nibbles: out[j] has columns
// 4 j … 4 j + 3.
template <int N>
PLIANT_INLINE void collect(const uint8_t* const* planes, size_t offset, __m256i* lower,
                           __m256i* upper) {
    __m256i v[N], n[4];
    for (int i = 0; i < N; ++i)
        v[i] = _mm256_load_si256(reinterpret_cast<const __m256i*>(planes[i] + offset));
    const __m256i mask = bytes(0x0F);
    nibbles<(N < 4 ? N : 4)>(v, n);
    for (int j = 0; j < 4; ++j) {
        lower[j] = _mm256_and_si256(n[j], mask);
        lower[j + 4] = _mm256_and_si256(left<-4>(n[j]), mask);
    }
    if constexpr (N > 4) {
        __m256i m[4];
        nibbles<N - 4>(v + 4, m);
        // Depths 5 and 6 have their extra plies in the lowest bits of the upper nibble.
        constexpr int shift = N == 5 ? 3 : N == 6 ? 2 : 0;
        for (int j = 0; j < 4; ++j) {
            const __m256i low = _mm256_and_si256(m[j], mask);
            const __m256i high = _mm256_and_si256(left<-4>(m[j]), mask);
            upper[j] = left<-shift>(low);
            upper[j + 4] = left<-shift>(high);
        }
    }
}

template <int N>
PLIANT_INLINE __m256i look_up(const int8_t* table, __m256i lower, __m256i upper) {
    const auto part = [&](int k) {
        return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128(
                                       reinterpret_cast<const __m128i*>(table + 16 * k))),
                                   lower);
    };
    if constexpr (N <= 4) return part(0);
    constexpr int parts = N == 5 ? 2 : N == 6 ? 4 : 16, step = N == 7 ? 2 : 1;
    __m256i result = _mm256_setzero_si256();
    for (int k = 0; k < parts; k += step)
        result =
            _mm256_or_si256(result, _mm256_and_si256(_mm256_cmpeq_epi8(upper, bytes(k)), part(k)));
    return result;
}

// One group of a supertile to wh (and wl): [4 parts of 8 rows][16 quads][32] signed bytes.
template <int N>
void decode(const uint8_t* const* planes, const LevelTables& levels, int8_t* wh, int8_t* wl) {
    for (int part = 0; part < 4; ++part)
        for (int h = 0; h < 2; ++h) {
            __m256i lower[8], upper[8];
            collect<N>(planes, static_cast<size_t>(128 * (part / 2) + 64 * h + 32 * (part % 2)),
                       lower, upper);
            for (int j = 0; j < 8; ++j) {
                const int at = (part * 16 + 8 * h + j) * 32;
                __m256i u = N > 4 ? upper[j] : lower[j];
                if constexpr (N == 7) u = _mm256_and_si256(u, bytes(0x0E));
                _mm256_store_si256(reinterpret_cast<__m256i*>(wh + at),
                                   look_up<N>(levels.hi[N], lower[j], u));
                if constexpr (N >= kWideDepth)
                    _mm256_store_si256(reinterpret_cast<__m256i*>(wl + at),
                                       look_up<N>(levels.lo[N], lower[j], u));
            }
        }
}

PLIANT_INLINE __m256i dot(__m256i sum, __m256i w, __m256i x) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(w, x));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
PLIANT_INLINE __m256i broadcast(const int8_t* x) {
    int32_t four;
    __builtin_memcpy(&four, x, 4);
    return _mm256_set1_epi32(four);
}

// Adds the products of T tokens with 8 rows of the decoded group to sums[token][32].
template <int N, int T>
void tokens_block(const CodedProduct& p, int g, int first, int part, const int8_t* wh,
                  const int8_t* wl, __m256 step, float* sums) {
    const size_t at_x = p.x->at(g, first);
    __m256i top[T], middle[T];
    for (int t = 0; t < T; ++t) top[t] = middle[t] = _mm256_setzero_si256();
    for (int q = 0; q < 16; ++q) {
        const int at = (part * 16 + q) * 32;
        const __m256i w = _mm256_load_si256(reinterpret_cast<const __m256i*>(wh + at));
        __m256i l = w;
        if constexpr (N >= kWideDepth)
            l = _mm256_load_si256(reinterpret_cast<const __m256i*>(wl + at));
        for (int t = 0; t < T; ++t) {
            const size_t x_at =
                (at_x + static_cast<size_t>(t)) * kGroup + static_cast<size_t>(4 * q);
            const __m256i x = broadcast(p.x->hi + x_at);
            top[t] = dot(top[t], w, x);
            if constexpr (N >= kWideDepth) {
                middle[t] = dot(middle[t], w, broadcast(p.x->lo + x_at));
                middle[t] = dot(middle[t], l, x);
            }
        }
    }
    for (int t = 0; t < T; ++t) {
        const size_t at = at_x + static_cast<size_t>(t);
        const float factor = (p.x->scale[at] * p.block->group_scale[g]) * p.levels->scale[N];
        float* sum = sums + (first + t) * kSupertile + part * 8;
        __m256 value = _mm256_cvtepi32_ps(top[t]);
        if constexpr (N >= kWideDepth)
            value = _mm256_fmadd_ps(_mm256_cvtepi32_ps(middle[t]), _mm256_set1_ps(1.0f / 256.0f),
                                    value);
        _mm256_store_ps(sum, _mm256_fmadd_ps(_mm256_mul_ps(value, step), _mm256_set1_ps(factor),
                                             _mm256_load_ps(sum)));
    }
}

template <int N>
void run_tokens(const CodedProduct& p, const Run& run, int s, int8_t* wh, int8_t* wl, float* sums) {
    const CodedBlock& block = *p.block;
    const size_t tile = static_cast<size_t>(s);
    for (int g = run.first; g < run.first + run.count; ++g) {
        const uint8_t* planes[N];
        for (int i = 0; i < N; ++i) {
            planes[i] = block.planes[static_cast<size_t>(g * kMaxDepth + i)] + tile * 256;
            for (int line = 0; line < 4; ++line)
                _mm_prefetch(reinterpret_cast<const char*>(planes[i] + 256 + 64 * line),
                             _MM_HINT_T0);
        }
        decode<N>(planes, *p.levels, wh, wl);
        const uint8_t* codes = block.codes[static_cast<size_t>(g)] + tile * 16;
        for (int part = 0; part < 4; ++part) {
            alignas(32) float steps[8];
            for (int i = 0; i < 8; ++i) {
                const uint8_t code = codes[(part % 2) * 8 + i];
                steps[i] = p.levels->steps[part < 2 ? code & 15 : code >> 4];
            }
            const __m256 step = _mm256_load_ps(steps);
            int t = 0;
            for (; t + 4 <= p.tokens; t += 4) tokens_block<N, 4>(p, g, t, part, wh, wl, step, sums);
            for (; t < p.tokens; ++t) tokens_block<N, 1>(p, g, t, part, wh, wl, step, sums);
        }
    }
}

template <int N>
void page_depth(const PlyProduct& p, int page) {
    fetch(p.ahead[page]);
    const int8_t* x = p.x + static_cast<size_t>(page) * p.x_stride;
    int32_t* out = p.out + page * p.vectors * kHalf;
    const uint8_t* planes[N];
    for (int i = 0; i < N; ++i) planes[i] = p.plies[page] + i * kUnitPly;
    for (int first = 0; first < kHalf; first += 8) {
        __m256i sums[kMaxQueries], lower[8], upper[8];
        for (int v = 0; v < p.vectors; ++v) sums[v] = _mm256_setzero_si256();
        collect<N>(planes, static_cast<size_t>(4 * first), lower, upper);
        for (int j = 0; j < 8; ++j) {
            __m256i u = N > 4 ? upper[j] : lower[j];
            if constexpr (N == 7) u = _mm256_and_si256(u, bytes(0x0E));
            const __m256i w = look_up<N>(p.levels->hi[N], lower[j], u);
            for (int v = 0; v < p.vectors; ++v)
                sums[v] = dot(sums[v], w, broadcast(x + v * kHalf + 4 * j));
        }
        for (int v = 0; v < p.vectors; ++v)
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + v * kHalf + first), sums[v]);
    }
}

template <int N>
void page_pages(const PlyProduct& p) {
    for (int page = 0; page < p.pages; ++page) page_depth<N>(p, page);
}

}  // namespace

void page_product(const PlyProduct& p) {
    switch (p.depth) {
        case 1:
            return page_pages<1>(p);
        case 2:
            return page_pages<2>(p);
        case 3:
            return page_pages<3>(p);
        case 4:
            return page_pages<4>(p);
        case 5:
            return page_pages<5>(p);
        case 6:
            return page_pages<6>(p);
        case 7:
            return page_pages<7>(p);
        default:
            return page_pages<8>(p);
    }
}

void coded_product(const CodedProduct& p) {
    int8_t* wh = reinterpret_cast<int8_t*>(p.scratch);
    int8_t* wl = wh + kSupertile * kGroup;
    float* sums = reinterpret_cast<float*>(wl + kSupertile * kGroup);
    for (int s = p.first; s < p.last; ++s) {
        for (int i = 0; i < p.tokens * kSupertile; ++i) sums[i] = 0.0f;
        for (const Run& run : p.block->runs) {
            switch (run.depth) {
                case 1:
                    run_tokens<1>(p, run, s, wh, wl, sums);
                    break;
                case 2:
                    run_tokens<2>(p, run, s, wh, wl, sums);
                    break;
                case 3:
                    run_tokens<3>(p, run, s, wh, wl, sums);
                    break;
                case 4:
                    run_tokens<4>(p, run, s, wh, wl, sums);
                    break;
                case 5:
                    run_tokens<5>(p, run, s, wh, wl, sums);
                    break;
                case 6:
                    run_tokens<6>(p, run, s, wh, wl, sums);
                    break;
                case 7:
                    run_tokens<7>(p, run, s, wh, wl, sums);
                    break;
                default:
                    run_tokens<8>(p, run, s, wh, wl, sums);
                    break;
            }
        }
        const float* scale = p.block->row_scale + s * kSupertile;
        for (int t = 0; t < p.tokens; ++t) {
            float* out = p.out + static_cast<size_t>(t) * p.stride + (s - p.first) * kSupertile;
            for (int r = 0; r < kSupertile; ++r) out[r] = sums[t * kSupertile + r] * scale[r];
        }
    }
}

}  // namespace pliant::avx2
