// The decoder: computes steps for any mix of prompt pieces and single tokens of several sequences.
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "kv.h"
#include "model.h"
#include "threads.h"
#include "weights.h"

namespace pliant {

// A matrix in one of its two forms.
struct Linear {
    int rows = 0, columns = 0;
    int coded = -1;              // index in Weights, or
    std::vector<float> f32;      // [rows][columns], or
    std::vector<uint16_t> bf16;  // [rows][columns]
    std::vector<float> bias;     // [rows] or empty
    bool present() const { return coded >= 0 || !f32.empty() || !bf16.empty(); }
};

struct Layer {
    Linear q, k, v, o, gate, up, down;
    std::array<const Linear*, 7> linears() const { return {&q, &k, &v, &o, &gate, &up, &down}; }
    std::vector<float> attn_norm, ffn_norm, attn_post_norm, ffn_post_norm, q_norm, k_norm;
};

// What a step gives for the tokens of a piece: logits, or states: the last hidden states, after the
// last norm.
enum class Want { kNothing, kLast, kAll, kStates };

// What one sequence adds in a step.
struct Piece {
    int sequence;
    int count;  // tokens
    Want want;
};

class Executor {
  public:
    // `chunk`: most tokens that are computed at once; it bounds the activations. Throws ModelError,
    // UsageError.
    Executor(ModelSpec model, int threads, const std::string& isa, int chunk);
    ~Executor();

    // Building. Names as in docs/format.md, section 3; wrong names or sizes are FormatErrors.
    void set_vector(const std::string& name, const float* values, size_t count);
    void set_plain(const std::string& name, const void* weight, bool bf16, int rows, int columns);
    void add_coded(const std::string& name, int rows, int columns, const std::vector<int>& blocks,
                   std::vector<uint16_t> order, const uint32_t* row_order, const float* row_scale,
                   const float* group_scale);
    void finish();  // checks that nothing is missing

    Weights weights;
    KvCache kv;

    const ModelSpec& model() const { return model_; }
    const char* isa() const { return kernels_->name; }
    int threads() const { return pool_.size(); }
    DutyCycle& duty() { return duty_; }

    // Appends the tokens of the pieces, one after the other in `tokens`, and writes the wanted
    // logits, [rows][vocab], and the wanted states to the rows of their tokens, [tokens][hidden];
    // if any logits are wanted there is room for one row more behind them. A sequence gets the same
    // bits whatever else is in the step, however it is cut into steps, with any threads. False: it
    // was given up, since somebody is in a hurry and it need not be `whole`; nothing has changed
    // then, apart from what the results hold. Throws EngineError or UsageError before anything has
    // changed.
    bool step(const std::vector<Piece>& pieces, const int32_t* tokens, float* logits, float* states,
              bool whole = true);
    // Whether steps that need not be whole end soon, without effect; from any thread.
    void hurry(bool on) { hurry_.store(on, std::memory_order_relaxed); }
    // Rows of logits that a step with these pieces gives.
    static size_t logit_rows(const std::vector<Piece>& pieces);

    uint64_t activation_bytes() const;
    uint64_t base_bytes() const;  // vectors and plain matrices

  private:
    friend class Forward;
    struct Buffers;
    Linear* find_linear(const std::string& name);
    std::vector<float>* find_vector(const std::string& name, size_t* count);
    const Linear& head() const { return model_.tied ? embed_ : head_; }

    ModelSpec model_;
    const Kernels* kernels_;
    ThreadPool pool_;
    DutyCycle duty_{pool_.size()};
    int chunk_;
    std::atomic<bool> hurry_{false};
    Linear embed_, head_;
    std::vector<Layer> layers_;
    std::vector<float> final_norm_;
    std::vector<Phase> phases_;  // of a chunk; the last ones for its rows of logits
    std::unique_ptr<Buffers> buffers_;
};

}  // namespace pliant
