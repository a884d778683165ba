// point_mask_loss on the CPU. A slot is one (image, prediction, target) with its own logit map;
// slots run in parallel, their points in blocks that stay in the first cache. Letters: B image,
// R prediction, T target, h w logit map, H W mask, n candidates, k important, P all points. Points
// in a cell of the mask that has a void pixel do not count: last of the candidates, then left out.
//
// forward:  draw the n candidates, sample |logit| at them, mark the k smallest, draw these and the
//           P - k random ones, sample logits and mask, sum. Kept: marks, two sums, a number.
// backward: draw and sample the P points again, put each point's derivative on its four corners.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <bit>
#include <optional>

#include "../philox.h"
#include "bilinear.h"
#include "simd_math.h"

namespace segkern {
namespace {

using c10::BFloat16;
using c10::Half;

constexpr int64_t kBlock = 512;  // points drawn and sampled at a time
constexpr int64_t kBins = 2048;  // of the histogram of |logit|: exponent, and 3 bits of a float
constexpr int64_t kSums = 3;     // kept for backward: sum p t, sum p + sum t, points that count

template <class T>
using Key = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

struct Stream {  // the points of a slot
  uint64_t seed;
  uint32_t target, prediction, sample;
};

// Which cells of a mask have a void pixel, a bit each; null where none has
struct Cells {
  const uint32_t* bits;  // [H + 1, ceil((W + 1) / 32)]; cell (y, x) is bit x + 1 of row y + 1
  int64_t H, W;

  template <class T>
  SEGKERN_INLINE uint32_t is_void(T px, T py) const {  // 0 or 1, of a point in [0, 1)
    const int32_t x = static_cast<int32_t>(std::floor(px * static_cast<T>(W) - T(0.5))) + 1;
    const int32_t y = static_cast<int32_t>(std::floor(py * static_cast<T>(H) - T(0.5))) + 1;
    const int32_t words = static_cast<int32_t>((W + 32) / 32);
    return bits[y * words + x / 32] >> x % 32 & 1;
  }
};

struct Counts {
  int64_t candidates, important, random;
  int64_t points() const { return important + random; }
  int64_t words() const { return (candidates + 31) / 32; }
};

template <class T>
SEGKERN_CLONES void draw_points(const Stream& stream, const uint32_t* index /*[n]*/, int64_t n,
                                T* points /*[n, 2]*/) {
  const Stream s = stream;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Point p = random_point(s.seed, index[i], s.target, s.prediction, s.sample);
    points[2 * i] = static_cast<T>(p.x);
    points[2 * i + 1] = static_cast<T>(p.y);
  }
}

// The points that count, moved to the front; gives their number
template <class T>
SEGKERN_CLONES int64_t keep_counted(const Cells& cells, T* points /*[n, 2]*/, int64_t n) {
  if (cells.bits == nullptr) return n;
  int64_t kept = 0;
  for (int64_t i = 0; i < n; ++i) {
    const T x = points[2 * i], y = points[2 * i + 1];
    points[2 * kept] = x;
    points[2 * kept + 1] = y;
    kept += 1 - cells.is_void(x, y);
  }
  return kept;
}

// Keys of points that do not count come after NaN
template <class T>
SEGKERN_CLONES void put_last(const Cells& cells, const T* points /*[n, 2]*/, int64_t n,
                             Key<T>* keys /*[n]*/) {
  if (cells.bits == nullptr) return;
  const Cells c = cells;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i)
    keys[i] = c.is_void(points[2 * i], points[2 * i + 1]) ? ~Key<T>(0) >> 1 : keys[i];
}

// The order of |x| as integers; NaN comes last
template <class T>
SEGKERN_CLONES void magnitudes(const T* x /*[n]*/, int64_t n, Key<T>* keys /*[n]*/) {
  for (int64_t i = 0; i < n; ++i) keys[i] = std::bit_cast<Key<T>>(x[i]) & (~Key<T>(0) >> 1);
}

// Bit j of word w: is key 32 w + j less than `low`; is it in [low, low + width)
template <class K>
SEGKERN_CLONES void compare(const K* keys /*[words, 32]*/, int64_t words, K low, K width,
                            uint32_t* below /*[words]*/, uint32_t* inside /*[words]*/) {
  for (int64_t w = 0; w < words; ++w) {
    uint32_t a = 0, b = 0;
#pragma omp simd reduction(| : a, b)
    for (int j = 0; j < 32; ++j) {
      const K key = keys[32 * w + j];
      a |= static_cast<uint32_t>(key < low) << j;
      b |= static_cast<uint32_t>(static_cast<K>(key - low) < width) << j;
    }
    below[w] = a;
    inside[w] = b;
  }
}

template <class S, class T>
SEGKERN_CLONES void convert(const S* from /*[n]*/, int64_t n, T* to /*[n]*/) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(from[i]);
}

template <class T>
struct Sums {
  T bce = 0, pt = 0, p = 0, t = 0;
};

template <class T>
SEGKERN_CLONES void add_points(const T* x /*[n]*/, const T* t /*[n]*/, int64_t n, Sums<T>& total) {
  T bce = 0, pt = 0, sum_p = 0, sum_t = 0;  // of this block first: less rounding
#pragma omp simd reduction(+ : bce, pt, sum_p, sum_t)
  for (int64_t i = 0; i < n; ++i) {
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

// d loss / d logit at each point, over x. bce gives (p - t) / n; dice, with a = sum p t and
// c = sum p + sum t, gives ((2 a + 1) - 2 t (c + 1)) / (c + 1)^2 p (1 - p)
template <class T>
SEGKERN_CLONES void differentiate(T* x /*[n]*/, const T* t /*[n]*/, int64_t n, T grad_bce,
                                  T grad_dice, T a, T c) {
  const T scale = grad_dice / ((c + T(1)) * (c + T(1)));
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T p = simd_sigmoid(x[i]);
    const T dice = (T(2) * a + T(1)) - T(2) * t[i] * (c + T(1));
    x[i] = grad_bce * (p - t[i]) + scale * dice * p * (T(1) - p);
  }
}

// Working memory of one thread, and the steps of a slot
template <class T>
struct Worker {
  explicit Worker(const Counts& n)
      : n(n),
        index(std::max(n.points(), kBlock)),
        keys(32 * n.words()),
        border(n.candidates),
        inside(n.words()),
        bins(kBins),
        points(2 * kBlock),
        on_map(kBlock),
        on_mask(kBlock),
        x(kBlock),
        t(kBlock) {}

  // Sets the bits of the k candidates with the smallest |logit|; of equal ones the first drawn
  void mark(const Stream& stream, const Cells& cells, const T* map, int64_t h, int64_t w,
            uint32_t* marks) {
    std::fill(keys.get(), keys.get() + 32 * n.words(), ~Key<T>(0));  // behind n: never marked
    for (int64_t begin = 0; begin < n.candidates; begin += kBlock) {
      const int64_t m = std::min(kBlock, n.candidates - begin);
      for (int64_t i = 0; i < m; ++i) index[i] = static_cast<uint32_t>(begin + i);
      draw_points(stream, index.get(), m, points.get());
      on_map.n = m;
      find_corners(points.get(), h, w, on_map);
      gather(map, on_map.offset.get(), on_map.weight.get(), m, x.get());
      magnitudes(x.get(), m, keys.get() + begin);
      put_last(cells, points.get(), m, keys.get() + begin);
    }
    // the bin that holds the k-th key splits the rest; only its own keys must be ordered
    constexpr int shift = 8 * sizeof(T) - 12;
    std::fill(bins.get(), bins.get() + kBins, 0);
    for (int64_t i = 0; i < n.candidates; ++i) ++bins[keys[i] >> shift];
    int64_t left = n.important, bin = 0;
    while (left > bins[bin]) left -= bins[bin++];
    const Key<T> width = Key<T>(1) << shift;
    compare(keys.get(), n.words(), static_cast<Key<T>>(bin * width), width, marks, inside.get());
    uint32_t* end = border.get();
    for (int64_t w = 0; w < n.words(); ++w)
      for (uint32_t m = inside[w]; m; m &= m - 1) *end++ = 32 * w + std::countr_zero(m);
    std::nth_element(border.get(), border.get() + left, end, [&](uint32_t i, uint32_t j) {
      return keys[i] < keys[j] || (keys[i] == keys[j] && i < j);
    });
    for (int64_t i = 0; i < left; ++i) marks[border[i] / 32] |= 1u << border[i] % 32;
  }

  // Samples logits and mask at the marked candidates, then at the random points, and calls
  // f(points in the block) for each block; the values are in x and t, the corners in on_map. Only
  // points that count; gives their number.
  template <class F>
  int64_t each_block(const Stream& stream, const Cells& cells, const uint32_t* marks, const T* map,
                     int64_t h, int64_t w, const uint8_t* mask, const F& f) {
    int64_t counted = 0;
    int64_t at = 0;
    for (int64_t w = 0; w < n.words(); ++w)
      for (uint32_t m = marks[w]; m && at < n.important; m &= m - 1)
        index[at++] = 32 * w + std::countr_zero(m);
    for (int64_t i = 0; i < n.random; ++i) index[n.important + i] = n.candidates + i;
    for (int64_t begin = 0; begin < n.points(); begin += kBlock) {
      const int64_t drawn = std::min(kBlock, n.points() - begin);
      draw_points(stream, index.get() + begin, drawn, points.get());
      const int64_t m = keep_counted(cells, points.get(), drawn);
      counted += m;
      on_map.n = on_mask.n = m;
      find_corners(points.get(), h, w, on_map);
      find_corners(points.get(), cells.H, cells.W, on_mask);
      gather(map, on_map.offset.get(), on_map.weight.get(), m, x.get());
      gather(mask, on_mask.offset.get(), on_mask.weight.get(), m, t.get());
      f(m);
    }
    return counted;
  }

  Counts n;
  Scratch<uint32_t> index;           // [P] (at least a block): counters of the points
  Scratch<Key<T>> keys;              // [words, 32]
  Scratch<uint32_t> border, inside;  // [n], [words]
  Scratch<int32_t> bins;             // [kBins]
  Scratch<T> points;                 // [kBlock, 2]
  Corners<T> on_map, on_mask;        // [kBlock]
  Scratch<T> x, t;                   // [kBlock]
};

// The arguments of both directions. S stores the logits, T computes.
template <class S, class T>
struct Problem {
  Problem(const Tensor& mask_logits, const Tensor& masks, const Tensor& active,
          const Tensor& sample_ids, const Tensor& seed, const Counts& n,
          const std::optional<Tensor>& cells)
      : logits(torch::stable::contiguous(mask_logits)),
        masks(torch::stable::contiguous(masks)),
        active(torch::stable::contiguous(active)),
        ids(torch::stable::contiguous(sample_ids)),
        cells(cells ? torch::stable::contiguous(*cells) : Tensor()),
        voids(cells.has_value()),
        seed(static_cast<uint64_t>(*data<int64_t>(seed))),
        n(n),
        B(logits.size(0)),
        R(logits.size(1)),
        slots(logits.size(2)),
        h(logits.size(3)),
        w(logits.size(4)),
        H(masks.size(2)),
        W(masks.size(3)) {}

  bool is_active(int64_t i) const { return data<uint8_t>(active)[i] != 0; }

  Cells cells_of(int64_t b) const {
    if (!voids) return {nullptr, H, W};
    const int64_t each = (H + 1) * ((W + 32) / 32);
    const uint32_t* bits = data<uint32_t>(cells) + b * each;
    const bool some = std::any_of(bits, bits + each, [](uint32_t word) { return word != 0; });
    return {some ? bits : nullptr, H, W};
  }

  // Calls f(slot index, worker, stream, cells, logit map, mask) for the active slots, in parallel
  template <class F>
  void each_slot(const F& f) const {
    parallel_for(0, B * R * slots, 1, [&](int64_t begin, int64_t end) {
      Worker<T> worker(n);
      Scratch<T> converted(std::is_same_v<S, T> ? 0 : h * w);
      for (int64_t i = begin; i < end; ++i) {
        if (!is_active(i)) continue;
        const int64_t t = i % slots, r = i / slots % R, b = i / slots / R;
        const Stream stream = {seed, static_cast<uint32_t>(t), static_cast<uint32_t>(r),
                               static_cast<uint32_t>(data<int64_t>(ids)[b])};
        const S* stored = data<S>(logits) + i * h * w;
        const T* map = converted.get();
        if constexpr (std::is_same_v<S, T>)
          map = stored;
        else
          convert(stored, h * w, converted.get());
        f(i, worker, stream, cells_of(b), map, data<uint8_t>(masks) + (b * slots + t) * H * W);
      }
    });
  }

  Tensor logits, masks, active, ids, cells;
  bool voids;
  uint64_t seed;
  Counts n;
  int64_t B, R, slots, h, w, H, W;
};

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class S, class T>
Results forward(const Problem<S, T>& p) {
  const IntList shape = {p.B, p.R, p.slots};
  Tensor bce = zeros<T>(p.logits, shape), dice = zeros<T>(p.logits, shape);
  Tensor sums = zeros<T>(p.logits, {p.B, p.R, p.slots, kSums});
  Tensor marks = zeros<int32_t>(p.logits, {p.B, p.R, p.slots, p.n.words()});
  p.each_slot([&](int64_t i, Worker<T>& worker, const Stream& stream, const Cells& cells,
                  const T* map, const uint8_t* mask) {
    uint32_t* bits = mutable_data<uint32_t>(marks) + i * p.n.words();
    worker.mark(stream, cells, map, p.h, p.w, bits);
    Sums<T> s;
    const auto add = [&](int64_t m) { add_points(worker.x.get(), worker.t.get(), m, s); };
    const int64_t counted = worker.each_block(stream, cells, bits, map, p.h, p.w, mask, add);
    const T number = T(std::max<int64_t>(counted, 1));
    mutable_data<T>(bce)[i] = s.bce / number;
    mutable_data<T>(dice)[i] = T(1) - (T(2) * s.pt + T(1)) / (s.p + s.t + T(1));
    mutable_data<T>(sums)[i * kSums] = s.pt;
    mutable_data<T>(sums)[i * kSums + 1] = s.p + s.t;
    mutable_data<T>(sums)[i * kSums + 2] = number;
  });
  return {bce, dice, sums, marks, zeros<int32_t>(p.logits, {0})};  // masks are read as they are
}

template <class S, class T>
Tensor backward(const Problem<S, T>& p, const Tensor& grad_bce, const Tensor& grad_dice,
                const Tensor& sums, const Tensor& marks) {
  const Tensor gb = dense<T>(grad_bce), gd = dense<T>(grad_dice), kept = dense<T>(sums);
  const Tensor chosen = torch::stable::contiguous(marks);
  const int64_t area = p.h * p.w;
  Tensor out = torch::stable::new_zeros(p.logits, {p.B, p.R, p.slots, p.h, p.w});
  p.each_slot([&](int64_t i, Worker<T>& worker, const Stream& stream, const Cells& cells,
                  const T* map, const uint8_t* mask) {
    const uint32_t* bits = data<uint32_t>(chosen) + i * p.n.words();
    const T* sum = data<T>(kept) + i * kSums;
    S* stored = mutable_data<S>(out) + i * area;
    Scratch<T> wide(std::is_same_v<S, T> ? 0 : area);
    T* grad = wide.get();
    if constexpr (std::is_same_v<S, T>)
      grad = stored;
    else
      std::fill(grad, grad + area, T(0));
    worker.each_block(stream, cells, bits, map, p.h, p.w, mask, [&](int64_t m) {
      differentiate(worker.x.get(), worker.t.get(), m, data<T>(gb)[i] / sum[2], data<T>(gd)[i],
                    sum[0], sum[1]);
      scatter(worker.x.get(), worker.on_map, grad);
    });
    if constexpr (!std::is_same_v<S, T>) convert(grad, area, stored);
  });
  return out;
}

// What lies outside would be read or written outside the tensors
void check(const Tensor& logits, const Tensor& masks, const Tensor& active, const Tensor& ids,
           const Tensor& seed, const Counts& n, const std::optional<Tensor>& cells) {
  const char* op = "point_mask_loss: ";
  STD_TORCH_CHECK(logits.dim() == 5 && masks.dim() == 4 && active.dim() == 3 && ids.dim() == 1, op,
                  "wrong number of dimensions");
  const int64_t B = logits.size(0), R = logits.size(1), T = logits.size(2);
  STD_TORCH_CHECK(masks.size(0) == B && masks.size(1) == T && ids.size(0) == B, op, "wrong sizes");
  STD_TORCH_CHECK(active.numel() == B * R * T && seed.numel() == 1, op, "wrong sizes");
  STD_TORCH_CHECK(masks.element_size() == 1 && active.element_size() == 1, op, "wrong dtype");
  STD_TORCH_CHECK(ids.element_size() == 8 && seed.element_size() == 8, op, "wrong dtype");
  STD_TORCH_CHECK(logits.size(3) * logits.size(4) <= INT32_MAX, op, "logit map too large");
  STD_TORCH_CHECK(masks.size(2) * masks.size(3) <= INT32_MAX, op, "mask too large");
  STD_TORCH_CHECK(
      !cells || (cells->element_size() == 4 &&
                 cells->numel() == B * (masks.size(2) + 1) * ((masks.size(3) + 32) / 32)),
      op, "wrong cells");
  STD_TORCH_CHECK(!cells || cells->numel() <= INT32_MAX, op, "void too large");
  STD_TORCH_CHECK(0 <= n.important && n.important <= n.candidates && 0 <= n.random, op,
                  "more important points than candidates");
  STD_TORCH_CHECK(n.candidates + n.random <= UINT32_MAX, op, "too many points");
}

template <class F>
void dispatch_stored(const Tensor& logits, const F& f) {
  switch (logits.scalar_type()) {
    case ScalarType::Double:
      return f(double{}, double{});
    case ScalarType::Float:
      return f(float{}, float{});
    case ScalarType::Half:
      return f(Half{}, float{});
    case ScalarType::BFloat16:
      return f(BFloat16{}, float{});
    default:
      STD_TORCH_CHECK(false, "point_mask_loss: floating point logits expected");
  }
}

Results point_mask_loss(Tensor mask_logits, Tensor masks, Tensor active, Tensor sample_ids,
                        Tensor seed, int64_t candidates, int64_t important, int64_t random,
                        std::optional<Tensor> cells) {
  const Counts n = {candidates, important, random};
  check(mask_logits, masks, active, sample_ids, seed, n, cells);
  Results out;
  dispatch_stored(mask_logits, [&]<class S, class T>(S, T) {
    out = forward(Problem<S, T>(mask_logits, masks, active, sample_ids, seed, n, cells));
  });
  return out;
}

Tensor point_mask_loss_backward(Tensor grad_bce, Tensor grad_dice, Tensor sums, Tensor marks,
                                Tensor /*packed*/, Tensor mask_logits, Tensor masks, Tensor active,
                                Tensor sample_ids, Tensor seed, int64_t candidates,
                                int64_t important, int64_t random, std::optional<Tensor> cells) {
  const Counts n = {candidates, important, random};
  check(mask_logits, masks, active, sample_ids, seed, n, cells);
  const int64_t slots = active.numel();
  STD_TORCH_CHECK(grad_bce.numel() == slots && grad_dice.numel() == slots &&
                      sums.numel() == slots * kSums && marks.numel() == slots * n.words() &&
                      marks.element_size() == 4,
                  "point_mask_loss_backward: wrong sizes");
  Tensor out;
  dispatch_stored(mask_logits, [&]<class S, class T>(S, T) {
    const Problem<S, T> p(mask_logits, masks, active, sample_ids, seed, n, cells);
    out = backward(p, grad_bce, grad_dice, sums, marks);
  });
  return out;
}

}  // namespace
}  // namespace segkern

STABLE_TORCH_LIBRARY_IMPL(segkern, CPU, m) {
  m.impl("point_mask_loss", TORCH_BOX(&segkern::point_mask_loss));
  m.impl("point_mask_loss_backward", TORCH_BOX(&segkern::point_mask_loss_backward));
}
