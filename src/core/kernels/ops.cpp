// Everything but the product with coded matrices. Compiled once for each instruction set (see
// simd.h).
#include "ops.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels.h"
#include "rotate.h"
#include "simd.h"

namespace pliant::PLIANT_ISA {

namespace {

template <typename F>
inline void each_vector(int n, F&& f) {  // f(offset, lanes)
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) f(i, kLanes);
    if (i < n) f(i, n - i);
}
inline V load_n(const float* p, int n) { return n == kLanes ? load(p) : load_part(p, n); }
inline void store_n(float* p, V a, int n) { n == kLanes ? store(p, a) : store_part(p, a, n); }

void prepare(const float* x, const uint16_t* order, int columns, bool wide, Prepared* out,
             int token) {
    for (int g = 0; g < out->groups; ++g) {
        alignas(64) float in[kGroup];
        const int first = g * kGroup, count = std::min(kGroup, columns - first);
        for (int c = 0; c < count; ++c) in[c] = x[order[first + c]];
        for (int c = count; c < kGroup; ++c) in[c] = 0.0f;

        V v[4];
        for (int i = 0; i < 4; ++i) v[i] = load(in + 16 * i);
        rotate(v);
        const float peak = largest(max(max(abs(v[0]), abs(v[1])), max(abs(v[2]), abs(v[3]))));

        const size_t at = out->at(g, token);
        int8_t* hi = out->hi + at * kGroup;
        int8_t* lo = out->lo + at * kGroup;
        out->sum_hi[at] = out->sum_lo[at] = 0;
        if (!can_be_coded(peak)) {
            std::memset(hi, 0, kGroup);
            if (wide) std::memset(lo, 0, kGroup);
            out->scale[at] = peak <= kLeastPeak ? 0.0f : NAN;
            continue;
        }
        const V factor = set1(32512.0f / peak);  // 32512 = 127 · 256
        alignas(64) int32_t q[kGroup];
        for (int i = 0; i < 4; ++i) store_int(q + 16 * i, mul(v[i], factor));
        int32_t sum_hi = 0, sum_lo = 0;
        for (int c = 0; c < kGroup; ++c) {
            const int32_t h = (q[c] + 128) >> 8;
            hi[c] = static_cast<int8_t>(h);
            sum_hi += h;
        }
        if (wide) {
            for (int c = 0; c < kGroup; ++c) {
                const int32_t l = q[c] - ((q[c] + 128) >> 8) * 256;
                lo[c] = static_cast<int8_t>(l);
                sum_lo += l;
            }
        }
        out->scale[at] = peak * (0.125f / 127.0f);  // 1/8 is the norm of the transform
        out->sum_hi[at] = sum_hi;
        out->sum_lo[at] = sum_lo;
    }
}

template <bool BF16>
inline V load_weight(const void* weight, size_t at, int n) {
    if constexpr (BF16) {
        const uint16_t* p = static_cast<const uint16_t*>(weight) + at;
        if (n == kLanes) return load_bf16(p);
        uint16_t part[kLanes] = {};
        std::copy(p, p + n, part);
        return load_bf16(part);
    } else {
        return load_n(static_cast<const float*>(weight) + at, n);
    }
}

template <bool BF16>
void plain_rows(const PlainProduct& p) {
    for (int r = p.first; r < p.last; ++r)
        for (int t = 0; t < p.tokens; ++t) {
            const float* x = p.x + static_cast<size_t>(t) * p.x_stride;
            const size_t row = static_cast<size_t>(r) * static_cast<size_t>(p.columns);
            V total = zero();
            each_vector(p.columns, [&](int i, int n) {
                total = fma(load_weight<BF16>(p.weight, row + static_cast<size_t>(i), n),
                            load_n(x + i, n), total);
            });
            p.out[static_cast<size_t>(t) * p.stride + static_cast<size_t>(r - p.first)] =
                sum(total);
        }
}

void plain_product(const PlainProduct& p) { p.bf16 ? plain_rows<true>(p) : plain_rows<false>(p); }

void rms_norm(const float* x, const float* weight, int n, float eps, float* out) {
    V squares = zero();
    each_vector(n, [&](int i, int k) {
        const V v = load_n(x + i, k);
        squares = fma(v, v, squares);
    });
    const float mean = sum(squares) / static_cast<float>(n);
    const V factor = set1(1.0f / std::sqrt(mean + eps));
    each_vector(n, [&](int i, int k) {
        store_n(out + i, mul(mul(load_n(x + i, k), factor), load_n(weight + i, k)), k);
    });
}

void rope(float* x, const float* cosine, const float* sine, int n) {
    const int half = n / 2;
    each_vector(half, [&](int i, int k) {
        const V a = load_n(x + i, k), b = load_n(x + half + i, k);
        const V c = load_n(cosine + i, k), s = load_n(sine + i, k);
        store_n(x + i, sub(mul(a, c), mul(b, s)), k);
        store_n(x + half + i, add(mul(b, c), mul(a, s)), k);
    });
}

void gate(const float* g, const float* up, int n, Activation activation, float* out) {
    each_vector(n, [&](int i, int k) {
        const V x = load_n(g + i, k);
        V y;
        switch (activation) {
            case Activation::kSilu:
                y = div(x, add(set1(1.0f), exp(sub(zero(), x))));
                break;
            case Activation::kGeluTanh: {
                const V cubed = mul(mul(x, x), x);
                const V inner = mul(set1(0.7978845608f), fma(set1(0.044715f), cubed, x));
                y = mul(mul(set1(0.5f), x), add(set1(1.0f), tanh(inner)));
                break;
            }
            default: {
                float f[kLanes];
                store(f, x);
                for (float& v : f) v = 0.5f * v * (1.0f + std::erf(v * 0.70710678f));
                y = load(f);
            }
        }
        store_n(out + i, mul(y, load_n(up + i, k)), k);
    });
}

void softcap(float* x, int n, float cap) {
    const V c = set1(cap);
    each_vector(n,
                [&](int i, int k) { store_n(x + i, mul(c, tanh(div(load_n(x + i, k), c))), k); });
}

void to_half(const float* x, int n, uint16_t* out) {
    const V top = set1(65504.0f), bottom = set1(-65504.0f);
    each_vector(n, [&](int i, int k) {
        uint16_t part[kLanes];
        store_half(part, min(max(load_n(x + i, k), bottom), top));
        std::copy(part, part + k, out + i);
    });
}

}  // namespace

void fill_ops(Kernels& k) {
    k.prepare = prepare;
    k.plain_product = plain_product;
    k.rms_norm = rms_norm;
    k.rope = rope;
    k.gate = gate;
    k.softcap = softcap;
    k.to_half = to_half;
    fill_attention(k);
    fill_coding(k);
}

}  // namespace pliant::PLIANT_ISA
