// A Llama-like decoder layer in one call.
#pragma once

#include <cstdint>

#include "attention.h"
#include "linear.h"

namespace flexpipe {

struct Layer {
    Linear qkv;
    Linear output;
    Linear gate_up;
    Linear down;
    const float* input_norm;           // [hidden_size]
    const float* post_attention_norm;  // [hidden_size]
    const float* head_norms;           // [num_heads + num_kv_heads, head_dim] of queries and keys, or null
    Heads heads;
    int64_t rotary_dim;  // of each query and key head; its pairs stand side by side
    float eps;
};

// hidden [num_rows, hidden_size], in place; rotary [num_rows, rotary_dim / 2] pairs of cosine and sine; kv as attention
// takes it. The bits of a row depend on its sequence alone.
void forward(const Layer& layer, const Batch& batch, float* hidden, const float* rotary, float* kv, int64_t num_rows,
             int num_threads);

}  // namespace flexpipe
