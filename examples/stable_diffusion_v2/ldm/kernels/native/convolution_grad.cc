// The gradient of 3 x 3 filters, G' [sum over tiles of (B' d B) * (A Y A')] G; see winograd.h. For each of the 36
// points it is a product over tiles. A chunk of tiles at a time is transformed and multiplied, and the chunks'
// gradients are added in order.
#include <algorithm>

#include "operator.h"
#include "winograd.h"

namespace {

constexpr int64_t kOutputs = 32;            // rows of a product
constexpr int64_t kChunkFloats = 4 << 20;   // of the transformed patches of a chunk of tiles, at least one vector of tiles
constexpr int64_t kMostTiles = 256;         // in a chunk

struct FilterGradients {
  const float *x, *dy;
  float* dw;
  Tiling tiling;
  int64_t inputs, outputs;

  int64_t plane() const { return tiling.height * tiling.width; }
  int64_t tiles_of_a_chunk() const {
    const int64_t fit = kChunkFloats / (kPoints * (inputs + outputs)), most = std::min(fit, kMostTiles);
    return std::min(std::max<int64_t>(most / kLanes, 1), (tiling.count() + kLanes - 1) / kLanes) * kLanes;
  }
  void run() const;
};

// The transformed patches of a chunk: of x with inputs in the lanes, of dy with tiles.
class Chunk {
 public:
  Chunk(const FilterGradients& of, int64_t most_tiles)
      : of_(of),
        most_(most_tiles),
        x_point_(most_tiles * kWide + kLanes),
        dy_point_(of.outputs * most_tiles + kLanes),
        x_((of.inputs + kWide - 1) / kWide * kPoints * x_point_),
        dy_(kPoints * dy_point_) {}

  int64_t width(int64_t input) const { return of_.inputs - input > kLanes ? kWide : kLanes; }
  float* x(int64_t input, int point) const { return x_ + (input / kWide * kPoints + point) * x_point_; }
  Left dy(int64_t output, int point) const { return {dy_ + point * dy_point_ + output * most_, most_, 1}; }

  // kLanes inputs from number c on. `room` has kPoints * kLanes * most_tiles floats.
  void transform_inputs(int64_t c, int64_t tiles, Patches<kPatch>& patches, float* room) const {
    const int64_t lanes = std::min<int64_t>(kLanes, of_.inputs - c), panel = c / kWide * kWide;
    for (int64_t l = 0; l < lanes; l++) {
      patches.read(of_.x + (c + l) * of_.plane(), of_.inputs * of_.plane());
      for (int64_t t = 0; t < tiles; t += kLanes) {
        V d[kPatch][kPatch], u[kPatch][kPatch];
        patches.get(t, d);
        transform<PatchTransform>(d, u);
        for (int i = 0; i < kPoints; i++) store(room + (i * kLanes + l) * most_ + t, u[i / kPatch][i % kPatch]);
      }
    }
    for (int i = 0; i < kPoints; i++)
      transpose(room + i * kLanes * most_, lanes, tiles, most_, x(panel, i) + c - panel, width(panel));
  }

  void transform_output(int64_t o, int64_t tiles, Patches<kTile>& patches) const {
    patches.read(of_.dy + o * of_.plane(), of_.outputs * of_.plane());
    for (int64_t t = 0; t < tiles; t += kLanes) {
      V y[kTile][kTile], u[kPatch][kPatch];
      patches.get(t, y);
      transform<OutputGradient>(y, u);
      for (int i = 0; i < kPoints; i++) store(dy_ + i * dy_point_ + o * most_ + t, u[i / kPatch][i % kPatch]);
    }
  }

 private:
  const FilterGradients& of_;
  int64_t most_, x_point_, dy_point_;
  Scratch x_, dy_;
};

// `rows` outputs from number o on and the inputs of the panel from number c on: products, and their gradients of
// filters.
void multiply(const FilterGradients& of, const Chunk& chunk, int64_t tiles, int64_t o, int64_t c, float* room, bool add) {
  const int64_t rows = std::min(kOutputs, of.outputs - o), width = chunk.width(c), point = kOutputs * kWide + kLanes;
  for (int i = 0; i < kPoints; i++) {
    auto* multiply = width == kWide ? product<2> : product<1>;
    multiply(rows, tiles, chunk.dy(o, i), chunk.x(c, i), room + i * point, false);
  }
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t v = 0; v < width; v += kLanes) {
      V u[kPatch][kPatch], g[kFilter][kFilter];
      for (int i = 0; i < kPoints; i++) u[i / kPatch][i % kPatch] = load(room + i * point + r * width + v);
      transform<FilterGradient>(u, g);
      alignas(64) float taps[kFilter * kFilter][kLanes];
      for (int i = 0; i < kFilter * kFilter; i++) store(taps[i], g[i / kFilter][i % kFilter]);
      float* to = of.dw + ((o + r) * of.inputs + c + v) * kFilter * kFilter;
      for (int64_t l = 0; l < kLanes && c + v + l < of.inputs; l++)
        for (int i = 0; i < kFilter * kFilter; i++, to++) *to = taps[i][l] + (add ? *to : 0);
    }
  }
}

void FilterGradients::run() const {
  const int64_t most = tiles_of_a_chunk();
  const Chunk chunk(*this, most);
  PRAGMA(omp parallel) {
    Patches<kPatch> of_x(tiling, most);
    Patches<kTile> of_dy(tiling, most);
    const Scratch room(kPoints * std::max(kLanes * most, kOutputs * kWide + kLanes));
    for (int64_t first = 0; first < tiling.count(); first += most) {
      const int64_t tiles = std::min(most, tiling.count() - first);
      of_x.at(first, tiles);
      of_dy.at(first, tiles);
      PRAGMA(omp for schedule(dynamic) nowait)
      for (int64_t c = 0; c < inputs; c += kLanes) chunk.transform_inputs(c, tiles, of_x, room);
      PRAGMA(omp for schedule(dynamic, 4))
      for (int64_t o = 0; o < outputs; o++) chunk.transform_output(o, tiles, of_dy);
      PRAGMA(omp for collapse(2) schedule(dynamic))
      for (int64_t o = 0; o < outputs; o += kOutputs)
        for (int64_t c = 0; c < inputs; c += kWide) multiply(*this, chunk, tiles, o, c, room, first > 0);
    }
  }
}

}  // namespace

// inputs x [B, C, H, W], dy [B, O, H, W]; output dw [O, C, 3, 3]
KERNEL(convolution3_weight_grad) {
  FilterGradients{in(p, 0), in(p, 1), out(p, 2), {shape[0][0], shape[0][2], shape[0][3]}, shape[0][1], shape[1][1]}.run();
  return 0;
}

// inputs dy [B, O, H, W], bias [O] or [B, O]; output dbias
KERNEL(convolution3_bias_grad) {
  constexpr int64_t kStrip = 4096;  // floats summed in single precision before the sum goes on in double
  const float* dy = in(p, 0);
  float* dbias = out(p, 2);
  const int64_t outputs = shape[0][1], plane = shape[0][2] * shape[0][3], batch = rank[1] == 1 ? shape[0][0] : 1;
  PARALLEL for (int64_t o = 0; o < count(rank[1], shape[1]); o++) {
    double sum = 0;
    for (int64_t n = 0; n < batch; n++) {
      const float* from = dy + (n * outputs + o) * plane;
      for (int64_t start = 0; start < plane; start += kStrip) {
        const int64_t stop = std::min(start + kStrip, plane);
        float s = 0;
        PRAGMA(omp simd reduction(+ : s)) for (int64_t i = start; i < stop; i++) s += from[i];
        sum += s;
      }
    }
    dbias[o] = static_cast<float>(sum);
  }
  return 0;
}
