// Products with coded matrices whose levels are looked up with shuffles, in terms of a way to
// multiply bytes (dots.h). They go as those with permutes do (coded_avx512.cpp).
#pragma once

#include <algorithm>
#include <array>
#include <type_traits>

#include "decoded_shuffle.h"
#include "ops.h"
#include "scout.h"
#include "sums_shuffle.h"

namespace pliant::PLIANT_BYTES {

// The products of T tokens with a group, straight out of its plies.
template <typename Dot, int N, int T>
struct FewShallow {
    using Kind = For<Dot, N>;
    const Prepared& x;
    const Table<N> table;
    B spread[T * kQuads];
    int32_t starts[T];

    explicit FewShallow(const CodedProduct& p) : x(*p.x), table(levels_of<N>(p, Kind::kFlip)) {}
    void begin(int group) {
        for (int t = 0; t < T; ++t) {
            const size_t at = x.at(group, t);
            for (int i = 0; i < kQuads; ++i)
                store(&spread[t * kQuads + i], broadcast(x.narrow + at * kGroup + 4 * i));
            starts[t] = Kind::start(x.sum_narrow[at]);
        }
    }
    // Parts in the order of place(). Bits are collected before those of the part before are used: a
    // processor looks ahead as far as its schedulers have room, and must not wait for what it finds
    // there.
    PLIANT_INLINE void add(const Strip& strip, const uint8_t* const* planes, const uint8_t* codes,
                           const Steps& steps, const float* factors, float* sums) const {
        const size_t end = static_cast<size_t>(strip.last - strip.first) * 256;
        Bits<N> first(planes, 0);
        for (size_t at = 0; at < end; codes += 16, sums += T * kSupertile) {
            strip.scout.go(N);
            for (int part = 0; part < kParts; part += kBeside) {
                SpreadSums<Kind, T> sum0;
                SpreadSums<Kind, kBeside == 2 ? T : 0> sum1;
                sum0.start(starts);
                sum1.start(starts);
                const auto add = [&](auto& sum, const Bits<N>& bits, int h) PLIANT_LAMBDA {
                    repeat<4>([&]<int j>() PLIANT_LAMBDA {
                        sum.add(table.template look_up<2 * j>(bits),
                                table.template look_up<2 * j + 1>(bits), spread + 8 * h + 2 * j);
                    });
                };
                // A loop: all depths together have to fit into the cache of instructions.
                for (int h = 0; h < 2; h += 2 / kBeside) {
                    const Bits<N> second(planes, at + kBytes);
                    add(sum0, first, h);
                    const size_t next = at + 2 * kBytes;
                    first = Bits<N>(planes, next < end ? next : at);
                    if constexpr (kBeside == 2)
                        add(sum1, second, h);
                    else
                        add(sum0, second, 1);
                    at = next;
                }
                sum0.finish(factors, steps.of(codes, part), sums + kPart * part);
                if constexpr (kBeside == 2)
                    sum1.finish(factors, steps.of(codes, part + 1), sums + kPart * (part + 1));
            }
        }
    }
};
template <typename Dot, int N, int T>
struct FewDeep {
    const Prepared& x;
    const DeepTable<N> table;
    const int8_t *xh = nullptr, *xl = nullptr;

    explicit FewDeep(const CodedProduct& p) : x(*p.x), table(levels_of<N>(p, 0)) {}
    void begin(int group) {
        xh = x.hi + x.at(group, 0) * kGroup;
        xl = x.lo + x.at(group, 0) * kGroup;
    }
    PLIANT_INLINE void add(const Strip& strip, const uint8_t* const* planes, const uint8_t* codes,
                           const Steps& steps, const float* factors, float* sums) const {
        const size_t end = static_cast<size_t>(strip.last - strip.first) * 256;
        for (size_t at = 0; at < end; at += 256, codes += 16, sums += T * kSupertile) {
            strip.scout.go(N);
            for (int part = 0; part < kParts; ++part) {
                DeepSums<Dot, T> sum;
                for (int h = 0; h < 2; ++h) {
                    const Bits<N> bits(planes, at + place(part, h));
                    repeat<8>([&]<int j>() PLIANT_LAMBDA {
                        const int column = 32 * h + 4 * j;
                        sum.add(table.template look_up<j>(bits), xh + column, xl + column);
                    });
                }
                sum.finish(factors, steps.of(codes, part), sums + kPart * part);
            }
        }
    }
};

// Adds the products of T tokens with a run: plies go from memory through registers
// straight into the sums. Group after group, so that every ply is read as one stream.
template <typename Dot, int N, int T>
void multiply(const Strip& strip, const Run& run) {
    using Few = std::conditional_t<N >= kWideDepth, FewDeep<Dot, N, T>, FewShallow<Dot, N, T>>;
    const CodedProduct& p = strip.p;
    const CodedBlock& block = *p.block;
    const Steps steps(p.levels->steps);
    Few products(p);
    for (int g = run.first, end = g + run.count; g < end; ++g) {
        products.begin(g);
        float factors[T];
        factors_of(p, g, N, 0, T, factors);
        const uint8_t* codes =
            block.codes[static_cast<size_t>(g)] + static_cast<size_t>(strip.first) * 16;
        const uint8_t* planes[N];
        planes_of<N>(block, g, strip.first, planes);
        products.add(strip, planes, codes, steps, factors, strip.sums);
    }
}

// Tokens for which plies are not decoded to memory first. With deep groups that pays sooner.
constexpr int few(int depth) { return depth >= kWideDepth ? 4 : kBytes / 8; }

template <typename Dot, int N>
void few_tokens(const Strip& strip, const Run& run) {
    using Block = void (*)(const Strip&, const Run&);
    static constexpr auto kBlocks = []<int... T>(std::integer_sequence<int, T...>) {
        return std::array<Block, few(N)>{multiply<Dot, N, T + 1>...};
    }(std::make_integer_sequence<int, few(N)>{});
    kBlocks[static_cast<size_t>(strip.p.tokens - 1)](strip, run);
}

// Many tokens: as many at a time as there are registers for their sums.
template <typename Dot, int N>
using Decoded = std::conditional_t<(N < kWideDepth), NarrowBytes<Dot, For<Dot, N>>,
                                   std::conditional_t<Dot::kWords, InWords, WideBytes<Dot>>>;
template <typename Dot, int N>
void many_tokens(const Strip& strip, const Run& run) {
    using Group = Decoded<Dot, N>;
    const CodedProduct& p = strip.p;
    const CodedBlock& block = *p.block;
    const Steps steps(p.levels->steps);
    const Levels<N> levels = levels_of<N>(p, Group::kFlip);
    Group group(strip);
    float factors[kMaxTokens];
    F step[kParts];
    for (int g = run.first; g < run.first + run.count; ++g) {
        factors_of(p, g, N, 0, p.tokens, factors);
        group.begin(g);
        const uint8_t* planes[N];
        planes_of<N>(block, g, strip.first, planes);
        float* sums = strip.sums;
        for (int s = strip.first; s < strip.last; ++s, sums += p.tokens * kSupertile) {
            strip.scout.go(N);
            group.template decode<N>(planes, levels);
            const uint8_t* codes =
                block.codes[static_cast<size_t>(g)] + static_cast<size_t>(s) * 16;
            for (int part = 0; part < kParts; ++part) step[part] = steps.of(codes, part);
            group.multiply(factors, step, sums);
            repeat<N>([&]<int i>() PLIANT_LAMBDA { planes[i] += 256; });
        }
    }
}

// A strip of supertiles, as many as their sums have room for, goes through the groups together.
template <typename Dot>
void multiply_strips(const CodedProduct& p) {
    float* sums = reinterpret_cast<float*>(p.scratch);
    const int size = std::max(1, kMaxTokens / p.tokens);
    fetch_pointers(*p.block, p.first, p.last);
    Scout scout(*p.block, p.first, p.last, size);
    for (int first = p.first; first < p.last; first += size) {
        const int last = std::min(first + size, p.last);
        const Strip strip{p, first, last, sums, scout};
        std::fill_n(sums, (last - first) * p.tokens * kSupertile, 0.0f);
        for (const Run& run : p.block->runs)
            with_depth(run.depth, [&]<int N>() {
                p.tokens <= few(N) ? few_tokens<Dot, N>(strip, run)
                                   : many_tokens<Dot, N>(strip, run);
            });
        const float* sum = sums;
        for (int s = first; s < last; ++s)
            for (int t = 0; t < p.tokens; ++t, sum += kSupertile) {
                const float* scale = p.block->row_scale + s * kSupertile;
                float* out = p.out + static_cast<size_t>(t) * p.stride + (s - p.first) * kSupertile;
                for (int r = 0; r < kSupertile; ++r) out[r] = sum[r] * scale[r];
            }
    }
}

}  // namespace pliant::PLIANT_BYTES
