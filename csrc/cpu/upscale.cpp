// upscale on the CPU in float32 and float64: a band of rows goes through the product, whose end
// adds the bias and activates, and through the depthwise convolution and the norm before the next,
// so that what lies between them is never held as a whole; nor is the map, where its products with
// embeddings are asked for. Letters: B image, h w size of the map x, C channels, Q embedding,
// N = 4 C columns of the product: those of pixel (a, b) of 2 x 2 are 2 a + b.
#include <optional>

#include "matrix_product.h"
#include "simd_math.h"

namespace segkern {
namespace {

constexpr int64_t kBandRows = 1024;  // of the product in a band: each reads the whole weight

// out = gelu(sums + bias)
template <class T>
SEGKERN_INLINE void finish_line(const T* sums, int64_t columns, const T* bias, T* out) {
#pragma omp simd
  for (int64_t c = 0; c < columns; ++c) {
    const T x = sums[c] + bias[c];
    out[c] = x * normal_below(x);
  }
}

template <class T>
SEGKERN_CLONES void finish(const T* sums /*[rows, kPanel]*/, int64_t rows, int64_t columns,
                           const T* bias, T* out, int64_t N) {
  for (int64_t r = 0; r < rows; ++r, sums += kPanel<T>, out += N) {
    if (columns == kPanel<T>)  // a constant: whole registers, no rest
      finish_line(sums, kPanel<T>, bias, out);
    else
      finish_line(sums, columns, bias, out);
  }
}

// The products of a row of three pixels' channel c with their taps
template <class T>
SEGKERN_INLINE T three(const T* const* y, const T* taps, int64_t C, int64_t c) {
  return taps[c] * y[0][c] + taps[C + c] * y[1][c] + taps[2 * C + c] * y[2][c];
}

// out = norm(sum_t filters[t] y[t]) of C channels; y are 3 x 3 pointers
template <class T>
SEGKERN_CLONES void refine(const T* const* y, const T* filters /*[9, C]*/, const T* scale,
                           const T* shift, T eps, int64_t C, T* out) {
  T total = T(0), square = T(0);
#pragma omp simd
  for (int64_t c = 0; c < C; ++c)
    out[c] = three(y, filters, C, c) + three(y + 3, filters + 3 * C, C, c) +
             three(y + 6, filters + 6 * C, C, c);
#pragma omp simd reduction(+ : total)
  for (int64_t c = 0; c < C; ++c) total += out[c];
  const T mean = total / T(C);
#pragma omp simd reduction(+ : square)
  for (int64_t c = 0; c < C; ++c) square += (out[c] - mean) * (out[c] - mean);
  const T factor = T(1) / std::sqrt(square / T(C) + eps);
#pragma omp simd
  for (int64_t c = 0; c < C; ++c) out[c] = (out[c] - mean) * factor * scale[c] + shift[c];
}

template <class T>
Tensor forward(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& filters,
               const Tensor& scale, const Tensor& shift, double eps,
               const std::optional<Tensor>& embeddings) {
  const int64_t B = x.size(0), h = x.size(1), w = x.size(2), C = x.size(3), N = 4 * C;
  const int64_t Q = embeddings ? embeddings->size(1) : 0;
  const Tensor out =
      embeddings ? empty<T>(x, {B, Q, 2 * h, 2 * w}) : empty<T>(x, {B, 2 * h, 2 * w, C});
  if (out.numel() == 0) return out;
  const Tensor factors = embeddings ? dense<T>(*embeddings) : out;
  const Tensor from = dense<T>(x), biases = dense<T>(bias), taps = dense<T>(filters);
  const Tensor scales = dense<T>(scale), shifts = dense<T>(shift);
  const Matrix<T> columns{data<T>(weight), weight.stride(1), weight.stride(0)};
  const int64_t band = std::max<int64_t>(2, kBandRows / w), line = w * N;
  const Scratch<T> lines(std::min(band + 2, h) * line), zeros(C);
  const Scratch<T> map(embeddings ? std::min(band, h) * line : 0);  // of a band
  std::fill_n(zeros.get(), C, T(0));
  for (int64_t b = 0; b < B; ++b) {
    int64_t base = 0, done = 0;  // the rows of x whose products are in `lines`
    for (int64_t first = 0, last; first < h; first = last) {
      last = std::min(first + band, h);
      const int64_t keep = std::max<int64_t>(first - 1, 0), need = std::min(last + 1, h);
      std::memmove(lines.get(), lines.get() + (keep - base) * line,
                   (done - keep) * line * sizeof(T));
      base = keep;
      T* fresh = lines.get() + (done - base) * line;
      multiply<T>({data<T>(from) + (b * h + done) * w * C, C, 1}, columns, (need - done) * w, N, C,
                  [&](const T* sums, int64_t row, int64_t rows, int64_t column, int64_t some) {
                    finish(sums, rows, some, data<T>(biases) + column, fresh + row * N + column,
                           N);
                  });
      done = need;
      T* to = mutable_data<T>(out) + (b * h + first) * line;
      if (embeddings) to = map.get();
      parallel_for(2 * first, 2 * last, 1, [&](int64_t begin, int64_t end) {
        const T* y[9];
        for (int64_t i = begin; i < end; ++i) {
          for (int64_t j = 0; j < 2 * w; ++j) {
            for (int64_t t = 0; t < 9; ++t) {
              const int64_t p = i + t / 3 - 1, q = j + t % 3 - 1;
              const bool inside = p >= 0 && p < 2 * h && q >= 0 && q < 2 * w;
              y[t] = zeros.get();
              if (inside)
                y[t] = lines.get() + (p / 2 - base) * line + q / 2 * N + (p % 2 * 2 + q % 2) * C;
            }
            refine(y, data<T>(taps), data<T>(scales), data<T>(shifts), T(eps), C,
                   to + ((i - 2 * first) * 2 * w + j) * C);
          }
        }
      });
      if (!embeddings) continue;
      T* logits = mutable_data<T>(out) + (b * Q * h + first) * 4 * w;
      multiply<T>({data<T>(factors) + b * Q * C, C, 1}, {to, 1, C}, Q, (last - first) * 4 * w, C,
                  [&](const T* sums, int64_t row, int64_t rows, int64_t column, int64_t some) {
                    for (int64_t r = 0; r < rows; ++r)
                      std::memcpy(logits + (row + r) * h * 4 * w + column, sums + r * kPanel<T>,
                                  some * sizeof(T));
                  });
    }
  }
  return out;
}

Tensor upscale(Tensor x, Tensor weight, Tensor bias, Tensor filters, Tensor scale, Tensor shift,
               double eps, std::optional<Tensor> embeddings) {
  const auto type = x.scalar_type();
  const int64_t C = x.dim() == 4 ? x.size(3) : -1;
  STD_TORCH_CHECK((type == ScalarType::Float || type == ScalarType::Double) &&
                      weight.scalar_type() == type && weight.dim() == 2 &&
                      weight.size(0) == 4 * C && weight.size(1) == C && bias.numel() == 4 * C &&
                      filters.numel() == 9 * C && scale.numel() == C && shift.numel() == C &&
                      (!embeddings || (embeddings->dim() == 3 && embeddings->size(2) == C &&
                                       embeddings->size(0) == x.size(0))),
                  "upscale: [B, h, w, C] of float32 or float64 and weights that fit expected");
  return (type == ScalarType::Double ? forward<double> : forward<float>)(x, weight, bias, filters,
                                                                         scale, shift, eps,
                                                                         embeddings);
}

}  // namespace
}  // namespace segkern

STABLE_TORCH_LIBRARY_IMPL(segkern, CPU, m) { m.impl("upscale", TORCH_BOX(&segkern::upscale)); }
