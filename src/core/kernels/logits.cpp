// What choosing a token asks of all logits. Compiled once for each instruction set (see simd.h).
#include <algorithm>
#include <bit>
#include <limits>

#include "kernels.h"
#include "ops.h"
#include "simd.h"
#include "vectors.h"

namespace pliant::PLIANT_ISA {

namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr int kBlock = 32 * kLanes;

V load_logits(const float* x, int n) {
    if (n == kLanes) return load(x);
    float part[kLanes];
    std::fill(std::copy(x, x + n, part), part + kLanes, kNone);
    return load(part);
}

LogitPeak peak(const float* logits, int count) {
    LogitPeak found{kNone, -1};
    int block = 0;  // the first one with the largest
    for (int start = 0; start < count; start += kBlock) {
        V high = set1(found.logit);
        each_vector(std::min(kBlock, count - start), [&](int i, int n) {
            high = max(load_logits(logits + start + i, n), high);  // no number: the second one
        });
        const float highest = largest(high);
        if (highest > found.logit) {
            found.logit = highest;
            block = start;
        }
    }
    if (found.logit > kNone) {
        const float* first = std::find(logits + block, logits + count, found.logit);
        found.index = static_cast<int>(first - logits);
    }
    return found;
}

struct Distance {
    V best, per_nat;
    explicit Distance(const LogitDistances& of) : best(set1(of.best)), per_nat(set1(of.per_nat)) {}
    V operator()(const float* x, int n) const { return mul(sub(best, load_logits(x, n)), per_nat); }
};

void mass_within(const LogitDistances& of, const float* edges, double* sums) {
    const Distance distance(of);
    std::fill_n(sums, kLogitEdges, 0.0);
    for (int start = 0; start < of.count; start += kBlock) {
        V block[kLogitEdges];
        for (V& v : block) v = zero();
        each_vector(std::min(kBlock, of.count - start), [&](int i, int n) {
            const V d = distance(of.logits + start + i, n), mass = exp(sub(zero(), d));
            for (int k = 0; k < kLogitEdges; ++k) block[k] = add_below(block[k], mass, d, edges[k]);
        });
        for (int k = 0; k < kLogitEdges; ++k) sums[k] += static_cast<double>(sum(block[k]));
    }
}

int places_within(const LogitDistances& of, float from, float to, int32_t* places) {
    const Distance distance(of);
    int found = 0;
    each_vector(of.count, [&](int i, int n) {
        const V d = distance(of.logits + i, n);
        unsigned within = lanes_below(d, to);
        if (within != 0) within &= ~lanes_below(d, from);
        for (; within != 0; within &= within - 1) places[found++] = i + std::countr_zero(within);
    });
    return found;
}

}  // namespace

void fill_logits(Kernels& k) {
    k.peak = peak;
    k.mass_within = mass_within;
    k.places_within = places_within;
}

}  // namespace pliant::PLIANT_ISA
