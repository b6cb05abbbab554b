// The operators that MindSpore's CPU back end runs several times slower than memory allows: group norm,
// layer norm, GEGLU, GELU, bias, nearest x2, each with its gradient. The plain definitions in plain.py say what each
// computes. Every sum is made by one thread in a fixed order, so results do not depend on the number of threads.
#include <cmath>
#include <cstring>
#include <vector>

#include "operator.h"

#define SUM(...) PRAGMA(omp simd reduction(+ : __VA_ARGS__))
#define VECTOR PRAGMA(omp simd)

namespace {

constexpr int64_t kStrip = 4096;  // floats summed in single precision before the sum goes on in double

// exp(x) to 2 ulp: 2^n e^r, |r| <= ln2/2, polynomial of degree 6; the loop over it vectorizes, NaN passes through.
inline float fast_exp(float x) {
  x = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
  const float n = std::floor(x * 1.44269504f + 0.5f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float y = 1.0f / 720;
  y = y * r + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return y * power;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }

// The normal distribution function; Abramowitz and Stegun 7.1.26 for erf, absolute error 1.5e-7.
inline float normal_cdf(float x) {
  const float z = std::fabs(x) * 0.70710678f;
  const float t = 1.0f / (1.0f + 0.3275911f * z);
  const float poly = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
  const float tail = 0.5f * poly * fast_exp(-z * z);
  return x < 0 ? tail : 1.0f - tail;
}

inline float normal_pdf(float x) { return 0.39894228f * fast_exp(-0.5f * x * x); }

struct Moments { float mean, rstd; };

Moments moments(const float* x, int64_t n, float eps) {
  double sum = 0, square = 0;
  for (int64_t start = 0; start < n; start += kStrip) {
    const int64_t stop = start + kStrip < n ? start + kStrip : n;
    float s = 0;
    SUM(s) for (int64_t i = start; i < stop; i++) s += x[i];
    sum += s;
  }
  const float mean = static_cast<float>(sum / n);
  for (int64_t start = 0; start < n; start += kStrip) {
    const int64_t stop = start + kStrip < n ? start + kStrip : n;
    float s = 0;
    SUM(s) for (int64_t i = start; i < stop; i++) s += (x[i] - mean) * (x[i] - mean);
    square += s;
  }
  return {mean, static_cast<float>(1.0 / std::sqrt(square / n + eps))};
}

}  // namespace

// inputs x [B, C, ...], weight [C], bias [C], settings [groups, eps, silu]; output y like x
KERNEL(group_norm) {
  const float *x = in(p, 0), *w = in(p, 1), *b = in(p, 2), *settings = in(p, 3);
  float* y = out(p, 4);
  const int64_t batch = shape[0][0], channels = shape[0][1], groups = static_cast<int64_t>(settings[0]);
  const int64_t width = channels / groups, plane = count(rank[0] - 2, shape[0] + 2), size = width * plane;
  const float eps = settings[1];
  const bool silu = settings[2] != 0;
  PARALLEL for (int64_t k = 0; k < batch * groups; k++) {
    const Moments m = moments(x + k * size, size, eps);
    for (int64_t c = 0; c < width; c++) {
      const float scale = w[k % groups * width + c] * m.rstd, shift = b[k % groups * width + c] - m.mean * scale;
      const float* xc = x + k * size + c * plane;
      float* yc = y + k * size + c * plane;
      if (silu) {
        VECTOR for (int64_t i = 0; i < plane; i++) {
          const float v = xc[i] * scale + shift;
          yc[i] = v * sigmoid(v);
        }
      } else {
        VECTOR for (int64_t i = 0; i < plane; i++) yc[i] = xc[i] * scale + shift;
      }
    }
  }
  return 0;
}

// inputs x, weight, bias, settings, dy; outputs dx, dweight, dbias
KERNEL(group_norm_grad) {
  const float *x = in(p, 0), *w = in(p, 1), *b = in(p, 2), *settings = in(p, 3), *dy = in(p, 4);
  float *dx = out(p, 5), *dw = out(p, 6), *db = out(p, 7);
  const int64_t batch = shape[0][0], channels = shape[0][1], groups = static_cast<int64_t>(settings[0]);
  const int64_t width = channels / groups, plane = count(rank[0] - 2, shape[0] + 2), size = width * plane;
  const float eps = settings[1];
  const bool silu = settings[2] != 0;
  PARALLEL for (int64_t g = 0; g < groups; g++) {
    for (int64_t c = g * width; c < (g + 1) * width; c++) dw[c] = db[c] = 0;
    for (int64_t n = 0; n < batch; n++) {
      const int64_t at = (n * groups + g) * size;
      const Moments m = moments(x + at, size, eps);
      double sum_d = 0, sum_dn = 0;  // over the group: of dnormal, and of dnormal times normal
      for (int64_t c = 0; c < width; c++) {
        const float weight = w[g * width + c], bias = b[g * width + c];
        const float *xc = x + at + c * plane, *dyc = dy + at + c * plane;
        float* dxc = dx + at + c * plane;  // holds dy through SiLU until the sums are known
        float s = 0, sn = 0;
        if (silu) {
          SUM(s, sn) for (int64_t i = 0; i < plane; i++) {
            const float normal = (xc[i] - m.mean) * m.rstd, v = normal * weight + bias, gate = sigmoid(v);
            const float d = dyc[i] * gate * (1.0f + v * (1.0f - gate));
            dxc[i] = d;
            s += d;
            sn += d * normal;
          }
        } else {
          SUM(s, sn) for (int64_t i = 0; i < plane; i++) {
            dxc[i] = dyc[i];
            s += dyc[i];
            sn += dyc[i] * (xc[i] - m.mean) * m.rstd;
          }
        }
        db[g * width + c] += s;
        dw[g * width + c] += sn;
        sum_d += static_cast<double>(s) * weight;
        sum_dn += static_cast<double>(sn) * weight;
      }
      const float mean_d = static_cast<float>(sum_d / size), mean_dn = static_cast<float>(sum_dn / size);
      for (int64_t c = 0; c < width; c++) {
        const float weight = w[g * width + c];
        const float* xc = x + at + c * plane;
        float* dxc = dx + at + c * plane;
        VECTOR for (int64_t i = 0; i < plane; i++)
          dxc[i] = m.rstd * (dxc[i] * weight - mean_d - (xc[i] - m.mean) * m.rstd * mean_dn);
      }
    }
  }
  return 0;
}

// inputs x [..., C], weight [C], bias [C], settings [eps]; output y like x
KERNEL(layer_norm) {
  const float *x = in(p, 0), *w = in(p, 1), *b = in(p, 2), *settings = in(p, 3);
  float* y = out(p, 4);
  const int64_t width = shape[0][rank[0] - 1], rows = count(rank[0] - 1, shape[0]);
  PARALLEL for (int64_t r = 0; r < rows; r++) {
    const float* xr = x + r * width;
    float* yr = y + r * width;
    const Moments m = moments(xr, width, settings[0]);
    VECTOR for (int64_t i = 0; i < width; i++) yr[i] = (xr[i] - m.mean) * m.rstd * w[i] + b[i];
  }
  return 0;
}

// inputs x, weight, bias, settings, dy; outputs dx, dweight, dbias
KERNEL(layer_norm_grad) {
  const float *x = in(p, 0), *w = in(p, 1), *settings = in(p, 3), *dy = in(p, 4);
  float *dx = out(p, 5), *dw = out(p, 6), *db = out(p, 7);
  const int64_t width = shape[0][rank[0] - 1], rows = count(rank[0] - 1, shape[0]);
  constexpr int64_t kBlock = 256;  // rows whose weight gradients are summed together: fixed, so the order of sums is too
  const int64_t blocks = (rows + kBlock - 1) / kBlock;
  std::vector<float> partial(2 * blocks * width, 0.0f);
  PARALLEL for (int64_t block = 0; block < blocks; block++) {
    float *pw = partial.data() + 2 * block * width, *pb = pw + width;
    for (int64_t r = block * kBlock; r < rows && r < (block + 1) * kBlock; r++) {
      const float *xr = x + r * width, *dyr = dy + r * width;
      float* dxr = dx + r * width;
      const Moments m = moments(xr, width, settings[0]);
      float sum_d = 0, sum_dn = 0;
      SUM(sum_d, sum_dn) for (int64_t i = 0; i < width; i++) {
        const float normal = (xr[i] - m.mean) * m.rstd, d = dyr[i] * w[i];
        pw[i] += dyr[i] * normal;
        pb[i] += dyr[i];
        sum_d += d;
        sum_dn += d * normal;
      }
      const float mean_d = sum_d / width, mean_dn = sum_dn / width;
      VECTOR for (int64_t i = 0; i < width; i++)
        dxr[i] = m.rstd * (dyr[i] * w[i] - mean_d - (xr[i] - m.mean) * m.rstd * mean_dn);
    }
  }
  std::memset(dw, 0, width * sizeof(float));
  std::memset(db, 0, width * sizeof(float));
  for (int64_t block = 0; block < blocks; block++) {
    const float *pw = partial.data() + 2 * block * width, *pb = pw + width;
    VECTOR for (int64_t i = 0; i < width; i++) {
      dw[i] += pw[i];
      db[i] += pb[i];
    }
  }
  return 0;
}

// input x [..., 2C] = (value, gate); output value * gelu(gate) [..., C]
KERNEL(geglu) {
  const float* x = in(p, 0);
  float* y = out(p, 1);
  const int64_t width = shape[0][rank[0] - 1] / 2, rows = count(rank[0] - 1, shape[0]);
  PARALLEL for (int64_t r = 0; r < rows; r++) {
    const float *value = x + r * 2 * width, *gate = value + width;
    float* yr = y + r * width;
    VECTOR for (int64_t i = 0; i < width; i++) yr[i] = value[i] * gate[i] * normal_cdf(gate[i]);
  }
  return 0;
}

// inputs x, dy; output dx
KERNEL(geglu_grad) {
  const float *x = in(p, 0), *dy = in(p, 1);
  float* dx = out(p, 2);
  const int64_t width = shape[0][rank[0] - 1] / 2, rows = count(rank[0] - 1, shape[0]);
  PARALLEL for (int64_t r = 0; r < rows; r++) {
    const float *value = x + r * 2 * width, *gate = value + width, *dyr = dy + r * width;
    float *dvalue = dx + r * 2 * width, *dgate = dvalue + width;
    VECTOR for (int64_t i = 0; i < width; i++) {
      const float g = gate[i], cdf = normal_cdf(g);
      dvalue[i] = dyr[i] * g * cdf;
      dgate[i] = dyr[i] * value[i] * (cdf + g * normal_pdf(g));
    }
  }
  return 0;
}

// input x; output x Phi(x)
KERNEL(gelu) {
  const float* x = in(p, 0);
  float* y = out(p, 1);
  const int64_t n = count(rank[0], shape[0]);
  PRAGMA(omp parallel for simd schedule(static)) for (int64_t i = 0; i < n; i++) y[i] = x[i] * normal_cdf(x[i]);
  return 0;
}

// inputs x, dy; output dx
KERNEL(gelu_grad) {
  const float *x = in(p, 0), *dy = in(p, 1);
  float* dx = out(p, 2);
  const int64_t n = count(rank[0], shape[0]);
  PRAGMA(omp parallel for simd schedule(static)) for (int64_t i = 0; i < n; i++)
      dx[i] = dy[i] * (normal_cdf(x[i]) + x[i] * normal_pdf(x[i]));
  return 0;
}

// inputs dy [N, C], bias [C]; output dbias
KERNEL(affine_bias_grad) {
  constexpr int64_t kColumns = 64;
  const float* dy = in(p, 0);
  float* dbias = out(p, 2);
  const int64_t rows = shape[0][0], width = shape[1][0];
  PARALLEL for (int64_t first = 0; first < width; first += kColumns) {
    const int64_t n = first + kColumns < width ? kColumns : width - first;
    double sum[kColumns] = {};
    for (int64_t start = 0; start < rows; start += kStrip) {
      const int64_t stop = start + kStrip < rows ? start + kStrip : rows;
      float s[kColumns] = {};
      for (int64_t r = start; r < stop; r++) {
        VECTOR for (int64_t i = 0; i < n; i++) s[i] += dy[r * width + first + i];
      }
      for (int64_t i = 0; i < n; i++) sum[i] += s[i];
    }
    for (int64_t i = 0; i < n; i++) dbias[first + i] = static_cast<float>(sum[i]);
  }
  return 0;
}

// input x [B, C, H, W]; output [B, C, 2H, 2W]
KERNEL(upsample2) {
  const float* x = in(p, 0);
  float* y = out(p, 1);
  const int64_t width = shape[0][3], rows = count(3, shape[0]);
  PARALLEL for (int64_t r = 0; r < rows; r++) {
    const float* xr = x + r * width;
    float* yr = y + r * 4 * width;
    for (int64_t i = 0; i < width; i++) yr[2 * i] = yr[2 * i + 1] = xr[i];
    std::memcpy(yr + 2 * width, yr, 2 * width * sizeof(float));
  }
  return 0;
}

// input dy [B, C, 2H, 2W]; output dx [B, C, H, W]
KERNEL(upsample2_grad) {
  const float* dy = in(p, 0);
  float* dx = out(p, 1);
  const int64_t width = shape[0][3] / 2, rows = count(3, shape[0]) / 2;
  PARALLEL for (int64_t r = 0; r < rows; r++) {
    const float *top = dy + r * 4 * width, *low = top + 2 * width;
    float* dxr = dx + r * width;
    VECTOR for (int64_t i = 0; i < width; i++) dxr[i] = top[2 * i] + top[2 * i + 1] + low[2 * i] + low[2 * i + 1];
  }
  return 0;
}
