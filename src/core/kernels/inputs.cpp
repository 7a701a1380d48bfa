// Inputs of matrices: gathered in channel order, rotated and coded. Compiled once for each
// instruction set (see simd.h).
#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels.h"
#include "ops.h"
#include "rotate.h"
#include "simd.h"
#include "transpose.h"
#include "vectors.h"

namespace pliant::PLIANT_ISA {

namespace {

constexpr float kTop = 127.0f * kSixteen;  // of the integers
constexpr float kScale = 0.125f / 127.0f;  // 1/8 is the norm of the transform
constexpr float kUncoded[] = {0.0f, NAN};  // scales of what cannot be coded
inline float uncoded(float peak) { return kUncoded[!(peak <= kLeastPeak)]; }

// One token.
void prepare_one(const Preparing& p, int t) {
    const float* x = p.x + static_cast<size_t>(t) * p.stride;
    if (p.norm != nullptr) {
        rms_norm(x, p.norm, p.columns, p.eps, p.scratch);
        x = p.scratch;
    }
    for (int g = 0; g < p.out->groups; ++g) {
        alignas(64) float in[kGroup];
        const int first = g * kGroup, count = std::min(kGroup, p.columns - first);
        for (int c = 0; c < count; ++c) in[c] = x[p.order[first + c]];
        for (int c = count; c < kGroup; ++c) in[c] = 0.0f;

        V v[4];
        for (int i = 0; i < 4; ++i) v[i] = load(in + 16 * i);
        rotate(v);
        const float peak =
            largest_bits(max_bits(max_bits(abs(v[0]), abs(v[1])), max_bits(abs(v[2]), abs(v[3]))));

        const size_t at = p.out->at(g, p.first + t);
        int8_t* hi = p.out->hi + at * kGroup;
        int8_t* lo = p.out->lo + at * kGroup;
        p.out->sum_hi[at] = p.out->sum_lo[at] = 0;
        if (!can_be_coded(peak)) {
            std::memset(hi, 0, kGroup);
            if (p.wide) std::memset(lo, 0, kGroup);
            p.out->scale[at] = uncoded(peak);
            continue;
        }
        const V factor = set1(kTop / peak);
        alignas(64) int32_t q[kGroup];
        for (int i = 0; i < 4; ++i) store_int(q + 16 * i, mul(v[i], factor));
        int32_t sum_hi = 0, sum_lo = 0;
        for (int c = 0; c < kGroup; ++c) {
            const int32_t h = (q[c] + kSixteen / 2) >> 4;
            hi[c] = static_cast<int8_t>(h);
            sum_hi += h;
        }
        if (p.wide) {
            for (int c = 0; c < kGroup; ++c) {
                const int32_t l = q[c] - hi[c] * kSixteen;
                lo[c] = static_cast<int8_t>(l);
                sum_lo += l;
            }
        }
        p.out->scale[at] = peak * kScale;
        p.out->sum_hi[at] = sum_hi;
        p.out->sum_lo[at] = sum_lo;
    }
}

#if defined(PLIANT_AVX512)
// Sixteen tokens, one in each lane: a channel is a vector, so that gathering is loading, and
// nothing is added up or compared across lanes.

constexpr int kWorthwhile = 6;  // tokens from which on this is faster than one by one
static_assert(kTogether == kLanes);

// Quarters of four vectors, transposed.
inline __attribute__((always_inline)) void exchange_quarters(__m512 (&a)[4]) {
    const __m512 even0 = _mm512_shuffle_f32x4(a[0], a[1], 0x88);
    const __m512 odd0 = _mm512_shuffle_f32x4(a[0], a[1], 0xDD);
    const __m512 even1 = _mm512_shuffle_f32x4(a[2], a[3], 0x88);
    const __m512 odd1 = _mm512_shuffle_f32x4(a[2], a[3], 0xDD);
    a[0] = _mm512_shuffle_f32x4(even0, even1, 0x88);
    a[1] = _mm512_shuffle_f32x4(odd0, odd1, 0x88);
    a[2] = _mm512_shuffle_f32x4(even0, even1, 0xDD);
    a[3] = _mm512_shuffle_f32x4(odd0, odd1, 0xDD);
}

// Three levels of the transform: strides 1, 2, 4.
inline __attribute__((always_inline)) void rotate_eight(V (&v)[8]) {
    for (int stride = 1; stride < 8; stride *= 2)
        for (int i = 0; i < 8; ++i)
            if ((i & stride) == 0) {
                const V a = v[i], b = v[i + stride];
                v[i] = add(a, b);
                v[i + stride] = sub(a, b);
            }
}

// Whole numbers of four channels: of each of them a byte, from bit `From` on.
template <int From>
inline __attribute__((always_inline)) __m512i bytes(const __m512i (&q)[4]) {
    const auto to = [&](int i) {  // bit From to byte i
        const int by = 8 * i - From;
        return by < 0    ? _mm512_srli_epi32(q[i], static_cast<unsigned>(-by))
               : by == 0 ? q[i]
                         : _mm512_slli_epi32(q[i], static_cast<unsigned>(by));
    };
    const __m512i even = _mm512_mask_blend_epi8(0x2222222222222222, to(0), to(1));
    const __m512i odd = _mm512_mask_blend_epi8(0x8888888888888888, to(2), to(3));
    return _mm512_mask_blend_epi16(0xAAAAAAAA, even, odd);
}

// Rows of 64 bytes of `count` tokens from their columns, four in a vector; returns their sums.
template <bool Full>
inline __attribute__((always_inline)) __m512i write_bytes(const __m512i (&v)[kLanes], int count,
                                                          int8_t* out) {
    __m512i sum = _mm512_setzero_si512();
    for (const __m512i& part : v) sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), part);
    __m512 a[4][4];  // [vector / 4][vector % 4], then [vector / 4][token % 4]
    for (int i = 0; i < kLanes; ++i) a[i / 4][i % 4] = _mm512_castsi512_ps(v[i]);
    for (auto& four : a) transpose_quarters(four);
    for (int e = 0; e < 4; ++e) {
        __m512 row[4] = {a[0][e], a[1][e], a[2][e], a[3][e]};
        exchange_quarters(row);
        for (int i = 0; i < 4; ++i)
            if (Full || 4 * i + e < count) _mm512_store_ps(out + (4 * i + e) * kGroup, row[i]);
    }
    return sum;
}

template <bool Full>
void prepare_lanes(const Preparing& p, int t, int count) {
    const float* x = p.x + static_cast<size_t>(t) * p.stride;
    const auto same = [](int, V v) { return v; };
    if (p.norm == nullptr) {
        transpose<Full>(x, p.stride, count, p.columns, p.scratch, same);
    } else {
        alignas(64) float factors[kLanes] = {};
        for (int i = 0; i < count; ++i)
            factors[i] = norm_factor(x + static_cast<size_t>(i) * p.stride, p.columns, p.eps);
        const V factor = load(factors);
        transpose<Full>(x, p.stride, count, p.columns, p.scratch,
                        [&](int c, V v) { return mul(mul(v, factor), set1(p.norm[c])); });
    }
    const float* const columns = p.scratch;
    const bool wide = p.wide;
    const __mmask16 tokens = static_cast<__mmask16>((1u << count) - 1);
    alignas(64) static constexpr float kNothing[kLanes] = {};
    for (int g = 0; g < p.out->groups; ++g) {
        alignas(64) float x[kGroup][kLanes];
        const uint16_t* order = p.order + g * kGroup;
        const int there = std::min(kGroup, p.columns - g * kGroup);
        for (int i = 0; i < kGroup; i += 8) {
            V v[8];
            if (i + 8 <= there)
                for (int j = 0; j < 8; ++j) v[j] = load(columns + order[i + j] * kLanes);
            else
                for (int j = 0; j < 8; ++j)
                    v[j] = load(i + j < there ? columns + order[i + j] * kLanes : kNothing);
            rotate_eight(v);
            for (int j = 0; j < 8; ++j) store(x[i + j], v[j]);
        }
        V peak = zero();
        for (int i = 0; i < 8; ++i) {
            V v[8];
            for (int j = 0; j < 8; ++j) v[j] = load(x[i + 8 * j]);
            rotate_eight(v);
            for (int j = 0; j < 8; ++j) {
                peak = max_bits(peak, abs(v[j]));
                store(x[i + 8 * j], v[j]);
            }
        }
        const __m512 least = _mm512_set1_ps(kLeastPeak), most = _mm512_set1_ps(FLT_MAX);
        const __mmask16 coded = _mm512_cmp_ps_mask(peak.v, least, _CMP_GT_OQ) &
                                _mm512_cmp_ps_mask(peak.v, most, _CMP_LE_OQ);
        const __mmask16 tiny = _mm512_cmp_ps_mask(peak.v, least, _CMP_LE_OQ);
        const __m512 factor = _mm512_div_ps(_mm512_set1_ps(kTop), peak.v);
        __m512i hi[kLanes], lo[kLanes];
        for (int i = 0; i < kLanes; ++i) {
            __m512i q[4];
            for (int j = 0; j < 4; ++j)
                q[j] = _mm512_castps_si512(
                    _mm512_add_ps(_mm512_maskz_mul_ps(coded, _mm512_load_ps(x[4 * i + j]), factor),
                                  _mm512_set1_ps(kMagic + kSixteen / 2)));
            hi[i] = bytes<4>(q);
            if (wide)
                lo[i] =
                    _mm512_sub_epi8(_mm512_and_si512(bytes<0>(q), _mm512_set1_epi8(kSixteen - 1)),
                                    _mm512_set1_epi8(kSixteen / 2));
        }
        const size_t at = p.out->at(g, p.first + t);
        const __m512i sum_hi = write_bytes<Full>(hi, count, p.out->hi + at * kGroup);
        const __m512i sum_lo =
            wide ? write_bytes<Full>(lo, count, p.out->lo + at * kGroup) : _mm512_setzero_si512();
        const __m512 scale = _mm512_mask_mul_ps(
            _mm512_mask_blend_ps(tiny, _mm512_set1_ps(uncoded(NAN)), _mm512_setzero_ps()), coded,
            peak.v, _mm512_set1_ps(kScale));
        _mm512_mask_storeu_ps(p.out->scale + at, tokens, scale);
        _mm512_mask_storeu_epi32(p.out->sum_hi + at, tokens, sum_hi);
        _mm512_mask_storeu_epi32(p.out->sum_lo + at, tokens, sum_lo);
    }
}
#else
constexpr int kWorthwhile = kTogether + 1;
template <bool>
void prepare_lanes(const Preparing&, int, int) {}
#endif

void prepare(const Preparing& p) {
    for (int t = 0; t < p.count;) {
        const int count = std::min(p.count - t, kTogether);
        if (count == kTogether && count >= kWorthwhile)
            prepare_lanes<true>(p, t, count);
        else if (count >= kWorthwhile)
            prepare_lanes<false>(p, t, count);
        else
            for (int i = 0; i < count; ++i) prepare_one(p, t + i);
        t += count;
    }
}

}  // namespace

void fill_inputs(Kernels& k) { k.prepare = prepare; }

}  // namespace pliant::PLIANT_ISA
