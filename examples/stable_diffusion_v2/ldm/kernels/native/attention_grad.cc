// The gradients of attention (arXiv 2307.08691, section 3.1.2), without a matrix of all scores. With S = q k' / sqrt(width),
// P = exp(S - log of the sums) and D, the sums over rows of dy * y:
//   dS = P * (dy v' - D), dv = P' dy, dq = dS k / sqrt(width), dk = dS' q / sqrt(width).
// Panels of queries make dq; panels of keys make dk and dv and compute P and dS again. So no two threads add to one sum.
#include "attention.h"

namespace {

struct Gradients {
  const Attention& of;
  const float *y, *log_sums, *dy;
  float *dq, *dk, *dv, *dots;  // dots: D [B, H, N]

  void find_dots() const {
    for_each_panel(of.q_shape[0] * of.heads, of.queries(), [&](auto vectors, int64_t number, int64_t first) {
      const Head a(y, of.heads, of.q_shape, number), b(dy, of.heads, of.q_shape, number);
      for (int64_t i = first; i < std::min(a.count, first + vectors() * kLanes); i++) {
        float sum = 0;
        PRAGMA(omp simd reduction(+ : sum))
        for (int64_t d = 0; d < a.width; d++) sum += a.at[i * a.pitch + d] * b.at[i * b.pitch + d];
        dots[number * a.count + i] = sum;
      }
    });
  }
};

// P and dS of a row or a column, from scores and dy v'.
INLINE void to_gradients(V log_sum, V dot, float* p, float* ds) {
  const V e = exponential(load(p) - log_sum);
  store(p, e);
  store(ds, e * (load(ds) - dot));
}

template <int VECTORS>
void query_gradients(const Gradients& all, int64_t number, int64_t first) {
  constexpr int64_t kSize = VECTORS * kLanes;
  const Attention& of = all.of;
  const Head q(of.q, of.heads, of.q_shape, number), dy(all.dy, of.heads, of.q_shape, number);
  const Head k(of.k, of.heads, of.k_shape, number), v(of.v, of.heads, of.k_shape, number);
  const Scratch memory((3 * q.width + 3 * kBlock) * kSize);
  float *queries = memory, *dys = queries + q.width * kSize, *sums = dys + q.width * kSize;
  float *p = sums + q.width * kSize, *ds = p + kBlock * kSize;
  V log_sum[VECTORS], dot[VECTORS], scale[VECTORS];
  for (int u = 0; u < VECTORS; u++) {
    const int64_t row = first + u * kLanes, left = q.count - row;
    log_sum[u] = load_some(all.log_sums + number * q.count + row, left);
    dot[u] = load_some(all.dots + number * q.count + row, left);
    scale[u] = spread(of.scale());
  }
  read_panel<VECTORS>(q, first, queries, of.scale());
  read_panel<VECTORS>(dy, first, dys);
  for (int64_t j = 0; j < k.count; j += kBlock) {
    const int64_t keys = std::min(kBlock, k.count - j);
    product<VECTORS>(keys, q.width, k.rows(j), queries, p, false);
    if (of.mask) add_mask<VECTORS>(of, first, j, keys, p, ds + kBlock * kSize);
    product<VECTORS>(keys, q.width, v.rows(j), dys, ds, false);
    for (int64_t i = 0; i < keys * VECTORS; i++)
      to_gradients(log_sum[i % VECTORS], dot[i % VECTORS], p + i * kLanes, ds + i * kLanes);
    product<VECTORS>(q.width, keys, k.columns(j), ds, sums, j > 0);
  }
  scale_rows<VECTORS>(q.width, scale, sums);
  write_panel<VECTORS>(sums, first, Head(all.dq, of.heads, of.q_shape, number));
}

template <int VECTORS>
void key_gradients(const Gradients& all, int64_t number, int64_t first) {
  constexpr int64_t kSize = VECTORS * kLanes;
  const Attention& of = all.of;
  const Head q(of.q, of.heads, of.q_shape, number), dy(all.dy, of.heads, of.q_shape, number);
  const Head k(of.k, of.heads, of.k_shape, number), v(of.v, of.heads, of.k_shape, number);
  const Scratch memory((4 * q.width + 2 * kBlock) * kSize);
  float *keys = memory, *values = keys + q.width * kSize, *dks = values + q.width * kSize, *dvs = dks + q.width * kSize;
  float *p = dvs + q.width * kSize, *ds = p + kBlock * kSize;
  V scale[VECTORS];
  for (int u = 0; u < VECTORS; u++) scale[u] = spread(of.scale());
  read_panel<VECTORS>(k, first, keys, of.scale());
  read_panel<VECTORS>(v, first, values);
  for (int64_t i = 0; i < q.count; i += kBlock) {
    const int64_t queries = std::min(kBlock, q.count - i);
    product<VECTORS>(queries, q.width, q.rows(i), keys, p, false);
    product<VECTORS>(queries, q.width, dy.rows(i), values, ds, false);
    for (int64_t r = 0; r < queries; r++) {
      const int64_t query = number * q.count + i + r;
      for (int u = 0; u < VECTORS; u++) {
        float *pu = p + (r * VECTORS + u) * kLanes, *dsu = ds + (r * VECTORS + u) * kLanes;
        const int64_t key = first + u * kLanes;
        if (of.mask) store(pu, load(pu) + load_some(of.mask + (i + r) * of.keys() + key, of.keys() - key));
        to_gradients(spread(all.log_sums[query]), spread(all.dots[query]), pu, dsu);
      }
    }
    product<VECTORS>(q.width, queries, dy.columns(i), p, dvs, i > 0);
    product<VECTORS>(q.width, queries, q.columns(i), ds, dks, i > 0);
  }
  scale_rows<VECTORS>(q.width, scale, dks);
  write_panel<VECTORS>(dks, first, Head(all.dk, of.heads, of.k_shape, number));
  write_panel<VECTORS>(dvs, first, Head(all.dv, of.heads, of.k_shape, number));
}

// p: y, logarithms of the sums, dy; dq, dk, dv.
int gradients(const Attention& of, void** p) {
  const Scratch dots(of.q_shape[0] * of.heads * of.queries());
  const Gradients all{of, in(p, 0), in(p, 1), in(p, 2), out(p, 3), out(p, 4), out(p, 5), dots};
  const int64_t heads = of.q_shape[0] * of.heads;
  all.find_dots();
  for_each_panel(heads, of.queries(), [&](auto vectors, int64_t number, int64_t first) {
    query_gradients<vectors()>(all, number, first);
  });
  for_each_panel(heads, of.keys(), [&](auto vectors, int64_t number, int64_t first) {
    key_gradients<vectors()>(all, number, first);
  });
  return 0;
}

}  // namespace

// inputs q [B, N, C], k and v [B, M, C], the outputs y and logarithms [B, H, N] of `attention`, dy; outputs dq, dk, dv
KERNEL(attention_grad) {
  return gradients({in(p, 0), in(p, 1), in(p, 2), nullptr, shape[0], shape[1], shape[4][1]}, p + 3);
}

// inputs q, k, v, mask [N, M], y, logarithms, dy; outputs dq, dk, dv
KERNEL(attention_masked_grad) {
  return gradients({in(p, 0), in(p, 1), in(p, 2), in(p, 3), shape[0], shape[1], shape[5][1]}, p + 4);
}
