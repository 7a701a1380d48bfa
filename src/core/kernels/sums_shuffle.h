// Sums of products with levels that were looked up with shuffles, of some tokens at once, in terms
// of a way to multiply bytes (dots.h).
#pragma once

#include <type_traits>

#include "dots.h"
#include "ops.h"

namespace pliant::PLIANT_BYTES {

// sums[rows of a part] += value · step · factor.
PLIANT_INLINE void add_scaled(F value, F step, F factor, float* sums) {
    store_floats(sums, fma(multiply(value, step), factor, load_floats(sums)));
}

// The sums of T tokens and two parts, of two neighbouring quads of columns at once where Dot takes
// pairs. Members of nested structs become registers; elements of arrays that live through a loop
// stay in memory.
template <typename Dot, int T>
struct Sums {
    B sum0, sum1;
    Sums<Dot, T - 1> rest;

    PLIANT_INLINE void start(const int32_t* from) {
        sum0 = sum1 = integers(*from);
        rest.start(from + 1);
    }
    PLIANT_INLINE void add(const int8_t* at, const B* w) {
        const B x = broadcast(at);
        if constexpr (Dot::kPairs) {
            const B y = broadcast(at + 4);
            Dot::add(sum0, w[0], w[2], x, y);
            Dot::add(sum1, w[1], w[3], x, y);
        } else {
            Dot::add(sum0, w[0], x);
            Dot::add(sum1, w[1], x);
        }
        rest.add(at + kGroup, w);
    }
    PLIANT_INLINE void finish(const float* factors, const F* step, float* sums) const {
        const F factor = all(*factors);
        add_scaled(to_float(sum0), step[0], factor, sums);
        add_scaled(to_float(sum1), step[1], factor, sums + kPart);
        rest.finish(factors + 1, step, sums + kSupertile);
    }
};
template <typename Dot>
struct Sums<Dot, 0> {
    PLIANT_INLINE void start(const int32_t*) {}
    PLIANT_INLINE void add(const int8_t*, const B*) {}
    PLIANT_INLINE void finish(const float*, const F*, float*) const {}
};

// The same with wide levels and inputs.
template <typename Dot, int T>
struct WideSums {
    B top0, top1, middle0, middle1;
    WideSums<Dot, T - 1> rest;

    PLIANT_INLINE void start(const int32_t* sum_hi, const int32_t* sum_lo) {
        top0 = top1 = integers(Dot::start(*sum_hi));
        middle0 = middle1 = integers(Dot::start(*sum_lo + *sum_hi));
        rest.start(sum_hi + 1, sum_lo + 1);
    }
    PLIANT_INLINE void add(const int8_t* xh, const int8_t* xl, const B* w, const B* l) {
        const B x = broadcast(xh), y = broadcast(xl);
        Dot::add(top0, w[0], x);
        Dot::add(top1, w[1], x);
        Dot::add(middle0, w[0], y);
        Dot::add(middle1, w[1], y);
        Dot::add(middle0, l[0], x);
        Dot::add(middle1, l[1], x);
        rest.add(xh + kGroup, xl + kGroup, w, l);
    }
    PLIANT_INLINE void finish(const float* factors, const F* step, float* sums) const {
        const F factor = all(*factors);
        add_scaled(both_parts(top0, middle0), step[0], factor, sums);
        add_scaled(both_parts(top1, middle1), step[1], factor, sums + kPart);
        rest.finish(factors + 1, step, sums + kSupertile);
    }
};
template <typename Dot>
struct WideSums<Dot, 0> {
    PLIANT_INLINE void start(const int32_t*, const int32_t*) {}
    PLIANT_INLINE void add(const int8_t*, const int8_t*, const B*, const B*) {}
    PLIANT_INLINE void finish(const float*, const F*, float*) const {}
};

constexpr int kQuads = kGroup / 4;

// The sums of T tokens and a part, for inputs that were spread: [token][kQuads].
template <typename Dot, int T>
struct SpreadSums {
    B sum;
    SpreadSums<Dot, T - 1> rest;

    PLIANT_INLINE void start(const int32_t* from) {
        sum = integers(*from);
        rest.start(from + 1);
    }
    PLIANT_INLINE void add(B w0, B w1, const B* x) {
        if constexpr (Dot::kPairs) {
            Dot::add(sum, w0, w1, x[0], x[1]);
        } else {
            Dot::add(sum, w0, x[0]);
            Dot::add(sum, w1, x[1]);
        }
        rest.add(w0, w1, x + kQuads);
    }
    PLIANT_INLINE void finish(const float* factors, F step, float* sums) const {
        add_scaled(to_float(sum), step, all(*factors), sums);
        rest.finish(factors + 1, step, sums + kSupertile);
    }
};
template <typename Dot>
struct SpreadSums<Dot, 0> {
    PLIANT_INLINE void start(const int32_t*) {}
    PLIANT_INLINE void add(B, B, const B*) {}
    PLIANT_INLINE void finish(const float*, F, float*) const {}
};

// The sums of T tokens with deep levels of a part. The sign of a level moves to the input.
template <typename Dot, int T>
struct DeepSums {
    typename Dot::DeepSum sum;
    DeepSums<Dot, T - 1> rest;

    PLIANT_INLINE void add(const Deep& w, const int8_t* xh, const int8_t* xl) {
        sum.add(w, negated(broadcast(xh), w.sign), negated(broadcast(xl), w.sign));
        rest.add(w, xh + kGroup, xl + kGroup);
    }
    PLIANT_INLINE void finish(const float* factors, F step, float* sums) const {
        add_scaled(sum.value(), step, all(*factors), sums);
        rest.finish(factors + 1, step, sums + kSupertile);
    }
};
template <typename Dot>
struct DeepSums<Dot, 0> {
    PLIANT_INLINE void add(const Deep&, const int8_t*, const int8_t*) {}
    PLIANT_INLINE void finish(const float*, F, float*) const {}
};

template <int N>
using Levels = std::conditional_t<(N >= kWideDepth), DeepTable<N>, Table<N>>;
template <int N>
PLIANT_INLINE Levels<N> levels_of(const CodedProduct& p, int flip) {
    if constexpr (N >= kWideDepth)
        return DeepTable<N>(p.levels->deep[N]);
    else
        return Table<N>(p.levels->hi[N], flip);
}

PLIANT_INLINE void factors_of(const CodedProduct& p, int g, int depth, int first, int tokens,
                              float* out) {
    const float* scale = p.x->scale + p.x->at(g, first);
    const float group = p.block->group_scale[g], level = p.levels->unit[depth];
    for (int t = 0; t < tokens; ++t) out[t] = (scale[t] * group) * level;
}

}  // namespace pliant::PLIANT_BYTES
