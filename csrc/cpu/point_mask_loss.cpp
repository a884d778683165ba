// point_mask_loss on the CPU. A slot is one (image, prediction, target) with its own logit map;
// slots run in parallel. Letters: B image, R prediction, T target, h w logit map, H W mask, n
// candidates, k important points, P all points.
//
// forward:  draw the n candidates, sample |logit| at them, keep the k smallest, draw the P - k
// random ones,
//           sample the mask at all P, sum. Kept for backward: the k-th |logit|, how many of that
//           value count, sums.
// backward: draw and sample again, put each point's derivative on its four corners.
#include <algorithm>

#include "../philox.h"
#include "bilinear.h"
#include "simd_math.h"

namespace segkern {
namespace {

// What a slot leaves for its backward: threshold, ties that count, sum p t, sum p + sum t
constexpr int64_t kState = 4;

// The order of |x| as integers; NaN comes last
SEGKERN_INLINE uint32_t magnitude(float x) {
  return static_cast<uint32_t>(float_to_bits(x)) & 0x7FFFFFFFu;
}
SEGKERN_INLINE uint64_t magnitude(double x) {
  uint64_t i;
  std::memcpy(&i, &x, 8);
  return i & 0x7FFFFFFFFFFFFFFFull;
}

template <class T>
SEGKERN_CLONES void draw_points(uint64_t seed, uint32_t sample, uint32_t prediction,
                                uint32_t target, int64_t first, int64_t n, T* points /*[n, 2]*/) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Point p =
        random_point(seed, static_cast<uint32_t>(first + i), target, prediction, sample);
    points[2 * i] = static_cast<T>(p.x);
    points[2 * i + 1] = static_cast<T>(p.y);
  }
}

template <class T>
struct Sums {
  T bce, pt, p, t;
};

template <class T>
SEGKERN_CLONES Sums<T> sum_points(const T* x /*[P]*/, const T* t /*[P]*/, int64_t P) {
  Sums<T> total = {0, 0, 0, 0};
  for (int64_t begin = 0; begin < P; begin += 256) {  // short sums first: less rounding
    const int64_t end = begin + 256 < P ? begin + 256 : P;
    T bce = 0, pt = 0, sum_p = 0, sum_t = 0;
#pragma omp simd reduction(+ : bce, pt, sum_p, sum_t)
    for (int64_t i = begin; i < end; ++i) {
      const T e = simd_exp(x[i] < T(0) ? x[i] : -x[i]);  // exp(-|x|)
      const T s = T(1) / (T(1) + e);
      const T p = x[i] < T(0) ? e * s : s;
      bce += (x[i] > T(0) ? x[i] : T(0)) + simd_log1p(e) - x[i] * t[i];
      pt += p * t[i];
      sum_p += p;
      sum_t += t[i];
    }
    total.bce += bce, total.pt += pt, total.p += sum_p, total.t += sum_t;
  }
  return total;
}

// d loss / d logit at each point, over x: bce gives (p - t) / P, dice -(2 t (c + 1) - (2 a + 1)) /
// (c + 1)^2 p (1 - p), with a = sum p t and c = sum p + sum t
template <class T>
SEGKERN_CLONES void differentiate(T* x /*[P]*/, const T* t /*[P]*/, int64_t P, T grad_bce,
                                  T grad_dice, T a, T c) {
  const T scale = grad_dice / ((c + T(1)) * (c + T(1)));
#pragma omp simd
  for (int64_t i = 0; i < P; ++i) {
    const T p = simd_sigmoid(x[i]);
    const T dice = (T(2) * a + T(1)) - T(2) * t[i] * (c + T(1));
    x[i] = grad_bce * (p - t[i]) + scale * dice * p * (T(1) - p);
  }
}

struct Counts {
  int64_t candidates, important, random;
  int64_t points() const { return important + random; }
};

template <class T>
struct Slot {
  Slot(const Counts& n)
      : n(n),
        drawn(2 * n.candidates),
        points(2 * n.points()),
        on_all(n.candidates),
        all(n.candidates),
        on_map(n.points()),
        on_mask(n.points()),
        x(n.points()),
        t(n.points()) {}

  void draw(uint64_t seed, int64_t sample, int64_t prediction, int64_t target) {
    draw_points(seed, sample, prediction, target, 0, n.candidates, drawn.get());
    draw_points(seed, sample, prediction, target, n.candidates, n.random,
                points.get() + 2 * n.important);
  }

  void sample_candidates(const T* map, int64_t h, int64_t w) {
    find_corners(drawn.get(), h, w, on_all);
    gather(map, on_all.offset.get(), on_all.weight.get(), n.candidates, all.get());
  }

  // The k-th smallest |logit| of the candidates, and how many candidates of just that value belong
  // to the k
  std::pair<T, int64_t> threshold() const {
    if (n.important == 0) return {T(0), 0};
    using Key = decltype(magnitude(T{}));
    Scratch<Key> keys(n.candidates);
    for (int64_t i = 0; i < n.candidates; ++i) keys[i] = magnitude(all[i]);
    Key* kth = keys.get() + n.important - 1;
    std::nth_element(keys.get(), kth, keys.get() + n.candidates);
    const int64_t equal_below = std::count(keys.get(), kth + 1, *kth);
    T value;
    std::memcpy(&value, kth, sizeof(T));
    return {value, equal_below};
  }

  // Puts the important candidates, in the order in which they were drawn, before the random points
  void choose(T threshold, int64_t ties) {
    const auto limit = magnitude(threshold);
    int64_t at = 0;
    for (int64_t i = 0; i < n.candidates && at < n.important; ++i) {
      const auto key = magnitude(all[i]);
      if (!(key < limit || (key == limit && ties-- > 0))) continue;
      points[2 * at] = drawn[2 * i];
      points[2 * at + 1] = drawn[2 * i + 1];
      ++at;
    }
  }

  void sample(const T* map, int64_t h, int64_t w, const uint8_t* mask, int64_t H, int64_t W) {
    find_corners(points.get(), h, w, on_map);
    find_corners(points.get(), H, W, on_mask);
    gather(map, on_map.offset.get(), on_map.weight.get(), n.points(), x.get());
    gather(mask, on_mask.offset.get(), on_mask.weight.get(), n.points(), t.get());
  }

  Counts n;
  Scratch<T> drawn, points;  // [candidates, 2], [points, 2]
  Corners<T> on_all;
  Scratch<T> all;  // [candidates]
  Corners<T> on_map, on_mask;
  Scratch<T> x, t;  // [points]
};

// The arguments of both directions, dense
template <class T>
struct Problem {
  Problem(const Tensor& mask_logits, const Tensor& masks, const Tensor& active,
          const Tensor& sample_ids, const Tensor& seed)
      : logits(dense<T>(mask_logits)),
        masks(torch::stable::contiguous(masks)),
        active(torch::stable::contiguous(active)),
        ids(torch::stable::contiguous(sample_ids)),
        seed(static_cast<uint64_t>(*data<int64_t>(seed))),
        B(logits.size(0)),
        R(logits.size(1)),
        T_(logits.size(2)),
        h(logits.size(3)),
        w(logits.size(4)),
        H(masks.size(2)),
        W(masks.size(3)) {}

  // Calls f(slot index, image, prediction, target, logit map, mask) for the active slots
  template <class F>
  void each(const Counts& n, const F& f) const {
    parallel_for(0, B * R * T_, 1, [&](int64_t begin, int64_t end) {
      Slot<T> slot(n);
      for (int64_t i = begin; i < end; ++i) {
        if (!static_cast<const uint8_t*>(active.const_data_ptr())[i]) continue;
        const int64_t t = i % T_, r = i / T_ % R, b = i / T_ / R;
        slot.draw(seed, data<int64_t>(ids)[b], r, t);
        const T* map = data<T>(logits) + i * h * w;
        slot.sample_candidates(map, h, w);
        f(slot, i, map,
          static_cast<const uint8_t*>(masks.const_data_ptr()) + (b * T_ + t) * H * W);
      }
    });
  }

  Tensor logits, masks, active, ids;
  uint64_t seed;
  int64_t B, R, T_, h, w, H, W;
};

template <class T>
std::tuple<Tensor, Tensor, Tensor> forward(const Problem<T>& p, const Counts& n) {
  Tensor bce = zeros<T>(p.logits, {p.B, p.R, p.T_}), dice = zeros<T>(p.logits, {p.B, p.R, p.T_});
  Tensor state = zeros<T>(p.logits, {p.B, p.R, p.T_, kState});
  p.each(n, [&](Slot<T>& slot, int64_t i, const T* map, const uint8_t* mask) {
    const auto [threshold, ties] = slot.threshold();
    slot.choose(threshold, ties);
    slot.sample(map, p.h, p.w, mask, p.H, p.W);
    const Sums<T> s = sum_points(slot.x.get(), slot.t.get(), n.points());
    mutable_data<T>(bce)[i] = s.bce / T(n.points());
    mutable_data<T>(dice)[i] = T(1) - (T(2) * s.pt + T(1)) / (s.p + s.t + T(1));
    T* keep = mutable_data<T>(state) + i * kState;
    keep[0] = threshold, keep[1] = T(ties), keep[2] = s.pt, keep[3] = s.p + s.t;
  });
  return {bce, dice, state};
}

template <class T>
Tensor backward(const Problem<T>& p, const Counts& n, const Tensor& grad_bce,
                const Tensor& grad_dice, const Tensor& state) {
  const Tensor gb = dense<T>(grad_bce), gd = dense<T>(grad_dice), kept = dense<T>(state);
  Tensor out = zeros<T>(p.logits, {p.B, p.R, p.T_, p.h, p.w});
  p.each(n, [&](Slot<T>& slot, int64_t i, const T* map, const uint8_t* mask) {
    const T* keep = data<T>(kept) + i * kState;
    slot.choose(keep[0], static_cast<int64_t>(keep[1]));
    slot.sample(map, p.h, p.w, mask, p.H, p.W);
    differentiate(slot.x.get(), slot.t.get(), n.points(), data<T>(gb)[i] / T(n.points()),
                  data<T>(gd)[i], keep[2], keep[3]);
    scatter(slot.x.get(), slot.on_map, mutable_data<T>(out) + i * p.h * p.w);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> point_mask_loss(Tensor mask_logits, Tensor masks, Tensor active,
                                                   Tensor sample_ids, Tensor seed,
                                                   int64_t candidates, int64_t important,
                                                   int64_t random) {
  std::tuple<Tensor, Tensor, Tensor> out;
  dispatch_accumulate(mask_logits, "point_mask_loss", [&](auto zero) {
    const Problem<decltype(zero)> p(mask_logits, masks, active, sample_ids, seed);
    out = forward(p, {candidates, important, random});
  });
  return out;
}

Tensor point_mask_loss_backward(Tensor grad_bce, Tensor grad_dice, Tensor state,
                                Tensor mask_logits, Tensor masks, Tensor active, Tensor sample_ids,
                                Tensor seed, int64_t candidates, int64_t important,
                                int64_t random) {
  Tensor out;
  dispatch_accumulate(mask_logits, "point_mask_loss_backward", [&](auto zero) {
    const Problem<decltype(zero)> p(mask_logits, masks, active, sample_ids, seed);
    out = cast_to(backward(p, {candidates, important, random}, grad_bce, grad_dice, state),
                  mask_logits.scalar_type());
  });
  return out;
}

}  // namespace
}  // namespace segkern

STABLE_TORCH_LIBRARY_IMPL(segkern, CPU, m) {
  m.impl("point_mask_loss", TORCH_BOX(&segkern::point_mask_loss));
  m.impl("point_mask_loss_backward", TORCH_BOX(&segkern::point_mask_loss_backward));
}
