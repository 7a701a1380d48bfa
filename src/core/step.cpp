// One step of the decoder, as one parallel region: every thread walks through all layers and meets
// the others at barriers. Work is divided by rows of matrices, by tokens, or by heads; every number
// is computed by one thread, in an order that depends on nothing but its own sequence.
#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>

#include "buffers.h"
#include "error.h"
#include "executor.h"

namespace pliant {

// The tokens of one chunk.
struct Executor::Batch {
    struct Token {
        int id, sequence, position, row;  // row: of the logits, or -1
    };
    std::vector<Token> tokens;
    int size() const { return static_cast<int>(tokens.size()); }
};

namespace {

struct Range {
    int first, last;
};
float bf16_to_float(uint16_t half) {
    return std::bit_cast<float>(static_cast<uint32_t>(half) << 16);
}

// The share of thread `index` of `count` things.
Range share(int count, int index, int threads) {
    return {static_cast<int>(static_cast<int64_t>(count) * index / threads),
            static_cast<int>(static_cast<int64_t>(count) * (index + 1) / threads)};
}

}  // namespace

void Executor::step(const std::vector<Piece>& pieces, const int32_t* tokens, float* logits) {
    if (!buffers_) throw EngineError("the executor is not finished");
    int pages = 0;
    size_t at = 0;
    std::vector<int> seen;
    for (const Piece& piece : pieces) {
        if (piece.count < 1) throw UsageError("a sequence must add at least one token to a step");
        if (std::find(seen.begin(), seen.end(), piece.sequence) != seen.end())
            throw UsageError("a sequence is in a step twice");
        seen.push_back(piece.sequence);
        const int length = kv.length(piece.sequence);
        if (piece.count > model_.context - length)
            throw EngineError("sequence " + std::to_string(piece.sequence) + " has " +
                              std::to_string(length) + " tokens and cannot take " +
                              std::to_string(piece.count) + " more: the model's context is " +
                              std::to_string(model_.context));
        pages += kv.pages_needed(piece.sequence, piece.count);
        for (int i = 0; i < piece.count; ++i, ++at)
            if (tokens[at] < 0 || tokens[at] >= model_.vocab)
                throw UsageError("token " + std::to_string(tokens[at]) +
                                 " is not in the vocabulary of " + std::to_string(model_.vocab));
    }
    if (pages > kv.pages_free())
        throw EngineError("the step needs " + std::to_string(pages) + " pages of the KV cache, " +
                          std::to_string(kv.pages_free()) + " of " +
                          std::to_string(kv.pages_total()) +
                          " are free: close a sequence or give more memory to the context");

    Batch batch;
    at = 0;
    int row = 0;
    for (const Piece& piece : pieces) {
        const int begin = kv.length(piece.sequence);
        kv.extend(piece.sequence, piece.count);
        for (int i = 0; i < piece.count; ++i, ++at) {
            const bool wanted = piece.want == 2 || (piece.want == 1 && i + 1 == piece.count);
            batch.tokens.push_back({tokens[at], piece.sequence, begin + i, wanted ? row++ : -1});
            if (batch.size() == chunk_) {
                compute(batch, logits);
                batch.tokens.clear();
            }
        }
    }
    if (batch.size() > 0) compute(batch, logits);
}

void Executor::compute(const Batch& batch, float* logits) {
    const ModelSpec& m = model_;
    const Kernels& kernels = *kernels_;
    Buffers& b = *buffers_;
    const int tokens = batch.size(), threads = pool_.size();
    const int group_size = m.heads / m.kv_heads, half = m.head_dim / 2;
    const bool post_norms =
        !layers_.front().attn_post_norm.empty() || !layers_.front().ffn_post_norm.empty();
    // With fewer tokens than threads each thread prepares inputs for itself: cheaper than one more
    // barrier.
    const bool alone = tokens == 1 && threads > 1 && !post_norms;
    const Linear& head = m.tied ? embed_ : head_;
    std::vector<int> wanted;
    for (int t = 0; t < tokens; ++t)
        if (batch.tokens[static_cast<size_t>(t)].row >= 0) wanted.push_back(t);

    // Attention is cut into tasks of neighbouring queries that share a KV head: as large as 8,
    // smaller when few.
    int per_task = kMaxQueries;
    while (per_task > 1 &&
           m.kv_heads * ((tokens * group_size + per_task - 1) / per_task) < 2 * threads)
        per_task = (per_task + 1) / 2;
    struct Task {
        int kv_head, first, last;  // queries: token · group_size + head in the group
    };
    std::vector<Task> tasks;
    for (int t = 0; t < tokens;) {
        int end = t;  // of the tokens of this sequence
        while (end < tokens && batch.tokens[static_cast<size_t>(end)].sequence ==
                                   batch.tokens[static_cast<size_t>(t)].sequence)
            ++end;
        for (int h = 0; h < m.kv_heads; ++h)
            for (int q = t * group_size; q < end * group_size; q += per_task)
                tasks.push_back({h, q, std::min(q + per_task, end * group_size)});
        t = end;
    }
    // Late tokens see more: they come first, so that no thread is left with a long task at the end.
    std::reverse(tasks.begin(), tasks.end());
    std::vector<std::atomic<int>> next_task(static_cast<size_t>(m.layers));

    pool_.run([&](int self) {
        InputBuffer& in = alone ? b.own[static_cast<size_t>(self)] : b.input;
        const Range mine = alone ? Range{0, 1} : share(tokens, self, threads);
        const auto sync = [&] { pool_.barrier(); };
        const auto sync_inputs = [&] {
            if (!alone) pool_.barrier();
        };
        // Codes row t of the inputs for the coded matrices among `users`.
        const auto prepare = [&](int t, std::initializer_list<const Linear*> users) {
            for (const Linear* user : users)
                if (user->coded >= 0) {
                    const CodedMatrix& matrix = weights.matrix(user->coded);
                    Prepared prepared = in.prepared(matrix.groups);
                    kernels.prepare(in.row(t), weights.order(matrix.input).data(), matrix.columns,
                                    weights.wide(matrix.input), &prepared, t);
                    return;  // they share the input
                }
        };
        // This thread's rows of a matrix, for the first `count` inputs.
        const auto product = [&](const Linear& linear, int count, const OutputBuffer& out) {
            const Range tiles = share((linear.rows + kSupertile - 1) / kSupertile, self, threads);
            const Range rows{tiles.first * kSupertile,
                             std::min(tiles.last * kSupertile, linear.rows)};
            if (rows.first >= rows.last) return rows;
            if (linear.coded >= 0) {
                const CodedMatrix& matrix = weights.matrix(linear.coded);
                const Prepared prepared = in.prepared(matrix.groups);
                for (const CodedBlock& block : matrix.blocks) {
                    const int first = std::max(tiles.first - block.first / kSupertile, 0);
                    const int last =
                        std::min(tiles.last - block.first / kSupertile, block.padded / kSupertile);
                    if (first >= last) continue;
                    kernels.coded_product({&block, &weights.levels, &prepared, count, first, last,
                                           out.data.data() + block.first + first * kSupertile,
                                           out.stride,
                                           b.scratch[static_cast<size_t>(self)].data()});
                }
            } else {
                const bool bf16 = !linear.bf16.empty();
                kernels.plain_product({bf16 ? static_cast<const void*>(linear.bf16.data())
                                            : static_cast<const void*>(linear.f32.data()),
                                       bf16, linear.columns, in.x.data(), in.stride, count,
                                       rows.first, rows.last, out.data.data() + rows.first,
                                       out.stride});
            }
            if (!linear.bias.empty())
                for (int t = 0; t < count; ++t)
                    for (int r = rows.first; r < rows.last; ++r)
                        out.row(t)[r] += linear.bias[static_cast<size_t>(r)];
            return rows;
        };
        // The output of a block goes to the residual, through a norm if there is one.
        const auto add_rows = [&](Range rows) {
            for (int t = 0; t < tokens; ++t) {
                float* h = b.residual.row(t);
                const float* y = b.out.row(t);
                for (int r = rows.first; r < rows.last; ++r) h[r] += y[r];
            }
        };
        const auto add_normed = [&](int t, const std::vector<float>& norm) {
            float* y = b.out.row(t);
            kernels.rms_norm(y, norm.data(), m.hidden, m.norm_eps, y);
            float* h = b.residual.row(t);
            for (int r = 0; r < m.hidden; ++r) h[r] += y[r];
        };

        std::vector<const uint16_t*> key_pages, value_pages;

        // Embedding and rotary tables.
        const Range tokens_here = share(tokens, self, threads);
        for (int t = tokens_here.first; t < tokens_here.last; ++t) {
            const Batch::Token& token = batch.tokens[static_cast<size_t>(t)];
            float* h = b.residual.row(t);
            if (embed_.coded >= 0) {
                const CodedMatrix& matrix = weights.matrix(embed_.coded);
                int row = token.id;
                if (!matrix.position.empty())
                    row = static_cast<int>(matrix.position[static_cast<size_t>(row)]);
                const CodedBlock* block = &matrix.blocks.front();
                while (row >= block->first + block->rows) ++block;
                kernels.coded_row(*block, weights.levels, row - block->first,
                                  weights.order(matrix.input).data(), m.hidden, h);
            } else {
                const size_t row = static_cast<size_t>(token.id) * static_cast<size_t>(m.hidden);
                for (int i = 0; i < m.hidden; ++i)
                    h[i] = embed_.bf16.empty()
                               ? embed_.f32[row + static_cast<size_t>(i)]
                               : bf16_to_float(embed_.bf16[row + static_cast<size_t>(i)]);
            }
            for (int i = 0; i < m.hidden; ++i) h[i] *= m.embed_scale;
            for (size_t r = 0; r < m.ropes.size(); ++r) {
                const size_t table = (r * static_cast<size_t>(tokens) + static_cast<size_t>(t)) *
                                     static_cast<size_t>(half);
                for (int i = 0; i < half; ++i) {
                    const float angle = static_cast<float>(token.position) *
                                        m.ropes[r].inv_freq[static_cast<size_t>(i)];
                    b.cosine.data()[table + static_cast<size_t>(i)] =
                        std::cos(angle) * m.ropes[r].scale;
                    b.sine.data()[table + static_cast<size_t>(i)] =
                        std::sin(angle) * m.ropes[r].scale;
                }
            }
        }
        sync();

        for (int l = 0; l < m.layers; ++l) {
            const Layer& layer = layers_[static_cast<size_t>(l)];
            for (int t = mine.first; t < mine.last; ++t) {
                kernels.rms_norm(b.residual.row(t), layer.attn_norm.data(), m.hidden, m.norm_eps,
                                 in.row(t));
                prepare(t, {&layer.q, &layer.k, &layer.v});
            }
            sync_inputs();
            product(layer.q, tokens, b.q);
            product(layer.k, tokens, b.k);
            product(layer.v, tokens, b.v);
            sync();

            // Queries and keys are normed and rotated; keys and values go to their pages.
            const Range pairs = share(tokens * m.kv_heads, self, threads);
            for (int pair = pairs.first; pair < pairs.last; ++pair) {
                const int t = pair / m.kv_heads, head_index = pair % m.kv_heads;
                const Batch::Token& token = batch.tokens[static_cast<size_t>(t)];
                const size_t table = (static_cast<size_t>(m.layer_rope[static_cast<size_t>(l)]) *
                                          static_cast<size_t>(tokens) +
                                      static_cast<size_t>(t)) *
                                     static_cast<size_t>(half);
                const float* cosine = b.cosine.data() + table;
                const float* sine = b.sine.data() + table;
                for (int g = 0; g < group_size; ++g) {
                    float* q = b.q.row(t) + (head_index * group_size + g) * m.head_dim;
                    if (!layer.q_norm.empty())
                        kernels.rms_norm(q, layer.q_norm.data(), m.head_dim, m.norm_eps, q);
                    kernels.rope(q, cosine, sine, m.head_dim);
                    for (int i = 0; i < m.head_dim; ++i) q[i] *= m.attn_scale;
                }
                float* k = b.k.row(t) + head_index * m.head_dim;
                if (!layer.k_norm.empty())
                    kernels.rms_norm(k, layer.k_norm.data(), m.head_dim, m.norm_eps, k);
                kernels.rope(k, cosine, sine, m.head_dim);
                const int page = token.position / kPageTokens, slot = token.position % kPageTokens;
                uint16_t coded[kMaxHeadDim];
                kernels.to_half(k, m.head_dim, coded);
                uint16_t* keys = kv.keys(token.sequence, page, l, head_index);
                for (int i = 0; i < m.head_dim; ++i) keys[i * kPageTokens + slot] = coded[i];
                kernels.to_half(
                    b.v.row(t) + head_index * m.head_dim, m.head_dim,
                    kv.values(token.sequence, page, l, head_index) + slot * kv.value_stride());
            }
            sync();

            alignas(64) float out[kMaxQueries][kMaxHeadDim];
            for (size_t i = 0;
                 (i = static_cast<size_t>(next_task[static_cast<size_t>(l)]++)) < tasks.size();) {
                const Task& task = tasks[i];
                const float* queries[kMaxQueries];
                float* outs[kMaxQueries];
                int positions[kMaxQueries];
                int last_position = 0, sequence = 0;
                for (int q = task.first; q < task.last; ++q) {
                    const int t = q / group_size, slot = q - task.first;
                    const int head_index = task.kv_head * group_size + q % group_size;
                    queries[slot] = b.q.row(t) + head_index * m.head_dim;
                    outs[slot] = out[slot];
                    positions[slot] = batch.tokens[static_cast<size_t>(t)].position;
                    sequence = batch.tokens[static_cast<size_t>(t)].sequence;
                    last_position = std::max(last_position, positions[slot]);
                }
                key_pages.clear();
                value_pages.clear();
                for (int page = 0; page <= last_position / kPageTokens; ++page) {
                    key_pages.push_back(kv.keys(sequence, page, l, task.kv_head));
                    value_pages.push_back(kv.values(sequence, page, l, task.kv_head));
                }
                kernels.attend({m.head_dim, task.last - task.first, queries, positions,
                                m.layer_window[static_cast<size_t>(l)], key_pages.data(),
                                value_pages.data(), m.attn_softcap, outs});
                for (int q = task.first; q < task.last; ++q) {
                    const int t = q / group_size;
                    const int head_index = task.kv_head * group_size + q % group_size;
                    std::copy_n(out[q - task.first], m.head_dim,
                                b.input.row(t) + head_index * m.head_dim);
                }
            }
            sync();

            if (alone) std::copy_n(b.input.row(0), m.heads * m.head_dim, in.row(0));
            for (int t = mine.first; t < mine.last; ++t) prepare(t, {&layer.o});
            sync_inputs();
            const Range o_rows = product(layer.o, tokens, b.out);
            if (layer.attn_post_norm.empty()) add_rows(o_rows);
            sync();

            for (int t = mine.first; t < mine.last; ++t) {
                if (!layer.attn_post_norm.empty()) add_normed(t, layer.attn_post_norm);
                kernels.rms_norm(b.residual.row(t), layer.ffn_norm.data(), m.hidden, m.norm_eps,
                                 in.row(t));
                prepare(t, {&layer.gate, &layer.up});
            }
            sync_inputs();
            const Range ffn_rows = product(layer.gate, tokens, b.gate);
            product(layer.up, tokens, b.up);
            for (int t = 0; t < tokens; ++t)
                kernels.gate(b.gate.row(t) + ffn_rows.first, b.up.row(t) + ffn_rows.first,
                             std::max(ffn_rows.last - ffn_rows.first, 0), m.activation,
                             b.gate.row(t) + ffn_rows.first);
            sync();

            for (int t = mine.first; t < mine.last; ++t) {
                std::copy_n(b.gate.row(t), m.ffn, in.row(t));
                prepare(t, {&layer.down});
            }
            sync_inputs();
            const Range down_rows = product(layer.down, tokens, b.out);
            if (layer.ffn_post_norm.empty()) add_rows(down_rows);
            sync();
            if (!layer.ffn_post_norm.empty()) {
                for (int t = mine.first; t < mine.last; ++t) add_normed(t, layer.ffn_post_norm);
                if (l + 1 == m.layers) sync();
            }
        }

        // Logits, only of the tokens for which they are wanted: gathered to the front of the
        // inputs.
        if (wanted.empty()) return;
        const int rows = static_cast<int>(wanted.size());
        const bool own_inputs = alone && rows == 1;
        InputBuffer& last = own_inputs ? in : b.input;
        const Range final_rows = own_inputs ? Range{0, 1} : share(rows, self, threads);
        Prepared prepared{};
        if (head.coded >= 0) prepared = last.prepared(weights.matrix(head.coded).groups);
        for (int i = final_rows.first; i < final_rows.last; ++i) {
            kernels.rms_norm(b.residual.row(wanted[static_cast<size_t>(i)]), final_norm_.data(),
                             m.hidden, m.norm_eps, last.row(i));
            if (head.coded >= 0) {
                const CodedMatrix& matrix = weights.matrix(head.coded);
                kernels.prepare(last.row(i), weights.order(matrix.input).data(), matrix.columns,
                                weights.wide(matrix.input), &prepared, i);
            }
        }
        if (!own_inputs) sync();
        // Pieces of rows are computed into a small buffer and then scattered to their places.
        float* piece = b.head[static_cast<size_t>(self)].data();
        const auto scatter = [&](int first, int count, const uint32_t* order) {
            for (int i = 0; i < rows; ++i) {
                const size_t row = static_cast<size_t>(
                    batch.tokens[static_cast<size_t>(wanted[static_cast<size_t>(i)])].row);
                float* to = logits + row * static_cast<size_t>(m.vocab);
                float* from = piece + static_cast<size_t>(i) * kHeadRows;
                if (m.logit_softcap > 0.0f) kernels.softcap(from, count, m.logit_softcap);
                if (order == nullptr)
                    std::copy_n(from, count, to + first);
                else
                    for (int r = 0; r < count; ++r) to[order[first + r]] = from[r];
            }
        };
        const Range tiles = share((m.vocab + kSupertile - 1) / kSupertile, self, threads);
        if (head.coded >= 0) {
            const CodedMatrix& matrix = weights.matrix(head.coded);
            const uint32_t* order = matrix.row_order.empty() ? nullptr : matrix.row_order.data();
            for (const CodedBlock& block : matrix.blocks) {
                const int begin = std::max(tiles.first - block.first / kSupertile, 0);
                const int end =
                    std::min(tiles.last - block.first / kSupertile, block.padded / kSupertile);
                for (int s = begin; s < end; s += kHeadRows / kSupertile) {
                    const int stop = std::min(s + kHeadRows / kSupertile, end);
                    kernels.coded_product({&block, &weights.levels, &prepared, rows, s, stop, piece,
                                           kHeadRows, b.scratch[static_cast<size_t>(self)].data()});
                    scatter(block.first + s * kSupertile,
                            std::min(stop * kSupertile, block.rows) - s * kSupertile, order);
                }
            }
        } else {
            const bool bf16 = !head.bf16.empty();
            const int stop = std::min(tiles.last * kSupertile, m.vocab);
            for (int r = tiles.first * kSupertile; r < stop; r += kHeadRows) {
                const int end = std::min(r + kHeadRows, stop);
                kernels.plain_product({bf16 ? static_cast<const void*>(head.bf16.data())
                                            : static_cast<const void*>(head.f32.data()),
                                       bf16, head.columns, last.x.data(), last.stride, rows, r, end,
                                       piece, kHeadRows});
                scatter(r, end - r, nullptr);
            }
        }
    });
}

}  // namespace pliant
