// Choosing the next token from logits: the same logits, options, seed and position give the same
// token, whatever else runs and whatever was drawn before.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "kernels/kernels.h"

namespace pliant {

struct SamplerOptions {
    float temperature = 0;  // 0: the largest logit, the lowest id among equals
    int32_t top_k = 0;      // keep the k likeliest; 0: all
    float top_p = 1;        // then keep the likeliest whose probabilities add up to this; 1: all
    float min_p = 0;        // keep those with at least this part of the largest probability
    float repetition =
        1;  // logits of tokens seen anywhere: divided by it if positive, else multiplied
    float presence = 0;   // subtracted from logits of tokens of the answer, once
    float frequency = 0;  // subtracted from logits of tokens of the answer, for each time
};

// The tokens so far, of which those from `prompt` on are the answer, and additions to single
// logits.
struct SamplerContext {
    std::span<const int32_t> history;
    size_t prompt = 0;
    std::span<const std::pair<int32_t, float>> bias;
};

class Sampler {
  public:
    explicit Sampler(const std::string& isa) : kernels_(select_kernels(isa)) {}

    // Draws one token id, the same with any instruction set. `logits` is changed where penalties
    // and biases apply, and restored before returning. Biases and penalties come first, then the
    // temperature, min_p, top_k and top_p. Tokens less likely than e^-40 times the likeliest are
    // never drawn. O(vocabulary), in a few passes; memory for 4 bytes for each of the tokens
    // that are looked at one by one. Throws UsageError for options without meaning and for ids
    // outside the vocabulary, EngineError if no logit is finite.
    int32_t sample(std::span<float> logits, const SamplerOptions& options,
                   const SamplerContext& context, uint64_t seed, uint64_t position);

  private:
    int32_t draw(std::span<const float> logits, const SamplerOptions& options, uint64_t seed,
                 uint64_t position);
    // Token ids at distances from <= d < to; until the next call.
    std::span<int32_t> within(const LogitDistances& distances, float from, float to);

    const Kernels& kernels_;
    std::unique_ptr<int32_t[]> ids_;  // not set to anything: only what is used takes memory
    size_t ids_size_ = 0;
};

// A number in [0, 1) with 53 bits that depends on both arguments only: two rounds of SplitMix64
// (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014).
double uniform(uint64_t seed, uint64_t position);

}  // namespace pliant
