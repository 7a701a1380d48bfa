#include "executor.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "buffers.h"
#include "error.h"

namespace pliant {

namespace {

constexpr size_t kLayerPhases = 11, kOtherPhases = 5;  // of a chunk; see forward.cpp

void check(const ModelSpec& m) {
    const auto positive = [](int value, const char* name) {
        if (value < 1) throw ModelError(std::string("model: ") + name + " must be at least 1");
    };
    positive(m.hidden, "hidden");
    positive(m.layers, "layers");
    positive(m.heads, "heads");
    positive(m.kv_heads, "kv_heads");
    positive(m.head_dim, "head_dim");
    positive(m.ffn, "ffn");
    positive(m.vocab, "vocab");
    positive(m.context, "context");
    if (m.heads % m.kv_heads != 0) throw ModelError("model: heads is no multiple of kv_heads");
    if (m.head_dim % 2 != 0 || m.head_dim > kMaxHeadDim)
        throw ModelError("model: head_dim must be even and at most " + std::to_string(kMaxHeadDim));
    if (m.layer_rope.size() != static_cast<size_t>(m.layers) ||
        m.layer_window.size() != static_cast<size_t>(m.layers))
        throw ModelError("model: layer_rope and layer_window must name every layer");
    for (int rope : m.layer_rope)
        if (rope < 0 || rope >= static_cast<int>(m.ropes.size()))
            throw ModelError("model: a layer uses a rotary table that does not exist");
    for (const Rope& rope : m.ropes)
        if (rope.inv_freq.size() != static_cast<size_t>(m.head_dim / 2))
            throw ModelError("model: a rotary table is not of head_dim / 2 frequencies");
}

// Splits "layers.12.q" in 12 and "q"; -1 if it is not of that form.
int layer_of(const std::string& name, std::string* part) {
    int layer = -1, used = 0;
    if (std::sscanf(name.c_str(), "layers.%d.%n", &layer, &used) != 1 || used == 0) return -1;
    *part = name.substr(static_cast<size_t>(used));
    return layer;
}

}  // namespace

Executor::Executor(ModelSpec model, int threads, const std::string& isa, int chunk)
    : kv((check(model), model)),
      model_(std::move(model)),
      kernels_(&select_kernels(isa)),
      pool_(threads),
      chunk_(std::max(chunk, 1)),
      layers_(static_cast<size_t>(model_.layers)) {}

Executor::~Executor() = default;

Linear* Executor::find_linear(const std::string& name) {
    if (name == "embed") return &embed_;
    if (name == "head") return &head_;
    std::string part;
    const int index = layer_of(name, &part);
    if (index < 0 || index >= model_.layers) return nullptr;
    Layer& layer = layers_[static_cast<size_t>(index)];
    if (part == "q") return &layer.q;
    if (part == "k") return &layer.k;
    if (part == "v") return &layer.v;
    if (part == "o") return &layer.o;
    if (part == "gate") return &layer.gate;
    if (part == "up") return &layer.up;
    if (part == "down") return &layer.down;
    return nullptr;
}

std::vector<float>* Executor::find_vector(const std::string& name, size_t* count) {
    *count = static_cast<size_t>(model_.hidden);
    if (name == "final_norm") return &final_norm_;
    std::string part;
    const int index = layer_of(name, &part);
    if (index < 0 || index >= model_.layers) return nullptr;
    Layer& layer = layers_[static_cast<size_t>(index)];
    if (part == "attn_norm") return &layer.attn_norm;
    if (part == "ffn_norm") return &layer.ffn_norm;
    if (part == "attn_post_norm") return &layer.attn_post_norm;
    if (part == "ffn_post_norm") return &layer.ffn_post_norm;
    *count = static_cast<size_t>(model_.head_dim);
    if (part == "q_norm") return &layer.q_norm;
    if (part == "k_norm") return &layer.k_norm;
    const std::string suffix = ".bias";
    if (name.size() > suffix.size() && name.ends_with(suffix)) {
        Linear* linear = find_linear(name.substr(0, name.size() - suffix.size()));
        if (linear == nullptr || linear == &embed_ || linear == &head_) return nullptr;
        *count = 0;  // of the matrix; finish() compares
        return &linear->bias;
    }
    return nullptr;
}

void Executor::set_vector(const std::string& name, const float* values, size_t count) {
    size_t due = 0;
    std::vector<float>* vector = find_vector(name, &due);
    if (vector == nullptr) throw FormatError("a model has no vector '" + name + "'");
    if (due != 0 && count != due)
        throw FormatError("'" + name + "' has " + std::to_string(count) + " values, not " +
                          std::to_string(due));
    vector->assign(values, values + count);
}

void Executor::set_plain(const std::string& name, const void* weight, bool bf16, int rows,
                         int columns) {
    Linear* linear = find_linear(name);
    if (linear == nullptr) throw FormatError("a model has no matrix '" + name + "'");
    linear->rows = rows;
    linear->columns = columns;
    const size_t count = static_cast<size_t>(rows) * static_cast<size_t>(columns);
    if (bf16) {
        const uint16_t* p = static_cast<const uint16_t*>(weight);
        linear->bf16.assign(p, p + count);
    } else {
        const float* p = static_cast<const float*>(weight);
        linear->f32.assign(p, p + count);
    }
}

void Executor::add_coded(const std::string& name, int rows, int columns,
                         const std::vector<int>& blocks, std::vector<uint16_t> order,
                         const uint32_t* row_order, const float* row_scale,
                         const float* group_scale) {
    Linear* linear = find_linear(name);
    if (linear == nullptr) throw FormatError("a model has no matrix '" + name + "'");
    if (order.size() != static_cast<size_t>(columns))
        throw FormatError("'" + name + "': the channel order is not of its columns");
    for (uint16_t c : order)
        if (c >= columns) throw FormatError("'" + name + "': a channel order is no permutation");
    if (row_order != nullptr && linear != &embed_ && linear != &head_)
        throw FormatError("'" + name + "': only the embedding and the head may reorder their rows");
    // Neighbours in the manifest that share an input have the same order: it is kept once.
    const Linear* before[] = {nullptr, nullptr};
    std::string part;
    const int index = layer_of(name, &part);
    if (index >= 0 && index < model_.layers) {
        const Layer& layer = layers_[static_cast<size_t>(index)];
        if (part == "k" || part == "v") before[0] = &layer.q;
        if (part == "q" || part == "v") before[1] = &layer.k;
        if (part == "up") before[0] = &layer.gate;
        if (part == "gate") before[0] = &layer.up;
    }
    int input = -1;
    for (const Linear* other : before)
        if (other != nullptr && other->coded >= 0) {
            const int candidate = weights.matrix(other->coded).input;
            if (weights.order(candidate) == order) input = candidate;
        }
    if (input < 0) input = weights.add_input(std::move(order));
    linear->rows = rows;
    linear->columns = columns;
    linear->coded =
        weights.add_matrix(rows, columns, input, blocks, row_scale, group_scale, row_order);
}

void Executor::finish() {
    const ModelSpec& m = model_;
    const auto need = [](const Linear& linear, const std::string& name, int rows, int columns) {
        if (!linear.present()) throw FormatError("the matrix '" + name + "' is missing");
        if (linear.rows != rows || linear.columns != columns)
            throw FormatError("the matrix '" + name + "' is " + std::to_string(linear.rows) +
                              " × " + std::to_string(linear.columns) + ", not " +
                              std::to_string(rows) + " × " + std::to_string(columns));
        if (!linear.bias.empty() && linear.bias.size() != static_cast<size_t>(rows))
            throw FormatError("the bias of '" + name + "' is not of its rows");
    };
    const auto need_vector = [](const std::vector<float>& v, const std::string& name) {
        if (v.empty()) throw FormatError("the vector '" + name + "' is missing");
    };
    const auto same_input = [&](const Linear& a, const Linear& b, const std::string& names) {
        if (a.coded >= 0 && b.coded >= 0 &&
            weights.matrix(a.coded).input != weights.matrix(b.coded).input)
            throw FormatError(names + " read the same input but have different channel orders");
    };
    const int q_rows = m.heads * m.head_dim, kv_rows = m.kv_heads * m.head_dim;
    need(embed_, "embed", m.vocab, m.hidden);
    if (m.tied && head_.present()) throw FormatError("a tied model has a matrix 'head'");
    if (!m.tied) need(head_, "head", m.vocab, m.hidden);
    need_vector(final_norm_, "final_norm");
    for (int i = 0; i < m.layers; ++i) {
        const Layer& layer = layers_[static_cast<size_t>(i)];
        const std::string prefix = "layers." + std::to_string(i) + ".";
        need(layer.q, prefix + "q", q_rows, m.hidden);
        need(layer.k, prefix + "k", kv_rows, m.hidden);
        need(layer.v, prefix + "v", kv_rows, m.hidden);
        need(layer.o, prefix + "o", m.hidden, q_rows);
        need(layer.gate, prefix + "gate", m.ffn, m.hidden);
        need(layer.up, prefix + "up", m.ffn, m.hidden);
        need(layer.down, prefix + "down", m.hidden, m.ffn);
        need_vector(layer.attn_norm, prefix + "attn_norm");
        need_vector(layer.ffn_norm, prefix + "ffn_norm");
        same_input(layer.q, layer.k, prefix + "q and k");
        same_input(layer.q, layer.v, prefix + "q and v");
        same_input(layer.k, layer.v, prefix + "k and v");
        same_input(layer.gate, layer.up, prefix + "gate and up");
        const Layer& first = layers_.front();
        if (layer.attn_post_norm.empty() != first.attn_post_norm.empty() ||
            layer.ffn_post_norm.empty() != first.ffn_post_norm.empty())
            throw FormatError("norms after a block must be in all layers or in none");
    }
    kv.ladder.finish();
    phases_ = std::vector<Phase>(static_cast<size_t>(m.layers) * kLayerPhases + kOtherPhases +
                                 static_cast<size_t>(chunk_));
    bool plain = false;
    for (const Layer& layer : layers_)
        for (const Linear* l : layer.linears()) plain = plain || l->coded < 0;
    buffers_ = std::make_unique<Buffers>(model_, pool_.size(), chunk_, plain);
}

size_t Executor::logit_rows(const std::vector<Piece>& pieces) {
    size_t rows = 0;
    for (const Piece& piece : pieces)
        if (piece.count > 0)
            rows += piece.want == Want::kAll    ? static_cast<size_t>(piece.count)
                    : piece.want == Want::kLast ? 1u
                                                : 0u;
    return rows;
}

uint64_t Executor::activation_bytes() const { return buffers_ ? buffers_->bytes() : 0; }

uint64_t Executor::base_bytes() const {
    uint64_t bytes = weights.table_bytes() + kv.ladder.table_bytes() + final_norm_.capacity() * 4;
    const auto linear = [](const Linear& l) {
        return l.f32.capacity() * 4 + l.bf16.capacity() * 2 + l.bias.capacity() * 4;
    };
    bytes += linear(embed_) + linear(head_);
    for (const Layer& layer : layers_) {
        for (const Linear* l : layer.linears()) bytes += linear(*l);
        for (const auto* v : {&layer.attn_norm, &layer.ffn_norm, &layer.attn_post_norm,
                              &layer.ffn_post_norm, &layer.q_norm, &layer.k_norm})
            bytes += v->capacity() * 4;
    }
    return bytes;
}

}  // namespace pliant
