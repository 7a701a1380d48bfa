// Attention over pages of the KV cache in plies (docs/kv.md). Compiled once for each instruction
// set (see simd.h).
//
// A part of the positions goes through three loops, as with exact pages. The first and the last
// take a few pages at a time: a unit of all of them is multiplied in one call, while what comes
// after them is fetched, a portion with every page.
#include <algorithm>

#include "attention.h"
#include "ops.h"

namespace pliant::PLIANT_ISA {

namespace {

constexpr int kBlock = 4;      // pages that are taken together
constexpr int kKeysAhead = 4;  // how many pages before they are needed keys are fetched

// Some pages of the same depths.
struct Block {
    const uint8_t* slot[kBlock];
    const SlotMap* map;  // [pages]
    int first, pages;
};

class Coded {
  public:
    explicit Coded(const CodedAttention& a) : a_(a), seen_(a) {}

    void run() {
        const int count = seen_.count();
        for (int at = 0; at < count;) at += scores(block(at));
        for (int q = 0; q < a_.queries; ++q) {
            for (int page = kKeysAhead + q; page < std::min(count, kKeysAhead + kBlock);
                 page += a_.queries)
                fetch(region(page, true));
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
        const int first = seen_.begin - a_.first_page + at, count = seen_.count();
        Block b{{}, a_.map + first, at, 0};
        for (; b.pages < kBlock && at + b.pages < count; ++b.pages) {
            if (a_.map[first + b.pages].depths != b.map->depths) break;
            b.slot[b.pages] = a_.slot[first + b.pages];
        }
        return b;
    }

    // What a head has in a slot lies together: codes of keys and values, plies of keys, plies of
    // values. Up to the plies of values it is read for the scores, and then the rest.
    Ahead region(int page, bool value) const {
        const int at = seen_.begin - a_.first_page + page;
        const SlotMap& map = a_.map[at];
        const int last = a_.values + 2 * a_.groups - 1;
        const uint32_t begin = value ? map.plies[a_.values] : map.codes[a_.keys / 2];
        const uint32_t end =
            value ? map.plies[last] + map.depths[last] * kUnitPly : map.plies[a_.values];
        return {a_.slot[at] + begin, static_cast<int>(end - begin)};
    }

    // What is fetched with each page of a block, in portions for the calls. Values are a block more
    // ahead than keys: what is missing then has been fetched during the softmax.
    void plan_ahead(const Block& b, bool value, int calls) {
        const int count = seen_.count();
        for (int i = 0; i < b.pages; ++i) {
            const int page = b.first + i + kKeysAhead + (value ? kBlock : 0);
            if (page < count)
                ahead_[i] = region(page, value);
            else if (!value && page - count < count)
                ahead_[i] = region(page - count, true);
            else if (value && page - count < a_.then_count)
                ahead_[i] = a_.then[page - count];
            else
                ahead_[i] = {nullptr, 0};
            portion_[i] = (ahead_[i].bytes / calls + 63) / 64 * 64;
        }
    }

    // The product of a unit of the block with vectors of int8.
    void multiply(const Block& b, int unit, const int8_t* x, size_t x_stride, const int32_t* sum,
                  int32_t* out) {
        const uint8_t* plies[kBlock];
        Ahead ahead[kBlock];
        for (int i = 0; i < b.pages; ++i) {
            plies[i] = b.slot[i] + b.map[i].plies[unit];
            ahead[i] = {ahead_[i].from, std::min(portion_[i], ahead_[i].bytes)};
            ahead_[i].from += ahead[i].bytes;
            ahead_[i].bytes -= ahead[i].bytes;
        }
        const int depth = b.map->depths[unit];
        if (depth > 0)
            page_product(
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
        plan_ahead(b, false, 2 * a_.groups);
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
        plan_ahead(b, true, 2 * a_.groups);
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
    Scores scores_;
    alignas(64) int32_t products_[2][kBlock * kMaxQueries * kHalf];  // [pages][queries][kHalf]
    Ahead ahead_[kBlock];
    int portion_[kBlock];
};

}  // namespace

void attend_coded(const CodedAttention& a) { Coded(a).run(); }

}  // namespace pliant::PLIANT_ISA
