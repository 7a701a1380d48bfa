// Loops and switches that the compiler takes apart, for kernels. All of it is inlined: what is
// compiled for one instruction set must not be shared with another.
#pragma once

#include <utility>

namespace pliant {

#define PLIANT_INLINE inline __attribute__((always_inline))
#define PLIANT_LAMBDA __attribute__((always_inline))

// Calls f<0>() … f<N - 1>(). With constant indices arrays of vectors become registers; a loop, even
// an unrolled one, leaves them in memory.
template <int N, typename F>
PLIANT_INLINE void repeat(F&& f) {
    [&]<int... I>(std::integer_sequence<int, I...>)
        PLIANT_LAMBDA { (f.template operator()<I>(), ...); }(std::make_integer_sequence<int, N>{});
}

// Calls f<depth>(), or nothing if that is no depth with plies.
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

}  // namespace pliant
