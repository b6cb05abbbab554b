// The form of MindSpore's "aot" custom operators: pointers to the inputs, then to the outputs, with ranks and shapes.
// All tensors are float32 and contiguous.
#pragma once
#include <cstdint>

#define KERNEL(name) extern "C" int name(int, void** p, int* rank, int64_t** shape, const char**, void*, void*)
#define PRAGMA(...) _Pragma(#__VA_ARGS__)
#define PARALLEL PRAGMA(omp parallel for schedule(static))

namespace {

inline const float* in(void** p, int i) { return static_cast<const float*>(p[i]); }
inline float* out(void** p, int i) { return static_cast<float*>(p[i]); }

inline int64_t count(int rank, const int64_t* shape) {
  int64_t n = 1;
  for (int i = 0; i < rank; i++) n *= shape[i];
  return n;
}

}  // namespace
