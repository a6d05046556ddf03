// The machine's float vector through the compiler's vector extensions: no intrinsics, any architecture.
#pragma once

#include <cstdint>
#include <cstring>

namespace flexpipe {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kVecBytes = kLanes * sizeof(float);

typedef float Vec __attribute__((vector_size(kVecBytes)));
typedef int32_t IntVec __attribute__((vector_size(kVecBytes)));

inline Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof(v));
    return v;
}

// The first n floats, then zeros.
inline Vec load_first(const float* p, int64_t n) {
    Vec v = {};
    std::memcpy(&v, p, n * sizeof(float));
    return v;
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }

inline Vec broadcast(float x) { return x - Vec{}; }

inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

inline float sum(Vec v) {
    float total = v[0];
    for (int i = 1; i < kLanes; ++i) total += v[i];
    return total;
}

inline float max_lane(Vec v) {
    float largest = v[0];
    for (int i = 1; i < kLanes; ++i) largest = v[i] > largest ? v[i] : largest;
    return largest;
}

// e^x to about 2 units in the last place; 0 below -87, NaN for NaN, infinity above 88.
inline Vec exp(Vec x) {
    const Vec lowest = broadcast(-87.0f), highest = broadcast(89.0f);
    Vec clamped = x < lowest ? lowest : x;
    clamped = clamped > highest ? highest : clamped;
    const Vec shift = broadcast(12582912.0f);  // 1.5 * 2^23: adding it leaves the rounded integer in the low bits
    const Vec shifted = clamped * broadcast(1.44269504f) + shift;
    const Vec n = shifted - shift;
    Vec r = clamped - n * broadcast(0.693359375f);
    r = r - n * broadcast(-2.12194440e-4f);
    Vec p = broadcast(1.9875691500e-4f);
    p = p * r + broadcast(1.3981999507e-3f);
    p = p * r + broadcast(8.3334519073e-3f);
    p = p * r + broadcast(4.1665795894e-2f);
    p = p * r + broadcast(1.6666665459e-1f);
    p = p * r + broadcast(5.0000001201e-1f);
    p = p * (r * r) + (r + broadcast(1.0f));
    // Two factors, because 2^128 itself is no float.
    const IntVec exponent = (IntVec)shifted - (IntVec)shift;
    const IntVec half = exponent >> 1;
    const Vec first = (Vec)((half + 127) << 23), second = (Vec)((exponent - half + 127) << 23);
    const Vec result = p * first * second;
    return x < lowest ? Vec{} : result;
}

// Transposes a square of kLanes vectors in place.
inline void transpose(Vec (&rows)[kLanes]) {
    IntVec lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
#pragma GCC unroll 4
    for (int step = 1; step < kLanes; step *= 2) {
        const IntVec upper = (lane & step) != 0;
        const IntVec take_low = upper ? lane - step + kLanes : lane;
        const IntVec take_high = upper ? lane + kLanes : lane + step;
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
            if (i & step) continue;
            const Vec a = rows[i], b = rows[i + step];
            rows[i] = __builtin_shuffle(a, b, take_low);
            rows[i + step] = __builtin_shuffle(a, b, take_high);
        }
    }
}

}  // namespace flexpipe
