// segment_map_semantic on the CPU. In each block the bounds of the mask logits bound every
// class's score: classes that cannot win are left out, and so are queries that cannot decide
// between the rest, until a pixel turns out to be closer than what they could add.
// Letters: B image, Q query, K class, h w mask logits, H W result, n classes in question.
#include <mutex>

#include "resample.h"

namespace segkern {
namespace {

constexpr double kIgnored = 1.0 / 512;  // of a score: what queries left out at first may add

// What a query adds at most: most = sigmoid(high); and the bounds of every class's score.
template <class T>
SEGKERN_CLONES void bound_scores(const T* weights /*[Q, K]*/, const T* low, const T* high,
                                 int64_t Q, int64_t K, T* most, T* least_score, T* most_score) {
  for (int64_t k = 0; k < K; ++k) least_score[k] = most_score[k] = T(0);
  for (int64_t q = 0; q < Q; ++q) {
    const T a = simd_sigmoid(low[q]), b = simd_sigmoid(high[q]);
    const T* w = weights + q * K;
    most[q] = b;
#pragma omp simd
    for (int64_t k = 0; k < K; ++k) {
      least_score[k] += a * w[k];
      most_score[k] += b * w[k];
    }
  }
}

// sigmoid of the logits of n queries in one row of a group
template <class T>
SEGKERN_CLONES void sigmoid_rows(const T* wide /*[n, S, lanes]*/, int64_t S, const Row<T>& row,
                                 int64_t n, T* out /*[n, lanes]*/) {
  constexpr int64_t G = kLanes<T>;
  for (int64_t i = 0; i < n; ++i) {
    T* x = out + i * G;
    blend(wide + i * S * G, row, x);
#pragma omp simd
    for (int64_t j = 0; j < G; ++j) x[j] = simd_sigmoid(x[j]);
  }
}

// The first of the highest scores of each pixel; returns the least distance to the second.
template <class T>
SEGKERN_CLONES T pick(const T* scores /*[n, lanes]*/, int64_t n, int64_t pixels,
                      int32_t* out /*[lanes]*/) {
  constexpr int64_t G = kLanes<T>;
  T top[G], second[G];
  int32_t at[G];
  for (int64_t j = 0; j < G; ++j) {
    top[j] = second[j] = T(-1);
    at[j] = 0;
  }
  for (int64_t i = 0; i < n; ++i) {
    const T* v = scores + i * G;
#pragma omp simd
    for (int64_t j = 0; j < G; ++j) {
      const T smaller = v[j] < top[j] ? v[j] : top[j];
      second[j] = second[j] > smaller ? second[j] : smaller;
      at[j] = v[j] > top[j] ? static_cast<int32_t>(i) : at[j];
      top[j] = v[j] > top[j] ? v[j] : top[j];
    }
  }
  T least = top[0] - second[0];
  for (int64_t j = 0; j < G; ++j) out[j] = at[j];
  for (int64_t j = 1; j < pixels; ++j)
    least = top[j] - second[j] < least ? top[j] - second[j] : least;
  return least;
}

// Between two rows of the scores of n classes
template <class T>
SEGKERN_CLONES void mix_rows(const T* above, const T* below, int64_t stride, T weight, int64_t n,
                             int64_t ld, T* out /*[n, ld]*/) {
  for (int64_t i = 0; i < n; ++i) {
#pragma omp simd
    for (int64_t j = 0; j < ld; ++j)
      out[i * ld + j] = above[i * stride + j] * (T(1) - weight) + below[i * stride + j] * weight;
  }
}

inline std::vector<Taps> taps_of(const std::vector<Pair>& pairs) {
  std::vector<Taps> taps(pairs.size());
  for (size_t i = 0; i < pairs.size(); ++i) {
    taps[i].add(pairs[i].a, 1.0 - pairs[i].weight);
    taps[i].add(pairs[i].b, pairs[i].weight);
  }
  return taps;
}

template <class T>
struct Semantic {
  Semantic(const Tensor& weights, const Maps<T>& maps, const Sizes& z, const Axis& y,
           const Axis& x, int32_t* map, T* scores)
      : maps(maps),
        two(y.two || x.two),
        blocks(y, x, two ? 32 : 16, two ? 128 : 64),
        columns(taps_of(x.pairs)),
        weights(dense<T>(weights)),
        Q(weights.size(1)),
        K(weights.size(2)),
        H(z.H),
        W(z.W),
        map(map),
        scores(scores),
        all(Q) {
    std::iota(all.begin(), all.end(), 0);
    for (int32_t k = 0; k < K; ++k) rows.push_back(k);
  }

  struct Thread {
    explicit Thread(const Semantic& s)
        : memory(s.maps, s.blocks, s.Q),
          most(s.Q),
          least_score(s.K),
          most_score(s.K),
          chosen(s.K * s.Q),
          sigmoids(s.Q * kLanes<T>),
          out(s.K * kLanes<T>),
          grid(s.two ? s.K * s.blocks.lines * s.blocks.groups * kLanes<T> : 0),
          mixed(s.two ? s.K * s.blocks.groups * kLanes<T> : 0),
          areas(s.K) {}
    Memory<T> memory;
    Scratch<T> most, least_score, most_score, chosen, sigmoids, out, grid, mixed;
    std::vector<int32_t> classes, order;
    std::vector<int64_t> areas;
  };

  // The classes that may win somewhere in the block; all where their scores are asked for.
  void find_classes(int64_t b, Thread& t) const {
    const T* w = data<T>(weights) + b * Q * K;
    bound_scores(w, t.memory.low.get(), t.memory.high.get(), Q, K, t.most.get(),
                 t.least_score.get(), t.most_score.get());
    const T least = *std::max_element(t.least_score.get(), t.least_score.get() + K);
    t.classes.clear();
    for (int64_t k = 0; k < K; ++k)
      if (scores || !(t.most_score[k] * (T(1) + rounding<T>(Q)) < least))
        t.classes.push_back(static_cast<int32_t>(k));
  }

  // Orders the queries so that those which can decide between the classes come first; returns
  // their number and, in `error`, by how much the others can change a difference of two scores.
  int64_t order_queries(int64_t b, Thread& t, T* error) const {
    const T* w = data<T>(weights) + b * Q * K;
    const T small = T(kIgnored) / T(Q);
    std::vector<int32_t> rest;
    t.order.clear();
    *error = T(0);
    for (int64_t q = 0; q < Q; ++q) {
      T low = w[q * K + t.classes[0]], high = low;
      for (const int32_t k : t.classes) {
        low = std::min(low, w[q * K + k]);
        high = std::max(high, w[q * K + k]);
      }
      const T change = t.most[q] * (high - low);
      if (!two && !scores && change < small) {
        rest.push_back(static_cast<int32_t>(q));
        *error += change;
      } else {
        t.order.push_back(static_cast<int32_t>(q));
      }
    }
    const int64_t first = static_cast<int64_t>(t.order.size());
    t.order.insert(t.order.end(), rest.begin(), rest.end());
    *error += rounding<T>(Q) * *std::max_element(t.most_score.get(), t.most_score.get() + K);
    for (size_t i = 0; i < t.classes.size(); ++i)
      for (int64_t j = 0; j < Q; ++j) t.chosen[i * Q + j] = w[t.order[j] * K + t.classes[i]];
    return first;
  }

  // Scores [n, lanes] of the classes in one row of a group, from queries [begin, end) on.
  void product(const Block& k, Thread& t, int64_t r, int64_t g, int64_t begin, int64_t end) const {
    sigmoid_rows(t.memory.rows_of(k, begin, g), k.rows.size, t.memory.row[r], end - begin,
                 t.sigmoids.get() + begin * kLanes<T>);
    tiles<T>().dot(t.chosen.get(), Q, rows.data(), static_cast<int64_t>(t.classes.size()),
                   t.sigmoids.get(), end, t.out.get());
  }

  // One row of a group: the classes' scores, and the labels picked from them.
  void write(Thread& t, int64_t b, int64_t r, int64_t c, int64_t pixels, const int32_t* at) const {
    int32_t* to = map + (b * H + r) * W + c;
    for (int64_t j = 0; j < pixels; ++j) {
      to[j] = t.classes[at[j]];
      ++t.areas[to[j]];
    }
    if (!scores) return;
    for (size_t i = 0; i < t.classes.size(); ++i)
      std::copy_n(t.out.get() + i * kLanes<T>, pixels,
                  scores + ((b * K + t.classes[i]) * H + r) * W + c);
  }

  void direct_block(int64_t b, const Block& k, Thread& t, int64_t first, T error) const {
    const int64_t n = static_cast<int64_t>(t.classes.size());
    int32_t at[kLanes<T>];
    for (int64_t r = k.rows.begin; r < k.rows.end; ++r) {
      for (int64_t c = k.columns.begin; c < k.columns.end; c += kLanes<T>) {
        const int64_t g = c / kLanes<T> - k.columns.first;
        const int64_t pixels = std::min(kLanes<T>, k.columns.end - c);
        product(k, t, r - k.rows.begin, g, 0, first);
        if (pick(t.out.get(), n, pixels, at) <= error && first < Q) {
          product(k, t, r - k.rows.begin, g, first, Q);
          pick(t.out.get(), n, pixels, at);
        }
        write(t, b, r, c, pixels, at);
      }
    }
  }

  // The scores at the image's size in the block's grid, and from them those of the output.
  void mixed_block(int64_t b, const Block& k, Thread& t) const {
    constexpr int64_t G = kLanes<T>;
    const int64_t n = static_cast<int64_t>(t.classes.size()), lines = k.rows.last - k.rows.first;
    const int64_t groups = k.columns.last - k.columns.first, ld = groups * G;
    for (int64_t r = 0; r < lines; ++r) {
      for (int64_t g = 0; g < groups; ++g) {
        product(k, t, r, g, 0, Q);
        for (int64_t i = 0; i < n; ++i)
          std::copy_n(t.out.get() + i * G, G, t.grid.get() + (i * lines + r) * ld + g * G);
      }
    }
    int32_t at[G];
    for (int64_t r = k.rows.begin; r < k.rows.end; ++r) {
      const Pair& p = blocks.y.pairs[r];
      mix_rows(t.grid.get() + (p.a - k.rows.first) * ld, t.grid.get() + (p.b - k.rows.first) * ld,
               lines * ld, static_cast<T>(p.weight), n, ld, t.mixed.get());
      for (int64_t c = k.columns.begin; c < k.columns.end; c += G) {
        const int64_t g = c / G, start = columns.first[g] - k.columns.first * G;
        const int64_t pixels = std::min(G, k.columns.end - c);
        tiles<T>().dot(t.mixed.get() + start, ld, rows.data(), n,
                       columns.weight.data() + columns.tile[g],
                       columns.last[g] - columns.first[g] + 1, t.out.get());
        pick(t.out.get(), n, pixels, at);
        write(t, b, r, c, pixels, at);
      }
    }
  }

  void block(int64_t b, const Block& k, Thread& t) const {
    t.memory.load(maps, b, k, all);
    find_classes(b, t);
    if (t.classes.size() == 1 && !scores) {
      const int64_t n = k.columns.end - k.columns.begin;
      for (int64_t r = k.rows.begin; r < k.rows.end; ++r)
        std::fill_n(map + (b * H + r) * W + k.columns.begin, n, t.classes[0]);
      t.areas[t.classes[0]] += (k.rows.end - k.rows.begin) * n;
      return;
    }
    T error;
    const int64_t first = order_queries(b, t, &error);
    t.memory.open(blocks, k, t.order);
    if (two) {
      mixed_block(b, k, t);
    } else {
      direct_block(b, k, t, first, error);
    }
  }

  void run(int64_t b, int64_t* areas /*[K]*/) const {
    std::mutex lock;
    const auto make = [&] { return Thread(*this); };
    const auto band = [&](int64_t task, Thread& t) {
      std::fill(t.areas.begin(), t.areas.end(), 0);
      for (const Span& columns : blocks.strips) block(b, {blocks.rows[task], columns}, t);
      const std::lock_guard<std::mutex> guard(lock);
      for (int64_t k = 0; k < K; ++k) areas[k] += t.areas[k];
    };
    run_tasks(static_cast<int64_t>(blocks.rows.size()), make, band);
  }

  const Maps<T>& maps;
  bool two;  // the scores are resized after the product
  Blocks<T> blocks;
  Columns<T> columns;  // of the output, in terms of the blocks'
  Tensor weights;      // [B, Q, K]
  int64_t Q, K, H, W;
  int32_t* map;  // [B, H, W]
  T* scores;     // [B, K, H, W], or none
  std::vector<int32_t> all, rows;
};

std::tuple<Tensor, Tensor, Tensor> segment_map_semantic(Tensor weights, Tensor masks,
                                                        std::optional<Tensor> features,
                                                        IntList sizes, bool resize_scores,
                                                        bool return_scores) {
  const Sizes z(sizes);
  const int64_t B = weights.size(0), K = weights.size(2);
  const Tensor map = empty<int32_t>(weights, {B, z.H, z.W});
  const Tensor areas = zeros<int64_t>(weights, {B, K});
  Tensor scores;
  dispatch_accumulate(weights, "segment_map_semantic", [&](auto zero) {
    using T = decltype(zero);
    scores = return_scores ? empty<T>(weights, {B, K, z.H, z.W}) : empty<T>(weights, {0});
    const Maps<T> maps(masks, features);
    const Axis y(maps.h(), z.padded_h, z.image_h, z.H, resize_scores);
    const Axis x(maps.w(), z.padded_w, z.image_w, z.W, resize_scores);
    const Semantic<T> semantic(weights, maps, z, y, x, mutable_data<int32_t>(map),
                               return_scores ? mutable_data<T>(scores) : nullptr);
    for (int64_t b = 0; b < B; ++b) semantic.run(b, mutable_data<int64_t>(areas) + b * K);
  });
  return {map, areas, scores};
}

}  // namespace
}  // namespace segkern

STABLE_TORCH_LIBRARY_IMPL(segkern, CPU, m) {
  m.impl("segment_map_semantic", TORCH_BOX(&segkern::segment_map_semantic));
}
