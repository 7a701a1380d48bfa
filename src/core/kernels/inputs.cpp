// Inputs of matrices: gathered in channel order, rotated and coded. Compiled once for each
// instruction set (see simd.h).
#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "lanes.h"
#include "ops.h"
#include "rotate.h"
#include "simd.h"
#include "vectors.h"

namespace pliant::PLIANT_ISA {

namespace {

// Of a group: 1/8 is the norm of the transform.
inline float scale_of(float peak) {
    if (can_be_coded(peak)) return peak * (0.125f / 127.0f);
    return peak <= kLeastPeak ? 0.0f : NAN;
}

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
        const bool coded = can_be_coded(peak);
        alignas(64) int32_t q[kGroup];
        const V factor = set1(kTop / peak);
        for (int i = 0; i < 4; ++i) store_int(q + 16 * i, coded ? mul(v[i], factor) : zero());
        p.out->scale[at] = scale_of(peak);
        if (p.narrow) {
            int8_t* narrow = p.out->narrow + at * kGroup;
            int32_t sum = 0;
            for (int c = 0; c < kGroup; ++c) {
                const int32_t n = (q[c] + kNarrowStep / 2) >> kNarrowShift;
                narrow[c] = static_cast<int8_t>(n);
                sum += n;
            }
            p.out->sum_narrow[at] = sum;
        }
        if (p.wide) {
            int8_t *hi = p.out->hi + at * kGroup, *lo = p.out->lo + at * kGroup;
            int32_t sum_hi = 0, sum_lo = 0;
            for (int c = 0; c < kGroup; ++c) {
                const int32_t h = (q[c] + kSixteen / 2) >> kSixteenShift, l = q[c] - h * kSixteen;
                hi[c] = static_cast<int8_t>(h);
                lo[c] = static_cast<int8_t>(l);
                sum_hi += h;
                sum_lo += l;
            }
            p.out->sum_hi[at] = sum_hi;
            p.out->sum_lo[at] = sum_lo;
        }
    }
}

#if defined(PLIANT_AVX512) || defined(PLIANT_AVX2)
// Three levels of the transform: strides 1, 2, 4.
PLIANT_INLINE void rotate_eight(Lanes (&v)[8]) {
    for (int stride = 1; stride < 8; stride *= 2)
        for (int i = 0; i < 8; ++i)
            if ((i & stride) == 0) {
                const Lanes a = v[i], b = v[i + stride];
                v[i] = add(a, b);
                v[i + stride] = sub(a, b);
            }
}

template <bool Full>
void prepare_lanes(const Preparing& p, int t, int count) {
    const float* x = p.x + static_cast<size_t>(t) * p.stride;
    const auto same = [](int, Lanes v) { return v; };
    if (p.norm == nullptr) {
        transpose<Full>(x, p.stride, count, p.columns, p.scratch, same);
    } else {
        alignas(64) float factors[kTokens] = {};
        for (int i = 0; i < count; ++i)
            factors[i] = norm_factor(x + static_cast<size_t>(i) * p.stride, p.columns, p.eps);
        const Lanes factor = load_lanes(factors);
        transpose<Full>(x, p.stride, count, p.columns, p.scratch,
                        [&](int c, Lanes v) { return mul(mul(v, factor), all_lanes(p.norm[c])); });
    }
    const float* const columns = p.scratch;
    alignas(64) static constexpr float kNothing[kTokens] = {};
    for (int g = 0; g < p.out->groups; ++g) {
        alignas(64) float x[kGroup][kTokens];
        const uint16_t* order = p.order + g * kGroup;
        const int there = std::min(kGroup, p.columns - g * kGroup);
        for (int i = 0; i < kGroup; i += 8) {
            Lanes v[8];
            if (i + 8 <= there)
                for (int j = 0; j < 8; ++j) v[j] = load_lanes(columns + order[i + j] * kTokens);
            else
                for (int j = 0; j < 8; ++j)
                    v[j] = load_lanes(i + j < there ? columns + order[i + j] * kTokens : kNothing);
            rotate_eight(v);
            for (int j = 0; j < 8; ++j) store(x[i + j], v[j]);
        }
        Lanes peak = load_lanes(kNothing);
        for (int i = 0; i < 8; ++i) {
            Lanes v[8];
            for (int j = 0; j < 8; ++j) v[j] = load_lanes(x[i + 8 * j]);
            rotate_eight(v);
            for (int j = 0; j < 8; ++j) {
                peak = max_bits(peak, abs(v[j]));
                store(x[i + 8 * j], v[j]);
            }
        }
        const LaneCoder coder(peak);
        const size_t at = p.out->at(g, p.first + t);
        if (p.narrow) {
            LaneBytes narrow[kGroup / 4];
            for (int i = 0; i < kGroup / 4; ++i) narrow[i] = coder.narrow(x + 4 * i);
            write_bytes<Full>(narrow, count, p.out->narrow + at * kGroup, p.out->sum_narrow + at);
        }
        if (p.wide) {
            LaneBytes hi[kGroup / 4], lo[kGroup / 4];
            for (int i = 0; i < kGroup / 4; ++i) coder.wide(x + 4 * i, hi[i], lo[i]);
            write_bytes<Full>(hi, count, p.out->hi + at * kGroup, p.out->sum_hi + at);
            write_bytes<Full>(lo, count, p.out->lo + at * kGroup, p.out->sum_lo + at);
        }
        alignas(64) float peaks[kTokens];
        store(peaks, peak);
        for (int i = 0; i < count; ++i) p.out->scale[at + i] = scale_of(peaks[i]);
    }
}
#else
constexpr int kTokens = 1, kWorthwhile = 2;
template <bool>
void prepare_lanes(const Preparing&, int, int) {}
#endif
static_assert(kTokens <= kTogether);

void prepare(const Preparing& p) {
    for (int t = 0; t < p.count;) {
        const int count = std::min(p.count - t, kTokens);
        if (count == kTokens && count >= kWorthwhile)
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
