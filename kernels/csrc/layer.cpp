#include "layer.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "parallel.h"

namespace flexpipe {
namespace {

// Rows of a task between the linear maps. Fewer rows than that are done before a helper would be there.
constexpr int64_t kRowsOfTask = 32;

template <typename Body>
void for_each_row(int64_t num_rows, int num_threads, Body&& body) {
    parallel_for((num_rows + kRowsOfTask - 1) / kRowsOfTask, num_threads, [&](int64_t task) {
        const int64_t end = std::min(num_rows, (task + 1) * kRowsOfTask);
        for (int64_t row = task * kRowsOfTask; row < end; ++row) body(row);
    });
}

// out = x / sqrt(mean(x^2) + eps) * weight; out may be x.
void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* out) {
    const int64_t whole = n / kLanes * kLanes;
    Vec squares = {};
    for (int64_t i = 0; i < whole; i += kLanes) squares += load(x + i) * load(x + i);
    const Vec rest = load_first(x + whole, n - whole);
    squares += rest * rest;
    const float factor = 1.0f / std::sqrt(sum(squares) / float(n) + eps);
    for (int64_t i = 0; i < whole; i += kLanes) store(out + i, load(x + i) * factor * load(weight + i));
    for (int64_t i = whole; i < n; ++i) out[i] = x[i] * factor * weight[i];
}

// Each pair of a head is a complex number that is turned by the position's angle.
void rotate(float* head, const float* rotary, int64_t rotary_dim) {
    for (int64_t i = 0; i < rotary_dim; i += 2) {
        const float real = head[i], imaginary = head[i + 1];
        head[i] = real * rotary[i] - imaginary * rotary[i + 1];
        head[i + 1] = real * rotary[i + 1] + imaginary * rotary[i];
    }
}

Vec silu(Vec x) { return x / (exp(-x) + 1.0f); }

// out = silu(gate) * up
void swiglu(const float* gate, const float* up, int64_t n, float* out) {
    const int64_t whole = n / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) store(out + i, silu(load(gate + i)) * load(up + i));
    const Vec rest = silu(load_first(gate + whole, n - whole)) * load_first(up + whole, n - whole);
    for (int64_t i = whole; i < n; ++i) out[i] = rest[i - whole];
}

}  // namespace

void forward(const Layer& layer, const Batch& batch, float* hidden, const float* rotary, float* kv, int64_t num_rows,
             int num_threads) {
    const Heads& heads = layer.heads;
    const int64_t hidden_size = layer.qkv.num_inputs, qkv_size = layer.qkv.num_outputs;
    const int64_t query_size = heads.num_heads * heads.head_dim, kv_size = heads.num_kv_heads * heads.head_dim;
    const int64_t gate_size = layer.down.num_inputs;
    thread_local std::vector<float> memory;
    memory.resize(num_rows * std::max(hidden_size + qkv_size + query_size, hidden_size + 3 * gate_size));
    float* const normed = memory.data();

    float* const qkv = normed + num_rows * hidden_size;
    float* const attended = qkv + num_rows * qkv_size;
    for_each_row(num_rows, num_threads, [&](int64_t row) {
        rms_norm(hidden + row * hidden_size, layer.input_norm, hidden_size, layer.eps, normed + row * hidden_size);
    });
    linear(layer.qkv, normed, num_rows, nullptr, qkv, num_threads);
    for_each_row(num_rows, num_threads, [&](int64_t row) {
        for (int64_t head = 0; head < heads.num_heads + heads.num_kv_heads; ++head) {
            float* const x = qkv + row * qkv_size + head * heads.head_dim;
            if (layer.head_norms) rms_norm(x, layer.head_norms + head * heads.head_dim, heads.head_dim, layer.eps, x);
            rotate(x, rotary + row * layer.rotary_dim, layer.rotary_dim);
        }
    });
    attention(batch, heads, qkv, qkv_size, qkv + query_size, qkv_size, qkv + query_size + kv_size, qkv_size, kv,
              attended, num_threads);
    linear(layer.output, attended, num_rows, hidden, hidden, num_threads);

    float* const gate_up = normed + num_rows * hidden_size;
    float* const activated = gate_up + num_rows * 2 * gate_size;
    for_each_row(num_rows, num_threads, [&](int64_t row) {
        rms_norm(hidden + row * hidden_size, layer.post_attention_norm, hidden_size, layer.eps,
                 normed + row * hidden_size);
    });
    linear(layer.gate_up, normed, num_rows, nullptr, gate_up, num_threads);
    for_each_row(num_rows, num_threads, [&](int64_t row) {
        const float* const gate = gate_up + row * 2 * gate_size;
        swiglu(gate, gate + gate_size, gate_size, activated + row * gate_size);
    });
    linear(layer.down, activated, num_rows, hidden, hidden, num_threads);
}

}  // namespace flexpipe

extern "C" void flexpipe_layers(const flexpipe::Layer* const* layers, float* const* kvs, int64_t num_layers,
                                const flexpipe::Batch* batch, float* hidden, const float* rotary, int64_t num_rows,
                                int num_threads) {
    for (int64_t i = 0; i < num_layers; ++i) {
        flexpipe::forward(*layers[i], *batch, hidden, rotary, kvs[i], num_rows, num_threads);
    }
}
