// Products with coded matrices for AVX-512 with VNNI and VBMI.
//
// Bits are brought together with shifts and ternary logic, looked up with byte permutes as unsigned
// level + 128, and multiplied with vpdpbusd; lanes are rows. The 128 is taken out again through the
// sum of the inputs.
#include <immintrin.h>

#include <utility>

#include "ops.h"

namespace pliant::avx512 {

namespace {

#define PLIANT_INLINE inline __attribute__((always_inline))
#define PLIANT_LAMBDA __attribute__((always_inline))

// Calls f<0>() … f<N - 1>(). With constant indices arrays of vectors become registers; a loop, even
// an unrolled one, leaves them in memory.
template <int N, typename F>
PLIANT_INLINE void repeat(F&& f) {
    [&]<int... I>(std::integer_sequence<int, I...>)
        PLIANT_LAMBDA { (f.template operator()<I>(), ...); }(std::make_integer_sequence<int, N>{});
}

// Where the mask has a bit the bit of a, elsewhere that of b.
PLIANT_INLINE __m512i select(__m512i mask, __m512i a, __m512i b) {
    return _mm512_ternarylogic_epi64(mask, a, b, 0xCA);
}
PLIANT_INLINE __m512i bytes(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }
template <int S>
PLIANT_INLINE __m512i left(__m512i a) {  // by S bits inside bytes, garbage in the bits that come in
    if constexpr (S >= 0)
        return _mm512_slli_epi16(a, S);
    else
        return _mm512_srli_epi16(a, -S);
}

// Brings the bits of one to four plies together: the low nibbles of out[j] are from bit j of the
// bytes, the high ones from bit j + 4, ply 1 on top; bits of plies that are not there are garbage.
template <int Count>
PLIANT_INLINE void nibbles(const __m512i* v, __m512i* out) {
    const __m512i odd_bits = bytes(0xAA), pair_bits = bytes(0xCC);
    __m512i even, odd;
    if constexpr (Count == 1) {
        even = left<1>(v[0]);
        odd = v[0];
    } else {
        even = select(odd_bits, left<1>(v[0]), v[1]);
        odd = select(odd_bits, v[0], left<-1>(v[1]));
    }
    if constexpr (Count <= 2) {
        out[0] = left<2>(even);
        out[2] = even;
        out[1] = left<2>(odd);
        out[3] = odd;
    } else {
        __m512i even2, odd2;
        if constexpr (Count == 3) {
            even2 = left<1>(v[2]);
            odd2 = v[2];
        } else {
            even2 = select(odd_bits, left<1>(v[2]), v[3]);
            odd2 = select(odd_bits, v[2], left<-1>(v[3]));
        }
        out[0] = select(pair_bits, left<2>(even), even2);
        out[2] = select(pair_bits, even, left<-2>(even2));
        out[1] = select(pair_bits, left<2>(odd), odd2);
        out[3] = select(pair_bits, odd, left<-2>(odd2));
    }
}

// The collected bits (see LevelTables) of 16 rows × 32 columns: out[j] has columns 4 j … 4 j + 3 of
// each row.
template <int N>
PLIANT_INLINE void collect(const uint8_t* const* planes, size_t offset, __m512i* out) {
    __m512i v[N];
    repeat<N>([&]<int i>() PLIANT_LAMBDA { v[i] = _mm512_load_si512(planes[i] + offset); });
    __m512i n[4];
    nibbles<(N < 4 ? N : 4)>(v, n);
    if constexpr (N <= 4) {
        repeat<4>([&]<int j>() PLIANT_LAMBDA {
            out[j] = n[j];
            out[j + 4] = left<-4>(n[j]);
        });
    } else if constexpr (N <= 6) {
        __m512i even, odd;  // one or two bits for each vector, at bit 0, 2, 4, 6 of the bytes
        if constexpr (N == 5) {
            even = v[4];
            odd = left<-1>(v[4]);
        } else {
            even = select(bytes(0xAA), left<1>(v[4]), v[5]);
            odd = select(bytes(0xAA), v[4], left<-1>(v[5]));
        }
        const __m512i field = bytes(0x30);
        out[0] = select(field, left<4>(even), n[0]);
        out[1] = select(field, left<4>(odd), n[1]);
        out[2] = select(field, left<2>(even), n[2]);
        out[3] = select(field, left<2>(odd), n[3]);
        out[4] = select(field, even, left<-4>(n[0]));
        out[5] = select(field, odd, left<-4>(n[1]));
        out[6] = select(field, left<-2>(even), left<-4>(n[2]));
        out[7] = select(field, left<-2>(odd), left<-4>(n[3]));
    } else {
        __m512i m[4];
        nibbles<N - 4>(v + 4, m);
        const __m512i upper = bytes(0xF0);
        repeat<4>([&]<int j>() PLIANT_LAMBDA {
            out[j] = select(upper, left<4>(m[j]), n[j]);
            out[j + 4] = select(upper, m[j], left<-4>(n[j]));
        });
    }
}

// A table of 64 or 256 unsigned bytes in registers.
template <int N>
struct Table {
    __m512i part[N <= 6 ? 1 : 4];
    explicit Table(const int8_t* levels) {
        for (int i = 0; i < (N <= 6 ? 1 : 4); ++i)
            part[i] = _mm512_xor_si512(_mm512_load_si512(levels + 64 * i), bytes(0x80));
    }
    PLIANT_INLINE __m512i operator()(__m512i index) const {
        if constexpr (N <= 6) {
            return _mm512_permutexvar_epi8(index, part[0]);
        } else {
            const __m512i below = _mm512_permutex2var_epi8(part[0], index, part[1]);
            const __m512i above = _mm512_permutex2var_epi8(part[2], index, part[3]);
            return _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), below, above);
        }
    }
};

PLIANT_INLINE __m512i broadcast(const int8_t* x) {
    int32_t four;
    __builtin_memcpy(&four, x, 4);
    return _mm512_set1_epi32(four);
}

PLIANT_INLINE void row_steps(const uint8_t* codes, size_t supertile, __m512 steps, __m512* out) {
    const __m512i code = _mm512_cvtepu8_epi32(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + supertile * 16)));
    out[0] = _mm512_permutexvar_ps(code, steps);  // reads the low four bits only
    out[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(code, 4), steps);
}

template <int N>
PLIANT_INLINE __m512 to_float(__m512i top, __m512i middle) {
    const __m512 value = _mm512_cvtepi32_ps(top);
    if constexpr (N < kWideDepth) return value;
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(middle), _mm512_set1_ps(1.0f / 256.0f), value);
}

PLIANT_INLINE float factor_of(const CodedProduct& p, int token, int g, int depth) {
    return (p.x->scale[p.x->at(g, token)] * p.block->group_scale[g]) * p.levels->scale[depth];
}

// One token: plies go from memory through registers straight into the sums.
template <int N>
void run_vector(const CodedProduct& p, const Run& run) {
    const CodedBlock& block = *p.block;
    const __m512 steps = _mm512_load_ps(p.levels->steps);
    const Table<N> hi(p.levels->hi[N]), lo(p.levels->lo[N]);
    for (int s = p.first; s < p.last; ++s) {
        const size_t tile = static_cast<size_t>(s), at = tile * 256;
        float* out = p.out + (s - p.first) * kSupertile;
        __m512 sum[2] = {_mm512_loadu_ps(out), _mm512_loadu_ps(out + 16)};
        for (int g = run.first; g < run.first + run.count; ++g) {
            const uint8_t* planes[N];
            repeat<N>([&]<int i>() PLIANT_LAMBDA {
                planes[i] = block.planes[static_cast<size_t>(g * kMaxDepth + i)] + at;
                for (int line = 0; line < 4; ++line)  // the next supertile
                    _mm_prefetch(reinterpret_cast<const char*>(planes[i] + 256 + 64 * line),
                                 _MM_HINT_T0);
            });
            const size_t at_x = p.x->at(g, 0);
            const int8_t* xh = p.x->hi + at_x * kGroup;
            const int8_t* xl = p.x->lo + at_x * kGroup;
            const int32_t bias_top = -128 * p.x->sum_hi[at_x];
            const int32_t bias_middle = -128 * (p.x->sum_lo[at_x] + p.x->sum_hi[at_x]);
            __m512 step[2];
            row_steps(block.codes[static_cast<size_t>(g)], tile, steps, step);
            const __m512 factor = _mm512_set1_ps(factor_of(p, 0, g, N));
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
                const __m512 value = to_float<N>(_mm512_add_epi32(top[0], top[1]),
                                                 _mm512_add_epi32(middle[0], middle[1]));
                sum[half] = _mm512_fmadd_ps(_mm512_mul_ps(value, step[half]), factor, sum[half]);
            });
        }
        _mm512_storeu_ps(out, sum[0]);
        _mm512_storeu_ps(out + 16, sum[1]);
    }
}

// Many tokens: a group of a supertile is decoded once into `wh` (and `wl`), [16 quads][2 tiles][64]
// bytes.
template <int N>
PLIANT_INLINE void decode(const uint8_t* const* planes, const Table<N>& hi, const Table<N>& lo,
                          uint8_t* wh, uint8_t* wl) {
    for (int half = 0; half < 2; ++half)
        for (int h = 0; h < 2; ++h) {
            __m512i index[8];
            collect<N>(planes, static_cast<size_t>(128 * half + 64 * h), index);
            repeat<8>([&]<int j>() PLIANT_LAMBDA {
                const int at = ((8 * h + j) * 2 + half) * 64;
                _mm512_store_si512(wh + at, hi(index[j]));
                if constexpr (N >= kWideDepth) _mm512_store_si512(wl + at, lo(index[j]));
            });
        }
}

// Adds the products of T tokens from `first` on with the decoded group to sums[token][32].
template <int N, int T>
void tokens_block(const CodedProduct& p, int g, int first, const uint8_t* wh, const uint8_t* wl,
                  const __m512* step, float* sums) {
    const size_t begin = p.x->at(g, first);
    const int8_t* xh = p.x->hi + begin * kGroup;
    const int8_t* xl = p.x->lo + begin * kGroup;
    __m512i top[T][2], middle[T][2];
    repeat<T>([&]<int t>() PLIANT_LAMBDA {
        const size_t at = begin + static_cast<size_t>(t);
        top[t][0] = top[t][1] = _mm512_set1_epi32(-128 * p.x->sum_hi[at]);
        if constexpr (N >= kWideDepth)
            middle[t][0] = middle[t][1] =
                _mm512_set1_epi32(-128 * (p.x->sum_lo[at] + p.x->sum_hi[at]));
    });
    for (int q = 0; q < 16; ++q) {
        const __m512i w0 = _mm512_load_si512(wh + q * 128);
        const __m512i w1 = _mm512_load_si512(wh + q * 128 + 64);
        __m512i l0, l1;
        if constexpr (N >= kWideDepth) {
            l0 = _mm512_load_si512(wl + q * 128);
            l1 = _mm512_load_si512(wl + q * 128 + 64);
        }
        repeat<T>([&]<int t>() PLIANT_LAMBDA {
            const __m512i x = broadcast(xh + t * kGroup + 4 * q);
            top[t][0] = _mm512_dpbusd_epi32(top[t][0], w0, x);
            top[t][1] = _mm512_dpbusd_epi32(top[t][1], w1, x);
            if constexpr (N >= kWideDepth) {
                const __m512i y = broadcast(xl + t * kGroup + 4 * q);
                middle[t][0] = _mm512_dpbusd_epi32(middle[t][0], w0, y);
                middle[t][1] = _mm512_dpbusd_epi32(middle[t][1], w1, y);
                middle[t][0] = _mm512_dpbusd_epi32(middle[t][0], l0, x);
                middle[t][1] = _mm512_dpbusd_epi32(middle[t][1], l1, x);
            }
        });
    }
    repeat<T>([&]<int t>() PLIANT_LAMBDA {
        const __m512 factor = _mm512_set1_ps(factor_of(p, first + t, g, N));
        float* sum = sums + (first + t) * kSupertile;
        repeat<2>([&]<int half>() PLIANT_LAMBDA {
            const __m512 value = to_float<N>(top[t][half], middle[t][half]);
            const __m512 before = _mm512_load_ps(sum + 16 * half);
            _mm512_store_ps(sum + 16 * half,
                            _mm512_fmadd_ps(_mm512_mul_ps(value, step[half]), factor, before));
        });
    });
}

template <int N>
void run_tokens(const CodedProduct& p, const Run& run, int s, uint8_t* wh, uint8_t* wl,
                float* sums) {
    const CodedBlock& block = *p.block;
    const __m512 steps = _mm512_load_ps(p.levels->steps);
    const Table<N> hi(p.levels->hi[N]), lo(p.levels->lo[N]);
    const size_t tile = static_cast<size_t>(s);
    for (int g = run.first; g < run.first + run.count; ++g) {
        const uint8_t* planes[N];
        for (int i = 0; i < N; ++i)
            planes[i] = block.planes[static_cast<size_t>(g * kMaxDepth + i)] + tile * 256;
        decode<N>(planes, hi, lo, wh, wl);
        __m512 step[2];
        row_steps(block.codes[static_cast<size_t>(g)], tile, steps, step);
        constexpr int kBlock = N >= kWideDepth ? 6 : 12;  // as many sums as there are registers
        int t = 0;
        for (; t + kBlock <= p.tokens; t += kBlock)
            tokens_block<N, kBlock>(p, g, t, wh, wl, step, sums);
        if constexpr (kBlock > 6)
            if (t + 6 <= p.tokens) {
                tokens_block<N, 6>(p, g, t, wh, wl, step, sums);
                t += 6;
            }
        switch (p.tokens - t) {
            case 1:
                tokens_block<N, 1>(p, g, t, wh, wl, step, sums);
                break;
            case 2:
                tokens_block<N, 2>(p, g, t, wh, wl, step, sums);
                break;
            case 3:
                tokens_block<N, 3>(p, g, t, wh, wl, step, sums);
                break;
            case 4:
                tokens_block<N, 4>(p, g, t, wh, wl, step, sums);
                break;
            case 5:
                tokens_block<N, 5>(p, g, t, wh, wl, step, sums);
                break;
            default:
                break;
        }
    }
}

template <typename F>
PLIANT_INLINE void with_depth(int depth, F&& f) {
    switch (depth) {
        case 1:
            return f.template operator()<1>();
        case 2:
            return f.template operator()<2>();
        case 3:
            return f.template operator()<3>();
        case 4:
            return f.template operator()<4>();
        case 5:
            return f.template operator()<5>();
        case 6:
            return f.template operator()<6>();
        case 7:
            return f.template operator()<7>();
        case 8:
            return f.template operator()<8>();
        default:
            return;
    }
}

}  // namespace

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
    uint8_t* wh = p.scratch;
    uint8_t* wl = wh + kSupertile * kGroup;
    float* sums = reinterpret_cast<float*>(wl + kSupertile * kGroup);
    for (int s = p.first; s < p.last; ++s) {
        for (int i = 0; i < p.tokens * kSupertile; i += 16)
            _mm512_store_ps(sums + i, _mm512_setzero_ps());
        for (const Run& run : block.runs)
            with_depth(run.depth, [&]<int N>() { run_tokens<N>(p, run, s, wh, wl, sums); });
        const float* scale = block.row_scale + s * kSupertile;
        const __m512 scale0 = _mm512_loadu_ps(scale), scale1 = _mm512_loadu_ps(scale + 16);
        for (int t = 0; t < p.tokens; ++t) {
            float* out = p.out + static_cast<size_t>(t) * p.stride + (s - p.first) * kSupertile;
            const float* sum = sums + t * kSupertile;
            _mm512_storeu_ps(out, _mm512_mul_ps(_mm512_load_ps(sum), scale0));
            _mm512_storeu_ps(out + 16, _mm512_mul_ps(_mm512_load_ps(sum + 16), scale1));
        }
    }
}

}  // namespace pliant::avx512
