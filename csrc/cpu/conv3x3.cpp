// conv3x3 on the CPU: Winograd's F(2 x 2, 3 x 3). Patches of 4 x 4 pixels, 2 apart, and the
// filters are transformed; a product over the channels for each of the 16 values; the transform
// back. Letters: B image, h w size of the maps, C channels in, K channels out, T tile of 2 x 2
// pixels.
//
//   y = A^T ((G g G^T) * (B^T d B)) A, the product * value by value and summed over C
//
// A band of tiles goes through all three steps before the next, so that its values stay in the
// cache. The gradient of the filters is the transposed transforms around the transposed products.
#include "matrix_product.h"

namespace segkern {
namespace {

constexpr int64_t kValues = 16;
constexpr int64_t kBand = int64_t{1} << 20;  // values of a band's transformed pixels and results

// Places of the tiles of [B, h, w, channels] and of their pixels.
struct Grid {
  explicit Grid(const Tensor& x)
      : B(x.size(0)), h(x.size(1)), w(x.size(2)), down((h + 1) / 2), across((w + 1) / 2) {}
  int64_t tiles() const { return B * down * across; }
  // Calls f(i, offset) for n x n pixels from `first` of tile t on, the map's rows after another;
  // -1 is outside.
  template <class F>
  void pixels(int64_t t, int64_t first, int64_t n, int64_t channels, const F& f) const {
    const int64_t b = t / (down * across), rest = t % (down * across);
    const int64_t top = rest / across * 2 + first, left = rest % across * 2 + first;
    for (int64_t i = 0; i < n * n; ++i) {
      const int64_t y = top + i / n, x = left + i % n;
      const bool inside = y >= 0 && y < h && x >= 0 && x < w;
      f(i, inside ? ((b * h + y) * w + x) * channels : -1);
    }
  }
  int64_t B, h, w, down, across;
};

// v = B^T d B of C channels; d are 4 x 4 pointers, v lie `step` apart
template <class T>
SEGKERN_CLONES void transform_pixels(const T* const* d, int64_t C, T* v, int64_t step) {
#pragma omp simd
  for (int64_t c = 0; c < C; ++c) {
    T r[16];
    for (int j = 0; j < 4; ++j) {
      const T a = d[j][c], b = d[4 + j][c], e = d[8 + j][c], f = d[12 + j][c];
      r[j] = a - e, r[4 + j] = b + e, r[8 + j] = e - b, r[12 + j] = b - f;
    }
    for (int i = 0; i < 4; ++i) {
      const T a = r[4 * i], b = r[4 * i + 1], e = r[4 * i + 2], f = r[4 * i + 3];
      T* to = v + 4 * i * step + c;
      to[0] = a - e, to[step] = b + e, to[2 * step] = e - b, to[3 * step] = b - f;
    }
  }
}

// y = A^T m A; y are 2 x 2 pointers
template <class T>
SEGKERN_CLONES void transform_back(const T* m, int64_t step, int64_t K, T* const* y) {
#pragma omp simd
  for (int64_t k = 0; k < K; ++k) {
    T r[8];
    for (int j = 0; j < 4; ++j) {
      const T* from = m + j * step + k;
      const T b = from[4 * step], e = from[8 * step];
      r[j] = from[0] + b + e, r[4 + j] = b - e - from[12 * step];
    }
    for (int i = 0; i < 2; ++i) {
      const T b = r[4 * i + 1], e = r[4 * i + 2];
      y[2 * i][k] = r[4 * i] + b + e, y[2 * i + 1][k] = b - e - r[4 * i + 3];
    }
  }
}

// m = A y A^T, the transposed transform; y are 2 x 2 pointers
template <class T>
SEGKERN_CLONES void transform_gradients(const T* const* y, int64_t K, T* m, int64_t step) {
#pragma omp simd
  for (int64_t k = 0; k < K; ++k) {
    T r[8];
    for (int j = 0; j < 2; ++j) {
      const T a = y[j][k], b = y[2 + j][k];
      r[j] = a, r[2 + j] = a + b, r[4 + j] = a - b, r[6 + j] = -b;
    }
    for (int i = 0; i < 4; ++i) {
      const T a = r[2 * i], b = r[2 * i + 1];
      T* to = m + 4 * i * step + k;
      to[0] = a, to[step] = a + b, to[2 * step] = a - b, to[3 * step] = -b;
    }
  }
}

// out = a b, [16, n, m] each with its own strides
void products(const Tensor& a, const Tensor& b, Tensor& out) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::bmm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

// Calls f(first, n) for bands of tiles
template <class F>
void bands(const Grid& grid, int64_t channels, const F& f) {
  const int64_t most = std::max<int64_t>(64, kBand / (kValues * std::max<int64_t>(channels, 1)));
  for (int64_t t = 0; t < grid.tiles(); t += most) f(t, std::min(most, grid.tiles() - t));
}

// The transformed 4 x 4 patches of tiles [first, first + n), to v [16, n, C]
template <class T>
void split(const Grid& grid, const T* x, int64_t C, int64_t first, int64_t n, const Tensor& v) {
  T* to = mutable_data<T>(v);
  parallel_for(0, n, 4, [&](int64_t begin, int64_t end) {
    const std::vector<T> zeros(C);
    const T* d[16];
    for (int64_t t = begin; t < end; ++t) {
      grid.pixels(first + t, -1, 4, C,
                  [&](int64_t i, int64_t at) { d[i] = at < 0 ? zeros.data() : x + at; });
      transform_pixels(d, C, to + t * C, n * C);
    }
  });
}

// The transformed filters as panels of matrix_product.h: for each value the columns K, summed over
// C
template <class T>
struct Filters {
  Filters(const T* filters /*[16, K, C]*/, int64_t K, int64_t C)
      : K(K), C(C), size((K + kPanel<T> - 1) / kPanel<T> * kPanel<T> * C), panels(kValues * size) {
    parallel_for(0, kValues, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        pack<T>({filters + i * K * C, 1, C}, C, K, panels.get() + i * size);
    });
  }
  // m = v times the filters, [16, n, K] of [16, n, C]
  void times(const T* v, int64_t n, T* m) const {
    const auto make = [] { return Scratch<T>(kChunk * kPanel<T>); };
    run_tasks(kValues, make, [&](int64_t i, const Scratch<T>& sums) {
      multiply_rows<T>({v + i * n * C, C, 1}, 0, n, panels.get() + i * size, 0, K, C, sums.get(),
                       [&](const T* sums, int64_t row, int64_t rows, int64_t k, int64_t some) {
                         T* to = m + (i * n + row) * K + k;
                         for (int64_t r = 0; r < rows; ++r)
                           std::memcpy(to + r * K, sums + r * kPanel<T>, some * sizeof(T));
                       });
    });
  }
  int64_t K, C, size;
  Scratch<T> panels;
};

template <class T>
Tensor forward(const Tensor& x, const Tensor& filters) {
  const Grid grid(x);
  const int64_t C = x.size(3), K = filters.size(1);
  const Tensor from = dense<T>(x), of_filters = dense<T>(filters);
  const Filters<T> u(data<T>(of_filters), K, C);
  const Tensor out = empty<T>(x, {grid.B, grid.h, grid.w, K});
  bands(grid, C + K, [&](int64_t first, int64_t n) {
    const Tensor v = empty<T>(x, {kValues, n, C}), m = empty<T>(x, {kValues, n, K});
    split(grid, data<T>(from), C, first, n, v);
    u.times(data<T>(v), n, mutable_data<T>(m));
    parallel_for(0, n, 4, [&](int64_t begin, int64_t end) {
      std::vector<T> outside(K);
      T *to = mutable_data<T>(out), *y[4];
      for (int64_t t = begin; t < end; ++t) {
        grid.pixels(first + t, 0, 2, K,
                    [&](int64_t i, int64_t at) { y[i] = at < 0 ? outside.data() : to + at; });
        transform_back(data<T>(m) + t * K, n * K, K, y);
      }
    });
  });
  return out;
}

// The gradient of the transformed filters [16, K, C].
template <class T>
Tensor backward(const Tensor& grad, const Tensor& x) {
  const Grid grid(x);
  const int64_t C = x.size(3), K = grad.size(3);
  const Tensor from = dense<T>(x), above = dense<T>(grad);
  Tensor total = zeros<T>(x, {kValues, K, C}), part = empty<T>(x, {kValues, K, C});
  T* sum = mutable_data<T>(total);
  bands(grid, C + K, [&](int64_t first, int64_t n) {
    const Tensor v = empty<T>(x, {kValues, n, C}), m = empty<T>(x, {kValues, n, K});
    split(grid, data<T>(from), C, first, n, v);
    parallel_for(0, n, 4, [&](int64_t begin, int64_t end) {
      const std::vector<T> zeros(K);
      const T *y[4], *g = data<T>(above);
      T* to = mutable_data<T>(m);
      for (int64_t t = begin; t < end; ++t) {
        grid.pixels(first + t, 0, 2, K,
                    [&](int64_t i, int64_t at) { y[i] = at < 0 ? zeros.data() : g + at; });
        transform_gradients(y, K, to + t * K, n * K);
      }
    });
    products(torch::stable::transpose(m, 1, 2), v, part);
    const T* p = data<T>(part);
    parallel_for(0, total.numel(), 1 << 14, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) sum[i] += p[i];
    });
  });
  return total;
}

Tensor conv3x3(Tensor x, Tensor filters) {
  STD_TORCH_CHECK(filters.size(0) == kValues && filters.size(2) == x.size(3),
                  "conv3x3: sizes that do not fit");
  return x.scalar_type() == ScalarType::Double ? forward<double>(x, filters)
                                               : forward<float>(x, filters);
}

Tensor conv3x3_backward(Tensor grad, Tensor x) {
  for (int64_t i = 0; i < 3; ++i)
    STD_TORCH_CHECK(grad.size(i) == x.size(i), "conv3x3_backward: sizes that do not fit");
  return x.scalar_type() == ScalarType::Double ? backward<double>(grad, x)
                                               : backward<float>(grad, x);
}

}  // namespace
}  // namespace segkern

STABLE_TORCH_LIBRARY_IMPL(segkern, CPU, m) {
  m.impl("conv3x3", TORCH_BOX(&segkern::conv3x3));
  m.impl("conv3x3_backward", TORCH_BOX(&segkern::conv3x3_backward));
}
