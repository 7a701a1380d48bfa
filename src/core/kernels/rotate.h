// The 64-point Walsh-Hadamard transform without its norm of 1/8, in natural order: docs/format.md,
// section 4.
#pragma once

#include "simd.h"

namespace pliant::PLIANT_ISA {

// H = H4 ⊗ H16: strides 1, 2, 4, 8 inside a vector, then 16 and 32 between them.
inline __attribute__((always_inline)) void rotate(V (&v)[4]) {
    for (V& part : v) part = butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(part))));
    const V s01 = add(v[0], v[1]), d01 = sub(v[0], v[1]);
    const V s23 = add(v[2], v[3]), d23 = sub(v[2], v[3]);
    v[0] = add(s01, s23);
    v[1] = add(d01, d23);
    v[2] = sub(s01, s23);
    v[3] = sub(d01, d23);
}

// Each half by itself, with the 32-point transform without its norm of 1/√32.
inline __attribute__((always_inline)) void rotate_halves(V (&v)[4]) {
    for (V& part : v) part = butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(part))));
    for (int i = 0; i < 4; i += 2) {
        const V first = v[i];
        v[i] = add(first, v[i + 1]);
        v[i + 1] = sub(first, v[i + 1]);
    }
}
inline constexpr float kHalfNorm = 0.17677669529663687f;  // 1/√32

}  // namespace pliant::PLIANT_ISA
