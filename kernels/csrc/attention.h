// Causal attention over paged KV, for ragged batches of prefill chunks and decodes.
#pragma once

#include <cstdint>

namespace flexpipe {

// Which tokens a step computes. Rows are the new tokens, one sequence after the other.
struct Batch {
    const int32_t* num_computed;  // [num_seqs]
    const int32_t* num_new;       // [num_seqs]
    const int32_t* block_tables;  // [num_seqs, table_width]
    int64_t num_seqs;
    int64_t table_width;
    int64_t block_size;
};

struct Heads {
    int64_t num_heads;
    int64_t num_kv_heads;
    int64_t head_dim;
    float scale;
};

// Writes k and v into the cache, then attends.
//
// q [num_rows, num_heads, head_dim], k and v [num_rows, num_kv_heads, head_dim] with the given distances between rows
// (in floats); kv [num_blocks, 2, block_size, num_kv_heads, head_dim]; out [num_rows, num_heads * head_dim].
// Slots without a token are never read. The bits of a row depend on its sequence alone, not on chunks or threads.
void attention(const Batch& batch, const Heads& heads, const float* q, int64_t q_stride, const float* k,
               int64_t k_stride, const float* v, int64_t v_stride, float* kv, float* out, int num_threads);

}  // namespace flexpipe
