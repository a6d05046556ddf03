// y = x W^T + bias + residual, with W packed in panels.
#pragma once

#include <cstdint>

#include "vec.h"

namespace flexpipe {

// Outputs of a panel. Packed weights are [ceil(out / kPanel)][in][kPanel], missing outputs zero.
constexpr int64_t kPanel = 3 * kLanes;

struct Linear {
    const float* weight;  // packed
    const float* bias;    // [out] or null
    int64_t num_outputs;
    int64_t num_inputs;
};

// x [num_rows, num_inputs], out [num_rows, num_outputs], both with rows one after the other. residual has the shape of
// out and may be out itself, or is null. The bits of a row depend on that row alone.
void linear(const Linear& map, const float* x, int64_t num_rows, const float* residual, float* out, int num_threads);

}  // namespace flexpipe
