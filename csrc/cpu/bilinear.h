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
#pragma omp simd
  for (int64_t p = 0; p < n; ++p) {
    const T x = points[2 * p] * T(w) - T(0.5), y = points[2 * p + 1] * T(h) - T(0.5);
    const bool near = x > T(-1) && x < T(w) && y > T(-1) && y < T(h);  // false for NaN
    const T xs = near ? x : T(-1), ys = near ? y : T(-1);
    const T xf = std::floor(xs), yf = std::floor(ys);
    const int32_t x0 = static_cast<int32_t>(xf), y0 = static_cast<int32_t>(yf);
    const T fx = xs - xf, fy = ys - yf;
    const bool left = near && x0 >= 0, right = near && x0 + 1 < w;
    const bool top = y0 >= 0, bottom = y0 + 1 < h;
    const int32_t base = y0 * static_cast<int32_t>(w) + x0, row = static_cast<int32_t>(w);
    offset[p] = left && top ? base : 0;
    offset[n + p] = right && top ? base + 1 : 0;
    offset[2 * n + p] = left && bottom ? base + row : 0;
    offset[3 * n + p] = right && bottom ? base + row + 1 : 0;
    weight[p] = left && top ? (T(1) - fx) * (T(1) - fy) : T(0);
    weight[n + p] = right && top ? fx * (T(1) - fy) : T(0);
    weight[2 * n + p] = left && bottom ? (T(1) - fx) * fy : T(0);
    weight[3 * n + p] = right && bottom ? fx * fy : T(0);
  }
}

template <class T>
void find_corners(const T* points, int64_t h, int64_t w, const Corners<T>& c) {
  find_corners(points, h, w, c.n, c.offset.get(), c.weight.get());
}

// out[p] = sum of weight * map; a corner of weight 0 is not read into the sum, so NaN cannot leak
// from offset 0
template <class S, class T>
SEGKERN_CLONES void gather(const S* map /*[h*w]*/, const int32_t* offset /*[4, n]*/,
                           const T* weight /*[4, n]*/, int64_t n, T* out /*[n]*/) {
#pragma omp simd
  for (int64_t p = 0; p < n; ++p) {
    T sum = T(0);
    for (int k = 0; k < 4; ++k) {
      const T a = weight[k * n + p], v = static_cast<T>(map[offset[k * n + p]]);
      sum += a == T(0) ? T(0) : a * v;
    }
    out[p] = sum;
  }
}

template <class T>
void scatter(const T* grad /*[n]*/, const Corners<T>& c, T* map /*[h*w]*/) {
  for (int64_t p = 0; p < c.n; ++p) {
    for (int k = 0; k < 4; ++k) map[c.offset[k * c.n + p]] += c.weight[k * c.n + p] * grad[p];
  }
}

}  // namespace segkern
