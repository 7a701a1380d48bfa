// Attention over pages of the KV cache in plies (docs/kv.md). Compiled once for each instruction
// set (see simd.h).
//
// A part of the positions goes through three loops, as with exact pages. The first and the last
// take a few pages at a time: a unit of all of them is multiplied in one call, and with each page
// the same unit of a later one is fetched.
#include <algorithm>

#include "attention.h"
#include "ops.h"

namespace pliant::PLIANT_ISA {

namespace {

constexpr int kBlock = 4;      // pages that are taken together
constexpr int kKeysAhead = 6;  // how many pages before they are needed keys are fetched

// Some pages of the same depths.
struct Block {
    const uint8_t* slot[kBlock];
    const SlotMap* map;  // [pages]
    int first, pages;
};

class Coded {
  public:
    explicit Coded(const CodedAttention& a)
        : a_(a),
          seen_(a),
          slot_(a.slot + (seen_.begin - a.first_page)),
          map_(a.map + (seen_.begin - a.first_page)) {}

    void run() {
        const int count = seen_.count();
        for (int at = 0; at < count;) at += scores(block(at));
        for (int q = 0; q < a_.queries; ++q) {
            for (int i = q; i < kBlock * 2 * a_.groups; i += a_.queries)
                fetch(values_of(kKeysAhead + i % kBlock, a_.values + i / kBlock));
            find_best(scores_.p[q], count, seen_.begin * kPageTokens, a_.position[q], a_.window,
                      a_.softcap, a_.out[q]);
            soften(scores_.p[q], count, a_.out[q]);
            std::fill(a_.out[q].values, a_.out[q].values + a_.groups * kGroup, 0.0f);
        }
        for (int at = 0; at < count;) at += values(block(at));
    }

  private:
    // The block that begins with that page of those that are seen.
    Block block(int at) const {
        Block b{{}, map_ + at, at, 0};
        for (; b.pages < kBlock && at + b.pages < seen_.count(); ++b.pages) {
            if (b.map[b.pages].depths != b.map->depths) break;
            b.slot[b.pages] = slot_[at + b.pages];
        }
        return b;
    }

    // A unit of a page, with the scales of its group; nothing from the last page on.
    static Ahead unit_of(const uint8_t* const* slot, const SlotMap* map, int page, int pages,
                         int unit) {
        if (page >= pages) return {nullptr, 0};
        if (unit % 2 == 0) __builtin_prefetch(slot[page] + map[page].codes[unit / 2]);
        return {slot[page] + map[page].plies[unit], map[page].depths[unit] * kUnitPly};
    }
    Ahead keys_of(int page, int unit) const {
        return page < seen_.count() ? unit_of(slot_, map_, page, seen_.count(), unit)
                                    : values_of(page - seen_.count(), unit - a_.keys + a_.values);
    }
    Ahead values_of(int page, int unit) const {
        return page < seen_.count() ? unit_of(slot_, map_, page, seen_.count(), unit)
                                    : unit_of(a_.then_slot, a_.then_map, page - seen_.count(),
                                              a_.then_pages, unit - a_.values + a_.then_keys);
    }

    // The product of a unit of the block with vectors of int8.
    void multiply(const Block& b, int unit, const int8_t* x, size_t x_stride, const int32_t* sum,
                  int32_t* out) {
        const uint8_t* plies[kBlock];
        Ahead ahead[kBlock];
        for (int i = 0; i < b.pages; ++i) {
            plies[i] = b.slot[i] + b.map[i].plies[unit];
            // Values are a block more ahead: the first of them were fetched during the softmax.
            ahead[i] = unit < a_.values ? keys_of(b.first + i + kKeysAhead, unit)
                                        : values_of(b.first + i + kKeysAhead + kBlock, unit);
        }
        const int depth = b.map->depths[unit];
        if (depth > 0)
            a_.product(
                {plies, ahead, b.pages, depth, a_.levels, a_.queries, x, x_stride, sum, out});
        else
            std::fill_n(out, b.pages * a_.queries * kHalf, 0);
    }

    // The scales of a group of the block, two vectors for each page.
    void read_scales(const Block& b, int unit, V* scales) const {
        for (int i = 0; i < b.pages; ++i) {
            const uint8_t* codes = b.slot[i] + b.map[i].codes[unit / 2];
            scales[2 * i] = kv_scales(codes);
            scales[2 * i + 1] = kv_scales(codes + kLanes);
        }
    }

    float level(const Block& b, int unit) const { return a_.levels->scale[b.map->depths[unit]]; }

    // The scores with a block of pages; returns how many they are.
    int scores(const Block& b) {
        const int queries = a_.queries;
        V scales[2 * kBlock];
        for (int g = 0; g < a_.groups; ++g) {
            const int unit = a_.keys + 2 * g, at = 2 * g * kMaxQueries;
            multiply(b, unit, a_.q->x + at * kHalf, 0, a_.q->sum + at, products_[0]);
            multiply(b, unit + 1, a_.q->x + (at + kMaxQueries) * kHalf, 0,
                     a_.q->sum + at + kMaxQueries, products_[1]);
            read_scales(b, unit, scales);
            const float level0 = level(b, unit), level1 = level(b, unit + 1);
            for (int q = 0; q < queries; ++q) {
                const float scale = a_.q->scale[g * kMaxQueries + q];
                const V factor0 = set1(scale * level0), factor1 = set1(scale * level1);
                const V mean = set1(a_.q->mean[q]);
                float* p = scores_.p[q] + b.first * kPageTokens;
                for (int i = 0; i < 2 * b.pages; ++i, p += kLanes) {
                    const int from = (i / 2 * queries + q) * kHalf + i % 2 * kLanes;
                    const V first = mul(load_int(products_[0] + from), factor0);
                    const V both = fma(load_int(products_[1] + from), factor1, first);
                    store(p, fma(both, scales[i], g > 0 ? load(p) : mean));
                }
            }
        }
        return b.pages;
    }

    // Adds the weighted values of a block of pages.
    int values(const Block& b) {
        const int queries = a_.queries;
        alignas(64) int8_t x[kBlock * kMaxQueries * kHalf];
        float factors[kBlock * kMaxQueries];
        V scales[2 * kBlock];
        for (int g = 0; g < a_.groups; ++g) {
            const int unit = a_.values + 2 * g;
            read_scales(b, unit, scales);
            for (int q = 0; q < queries; ++q) {
                const float* p = scores_.p[q] + b.first * kPageTokens;
                for (int i = 0; i < b.pages; ++i, p += kPageTokens) {
                    const V w0 = mul(load(p), scales[2 * i]);
                    const V w1 = mul(load(p + kLanes), scales[2 * i + 1]);
                    const float peak = largest(max(w0, w1));  // none is negative
                    const V factor = set1(can_be_coded(peak) ? 127.0f / peak : 0.0f);
                    int8_t* to = x + (i * queries + q) * kHalf;
                    store_bytes(to, mul(w0, factor));
                    store_bytes(to + kLanes, mul(w1, factor));
                    factors[q * kBlock + i] = peak * (1.0f / 127.0f);
                }
            }
            for (int half = 0; half < 2; ++half) {
                int32_t* products = products_[half];
                multiply(b, unit + half, x, static_cast<size_t>(queries) * kHalf, nullptr,
                         products);
                const float level = this->level(b, unit + half);
                for (int q = 0; q < queries; ++q) {
                    float* to = a_.out[q].values + g * kGroup + half * kHalf;
                    V first = load(to), second = load(to + kLanes);
                    for (int i = 0; i < b.pages; ++i) {
                        const int32_t* product = products + (i * queries + q) * kHalf;
                        const V factor = set1(factors[q * kBlock + i] * level);
                        first = fma(load_int(product), factor, first);
                        second = fma(load_int(product + kLanes), factor, second);
                    }
                    store(to, first);
                    store(to + kLanes, second);
                }
            }
        }
        return b.pages;
    }

    const CodedAttention& a_;
    const Seen<CodedAttention> seen_;
    const uint8_t* const* slot_;  // of what is seen
    const SlotMap* map_;
    Scores scores_;
    alignas(64) int32_t products_[2][kBlock * kMaxQueries * kHalf];  // [pages][queries][kHalf]
};

}  // namespace

void attend_coded(const CodedAttention& a) { Coded(a).run(); }

}  // namespace pliant::PLIANT_ISA
