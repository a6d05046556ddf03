#include "linear.h"

#include <algorithm>

#include "parallel.h"

namespace flexpipe {
namespace {

// Rows whose sums fit into the registers beside a panel's weights.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMaxRows = 8;
#else
constexpr int kMaxRows = 4;
#endif
constexpr int kVecs = kPanel / kLanes;
// Rows that are multiplied with a panel before the next panel is fetched: their inputs stay in the second-level cache.
constexpr int64_t kRowsOfTask = 96;
// Floats from the weights in use to those asked for from the second-level cache.
constexpr int64_t kNear = 32 * kPanel;
constexpr int kCacheLine = 64;

// Some rows times one panel.
struct Piece {
    const float* panel;
    const char* far;   // weights of the next panel, to be asked for from memory on the way
    int64_t far_step;  // bytes of them for each input
    const float* x;
    int64_t num_inputs;
    const float* bias;
    const float* residual;
    float* out;
    int64_t num_outputs;
    int64_t width;  // outputs of the panel
};

// With several pieces of rows to a panel, each asks for its share of the next panel, so that memory is never idle while
// the processor computes: kLines cache lines for each input.
template <int kRows, int kLines>
void multiply(const Piece& piece) {
    const float* const x = piece.x;
    const int64_t num_inputs = piece.num_inputs, far_step = piece.far_step;
    const float* weight = piece.panel;
    const char* far = piece.far;
    Vec sums[kRows][kVecs] = {};
    for (int64_t k = 0; k < num_inputs; ++k) {
        Vec w[kVecs];
        for (int i = 0; i < kVecs; ++i) {
            w[i] = load(weight + i * kLanes);
            __builtin_prefetch(weight + kNear + i * kLanes);
        }
        for (int i = 0; i < kLines; ++i) __builtin_prefetch(far + i * kCacheLine, 0, 2);
        weight += kPanel;
        far += far_step;
#pragma GCC unroll 16
        for (int row = 0; row < kRows; ++row) {
            const Vec factor = broadcast(x[row * num_inputs + k]);
            for (int i = 0; i < kVecs; ++i) sums[row][i] += factor * w[i];
        }
    }
    for (int row = 0; row < kRows; ++row) {
        float y[kPanel];
        for (int i = 0; i < kVecs; ++i) store(y + i * kLanes, sums[row][i]);
        const int64_t at = row * piece.num_outputs;
        for (int64_t i = 0; i < piece.width; ++i) {
            if (piece.bias) y[i] += piece.bias[i];
            piece.out[at + i] = piece.residual ? piece.residual[at + i] + y[i] : y[i];
        }
    }
}

template <int kLines, int kRows = kMaxRows>
void multiply_rows(int64_t num_rows, const Piece& piece) {
    if constexpr (kRows > 1) {
        if (num_rows < kRows) return multiply_rows<kLines, kRows - 1>(num_rows, piece);
    }
    multiply<kRows, kLines>(piece);
}

}  // namespace

void linear(const Linear& map, const float* x, int64_t num_rows, const float* residual, float* out, int num_threads) {
    const int64_t num_inputs = map.num_inputs, num_outputs = map.num_outputs;
    const int64_t num_panels = (num_outputs + kPanel - 1) / kPanel;
    // Neighbouring panels make a task, so that the next one is known; and there are several tasks for each thread, so
    // that one held up by others leaves them to the rest.
    const int64_t num_panel_tasks = std::min<int64_t>(num_panels, num_threads == 1 ? 1 : 4 * num_threads);
    const int64_t num_row_tasks = (num_rows + kRowsOfTask - 1) / kRowsOfTask;
    parallel_for(num_panel_tasks * num_row_tasks, num_threads, [&](int64_t task) {
        const int64_t first_panel = task % num_panel_tasks * num_panels / num_panel_tasks;
        const int64_t end_panel = (task % num_panel_tasks + 1) * num_panels / num_panel_tasks;
        const int64_t first_row = task / num_panel_tasks * kRowsOfTask;
        const int64_t task_rows = std::min(kRowsOfTask, num_rows - first_row);
        const int64_t num_pieces = (task_rows + kMaxRows - 1) / kMaxRows;
        const int64_t far_step = (kPanel * int64_t(sizeof(float)) + num_pieces - 1) / num_pieces;
        for (int64_t panel = first_panel; panel < end_panel; ++panel) {
            const int64_t output = panel * kPanel;
            const float* const weight = map.weight + output * num_inputs;
            const char* const next = reinterpret_cast<const char*>(weight + kPanel * num_inputs);
            for (int64_t piece = 0; piece < num_pieces; ++piece) {
                const int64_t row = first_row + piece * task_rows / num_pieces;
                const int64_t end_row = first_row + (piece + 1) * task_rows / num_pieces;
                const int64_t at = row * num_outputs + output;
                const Piece work = {weight,
                                    next + piece * far_step * num_inputs,
                                    far_step,
                                    x + row * num_inputs,
                                    num_inputs,
                                    map.bias ? map.bias + output : nullptr,
                                    residual ? residual + at : nullptr,
                                    out + at,
                                    num_outputs,
                                    std::min(kPanel, num_outputs - output)};
                if (panel + 1 == end_panel) {
                    multiply_rows<0>(end_row - row, work);
                } else if (far_step > 2 * kCacheLine) {
                    multiply_rows<3>(end_row - row, work);
                } else if (far_step > kCacheLine) {
                    multiply_rows<2>(end_row - row, work);
                } else {
                    multiply_rows<1>(end_row - row, work);
                }
            }
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
