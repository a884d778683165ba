// group_norm on the CPU: one pass over the map for the sums of each channel, one that scales, adds
// the resized coarser map and cuts at 0. Letters: B image, N pixel, C channel, G group,
// h w size of the coarser map.
#include <cmath>
#include <optional>

#include "simd_math.h"
#include "tile.h"

namespace segkern {
namespace {

constexpr int64_t kPixels = 64;  // that are summed in T before they go to double

// sum[c] += x - origin and square[c] += (x - origin)^2 over n pixels
template <class S, class T>
SEGKERN_CLONES void add_moments(const S* x /*[n, C]*/, const S* origin, int64_t n, int64_t C,
                                T* sum, T* square) {
  for (int64_t i = 0; i < n; ++i) {
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) {
      const T d = widened<T>(x[i * C + c]) - widened<T>(origin[c]);
      sum[c] += d;
      square[c] += d * d;
    }
  }
}

// y = x scale + shift, + up[0] f[0] + .. + up[3] f[3] where there is a coarser map, cut at 0 if so
// asked
template <class S, class T>
SEGKERN_CLONES void finish(const S* x, const T* scale, const T* shift, const T* const* up,
                           const T* f, int64_t C, bool relu, S* y) {
  const T lowest = relu ? T(0) : -std::numeric_limits<T>::infinity();
  if (up != nullptr) {
    const T *a = up[0], *b = up[1], *c = up[2], *d = up[3];
#pragma omp simd
    for (int64_t k = 0; k < C; ++k) {
      const T more = f[0] * a[k] + f[1] * b[k] + f[2] * c[k] + f[3] * d[k];
      const T sum = widened<T>(x[k]) * scale[k] + shift[k] + more;
      y[k] = rounded<S>(sum < lowest ? lowest : sum);
    }
  } else {
#pragma omp simd
    for (int64_t k = 0; k < C; ++k) {
      const T sum = widened<T>(x[k]) * scale[k] + shift[k];
      y[k] = rounded<S>(sum < lowest ? lowest : sum);
    }
  }
}

// Where output i of n reads `in` values: the two, and the share of the second. As bilinear
// resizing without align_corners.
template <class T>
struct Place {
  Place(int64_t i, int64_t n, int64_t in) {
    const T at = std::max(T(0), (i + T(0.5)) * (static_cast<T>(in) / n) - T(0.5));
    low = std::min(static_cast<int64_t>(at), in - 1);
    high = std::min(low + 1, in - 1);
    share = at - low;
  }
  int64_t low, high;
  T share;
};

// Mean and the inverse deviation of each group of image b, from its N pixels.
template <class S, class T>
void moments(const S* x /*[N, C]*/, int64_t N, int64_t C, int64_t G, double eps, T* mean,
             T* inverse) {
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(64, N / 256)), D = C / G;
  const Scratch<double> sums(parts * 2 * C);
  parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    const Scratch<T> sum(2 * C);
    for (int64_t p = begin; p < end; ++p) {
      double* total = sums.get() + p * 2 * C;
      std::fill_n(total, 2 * C, 0.0);
      const int64_t stop = N * (p + 1) / parts;
      for (int64_t i = N * p / parts; i < stop; i += kPixels) {
        std::fill_n(sum.get(), 2 * C, T(0));
        add_moments(x + i * C, x, std::min(kPixels, stop - i), C, sum.get(), sum.get() + C);
        for (int64_t c = 0; c < 2 * C; ++c) total[c] += sum[c];
      }
    }
  });
  const double n = static_cast<double>(N);
  for (int64_t p = 1; p < parts; ++p)
    for (int64_t c = 0; c < 2 * C; ++c) sums[c] += sums[p * 2 * C + c];
  for (int64_t g = 0; g < G; ++g) {
    double middle = 0, spread = 0;
    for (int64_t c = g * D; c < (g + 1) * D; ++c)
      middle += static_cast<double>(x[c]) + sums[c] / n;
    middle /= D;
    for (int64_t c = g * D; c < (g + 1) * D; ++c) {
      const double off = sums[c] / n, apart = static_cast<double>(x[c]) + off - middle;
      spread += std::max(0.0, sums[C + c] / n - off * off) + apart * apart;
    }
    mean[g] = static_cast<T>(middle);
    inverse[g] = static_cast<T>(1 / std::sqrt(spread / D + eps));
  }
}

template <class S, class T>
std::tuple<Tensor, Tensor, Tensor> run(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                       int64_t G, double eps, bool relu,
                                       const std::optional<Tensor>& up) {
  const int64_t B = x.size(0), H = x.size(1), W = x.size(2), C = x.size(3), N = H * W, D = C / G;
  const Tensor from = torch::stable::contiguous(x), gain = dense<T>(weight),
               offset = dense<T>(bias);
  const Tensor coarse = up ? dense<T>(*up) : Tensor(gain);
  const int64_t h = up ? coarse.size(1) : 0, w = up ? coarse.size(2) : 0;
  const Tensor out = empty_as(x, {B, H, W, C}), mean = empty<T>(x, {B, G});
  const Tensor inverse = empty<T>(x, {B, G});
  for (int64_t b = 0; b < B && N > 0; ++b) {
    const S* source = data<S>(from) + b * N * C;
    T *m = mutable_data<T>(mean) + b * G, *r = mutable_data<T>(inverse) + b * G;
    moments(source, N, C, G, eps, m, r);
    const Scratch<T> scale(C), shift(C);
    for (int64_t c = 0; c < C; ++c) {
      scale[c] = data<T>(gain)[c] * r[c / D];
      shift[c] = data<T>(offset)[c] - m[c / D] * scale[c];
    }
    const T* below = data<T>(coarse) + b * h * w * C;
    S* to = mutable_data<S>(out) + b * N * C;
    parallel_for(0, H, 2, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Place<T> y(i, H, h);
        for (int64_t j = 0; j < W; ++j) {
          const int64_t at = (i * W + j) * C;
          if (!up) {
            finish<S, T>(source + at, scale.get(), shift.get(), nullptr, nullptr, C, relu,
                         to + at);
            continue;
          }
          const Place<T> z(j, W, w);
          const T* corner[4] = {below + (y.low * w + z.low) * C, below + (y.low * w + z.high) * C,
                                below + (y.high * w + z.low) * C,
                                below + (y.high * w + z.high) * C};
          const T share[4] = {(1 - y.share) * (1 - z.share), (1 - y.share) * z.share,
                              y.share * (1 - z.share), y.share * z.share};
          finish<S, T>(source + at, scale.get(), shift.get(), corner, share, C, relu, to + at);
        }
      }
    });
  }
  return {out, mean, inverse};
}

std::tuple<Tensor, Tensor, Tensor> group_norm(Tensor x, Tensor weight, Tensor bias, int64_t groups,
                                              double eps, bool relu, std::optional<Tensor> up) {
  STD_TORCH_CHECK(weight.numel() == x.size(3) && bias.numel() == x.size(3) && groups > 0 &&
                      x.size(3) % groups == 0 && (!up || up->size(3) == x.size(3)) &&
                      (!up || up->size(0) == x.size(0)) && (!up || up->numel() > 0 || !x.numel()),
                  "group_norm: sizes that do not fit");
  std::tuple<Tensor, Tensor, Tensor> result;
  dispatch_storage(x, "group_norm", [&](auto stored, auto sum) {
    result = run<decltype(stored), decltype(sum)>(x, weight, bias, groups, eps, relu, up);
  });
  return result;
}

}  // namespace
}  // namespace segkern

STABLE_TORCH_LIBRARY_IMPL(segkern, CPU, m) {
  m.impl("group_norm", TORCH_BOX(&segkern::group_norm));
}
