// Vectors of floats by the compiler's extensions, one source for AVX-512, AVX2 and NEON, and what is built of them:
// exp, transposition, matrix product. Every sum has a fixed order.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

#define INLINE inline __attribute__((always_inline))

namespace {

// kLanes: floats in a vector. kRows: rows of a product whose sums stay in registers, two vectors each.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 8;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRows = 6;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRows = 8;
#else
constexpr int kLanes = 4, kRows = 4;
#endif
constexpr int64_t kWide = 2 * kLanes;  // floats in a row of a wide panel

// The number of rows from n on that leaves a product no last rows, which are slower.
constexpr int64_t whole_rows(int64_t n) { return (n + kRows - 1) / kRows * kRows; }

typedef float V __attribute__((vector_size(4 * kLanes)));
typedef int32_t VI __attribute__((vector_size(4 * kLanes)));
typedef float VAnywhere __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

INLINE V load(const float* p) { return *reinterpret_cast<const VAnywhere*>(p); }
INLINE void store(float* p, V v) { *reinterpret_cast<VAnywhere*>(p) = v; }
// Lanes from an array with `left` entries; zeros behind them.
INLINE V load_some(const float* p, int64_t left) {
  if (left >= kLanes) return load(p);
  float room[kLanes] = {};
  for (int64_t i = 0; i < kLanes && i < left; i++) room[i] = p[i];
  return load(room);
}
INLINE V spread(float x) { return x - V{}; }

// exp(x) for x up to 88, to 2 ulp: 2^n e^r, |r| <= ln2/2, polynomial of degree 6. Below -87 it is 0; NaN passes
// through.
INLINE V exponential(V x) {
  constexpr float kLowest = -87.0f, kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves n in the lowest bits
  const V shifted = (x < spread(kLowest) ? spread(kLowest) : x) * 1.44269504f + kRound;
  const V n = shifted - kRound;
  const V r = ((x < spread(kLowest) ? spread(kLowest) : x) - n * 0.693359375f) + n * 2.12194440e-4f;
  V y = spread(1.0f / 720);
  y = y * r + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  y = (V)((VI)y + ((VI)shifted << 23));
  return x < spread(kLowest) ? V{} : y;
}

// Lane l is a[l] where bit S of l is 0, else b[l - S].
template <int S, int... L>
INLINE V lower(V a, V b, std::integer_sequence<int, L...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, ((L & S) ? kLanes + L - S : L)...);
#else
  return __builtin_shuffle(a, b, VI{((L & S) ? kLanes + L - S : L)...});
#endif
}

// Lane l is a[l + S] where bit S of l is 0, else b[l].
template <int S, int... L>
INLINE V upper(V a, V b, std::integer_sequence<int, L...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, ((L & S) ? kLanes + L : L + S)...);
#else
  return __builtin_shuffle(a, b, VI{((L & S) ? kLanes + L : L + S)...});
#endif
}

// Transposes the N x N squares that lie side by side in N vectors. It swaps the corners of squares of 2, 4, 8, 16.
template <int N, int S = N / 2>
INLINE void transpose_squares(V (&rows)[N]) {
  if constexpr (S > 0) {
    constexpr auto lanes = std::make_integer_sequence<int, kLanes>{};
#pragma GCC unroll 16
    for (int i = 0; i < N; i++) {
      if (i & S) continue;
      const V a = rows[i], b = rows[i + S];
      rows[i] = lower<S>(a, b, lanes);
      rows[i + S] = upper<S>(a, b, lanes);
    }
    transpose_squares<N, S / 2>(rows);
  }
}

// to[c][r] = from[r][c], where `from` has rows x columns floats, `pitch` apart, and the rows of `to` are `to_pitch`
// apart.
inline void transpose(const float* from, int64_t rows, int64_t columns, int64_t pitch, float* to, int64_t to_pitch) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    for (int64_t c = 0; c < columns; c += kLanes) {
      const float* corner = from + r * pitch + c;
      float* to_corner = to + c * to_pitch + r;
      if (r + kLanes <= rows && c + kLanes <= columns) {
        V square[kLanes];
        for (int i = 0; i < kLanes; i++) square[i] = load(corner + i * pitch);
        transpose_squares<kLanes>(square);
        for (int i = 0; i < kLanes; i++) store(to_corner + i * to_pitch, square[i]);
      } else {
        for (int64_t i = 0; i < kLanes && r + i < rows; i++)
          for (int64_t j = 0; j < kLanes && c + j < columns; j++) to_corner[j * to_pitch + i] = corner[i * pitch + j];
      }
    }
  }
}

// The left factor of a product: element (r, k) is at[r * row + k * step].
struct Left {
  const float* at;
  int64_t row, step;
};

// How one step of a product multiplies: here one float of the left row with a vector of floats. Another way is in
// bfloat16.h.
struct Floats {
  static constexpr int kNumbers = 1;  // of a row that one step of a product takes
  static INLINE V multiply_add(V sum, const float* left, V right) { return sum + spread(*left) * right; }
  // A panel of `rows` rows of floats becomes what the steps take; for this way it is that.
  template <int VECTORS>
  static void pack(int64_t, float*) {}
  // The same for `count` rows of n floats that lie one after the other; `room` has as many floats.
  static const float* rows(const float* from, int64_t, int64_t, float*) { return from; }
};

// Steps of a product over so many numbers.
template <class How>
int64_t steps(int64_t numbers) {
  return (numbers + How::kNumbers - 1) / How::kNumbers;
}

// R rows of `product`, whose sums stay in registers.
template <class How, int VECTORS, int R>
INLINE void product_of_rows(int64_t depth, Left a, const float* b, float* c, bool add) {
  V sum[R][VECTORS];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < VECTORS; v++) sum[r][v] = add ? load(c + (r * VECTORS + v) * kLanes) : V{};
  for (int64_t k = 0; k < depth; k++, b += VECTORS * kLanes, a.at += a.step) {
    V right[VECTORS];
    for (int v = 0; v < VECTORS; v++) right[v] = load(b + v * kLanes);
    for (int r = 0; r < R; r++)
      for (int v = 0; v < VECTORS; v++) sum[r][v] = How::multiply_add(sum[r][v], a.at + r * a.row, right[v]);
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < VECTORS; v++) store(c + (r * VECTORS + v) * kLanes, sum[r][v]);
}

// The rows that are left, fewer than kRows.
template <class How, int VECTORS, int R = kRows - 1>
inline void product_of_last_rows(int64_t rows, int64_t depth, Left a, const float* b, float* c, bool add) {
  if constexpr (R > 0) {
    if (rows == R) return product_of_rows<How, VECTORS, R>(depth, a, b, c, add);
    product_of_last_rows<How, VECTORS, R - 1>(rows, depth, a, b, c, add);
  }
}

// c = a b, or c += a b: a is rows x depth, b is depth x VECTORS vectors, c is rows x VECTORS vectors; b and c are
// packed.
template <int VECTORS, class How = Floats>
__attribute__((noinline)) void product(int64_t rows, int64_t depth, Left a, const float* b, float* c, bool add) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows)
    product_of_rows<How, VECTORS, kRows>(depth, {a.at + r * a.row, a.row, a.step}, b, c + r * VECTORS * kLanes, add);
  product_of_last_rows<How, VECTORS>(rows - r, depth, {a.at + r * a.row, a.row, a.step}, b, c + r * VECTORS * kLanes, add);
}

// Uninitialized floats, aligned to a cache line.
class Scratch {
 public:
  explicit Scratch(int64_t floats)
      : memory_(static_cast<float*>(std::aligned_alloc(64, (static_cast<size_t>(floats) * 4 + 63) / 64 * 64)), std::free) {
    if (!memory_) throw std::bad_alloc();
  }
  operator float*() const { return memory_.get(); }

 private:
  std::unique_ptr<float, void (*)(void*)> memory_;
};

}  // namespace
