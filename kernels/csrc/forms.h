// Forms in which packed weights are held. A form is taken only where it gives back every float's very bits, so it
// changes what is read from memory and nothing that is computed.
#pragma once

#include <cstdint>

#include "vec.h"

namespace flexpipe {

// Outputs of a panel. Missing outputs of the last one are zero.
constexpr int64_t kPanel = 3 * kLanes;
// Inputs of a block, the unit of every form but kFloat32.
constexpr int64_t kBlock = 32;

// A panel is [num_inputs][kPanel] floats, or num_inputs / kBlock blocks, one after the other:
enum Form : int64_t {
    kFloat32 = 0,
    kBfloat16 = 1,  // upper halves of floats [kBlock][kPanel]
    kInt8 = 2,      // float scale[kPanel], int8_t code[kBlock][kPanel]: code * scale
    kInt4 = 3,      // float scale[kPanel], float low[kPanel], uint8_t code[kBlock / 2][kPanel]: code * scale + low, the
                    // lower four bits for an even input, the upper four for the odd one after it
};

// Vectors of a panel's outputs.
constexpr int kVecs = kPanel / kLanes;
constexpr int64_t kScalesBytes = kPanel * sizeof(float);
constexpr int kCacheLine = 64;

constexpr int64_t block_bytes(Form form) {
    switch (form) {
        case kBfloat16: return kBlock * kPanel * 2;
        case kInt8: return kScalesBytes + kBlock * kPanel;
        case kInt4: return 2 * kScalesBytes + kBlock * kPanel / 2;
        default: return kBlock * kPanel * int64_t(sizeof(float));
    }
}

// Calls use(input, weights of the panel's outputs) for each input of a block that is not kFloat32, in order. Asks for
// the bytes some blocks ahead from memory.
template <typename Use>
inline void decode(Form form, const char* block, Use&& use) {
    constexpr int64_t kAhead = 4;
    const int64_t num_bytes = block_bytes(form);
    for (int64_t at = 0; at < num_bytes; at += kCacheLine) __builtin_prefetch(block + kAhead * num_bytes + at);
    Vec scale[kVecs], low[kVecs], w[kVecs];
    const auto take_scales = [&](Vec(&scales)[kVecs]) {
        for (int v = 0; v < kVecs; ++v, block += kVecBytes) scales[v] = load(reinterpret_cast<const float*>(block));
    };
    if (form == kInt4) {
        take_scales(scale);
        take_scales(low);
        for (int64_t i = 0; i < kBlock; i += 2) {
            IntVec pair[kVecs];
            for (int v = 0; v < kVecs; ++v, block += kLanes) pair[v] = load_uint8(block);
            for (int v = 0; v < kVecs; ++v) w[v] = low_bits_to_float(pair[v]) * scale[v] + low[v];
            use(i, w);
            for (int v = 0; v < kVecs; ++v) w[v] = low_bits_to_float(pair[v] >> 4) * scale[v] + low[v];
            use(i + 1, w);
        }
    } else if (form == kInt8) {
        take_scales(scale);
        for (int64_t i = 0; i < kBlock; ++i) {
            for (int v = 0; v < kVecs; ++v, block += kLanes) w[v] = to_float(load_int8(block)) * scale[v];
            use(i, w);
        }
    } else {
        for (int64_t i = 0; i < kBlock; ++i) {
            for (int v = 0; v < kVecs; ++v, block += 2 * kLanes) w[v] = (Vec)(load_uint16(block) << 16);
            use(i, w);
        }
    }
}

// Writes the floats [kBlock][kPanel] of a block that is not kFloat32.
inline void decode(Form form, const char* block, float* floats) {
    decode(form, block, [floats](int64_t i, const Vec(&w)[kVecs]) {
        for (int v = 0; v < kVecs; ++v) store(floats + i * kPanel + v * kLanes, w[v]);
    });
}

// Writes panels first to end of a weight [num_outputs, num_inputs] to packed, the place of panel first. Returns false,
// with anything written, where the form does not give its bits back. num_inputs is a multiple of kBlock.
bool encode(Form form, const float* weight, int64_t num_outputs, int64_t num_inputs, int64_t first, int64_t end,
            char* packed);

}  // namespace flexpipe
