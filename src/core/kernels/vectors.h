// Rows of any length, a vector at a time. Compiled once for each instruction set (see simd.h).
#pragma once

#include <cmath>

#include "simd.h"

namespace pliant::PLIANT_ISA {

template <typename F>
inline void each_vector(int n, F&& f) {  // f(offset, lanes)
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) f(i, kLanes);
    if (i < n) f(i, n - i);
}
inline V load_n(const float* p, int n) { return n == kLanes ? load(p) : load_part(p, n); }
inline void store_n(float* p, V a, int n) { n == kLanes ? store(p, a) : store_part(p, a, n); }

// What a row of n numbers is multiplied with, so that the mean of its squares becomes 1.
inline float norm_factor(const float* x, int n, float eps) {
    V squares = zero();
    each_vector(n, [&](int i, int k) {
        const V v = load_n(x + i, k);
        squares = fma(v, v, squares);
    });
    return 1.0f / std::sqrt(sum(squares) / static_cast<float>(n) + eps);
}

inline void rms_norm(const float* x, const float* weight, int n, float eps, float* out) {
    const V factor = set1(norm_factor(x, n, eps));
    each_vector(n, [&](int i, int k) {
        store_n(out + i, mul(mul(load_n(x + i, k), factor), load_n(weight + i, k)), k);
    });
}

}  // namespace pliant::PLIANT_ISA
