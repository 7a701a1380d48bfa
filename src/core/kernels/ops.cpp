// Everything but the product with coded matrices. Compiled once for each instruction set (see
// simd.h).
#include "ops.h"

#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "lanes.h"
#include "simd.h"
#include "vectors.h"

namespace pliant::PLIANT_ISA {

namespace {

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

void add_up(const float* x, const float* y, int n, float* out) {
    each_vector(
        n, [&](int i, int k) { store_n(out + i, add(load_n(x + i, k), load_n(y + i, k)), k); });
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

V finite(V x) { return min(max(x, set1(-65504.0f)), set1(65504.0f)); }

void to_values(const float* x, size_t stride, int count, int n, uint16_t* out, size_t out_stride) {
    for (int t = 0; t < count; ++t, x += stride, out += out_stride)
        each_vector(n, [&](int i, int k) {
            uint16_t part[kLanes];
            store_half(part, finite(load_n(x + i, k)));
            std::copy(part, part + k, out + i);
        });
}

void to_keys(const float* x, size_t stride, int count, int n, uint16_t* page, int slot) {
#if defined(PLIANT_AVX512)
    constexpr int kChannels = 64;  // at once
    alignas(64) float columns[kChannels][kLanes];
    for (; count >= kLanes; count -= kLanes, slot += kLanes, x += kLanes * stride)
        for (int c = 0; c < n; c += kChannels) {
            const int channels = std::min(kChannels, n - c);
            transpose<true>(x + c, stride, kLanes, channels, columns[0],
                            [](int, V v) { return finite(v); });
            for (int i = 0; i < channels; ++i)
                store_half(page + (c + i) * kPageTokens + slot, load(columns[i]));
        }
#endif
    alignas(64) uint16_t halves[kMaxHeadDim];
    for (int t = 0; t < count; ++t) {
        to_values(x + static_cast<size_t>(t) * stride, 0, 1, n, halves, 0);
        for (int i = 0; i < n; ++i) page[i * kPageTokens + slot + t] = halves[i];
    }
}

}  // namespace

void fill_ops(Kernels& k) {
    k.plain_product = plain_product;
    k.add = add_up;
    k.rms_norm = rms_norm;
    k.rope = rope;
    k.gate = gate;
    k.softcap = softcap;
    k.to_values = to_values;
    k.to_keys = to_keys;
    fill_inputs(k);
    fill_attention(k);
    fill_coding(k);
    fill_logits(k);
}

}  // namespace pliant::PLIANT_ISA
