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
// Rows that are multiplied with a panel before the next panel is fetched: their inputs stay in the second-level cache.
constexpr int64_t kRowsOfTask = 96;
// Floats from the weights in use to those asked for from the second-level cache.
constexpr int64_t kNear = 32 * kPanel;
// Inputs whose weights are decoded at a time for many rows: the floats stay in the nearest cache.
constexpr int64_t kDecoded = 4 * kBlock;

using Weights = Vec[kVecs];  // of one input

// Some rows times one panel.
struct Piece {
    const char* panel;
    Form form;
    const float* x;
    int64_t num_inputs;
    const float* bias;
    const float* residual;
    float* out;
    int64_t num_outputs;
    int64_t width;  // outputs of the panel
};

// The rows from the given one on.
Piece from_row(Piece piece, int64_t row) {
    piece.x += row * piece.num_inputs;
    piece.out += row * piece.num_outputs;
    if (piece.residual) piece.residual += row * piece.num_outputs;
    return piece;
}

// Sums of kRows rows, in registers.
template <int kRows>
struct Sums {
    Vec of[kRows][kVecs] = {};

    // Adds the products with one input's weights; x is that input of the first row.
    inline void add(const float* x, int64_t num_inputs, const Weights& w) {
#pragma GCC unroll 16
        for (int row = 0; row < kRows; ++row) {
            const Vec factor = broadcast(x[row * num_inputs]);
            for (int i = 0; i < kVecs; ++i) of[row][i] += factor * w[i];
        }
    }
};

// Writes a row's results from its sums y [kPanel].
inline void finish(const Piece& piece, int64_t row, float* y) {
    const int64_t at = row * piece.num_outputs;
    for (int64_t i = 0; i < piece.width; ++i) {
        if (piece.bias) y[i] += piece.bias[i];
        piece.out[at + i] = piece.residual ? piece.residual[at + i] + y[i] : y[i];
    }
}

template <int kRows>
void finish(const Piece& piece, const Sums<kRows>& sums) {
    for (int row = 0; row < kRows; ++row) {
        float y[kPanel];
        for (int i = 0; i < kVecs; ++i) store(y + i * kLanes, sums.of[row][i]);
        finish(piece, row, y);
    }
}

inline void load_weights(const float* floats, Weights& w) {
    for (int i = 0; i < kVecs; ++i) w[i] = load(floats + i * kLanes);
}

// A panel of floats. With several pieces of rows to a panel, each asks for its share of the next one (far), so that
// memory is never idle while the processor computes: far_step bytes, kLines cache lines, for each input.
template <int kLines>
struct MultiplyFloats {
    const char* far;
    int64_t far_step;

    template <int kRows>
    void run(const Piece& piece) const {
        const int64_t num_inputs = piece.num_inputs, step = far_step;
        const float* weight = reinterpret_cast<const float*>(piece.panel);
        const char* ahead = far;
        Sums<kRows> sums;
        for (int64_t k = 0; k < num_inputs; ++k, weight += kPanel, ahead += step) {
            Weights w;
            load_weights(weight, w);
            for (int i = 0; i < kVecs; ++i) __builtin_prefetch(weight + kNear + i * kLanes);
            for (int i = 0; i < kLines; ++i) __builtin_prefetch(ahead + i * kCacheLine, 0, 2);
            sums.add(piece.x + k, num_inputs, w);
        }
        finish(piece, sums);
    }
};

// A panel in another form: weights go from the decoder into the sums without touching memory.
struct MultiplyBlocks {
    template <int kRows>
    void run(const Piece& piece) const {
        const char* block = piece.panel;
        Sums<kRows> sums;
        for (int64_t k = 0; k < piece.num_inputs; k += kBlock, block += block_bytes(piece.form)) {
            decode(piece.form, block,
                   [&](int64_t i, const Weights& w) { sums.add(piece.x + k + i, piece.num_inputs, w); });
        }
        finish(piece, sums);
    }
};

// Some inputs of a panel, whose weights are decoded, added to sums that wait in memory.
struct AddFloats {
    const float* floats;
    int64_t num_floats;
    float* waiting;  // [rows][kPanel]

    template <int kRows>
    void run(const Piece& piece) const {
        const float* weight = floats;
        Sums<kRows> sums;
        for (int row = 0; row < kRows; ++row) load_weights(waiting + row * kPanel, sums.of[row]);
        for (int64_t k = 0; k < num_floats; ++k, weight += kPanel) {
            Weights w;
            load_weights(weight, w);
            sums.add(piece.x + k, piece.num_inputs, w);
        }
        for (int row = 0; row < kRows; ++row) {
            for (int i = 0; i < kVecs; ++i) store(waiting + row * kPanel + i * kLanes, sums.of[row][i]);
        }
    }
};

template <typename Work, int kRows = kMaxRows>
void run_rows(const Work& work, int64_t num_rows, const Piece& piece) {
    if constexpr (kRows > 1) {
        if (num_rows < kRows) return run_rows<Work, kRows - 1>(work, num_rows, piece);
    }
    work.template run<kRows>(piece);
}

void multiply_floats(const Piece& piece, int64_t num_rows, bool is_last) {
    const int64_t num_pieces = (num_rows + kMaxRows - 1) / kMaxRows;
    const int64_t far_step = (kPanel * int64_t(sizeof(float)) + num_pieces - 1) / num_pieces;
    const char* far = piece.panel + piece.num_inputs * kPanel * int64_t(sizeof(float));
    for (int64_t i = 0; i < num_pieces; ++i, far += far_step * piece.num_inputs) {
        const int64_t row = i * num_rows / num_pieces, rows = (i + 1) * num_rows / num_pieces - row;
        const Piece work = from_row(piece, row);
        if (is_last) {
            run_rows(MultiplyFloats<0>{far, far_step}, rows, work);
        } else if (far_step > 2 * kCacheLine) {
            run_rows(MultiplyFloats<3>{far, far_step}, rows, work);
        } else if (far_step > kCacheLine) {
            run_rows(MultiplyFloats<2>{far, far_step}, rows, work);
        } else {
            run_rows(MultiplyFloats<1>{far, far_step}, rows, work);
        }
    }
}

// Many rows times a panel in another form than floats: each weight is decoded once for all of them.
void multiply_decoded(const Piece& piece, int64_t num_rows) {
    alignas(kVecBytes) float floats[kDecoded * kPanel], waiting[kRowsOfTask * kPanel];
    std::fill_n(waiting, num_rows * kPanel, 0.0f);
    const char* block = piece.panel;
    for (int64_t k = 0; k < piece.num_inputs; k += kDecoded) {
        const int64_t num_floats = std::min(kDecoded, piece.num_inputs - k);
        for (int64_t i = 0; i < num_floats; i += kBlock, block += block_bytes(piece.form)) {
            decode(piece.form, block, floats + i * kPanel);
        }
        for (int64_t row = 0; row < num_rows; row += kMaxRows) {
            Piece work = from_row(piece, row);
            work.x += k;
            run_rows(AddFloats{floats, num_floats, waiting + row * kPanel}, num_rows - row, work);
        }
    }
    for (int64_t row = 0; row < num_rows; ++row) finish(piece, row, waiting + row * kPanel);
}

int64_t panel_bytes(const Linear& map) {
    return map.form == kFloat32 ? map.num_inputs * kPanel * int64_t(sizeof(float))
                                : map.num_inputs / kBlock * block_bytes(map.form);
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
        for (int64_t panel = first_panel; panel < end_panel; ++panel) {
            const int64_t output = panel * kPanel;
            const Piece piece = from_row({map.weight + panel * panel_bytes(map), map.form, x, num_inputs,
                                          map.bias ? map.bias + output : nullptr, residual ? residual + output : nullptr,
                                          out + output, num_outputs, std::min(kPanel, num_outputs - output)},
                                         first_row);
            if (map.form == kFloat32) {
                multiply_floats(piece, task_rows, panel + 1 == end_panel);
            } else if (task_rows <= kMaxRows) {
                run_rows(MultiplyBlocks{}, task_rows, piece);
            } else {
                multiply_decoded(piece, task_rows);
            }
        }
    });
}

void rows(const Linear& map, const int64_t* ids, int64_t num_ids, float* out) {
    for (int64_t i = 0; i < num_ids; ++i) {
        const char* const panel = map.weight + ids[i] / kPanel * panel_bytes(map);
        const int64_t lane = ids[i] % kPanel;
        if (map.form == kFloat32) {
            const float* const floats = reinterpret_cast<const float*>(panel);
            for (int64_t k = 0; k < map.num_inputs; ++k) *out++ = floats[k * kPanel + lane];
        } else {
            float floats[kBlock * kPanel];
            for (int64_t block = 0; block < map.num_inputs / kBlock; ++block) {
                decode(map.form, panel + block * block_bytes(map.form), floats);
                for (int64_t k = 0; k < kBlock; ++k) *out++ = floats[k * kPanel + lane];
            }
        }
    }
}

}  // namespace flexpipe

extern "C" {

int64_t flexpipe_panel() { return flexpipe::kPanel; }

void flexpipe_linear(const flexpipe::Linear* map, const float* x, int64_t num_rows, const float* residual, float* out,
                     int num_threads) {
    flexpipe::linear(*map, x, num_rows, residual, out, num_threads);
}

void flexpipe_rows(const flexpipe::Linear* map, const int64_t* ids, int64_t num_ids, float* out) {
    flexpipe::rows(*map, ids, num_ids, out);
}
}
