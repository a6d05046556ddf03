#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "parallel.h"
#include "vec.h"

namespace flexpipe {
namespace {

// Keys that are scored before their values are added up. Tiles stand at fixed positions of a sequence, so that a row
// sees the same tiles however its sequence is cut into chunks.
constexpr int kTile = 4 * kLanes;
constexpr int kVecsOfTile = kTile / kLanes;
// Rows (query tokens times heads of a group) whose sums fit into the registers, up to four vectors each.
constexpr int kMaxRows = kLanes == 16 ? 6 : 3;
// Query tokens that share the keys of a tile while these are in the first-level cache.
constexpr int64_t kTokensOfTask = 16;

// scores[row][0..kTile) = q[row] . keys, with keys [head_dim][kTile].
template <int kRows>
void score(const float* const* q, const float* keys, int64_t head_dim, float scale, float* scores) {
    Vec sums[kRows][kVecsOfTile] = {};
    for (int64_t d = 0; d < head_dim; ++d) {
        Vec key[kVecsOfTile];
        for (int i = 0; i < kVecsOfTile; ++i) key[i] = load(keys + d * kTile + i * kLanes);
#pragma GCC unroll 8
        for (int row = 0; row < kRows; ++row) {
            const Vec factor = broadcast(q[row][d]);
            for (int i = 0; i < kVecsOfTile; ++i) sums[row][i] += factor * key[i];
        }
    }
    for (int row = 0; row < kRows; ++row) {
        for (int i = 0; i < kVecsOfTile; ++i) store(scores + row * kTile + i * kLanes, sums[row][i] * scale);
    }
}

// Where the values of a tile's keys are; those of the last, incomplete vector of a head stand apart, filled up with
// zeros.
struct Values {
    const float* of_key[kTile];
    const float* rest_of_key[kTile];
};

// sums[row][0..kVecs * kLanes) += weights[row] . values, which stand at an offset behind their pointers.
template <int kRows, int kVecs>
void add_values(const float* weights, const float* const* values, int64_t offset, int num_keys, int64_t stride,
                float* sums) {
    Vec total[kRows][kVecs];
    for (int row = 0; row < kRows; ++row) {
        for (int i = 0; i < kVecs; ++i) total[row][i] = load(sums + row * stride + i * kLanes);
    }
    for (int key = 0; key < num_keys; ++key) {
        Vec value[kVecs];
        for (int i = 0; i < kVecs; ++i) value[i] = load(values[key] + offset + i * kLanes);
#pragma GCC unroll 8
        for (int row = 0; row < kRows; ++row) {
            const Vec weight = broadcast(weights[row * kTile + key]);
            for (int i = 0; i < kVecs; ++i) total[row][i] += weight * value[i];
        }
    }
    for (int row = 0; row < kRows; ++row) {
        for (int i = 0; i < kVecs; ++i) store(sums + row * stride + i * kLanes, total[row][i]);
    }
}

template <int kRows>
void add_all_values(const float* weights, const Values& values, int num_keys, int64_t head_dim, int64_t stride,
                    float* sums) {
    int64_t at = 0;
    for (; at + 4 * kLanes <= head_dim; at += 4 * kLanes) {
        add_values<kRows, 4>(weights, values.of_key, at, num_keys, stride, sums + at);
    }
    for (; at + kLanes <= head_dim; at += kLanes) {
        add_values<kRows, 1>(weights, values.of_key, at, num_keys, stride, sums + at);
    }
    if (at < head_dim) add_values<kRows, 1>(weights, values.rest_of_key, 0, num_keys, stride, sums + at);
}

// Calls body<n>(first) for all rows in pieces of n <= kMaxRows.
template <int kRows, typename Body>
void dispatch(int64_t count, int64_t first, Body& body) {
    if constexpr (kRows > 1) {
        if (count < kRows) return dispatch<kRows - 1>(count, first, body);
    }
    body.template operator()<kRows>(first);
}

template <typename Body>
void for_rows(int64_t num_rows, Body&& body) {
    for (int64_t row = 0; row < num_rows; row += kMaxRows) {
        dispatch<kMaxRows>(std::min<int64_t>(kMaxRows, num_rows - row), row, body);
    }
}

// Query tokens of one sequence that attend with one KV head.
struct Span {
    int64_t seq;
    int64_t first_row;       // among the step's rows
    int64_t first_position;  // of that row in its sequence
    int64_t num_tokens;
};

int64_t round_up(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

class Attend {
   public:
    Attend(const Batch& batch, const Heads& heads, const float* q, int64_t q_stride, const float* kv, float* out)
        : batch_(batch),
          heads_(heads),
          width_(round_up(heads.head_dim)),
          half_(batch.block_size * heads.num_kv_heads * heads.head_dim),
          q_(q),
          q_stride_(q_stride),
          kv_(kv),
          out_(out) {}

    void operator()(const Span& span, int64_t kv_head) const {
        const int64_t dim = heads_.head_dim, group = heads_.num_heads / heads_.num_kv_heads;
        const int64_t num_rows = span.num_tokens * group;
        thread_local std::vector<float> memory;
        thread_local std::vector<const float*> queries;
        memory.resize(kLanes + kTile * (width_ + kLanes) + num_rows * (kTile + width_ + kLanes + 1));
        queries.resize(num_rows);
        float* keys = memory.data();  // [width, kTile]
        keys += (kVecBytes - reinterpret_cast<uintptr_t>(keys) % kVecBytes) % kVecBytes / sizeof(float);
        float* const rests = keys + kTile * width_;         // [kTile, kLanes]
        float* const scores = rests + kTile * kLanes;       // [num_rows, kTile]
        float* const sums = scores + num_rows * kTile;      // [num_rows, width]
        float* const totals = sums + num_rows * width_;     // [num_rows, kLanes], of the weights
        float* const largest = totals + num_rows * kLanes;  // [num_rows]
        std::fill(sums, largest, 0.0f);
        std::fill(largest, largest + num_rows, -INFINITY);
        for (int64_t row = 0; row < num_rows; ++row) {
            queries[row] = q_ + (span.first_row + row / group) * q_stride_ + (kv_head * group + row % group) * dim;
        }
        const int64_t length = span.first_position + span.num_tokens;
        const auto num_keys_of = [&](int64_t tile) { return int(std::clamp<int64_t>(length - tile, 0, kTile)); };
        const float *here[kTile], *next[kTile];
        Values values;
        find_keys(span.seq, kv_head, 0, num_keys_of(0), next);
        for (int64_t tile = 0; tile < length; tile += kTile) {
            const int num_keys = num_keys_of(tile), num_next = num_keys_of(tile + kTile);
            std::copy(next, next + num_keys, here);
            find_keys(span.seq, kv_head, tile + kTile, num_next, next);
            fetch_keys(here, num_keys, next, num_next, keys);
            find_values(here, num_keys, rests, values);
            // Rows before the tile see none of it.
            const int64_t blind = std::max<int64_t>(0, tile - span.first_position) * group;
            for_rows(num_rows - blind, [&]<int kRows>(int64_t first) {
                score<kRows>(&queries[blind + first], keys, dim, heads_.scale, scores + (blind + first) * kTile);
            });
            for (int64_t row = blind; row < num_rows; ++row) {
                const int64_t num_visible = span.first_position + row / group + 1 - tile;
                weigh(scores + row * kTile, num_visible, largest[row], totals + row * kLanes, sums + row * width_);
            }
            for_rows(num_rows - blind, [&]<int kRows>(int64_t first) {
                add_all_values<kRows>(scores + (blind + first) * kTile, values, num_keys, dim, width_,
                                      sums + (blind + first) * width_);
            });
        }
        for (int64_t row = 0; row < num_rows; ++row) {
            const int64_t head = kv_head * group + row % group;
            float* to = out_ + ((span.first_row + row / group) * heads_.num_heads + head) * dim;
            const float total = sum(load(totals + row * kLanes));
            for (int64_t d = 0; d < dim; ++d) to[d] = sums[row * width_ + d] / total;
        }
    }

   private:
    // Where the keys of a tile are.
    void find_keys(int64_t seq, int64_t kv_head, int64_t tile, int num_keys, const float** rows) const {
        const int64_t size = batch_.block_size, row_size = heads_.num_kv_heads * heads_.head_dim;
        const int32_t* block = batch_.block_tables + seq * batch_.table_width + tile / size;
        int64_t offset = tile % size;
        for (int i = 0; i < num_keys; ++block, offset = 0) {
            const float* row = kv_ + *block * 2 * half_ + offset * row_size + kv_head * heads_.head_dim;
            for (; i < num_keys && offset < size; ++i, ++offset, row += row_size) rows[i] = row;
        }
    }

    void find_values(const float* const* rows, int num_keys, float* rests, Values& values) const {
        const int64_t whole = heads_.head_dim / kLanes * kLanes, rest = heads_.head_dim - whole;
        for (int i = 0; i < num_keys; ++i) {
            values.of_key[i] = rows[i] + half_;
            values.rest_of_key[i] = rests + i * kLanes;
            if (rest) store(rests + i * kLanes, load_first(values.of_key[i] + whole, rest));
        }
    }

    // The tile's keys as [head_dim][kTile], with anything behind the last one; `rows` has room for kTile. Meanwhile the
    // next tile's keys and values come from memory to the second-level cache.
    void fetch_keys(const float** rows, int num_keys, const float* const* next, int num_next, float* keys) const {
        constexpr int kLine = 64 / sizeof(float);
        const int64_t dim = heads_.head_dim;
        for (int first = 0; first < num_keys; first += kLanes) {
            for (int i = first; i < std::min(first + kLanes, num_next); ++i) {
                for (int64_t d = 0; d < dim; d += kLine) {
                    __builtin_prefetch(next[i] + d, 0, 2);
                    __builtin_prefetch(next[i] + half_ + d, 0, 2);
                }
            }
            for (int i = num_keys; i < first + kLanes; ++i) rows[i] = rows[0];
            float* const to = keys + first;
            int64_t d = 0;
            for (; d + kLanes <= dim; d += kLanes) transpose<kLanes>(rows + first, d, to + d * kTile, kTile);
            for (; d + 4 <= dim; d += 4) transpose<4>(rows + first, d, to + d * kTile, kTile);
            for (; d < dim; ++d) {
                for (int i = 0; i < kLanes; ++i) to[d * kTile + i] = rows[first + i][d];
            }
        }
    }

    // Turns a row's scores into weights relative to the largest score so far, and what was summed so far with them.
    void weigh(float* scores, int64_t num_visible, float& largest, float* total, float* sums) const {
        IntVec lane;
        for (int i = 0; i < kLanes; ++i) lane[i] = i;
        Vec tile_largest = broadcast(-INFINITY);
        for (int i = 0; i < kVecsOfTile; ++i) {
            const int32_t rest = int32_t(std::min<int64_t>(num_visible, kTile)) - i * kLanes;
            const Vec masked = lane < rest ? load(scores + i * kLanes) : broadcast(-INFINITY);
            store(scores + i * kLanes, masked);
            tile_largest = max(masked, tile_largest);
        }
        const float now = std::max(largest, max_lane(tile_largest));
        Vec added = {};
        for (int i = 0; i < kVecsOfTile; ++i) {
            const Vec weight = exp(load(scores + i * kLanes) - now);
            store(scores + i * kLanes, weight);
            added += weight;
        }
        if (now != largest) {
            const Vec factor = exp(broadcast(largest - now));
            store(total, load(total) * factor);
            for (int64_t d = 0; d < width_; d += kLanes) store(sums + d, load(sums + d) * factor);
            largest = now;
        }
        store(total, load(total) + added);
    }

    const Batch& batch_;
    const Heads& heads_;
    const int64_t width_;  // head_dim, rounded up to whole vectors
    const int64_t half_;   // of a block: the floats of its keys, behind which its values are
    const float* q_;
    int64_t q_stride_;
    const float* kv_;
    float* out_;
};

void write_new(const Batch& batch, const Heads& heads, const float* k, int64_t k_stride, const float* v,
               int64_t v_stride, float* kv) {
    const int64_t row_size = heads.num_kv_heads * heads.head_dim, half = batch.block_size * row_size;
    int64_t row = 0;
    for (int64_t seq = 0; seq < batch.num_seqs; ++seq) {
        for (int64_t i = 0; i < batch.num_new[seq]; ++i, ++row) {
            const int64_t position = batch.num_computed[seq] + i;
            const int64_t block = batch.block_tables[seq * batch.table_width + position / batch.block_size];
            float* to = kv + block * 2 * half + position % batch.block_size * row_size;
            std::memcpy(to, k + row * k_stride, row_size * sizeof(float));
            std::memcpy(to + half, v + row * v_stride, row_size * sizeof(float));
        }
    }
}

}  // namespace

void attention(const Batch& batch, const Heads& heads, const float* q, int64_t q_stride, const float* k,
               int64_t k_stride, const float* v, int64_t v_stride, float* kv, float* out, int num_threads) {
    write_new(batch, heads, k, k_stride, v, v_stride, kv);
    thread_local std::vector<Span> spans;
    spans.clear();
    int64_t row = 0;
    for (int64_t seq = 0; seq < batch.num_seqs; ++seq) {
        const int64_t num_new = batch.num_new[seq];
        for (int64_t i = 0; i < num_new; i += kTokensOfTask) {
            spans.push_back({seq, row + i, batch.num_computed[seq] + i, std::min(kTokensOfTask, num_new - i)});
        }
        row += num_new;
    }
    const Attend attend(batch, heads, q, q_stride, kv, out);
    const std::vector<Span>& tasks = spans;  // the caller's, whichever thread runs the task
    parallel_for(int64_t(tasks.size()) * heads.num_kv_heads, num_threads, [&](int64_t task) {
        attend(tasks[task / heads.num_kv_heads], task % heads.num_kv_heads);
    });
}

}  // namespace flexpipe

extern "C" {

void flexpipe_attention(const flexpipe::Batch* batch, const flexpipe::Heads* heads, const float* q, int64_t q_stride,
                        const float* k, int64_t k_stride, const float* v, int64_t v_stride, float* kv, float* out,
                        int num_threads) {
    flexpipe::attention(*batch, *heads, q, q_stride, k, k_stride, v, v_stride, kv, out, num_threads);
}
}
