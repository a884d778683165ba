// masked_attn on the CPU: for each head and each group of 16 keys (8 in double), only the queries
// that may attend to one of them are multiplied. Letters: B image, Q query, S key, H head, D
// channel a head; E is D rounded up to whole groups; a chunk is the keys of one task.
#include <algorithm>
#include <numeric>

#include "heads.h"
#include "simd_math.h"
#include "tile.h"

namespace segkern {
namespace {

constexpr int64_t kChunk =
    1024;  // keys a task; from the shape alone: sums never depend on threads

struct Sizes {
  int64_t B, Q, S, H, D, E, groups, chunks;
  int64_t tasks() const { return B * chunks * H; }
};

template <class T>
Sizes sizes_of(const Tensor& q, const Tensor& k) {
  constexpr int64_t G = kLanes<T>;
  const int64_t D = q.size(3), S = k.size(1);
  return {q.size(0),
          q.size(1),
          S,
          q.size(2),
          D,
          (D + G - 1) / G * G,
          (S + G - 1) / G,
          (S + kChunk - 1) / kChunk};
}

template <class S, class T>
SEGKERN_CLONES void store_rows(const T* x /*[rows, E]*/, int64_t rows, int64_t D, int64_t E,
                               S* out, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) out[r * stride + d] = static_cast<S>(x[r * E + d]);
  }
}

// A head of queries or gradients, [B, Q, H, D] to [B, H, Q, E]
template <class S, class T>
void copy_heads(const Heads<S>& x, const Sizes& n, T scale, T* out) {
  for (int64_t b = 0; b < n.B; ++b)
    for (int64_t h = 0; h < n.H; ++h)
      copy_lines<S, T>(x.at(b, 0, h), x.row, n.Q, n.D, scale, n.Q, n.E,
                       out + (b * n.H + h) * n.Q * n.E);
}

// Keys or values of one group, [lanes, E] in T: in place where they lie so, else a copy.
template <class T>
struct Group {
  const T* data;
  int64_t ld;
};
template <class S, class T>
Group<T> group_rows(const Heads<S>& x, const Sizes& n, int64_t b, int64_t g, int64_t h,
                    T* buffer) {
  constexpr int64_t G = kLanes<T>;
  const S* from = x.at(b, g * G, h);
  if constexpr (std::is_same_v<S, T>)
    if (n.D == n.E && (g + 1) * G <= n.S) return {from, x.row};
  copy_lines<S, T>(from, x.row, std::min(G, n.S - g * G), n.D, T(1), G, n.E, buffer);
  return {buffer, n.E};
}

// Rows of a head lie far apart; the hardware does not guess the next ones.
template <class S>
void prefetch_rows(const Heads<S>& x, const Sizes& n, int64_t b, int64_t s, int64_t h,
                   int64_t rows) {
  for (int64_t r = s; r < std::min(s + rows, n.S); ++r)
    for (int64_t d = 0; d < n.D; d += 64 / int64_t(sizeof(S)))
      __builtin_prefetch(x.at(b, r, h) + d);
}

// For each group of keys the queries that may attend to one of them; all heads share it.
template <class T>
struct Lists {
  static constexpr int64_t G = kLanes<T>;
  explicit Lists(const Sizes& n)
      : Q(n.Q), groups(n.groups), count(n.B * groups), row(n.B * groups * Q), open(row_count(n)) {}
  static int64_t row_count(const Sizes& n) { return n.B * n.groups * n.Q; }
  int64_t Q, groups;
  Scratch<int32_t> count;  // [B, groups]
  Scratch<int32_t> row;    // [B, groups, Q]
  Scratch<uint32_t> open;  // [B, groups, Q], bit j: key j of the group
};

template <class T>
Lists<T> make_lists(const Tensor& bits, const Tensor& open, const Sizes& n) {
  constexpr int64_t G = kLanes<T>;
  Lists<T> lists(n);
  const Tensor dense_bits = dense<int32_t>(bits), dense_open = dense<int32_t>(open);
  const int32_t *words = data<int32_t>(dense_bits), *counts = data<int32_t>(dense_open);
  const int64_t W = dense_bits.size(2);
  parallel_for(0, n.B * n.groups, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / n.groups, key = i % n.groups * G, left = n.S - key;
      const uint32_t all = left < G ? (1u << left) - 1 : (1u << G) - 1;
      int32_t *row = lists.row.get() + i * n.Q, found = 0;
      uint32_t* mask = lists.open.get() + i * n.Q;
      for (int64_t q = 0; q < n.Q; ++q) {
        const uint32_t word = words[(b * n.Q + q) * W + key / 32];
        const uint32_t m = counts[b * n.Q + q] == 0 ? all : word >> (key % 32) & all;
        row[found] = q;
        mask[found] = m;
        found += m != 0;
      }
      lists.count[i] = found;
    }
  });
  return lists;
}

// Online softmax of n rows of scores: x becomes exp(x - top). A row's top follows its maximum only
// when that is kSlack ahead, and then the sums so far are scaled: almost always once.
constexpr int kSlack = 8;

template <class T>
SEGKERN_CLONES void softmax_rows(const int32_t* row, const uint32_t* open, int64_t n,
                                 T* x /*[n, lanes]*/, T* top /*[Q]*/, T* sum /*[Q, lanes]*/,
                                 T* out /*[Q, E]*/, int64_t E) {
  constexpr int64_t G = kLanes<T>;
  constexpr T low = -std::numeric_limits<T>::infinity();
  for (int64_t i = 0; i < n; ++i) {
    const int64_t q = row[i];
    T most = low;
#pragma omp simd reduction(max : most)
    for (int64_t j = 0; j < G; ++j) {
      const T score = open[i] >> j & 1 ? x[i * G + j] : low;
      most = score > most ? score : most;
    }
    if (most > top[q] + T(kSlack)) {
      const T factor = simd_exp(top[q] - most);
      top[q] = most;
      for (int64_t j = 0; j < G; ++j) sum[q * G + j] *= factor;
      for (int64_t d = 0; d < E; ++d) out[q * E + d] *= factor;
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    T *p = x + i * G, *s = sum + row[i] * G;
    const T shift = top[row[i]] == low ? T(0) : top[row[i]];  // -inf - -inf would be NaN
#pragma omp simd
    for (int64_t j = 0; j < G; ++j) {
      p[j] = open[i] >> j & 1 ? simd_exp_low(p[j] - shift) : T(0);
      s[j] += p[j];
    }
  }
}

// The softmax of one query from its chunks: their weights, its maximum and 1 / sum.
template <class T>
void combine(const T* top, const T* sum, int64_t stride_top, int64_t stride_sum, int64_t chunks,
             T* weight /*[chunks]*/, T* norm /*[2]*/) {
  T most = -std::numeric_limits<T>::infinity(), total = T(0);
  for (int64_t c = 0; c < chunks; ++c) most = std::max(most, top[c * stride_top]);
  for (int64_t c = 0; c < chunks; ++c) {
    T part = T(0);
    for (int64_t j = 0; j < kLanes<T>; ++j) part += sum[c * stride_sum + j];
    weight[c] = std::exp(top[c * stride_top] - most);
    total += part * weight[c];
  }
  for (int64_t c = 0; c < chunks; ++c) weight[c] /= total;
  norm[0] = most;
  norm[1] = T(1) / total;
}

template <class S, class T>
void forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bits,
             const Tensor& open, double scale, const Tensor& out, const Tensor& norm) {
  constexpr int64_t G = kLanes<T>;
  const Sizes n = sizes_of<T>(q, k);
  const Heads<S> queries(q), keys(k), values(v);
  const Lists<T> lists = make_lists<T>(bits, open, n);
  const Scratch<T> qs(n.B * n.H * n.Q * n.E);
  copy_heads<S, T>(queries, n, static_cast<T>(scale), qs.get());
  const Scratch<T> top(n.tasks() * n.Q), sum(n.tasks() * n.Q * G), part(n.tasks() * n.Q * n.E);
  const Tiles<T>& tile = tiles<T>();

  struct Memory {
    Scratch<T> k, v, kt, x;
  };
  const auto make = [&] {
    return Memory{Scratch<T>(G * n.E), Scratch<T>(G * n.E), Scratch<T>(n.E * G),
                  Scratch<T>(n.Q * G)};
  };
  run_tasks(n.tasks(), make, [&](int64_t task, const Memory& memory) {
    const int64_t h = task % n.H, c = task / n.H % n.chunks, b = task / n.H / n.chunks;
    T *t = top.get() + task * n.Q, *s = sum.get() + task * n.Q * G;
    T* o = part.get() + task * n.Q * n.E;
    std::fill_n(t, n.Q, -std::numeric_limits<T>::infinity());
    std::fill_n(s, n.Q * G, T(0));
    std::fill_n(o, n.Q * n.E, T(0));
    const T* head = qs.get() + (b * n.H + h) * n.Q * n.E;
    const int64_t end = std::min(n.groups, (c + 1) * kChunk / G);
    for (int64_t g = c * kChunk / G; g < end; ++g) {
      const int64_t at = b * n.groups + g, rows = lists.count[at];
      if (rows == 0) continue;
      if (g + 1 < end && lists.count[at + 1] > 0) {
        prefetch_rows(keys, n, b, (g + 1) * G, h, G);
        prefetch_rows(values, n, b, (g + 1) * G, h, G);
      }
      const int32_t* row = lists.row.get() + at * n.Q;
      const Group<T> kg = group_rows<S, T>(keys, n, b, g, h, memory.k.get());
      const Group<T> vg = group_rows<S, T>(values, n, b, g, h, memory.v.get());
      tile.transpose(kg.data, kg.ld, n.E, memory.kt.get());
      tile.dot(head, n.E, row, rows, memory.kt.get(), n.E, memory.x.get());
      softmax_rows(row, lists.open.get() + at * n.Q, rows, memory.x.get(), t, s, o, n.E);
      tile.accumulate(memory.x.get(), row, rows, vg.data, vg.ld, n.E, o, n.E);
    }
  });

  T* to = mutable_data<T>(out);
  T* norm_to = mutable_data<T>(norm);
  parallel_for(0, n.B * n.H, 1, [&](int64_t begin, int64_t end) {
    const Scratch<T> weight(n.chunks);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / n.H, h = i % n.H, first = b * n.chunks * n.H + h;
      for (int64_t r = 0; r < n.Q; ++r) {
        combine(top.get() + first * n.Q + r, sum.get() + (first * n.Q + r) * G, n.H * n.Q,
                n.H * n.Q * G, n.chunks, weight.get(), norm_to + (i * n.Q + r) * 2);
        T* line = to + ((b * n.Q + r) * n.H + h) * n.D;
        std::fill_n(line, n.D, T(0));
        for (int64_t c = 0; c < n.chunks; ++c) {
          const T* from = part.get() + ((first + c * n.H) * n.Q + r) * n.E;
          for (int64_t d = 0; d < n.D; ++d) line[d] += weight[c] * from[d];
        }
      }
    }
  });
}

// p = exp(x - top) / sum where open, ds = p (dp - delta); both in place
template <class T>
SEGKERN_CLONES void softmax_gradient(const int32_t* row, const uint32_t* open, int64_t n,
                                     const T* norm /*[Q, 2]*/, const T* delta /*[Q]*/,
                                     T* x /*[n, lanes]*/, T* dp /*[n, lanes]*/) {
  constexpr int64_t G = kLanes<T>;
  for (int64_t i = 0; i < n; ++i, x += G, dp += G) {
    const T top = norm[2 * row[i]], factor = norm[2 * row[i] + 1], mean = delta[row[i]];
#pragma omp simd
    for (int64_t j = 0; j < G; ++j) {
      const T p = simd_exp_low(x[j] - top) * factor;
      x[j] = open[i] >> j & 1 ? p : T(0);
      dp[j] = open[i] >> j & 1 ? p * (dp[j] - mean) : T(0);
    }
  }
}

// delta[i] = x[i] . y[i]: the diagonal of small products, so that the sum has the order and the
// rounding of dp and a row with one open key has dp - delta = 0 exactly.
template <class T>
void dot_lines(const T* x, const T* y, int64_t lines, int64_t E, T* delta) {
  constexpr int64_t G = kLanes<T>;
  const Scratch<T> rows(G * E), t(E * G), product(G * G);
  int32_t row[G];
  std::iota(row, row + G, 0);
  for (int64_t i = 0; i < lines; i += G) {
    const int64_t n = std::min(G, lines - i);
    copy_lines<T, T>(y + i * E, E, n, E, T(1), G, E, rows.get());
    tiles<T>().transpose(rows.get(), E, E, t.get());
    tiles<T>().dot(x + i * E, E, row, n, t.get(), E, product.get());
    for (int64_t j = 0; j < n; ++j) delta[i + j] = product[j * G + j];
  }
}

template <class S, class T>
void backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
              const Tensor& bits, const Tensor& open, const Tensor& out, const Tensor& norm,
              double scale, const Tensor& grad_q, const Tensor& grad_k, const Tensor& grad_v) {
  constexpr int64_t G = kLanes<T>;
  const Sizes n = sizes_of<T>(q, k);
  const IntList heads = {n.B, n.Q, n.H, n.D};
  const Heads<S> queries(q), keys(k), values(v);
  const Heads<S> grads(torch::stable::view(torch::stable::contiguous(grad), heads));
  const Heads<T> outs(torch::stable::view(torch::stable::contiguous(out), heads));
  const Lists<T> lists = make_lists<T>(bits, open, n);
  const int64_t lines = n.B * n.H * n.Q;
  const Scratch<T> qs(lines * n.E), gs(lines * n.E), os(lines * n.E), delta(lines);
  copy_heads<S, T>(queries, n, static_cast<T>(scale), qs.get());
  copy_heads<S, T>(grads, n, T(1), gs.get());
  copy_heads<T, T>(outs, n, T(1), os.get());
  dot_lines(gs.get(), os.get(), lines, n.E, delta.get());
  const Scratch<T> part(n.tasks() * n.Q * n.E);  // of grad_q, [B, chunks, H, Q, E]
  const Tensor stats = dense<T>(norm);
  const Tiles<T>& tile = tiles<T>();
  S *to_k = mutable_data<S>(grad_k), *to_v = mutable_data<S>(grad_v);

  struct Memory {
    Scratch<T> k, v, t, x, dp, line;
  };
  const auto make = [&] {
    return Memory{Scratch<T>(G * n.E), Scratch<T>(G * n.E), Scratch<T>(n.E * G),
                  Scratch<T>(n.Q * G), Scratch<T>(n.Q * G), Scratch<T>(G * n.E)};
  };
  run_tasks(n.tasks(), make, [&](int64_t task, const Memory& memory) {
    const int64_t h = task % n.H, c = task / n.H % n.chunks, b = task / n.H / n.chunks;
    const int64_t first = (b * n.H + h) * n.Q;
    const T *head = qs.get() + first * n.E, *up = gs.get() + first * n.E;
    T *dq = part.get() + task * n.Q * n.E, *x = memory.x.get(), *dp = memory.dp.get();
    T *t = memory.t.get(), *line = memory.line.get();
    std::fill_n(dq, n.Q * n.E, T(0));
    const int64_t end = std::min(n.groups, (c + 1) * kChunk / G);
    for (int64_t g = c * kChunk / G; g < end; ++g) {
      const int64_t at = b * n.groups + g, rows = lists.count[at];
      const int64_t place = ((b * n.S + g * G) * n.H + h) * n.D, stride = n.H * n.D;
      const int64_t present = std::min(G, n.S - g * G);
      const int32_t* row = lists.row.get() + at * n.Q;
      if (rows > 0) {
        const Group<T> kg = group_rows<S, T>(keys, n, b, g, h, memory.k.get());
        const Group<T> vg = group_rows<S, T>(values, n, b, g, h, memory.v.get());
        tile.transpose(kg.data, kg.ld, n.E, t);
        tile.dot(head, n.E, row, rows, t, n.E, x);
        tile.transpose(vg.data, vg.ld, n.E, t);
        tile.dot(up, n.E, row, rows, t, n.E, dp);
        softmax_gradient(row, lists.open.get() + at * n.Q, rows, data<T>(stats) + 2 * first,
                         delta.get() + first, x, dp);
        tile.accumulate(dp, row, rows, kg.data, kg.ld, n.E, dq, n.E);
      }
      tile.reduce(dp, head, n.E, row, rows, n.E, line);
      store_rows<S, T>(line, present, n.D, n.E, to_k + place, stride);
      tile.reduce(x, up, n.E, row, rows, n.E, line);
      store_rows<S, T>(line, present, n.D, n.E, to_v + place, stride);
    }
  });

  S* to_q = mutable_data<S>(grad_q);
  for (int64_t i = 0; i < lines; ++i) {
    const int64_t b = i / n.Q / n.H, h = i / n.Q % n.H, r = i % n.Q;
    for (int64_t d = 0; d < n.D; ++d) {
      T sum = T(0);
      for (int64_t c = 0; c < n.chunks; ++c)
        sum += part[(((b * n.chunks + c) * n.H + h) * n.Q + r) * n.E + d];
      to_q[((b * n.Q + r) * n.H + h) * n.D + d] = static_cast<S>(static_cast<T>(scale) * sum);
    }
  }
}

std::tuple<Tensor, Tensor> masked_attn(Tensor q, Tensor k, Tensor v, Tensor bits, Tensor open,
                                       double scale) {
  STD_TORCH_CHECK(bits.size(2) == (k.size(1) + 31) / 32, "masked_attn: bits of another size");
  const int64_t B = q.size(0), Q = q.size(1), H = q.size(2), D = q.size(3);
  Tensor out, norm;
  dispatch_storage(q, "masked_attn", [&](auto storage, auto zero) {
    using S = decltype(storage);
    using T = decltype(zero);
    out = empty<T>(q, {B, Q, H * D});  // backward subtracts with it: not rounded to S
    norm = empty<T>(q, {B, H, Q, 2});
    forward<S, T>(q, k, v, bits, open, scale, out, norm);
  });
  return {out, norm};
}

std::tuple<Tensor, Tensor, Tensor> masked_attn_backward(Tensor grad, Tensor q, Tensor k, Tensor v,
                                                        Tensor bits, Tensor open, Tensor out,
                                                        Tensor norm, double scale) {
  STD_TORCH_CHECK(bits.size(2) == (k.size(1) + 31) / 32, "masked_attn: bits of another size");
  const IntList queries = {q.size(0), q.size(1), q.size(2), q.size(3)};
  const IntList keys = {k.size(0), k.size(1), k.size(2), k.size(3)};
  const Tensor grad_q = torch::stable::new_empty(q, queries);
  const Tensor grad_k = torch::stable::new_empty(q, keys);
  const Tensor grad_v = torch::stable::new_empty(q, keys);
  dispatch_storage(q, "masked_attn_backward", [&](auto storage, auto zero) {
    backward<decltype(storage), decltype(zero)>(grad, q, k, v, bits, open, out, norm, scale,
                                                grad_q, grad_k, grad_v);
  });
  return {grad_q, grad_k, grad_v};
}

}  // namespace
}  // namespace segkern

STABLE_TORCH_LIBRARY_IMPL(segkern, CPU, m) {
  m.impl("masked_attn", TORCH_BOX(&segkern::masked_attn));
  m.impl("masked_attn_backward", TORCH_BOX(&segkern::masked_attn_backward));
}
