// Attention without a matrix of all scores (arXiv 2205.14135, 2307.08691). A panel of queries meets blocks of keys. The
// queries are lanes, so maxima and sums of the softmax are lane by lane, and keys and values are never transposed.
#include "attention.h"
#include "bfloat16.h"

namespace {

// The queries of a panel: the largest score and the sum of exponentials up to now, in each lane.
template <int VECTORS>
struct Softmax {
  V largest[VECTORS], sum[VECTORS];

  Softmax() {
    for (int v = 0; v < VECTORS; v++) largest[v] = spread(-3e38f), sum[v] = V{};
  }

  // Scores [keys][VECTORS * kLanes] to exponentials. `factor` is what former sums are to be multiplied by.
  void add(int64_t keys, float* scores, V (&factor)[VECTORS]) {
    for (int v = 0; v < VECTORS; v++) {
      float* column = scores + v * kLanes;
      V most = largest[v], total = V{};
      for (int64_t j = 0; j < keys; j++) {
        const V s = load(column + j * VECTORS * kLanes);
        most = s > most ? s : most;
      }
      for (int64_t j = 0; j < keys; j++) {
        const V e = exponential(load(column + j * VECTORS * kLanes) - most);
        store(column + j * VECTORS * kLanes, e);
        total += e;
      }
      factor[v] = exponential(largest[v] - most);
      sum[v] = sum[v] * factor[v] + total;
      largest[v] = most;
    }
  }
};

// The outputs of a panel of queries, and the logarithm of each query's sum of exponentials: arXiv 2307.08691, algorithm
// 1. Where steps of products take two numbers, k has pairs of channels, and v pairs of rows.
template <class How, int VECTORS>
void attend(const Attention& of, int64_t number, int64_t first, float* y, float* log_sums) {
  constexpr int64_t kSize = VECTORS * kLanes, kSteps = How::kNumbers;
  const int64_t channels = of.q_shape[2], all_keys = of.keys();
  const Head q(of.q, of.heads, of.q_shape, number), to(y, of.heads, of.q_shape, number);
  const Head k(of.k, of.heads, all_keys, channels / kSteps, number);
  const Head v(of.v, of.heads, steps<How>(all_keys), channels, number);
  const Scratch memory((2 * q.width + 2 * kBlock) * kSize);
  float *queries = memory, *sums = queries + q.width * kSize, *scores = sums + q.width * kSize;
  Softmax<VECTORS> softmax;
  read_panel<VECTORS>(q, first, queries, of.scale());
  How::template pack<VECTORS>(q.width, queries);
  for (int64_t j = 0; j < all_keys; j += kBlock) {
    const int64_t keys = std::min(kBlock, all_keys - j);
    product<VECTORS, How>(keys, k.width, k.rows(j), queries, scores, false);
    if (of.mask) add_mask<VECTORS>(of, first, j, keys, scores, scores + kBlock * kSize);
    V factor[VECTORS];
    softmax.add(keys, scores, factor);
    if (j) scale_rows<VECTORS>(q.width, factor, sums);
    How::template pack<VECTORS>(keys, scores);
    product<VECTORS, How>(q.width, steps<How>(keys), v.columns(j / kSteps), scores, sums, j > 0);
  }
  V inverse[VECTORS];
  for (int u = 0; u < VECTORS; u++) inverse[u] = 1.0f / softmax.sum[u];
  scale_rows<VECTORS>(q.width, inverse, sums);
  write_panel<VECTORS>(sums, first, to);
  for (int64_t i = 0; i < kSize && first + i < q.count; i++) {
    const int64_t u = i / kLanes, lane = i % kLanes;
    log_sums[number * q.count + first + i] = softmax.largest[u][lane] + std::log(softmax.sum[u][lane]);
  }
}

template <class How = Floats>
int attention(const Attention& of, float* y, float* log_sums) {
  for_each_panel(of.q_shape[0] * of.heads, of.queries(), [&](auto vectors, int64_t number, int64_t first) {
    attend<How, vectors()>(of, number, first, y, log_sums);
  });
  return 0;
}

#ifdef HAS_BFLOAT16
// The pairs of rows 2i and 2i + 1 of v [B, M, C] in row i of [B, (M + 1) / 2, C]; 0 where there is no second row.
void to_pairs_of_rows(const float* v, const int64_t* shape, float* to) {
  const int64_t rows = shape[1], channels = shape[2], half = steps<Pairs>(rows);
  PARALLEL
  for (int64_t i = 0; i < shape[0] * half; i++) {
    const int64_t row = i % half * 2;
    const float *first = v + (i / half * rows + row) * channels, *second = row + 1 < rows ? first + channels : nullptr;
    for (int64_t c = 0; c < channels; c += kLanes) {
      const int64_t left = channels - c;
      const V b = second ? load_some(second + c, left) : V{}, both = pairs(load_some(first + c, left), b);
      std::memcpy(to + i * channels + c, &both, std::min<int64_t>(kLanes, left) * sizeof(float));
    }
  }
}

int attention_bfloat16(const Attention& of, float* y, float* log_sums) {
  if (of.width() % 2) return attention(of, y, log_sums);
  const int64_t batch = of.k_shape[0], keys = of.keys(), channels = of.k_shape[2];
  const Scratch k(batch * keys * channels / 2), v(batch * steps<Pairs>(keys) * channels);
  PARALLEL
  for (int64_t r = 0; r < batch * keys; r++) to_pairs(of.k + r * channels, channels, k + r * channels / 2);
  to_pairs_of_rows(of.v, of.k_shape, v);
  Attention packed = of;
  packed.k = k, packed.v = v;
  return attention<Pairs>(packed, y, log_sums);
}
#endif

}  // namespace

// inputs q [B, N, C], k and v [B, M, C]; outputs softmax(q k' / sqrt(C / H)) v [B, N, C] of every head, and the
// logarithms of the sums of exponentials [B, H, N], which the gradients need
KERNEL(attention) {
  return attention({in(p, 0), in(p, 1), in(p, 2), nullptr, shape[0], shape[1], shape[4][1]}, out(p, 3), out(p, 4));
}

// inputs q, k, v, mask [N, M]; outputs as above
KERNEL(attention_masked) {
  return attention({in(p, 0), in(p, 1), in(p, 2), in(p, 3), shape[0], shape[1], shape[5][1]}, out(p, 4), out(p, 5));
}

#ifdef HAS_BFLOAT16
// the same with products in bfloat16 and sums in float32
KERNEL(attention_bfloat16) {
  return attention_bfloat16({in(p, 0), in(p, 1), in(p, 2), nullptr, shape[0], shape[1], shape[4][1]}, out(p, 3), out(p, 4));
}

KERNEL(attention_masked_bfloat16) {
  return attention_bfloat16({in(p, 0), in(p, 1), in(p, 2), in(p, 3), shape[0], shape[1], shape[5][1]}, out(p, 4), out(p, 5));
}
#endif
