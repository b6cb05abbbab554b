// x W' + bias. Panels of W that fit a core's cache stay there while many rows of x pass. The bias is added as results
// are written.
#include <omp.h>

#include <algorithm>

#include "bfloat16.h"
#include "operator.h"

namespace {

constexpr int64_t kChunk = whole_rows(64);  // rows of x that meet a panel at a time
constexpr int64_t kBlock = 1024;       // rows of x for which a thread packs panels
constexpr int64_t kCached = 128 << 10;  // floats of packed panels

struct Affine {
  const float *x, *w, *bias;  // [rows, inputs], [outputs, inputs], [outputs] or null
  int64_t rows, inputs, outputs;
  float* y;
};

// A row of x as the left side of a product, of which `depth` steps make a whole sum, and W as panels [depth][kWide].
template <class How>
struct Product {
  const Affine& of;
  const float* left;
  int64_t depth = steps<How>(of.inputs);

  // The panel of 32 outputs from `first` on, zero where there is none. `room` has as many floats.
  void pack(int64_t first, float* panel, float* room) const {
    const int64_t width = std::min(kWide, of.outputs - first);
    if (width < kWide) std::memset(panel, 0, kWide * depth * sizeof(float));
    transpose(How::rows(of.w + first * of.inputs, width, of.inputs, room), width, depth, depth, panel, kWide);
  }

  // Sums [count][kWide] of a chunk and a panel to where they belong, with the bias.
  void write(const float* sums, int64_t row, int64_t count, int64_t first) const {
    const int64_t width = std::min(kWide, of.outputs - first);
    for (int64_t r = 0; r < count; r++) {
      float* to = of.y + (row + r) * of.outputs + first;
      PRAGMA(omp simd)
      for (int64_t o = 0; o < width; o++) to[o] = sums[r * kWide + o] + (of.bias ? of.bias[first + o] : 0);
    }
  }

  // The rows of a block with some panels.
  void run(int64_t first_row, int64_t end_row, int64_t first_panel, int64_t end_panel) const {
    const int64_t size = kWide * depth;
    const Scratch memory((end_panel - first_panel + 1) * size);
    const float* panels = memory + size;
    alignas(64) float sums[kChunk * kWide];
    for (int64_t p = first_panel; p < end_panel; p++) pack(p * kWide, memory + (1 + p - first_panel) * size, memory);
    for (int64_t row = first_row; row < end_row; row += kChunk) {
      const int64_t count = std::min(kChunk, end_row - row);
      for (int64_t p = first_panel; p < end_panel; p++) {
        product<2, How>(count, depth, {left + row * depth, depth, 1}, panels + (p - first_panel) * size, sums, false);
        write(sums, row, count, p * kWide);
      }
    }
  }

  int run() const {
    const int64_t panels = (of.outputs + kWide - 1) / kWide, blocks = (of.rows + kBlock - 1) / kBlock;
    const int64_t cached = std::max<int64_t>(1, kCached / (kWide * depth));
    const int64_t fair = std::max<int64_t>(1, panels * blocks / (4 * omp_get_max_threads()));
    const int64_t group = std::min(cached, fair), groups = (panels + group - 1) / group;
    PRAGMA(omp parallel for schedule(dynamic))
    for (int64_t i = 0; i < blocks * groups; i++) {
      const int64_t row = i / groups * kBlock, panel = i % groups * group;
      run(row, std::min(row + kBlock, of.rows), panel, std::min(panel + group, panels));
    }
    return 0;
  }
};

int affine(const Affine& of) { return Product<Floats>{of, of.x}.run(); }

#ifdef HAS_BFLOAT16
int affine_bfloat16(const Affine& of) {
  const int64_t depth = steps<Pairs>(of.inputs);
  const Scratch x(of.rows * depth);
  PARALLEL
  for (int64_t r = 0; r < of.rows; r++) to_pairs(of.x + r * of.inputs, of.inputs, x + r * depth);
  return Product<Pairs>{of, x}.run();
}
#endif

}  // namespace

// inputs x [N, in], W [out, in], bias [out]; output x W' + bias [N, out]
KERNEL(affine) { return affine({in(p, 0), in(p, 1), in(p, 2), shape[0][0], shape[0][1], shape[1][0], out(p, 3)}); }

// inputs x [N, in], W [out, in]; output x W' [N, out]
KERNEL(matmul) { return affine({in(p, 0), in(p, 1), nullptr, shape[0][0], shape[0][1], shape[1][0], out(p, 2)}); }

#ifdef HAS_BFLOAT16
// the same two with products in bfloat16 and sums in float32
KERNEL(affine_bfloat16) {
  return affine_bfloat16({in(p, 0), in(p, 1), in(p, 2), shape[0][0], shape[0][1], shape[1][0], out(p, 3)});
}

KERNEL(matmul_bfloat16) {
  return affine_bfloat16({in(p, 0), in(p, 1), nullptr, shape[0][0], shape[0][1], shape[1][0], out(p, 2)});
}
#endif
