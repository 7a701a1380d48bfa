// The activations of one step: allocated once, for a chunk of tokens.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "executor.h"
#include "kernels/unroll.h"

namespace pliant {

// What will be read soon. Inlined by force: GCC takes away calls of functions that do nothing but
// fetch.
PLIANT_INLINE void fetch(const float* from, int count) {
    for (int i = 0; i < count; i += 16) __builtin_prefetch(from + i);
}
// … and a little later: into the second cache.
PLIANT_INLINE void fetch_early(const void* from, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 64)
        __builtin_prefetch(static_cast<const char*>(from) + i, 0, 1);
}

// A zeroed array aligned to 64 bytes.
template <typename T>
class Aligned {
  public:
    Aligned() = default;
    explicit Aligned(size_t count)
        : count_(count),
          data_(static_cast<T*>(operator new(std::max(count, size_t{1}) * sizeof(T),
                                             std::align_val_t{64}))) {
        std::fill_n(data_.get(), count, T{});
    }
    T* data() const { return data_.get(); }
    size_t bytes() const { return count_ * sizeof(T); }

  private:
    struct Free {
        void operator()(T* p) const { operator delete(p, std::align_val_t{64}); }
    };
    size_t count_ = 0;
    std::unique_ptr<T, Free> data_;
};

// Rows of floats, one for each token, with room for whole supertiles.
struct Rows {
    size_t stride = 0;
    float* data = nullptr;

    float* row(int token) const { return data + static_cast<size_t>(token) * stride; }
};

constexpr size_t row_stride(int width) {
    return (static_cast<size_t>(width) + kSupertile - 1) / kSupertile * kSupertile;
}

// Room for `tokens` inputs of matrices as coded groups, beside the same as floats.
struct InputBuffer {
    InputBuffer(int tokens, int width, Rows floats)
        : capacity(tokens),
          x(floats),
          stride((static_cast<size_t>(width) + 63) / 64 * 64),
          narrow(values()),
          hi(values()),
          lo(values()),
          scale(values() / kGroup),
          sum_narrow(values() / kGroup),
          sum_hi(values() / kGroup),
          sum_lo(values() / kGroup) {}

    size_t values() const { return static_cast<size_t>(capacity) * stride; }
    float* row(int token) const { return x.row(token); }
    Prepared prepared(int groups) const {
        return {groups,       capacity,          narrow.data(), hi.data(),    lo.data(),
                scale.data(), sum_narrow.data(), sum_hi.data(), sum_lo.data()};
    }
    size_t bytes() const {
        return narrow.bytes() + hi.bytes() + lo.bytes() + scale.bytes() + sum_narrow.bytes() +
               sum_hi.bytes() + sum_lo.bytes();
    }

    int capacity;
    Rows x;
    size_t stride;
    Aligned<int8_t> narrow, hi, lo;
    Aligned<float> scale;
    Aligned<int32_t> sum_narrow, sum_hi, sum_lo;
};

// Queries of one task, as they are and for coded pages. `head`: room for a head, in whole groups.
struct QueryRoom {
    QueryRoom(int queries, size_t head)
        : head_(head),
          data_(static_cast<size_t>(queries) * head),
          x_(kMaxQueries * head),
          sum_(kMaxQueries * head / kHalf),
          scale_(kMaxQueries * head / kGroup + kMaxQueries) {}
    size_t bytes() const { return data_.bytes() + x_.bytes() + sum_.bytes() + scale_.bytes(); }
    float* query(int slot) const { return data_.data() + static_cast<size_t>(slot) * head_; }
    CodedQueries coded() const {
        return {x_.data(), sum_.data(), scale_.data(),
                scale_.data() + kMaxQueries * head_ / kGroup};
    }

  private:
    size_t head_;
    Aligned<float> data_;
    Aligned<int8_t> x_;
    Aligned<int32_t> sum_;
    Aligned<float> scale_;
};

// What a thread needs to attend for the queries of one task.
struct AttentionRoom {
    explicit AttentionRoom(size_t head)
        : queries(kExactQueries, head),
          head_(head),
          data_(kExactQueries * 3 * head),
          scalars_(kExactQueries * 6) {}
    size_t bytes() const { return queries.bytes() + data_.bytes() + scalars_.bytes(); }
    Attended sum(int slot) const { return attended(0, slot); }
    Attended more(int slot) const { return attended(1, slot); }
    Attended newest(int slot) const { return attended(2, slot); }

    QueryRoom queries;

  private:
    Attended attended(int kind, int slot) const {
        const int at = kind * kExactQueries + slot;
        float* scalar = scalars_.data() + 2 * at;
        return {scalar, scalar + 1, data_.data() + static_cast<size_t>(at) * head_};
    }
    size_t head_;
    Aligned<float> data_, scalars_;
};

// The widest input of a matrix.
constexpr int widest(const ModelSpec& m) {
    return std::max({m.hidden, m.heads * m.head_dim, m.ffn});
}

// What the tokens of a chunk have, one after the other in `floats` floats from `at` on. What
// attention works on is read no more when the feed-forward layer begins, so the two share their
// room.
struct Activations {
    // `plain`: some matrices are not coded. Their inputs are read while there are results.
    Activations(const ModelSpec& m, int chunk, bool plain, float* at) {
        const auto take = [&](Rows& rows, int tokens, int width) {
            rows = {row_stride(width), at == nullptr ? nullptr : at + floats};
            floats += static_cast<size_t>(tokens) * rows.stride;
        };
        const int heads = m.heads * m.head_dim, kv_heads = m.kv_heads * m.head_dim;
        take(residual[0], chunk, m.hidden);
        take(residual[1], 1, m.hidden);
        take(out, chunk, m.hidden);
        if (plain) take(x, chunk, widest(m));
        const size_t shared = floats;
        take(gate, chunk, m.ffn);
        const size_t end = std::exchange(floats, shared);
        take(q, chunk, heads);
        take(k, chunk, kv_heads);
        take(v, chunk, kv_heads);
        if (!plain) take(x, chunk, std::max(m.hidden, heads));
        floats = std::max(floats, end);
    }
    Rows residual[2];  // read from one, and, of a single token, written to the other
    Rows out, q, k, v, gate;
    Rows x;  // inputs of matrices
    size_t floats = 0;
};

// Heads that share a KV head, in blocks of kMaxQueries.
constexpr int query_blocks(const ModelSpec& m) {
    return (m.heads / m.kv_heads + kMaxQueries - 1) / kMaxQueries;
}

// Tokens × supertiles of a matrix whose results a thread keeps to itself.
constexpr int kOwnResults = 768;

struct Executor::Buffers : Activations {
    Buffers(const ModelSpec& m, int threads, int chunk, bool plain)
        : Activations(m, chunk, plain, nullptr),
          input(chunk, widest(m), {}),
          half_(static_cast<size_t>(m.head_dim / 2)),
          padded_head_((static_cast<size_t>(m.head_dim) + 63) / 64 * 64),
          chunk_(static_cast<size_t>(chunk)),
          most_parts_(static_cast<size_t>(part_of(m.context / kPageTokens)) + 1),
          floats_(floats),
          cosine_(m.ropes.size() * chunk_ * half_),
          sine_(m.ropes.size() * chunk_ * half_),
          parts_(static_cast<size_t>(m.heads) * (most_parts_ + 1) * padded_head_),
          part_scalars_(static_cast<size_t>(m.heads) * (most_parts_ + 1) * 2) {
        static_cast<Activations&>(*this) = Activations(m, chunk, plain, floats_.data());
        input.x = x;
        parts_done = std::make_unique<std::atomic<int>[]>(static_cast<size_t>(m.heads));
        for (int i = 0; i < threads; ++i) {
            own_floats_.emplace_back(input.stride);
            own.emplace_back(1, static_cast<int>(input.stride),
                             Rows{input.stride, own_floats_.back().data()});
            own_residual.emplace_back(static_cast<size_t>(m.hidden));
            own_results.emplace_back(static_cast<size_t>(kOwnResults * kSupertile));
            scratch.emplace_back(kScratchBytes);
            together.emplace_back(input.stride * (chunk > 1 ? kTogether : 1));
            attention.emplace_back(padded_head_);
            for (int q = 0; q < m.kv_heads * query_blocks(m); ++q)
                own_queries.emplace_back(kMaxQueries, padded_head_);
        }
    }
    size_t bytes() const {
        size_t total = floats_.bytes() + input.bytes() + cosine_.bytes() + sine_.bytes() +
                       parts_.bytes() + part_scalars_.bytes();
        for (size_t i = 0; i < own.size(); ++i)
            total += own[i].bytes() + own_floats_[i].bytes() + own_residual[i].bytes() +
                     own_results[i].bytes() + scratch[i].bytes() + together[i].bytes() +
                     attention[i].bytes();
        for (const QueryRoom& queries : own_queries) total += queries.bytes();
        return total;
    }

    // Rotary tables: [head_dim / 2] of a table and a token.
    float* cosine_row(size_t rope, int t) const { return cosine_.data() + rotary(rope, t); }
    float* sine_row(size_t rope, int t) const { return sine_.data() + rotary(rope, t); }
    // What a head of the only token has drawn from a part of the positions.
    Attended part(int head, int part) const {
        const size_t at = static_cast<size_t>(head) * (most_parts_ + 1) + static_cast<size_t>(part);
        return {part_scalars_.data() + 2 * at, part_scalars_.data() + 2 * at + 1,
                parts_.data() + at * padded_head_};
    }
    // … and from the newest page, where the others are coded.
    Attended newest(int head) const { return part(head, static_cast<int>(most_parts_)); }
    size_t padded_head() const { return padded_head_; }

    InputBuffer input;             // of a matrix; shared by all threads …
    std::vector<InputBuffer> own;  // … or one token, made by each thread for itself
    std::vector<Aligned<float>> own_residual, own_results;
    std::vector<Aligned<uint8_t>> scratch;
    std::vector<Aligned<float>> together;  // of inputs that are prepared together
    std::vector<AttentionRoom> attention;
    // Of a single token, every thread has the queries of all heads: [thread][kv head][block].
    std::vector<QueryRoom> own_queries;
    // How many parts the heads from one on have done, those of one task.
    std::unique_ptr<std::atomic<int>[]> parts_done;

  private:
    size_t rotary(size_t rope, int t) const {
        return (rope * chunk_ + static_cast<size_t>(t)) * half_;
    }
    size_t half_, padded_head_, chunk_, most_parts_;
    Aligned<float> floats_, cosine_, sine_, parts_, part_scalars_;
    std::vector<Aligned<float>> own_floats_;
};

}  // namespace pliant
