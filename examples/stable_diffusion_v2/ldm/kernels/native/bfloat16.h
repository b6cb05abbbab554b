// Products of bfloat16 numbers with float32 sums, for CPUs that have the instruction (AVX-512 BF16). Two numbers that
// follow each other in a sum lie in one lane of 32 bits, the first in the low half. Such pairs travel as floats: a row of
// 2n numbers is a row of n pairs.
#pragma once
#include "vector.h"

#if defined(__AVX512BF16__)
#define HAS_BFLOAT16
#include <immintrin.h>

namespace {

// Lane l is the pair of first[l] and second[l], rounded to nearest even.
INLINE V pairs(V first, V second) {
  const auto bits = [](V v) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)v)); };
  return (V)_mm512_or_epi32(bits(first), _mm512_slli_epi32(bits(second), 16));
}

// A row of n floats to (n + 1) / 2 pairs; 0 follows an odd last one.
inline void to_pairs(const float* from, int64_t n, float* to) {
  auto* words = reinterpret_cast<uint16_t*>(to);
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t left = n - i;
    const auto some = left < kLanes ? (1 << left) - 1 : 0xffff;
    const __m512 floats = _mm512_maskz_loadu_ps(some, from + i);
    _mm256_mask_storeu_epi16(words + i, some | (left < kLanes && left % 2 ? 1 << left : 0), (__m256i)_mm512_cvtneps_pbh(floats));
  }
}

// How products multiply pairs; see Floats.
struct Pairs {
  static constexpr int kNumbers = 2;
  static INLINE V multiply_add(V sum, const float* left, V right) {
    int pair;
    std::memcpy(&pair, left, sizeof pair);
    return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)right);
  }

  // A panel of `rows` rows of floats to half as many rows of pairs, in place; there is room for one row more.
  template <int VECTORS>
  static void pack(int64_t rows, float* panel) {
    constexpr int64_t kSize = VECTORS * kLanes;
    if (rows % 2) std::memset(panel + rows * kSize, 0, kSize * sizeof(float));
    for (int64_t r = 0; r < rows; r += 2)
      for (int64_t i = 0; i < kSize; i += kLanes)
        store(panel + r / 2 * kSize + i, pairs(load(panel + r * kSize + i), load(panel + (r + 1) * kSize + i)));
  }

  static const float* rows(const float* from, int64_t count, int64_t n, float* room) {
    for (int64_t r = 0; r < count; r++) to_pairs(from + r * n, n, room + r * ((n + 1) / 2));
    return room;
  }
};

}  // namespace
#endif
