// y = x W^T + bias + residual, with W packed in panels.
#pragma once

#include <cstdint>

#include "forms.h"

namespace flexpipe {

struct Linear {
    const char* weight;  // panels [ceil(out / kPanel)] in the form
    const float* bias;   // [out] or null
    int64_t num_outputs;
    int64_t num_inputs;
    Form form;
};

// x [num_rows, num_inputs], out [num_rows, num_outputs], both with rows one after the other. residual has the shape of
// out and may be out itself, or is null. The bits of a row depend on that row alone.
void linear(const Linear& map, const float* x, int64_t num_rows, const float* residual, float* out, int num_threads);

// Rows of W: out [num_ids, num_inputs].
void rows(const Linear& map, const int64_t* ids, int64_t num_ids, float* out);

}  // namespace flexpipe
