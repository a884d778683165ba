// Small matrix products on tiles of 64 bytes across (16 keys in float, 8 in double), with sums
// held in vector registers. gcc splits a wide vector type before it clones a function, so
// target_clones cannot serve here: tile_body.h is compiled once per instruction set and one is
// picked at load.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <utility>

#include "../common.h"

namespace segkern {

// The storage types a kernel reads and writes; sums are float or double.
template <class F>
void dispatch_storage(const Tensor& t, const char* op, const F& f) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return f(double{}, double{});
    case ScalarType::Float:
      return f(float{}, float{});
    case ScalarType::Half:
      return f(c10::Half{}, float{});
    case ScalarType::BFloat16:
      return f(c10::BFloat16{}, float{});
    default:
      STD_TORCH_CHECK(false, op, ": floating point values expected");
  }
}

// An output in the type of `t`; poisoned like scratch.
inline Tensor empty_as(const Tensor& t, const IntList& sizes) {
  const Tensor out = torch::stable::new_empty(t, sizes);
  if (out.numel() > 0) poison_fill(out.mutable_data_ptr(), out.numel() * out.element_size());
  return out;
}

template <class T>
constexpr int64_t kLanes = 64 / sizeof(T);

// row[r] names the line of `x` or `out` (lines of `ld` elements) that the r-th of n rows works on.
template <class T>
struct Tiles {
  // out[r, j] = sum_d x[row[r], d] tile[d, j]
  void (*dot)(const T* x, int64_t ld, const int32_t* row, int64_t n, const T* tile /*[D, lanes]*/,
              int64_t D, T* out /*[n, lanes]*/);
  // out[row[r], d] += sum_j p[r, j] y[j, d], for d in [0, D), D a multiple of the lanes
  void (*accumulate)(const T* p /*[n, lanes]*/, const int32_t* row, int64_t n,
                     const T* y /*[lanes, D]*/, int64_t ldy, int64_t D, T* out, int64_t ld);
  // out[j, d] = sum_r p[r, j] x[row[r], d], for d in [0, D), D a multiple of the lanes
  void (*reduce)(const T* p /*[n, lanes]*/, const T* x, int64_t ld, const int32_t* row, int64_t n,
                 int64_t D, T* out /*[lanes, D]*/);
  // out[d, j] = y[j, d], for d in [0, D), D a multiple of the lanes
  void (*transpose)(const T* y /*[lanes, D]*/, int64_t ldy, int64_t D, T* out /*[D, lanes]*/);
  // out[r, c] = sum_k x[r xr + k xk] y[k, c], for r in [0, n), k in [0, K) and c in so many lines;
  // y[k, c] is at k yk + c % lanes in its line of columns, and these lie yl apart; added to what
  // is in out, if so
  void (*product)(const T* x, int64_t xr, int64_t xk, int64_t n, const T* y, int64_t yk,
                  int64_t yl, int64_t K, int64_t lines, T* out, int64_t ld, bool add);
};

#ifdef SEGKERN_X86_CLONES
#ifndef SEGKERN_AVX2
#define SEGKERN_ISA v4
#define SEGKERN_TARGET __attribute__((target("arch=x86-64-v4")))
#define SEGKERN_WIDTH 64
#define SEGKERN_ROWS 12
#define SEGKERN_KEYS 8
#define SEGKERN_LINES 2
#include "tile_body.h"
#endif
#define SEGKERN_ISA v3
#define SEGKERN_TARGET __attribute__((target("arch=x86-64-v3")))
#define SEGKERN_WIDTH 32
#define SEGKERN_ROWS 6
#define SEGKERN_KEYS 4
#define SEGKERN_LINES 1
#include "tile_body.h"
#endif
#define SEGKERN_ISA baseline
#define SEGKERN_TARGET
#define SEGKERN_WIDTH 16
#define SEGKERN_ROWS 3
#define SEGKERN_KEYS 2
#define SEGKERN_LINES 1
#include "tile_body.h"

template <class T>
const Tiles<T>& tiles() {
  static const Tiles<T> best = [] {
#ifdef SEGKERN_X86_CLONES
#ifndef SEGKERN_AVX2
    if (__builtin_cpu_supports("x86-64-v4")) return v4::tiles<T>();
#endif
    if (__builtin_cpu_supports("x86-64-v3")) return v3::tiles<T>();
#endif
    return baseline::tiles<T>();
  }();
  return best;
}

}  // namespace segkern
