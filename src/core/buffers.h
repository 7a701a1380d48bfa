// The activations of one step: allocated once, for a chunk of tokens.
#pragma once

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "executor.h"

namespace pliant {

constexpr int kHeadRows = 256;  // rows of the head that a thread computes before it scatters them

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

// Room for `tokens` inputs of matrices: as floats and as coded groups.
struct InputBuffer {
    InputBuffer(int tokens, int width)
        : capacity(tokens),
          stride((static_cast<size_t>(width) + 63) / 64 * 64),
          x(static_cast<size_t>(tokens) * stride),
          hi(static_cast<size_t>(tokens) * stride),
          lo(static_cast<size_t>(tokens) * stride),
          scale(static_cast<size_t>(tokens) * stride / kGroup),
          sum_hi(static_cast<size_t>(tokens) * stride / kGroup),
          sum_lo(static_cast<size_t>(tokens) * stride / kGroup) {}

    float* row(int token) const { return x.data() + static_cast<size_t>(token) * stride; }
    Prepared prepared(int groups) const {
        return {groups, capacity, hi.data(), lo.data(), scale.data(), sum_hi.data(), sum_lo.data()};
    }
    size_t bytes() const {
        return x.bytes() + hi.bytes() + lo.bytes() + scale.bytes() + sum_hi.bytes() +
               sum_lo.bytes();
    }

    int capacity;
    size_t stride;
    Aligned<float> x;
    Aligned<int8_t> hi, lo;
    Aligned<float> scale;
    Aligned<int32_t> sum_hi, sum_lo;
};

// Outputs of matrices, [tokens][stride], with room for whole supertiles.
struct OutputBuffer {
    OutputBuffer(int tokens, int rows)
        : stride((static_cast<size_t>(rows) + kSupertile - 1) / kSupertile * kSupertile),
          data(static_cast<size_t>(tokens) * stride) {}
    float* row(int token) const { return data.data() + static_cast<size_t>(token) * stride; }

    size_t stride;
    Aligned<float> data;
};

struct Executor::Buffers {
    Buffers(const ModelSpec& m, int threads, int chunk)
        : input(chunk, std::max({m.hidden, m.heads * m.head_dim, m.ffn})),
          residual(chunk, m.hidden),
          q(chunk, m.heads * m.head_dim),
          k(chunk, m.kv_heads * m.head_dim),
          v(chunk, m.kv_heads * m.head_dim),
          gate(chunk, m.ffn),
          up(chunk, m.ffn),
          out(chunk, m.hidden),
          cosine(static_cast<size_t>(chunk) * m.ropes.size() * static_cast<size_t>(m.head_dim / 2)),
          sine(static_cast<size_t>(chunk) * m.ropes.size() * static_cast<size_t>(m.head_dim / 2)) {
        for (int i = 0; i < threads; ++i) {
            own.emplace_back(1, std::max({m.hidden, m.heads * m.head_dim, m.ffn}));
            scratch.emplace_back(kScratchBytes);
            head.emplace_back(static_cast<size_t>(chunk) * kHeadRows);
        }
    }
    size_t bytes() const {
        size_t total = input.bytes() + residual.data.bytes() + q.data.bytes() + k.data.bytes() +
                       v.data.bytes() + gate.data.bytes() + up.data.bytes() + out.data.bytes() +
                       cosine.bytes() + sine.bytes();
        for (const InputBuffer& buffer : own) total += buffer.bytes();
        for (const auto& buffer : scratch) total += buffer.bytes();
        for (const auto& buffer : head) total += buffer.bytes();
        return total;
    }

    InputBuffer input;             // of a matrix; shared by all threads …
    std::vector<InputBuffer> own;  // … or one token, made by each thread for itself
    OutputBuffer residual, q, k, v, gate, up, out;
    Aligned<float> cosine, sine;  // [ropes][tokens][head_dim / 2]
    std::vector<Aligned<uint8_t>> scratch;
    std::vector<Aligned<float>> head;
};

}  // namespace pliant
