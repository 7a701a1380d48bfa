// The interface of the compute kernels. Each instruction set fills the table; all give the same
// bits.
//
// Law of exactness: integer products are exact, and every floating-point operation is one IEEE
// operation in an order that does not depend on the instruction set, the number of tokens, or the
// number of threads.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../coded.h"

namespace pliant {

constexpr int kPageTokens = 32;  // tokens of a page of the KV cache

// Neighbouring tokens to be rotated and coded: x[token][columns], or its norm, gathered by order,
// zero-filled to groups of 64.
struct Preparing {
    const float* x;  // [count][stride]
    size_t stride;
    int count;          // tokens
    const float* norm;  // [columns], as of rms_norm, or null
    float eps;
    const uint16_t* order;  // [columns]
    int columns;
    bool narrow, wide;  // what is wanted
    const Prepared* out;
    int first;       // of its tokens
    float* scratch;  // [columns][kTogether]; [columns] is enough for one token
};

constexpr int kTogether = 16;  // tokens that are prepared at once

// out[t][r] = row_scale[r] · Σ_g Σ_c w[r][c] · x[t][c] for the supertiles [first, last) of a block.
struct CodedProduct {
    const CodedBlock* block;
    const LevelTables* levels;
    const Prepared* x;
    int tokens;
    int first, last;  // supertiles
    float* out;       // [tokens][stride]; index 0 is the first row of supertile `first`
    size_t stride;
    uint8_t* scratch;  // kScratchBytes, one for each thread, aligned to 64
};

constexpr int kMaxTokens = 128;  // most tokens of one product
constexpr int kSums = 512;       // rows of sums, [32], that a product of few tokens may hold
constexpr size_t kScratchBytes = 2 * kSupertile * kGroup + kSums * kSupertile * sizeof(float);

// out[t][r] = Σ_k w[r][k] · x[t][k] for rows [first, last), w in float32 or bfloat16.
struct PlainProduct {
    const void* weight;  // [rows][columns]
    bool bf16;
    int columns;
    const float* x;  // [tokens][x_stride]
    size_t x_stride;
    int tokens;
    int first, last;
    float* out;  // [tokens][stride]; index 0 is row `first`
    size_t stride;
};

// Attention of the queries of some tokens and heads that share one KV head, over some pages of one
// sequence. K of a page is [head_dim][kPageTokens], V is [kPageTokens][head_dim], both IEEE half
// precision.
struct Attention {
    int head_dim;
    int queries;                 // at most kExactQueries
    const float* const* q;       // [queries] -> [head_dim], already scaled
    const int* position;         // [queries]: a query sees positions <= its own …
    int window;                  // … and > position - window if window > 0
    int first_page, pages;       // of the sequence; the pages begin at position 0
    const uint16_t* const* k;    // [pages] -> K of this layer and KV head
    const uint16_t* const* v;    // [pages]
    float softcap;               // 0: none
    const struct Attended* out;  // [queries]
};

constexpr int kHalf = kGroup / 2;                  // channels of a unit of the KV cache
constexpr int kUnitPly = kHalf * kPageTokens / 8;  // bytes of one ply of a unit

// Bytes that will be read soon.
struct Ahead {
    const uint8_t* from;
    int bytes;
};

// A unit of some pages: keys (rows are the tokens, columns 32 channels) or values (rows are 32
// channels, columns the tokens), in plies of 128 bytes: two vectors of 16 rows × 32 columns.
// out[page][v][r] = Σ_c level[r][c] · x[v][c], in whole numbers.
struct PlyProduct {
    const uint8_t* const* plies;  // [pages]: the first, kUnitPly bytes; the others follow it
    const Ahead* ahead;           // [pages]: to be fetched meanwhile
    int pages;
    int depth;  // 1 to kMaxDepth; levels have 8 bits at any depth
    const LevelTables* levels;
    int vectors;         // at most kMaxQueries
    const int8_t* x;     // [vectors][32] …
    size_t x_stride;     // … of each page; 0: the same for all
    const int32_t* sum;  // [vectors]: of x; null: no x is negative
    int32_t* out;        // [pages][vectors][32]
};

// How a key or a value is turned before it is coded: less `mean`, times `scale`, gathered by
// `order`, filled up with zeros to groups of 64, and each half of a group rotated. Queries are
// divided by the scale of the keys; what they see of the mean is added to all scores.
struct Turn {
    const float *mean, *scale, *inverse;  // [head_dim]; inverse = 1 / scale
    const uint16_t* order;                // [head_dim]
};

// Queries for coded keys: turned, and coded as int8 · scale.
struct CodedQueries {
    int8_t* x;     // [2 · groups][kMaxQueries][32]
    int32_t* sum;  // [2 · groups][kMaxQueries]
    float* scale;  // [groups][kMaxQueries]
    float* mean;   // [kMaxQueries]: the score of the mean
};

// Where the parts of a slot are that has so many rungs: depth and first ply of each unit, and the
// scale codes of each group (two units), a byte for each token.
struct SlotMap {
    const uint8_t* depths;  // [units]
    const uint32_t* plies;  // [units]
    const uint32_t* codes;  // [units / 2]
};

// Codes one full page of one layer and KV head.
struct PageCoding {
    int head_dim, groups;
    const uint16_t *k, *v;  // as in Attention
    Turn key, value;
    const float* thresholds;  // [256]: the tree as a heap, 1 its root
    uint8_t* slot;
    SlotMap map;
    int keys, values;  // the first units
};

// As Attention, over full pages in plies (docs/kv.md). What is drawn is in the turned space of the
// values, [groups · 64].
struct CodedAttention {
    int groups, queries;
    const CodedQueries* q;
    const int* position;  // as there
    int window;
    int first_page, pages;
    const uint8_t* const* slot;  // [pages]
    const SlotMap* map;          // [pages]
    int keys, values;            // the first units
    const LevelTables* levels;
    float softcap;
    const struct Attended* out;          // [queries]
    void (*product)(const PlyProduct&);  // of the instruction set
    // What will be read after this, and is fetched while the last values are multiplied: keys, from
    // this unit on.
    int then_keys = 0, then_pages = 0;
    const uint8_t* const* then_slot = nullptr;  // [then_pages]
    const SlotMap* then_map = nullptr;
};

// What a query has drawn from some of the positions: Σ e^(score - best) · value, padded to 16, and
// the sum of the e^(score - best). `total` is 0 if it saw none of them.
struct Attended {
    float *best, *total, *values;
};

constexpr int kMaxQueries = 8;     // of coded pages
constexpr int kExactQueries = 12;  // of exact pages
constexpr int kMaxHeadDim = 1024;
// Positions go through attention in parts, counted from the beginning of the sequence: two of half
// the size, so that a short context can be divided among threads, and then whole ones. Parts are
// always added up in order, whoever computed them.
constexpr int kPartPages = 16;  // at most
constexpr int kPartTokens = kPartPages * kPageTokens;
constexpr int kHalfParts = 2;
constexpr int part_of(int page) {
    constexpr int kPages = kHalfParts * kPartPages / 2;
    return page < kPages ? page / (kPartPages / 2) : kHalfParts + (page - kPages) / kPartPages;
}
constexpr int part_begin(int part) {
    return part < kHalfParts ? part * kPartPages / 2 : (part - kHalfParts / 2) * kPartPages;
}

// The largest of some logits, and the first place that has it: -1 if there is none above -infinity.
// What is no number is passed over.
struct LogitPeak {
    float logit;
    int index;
};

// How far logits are below the best one, in nats: (best - x) · per_nat.
struct LogitDistances {
    const float* logits;
    int count;
    float best, per_nat;
};
constexpr int kLogitEdges = 8;

enum class Activation { kSilu, kGeluTanh, kGelu };

struct Kernels {
    const char* name;

    void (*prepare)(const Preparing&);
    void (*coded_product)(const CodedProduct&);
    void (*page_product)(const PlyProduct&);
    void (*plain_product)(const PlainProduct&);
    // One row of a coded block, in source column order: out[columns].
    void (*coded_row)(const CodedBlock& block, const LevelTables& levels, int row,
                      const uint16_t* order, int columns, float* out);

    void (*add)(const float* x, const float* y, int n, float* out);
    void (*rms_norm)(const float* x, const float* weight, int n, float eps, float* out);
    // Rotates pairs (i, i + n / 2) of one head in place.
    void (*rope)(float* x, const float* cosine, const float* sine, int n);
    void (*gate)(const float* gate, const float* up, int n, Activation activation, float* out);
    void (*softcap)(float* x, int n, float cap);
    // To a page of the KV cache, clamped to finite values: x[count][stride] as values, or as keys
    // of its places [slot, slot + count).
    void (*to_values)(const float* x, size_t stride, int count, int n, uint16_t* out,
                      size_t out_stride);
    void (*to_keys)(const float* x, size_t stride, int count, int n, uint16_t* page, int slot);
    void (*attend)(const Attention&);
    // Turns one query, [head_dim] and already scaled, to place `slot`.
    void (*turn_query)(const Turn& turn, int head_dim, int groups, const float* query, int slot,
                       const CodedQueries& out);
    void (*attend_coded)(const CodedAttention&);
    void (*code_page)(const PageCoding&);
    // Turns back what was drawn from coded values, in place: then it is as of Attention.
    void (*turn_back)(const Turn& turn, int head_dim, int groups, const Attended& drawn);
    // Adds what was drawn from later positions.
    void (*attend_more)(const Attended& more, int head_dim, const Attended& sum);
    // The weighted mean of the values: out[head_dim].
    void (*attend_mean)(const Attended& sum, int head_dim, float* out);

    LogitPeak (*peak)(const float* logits, int count);
    // sums[k] = Σ e^-d of the logits at distances d < edges[k]: [kLogitEdges], in rising order. The
    // sums of two edges are the same if there is no logit between them.
    void (*mass_within)(const LogitDistances& distances, const float* edges, double* sums);
    // The places of the logits at distances from <= d < to, in rising order: how many.
    int (*places_within)(const LogitDistances& distances, float from, float to, int32_t* places);
};

// The usable instruction sets, best first.
std::vector<std::string> usable_isas();
// The kernels of `name`, or the best ones for "auto". Throws UsageError.
const Kernels& select_kernels(const std::string& name);

}  // namespace pliant
