// Bilinear sampling with align_corners=False and zeros outside, as grid_sample does it, for points
// x,y in [0, 1]. Corners are kept as eight arrays over the points, so that the loops that read
// them vectorise.
#pragma once

#include <cmath>

#include "../common.h"

namespace segkern {

template <class T>
struct Corners {
  explicit Corners(int64_t n) : n(n), offset(4 * n), weight(4 * n) {}
  int64_t n;                // points
  Scratch<int32_t> offset;  // [4, n] into the h x w map; 0 for a corner outside
  Scratch<T> weight;        // [4, n]; 0 for a corner outside
};

template <class T>
SEGKERN_CLONES void find_corners(const T* points /*[n, 2]*/, int64_t h, int64_t w, int64_t n,
                                 int32_t* offset /*[4, n]*/, T* weight /*[4, n]*/) {
  // one comparison a choice: gcc 12 does not vectorise the loop when they are joined by & or &&
  const T height = static_cast<T>(h), width = static_cast<T>(w);
  const int32_t row = static_cast<int32_t>(w);
#pragma omp simd
  for (int64_t p = 0; p < n; ++p) {
    const T x = points[2 * p] * width - T(0.5), y = points[2 * p + 1] * height - T(0.5);
    T xn = x > T(-1) ? x : T(-1),
      yn = y > T(-1) ? y : T(-1);  // -1: no corner inside; also for NaN
    xn = x < width ? xn : T(-1);
    yn = y < height ? yn : T(-1);
    const T xf = std::floor(xn), yf = std::floor(yn);
    const T fx = xn - xf, fy = yn - yf;
    const T left = xf >= T(0) ? T(1) - fx : T(0), right = xf < width - T(1) ? fx : T(0);
    const T top = yf >= T(0) ? T(1) - fy : T(0), bottom = yf < height - T(1) ? fy : T(0);
    const int32_t at = static_cast<int32_t>(yf) * row + static_cast<int32_t>(xf);
    const T w00 = left * top, w01 = right * top, w10 = left * bottom, w11 = right * bottom;
    offset[p] = w00 == T(0) ? 0 : at;
    offset[n + p] = w01 == T(0) ? 0 : at + 1;
    offset[2 * n + p] = w10 == T(0) ? 0 : at + row;
    offset[3 * n + p] = w11 == T(0) ? 0 : at + row + 1;
    weight[p] = w00;
    weight[n + p] = w01;
    weight[2 * n + p] = w10;
    weight[3 * n + p] = w11;
  }
}

template <class T>
void find_corners(const T* points, int64_t h, int64_t w, const Corners<T>& c) {
  find_corners(points, h, w, c.n, c.offset.get(), c.weight.get());
}

// out[p] = sum of weight * map; a corner of weight 0 is not read into the sum, so NaN cannot leak
// from offset 0
template <class T>
SEGKERN_CLONES void gather(const T* map /*[h*w]*/, const int32_t* offset /*[4, n]*/,
                           const T* weight /*[4, n]*/, int64_t n, T* out /*[n]*/) {
#pragma omp simd
  for (int64_t p = 0; p < n; ++p) {
    T sum = T(0);
    for (int k = 0; k < 4; ++k) {
      const T a = weight[k * n + p], v = map[offset[k * n + p]];
      sum += a == T(0) ? T(0) : a * v;
    }
    out[p] = sum;
  }
}

// The same of a mask. No instruction gathers bytes: they are collected first, the rest is done in
// wide registers.
template <class T>
SEGKERN_CLONES void gather(const uint8_t* mask /*[h*w]*/, const int32_t* offset /*[4, n]*/,
                           const T* weight /*[4, n]*/, int64_t n, T* out /*[n]*/) {
  constexpr int64_t kBlock = 128;
  uint8_t corner[4][kBlock];
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t size = begin + kBlock < n ? kBlock : n - begin;
    for (int k = 0; k < 4; ++k) {
      for (int64_t i = 0; i < size; ++i) corner[k][i] = mask[offset[k * n + begin + i]];
    }
    const T* a = weight + begin;
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      out[begin + i] = a[i] * T(corner[0][i]) + a[n + i] * T(corner[1][i]) +
                       a[2 * n + i] * T(corner[2][i]) + a[3 * n + i] * T(corner[3][i]);
    }
  }
}

// map += weight * grad; as above, a gradient of NaN stays where it is
template <class T>
void scatter(const T* grad /*[n]*/, const Corners<T>& c, T* map /*[h*w]*/) {
  for (int64_t p = 0; p < c.n; ++p) {
    for (int k = 0; k < 4; ++k) {
      const T a = c.weight[k * c.n + p];
      map[c.offset[k * c.n + p]] += a == T(0) ? T(0) : a * grad[p];
    }
  }
}

}  // namespace segkern
