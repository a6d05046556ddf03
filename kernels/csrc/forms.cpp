#include "forms.h"

#include <algorithm>
#include <cmath>

namespace flexpipe {
namespace {

constexpr int64_t kFloats = kBlock * kPanel;

// The nearest float with a significand of 11 bits, as half precision has: scales are mostly stored in that.
float to_half_precision(double x) {
    int exponent;
    const double significand = std::frexp(x, &exponent);
    return float(std::ldexp(std::nearbyint(std::ldexp(significand, 11)), exponent - 11));
}

uint32_t bits(float x) {
    uint32_t result;
    std::memcpy(&result, &x, sizeof(x));
    return result;
}

// Whether some code of [lowest, highest] gives each of an output's floats (every kPanel-th) back; writes the codes.
bool find_codes(const float* floats, float scale, float low, int lowest, int highest, int* codes) {
    for (int64_t i = 0; i < kBlock; ++i) {
        const float x = floats[i * kPanel];
        const float code = scale == 0.0f ? 0.0f : std::nearbyint((x - low) / scale);
        if (!(code >= lowest && code <= highest) || bits(std::fma(code, scale, low)) != bits(x)) return false;
        codes[i] = int(code);
    }
    return true;
}

// Scale and codes of one output whose floats reach over range in at most max_steps steps.
bool find_scale(const float* floats, double range, float low, int min_steps, int max_steps, int lowest, int highest,
                float* scale, int* codes) {
    for (int steps = max_steps; steps >= min_steps; --steps) {
        for (const float candidate : {to_half_precision(range / steps), float(range / steps)}) {
            *scale = candidate;
            if (find_codes(floats, candidate, low, lowest, highest, codes)) return true;
        }
    }
    return false;
}

bool encode_int8(const float* floats, char* block) {
    float* const scales = reinterpret_cast<float*>(block);
    int8_t* const code = reinterpret_cast<int8_t*>(block + kScalesBytes);
    for (int64_t output = 0; output < kPanel; ++output) {
        double largest = 0;
        for (int64_t i = 0; i < kBlock; ++i) largest = std::max(largest, std::fabs(double(floats[i * kPanel + output])));
        int codes[kBlock];
        if (!find_scale(floats + output, largest, 0.0f, 127, 128, -128, 127, scales + output, codes)) return false;
        for (int64_t i = 0; i < kBlock; ++i) code[i * kPanel + output] = int8_t(codes[i]);
    }
    return true;
}

bool encode_int4(const float* floats, char* block) {
    float* const scales = reinterpret_cast<float*>(block);
    uint8_t* const code = reinterpret_cast<uint8_t*>(block + 2 * kScalesBytes);
    for (int64_t output = 0; output < kPanel; ++output) {
        float low = floats[output], high = low;
        for (int64_t i = 1; i < kBlock; ++i) {
            low = std::min(low, floats[i * kPanel + output]);
            high = std::max(high, floats[i * kPanel + output]);
        }
        int codes[kBlock];
        if (!find_scale(floats + output, double(high) - low, low, 1, 15, 0, 15, scales + output, codes)) return false;
        scales[kPanel + output] = low;
        for (int64_t i = 0; i < kBlock; i += 2) {
            code[i / 2 * kPanel + output] = uint8_t(codes[i] | codes[i + 1] << 4);
        }
    }
    return true;
}

bool encode_bfloat16(const float* floats, char* block) {
    for (int64_t i = 0; i < kFloats; ++i) {
        const uint16_t half = uint16_t(bits(floats[i]) >> 16);
        std::memcpy(block + 2 * i, &half, sizeof(half));
    }
    return true;
}

bool encode_block(Form form, const float* floats, char* block) {
    switch (form) {
        case kBfloat16: return encode_bfloat16(floats, block);
        case kInt8: return encode_int8(floats, block);
        case kInt4: return encode_int4(floats, block);
        default: return false;
    }
}

}  // namespace

bool encode(Form form, const float* weight, int64_t num_outputs, int64_t num_inputs, int64_t first, int64_t end,
            char* packed) {
    float floats[kFloats], decoded[kFloats];
    for (int64_t panel = first; panel < end; ++panel) {
        const int64_t width = std::min(kPanel, num_outputs - panel * kPanel);
        for (int64_t input = 0; input < num_inputs; input += kBlock, packed += block_bytes(form)) {
            for (int64_t output = 0; output < kPanel; ++output) {
                const float* const row = weight + (panel * kPanel + output) * num_inputs + input;
                for (int64_t i = 0; i < kBlock; ++i) floats[i * kPanel + output] = output < width ? row[i] : 0.0f;
            }
            if (!encode_block(form, floats, packed)) return false;
            decode(form, packed, decoded);
            if (std::memcmp(decoded, floats, sizeof(floats)) != 0) return false;
        }
    }
    return true;
}

}  // namespace flexpipe

extern "C" {

int64_t flexpipe_block_bytes(int64_t form) { return flexpipe::block_bytes(flexpipe::Form(form)); }

int flexpipe_encode(int64_t form, const float* weight, int64_t num_outputs, int64_t num_inputs, int64_t first,
                    int64_t end, char* packed) {
    return flexpipe::encode(flexpipe::Form(form), weight, num_outputs, num_inputs, first, end, packed);
}
}
