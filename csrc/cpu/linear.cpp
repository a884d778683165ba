// linear on the CPU in float32 and float64: the product of matrix_product.h, whose end adds the
// bias, applies the activation and adds the residual.
// Letters: M row, N channel out, K channel in.
#include <optional>
#include <tuple>

#include "matrix_product.h"
#include "simd_math.h"

namespace segkern {
namespace {

enum Activation { kNone, kRelu, kGelu };

// x; max(x, 0), which keeps NaN; or x Phi(x), NaN at -inf as PyTorch's
template <Activation kind, class T>
SEGKERN_INLINE T activation(T x) {
  if constexpr (kind == kNone) return x;
  if constexpr (kind == kRelu) return x < T(0) ? T(0) : x;
  return x * normal_below(x);
}

// Where a piece of the result goes; all with lines of N, of which the first is the piece's
template <class T>
struct Places {
  const T *partial, *bias, *residual;  // or null
  T *before, *out;                     // before may be null
  int64_t N;
  Places at(int64_t row, int64_t column) const {
    const int64_t n = row * N + column;
    return {partial ? partial + n : nullptr,
            bias ? bias + column : nullptr,
            residual ? residual + n : nullptr,
            before ? before + n : nullptr,
            out + n,
            N};
  }
};

// before = sums + partial + bias; out = act(before) + residual
template <class T, Activation kind>
SEGKERN_INLINE void finish_line(const T* sums, int64_t columns, const Places<T>& p) {
  T line[kPanel<T>];
#pragma omp simd
  for (int64_t c = 0; c < columns; ++c) line[c] = sums[c] + (p.bias ? p.bias[c] : T(0));
  if (p.partial != nullptr)
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) line[c] += p.partial[c];
  if (p.before != nullptr)
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) p.before[c] = line[c];
#pragma omp simd
  for (int64_t c = 0; c < columns; ++c) line[c] = activation<kind>(line[c]);
  if (p.residual != nullptr)
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) line[c] += p.residual[c];
#pragma omp simd
  for (int64_t c = 0; c < columns; ++c) p.out[c] = line[c];
  // the places beside are the next to be written
  for (int64_t i = 0; i < 2; ++i) __builtin_prefetch(p.out + kPanel<T> + i * kLanes<T>, 1);
}

template <class T, Activation kind>
SEGKERN_CLONES void finish(const T* sums /*[rows, kPanel]*/, int64_t rows, int64_t columns,
                           const Places<T>& p) {
  for (int64_t r = 0; r < rows; ++r, sums += kPanel<T>) {
    if (columns == kPanel<T>)  // a constant: whole registers, no rest
      finish_line<T, kind>(sums, kPanel<T>, p.at(r, 0));
    else
      finish_line<T, kind>(sums, columns, p.at(r, 0));
  }
}

constexpr int64_t kLong = 2048;  // of K at a time: the gradient of a weight sums over all rows

template <class T>
void run(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t kind,
         const std::optional<Tensor>& residual, const std::optional<Tensor>& before,
         const Tensor& out) {
  const int64_t M = x.size(0), K = x.size(1), N = weight.size(0);
  const Matrix<T> a{data<T>(x), x.stride(0), x.stride(1)};
  const Matrix<T> b{data<T>(weight), weight.stride(1), weight.stride(0)};
  const auto ending = kind == kGelu   ? finish<T, kGelu>
                      : kind == kRelu ? finish<T, kRelu>
                                      : finish<T, kNone>;
  T* to = mutable_data<T>(out);
  const bool adds = residual && data<T>(*residual) == to;  // the result is its own residual
  STD_TORCH_CHECK(!adds || kind == kNone, "linear_: an activation goes before its own residual");
  const int64_t pieces = std::max<int64_t>((K + kLong / 2) / kLong, 1);
  const int64_t length = (K + pieces - 1) / pieces;
  for (int64_t k = 0, n; k == 0 || k < K; k += n) {
    n = std::min(length, K - k);
    const bool last = k + n >= K;
    Places<T> places{k > 0 || adds ? to : nullptr, nullptr, nullptr, nullptr, to, N};
    if (last && bias) places.bias = data<T>(*bias);
    if (last && residual && !adds) places.residual = data<T>(*residual);
    if (last && before) places.before = mutable_data<T>(*before);
    multiply<T>(a.at(0, k), b.at(k, 0), M, N, n,
                [&](const T* sums, int64_t row, int64_t rows, int64_t column, int64_t columns) {
                  (last ? ending : finish<T, kNone>)(sums, rows, columns, places.at(row, column));
                });
    if (n == 0) break;
  }
}

void check(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t kind,
           const std::optional<Tensor>& residual) {
  const auto type = x.scalar_type();
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && weight.size(1) == x.size(1) &&
                      weight.scalar_type() == type &&
                      (type == ScalarType::Float || type == ScalarType::Double),
                  "linear: [M, K] and [N, K] of float32 or float64 expected");
  const auto dense = [&](const std::optional<Tensor>& t, int64_t n) {
    return !t || (t->is_contiguous() && t->numel() == n && t->scalar_type() == type);
  };
  STD_TORCH_CHECK(dense(bias, weight.size(0)) && dense(residual, x.size(0) * weight.size(0)) &&
                      kind >= kNone && kind <= kGelu,
                  "linear: dense [N] and [M, N] and an activation expected");
}

void linear_(Tensor out, Tensor x, Tensor weight, std::optional<Tensor> bias, int64_t activation,
             std::optional<Tensor> residual, std::optional<Tensor> before) {
  check(x, weight, bias, activation, residual);
  for (const Tensor& t : {out, before.value_or(out)})
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == x.size(0) && t.size(1) == weight.size(0) &&
                        t.is_contiguous() && t.scalar_type() == x.scalar_type(),
                    "linear_: dense results [M, N] expected");
  (x.scalar_type() == ScalarType::Double ? run<double> : run<float>)(x, weight, bias, activation,
                                                                     residual, before, out);
}

template <class T>
std::tuple<Tensor, Tensor> make(const Tensor& x, const Tensor& weight,
                                const std::optional<Tensor>& bias, int64_t kind,
                                const std::optional<Tensor>& residual, bool keep) {
  const IntList sizes{x.size(0), weight.size(0)};
  const Tensor out = empty<T>(x, sizes), before = empty<T>(x, keep ? sizes : IntList{0});
  run<T>(x, weight, bias, kind, residual, keep ? std::optional(before) : std::nullopt, out);
  return {out, before};
}

std::tuple<Tensor, Tensor> linear(Tensor x, Tensor weight, std::optional<Tensor> bias,
                                  int64_t activation, std::optional<Tensor> residual, bool keep) {
  check(x, weight, bias, activation, residual);
  return (x.scalar_type() == ScalarType::Double ? make<double> : make<float>)(x, weight, bias,
                                                                              activation, residual,
                                                                              keep);
}

}  // namespace
}  // namespace segkern

STABLE_TORCH_LIBRARY_IMPL(segkern, CPU, m) {
  m.impl("linear", TORCH_BOX(&segkern::linear));
  m.impl("linear_", TORCH_BOX(&segkern::linear_));
}
