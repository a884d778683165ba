// dwconv3x3_gelu on the CPU: four pixels of a row at a time, all their channels, which lie beside
// each other; then their GELU, while the sums are in the first cache. Backward goes through bands
// of rows and keeps the gradient d of three rows of sums.
// Letters: B image, h w map, C channel. Everything is [B, h, w, C], filters are [9, C].
#include "simd_math.h"
#include "tile.h"

namespace segkern {
namespace {

constexpr int64_t kTogether = 4;  // pixels whose filters are read together
constexpr int64_t kBand = 8;      // rows of a band at least: two more are computed twice

// Of P pixels beside each other what their filters read: 3 rows of P + 2 pixels.
template <class S, int64_t P>
struct Patch {
  // the pixels from column j on; zeros [C] stand for what lies outside, a row that does is null
  SEGKERN_INLINE Patch(const S* const* rows, int64_t j, int64_t w, int64_t C, const S* zeros) {
    for (int64_t m = 0; m < 3; ++m)
      for (int64_t n = 0; n < P + 2; ++n) {
        const int64_t column = j + n - 1;
        const bool inside = rows[m] != nullptr && column >= 0 && column < w;
        at[m][n] = inside ? rows[m] + column * C : zeros;
      }
  }
  const S* at[3][P + 2];
};

// z[p, c] = bias[c] + the sum over the patch
template <class S, class T, int64_t P>
SEGKERN_INLINE void convolve(const Patch<S, P>& x, const T* filters, const T* bias, int64_t C,
                             T* z) {
#pragma omp simd
  for (int64_t c = 0; c < C; ++c) {
    T sum[P];
#pragma GCC unroll 8
    for (int64_t p = 0; p < P; ++p) sum[p] = bias[c];
#pragma GCC unroll 8
    for (int64_t m = 0; m < 3; ++m)
#pragma GCC unroll 8
      for (int64_t k = 0; k < 3; ++k)
#pragma GCC unroll 8
        for (int64_t p = 0; p < P; ++p)
          sum[p] += filters[(3 * m + k) * C + c] * widened<T>(x.at[m][p + k][c]);
#pragma GCC unroll 8
    for (int64_t p = 0; p < P; ++p) z[p * C + c] = sum[p];
  }
}

enum End { kPlain, kGelu, kGeluGradient };

// What becomes of sums z: themselves; their GELU; or the gradient of z from that of the GELU
template <End end, class S, class T, class Out>
SEGKERN_INLINE void finish(const T* z, const S* grad, int64_t n, Out* out) {
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) {
    T y = z[c];
    if constexpr (end == kGelu) y *= normal_below(z[c]);
    if constexpr (end == kGeluGradient) {
      const T density = T(0.3989422804014327) * simd_exp_low(T(-0.5) * z[c] * z[c]);
      y = widened<T>(grad[c]) * (normal_below(z[c]) + z[c] * density);
    }
    out[c] = rounded<Out>(y);
  }
}

// A row of results, from three rows [w, C]; `grad` is a row, too
template <End end, class S, class T, class G, class Out>
SEGKERN_CLONES void convolve_row(const S* const* rows, const S* zeros, const T* filters,
                                 const T* bias, const G* grad, int64_t w, int64_t C,
                                 T* z /*[kTogether, C]*/, Out* out) {
  for (int64_t j = 0, n; j < w; j += n) {
    n = w - j < kTogether ? 1 : kTogether;
    if (n == 1)
      convolve(Patch<S, 1>(rows, j, w, C, zeros), filters, bias, C, z);
    else
      convolve(Patch<S, kTogether>(rows, j, w, C, zeros), filters, bias, C, z);
    finish<end>(z, grad == nullptr ? nullptr : grad + j * C, n * C, out + j * C);
  }
}

// sums[k, c] += d times the pixel that filter k reads, and sums[9, c] += d, over P pixels
template <class S, class T, int64_t P>
SEGKERN_INLINE void add_products(const Patch<S, P>& x, const T* d /*[P, C]*/, int64_t C,
                                 T* sums /*[10, C]*/) {
#pragma omp simd
  for (int64_t c = 0; c < C; ++c) {
#pragma GCC unroll 8
    for (int64_t m = 0; m < 3; ++m)
#pragma GCC unroll 8
      for (int64_t k = 0; k < 3; ++k) {
        T sum = sums[(3 * m + k) * C + c];
#pragma GCC unroll 8
        for (int64_t p = 0; p < P; ++p) sum += d[p * C + c] * widened<T>(x.at[m][p + k][c]);
        sums[(3 * m + k) * C + c] = sum;
      }
    T sum = sums[9 * C + c];
#pragma GCC unroll 8
    for (int64_t p = 0; p < P; ++p) sum += d[p * C + c];
    sums[9 * C + c] = sum;
  }
}

template <class S, class T>
SEGKERN_CLONES void add_row(const S* const* rows, const S* zeros, const T* d, int64_t w, int64_t C,
                            T* sums) {
  for (int64_t j = 0, n; j < w; j += n) {
    n = w - j < kTogether ? 1 : kTogether;
    if (n == 1)
      add_products(Patch<S, 1>(rows, j, w, C, zeros), d + j * C, C, sums);
    else
      add_products(Patch<S, kTogether>(rows, j, w, C, zeros), d + j * C, C, sums);
  }
}

template <class T>
SEGKERN_CLONES void add_to(const T* x, int64_t n, double* sum) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) sum[i] += x[i];
}

// Rows i - 1, i and i + 1 of an image; null outside of it
template <class S>
struct Rows {
  Rows(const S* image, int64_t i, int64_t h, int64_t line) {
    for (int64_t m = 0; m < 3; ++m) {
      const int64_t row = i + m - 1;
      at[m] = row >= 0 && row < h ? image + row * line : nullptr;
    }
  }
  const S* at[3];
};

template <class S>
Scratch<S> zeros_of(int64_t n) {
  Scratch<S> zeros(n);
  std::memset(static_cast<void*>(zeros.get()), 0, n * sizeof(S));
  return zeros;
}

template <class S, class T>
void run(const Tensor& x, const Tensor& filters, const Tensor& bias, const Tensor& out) {
  const int64_t B = x.size(0), h = x.size(1), w = x.size(2), C = x.size(3), line = w * C;
  const S* from = static_cast<const S*>(x.const_data_ptr());
  S* to = static_cast<S*>(out.mutable_data_ptr());
  const Scratch<S> zeros = zeros_of<S>(C);
  const Tensor taps = dense<T>(filters), shift = dense<T>(bias);
  parallel_for(0, B * h, 1 + 16384 / (line + 1), [&](int64_t begin, int64_t end) {
    const Scratch<T> z(kTogether * C);
    for (int64_t i = begin; i < end; ++i) {
      const Rows<S> rows(from + i / h * h * line, i % h, h, line);
      convolve_row<kGelu, S, T, S, S>(rows.at, zeros.get(), data<T>(taps), data<T>(shift), nullptr,
                                      w, C, z.get(), to + i * line);
    }
  });
}

// A band of rows of one image: their gradient of x, and what they add to those of filters and bias
template <class S, class T>
struct Backward {
  int64_t h, w, C;
  const T *filters, *turned, *bias;  // turned: [9, C], the last first
  const S* zeros;                    // [C]
  const T* nothing;                  // [C] zeros, too
  T *d, *z, *sums;                   // three rows; [kTogether, C]; [10, C]

  T* row_of_d(int64_t i) const { return d + i % 3 * w * C; }

  void operator()(const S* grad, const S* x, int64_t top, int64_t bottom, S* of_x,
                  double* total /*[10, C]*/) const {
    const int64_t line = w * C;
    std::fill_n(total, 10 * C, 0.0);
    for (int64_t i = std::max<int64_t>(top - 1, 0); i <= bottom; ++i) {
      if (i < h) {
        const Rows<S> rows(x, i, h, line);
        convolve_row<kGeluGradient, S, T, S, T>(rows.at, zeros, filters, bias, grad + i * line, w,
                                                C, z, row_of_d(i));
        if (i >= top && i < bottom) {
          std::fill_n(sums, 10 * C, T(0));
          add_row(rows.at, zeros, row_of_d(i), w, C, sums);
          add_to(sums, 10 * C, total);
        }
      }
      const int64_t done = i - 1;
      if (done < top) continue;
      const T* around[3];
      for (int64_t m = 0; m < 3; ++m) {
        const int64_t row = done + m - 1;
        around[m] = row >= 0 && row < h ? row_of_d(row) : nullptr;
      }
      convolve_row<kPlain, T, T, T, S>(around, nothing, turned, nothing, nullptr, w, C, z,
                                       of_x + done * line);
    }
  }
};

template <class S, class T>
std::tuple<Tensor, Tensor> run_backward(const Tensor& grad, const Tensor& x, const Tensor& filters,
                                        const Tensor& bias, const Tensor& out) {
  const int64_t B = x.size(0), h = x.size(1), w = x.size(2), C = x.size(3), line = w * C;
  const S *g = static_cast<const S*>(grad.const_data_ptr()),
          *from = static_cast<const S*>(x.const_data_ptr());
  S* to = static_cast<S*>(out.mutable_data_ptr());
  const Scratch<S> zeros = zeros_of<S>(C);
  const Scratch<T> nothing = zeros_of<T>(C), turned(9 * C);
  const Tensor taps = dense<T>(filters), shift = dense<T>(bias);
  for (int64_t k = 0; k < 9; ++k)
    std::copy_n(data<T>(taps) + (8 - k) * C, C, turned.get() + k * C);
  // of sizes alone, so that sums do not depend on the number of threads
  const int64_t size = std::max(kBand, B * h / 64), bands = (h + size - 1) / size;
  const Scratch<double> totals(std::max<int64_t>(B * bands, 1) * 10 * C);
  std::fill_n(totals.get(), 10 * C, 0.0);
  parallel_for(0, B * bands, 1, [&](int64_t begin, int64_t end) {
    const Scratch<T> d(3 * line), z(kTogether * C), sums(10 * C);
    const Backward<S, T> band{h,
                              w,
                              C,
                              data<T>(taps),
                              turned.get(),
                              data<T>(shift),
                              zeros.get(),
                              nothing.get(),
                              d.get(),
                              z.get(),
                              sums.get()};
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / bands * h * line, top = i % bands * size;
      band(g + image, from + image, top, std::min(h, top + size), to + image,
           totals.get() + i * 10 * C);
    }
  });
  for (int64_t i = 1; i < B * bands; ++i) add_to(totals.get() + i * 10 * C, 10 * C, totals.get());
  const Tensor of_filters = empty<T>(x, {9, C}), of_bias = empty<T>(x, {C});
  for (int64_t c = 0; c < 9 * C; ++c) mutable_data<T>(of_filters)[c] = static_cast<T>(totals[c]);
  for (int64_t c = 0; c < C; ++c) mutable_data<T>(of_bias)[c] = static_cast<T>(totals[9 * C + c]);
  return {of_filters, of_bias};
}

void check(const Tensor& x, const Tensor& filters, const Tensor& bias) {
  STD_TORCH_CHECK(x.dim() == 4 && filters.numel() == 9 * x.size(3) && bias.numel() == x.size(3),
                  "dwconv3x3_gelu: sizes that do not fit");
}

Tensor dwconv3x3_gelu(Tensor x, Tensor filters, Tensor bias) {
  check(x, filters, bias);
  const Tensor from = torch::stable::contiguous(x),
               out = empty_as(x, {x.size(0), x.size(1), x.size(2), x.size(3)});
  dispatch_storage(x, "dwconv3x3_gelu", [&](auto storage, auto zero) {
    run<decltype(storage), decltype(zero)>(from, filters, bias, out);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> dwconv3x3_gelu_backward(Tensor grad, Tensor x, Tensor filters,
                                                           Tensor bias) {
  check(x, filters, bias);
  STD_TORCH_CHECK(grad.numel() == x.numel() && grad.scalar_type() == x.scalar_type(),
                  "dwconv3x3_gelu_backward: a gradient as x expected");
  const Tensor g = torch::stable::contiguous(grad), from = torch::stable::contiguous(x);
  const Tensor out = empty_as(x, {x.size(0), x.size(1), x.size(2), x.size(3)});
  Tensor of_filters, of_bias;
  dispatch_storage(x, "dwconv3x3_gelu_backward", [&](auto storage, auto zero) {
    std::tie(of_filters, of_bias) =
        run_backward<decltype(storage), decltype(zero)>(g, from, filters, bias, out);
  });
  return {out, cast_to(of_filters, filters.scalar_type()), cast_to(of_bias, bias.scalar_type())};
}

}  // namespace
}  // namespace segkern

STABLE_TORCH_LIBRARY_IMPL(segkern, CPU, m) {
  m.impl("dwconv3x3_gelu", TORCH_BOX(&segkern::dwconv3x3_gelu));
  m.impl("dwconv3x3_gelu_backward", TORCH_BOX(&segkern::dwconv3x3_gelu_backward));
}
