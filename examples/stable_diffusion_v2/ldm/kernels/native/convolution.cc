// 3 x 3 convolution of stride 1 that keeps the picture's size, by Winograd's F(4x4, 3x3), and its gradients. Tensors
// stay [B, C, H, W]: a vector's lanes are tiles, not channels. The filters are transformed anew for each block of
// tiles.
#include <algorithm>
#include <omp.h>
#include <vector>

#include "operator.h"
#include "winograd.h"

namespace {

constexpr int64_t kOutputs = whole_rows(32), kInputs = 160;  // of the filters that are transformed at a time, 0.7 MiB
constexpr int64_t kBlockFloats = 1500000;        // of the transformed patches of a block of tiles
constexpr int64_t kLeastTiles = 64, kMostTiles = 128;  // in a block
constexpr int64_t kFewTiles = kLanes;            // of all pictures: so few do not fill vectors

int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Of a tile: its picture, its corner in the plane, and how much of it is in the picture.
struct Place {
  int64_t picture, corner, rows, columns;

  Place(const Tiling& of, int64_t tile) {
    const int64_t line = tile / of.across, top = line % of.down * kTile, left = tile % of.across * kTile;
    picture = line / of.down;
    corner = top * of.width + left;
    rows = std::min<int64_t>(kTile, of.height - top);
    columns = std::min<int64_t>(kTile, of.width - left);
  }
};

// y [B, O, H, W] of x [B, C, H, W].
struct Convolution {
  const float *x, *bias;  // bias may be null
  int64_t next_bias;      // floats between the biases of two pictures, 0 where all pictures have the same
  float* y;
  Tiling tiling;
  int64_t inputs, outputs;
  Filters filters;

  void run() const;
  void run_few() const;
  int64_t plane() const { return tiling.height * tiling.width; }
};

// What one thread works with.
class Worker {
 public:
  Worker(const Convolution& of, int64_t most_tiles)
      : of_(of),
        patches_(of.tiling, most_tiles),
        domain_(of.inputs, most_tiles),
        products_(kOutputs, most_tiles),
        filters_(kPoints * kFilterPoint) {}

  // Outputs [first_output, last_output) at `tiles` tiles.
  void run(int64_t first_tile, int64_t tiles, int64_t first_output, int64_t last_output) {
    first_ = first_tile;
    tiles_ = tiles;
    vectors_ = ceiling(tiles, kLanes);
    places_.clear();
    for (int64_t i = 0; i < tiles; i++) places_.emplace_back(of_.tiling, first_tile + i);
    transform_patches();
    for (int64_t o = first_output; o < last_output; o += kOutputs) {
      const int64_t rows = std::min(kOutputs, last_output - o);
      for (int64_t c = 0; c < of_.inputs; c += kInputs) {
        const int64_t depth = std::min(kInputs, of_.inputs - c);
        transform_filters(o, rows, c, depth);
        multiply(rows, c, depth);
      }
      for (int64_t r = 0; r < rows; r++) write(o, r);
    }
  }

 private:
  static constexpr int64_t kFilterPoint = kOutputs * kInputs + kLanes;  // see Panels
  // A panel has two vectors, the last one perhaps one.
  int64_t width(int64_t panel) const { return 2 * panel + 1 < vectors_ ? kWide : kLanes; }

  void transform_patches() {
    patches_.at(first_, tiles_);
    for (int64_t c = 0; c < of_.inputs; c++) {
      patches_.read(of_.x + c * of_.plane(), of_.inputs * of_.plane());
      for (int64_t v = 0; v < vectors_; v++) {
        V d[kPatch][kPatch], u[kPatch][kPatch];
        patches_.get(v * kLanes, d);
        transform<PatchTransform>(d, u);
        float* to = domain_.at(v / 2, 0) + c * width(v / 2) + v % 2 * kLanes;
        for (int i = 0; i < kPoints; i++) store(to + i * domain_.between_points(), u[i / kPatch][i % kPatch]);
      }
    }
  }

  void transform_filters(int64_t o, int64_t rows, int64_t c, int64_t depth) {
    for (int64_t r = 0; r < rows; r++) {
      for (int64_t k = 0; k < depth; k += kLanes) {
        V g[kFilter][kFilter], u[kPatch][kPatch];
        of_.filters.get(o + r, c + k, depth - k, g);
        transform<FilterTransform>(g, u);
        float* to = filters_ + r * kInputs + k;
        for (int i = 0; i < kPoints; i++) store(to + i * kFilterPoint, u[i / kPatch][i % kPatch]);
      }
    }
  }

  void multiply(int64_t rows, int64_t c, int64_t depth) {
    for (int i = 0; i < kPoints; i++) {
      const Left filters{filters_ + i * kFilterPoint, kInputs, 1};
      for (int64_t panel = 0; 2 * panel < vectors_; panel++) {
        const float* patches = domain_.at(panel, i) + c * width(panel);
        auto* multiply = width(panel) == kWide ? product<2> : product<1>;
        multiply(rows, depth, filters, patches, products_.at(panel, i), c > 0);
      }
    }
  }

  // Row r of the products, which is output o + r.
  void write(int64_t o, int64_t r) {
    for (int64_t v = 0; v < vectors_; v++) {
      V m[kPatch][kPatch], y[kTile][kTile];
      const float* from = products_.at(v / 2, 0) + r * width(v / 2) + v % 2 * kLanes;
      for (int i = 0; i < kPoints; i++) m[i / kPatch][i % kPatch] = load(from + i * products_.between_points());
      transform<OutputTransform>(m, y);
      const V bias = biases(o + r, v);
      alignas(64) float rows[kTile][kTile][kLanes];  // of tile l at [row][l % 4][l / 4 * 4]
      for (int i = 0; i < kTile; i++) {
        for (int j = 0; j < kTile; j++) y[i][j] += bias;
        transpose_squares<kTile>(y[i]);
        for (int j = 0; j < kTile; j++) store(rows[i][j], y[i][j]);
      }
      for (int64_t l = 0; l < kLanes && v * kLanes + l < tiles_; l++) {
        const Place& place = places_[v * kLanes + l];
        float* to = of_.y + (place.picture * of_.outputs + o + r) * of_.plane() + place.corner;
        for (int64_t i = 0; i < place.rows; i++, to += of_.tiling.width)
          copy(rows[i][l % kTile] + l / kTile * kTile, place.columns, to);
      }
    }
  }

  static INLINE void copy(const float* from, int64_t floats, float* to) {
    if (floats == kTile) {
      std::memcpy(to, from, kTile * sizeof(float));
    } else {
      for (int64_t i = 0; i < floats; i++) to[i] = from[i];
    }
  }

  // The bias of an output in the pictures of a vector of tiles.
  INLINE V biases(int64_t output, int64_t v) const {
    if (!of_.bias || !of_.next_bias) return spread(of_.bias ? of_.bias[output] : 0.0f);
    alignas(64) float lanes[kLanes];
    for (int l = 0; l < kLanes; l++) {
      const int64_t tile = std::min(v * kLanes + l, tiles_ - 1);
      lanes[l] = of_.bias[places_[tile].picture * of_.next_bias + output];
    }
    return load(lanes);
  }

  const Convolution& of_;
  Patches<kPatch> patches_;
  Panels domain_, products_;
  Scratch filters_;
  std::vector<Place> places_;
  int64_t first_ = 0, tiles_ = 0, vectors_ = 0;
};

// The same for at most kFewTiles tiles. Here a vector's lanes are outputs.
class FewTilesWorker {
 public:
  explicit FewTilesWorker(const Convolution& of)
      : of_(of),
        tiles_(of.tiling.count()),
        domain_(kPoints * of.inputs * kLanes),
        products_(kPoints * kProductPoint),
        filters_(kPoints * kFilterPoint) {
    for (int64_t i = 0; i < tiles_; i++) places_.emplace_back(of.tiling, i);
    transform_patches();
  }

  // kWide outputs from o on.
  void run(int64_t o) {
    for (int64_t c = 0; c < of_.inputs; c += kDepth) {
      const int64_t depth = std::min(kDepth, of_.inputs - c);
      for (int64_t k = 0; k < depth; k++)
        for (int64_t v = 0; v < kWide; v += kLanes) transform_filters(o + v, c + k, filters_ + k * kWide + v);
      for (int i = 0; i < kPoints; i++) {
        const Left patches{domain_ + (i * of_.inputs + c) * kLanes, 1, kLanes};
        product<2>(tiles_, depth, patches, filters_ + i * kFilterPoint, products_ + i * kProductPoint, c > 0);
      }
    }
    for (int64_t v = 0; v < kWide && o + v < of_.outputs; v += kLanes)
      for (int64_t tile = 0; tile < tiles_; tile++) write(o + v, tile, products_ + tile * kWide + v);
  }

 private:
  // One vector more than needed lies between points: at powers of two they would share the cache's places.
  static constexpr int64_t kDepth = 128, kFilterPoint = kDepth * kWide + kLanes;
  static constexpr int64_t kProductPoint = kFewTiles * kWide + kLanes;

  void transform_patches() {
    Patches<kPatch> patches(of_.tiling, tiles_);
    patches.at(0, tiles_);
    for (int64_t c = 0; c < of_.inputs; c++) {
      V d[kPatch][kPatch], u[kPatch][kPatch];
      patches.read(of_.x + c * of_.plane(), of_.inputs * of_.plane());
      patches.get(0, d);
      transform<PatchTransform>(d, u);
      for (int i = 0; i < kPoints; i++) store(domain_ + (i * of_.inputs + c) * kLanes, u[i / kPatch][i % kPatch]);
    }
  }

  void transform_filters(int64_t o, int64_t c, float* to) const {
    const Filters& f = of_.filters;
    const Filters by_outputs{f.w, f.end, f.input, f.output, f.turned};
    V g[kFilter][kFilter], u[kPatch][kPatch];
    by_outputs.get(c, o, std::max<int64_t>(0, of_.outputs - o), g);
    transform<FilterTransform>(g, u);
    for (int i = 0; i < kPoints; i++) store(to + i * kFilterPoint, u[i / kPatch][i % kPatch]);
  }

  // Outputs o, o + 1, ... of a tile.
  void write(int64_t o, int64_t tile, const float* from) const {
    V m[kPatch][kPatch], y[kTile][kTile];
    for (int i = 0; i < kPoints; i++) m[i / kPatch][i % kPatch] = load(from + i * kProductPoint);
    transform<OutputTransform>(m, y);
    const Place& place = places_[tile];
    const int64_t left = of_.outputs - o;
    const V bias = of_.bias ? load_some(of_.bias + place.picture * of_.next_bias + o, left) : V{};
    float* corner = of_.y + (place.picture * of_.outputs + o) * of_.plane() + place.corner;
    for (int64_t i = 0; i < place.rows; i++) {
      for (int64_t j = 0; j < place.columns; j++) {
        const V pixel = y[i][j] + bias;
        float* to = corner + i * of_.tiling.width + j;
        for (int64_t l = 0; l < kLanes && l < left; l++) to[l * of_.plane()] = pixel[l];
      }
    }
  }

  const Convolution& of_;
  int64_t tiles_;
  Scratch domain_, products_, filters_;
  std::vector<Place> places_;
};

void Convolution::run_few() const {
  PRAGMA(omp parallel) {
    FewTilesWorker worker(*this);
    PRAGMA(omp for schedule(dynamic))
    for (int64_t o = 0; o < outputs; o += kWide) worker.run(o);
  }
}

// Blocks of tiles in one parallel loop. Where the threads would have unequal numbers of them, the outputs are divided
// too: then the patches are transformed several times, which costs less than to transform the filters more often.
void Convolution::run() const {
  if (tiling.count() <= kFewTiles) return run_few();
  const int64_t threads = omp_get_max_threads(), tiles = tiling.count(), panels = ceiling(outputs, kOutputs);
  const int64_t fit = kBlockFloats / (kPoints * inputs) / kWide * kWide;
  const int64_t most = std::min(std::max(fit, kLeastTiles), kMostTiles), least = ceiling(tiles, most);
  const int64_t block = ceiling(ceiling(tiles, least), kLanes) * kLanes, blocks = ceiling(tiles, block);
  const int64_t parts = blocks % threads == 0 || blocks > 8 * threads ? 1 : std::min(threads, panels);
  const int64_t part = ceiling(panels, parts) * kOutputs;
  PRAGMA(omp parallel) {
    Worker worker(*this, block);
    PRAGMA(omp for schedule(dynamic))
    for (int64_t i = 0; i < blocks * parts; i++) {
      const int64_t first = i / parts * block, output = i % parts * part;
      if (output < outputs) worker.run(first, std::min(block, tiles - first), output, std::min(outputs, output + part));
    }
  }
}

// x [B, C, H, W], weight [O, C, 3, 3]; the bias [O] or [B, O] may be null
int convolve(void** p, int64_t** shape, const float* bias, int bias_rank, float* y) {
  const int64_t batch = shape[0][0], inputs = shape[0][1], outputs = shape[1][0];
  const Filters filters{in(p, 1), in(p, 1) + outputs * inputs * 9, inputs * 9, 9, false};
  const Tiling tiling(batch, shape[0][2], shape[0][3]);
  Convolution{in(p, 0), bias, bias_rank == 2 ? outputs : 0, y, tiling, inputs, outputs, filters}.run();
  return 0;
}

}  // namespace

// inputs x [B, C, H, W], weight [O, C, 3, 3]; output y [B, O, H, W]
KERNEL(convolution3) { return convolve(p, shape, nullptr, 0, out(p, 2)); }

// inputs x [B, C, H, W], weight [O, C, 3, 3], bias [O], or [B, O] with one for each picture; output y [B, O, H, W]
KERNEL(convolution3_bias) { return convolve(p, shape, in(p, 2), rank[2], out(p, 3)); }

// inputs dy [B, O, H, W], weight [O, C, 3, 3]; output dx [B, C, H, W]: a convolution by the turned filters, whose
// inputs and outputs are swapped
KERNEL(convolution3_input_grad) {
  const int64_t batch = shape[0][0], inputs = shape[1][0], outputs = shape[1][1];
  const Filters filters{in(p, 1), in(p, 1) + inputs * outputs * 9, 9, outputs * 9, true};
  const Tiling tiling(batch, shape[0][2], shape[0][3]);
  Convolution{in(p, 0), nullptr, 0, out(p, 2), tiling, inputs, outputs, filters}.run();
  return 0;
}
