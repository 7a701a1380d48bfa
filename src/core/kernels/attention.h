// What both kinds of attention share: which pages queries see, and the softmax of a part. Compiled
// once for each instruction set (see simd.h).
#pragma once

#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "simd.h"
#include "unroll.h"

namespace pliant::PLIANT_ISA {

// The scores of queries with the positions of a part, then their weights.
struct Scores {
    alignas(64) float p[kMaxQueries][kPartTokens];
};

// The pages [begin, end) of those that were given which some of the queries see.
template <typename A>
struct Seen {
    int begin, end, last;
    explicit Seen(const A& a) {
        int first = a.position[0];
        last = 0;
        for (int q = 0; q < a.queries; ++q) {
            last = std::max(last, a.position[q]);
            first = std::min(first, a.window > 0 ? std::max(0, a.position[q] - a.window + 1) : 0);
        }
        begin = std::max(first / kPageTokens, a.first_page);
        end = std::min(last / kPageTokens + 1, a.first_page + a.pages);
    }
    int count() const { return std::max(0, end - begin); }
};

// The largest of the scores of one query with whole pages, whose first position is `base`. What the
// query does not see becomes -inf.
inline void find_best(float* p, int pages, int base, int position, int window, float softcap,
                      const Attended& out) {
    const int tokens = pages * kPageTokens;
    if (softcap > 0.0f) {
        const V cap = set1(softcap);
        for (int i = 0; i < tokens; i += kLanes)
            store(p + i, mul(cap, tanh(div(load(p + i), cap))));
    }
    const int from = window > 0 ? std::clamp(position - window + 1 - base, 0, tokens) : 0;
    const int to = std::clamp(position + 1 - base, 0, tokens);
    std::fill(p, p + from, -INFINITY);
    std::fill(p + to, p + tokens, -INFINITY);
    V most0 = set1(-INFINITY), most1 = most0;
    for (int i = 0; i < tokens; i += kPageTokens) {
        most0 = max(load(p + i), most0);
        most1 = max(load(p + i + kLanes), most1);
    }
    *out.best = largest(max(most0, most1));
}

// Then they become weights relative to it: Σ e^(score - best) is their total. What is not seen gets
// the weight 0, and changes neither, so a query gets the same bits whatever its neighbours see.
// A loop for all queries each: then none of them waits for its largest score.
inline void soften(float* p, int pages, const Attended& out) {
    const int tokens = pages * kPageTokens;
    const float best = *out.best;
    *out.total = 0.0f;
    if (best == -INFINITY) return std::fill(p, p + tokens, 0.0f);
    V total0 = zero(), total1 = zero();
    const V top = set1(best);
    for (int i = 0; i < tokens; i += kPageTokens) {
        const V e0 = exp(sub(load(p + i), top)), e1 = exp(sub(load(p + i + kLanes), top));
        store(p + i, e0);
        store(p + i + kLanes, e1);
        total0 = add(total0, e0);
        total1 = add(total1, e1);
    }
    *out.total = sum(add(total0, total1));
}

}  // namespace pliant::PLIANT_ISA
