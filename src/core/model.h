// The decoder as data: the object `model` of a manifest (docs/format.md, section 2.1).
#pragma once

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

}  // namespace pliant
