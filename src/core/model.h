// The decoder as data: the object `model` of a manifest (docs/format.md, section 2.1).
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "kernels/kernels.h"

namespace pliant {

struct Rope {
    std::vector<float> inv_freq;  // [head_dim / 2]
    float scale = 1.0f;           // multiplies sine and cosine
};

struct ModelSpec {
    int hidden = 0, layers = 0, heads = 0, kv_heads = 0, head_dim = 0, ffn = 0, vocab = 0;
    int context = 0;
    float norm_eps = 0.0f;
    Activation activation = Activation::kSilu;
    bool tied = false;
    float embed_scale = 1.0f, attn_scale = 1.0f;
    float attn_softcap = 0.0f, logit_softcap = 0.0f;  // 0: none
    std::vector<Rope> ropes;
    std::vector<int> layer_rope, layer_window;
};

// Layers as a page of the KV cache has them: those without a window, the global ones, come first,
// so that the others, the local ones, can be given up. Where all are of one kind, nothing is.
struct KvLayers {
    explicit KvLayers(const ModelSpec& model) {
        for (const int layer_window : model.layer_window) window = std::max(window, layer_window);
        const auto add = [&](bool local) {
            for (int layer = 0; layer < model.layers; ++layer)
                if ((model.layer_window[static_cast<size_t>(layer)] > 0) == local)
                    order.push_back(layer);
        };
        add(false);
        global = static_cast<int>(order.size());
        add(true);
        if (global != 0 && global != model.layers) return;
        global = model.layers;
        window = 0;
    }
    std::vector<int> order;
    int global;      // how many
    int window = 0;  // the largest; 0: there are no local layers
};

}  // namespace pliant
