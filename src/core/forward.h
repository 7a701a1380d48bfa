// One chunk of tokens on its way through the decoder.
//
// The work is a row of phases (threads.h). All threads walk along it and take tasks: rows of
// matrices, tokens, or heads. Every number is computed by one thread, in an order that depends on
// nothing but its own sequence.
#pragma once

#include <algorithm>
#include <vector>

#include "buffers.h"
#include "executor.h"

namespace pliant {

template <typename T>
auto& at(T& items, int index) {
    return items[static_cast<size_t>(index)];
}

struct ChunkToken {
    int id, sequence, position;
    int logits, state;  // rows of the results, or -1
};

class Forward {
  public:
    // `logits` [rows][vocab] and `states` [rows][hidden] take what the tokens ask for. The room in
    // the KV cache is there. Unless it is to be `whole`, it may be given up (Executor::hurry).
    Forward(Executor& executor, const std::vector<ChunkToken>& chunk, float* logits, float* states,
            bool whole);
    // False: it was given up.
    bool run();

  private:
    using Norm = std::vector<float>;

    // What one thread has.
    struct Worker {
        int self;
        InputBuffer& in;             // of matrices: everybody's, or its own
        int residual = 0;            // which of the two is up to date
        size_t phase = 0;            // the next one
        std::vector<int> made = {};  // the layer of which its own queries are
        // Pages of one task.
        std::vector<const uint16_t*> keys = {}, values = {};
    };
    // Queries of one sequence that share a KV head, and the parts of the pages that they look at. A
    // query is token · group + head in the group.
    struct AttentionTask {
        int kv_head, first, last;
        int part;  // or -1: all
    };

    // Tokens [first, last).
    struct Span {
        int first, last;
        int count() const { return last - first; }
    };
    // Rows of matrices, in supertiles, in tasks of nearly one size, larger ones first.
    struct Tasks {
        int supertiles, count;
        int first(int task) const {
            return task * (supertiles / count) + std::min(task, supertiles % count);
        }
        int last(int task) const { return first(task + 1); }
    };

    // Whose pages are looked at, and by which queries.
    struct Pages {
        int layer, kv_head, sequence, token, queries;
        const float* const* q;
        const int* positions;
        int window;
        bool alone;
        const QueryRoom* room;
    };
    // A page that this chunk fills: it is coded, layer by layer.
    struct FullPage {
        int sequence, page;
    };

    // Tokens of this chunk that go to one page.
    struct NewTokens {
        int first, count;
    };

    void plan_attention();
    bool given_up() const { return !whole_ && e_.hurry_.load(std::memory_order_relaxed); }
    void work(int self);
    template <typename F>
    void phase(Worker& w, int tasks, F&& task, int shares = 0);
    template <typename Prepare, typename Task>
    void block(Worker& w, int inputs, Prepare&& prepare, int tasks, Task&& task, const Linear& next,
               const Norm* next_norm);

    void embed(int t);
    void attention(Worker& w, int l);
    void feed_forward(Worker& w, int l);
    void results(Worker& w);

    const float* advance(const Worker& w, int t, const Norm* after, bool keep);
    const float* advance(const Worker& w, int first, int count, const Norm* after, bool keep);
    void code(const Worker& w, int first, int count, const float* x, size_t stride,
              const Norm* norm, std::initializer_list<const Linear*> users);
    void multiply(const Worker& w, const Linear& linear, Span tokens, int first, int last,
                  float* out, size_t stride);
    void multiply(const Worker& w, const Linear& linear, Span tokens, int first, int last,
                  const Rows& out);
    void multiply_gated(const Worker& w, const Layer& layer, Span tokens, int first, int last);
    int parts(int tokens) const;
    static Span part(int tokens, int parts, int index);
    Tasks divide(int supertiles) const;
    void append(int l, int first, int count, int kv_head);
    void load_query(int l, int t, int head, float* to) const;
    const QueryRoom& load_queries(Worker& w, int l, const AttentionTask& task);
    void attend(Worker& w, int l, const AttentionTask& task);
    void fetch_first(int l, const AttentionTask& task) const;
    int coded_pages(int sequence, int position) const;
    void attend_coded(Worker& w, const Pages& of, int begin, int end, const Attended* drawn);
    void expect(const Worker& w, const Pages& of, CodedAttention& a) const;
    void attend_exact(Worker& w, const Pages& of, int begin, int end, const Attended* drawn);
    void with_newest(int l, int kv_head, const Attended& sum, const Attended& newest) const;
    void code_page(int l, int kv_head, const FullPage& full);
    void end_part(int l, const AttentionTask& task, int parts);
    void head_rows(const Worker& w, Span rows, int first, int last, float* logits);

    Executor& e_;
    const ModelSpec& m_;
    const Kernels& kernels_;
    Executor::Buffers& b_;
    const std::vector<ChunkToken>& chunk_;
    float *logits_, *states_;
    int tokens_, threads_, group_;
    // Of the tasks of a phase: one of a single token, since who takes the first task of a block
    // must take it before others. Attention is divided in any case.
    int shares_, attention_shares_;
    bool alone_;  // one token: every thread prepares inputs for itself
    const bool whole_;
    bool ended_ = false;
    bool singles_;  // every sequence has one token: who attends appends its keys and values
    std::vector<int> wanted_, stated_;  // tokens whose logits, or states, are asked for
    std::vector<AttentionTask> tasks_;
    std::vector<NewTokens> new_;
    // Without a ladder these are empty. Slots of the pages of all sequences, and where those of a
    // token's sequence begin.
    std::vector<FullPage> full_;
    std::vector<const uint8_t*> slots_;
    std::vector<SlotMap> maps_;
    std::vector<size_t> first_slot_;
};

}  // namespace pliant
