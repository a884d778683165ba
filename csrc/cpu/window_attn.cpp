// window_attn on the CPU: a task takes a few heads through a run of windows; what a window and
// head need is copied into rows that stay in the cache, and their scores are all that is ever
// stored. Letters: B image, h w map, H head, D channels a head, W window's side, S = W W tokens of
// a window; E and L are D and S rounded up to whole lines (16 in float, 8 in double).
#include "simd_math.h"
#include "tile.h"

namespace segkern {
namespace {

constexpr int64_t kTasks = 64;     // about; from the shape alone: sums never depend on threads
constexpr int64_t kHeads = 4;      // of a task: what they read of a token lies together
constexpr double kBlocked = -100;  // added where two tokens of a window are no neighbours

struct Sizes {
  int64_t B, h, w, H, D, W, shift, E, L;
  int64_t S() const { return W * W; }
  int64_t rows() const { return (h + W - 1) / W; }
  int64_t columns() const { return (w + W - 1) / W; }
  int64_t windows() const { return B * rows() * columns(); }
  int64_t groups() const { return (H + kHeads - 1) / kHeads; }
  int64_t chunks() const {
    return std::min(windows(), kTasks / std::clamp<int64_t>(groups(), 1, kTasks));
  }
  int64_t tasks() const { return chunks() * groups(); }
};

template <class T>
Sizes sizes_of(const Tensor& qkv, int64_t window, int64_t shift) {
  constexpr int64_t G = kLanes<T>;
  const int64_t D = qkv.size(5);
  return {qkv.size(0),
          qkv.size(1),
          qkv.size(2),
          qkv.size(4),
          D,
          window,
          shift,
          (D + G - 1) / G * G,
          (window * window + G - 1) / G * G};
}

// One window: the tokens behind its places, and which of them attend.
template <class T>
struct Window {
  explicit Window(const Sizes& n)
      : key(n.S()), query(n.S()), place(n.S()), region(n.L), queries(0) {}
  Scratch<int64_t> key;    // [S] the token at each place, -1 at padding
  Scratch<int64_t> query;  // [queries] the tokens that are there
  Scratch<int32_t> place;  // [queries] and their places
  Scratch<T> region;       // [L] places of two regions block each other
  int64_t queries;
};

// The map is padded at the right and below, then rolled by `shift`: in the last row and column of
// windows tokens of both ends meet.
template <class T>
void cut(const Sizes& n, int64_t index, Window<T>& window) {
  const int64_t rows = n.rows(), columns = n.columns(), image = index / (rows * columns);
  const int64_t top = index / columns % rows * n.W, left = index % columns * n.W;
  int64_t s = 0;
  window.queries = 0;
  for (int64_t i = 0; i < n.W; ++i) {
    const int64_t low = top + i + n.shift >= rows * n.W, y = top + i + n.shift - low * rows * n.W;
    for (int64_t j = 0; j < n.W; ++j, ++s) {
      const int64_t right = left + j + n.shift >= columns * n.W;
      const int64_t x = left + j + n.shift - right * columns * n.W;
      window.region[s] = static_cast<T>(2 * low + right);
      window.key[s] = y < n.h && x < n.w ? (image * n.h + y) * n.w + x : -1;
      if (window.key[s] < 0) continue;
      window.place[window.queries] = s;
      window.query[window.queries++] = window.key[s];
    }
  }
  std::fill(window.region.get() + s, window.region.get() + n.L, T(0));
}

// out[r, d] = x[token[r], d] + bias[d], bias[d] alone where the token is -1; zeros up to [lines,
// E]
template <class S, class T>
SEGKERN_CLONES void gather(const S* x, int64_t stride, const T* bias, const int64_t* token,
                           int64_t n, int64_t D, int64_t lines, int64_t E, T* out /*[lines, E]*/) {
  for (int64_t r = 0; r < n; ++r) {
    const S* from = x + token[r] * stride;
    if (token[r] < 0) {
      std::copy_n(bias, D, out + r * E);
    } else {
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) out[r * E + d] = static_cast<T>(from[d]) + bias[d];
    }
    for (int64_t d = D; d < E; ++d) out[r * E + d] = T(0);
  }
  std::fill(out + n * E, out + lines * E, T(0));
}

// to[token[r], d] = x[r, d] / total[r], but where the token is -1
template <class S, class T>
SEGKERN_CLONES void scatter(const T* x /*[n, E]*/, const T* total, const int64_t* token, int64_t n,
                            int64_t D, int64_t E, S* to, int64_t stride) {
  for (int64_t r = 0; r < n; ++r, x += E) {
    if (token[r] < 0) continue;
    const T factor = total ? T(1) / total[r] : T(1);
    S* line = to + token[r] * stride;
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) line[d] = static_cast<S>(factor * x[d]);
  }
}

// sum[d] += sum_r x[r, d], a window's rows first
template <class T>
SEGKERN_CLONES void add_rows(const T* x /*[n, E]*/, int64_t n, int64_t D, int64_t E, T* sum) {
  constexpr int64_t G = kLanes<T>;
  for (int64_t first = 0; first < D; first += G) {
    T total[G] = {};
    for (int64_t r = 0; r < n; ++r)
#pragma omp simd
      for (int64_t d = 0; d < G; ++d) total[d] += x[r * E + first + d];
    for (int64_t d = first; d < std::min(D, first + G); ++d) sum[d] += total[d - first];
  }
}

// x = exp(scale x + bias + mask - their maximum), total = their sum
template <class T>
SEGKERN_CLONES void softmax_rows(const int32_t* place, int64_t n, int64_t L,
                                 const T* bias /*[S, L]*/, const T* region /*[L]*/, T scale,
                                 T* x /*[n, L]*/, T* total /*[n]*/) {
  for (int64_t r = 0; r < n; ++r, x += L) {
    const T* add = bias + place[r] * L;
    const T own = region[place[r]];
    T most = -std::numeric_limits<T>::infinity(), sum = T(0);
#pragma omp simd reduction(max : most)
    for (int64_t j = 0; j < L; ++j) {
      const T score = scale * x[j] + add[j] + (region[j] == own ? T(0) : T(kBlocked));
      x[j] = score;
      most = score > most ? score : most;
    }
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < L; ++j) {
      const T weight = weight_of(x[j] - most);
      x[j] = weight;
      sum += weight;
    }
    total[r] = sum;
  }
}

// p = p / total, ds = p (dp - sum_j p dp), in place; ds goes to the bias, scale ds to q and k.
template <class T>
SEGKERN_CLONES void softmax_gradient(const int32_t* place, int64_t n, int64_t L, const T* total,
                                     T scale, T* p /*[n, L]*/, T* dp /*[n, L]*/,
                                     T* bias /*[S, L]*/) {
  for (int64_t r = 0; r < n; ++r, p += L, dp += L) {
    const T factor = T(1) / total[r];
    T mean = T(0), *to = bias + place[r] * L;
#pragma omp simd reduction(+ : mean)
    for (int64_t j = 0; j < L; ++j) {
      p[j] *= factor;
      mean += p[j] * dp[j];
    }
#pragma omp simd
    for (int64_t j = 0; j < L; ++j) {
      const T ds = p[j] * (dp[j] - mean);
      to[j] += ds;
      dp[j] = scale * ds;
    }
  }
}

// The bias as rows of whole lines, -inf behind the last key.
template <class T>
Scratch<T> bias_rows(const Tensor& bias, const Sizes& n) {
  const Tensor from = dense<T>(bias);
  Scratch<T> out(n.H * n.S() * n.L);
  parallel_for(0, n.H * n.S(), 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T* line = std::copy_n(data<T>(from) + i * n.S(), n.S(), out.get() + i * n.L);
      std::fill(line, out.get() + (i + 1) * n.L, -std::numeric_limits<T>::infinity());
    }
  });
  return out;
}

// q, k and v of the tokens, in place, and their bias, which is all that a padded one has.
template <class S, class T>
struct Projected {
  Projected(const Tensor& qkv, const Tensor& qkv_bias, const Sizes& n)
      : tokens(torch::stable::contiguous(qkv)), bias(dense<T>(qkv_bias)), C(n.H * n.D), D(n.D) {}
  // part 0, 1 or 2: q, k or v
  void rows(int part, int64_t head, const int64_t* token, int64_t count, int64_t lines, int64_t E,
            T* out) const {
    gather<S, T>(data<S>(tokens) + part * C + head * D, 3 * C, data<T>(bias) + part * C + head * D,
                 token, count, D, lines, E, out);
  }
  // rows lie far apart; the hardware does not guess the next ones
  void prefetch(int64_t head, const int64_t* token, int64_t count) const {
    for (int64_t r = 0; r < count; ++r)
      for (int part = 0; part < 3; ++part)
        for (int64_t d = 0; d < D; d += 64 / int64_t(sizeof(S)))
          __builtin_prefetch(data<S>(tokens) + token[r] * 3 * C + part * C + head * D + d, 0, 2);
  }
  Tensor tokens, bias;
  int64_t C, D;
};

// Rows as the lines of their transpose, which a product takes for its right side.
template <class T>
void turn(const T* rows /*[L, E]*/, const Sizes& n, T* out /*[L / lanes][E, lanes]*/) {
  for (int64_t s = 0; s < n.L; s += kLanes<T>)
    tiles<T>().transpose(rows + s * n.E, n.E, n.E, out + s * n.E);
}

// out[r, s] = x[r] . y[s], y turned
template <class T>
void dots(const T* x, int64_t n, const T* y, const Sizes& sizes, T* out /*[n, L]*/) {
  tiles<T>().product(x, sizes.E, 1, n, y, kLanes<T>, sizes.E * kLanes<T>, sizes.E,
                     sizes.L / kLanes<T>, out, sizes.L, false);
}

// out[r] = sum_k x[r xr + k xk] y[k]
template <class T>
void sums(const T* x, int64_t xr, int64_t xk, int64_t n, const T* y /*[K, E]*/, int64_t K,
          const Sizes& sizes, T* out /*[n, E]*/) {
  tiles<T>().product(x, xr, xk, n, y, sizes.E, kLanes<T>, K, sizes.E / kLanes<T>, out, sizes.E,
                     false);
}

// Calls each(window, head) for those of a task, while the rows of the next window are on their
// way.
template <class S, class T, class Each>
void for_windows(const Sizes& n, const Projected<S, T>& x, int64_t task, Window<T>* pair,
                 const Each& each) {
  const int64_t first = task % n.groups() * kHeads, last = std::min(n.H, first + kHeads);
  const int64_t chunk = task / n.groups(), begin = chunk * n.windows() / n.chunks();
  const int64_t end = (chunk + 1) * n.windows() / n.chunks();
  cut(n, begin, pair[begin % 2]);
  for (int64_t i = begin; i < end; ++i) {
    Window<T>& next = pair[(i + 1) % 2];
    if (i + 1 < end) cut(n, i + 1, next);
    for (int64_t head = first; head < last; ++head) {
      if (i + 1 < end) x.prefetch(head, next.query.get(), next.queries);
      each(pair[i % 2], head);
    }
  }
}

template <class S, class T>
void forward(const Tensor& qkv, const Tensor& qkv_bias, const Tensor& bias, const Sizes& n,
             double scale, const Tensor& out) {
  const Projected<S, T> x(qkv, qkv_bias, n);
  const Scratch<T> added = bias_rows<T>(bias, n);
  S* to = mutable_data<S>(out);

  struct Memory {
    Window<T> pair[2];
    Scratch<T> a, b, turned, p, total;
  };
  const auto make = [&] {
    return Memory{{Window<T>(n), Window<T>(n)}, Scratch<T>(n.L * n.E),   Scratch<T>(n.L * n.E),
                  Scratch<T>(n.L * n.E),        Scratch<T>(n.S() * n.L), Scratch<T>(n.S())};
  };
  run_tasks(n.tasks(), make, [&](int64_t task, Memory& memory) {
    T *a = memory.a.get(), *b = memory.b.get(), *p = memory.p.get(), *sum = memory.total.get();
    for_windows(n, x, task, memory.pair, [&](const Window<T>& window, int64_t head) {
      const int64_t queries = window.queries;
      x.rows(1, head, window.key.get(), n.S(), n.L, n.E, a);
      turn(a, n, memory.turned.get());
      x.rows(0, head, window.query.get(), queries, queries, n.E, b);
      dots(b, queries, memory.turned.get(), n, p);
      x.rows(2, head, window.key.get(), n.S(), n.S(), n.E, a);
      softmax_rows(window.place.get(), queries, n.L, added.get() + head * n.S() * n.L,
                   window.region.get(), static_cast<T>(scale), p, sum);
      sums(p, n.L, 1, queries, a, n.S(), n, b);
      scatter<S, T>(b, sum, window.query.get(), queries, n.D, n.E, to + head * n.D, n.H * n.D);
    });
  });
}

// to[i] = sum_c from[c, i], in the order of the chunks
template <class T>
SEGKERN_CLONES void add_chunks(const T* from, int64_t chunks, int64_t stride, int64_t n, T* to) {
  std::fill_n(to, n, T(0));
  for (int64_t c = 0; c < chunks; ++c)
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] += from[c * stride + i];
}

template <class S, class T>
void backward(const Tensor& grad, const Tensor& qkv, const Tensor& qkv_bias, const Tensor& bias,
              const Sizes& n, double scale, const Tensor& grad_qkv, const Tensor& grad_qkv_bias,
              const Tensor& grad_bias) {
  const Projected<S, T> x(qkv, qkv_bias, n);
  const Scratch<T> added = bias_rows<T>(bias, n);
  const Tensor up = torch::stable::contiguous(grad);
  const int64_t chunks = n.chunks(), C = n.H * n.D, area = n.S() * n.L;
  const Scratch<T> part_bias(chunks * n.H * area);    // [chunks, H, S, L]
  const Scratch<T> part_qkv(chunks * n.H * 3 * n.D);  // [chunks, H, 3, D]
  const std::vector<T> nothing(n.D);
  S* to = mutable_data<S>(grad_qkv);

  struct Memory {
    Window<T> pair[2];
    Scratch<T> q, k, v, g, turned, p, dp, total, line;
  };
  const auto make = [&] {
    const auto rows = [&] { return Scratch<T>(n.L * n.E); };
    return Memory{{Window<T>(n), Window<T>(n)},
                  rows(),
                  rows(),
                  rows(),
                  rows(),
                  rows(),
                  Scratch<T>(area),
                  Scratch<T>(area),
                  Scratch<T>(n.S()),
                  rows()};
  };
  run_tasks(n.tasks(), make, [&](int64_t task, Memory& memory) {
    T *q = memory.q.get(), *k = memory.k.get(), *v = memory.v.get(), *g = memory.g.get();
    T *turned = memory.turned.get(), *p = memory.p.get(), *dp = memory.dp.get();
    T* line = memory.line.get();
    const int64_t chunk = task / n.groups(), first = chunk * n.H + task % n.groups() * kHeads;
    const int64_t heads = std::min(kHeads, n.H - task % n.groups() * kHeads);
    std::fill_n(part_bias.get() + first * area, heads * area, T(0));
    std::fill_n(part_qkv.get() + first * 3 * n.D, heads * 3 * n.D, T(0));
    for_windows(n, x, task, memory.pair, [&](const Window<T>& window, int64_t head) {
      const int64_t queries = window.queries, *query = window.query.get();
      const int64_t* key = window.key.get();
      T* part = part_qkv.get() + (chunk * n.H + head) * 3 * n.D;
      x.rows(0, head, query, queries, queries, n.E, q);
      x.rows(1, head, key, n.S(), n.L, n.E, k);
      x.rows(2, head, key, n.S(), n.L, n.E, v);
      gather<S, T>(data<S>(up) + head * n.D, C, nothing.data(), query, queries, n.D, queries, n.E,
                   g);
      turn(k, n, turned);
      dots(q, queries, turned, n, p);
      softmax_rows(window.place.get(), queries, n.L, added.get() + head * area,
                   window.region.get(), static_cast<T>(scale), p, memory.total.get());
      turn(v, n, turned);
      dots(g, queries, turned, n, dp);
      softmax_gradient(window.place.get(), queries, n.L, memory.total.get(), static_cast<T>(scale),
                       p, dp, part_bias.get() + (chunk * n.H + head) * area);
      S* out = to + head * n.D;
      sums(dp, n.L, 1, queries, k, n.S(), n, line);
      scatter<S, T>(line, nullptr, query, queries, n.D, n.E, out, 3 * C);
      add_rows(line, queries, n.D, n.E, part);
      sums(dp, 1, n.L, n.S(), q, queries, n, line);
      scatter<S, T>(line, nullptr, key, n.S(), n.D, n.E, out + C, 3 * C);
      add_rows(line, n.S(), n.D, n.E, part + n.D);
      sums(p, 1, n.L, n.S(), g, queries, n, line);
      scatter<S, T>(line, nullptr, key, n.S(), n.D, n.E, out + 2 * C, 3 * C);
      add_rows(line, n.S(), n.D, n.E, part + 2 * n.D);
    });
  });

  T *qkv_to = mutable_data<T>(grad_qkv_bias), *bias_to = mutable_data<T>(grad_bias);
  for (int64_t i = 0; i < 3 * n.H; ++i)
    add_chunks(part_qkv.get() + (i % n.H * 3 + i / n.H) * n.D, chunks, n.H * 3 * n.D, n.D,
               qkv_to + i * n.D);
  parallel_for(0, n.H * n.S(), 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      add_chunks(part_bias.get() + i * n.L, chunks, n.H * area, n.S(), bias_to + i * n.S());
  });
}

void check(const Tensor& qkv, const Tensor& qkv_bias, const Tensor& bias, int64_t window,
           int64_t shift) {
  const int64_t H = qkv.size(4), S = window * window;
  STD_TORCH_CHECK(window > 0 && shift >= 0 && shift < window && bias.numel() == H * S * S &&
                      qkv_bias.numel() == 3 * H * qkv.size(5),
                  "window_attn: sizes that do not fit");
}

Tensor window_attn(Tensor qkv, Tensor qkv_bias, Tensor bias, int64_t window, int64_t shift,
                   double scale) {
  check(qkv, qkv_bias, bias, window, shift);
  const Tensor out = torch::stable::new_empty(
      qkv, IntList{qkv.size(0), qkv.size(1), qkv.size(2), qkv.size(4) * qkv.size(5)});
  dispatch_storage(qkv, "window_attn", [&](auto storage, auto zero) {
    using T = decltype(zero);
    forward<decltype(storage), T>(qkv, qkv_bias, bias, sizes_of<T>(qkv, window, shift), scale,
                                  out);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> window_attn_backward(Tensor grad, Tensor qkv, Tensor qkv_bias,
                                                        Tensor bias, int64_t window, int64_t shift,
                                                        double scale) {
  check(qkv, qkv_bias, bias, window, shift);
  const Tensor grad_qkv =
      torch::stable::new_empty(qkv, IntList(qkv.sizes().begin(), qkv.sizes().end()));
  Tensor grad_qkv_bias, grad_bias;
  dispatch_storage(qkv, "window_attn_backward", [&](auto storage, auto zero) {
    using T = decltype(zero);
    const Sizes n = sizes_of<T>(qkv, window, shift);
    grad_qkv_bias = empty<T>(qkv, {3, n.H, n.D});
    grad_bias = empty<T>(qkv, {n.H, n.S(), n.S()});
    backward<decltype(storage), T>(grad, qkv, qkv_bias, bias, n, scale, grad_qkv, grad_qkv_bias,
                                   grad_bias);
  });
  return {grad_qkv, grad_qkv_bias, grad_bias};
}

}  // namespace
}  // namespace segkern

STABLE_TORCH_LIBRARY_IMPL(segkern, CPU, m) {
  m.impl("window_attn", TORCH_BOX(&segkern::window_attn));
  m.impl("window_attn_backward", TORCH_BOX(&segkern::window_attn_backward));
}
