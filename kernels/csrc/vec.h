// The machine's float vector through the compiler's vector extensions: any architecture, and intrinsics only where the
// extensions say too little.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX__)
#include <immintrin.h>
#endif

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

inline Vec to_float(IntVec v) { return __builtin_convertvector(v, Vec); }

// Small integers of memory, one to a lane.
template <typename Narrow>
inline IntVec load_widened(const char* p) {
    typedef Narrow NarrowVec __attribute__((vector_size(kLanes * sizeof(Narrow))));
    NarrowVec narrow;
    std::memcpy(&narrow, p, sizeof(narrow));
    return __builtin_convertvector(narrow, IntVec);
}

#if defined(__AVX512F__)
inline IntVec load_uint8(const char* p) { return (IntVec)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
inline IntVec load_int8(const char* p) { return (IntVec)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)); }
inline IntVec load_uint16(const char* p) {
    return (IntVec)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
}
#else
inline IntVec load_uint8(const char* p) { return load_widened<uint8_t>(p); }
inline IntVec load_int8(const char* p) { return load_widened<int8_t>(p); }
inline IntVec load_uint16(const char* p) { return load_widened<uint16_t>(p); }
#endif

// The lower four bits of each lane as a float. By looking them up where that takes one instruction.
inline Vec low_bits_to_float(IntVec v) {
#if defined(__AVX512F__)
    const __m512 floats = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return (Vec)_mm512_permutexvar_ps((__m512i)v, floats);
#else
    return to_float(v & 15);
#endif
}

inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

inline float sum(Vec v) {
    float total = v[0];
    for (int i = 1; i < kLanes; ++i) total += v[i];
    return total;
}

inline float max_lane(Vec v) {
    IntVec lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
#pragma GCC unroll 4
    for (int step = kLanes / 2; step > 0; step /= 2) v = max(v, __builtin_shuffle(v, lane ^ step));
    return v[0];
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

// The first kCount fours of floats of every fourth of kLanes rows: fours[i] has the i-th of each row.
template <int kCount>
inline void load_fours(const float* const* rows, Vec (&fours)[kCount]) {
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
#if defined(__AVX512F__)
        const __m512 one = _mm512_castps128_ps512(_mm_loadu_ps(rows[0] + i * 4));
        const __m512 two = _mm512_insertf32x4(one, _mm_loadu_ps(rows[4] + i * 4), 1);
        const __m512 three = _mm512_insertf32x4(two, _mm_loadu_ps(rows[8] + i * 4), 2);
        fours[i] = (Vec)_mm512_insertf32x4(three, _mm_loadu_ps(rows[12] + i * 4), 3);
#elif defined(__AVX__)
        const __m256 one = _mm256_castps128_ps256(_mm_loadu_ps(rows[0] + i * 4));
        fours[i] = (Vec)_mm256_insertf128_ps(one, _mm_loadu_ps(rows[4] + i * 4), 1);
#else
        fours[i] = load(rows[0] + i * 4);
#endif
    }
}

// to[i * stride + row] = rows[row][offset + i] for kLanes rows and i < kColumns, a multiple of 4. Loading fours into
// their places saves half of the shuffles, and those that are slow because they cross a vector's quarters.
template <int kColumns>
inline void transpose(const float* const* rows, int64_t offset, float* to, int64_t stride) {
    const float* from[kLanes];  // copies, which the stores cannot change
    for (int i = 0; i < kLanes; ++i) from[i] = rows[i] + offset;
    IntVec low_pairs, high_pairs, low_halves, high_halves;
    for (int i = 0; i < kLanes; ++i) {
        const int four = i / 4 * 4, odd = i % 2, upper = i % 4 / 2;
        low_pairs[i] = four + upper + odd * kLanes;        // a0 b0 a1 b1
        high_pairs[i] = four + upper + odd * kLanes + 2;   // a2 b2 a3 b3
        low_halves[i] = four + odd + upper * kLanes;       // a0 a1 b0 b1
        high_halves[i] = four + odd + upper * kLanes + 2;  // a2 a3 b2 b3
    }
    Vec a[kColumns / 4], b[kColumns / 4], c[kColumns / 4], d[kColumns / 4];
    load_fours(from, a);
    load_fours(from + 1, b);
    load_fours(from + 2, c);
    load_fours(from + 3, d);
#pragma GCC unroll 4
    for (int i = 0; i < kColumns / 4; ++i, to += 4 * stride) {
        const Vec ab_low = __builtin_shuffle(a[i], b[i], low_pairs);
        const Vec ab_high = __builtin_shuffle(a[i], b[i], high_pairs);
        const Vec cd_low = __builtin_shuffle(c[i], d[i], low_pairs);
        const Vec cd_high = __builtin_shuffle(c[i], d[i], high_pairs);
        store(to, __builtin_shuffle(ab_low, cd_low, low_halves));
        store(to + stride, __builtin_shuffle(ab_low, cd_low, high_halves));
        store(to + 2 * stride, __builtin_shuffle(ab_high, cd_high, low_halves));
        store(to + 3 * stride, __builtin_shuffle(ab_high, cd_high, high_halves));
    }
}

}  // namespace flexpipe
