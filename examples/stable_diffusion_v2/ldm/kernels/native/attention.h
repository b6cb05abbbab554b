// What attention and its gradients share. Tensors are [B, N, C] with the heads as slices of C that are read where they
// lie. The lanes of a panel are rows of a head: [width][VECTORS * kLanes], zero where there is no row.
#pragma once
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "operator.h"
#include "vector.h"

namespace {

constexpr int64_t kBlock = whole_rows(64);  // rows that meet a panel at a time

// One head of a tensor [B, N, C]: `count` rows of `width` floats, `pitch` apart.
struct Head {
  float* at;
  int64_t count, width, pitch;

  Head(const float* tensor, int64_t heads, int64_t rows, int64_t channels, int64_t number)
      : at(const_cast<float*>(tensor) + number / heads * rows * channels + number % heads * (channels / heads)),
        count(rows),
        width(channels / heads),
        pitch(channels) {}
  Head(const float* tensor, int64_t heads, const int64_t* shape, int64_t number)
      : Head(tensor, heads, shape[1], shape[2], number) {}
  Left rows(int64_t first) const { return {at + first * pitch, pitch, 1}; }
  Left columns(int64_t first) const { return {at + first * pitch, 1, pitch}; }
};

// softmax(q k' / sqrt(width) + mask) v. The mask [N, M] may be null.
struct Attention {
  const float *q, *k, *v, *mask;
  const int64_t *q_shape, *k_shape;
  int64_t heads;

  int64_t width() const { return q_shape[2] / heads; }
  int64_t queries() const { return q_shape[1]; }
  int64_t keys() const { return k_shape[1]; }
  float scale() const { return 1.0f / std::sqrt(static_cast<float>(width())); }
};

// Each of `rows` rows of a panel times `factor`.
template <int VECTORS>
void scale_rows(int64_t rows, const V (&factor)[VECTORS], float* panel) {
  for (int64_t r = 0; r < rows; r++, panel += VECTORS * kLanes)
    for (int v = 0; v < VECTORS; v++) store(panel + v * kLanes, load(panel + v * kLanes) * factor[v]);
}

template <int VECTORS>
void read_panel(const Head& head, int64_t first, float* panel, float scale = 1) {
  constexpr int64_t kSize = VECTORS * kLanes;
  const int64_t rows = std::min(kSize, head.count - first);
  if (rows < kSize) std::memset(panel, 0, head.width * kSize * sizeof(float));
  transpose(head.at + first * head.pitch, rows, head.width, head.pitch, panel, kSize);
  if (scale == 1) return;
  for (int64_t i = 0; i < head.width * kSize; i += kLanes) store(panel + i, load(panel + i) * scale);
}

template <int VECTORS>
void write_panel(const float* panel, int64_t first, const Head& head) {
  constexpr int64_t kSize = VECTORS * kLanes;
  transpose(panel, head.width, std::min(kSize, head.count - first), kSize, head.at + first * head.pitch, head.pitch);
}

// Scores [keys of a block][queries of a panel] += the mask, which lies the other way round.
template <int VECTORS>
void add_mask(const Attention& of, int64_t query, int64_t key, int64_t keys, float* scores, float* room) {
  constexpr int64_t kSize = VECTORS * kLanes;
  const float* corner = of.mask + query * of.keys() + key;
  transpose(corner, std::min(kSize, of.queries() - query), keys, of.keys(), room, kSize);
  for (int64_t i = 0; i < keys * kSize; i += kLanes) store(scores + i, load(scores + i) + load(room + i));
}

// work(vectors of a panel, number of the head in the batch, first row) for the panels of every head with `rows` rows.
template <class Work>
void for_each_panel(int64_t heads, int64_t rows, Work work) {
  const int64_t panels = (rows + kWide - 1) / kWide;
  PRAGMA(omp parallel for schedule(dynamic))
  for (int64_t i = 0; i < heads * panels; i++) {
    const int64_t number = i / panels, first = i % panels * kWide;
    if (rows - first > kLanes)
      work(std::integral_constant<int, 2>{}, number, first);
    else
      work(std::integral_constant<int, 1>{}, number, first);
  }
}

}  // namespace
