// The transforms of Winograd's F(4x4, 3x3) (arXiv 1509.09308, section 4): Y = A' [(G g G') * (B' d B)] A, where * multiplies
// element by element, gives 4 x 4 outputs Y of a 3 x 3 filter g on a 6 x 6 patch d.
//
// In one dimension: an output is a coefficient of a product of polynomials, which has degree 5 and is found from its values
// at six points (Toom and Cook). Ours are 0, p, -p, q, -q and infinity. With m(x) = x (x^2 - p^2) (x^2 - q^2):
//   G, a row for each point x: (1, x, x^2) / m'(x), and (0, 0, 1) for infinity;
//   A', a column for each point x: (1, x, x^2, x^3), and (0, 0, 0, 1) for infinity;
//   B', a row for each point x: the coefficients of m(y) / (y - x), from y^0 on, and of m(y) for infinity.
// Rows for x and -x share the even and the odd half of their sums. Sums over the patches of a channel, and over channels,
// need one inverse transform for all. The gradient of the filter is G' [(B' d B) * (A Y A')] G by the transposed maps.
#pragma once
#include "vector.h"

namespace {

constexpr int kTile = 4, kPatch = 6, kFilter = 3, kPoints = kPatch * kPatch;
constexpr float p1 = 0.625f, q1 = 1.5f, p2 = p1 * p1, q2 = q1 * q1, p3 = p1 * p2, q3 = q1 * q2;
constexpr float kScale0 = 1 / (p2 * q2), kScaleP = 1 / (2 * p2 * (p2 - q2)), kScaleQ = 1 / (2 * q2 * (q2 - p2));

// B' d
struct PatchTransform {
  static INLINE void apply(const V (&d)[6], V (&to)[6]) {
    const V even_p = d[4] - q2 * d[2], odd_p = p1 * (d[3] - q2 * d[1]);
    const V even_q = d[4] - p2 * d[2], odd_q = q1 * (d[3] - p2 * d[1]);
    to[0] = p2 * q2 * d[0] - (p2 + q2) * d[2] + d[4];
    to[1] = even_p + odd_p;
    to[2] = even_p - odd_p;
    to[3] = even_q + odd_q;
    to[4] = even_q - odd_q;
    to[5] = p2 * q2 * d[1] - (p2 + q2) * d[3] + d[5];
  }
};

// G g
struct FilterTransform {
  static INLINE void apply(const V (&g)[3], V (&to)[6]) {
    const V even_p = kScaleP * g[0] + (kScaleP * p2) * g[2], odd_p = (kScaleP * p1) * g[1];
    const V even_q = kScaleQ * g[0] + (kScaleQ * q2) * g[2], odd_q = (kScaleQ * q1) * g[1];
    to[0] = kScale0 * g[0];
    to[1] = even_p + odd_p;
    to[2] = even_p - odd_p;
    to[3] = even_q + odd_q;
    to[4] = even_q - odd_q;
    to[5] = g[2];
  }
};

// A' m
struct OutputTransform {
  static INLINE void apply(const V (&m)[6], V (&to)[4]) {
    const V even_p = m[1] + m[2], odd_p = m[1] - m[2], even_q = m[3] + m[4], odd_q = m[3] - m[4];
    to[0] = m[0] + even_p + even_q;
    to[1] = p1 * odd_p + q1 * odd_q;
    to[2] = p2 * even_p + q2 * even_q;
    to[3] = p3 * odd_p + q3 * odd_q + m[5];
  }
};

// A y
struct OutputGradient {
  static INLINE void apply(const V (&y)[4], V (&to)[6]) {
    const V even_p = y[0] + p2 * y[2], odd_p = p1 * y[1] + p3 * y[3];
    const V even_q = y[0] + q2 * y[2], odd_q = q1 * y[1] + q3 * y[3];
    to[0] = y[0];
    to[1] = even_p + odd_p;
    to[2] = even_p - odd_p;
    to[3] = even_q + odd_q;
    to[4] = even_q - odd_q;
    to[5] = y[3];
  }
};

// G' u
struct FilterGradient {
  static INLINE void apply(const V (&u)[6], V (&to)[3]) {
    const V even_p = kScaleP * (u[1] + u[2]), odd_p = (kScaleP * p1) * (u[1] - u[2]);
    const V even_q = kScaleQ * (u[3] + u[4]), odd_q = (kScaleQ * q1) * (u[3] - u[4]);
    to[0] = kScale0 * u[0] + even_p + even_q;
    to[1] = odd_p + odd_q;
    to[2] = p2 * even_p + q2 * even_q + u[5];
  }
};

// The transform of the columns, then of the rows.
template <class Transform, int N, int M>
INLINE void transform(const V (&from)[N][N], V (&to)[M][M]) {
  V half[M][N];
  for (int s = 0; s < N; s++) {
    V column[N], changed[M];
    for (int r = 0; r < N; r++) column[r] = from[r][s];
    Transform::apply(column, changed);
    for (int r = 0; r < M; r++) half[r][s] = changed[r];
  }
  for (int r = 0; r < M; r++) Transform::apply(half[r], to[r]);
}

// The 4 x 4 tiles of pictures, in the order of (picture, row, column). The last ones of a row or column may stick out.
struct Tiling {
  int64_t batch, height, width, down, across;

  Tiling(int64_t batch, int64_t height, int64_t width)
      : batch(batch), height(height), width(width), down((height + kTile - 1) / kTile), across((width + kTile - 1) / kTile) {}
  int64_t count() const { return batch * down * across; }
};

// Of one channel at a time, what lies at `tiles` tiles from `first` on: SIDE is 6, a tile with a border of one pixel,
// or 4. Outside the picture there are zeros. Vectors have a lane for each tile; those behind the last repeat it.
template <int SIDE>
class Patches {
 public:
  Patches(const Tiling& tiling, int64_t most_tiles)
      : tiling_(tiling),
        pitch_(kTile * tiling.across + 2 * kBorder),
        rows_(((most_tiles - 1) / tiling.across + 2) * SIDE * pitch_ + kLanes),
        corners_(new int64_t[most_tiles + kLanes]) {
    std::memset(rows_ + ((most_tiles - 1) / tiling.across + 2) * SIDE * pitch_, 0, kLanes * sizeof(float));
  }

  void at(int64_t first, int64_t tiles) {
    first_row_ = first / tiling_.across;
    last_row_ = (first + tiles - 1) / tiling_.across;
    for (int64_t i = 0; i < tiles + kLanes; i++) {
      const int64_t tile = first + (i < tiles ? i : tiles - 1);
      corners_[i] = (tile / tiling_.across - first_row_) * SIDE * pitch_ + kTile * (tile % tiling_.across);
    }
  }

  // Copies the rows of a channel, `picture` floats lie between it and the same channel of the next picture.
  void read(const float* channel, int64_t picture) {
    float* to = rows_;
    for (int64_t row = first_row_; row <= last_row_; row++) {
      const float* from = channel + row / tiling_.down * picture;
      for (int r = 0; r < SIDE; r++, to += pitch_) {
        const int64_t y = kTile * (row % tiling_.down) + r - kBorder;
        if (y < 0 || y >= tiling_.height) {
          for (int64_t i = 0; i < pitch_; i++) to[i] = 0;
          continue;
        }
        if (kBorder) to[0] = 0;
        for (int64_t i = 0; i < tiling_.width; i++) to[kBorder + i] = from[y * tiling_.width + i];
        for (int64_t i = kBorder + tiling_.width; i < pitch_; i++) to[i] = 0;
      }
    }
  }

  // The patches of the tiles from number `i` of the block on.
  INLINE void get(int64_t i, V (&d)[SIDE][SIDE]) const {
    for (int r = 0; r < SIDE; r++) {
      const float* row = rows_ + r * pitch_;
      for (int s = 0; s < SIDE; s += kLanes) {
        V square[kLanes];
        for (int l = 0; l < kLanes; l++) square[l] = load(row + corners_[i + l] + s);
        transpose_squares<kLanes>(square);
        for (int l = 0; l < kLanes && s + l < SIDE; l++) d[r][s + l] = square[l];
      }
    }
  }

 private:
  static constexpr int kBorder = (SIDE - kTile) / 2;
  Tiling tiling_;
  int64_t pitch_, first_row_ = 0, last_row_ = 0;
  Scratch rows_;  // SIDE rows for each row of tiles, and one vector that loads may run into
  std::unique_ptr<int64_t[]> corners_;
};

// 3 x 3 filters: the one from input c to output o begins at w[o * output + c * input]. Turned ones are read backwards.
struct Filters {
  const float *w, *end;
  int64_t output, input;
  bool turned;

  // The filters from inputs c, c + 1, ... to output o, one in each lane; zeros for lanes from `inputs` on.
  INLINE void get(int64_t o, int64_t c, int64_t inputs, V (&g)[kFilter][kFilter]) const {
    constexpr int kTaps = kFilter * kFilter, kRoom = (kTaps + kLanes - 1) / kLanes * kLanes;
    const float* from = w + o * output + c * input;
    int64_t pitch = input;
    float copy[kLanes * kRoom];
    if (inputs < kLanes || from + (kLanes - 1) * input + kRoom > end) {  // vectors would reach beyond the tensor
      for (int l = 0; l < kLanes; l++)
        for (int i = 0; i < kRoom; i++) copy[l * kRoom + i] = l < inputs && i < kTaps ? from[l * input + i] : 0;
      from = copy;
      pitch = kRoom;
    }
    for (int i = 0; i < kTaps; i += kLanes) {
      V square[kLanes];
      for (int l = 0; l < kLanes; l++) square[l] = load(from + l * pitch + i);
      transpose_squares<kLanes>(square);
      for (int l = 0; l < kLanes && i + l < kTaps; l++) {
        const int tap = turned ? kTaps - 1 - i - l : i + l;
        g[tap / kFilter][tap % kFilter] = square[l];
      }
    }
  }
};

// Rows of tiles for each of the 36 points: panels of two vectors of tiles, and at the end perhaps of one.
class Panels {
 public:
  Panels(int64_t rows, int64_t most_tiles)
      : rows_(rows), point_(rows * kWide + kLanes), memory_((most_tiles + kWide - 1) / kWide * kPoints * point_) {}
  // One vector more than the rows need lies between points: at powers of two they would share the cache's places.
  float* at(int64_t panel, int point) const { return memory_ + (panel * kPoints + point) * point_; }
  int64_t between_points() const { return point_; }

 private:
  int64_t rows_, point_;
  Scratch memory_;
};

}  // namespace
