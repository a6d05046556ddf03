#include "linear.h"

#include <algorithm>

#include "parallel.h"

namespace flexpipe {
namespace {

// Rows whose sums fit into the registers, two vectors each.
constexpr int kMaxRows = kLanes == 16 ? 12 : 6;
// Rows that are multiplied with a panel before the next panel is fetched: their inputs stay in the second-level cache.
constexpr int64_t kRowsOfTask = 96;

template <int kRows>
void multiply(const float* panel, const float* x, int64_t num_inputs, const float* bias, const float* residual,
              float* out, int64_t num_outputs, int64_t width) {
    Vec sums[kRows][2] = {};
    for (int64_t k = 0; k < num_inputs; ++k) {
        const Vec w0 = load(panel + k * kPanel), w1 = load(panel + k * kPanel + kLanes);
        __builtin_prefetch(panel + k * kPanel + 1024);
        __builtin_prefetch(panel + k * kPanel + 1024 + kLanes);
#pragma GCC unroll 16
        for (int row = 0; row < kRows; ++row) {
            const Vec factor = broadcast(x[row * num_inputs + k]);
            sums[row][0] += factor * w0;
            sums[row][1] += factor * w1;
        }
    }
    for (int row = 0; row < kRows; ++row) {
        float y[kPanel];
        store(y, sums[row][0]);
        store(y + kLanes, sums[row][1]);
        for (int64_t i = 0; i < width; ++i) {
            if (bias) y[i] += bias[i];
            out[row * num_outputs + i] = residual ? residual[row * num_outputs + i] + y[i] : y[i];
        }
    }
}

using Multiply = decltype(&multiply<1>);

struct Table {
    Multiply of_rows[kMaxRows + 1] = {};
    template <int kRows>
    void fill() {
        of_rows[kRows] = multiply<kRows>;
        if constexpr (kRows > 1) fill<kRows - 1>();
    }
    Table() { fill<kMaxRows>(); }
};

const Table kTable;

}  // namespace

void linear(const Linear& map, const float* x, int64_t num_rows, const float* residual, float* out, int num_threads) {
    const int64_t num_panels = (map.num_outputs + kPanel - 1) / kPanel;
    const int64_t num_row_tasks = std::max<int64_t>(1, (num_rows + kRowsOfTask - 1) / kRowsOfTask);
    parallel_for(num_panels * num_row_tasks, num_threads, [&](int64_t task) {
        const int64_t first_output = task % num_panels * kPanel;
        const int64_t width = std::min(kPanel, map.num_outputs - first_output);
        const float* panel = map.weight + first_output * map.num_inputs;
        const float* bias = map.bias ? map.bias + first_output : nullptr;
        int64_t row = task / num_panels * kRowsOfTask;
        const int64_t end = std::min(num_rows, row + kRowsOfTask);
        int64_t num_blocks = (end - row + kMaxRows - 1) / kMaxRows;
        for (; row < end; --num_blocks) {
            const int64_t count = (end - row + num_blocks - 1) / num_blocks;
            const int64_t at = row * map.num_outputs + first_output;
            kTable.of_rows[count](panel, x + row * map.num_inputs, map.num_inputs, bias,
                                  residual ? residual + at : nullptr, out + at, map.num_outputs, width);
            row += count;
        }
    });
}

}  // namespace flexpipe

extern "C" {

int64_t flexpipe_panel() { return flexpipe::kPanel; }

void flexpipe_linear(const flexpipe::Linear* map, const float* x, int64_t num_rows, const float* residual, float* out,
                     int num_threads) {
    flexpipe::linear(*map, x, num_rows, residual, out, num_threads);
}
}
