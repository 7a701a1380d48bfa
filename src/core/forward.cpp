#include "forward.h"

#include <algorithm>
#include <bit>
#include <cmath>

namespace pliant {

namespace {

constexpr int kManyTokens = 32;  // from here on tasks take long
// Fewer tokens are not divided: each part of them decodes all plies for itself.
constexpr int kLeastPart = 48;

int supertiles(const Linear& linear) { return (linear.rows + kSupertile - 1) / kSupertile; }

constexpr int kLeastHead = 8, kMostHead = 64;  // supertiles of the head in a task

float bf16_to_float(uint16_t half) {
    return std::bit_cast<float>(static_cast<uint32_t>(half) << 16);
}

}  // namespace

Forward::Forward(Executor& executor, const std::vector<ChunkToken>& chunk, float* logits,
                 float* states, bool whole)
    : e_(executor),
      m_(executor.model_),
      kernels_(*executor.kernels_),
      b_(*executor.buffers_),
      chunk_(chunk),
      logits_(logits),
      states_(states),
      tokens_(static_cast<int>(chunk.size())),
      threads_(executor.pool_.size()),
      group_(m_.heads / m_.kv_heads),
      shares_(tokens_ == 1 ? 1 : std::min(threads_, kMostShares)),
      attention_shares_(std::min(threads_, kMostShares)),
      alone_(tokens_ == 1),
      whole_(whole) {
    for (int t = 0; t < tokens_; ++t) {
        if (at(chunk_, t).logits >= 0) wanted_.push_back(t);
        if (at(chunk_, t).state >= 0) stated_.push_back(t);
    }
    plan_attention();
}

bool Forward::run() {
    const size_t others = e_.phases_.size() - static_cast<size_t>(e_.chunk_);
    for (size_t i = 0; i < others + wanted_.size(); ++i) e_.phases_[i].reset();
    e_.pool_.run([this](int self) { work(self); });
    return ended_;
}

void Forward::work(int self) {
    Worker w{self, alone_ ? at(b_.own, self) : b_.input};
    if (alone_) w.made.assign(static_cast<size_t>(m_.kv_heads * query_blocks(m_)), -1);
    phase(w, tokens_, [&](int t) { embed(t); });
    // A thread that gives up leaves alone: whoever goes on does the tasks of all.
    for (int l = 0; l < m_.layers; ++l) {
        if (given_up()) return;
        attention(w, l);
        if (given_up()) return;
        feed_forward(w, l);
    }
    if (given_up()) return;
    results(w);
    if (self == 0) ended_ = true;
}

template <typename F>
void Forward::phase(Worker& w, int tasks, F&& task, int shares) {
    if (shares == 0) shares = shares_;
    e_.phases_[w.phase++].run(tasks, shares, w.self * shares / threads_, task);
}

// Inputs are prepared, then tasks use them: rows of matrices, for each part of the tokens. A single
// input is prepared by each thread for itself, when it has got a task: cheaper than to meet once
// more. prepare(first, count, keep): rows of the inputs; the thread with `keep` leaves the residual
// for the others. While a single token is multiplied, what its next input needs is fetched: the
// order of its channels, and the norm.
template <typename Prepare, typename Task>
void Forward::block(Worker& w, int inputs, Prepare&& prepare, int tasks, Task&& task,
                    const Linear& next, const Norm* next_norm) {
    if (!alone_) {
        // Neighbours go to one thread where there are enough of them: they are prepared together,
        // and their scales share a line of the cache.
        const int share = inputs / threads_;
        const int piece =
            share < kTogether / 2 ? std::max(share / 4, 1) : std::min(share, kTogether);
        phase(w, (inputs + piece - 1) / piece,
              [&](int i) { prepare(i * piece, std::min(piece, inputs - i * piece), true); });
        const int all = parts(inputs);
        phase(w, all * tasks, [&](int i) { task(part(inputs, all, i / tasks), i % tasks); });
        return;
    }
    bool ready = false;
    phase(w, tasks, [&](int i) {
        if (!ready) prepare(0, 1, i == 0);
        ready = true;
        if (next.coded >= 0) {
            const auto& order = e_.weights.order(e_.weights.matrix(next.coded).input);
            fetch_early(order.data(), order.size() * sizeof(uint16_t));
        }
        if (next_norm != nullptr) fetch_early(next_norm->data(), next_norm->size() * sizeof(float));
        task(Span{0, 1}, i);
    });
}

// A chunk is divided by its tokens first, as far as that is worth it, and then by rows of matrices:
// so what a thread has computed for its tokens is in the caches of its own core.
int Forward::parts(int tokens) const {
    const int least = (tokens + kMaxTokens - 1) / kMaxTokens;
    return std::max(least, std::min(threads_, tokens / kLeastPart));
}

Forward::Span Forward::part(int tokens, int parts, int index) {
    const auto begin = [&](int i) {  // no part is longer than kMaxTokens then
        return std::min((tokens * i / parts + kTogether - 1) / kTogether * kTogether, tokens);
    };
    return {begin(index), begin(index + 1)};
}

// Embedding and rotary tables.
void Forward::embed(int t) {
    const ChunkToken& token = at(chunk_, t);
    const Linear& table = e_.embed_;
    float* h = b_.residual[0].row(t);
    if (table.coded >= 0) {
        const CodedMatrix& matrix = e_.weights.matrix(table.coded);
        const int row =
            matrix.position.empty() ? token.id : static_cast<int>(at(matrix.position, token.id));
        const CodedBlock* block = &matrix.blocks.front();
        while (row >= block->first + block->rows) ++block;
        kernels_.coded_row(*block, e_.weights.levels, row - block->first,
                           e_.weights.order(matrix.input).data(), m_.hidden, h);
    } else {
        const size_t row = static_cast<size_t>(token.id) * static_cast<size_t>(m_.hidden);
        for (int i = 0; i < m_.hidden; ++i)
            h[i] = table.bf16.empty() ? table.f32[row + static_cast<size_t>(i)]
                                      : bf16_to_float(table.bf16[row + static_cast<size_t>(i)]);
    }
    for (int i = 0; i < m_.hidden; ++i) h[i] *= m_.embed_scale;
    for (size_t r = 0; r < m_.ropes.size(); ++r) {
        float *cosine = b_.cosine_row(r, t), *sine = b_.sine_row(r, t);
        for (int i = 0; i < m_.head_dim / 2; ++i) {
            const float angle = static_cast<float>(token.position) * at(m_.ropes[r].inv_freq, i);
            cosine[i] = std::cos(angle) * m_.ropes[r].scale;
            sine[i] = std::sin(angle) * m_.ropes[r].scale;
        }
    }
}

void Forward::attention(Worker& w, int l) {
    const Layer& layer = at(e_.layers_, l);
    // What the layer before has put out goes to the residual first.
    const Norm* after = l > 0 ? &at(e_.layers_, l - 1).ffn_post_norm : nullptr;
    const struct {
        const Linear* linear;
        const Rows* out;
    } targets[] = {{&layer.q, &b_.q}, {&layer.k, &b_.k}, {&layer.v, &b_.v}};
    const Tasks rows = divide(supertiles(layer.q) + supertiles(layer.k) + supertiles(layer.v));
    block(
        w, tokens_,
        [&](int first, int count, bool keep) {
            const float* h = advance(w, first, count, after, keep);
            code(w, first, count, h, b_.residual[0].stride, &layer.attn_norm,
                 {&layer.q, &layer.k, &layer.v});
        },
        rows.count,
        [&](Span tokens, int i) {
            int first = rows.first(i), last = rows.last(i);
            for (const auto& [linear, out] : targets) {
                const int count = supertiles(*linear);
                multiply(w, *linear, tokens, std::max(first, 0), std::min(last, count), *out);
                first -= count, last -= count;
            }
        },
        layer.o, nullptr);
    if (after != nullptr && alone_) w.residual ^= 1;

    if (!singles_) {
        // The keys of a page have a channel of all its tokens in one line of the cache.
        phase(w, static_cast<int>(new_.size()) * m_.kv_heads, [&](int i) {
            const NewTokens& run = at(new_, i / m_.kv_heads);
            append(l, run.first, run.count, i % m_.kv_heads);
        });
    }
    if (!singles_ && !full_.empty())
        phase(w, static_cast<int>(full_.size()) * m_.kv_heads,
              [&](int i) { code_page(l, i % m_.kv_heads, at(full_, i / m_.kv_heads)); });
    phase(
        w, static_cast<int>(tasks_.size()), [&](int i) { attend(w, l, at(tasks_, i)); },
        attention_shares_);

    const Tasks out = divide(supertiles(layer.o));
    block(
        w, tokens_,
        [&](int first, int count, bool) {
            code(w, first, count, b_.x.row(first), b_.x.stride, nullptr, {&layer.o});
        },
        out.count,
        [&](Span tokens, int i) {
            multiply(w, layer.o, tokens, out.first(i), out.last(i), b_.out);
        },
        layer.gate, &layer.ffn_norm);
}

void Forward::feed_forward(Worker& w, int l) {
    const Layer& layer = at(e_.layers_, l);
    // A task has as many rows of both matrices.
    const Tasks wide = divide(supertiles(layer.gate));
    block(
        w, tokens_,
        [&](int first, int count, bool keep) {
            const float* h = advance(w, first, count, &layer.attn_post_norm, keep);
            code(w, first, count, h, b_.residual[0].stride, &layer.ffn_norm,
                 {&layer.gate, &layer.up});
        },
        wide.count,
        [&](Span tokens, int i) { multiply_gated(w, layer, tokens, wide.first(i), wide.last(i)); },
        layer.down, nullptr);
    if (alone_) w.residual ^= 1;

    const Tasks out = divide(supertiles(layer.down));
    const Layer* const next = l + 1 < m_.layers ? &at(e_.layers_, l + 1) : nullptr;
    block(
        w, tokens_,
        [&](int first, int count, bool) {
            code(w, first, count, b_.gate.row(first), b_.gate.stride, nullptr, {&layer.down});
        },
        out.count,
        [&](Span tokens, int i) {
            multiply(w, layer.down, tokens, out.first(i), out.last(i), b_.out);
        },
        next != nullptr ? next->q : e_.head(),
        next != nullptr ? &next->attn_norm : &e_.final_norm_);
}

// The last norm, and logits of the tokens for which they are wanted: these are gathered to the
// front of the inputs, and have neighbouring rows of the results.
void Forward::results(Worker& w) {
    const Norm* after = &e_.layers_.back().ffn_post_norm;
    const auto last_norm = [&](int t, bool keep, float* to) {
        kernels_.rms_norm(advance(w, t, after, keep && alone_), e_.final_norm_.data(), m_.hidden,
                          m_.norm_eps, to);
    };
    if (!stated_.empty())
        phase(w, static_cast<int>(stated_.size()), [&](int i) {
            const int t = at(stated_, i);
            last_norm(t, true,
                      states_ + static_cast<size_t>(at(chunk_, t).state) *
                                    static_cast<size_t>(m_.hidden));
        });
    if (wanted_.empty()) return;
    const std::vector<uint32_t>* places = nullptr;  // of the rows of the head, if in another order
    if (e_.head().coded >= 0) places = &e_.weights.matrix(e_.head().coded).position;
    if (places != nullptr && places->empty()) places = nullptr;
    const int count = static_cast<int>(wanted_.size()), all = supertiles(e_.head());
    const int piece = std::clamp(all / (8 * threads_), kLeastHead, kMostHead);
    const size_t vocab = static_cast<size_t>(m_.vocab);
    float* const logits = logits_ + static_cast<size_t>(at(chunk_, wanted_.front()).logits) * vocab;
    // In another order a row is made where the next one belongs, and put in order on its way back.
    float* const to = places != nullptr ? logits + vocab : logits;
    block(
        w, count,
        [&](int first, int some, bool keep) {
            for (int i = first; i < first + some; ++i) last_norm(at(wanted_, i), keep, w.in.row(i));
            code(w, first, some, w.in.row(first), w.in.x.stride, nullptr, {&e_.head()});
        },
        (all + piece - 1) / piece,
        [&](Span rows, int i) {
            head_rows(w, rows, i * piece, std::min((i + 1) * piece, all), to);
        },
        e_.head(), nullptr);
    if (places == nullptr) return;
    // Gathered, not scattered: threads that write to the same lines of the cache wait for each
    // other.
    constexpr int kPiece = 8192;
    for (int r = 0; r < count; ++r) {
        float* const row = logits + static_cast<size_t>(r) * vocab;
        const float* const from = row + vocab;
        phase(w, (m_.vocab + kPiece - 1) / kPiece, [&](int i) {
            const int last = std::min((i + 1) * kPiece, m_.vocab);
            for (int id = i * kPiece; id < last; ++id) row[id] = from[at(*places, id)];
        });
    }
}

// The residual of a token with what the last block has put out, through its norm if it has one;
// without `after` nothing was put out. `keep`: for the others as well; otherwise the result is this
// thread's own.
const float* Forward::advance(const Worker& w, int t, const Norm* after, bool keep) {
    const float* before = b_.residual[w.residual].row(t);
    if (after == nullptr) return before;
    float* h = keep ? b_.residual[1 - w.residual].row(t) : at(b_.own_residual, w.self).data();
    const float* y = b_.out.row(t);
    if (!after->empty()) {
        kernels_.rms_norm(y, after->data(), m_.hidden, m_.norm_eps, h);
        y = h;
    }
    kernels_.add(before, y, m_.hidden, h);
    return h;
}

// The same for neighbouring tokens. With many tokens nobody else reads the residual of these, so it
// is changed where it is.
const float* Forward::advance(const Worker& w, int first, int count, const Norm* after, bool keep) {
    if (alone_) return advance(w, first, after, keep);
    const Rows& h = b_.residual[w.residual];
    for (int t = first; after != nullptr && t < first + count; ++t) {
        float* y = b_.out.row(t);
        if (t + 1 < first + count) {  // what other threads have written
            fetch(h.row(t + 1), m_.hidden);
            fetch(y + b_.out.stride, m_.hidden);
        }
        if (!after->empty()) kernels_.rms_norm(y, after->data(), m_.hidden, m_.norm_eps, y);
        kernels_.add(h.row(t), y, m_.hidden, h.row(t));
    }
    return h.row(first);
}

// Makes x, [count][stride], or its norm, the inputs [first, first + count) of the matrices that
// read them.
void Forward::code(const Worker& w, int first, int count, const float* x, size_t stride,
                   const Norm* norm, std::initializer_list<const Linear*> users) {
    const Linear* coded = nullptr;  // they share the channel order
    bool plain = false;
    for (const Linear* user : users) {
        if (user->coded < 0)
            plain = true;
        else
            coded = user;
    }
    if (plain && x != w.in.row(first)) {
        for (int i = 0; i < count; ++i) {
            const float* from = x + static_cast<size_t>(i) * stride;
            float* to = w.in.row(first + i);
            const int columns = users.begin()[0]->columns;
            if (norm != nullptr)
                kernels_.rms_norm(from, norm->data(), columns, m_.norm_eps, to);
            else
                std::copy_n(from, columns, to);
        }
    }
    if (coded == nullptr) return;
    const CodedMatrix& matrix = e_.weights.matrix(coded->coded);
    const Prepared prepared = w.in.prepared(matrix.groups);
    kernels_.prepare({x, stride, count, norm == nullptr ? nullptr : norm->data(), m_.norm_eps,
                      e_.weights.order(matrix.input).data(), matrix.columns,
                      e_.weights.narrow(matrix.input), e_.weights.wide(matrix.input), &prepared,
                      first, at(b_.together, w.self).data()});
}

// Supertiles [first, last) of a matrix, if any, for some inputs: to out[tokens.count()][stride],
// which begins with the first of these rows.
void Forward::multiply(const Worker& w, const Linear& linear, Span tokens, int first, int last,
                       float* out, size_t stride) {
    if (first >= last) return;
    const int begin = first * kSupertile, end = std::min(last * kSupertile, linear.rows);
    if (linear.coded >= 0) {
        const CodedMatrix& matrix = e_.weights.matrix(linear.coded);
        const Prepared prepared = w.in.prepared(matrix.groups).from(tokens.first);
        for (const CodedBlock& block : matrix.blocks) {
            const int from = std::max(first - block.first / kSupertile, 0);
            const int to = std::min(last - block.first / kSupertile, block.padded / kSupertile);
            if (from < to)
                kernels_.coded_product({&block, &e_.weights.levels, &prepared, tokens.count(), from,
                                        to, out + (block.first + from * kSupertile - begin), stride,
                                        at(b_.scratch, w.self).data()});
        }
    } else {
        const bool bf16 = !linear.bf16.empty();
        kernels_.plain_product({bf16 ? static_cast<const void*>(linear.bf16.data())
                                     : static_cast<const void*>(linear.f32.data()),
                                bf16, linear.columns, w.in.row(tokens.first), w.in.x.stride,
                                tokens.count(), begin, end, out, stride});
    }
    if (!linear.bias.empty())
        for (int t = 0; t < tokens.count(); ++t)
            for (int r = begin; r < end; ++r)
                out[static_cast<size_t>(t) * stride + static_cast<size_t>(r - begin)] +=
                    at(linear.bias, r);
}

void Forward::multiply(const Worker& w, const Linear& linear, Span tokens, int first, int last,
                       const Rows& out) {
    multiply(w, linear, tokens, first, last, out.row(tokens.first) + first * kSupertile,
             out.stride);
}

// The gated rows of the feed-forward layer. One of the two factors is in nobody else's memory.
void Forward::multiply_gated(const Worker& w, const Layer& layer, Span tokens, int first,
                             int last) {
    const int most = std::max(kOwnResults / tokens.count(), 1);
    float* const up = at(b_.own_results, w.self).data();
    for (int begin = first; begin < last; begin += most) {
        const int end = std::min(begin + most, last), row = begin * kSupertile;
        const size_t stride = static_cast<size_t>((end - begin) * kSupertile);
        multiply(w, layer.gate, tokens, begin, end, b_.gate);
        multiply(w, layer.up, tokens, begin, end, up, stride);
        for (int t = 0; t < tokens.count(); ++t) {
            float* gate = b_.gate.row(tokens.first + t) + row;
            kernels_.gate(gate, up + static_cast<size_t>(t) * stride,
                          std::min(end * kSupertile, m_.ffn) - row, m_.activation, gate);
        }
    }
}

// With few tokens a task for each thread: shorter ones read shorter streams, and hardly even out
// what others take of a processor. With many a task takes long, and more of them leave less to wait
// for.
Forward::Tasks Forward::divide(int supertiles) const {
    const int count = tokens_ < kManyTokens ? threads_ : std::max(8 * threads_ / parts(tokens_), 1);
    return {supertiles, std::min(count, supertiles)};
}

// Supertiles of the head for some of the rows that are wanted, [rows][vocab] in the order in which
// they are stored.
void Forward::head_rows(const Worker& w, Span rows, int first, int last, float* logits) {
    const int whole = m_.vocab / kSupertile;
    const size_t vocab = static_cast<size_t>(m_.vocab);
    logits += static_cast<size_t>(rows.first) * vocab;
    multiply(w, e_.head(), rows, first, std::min(last, whole), logits + first * kSupertile, vocab);
    const int begin = first * kSupertile, end = std::min(last * kSupertile, m_.vocab);
    if (last > whole) {  // kernels write whole supertiles
        float rest[kMaxTokens * kSupertile];
        multiply(w, e_.head(), rows, whole, last, rest, kSupertile);
        for (int i = 0; i < rows.count(); ++i)
            std::copy_n(rest + i * kSupertile, end - whole * kSupertile,
                        logits + static_cast<size_t>(i) * vocab + whole * kSupertile);
    }
    if (m_.logit_softcap > 0.0f)
        for (int i = 0; i < rows.count(); ++i)
            kernels_.softcap(logits + static_cast<size_t>(i) * vocab + begin, end - begin,
                             m_.logit_softcap);
}

}  // namespace pliant
