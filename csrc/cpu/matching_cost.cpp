// matching_cost on the CPU. An image's features are laid out channel-last once; then a task is one
// prediction and a range of its points: gather features and targets at the points, two BLAS
// products, row sums. Partial sums of the tasks are added in a fixed order, so that the result
// does not depend on the number of threads.
// Letters: B image, R prediction, Q query, K class, C channel, h w feature map, T target, H W
// mask, P point, n targets of an image that count. What does not count of a prediction's points
// lies behind those that do.
#include <algorithm>
#include <cmath>
#include <optional>

#include "bilinear.h"
#include "simd_math.h"

namespace segkern {
namespace {

constexpr int64_t kBlock = 1024;  // points whose features, logits and targets stay in cache
constexpr int64_t kRange = 4096;  // points of a task, at most
constexpr double kBound = 1e8;    // stands for a cost that is not finite

// out[p] = bilinear sample of the channel-last map at point p, all channels
template <class T>
SEGKERN_CLONES void gather_rows(const T* map /*[h*w, C]*/, const int32_t* offset /*[4, n]*/,
                                const T* weight /*[4, n]*/, int64_t n, int64_t C,
                                T* out /*[n, C]*/) {
  for (int64_t p = 0; p < n; ++p) {
    const T a = weight[p], b = weight[n + p], c = weight[2 * n + p], d = weight[3 * n + p];
    T* o = out + p * C;
    if (a != T(0) && b != T(0) && c != T(0) && d != T(0)) {
      const T *fa = map + offset[p] * C, *fb = map + offset[n + p] * C;
      const T *fc = map + offset[2 * n + p] * C, *fd = map + offset[3 * n + p] * C;
#pragma omp simd
      for (int64_t i = 0; i < C; ++i) o[i] = a * fa[i] + b * fb[i] + c * fc[i] + d * fd[i];
      continue;
    }
    for (int64_t i = 0; i < C; ++i) o[i] = T(0);
    for (int k = 0; k < 4; ++k) {  // a corner of weight 0 is not read: it may hold NaN
      const T w = weight[k * n + p];
      if (w == T(0)) continue;
      const T* f = map + offset[k * n + p] * C;
#pragma omp simd
      for (int64_t i = 0; i < C; ++i) o[i] += w * f[i];
    }
  }
}

// s = sigmoid(x) of one query; adds sum softplus(x) and sum s. softplus is max(x, 0) +
// log(1 + exp(-|x|)); the logarithms are taken of products of 64 factors in (1, 2].
template <class T>
SEGKERN_CLONES void sigmoid_row(const T* x /*[n]*/, int64_t n, T* s /*[n]*/, double* softplus,
                                double* sigmoid) {
  constexpr int64_t lanes = 16, chunk = 64 * lanes;
  T positive[lanes] = {}, sum[lanes] = {}, logs = T(0);
  for (int64_t first = 0; first < n; first += chunk) {
    const int64_t last = first + chunk < n ? first + chunk : n;
    T product[lanes];
    for (int64_t l = 0; l < lanes; ++l) product[l] = T(1);
    int64_t p = first;
    for (; p + lanes <= last; p += lanes) {
#pragma omp simd
      for (int64_t l = 0; l < lanes; ++l) {
        const T v = x[p + l], e = simd_exp(v < T(0) ? v : -v), r = T(1) / (T(1) + e);
        const T y = v < T(0) ? e * r : r;
        s[p + l] = y;
        sum[l] += y;
        positive[l] += v > T(0) ? v : T(0);
        product[l] *= T(1) + e;
      }
    }
    for (int64_t l = 0; p < last; ++p, ++l) {
      const T v = x[p], e = simd_exp(v < T(0) ? v : -v), r = T(1) / (T(1) + e);
      s[p] = v < T(0) ? e * r : r;
      sum[l] += s[p];
      positive[l] += v > T(0) ? v : T(0);
      product[l] *= T(1) + e;
    }
    for (int64_t l = 0; l < lanes; ++l) logs += simd_log(product[l]);
  }
  *softplus += logs;
  for (int64_t l = 0; l < lanes; ++l) {
    *softplus += positive[l];
    *sigmoid += sum[l];
  }
}

template <class T>
SEGKERN_CLONES double total(const T* x, int64_t n) {
  T sum = T(0);
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i];
  return sum;
}

template <class T>
SEGKERN_CLONES void add(const T* x, int64_t n, double* sum) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) sum[i] += x[i];
}

// cost[q, t] = -weight * softmax(logits[q])[labels[t]]
template <class T>
SEGKERN_CLONES void class_cost(const T* logits /*[Q, K+1]*/, const int64_t* labels /*[n]*/,
                               double weight, int64_t Q, int64_t K1, int64_t n, int64_t line,
                               T* cost /*[Q, line]*/) {
  for (int64_t q = 0; q < Q; ++q) {
    const T* x = logits + q * K1;
    T top = -std::numeric_limits<T>::infinity(), sum = T(0);
#pragma omp simd reduction(max : top)
    for (int64_t k = 0; k < K1; ++k) top = x[k] > top ? x[k] : top;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < K1; ++k) sum += simd_exp(x[k] - top);
    for (int64_t t = 0; t < n; ++t) {
      int64_t label = labels[t] < 0 ? 0 : labels[t];
      label = label < K1 ? label : K1 - 1;
      cost[q * line + t] = static_cast<T>(-weight) * simd_exp(x[label] - top) / sum;
    }
  }
}

// The points by rows of the map, so that the corners of the next point are in cache; sums over
// points do not mind the order.
template <class T>
void sort_by_row(const T* points /*[n, 2]*/, int64_t n, int64_t h, T* sorted /*[n, 2]*/) {
  const auto row = [&](int64_t p) {
    const T y = points[2 * p + 1] * T(h);
    return y >= T(0) && y < T(h) ? static_cast<int64_t>(y) : 0;  // NaN to row 0 too
  };
  std::vector<int64_t> place(h + 1, 0);
  for (int64_t p = 0; p < n; ++p) ++place[row(p) + 1];
  for (int64_t y = 0; y < h; ++y) place[y + 1] += place[y];
  for (int64_t p = 0; p < n; ++p) {
    const int64_t to = place[row(p)]++;
    sorted[2 * to] = points[2 * p];
    sorted[2 * to + 1] = points[2 * p + 1];
  }
}

// The sums over points from which the costs are made.
struct Sums {
  Sums(int64_t Q, int64_t n) : Q(Q), n(n), values(2 * Q * n + 2 * Q + n, 0.0) {}
  double* logit_target() { return values.data(); }                // [Q, n] sum x t
  double* sigmoid_target() { return values.data() + Q * n; }      // [Q, n] sum s t
  double* softplus() { return values.data() + 2 * Q * n; }        // [Q]
  double* sigmoid() { return values.data() + 2 * Q * n + Q; }     // [Q]
  double* target() { return values.data() + 2 * Q * n + 2 * Q; }  // [n]
  int64_t Q, n;
  std::vector<double> values;
};

struct Image {
  Tensor features;  // [h*w, C] dense
  int64_t h, w;
  const uint8_t* masks;  // [n, H, W]
  int64_t H, W, n;
};

// Adds one prediction's sums over `count` points.
template <class T>
void add_range(const Image& image, const Tensor& embed /*[Q, C]*/, const T* points /*[count,2]*/,
               int64_t count, Sums& sums) {
  const int64_t Q = sums.Q, n = sums.n, C = embed.size(1);
  const Scratch<T> sorted(2 * count);
  sort_by_row(points, count, image.h, sorted.get());
  Tensor sample_block = empty<T>(embed, {kBlock, C});
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t size = std::min(kBlock, count - first);
    const T* here = sorted.get() + 2 * first;
    const Corners<T> corners(size);
    find_corners(here, image.h, image.w, corners);
    const Tensor samples = torch::stable::narrow(sample_block, 0, 0, size);
    gather_rows(data<T>(image.features), corners.offset.get(), corners.weight.get(), size, C,
                mutable_data<T>(samples));
    const Tensor logits = torch::stable::matmul(embed, torch::stable::transpose(samples, 0, 1));
    const Tensor sigmoid = empty<T>(embed, {Q, size});
    for (int64_t q = 0; q < Q; ++q)
      sigmoid_row(data<T>(logits) + q * size, size, mutable_data<T>(sigmoid) + q * size,
                  sums.softplus() + q, sums.sigmoid() + q);
    find_corners(here, image.H, image.W, corners);
    const Tensor targets = empty<T>(embed, {n, size});
    for (int64_t t = 0; t < n; ++t) {
      T* row = mutable_data<T>(targets) + t * size;
      gather(image.masks + t * image.H * image.W, corners.offset.get(), corners.weight.get(), size,
             row);
      sums.target()[t] += total(row, size);
    }
    const Tensor columns = torch::stable::transpose(targets, 0, 1);
    add(data<T>(torch::stable::matmul(logits, columns)), Q * n, sums.logit_target());
    add(data<T>(torch::stable::matmul(sigmoid, columns)), Q * n, sums.sigmoid_target());
  }
}

template <class T>
Tensor matching_cost_of(const Tensor& class_logits, const Tensor& mask_embed,
                        const Tensor& features, const Tensor& labels, const Tensor& masks,
                        const Tensor& points, const std::optional<Tensor>& n_targets,
                        double class_weight, double mask_weight, double dice_weight,
                        const std::optional<Tensor>& n_points) {
  const Tensor logits = dense<T>(class_logits), embed = dense<T>(mask_embed);
  const Tensor label = dense<int64_t>(labels), pts = dense<T>(points);
  const Tensor mask = torch::stable::contiguous(masks);
  const Tensor counts = n_targets ? dense<int64_t>(*n_targets) : Tensor();
  const Tensor numbers = n_points ? dense<int64_t>(*n_points) : Tensor();
  const int64_t B = embed.size(0), R = embed.size(1), Q = embed.size(2), K1 = logits.size(3);
  const int64_t N = label.size(1), P = pts.size(2), H = mask.size(2), W = mask.size(3);
  Tensor out = zeros<T>(embed, {B, R, Q, N});
  if (out.numel() == 0) return out;
  const uint8_t* data_of_masks = static_cast<const uint8_t*>(mask.const_data_ptr());
  const int64_t ranges = (P + kRange - 1) / kRange;
  const int64_t range = ((P + ranges - 1) / ranges + 15) / 16 * 16;
  const auto points_of = [&](int64_t problem) {
    return n_points ? std::clamp<int64_t>(data<int64_t>(numbers)[problem], 0, P) : P;
  };
  for (int64_t b = 0; b < B; ++b) {
    const int64_t n = n_targets ? std::clamp<int64_t>(data<int64_t>(counts)[b], 0, N) : N;
    if (n == 0) continue;
    const Tensor map = torch::stable::flatten(torch::stable::select(features, 0, b), 1, 2);
    const Image image{dense<T>(torch::stable::transpose(map, 0, 1)),
                      features.size(2),
                      features.size(3),
                      data_of_masks + b * N * H * W,
                      H,
                      W,
                      n};
    std::vector<Sums> sums(R * ranges, Sums(Q, n));
    parallel_for(0, R * ranges, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t r = task / ranges, number = points_of(b * R + r);
        const int64_t first = std::min(number, task % ranges * range);
        const Tensor e = torch::stable::select(torch::stable::select(embed, 0, b), 0, r);
        add_range(image, e, data<T>(pts) + ((b * R + r) * P + first) * 2,
                  std::min(range, number - first), sums[task]);
      }
    });
    for (int64_t r = 0; r < R; ++r) {
      T* cost = mutable_data<T>(out) + (b * R + r) * Q * N;
      class_cost(data<T>(logits) + (b * R + r) * Q * K1, data<int64_t>(label) + b * N,
                 class_weight, Q, K1, n, N, cost);
      const double number = static_cast<double>(std::max<int64_t>(points_of(b * R + r), 1));
      Sums& total = sums[r * ranges];
      for (int64_t k = 1; k < ranges; ++k)
        add(sums[r * ranges + k].values.data(), static_cast<int64_t>(total.values.size()),
            total.values.data());
      for (int64_t q = 0; q < Q; ++q) {
        for (int64_t t = 0; t < n; ++t) {
          const double xt = total.logit_target()[q * n + t];
          const double st = total.sigmoid_target()[q * n + t];
          const double bce = (total.softplus()[q] - xt) / number;
          const double area = total.sigmoid()[q] + total.target()[t];
          const double dice = 1.0 - (2.0 * st + 1.0) / (area + 1.0);
          const double sum = cost[q * N + t] + mask_weight * bce + dice_weight * dice;
          cost[q * N + t] =
              static_cast<T>(std::isfinite(sum) ? std::clamp(sum, -kBound, kBound) : kBound);
        }
      }
    }
  }
  return out;
}

Tensor matching_cost(Tensor class_logits, Tensor mask_embed, Tensor features, Tensor labels,
                     Tensor masks, Tensor points, std::optional<Tensor> n_targets,
                     double class_weight, double mask_weight, double dice_weight,
                     std::optional<Tensor> n_points) {
  STD_TORCH_CHECK(features.size(2) * features.size(3) <= INT32_MAX &&
                      masks.size(2) * masks.size(3) <= INT32_MAX,
                  "matching_cost: map too large");
  STD_TORCH_CHECK(!n_points || n_points->numel() == points.size(0) * points.size(1),
                  "matching_cost: wrong number of n_points");
  Tensor out;
  // the points come in the dtype of the sums
  dispatch_accumulate(points, "matching_cost", [&](auto zero) {
    out = matching_cost_of<decltype(zero)>(class_logits, mask_embed, features, labels, masks,
                                           points, n_targets, class_weight, mask_weight,
                                           dice_weight, n_points);
  });
  return out;
}

}  // namespace
}  // namespace segkern

STABLE_TORCH_LIBRARY_IMPL(segkern, CPU, m) {
  m.impl("matching_cost", TORCH_BOX(&segkern::matching_cost));
}
