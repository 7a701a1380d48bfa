// Products with pages of the KV cache in plies, with levels looked up with shuffles.
#pragma once

#include <algorithm>
#include <array>
#include <type_traits>

#include "ops.h"
#include "sums_shuffle.h"

namespace pliant::PLIANT_BYTES {

// Inputs of pages have 8 bits.
template <typename Dot, int N>
using ForPage = std::conditional_t<(N <= kSmallDepth), typename Dot::Small, Dot>;

// Sums of Q vectors with two parts of a unit of a page.
template <typename Dot, bool Positive, int N, int Q>
struct PageSums {
    B sum0, sum1;
    PageSums<Dot, Positive, N, Q - 1> rest;

    PLIANT_INLINE void start(const int32_t* sums) {
        if constexpr (Positive)
            sum0 = sum1 = bytes(0);
        else
            sum0 = sum1 = integers(ForPage<Dot, N>::start(*sums));
        rest.start(sums + 1);
    }
    PLIANT_INLINE void add(B w0, B w1, const int8_t* at) {
        const B x = broadcast(at);
        if constexpr (Positive) {
            Dot::add_positive(sum0, w0, x);
            Dot::add_positive(sum1, w1, x);
        } else {
            ForPage<Dot, N>::add(sum0, w0, x);
            ForPage<Dot, N>::add(sum1, w1, x);
        }
        rest.add(w0, w1, at + kHalf);
    }
    PLIANT_INLINE void write(int32_t* out) const {
        store(out, sum0);
        store(out + kPart, sum1);
        rest.write(out + kHalf);
    }
};
template <typename Dot, bool Positive, int N>
struct PageSums<Dot, Positive, N, 0> {
    PLIANT_INLINE void start(const int32_t*) {}
    PLIANT_INLINE void add(B, B, const int8_t*) {}
    PLIANT_INLINE void write(int32_t*) const {}
};

constexpr int kPageVectors = 4;  // at once; their sums fit into 16 registers

// Q vectors from `first` on, with all pages.
template <typename Dot, bool Positive, int N, int Q>
void page_vectors(const PlyProduct& p, int first) {
    const Table<N> table(p.levels->rounded[N], Positive ? 0 : ForPage<Dot, N>::kFlip);
    const int8_t* x = p.x + first * kHalf;
    int32_t* out = p.out + first * kHalf;
    for (int page = 0; page < p.pages; ++page, x += p.x_stride, out += p.vectors * kHalf) {
        if (first == 0) fetch(p.ahead[page]);
        const uint8_t* planes[N];
        for (int i = 0; i < N; ++i) planes[i] = p.plies[page] + i * kUnitPly;
        for (int row = 0; row < kHalf; row += 2 * kPart) {
            PageSums<Dot, Positive, N, Q> sums;
            sums.start(Positive ? nullptr : p.sum + first);
            const size_t at = static_cast<size_t>(4 * row);
            const Bits<N> bits0(planes, at), bits1(planes, at + 4 * kPart);
            repeat<8>([&]<int j>() PLIANT_LAMBDA {
                sums.add(table.template look_up<j>(bits0), table.template look_up<j>(bits1),
                         x + 4 * j);
            });
            sums.write(out + row);
        }
    }
}

template <typename Dot>
void multiply_pages(const PlyProduct& p) {
    using Some = void (*)(const PlyProduct&, int);
    with_depth(p.depth, [&]<int N>() {
        static constexpr auto kSome = []<int... Q>(std::integer_sequence<int, Q...>) {
            return std::array<std::array<Some, kPageVectors>, 2>{
                std::array<Some, kPageVectors>{page_vectors<Dot, false, N, Q + 1>...},
                std::array<Some, kPageVectors>{page_vectors<Dot, true, N, Q + 1>...}};
        }(std::make_integer_sequence<int, kPageVectors>{});
        for (int first = 0; first < p.vectors; first += kPageVectors) {
            const int last = std::min(p.vectors - first, kPageVectors) - 1;
            kSome[p.sum == nullptr][static_cast<size_t>(last)](p, first);
        }
    });
}

}  // namespace pliant::PLIANT_BYTES
