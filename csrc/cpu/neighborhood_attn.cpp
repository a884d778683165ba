// neighborhood_attn on the CPU: a task takes rows of queries of one head and group of rows; what
// is stored of a line of queries is the scores of its K x K keys, which stay in the cache. Letters
// as in neighborhood_rows.h.
#include "neighborhood_rows.h"

namespace segkern {
namespace {

// p = p / total, ds = p (dp - sum p dp), in place
template <class T>
SEGKERN_CLONES void softmax_gradient(const T* total, int64_t keys, T* p /*[keys, lanes]*/,
                                     T* dp /*[keys, lanes]*/) {
  constexpr int64_t G = kLanes<T>;
  T factor[G], mean[G];
  for (int64_t i = 0; i < G; ++i) factor[i] = T(1) / total[i], mean[i] = T(0);
  for (int64_t m = 0; m < keys; ++m)
#pragma omp simd
    for (int64_t i = 0; i < G; ++i) {
      p[m * G + i] *= factor[i];
      mean[i] += p[m * G + i] * dp[m * G + i];
    }
  for (int64_t m = 0; m < keys; ++m)
#pragma omp simd
    for (int64_t i = 0; i < G; ++i) dp[m * G + i] = p[m * G + i] * (dp[m * G + i] - mean[i]);
}

// to[offset[i] + b, i] += ds[b, i]: a query adds to a lane of its own
template <class T>
SEGKERN_CLONES void add_bias(const T* ds /*[columns, lanes]*/, const int32_t* offset,
                             bool straight, int64_t columns, T* to /*[of a table, lanes]*/) {
  constexpr int64_t G = kLanes<T>;
  for (int64_t j = 0; j < columns; ++j, ds += G, to += G) {
    if (straight) {
#pragma omp simd
      for (int64_t i = 0; i < G; ++i) to[offset[0] * G + i] += ds[i];
    } else {
      for (int64_t i = 0; i < G; ++i) to[offset[i] * G + i] += ds[i];
    }
  }
}

// k[key, d] += ds q[d] and v[key, d] += p g[d] for the queries' keys in a row
template <class T>
SEGKERN_CLONES void spread(const T* ds /*[columns, lanes]*/, const T* p, const T* q /*[lanes, E]*/,
                           const T* g, const int32_t* key, int64_t queries, const Reach& n,
                           int64_t E, T* k /*[w, E]*/, T* v) {
  constexpr int64_t G = kLanes<T>;
  for (int64_t i = 0; i < queries; ++i, q += E, g += E) {
    for (int64_t first = 0; first < E; first += G) {
      T of_q[G], of_g[G];
      for (int64_t d = 0; d < G; ++d) of_q[d] = q[first + d], of_g[d] = g[first + d];
      for (int64_t j = 0; j < n.columns; ++j) {
        const int64_t at = (key[i] + j * n.step) * E + first;
        const T of_k = ds[j * G + i], of_v = p[j * G + i];
#pragma omp simd
        for (int64_t d = 0; d < G; ++d) k[at + d] += of_k * of_q[d];
#pragma omp simd
        for (int64_t d = 0; d < G; ++d) v[at + d] += of_v * of_g[d];
      }
    }
  }
}

// to[i, d] = x[i, d], rows of D
template <class S, class T>
SEGKERN_CLONES void write_row(const T* x /*[rows, E]*/, int64_t rows, int64_t D, int64_t E, S* to,
                              int64_t stride) {
  for (int64_t i = 0; i < rows; ++i)
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) to[i * stride + d] = rounded<S>(x[i * E + d]);
}

// to[i] = sum of lanes
template <class T>
SEGKERN_CLONES void add_lanes(const T* x /*[n, lanes]*/, int64_t n, T* to /*[n]*/) {
  constexpr int64_t G = kLanes<T>;
  for (int64_t m = 0; m < n; ++m) {
    T sum = T(0);
    for (int64_t i = 0; i < G; ++i) sum += x[m * G + i];
    to[m] = sum;
  }
}

template <class S, class T>
void forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias, const Sizes& n,
             double scale, const Tensor& out) {
  constexpr int64_t G = kLanes<T>;
  const Map<S> queries(q), keys(k), values(v);
  const Tensor added = dense<T>(bias);
  const Queries<T> row(n.x);
  const Reach reach = n.reach();
  const Neighbors<T>& near = neighbors<T>();
  const int64_t C = n.H * n.D, table = n.y.table() * n.x.table();
  S* to = mutable_data<S>(out);

  run_tasks(
      n.tasks(), [&] { return Memory<T>(n); },
      [&](int64_t task, Memory<T>& memory) {
        const Part part(n, task);
        T *q = memory.q.get(), *p = memory.p.get(), *sum = memory.out.get(),
          *x = memory.rows.get();
        T *turned = memory.turned.get(), *total = memory.total.get();
        int64_t next = 0;
        for (int64_t place = part.begin; place < part.end; ++place) {
          const int64_t y = part.group + place * n.y.dilation,
                        start = n.y.start(place, part.group);
          fetch(keys, values, n, part, start, next, memory, [](int64_t) {});
          const T* biases =
              data<T>(added) + part.head * table + (start - place + n.y.kernel - 1) * n.x.table();
          for (int64_t i = 0; i < n.x.length; i += G) {
            const int32_t *pixel = row.pixel.data() + i, *key = row.key.data() + i;
            const bool straight = row.straight[i / G];
            gather<S, T>(queries.at(part.image, y, part.head), queries.pixel(), pixel, G, n.D,
                         static_cast<T>(scale), n.E, x);
            tiles<T>().transpose(x, n.E, n.E, q);
            near.dots[straight](q, memory.key_rows.data(), key, reach, n.W, n.D, p);
            softmax(biases, n.x.table(), row.bias.data() + i, straight, reach, p, total);
            near.sums[straight](p, memory.value_rows.data(), key, reach, n.W, n.D, sum);
            turn_back(sum, n, turned);
            for (int64_t j = 0; j < G; ++j) total[j] = T(1) / total[j];
            scatter<S, T>(turned, total, pixel, std::min(G, n.x.length - i), n.D,
                          to + (part.image * n.y.length + y) * n.x.length * C + part.head * n.D,
                          C);
          }
        }
      });
}

// A task has the gradients of the keys and values at the places of its own queries: it goes over
// all rows of queries that look at them, and adds to no other rows. What belongs to a query, its
// gradient and its part of the bias's, is of the task that has its row.
template <class S, class T>
void backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
              const Tensor& bias, const Sizes& n, double scale, const Tensor& grad_q,
              const Tensor& grad_k, const Tensor& grad_v, const Tensor& grad_bias) {
  constexpr int64_t G = kLanes<T>;
  const Map<S> uppers(grad), queries(q), keys(k), values(v);
  const Tensor added = dense<T>(bias);
  const Queries<T> row(n.x);
  const Reach reach = n.reach();
  const Neighbors<T>& near = neighbors<T>();
  const int64_t C = n.H * n.D, table = n.y.table() * n.x.table();
  const Scratch<T> parts(n.tasks() * table);  // of the gradient of bias
  S *to_q = mutable_data<S>(grad_q), *to_k = mutable_data<S>(grad_k);
  S* to_v = mutable_data<S>(grad_v);

  struct Both : Memory<T> {
    explicit Both(const Sizes& n)
        : Memory<T>(n),
          g(kLanes<T> * n.E),
          q_rows(kLanes<T> * n.E),
          g_rows(kLanes<T> * n.E),
          dp(n.area() * kLanes<T>),
          of_bias(n.y.table() * n.x.table() * kLanes<T>),
          of_keys(n.y.kernel * n.x.length * n.E),
          of_values(n.y.kernel * n.x.length * n.E) {}
    Scratch<T> g, q_rows, g_rows, dp, of_bias, of_keys, of_values;
  };
  run_tasks(
      n.tasks(), [&] { return Both(n); },
      [&](int64_t task, Both& memory) {
        const Part part(n, task);
        T *q = memory.q.get(), *g = memory.g.get(), *p = memory.p.get(), *dp = memory.dp.get();
        T *q_rows = memory.q_rows.get(), *g_rows = memory.g_rows.get(), *sum = memory.out.get();
        T *turned = memory.turned.get(), *total = memory.total.get();
        const int64_t last = n.y.places(part.group), line = n.x.length * n.E;
        const auto own = [&](int64_t place) { return place >= part.begin && place < part.end; };
        const auto at = [&](int64_t place) {  // a row of the map
          const int64_t y = part.group + place * n.y.dilation;
          return (part.image * n.y.length + y) * n.x.length * C + part.head * n.D;
        };
        const auto done = [&](int64_t place) {  // no query to come looks at this row of keys
          if (place < 0 || !own(place)) return;
          const int64_t slot = place % n.y.kernel * line;
          write_row<S, T>(memory.of_keys.get() + slot, n.x.length, n.D, n.E, to_k + at(place), C);
          write_row<S, T>(memory.of_values.get() + slot, n.x.length, n.D, n.E, to_v + at(place),
                          C);
        };
        const auto fresh = [&](int64_t place) {
          done(place - n.y.kernel);
          const int64_t slot = place % n.y.kernel * line;
          std::fill_n(memory.of_keys.get() + slot, line, T(0));
          std::fill_n(memory.of_values.get() + slot, line, T(0));
        };
        std::fill_n(memory.of_bias.get(), table * G, T(0));

        int64_t next = 0;
        for (int64_t place = 0; place < last; ++place) {
          const int64_t start = n.y.start(place, part.group);
          if (start + n.y.kernel <= part.begin || start >= part.end) continue;
          const int64_t y = part.group + place * n.y.dilation,
                        offset = start - place + n.y.kernel - 1;
          fetch(keys, values, n, part, start, next, memory, fresh);
          const T* biases = data<T>(added) + part.head * table + offset * n.x.table();
          for (int64_t i = 0; i < n.x.length; i += G) {
            const int32_t *pixel = row.pixel.data() + i, *key = row.key.data() + i;
            const int32_t* offsets = row.bias.data() + i;
            const bool straight = row.straight[i / G];
            const int64_t count = std::min(G, n.x.length - i);
            gather<S, T>(queries.at(part.image, y, part.head), queries.pixel(), pixel, G, n.D,
                         static_cast<T>(scale), n.E, q_rows);
            tiles<T>().transpose(q_rows, n.E, n.E, q);
            // without a gradient in the copies that fill up the last line
            gather<S, T>(uppers.at(part.image, y, part.head), uppers.pixel(), pixel, count, n.D,
                         T(1), n.E, g_rows);
            tiles<T>().transpose(g_rows, n.E, n.E, g);
            near.dots[straight](q, memory.key_rows.data(), key, reach, n.W, n.D, p);
            softmax(biases, n.x.table(), offsets, straight, reach, p, total);
            near.dots[straight](g, memory.value_rows.data(), key, reach, n.W, n.D, dp);
            softmax_gradient(total, n.area(), p, dp);
            for (int64_t a = 0; a < n.y.kernel; ++a) {
              const T* ds = dp + a * n.x.kernel * G;
              if (own(start + a)) {
                const int64_t slot = (start + a) % n.y.kernel * line;
                spread(ds, p + a * n.x.kernel * G, q_rows, g_rows, key, count, reach, n.E,
                       memory.of_keys.get() + slot, memory.of_values.get() + slot);
              }
              if (own(place))
                add_bias(ds, offsets, straight, n.x.kernel,
                         memory.of_bias.get() + (offset + a) * n.x.table() * G);
            }
            if (!own(place)) continue;
            near.sums[straight](dp, memory.key_rows.data(), key, reach, n.W, n.D, sum);
            turn_back(sum, n, turned);
            std::fill_n(total, G, static_cast<T>(scale));
            scatter<S, T>(turned, total, pixel, count, n.D, to_q + at(place), C);
          }
        }
        for (int64_t place = std::max<int64_t>(0, next - n.y.kernel); place < next; ++place)
          done(place);
        add_lanes(memory.of_bias.get(), table, parts.get() + task * table);
      });

  T* to = mutable_data<T>(grad_bias);
  std::fill_n(to, n.H * table, T(0));
  for (int64_t task = 0; task < n.tasks(); ++task) {
    T* sum = to + Part(n, task).head * table;
    for (int64_t i = 0; i < table; ++i) sum[i] += parts[task * table + i];
  }
}

void check(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias,
           const IntList& kernel, const IntList& dilation) {
  STD_TORCH_CHECK(q.dim() == 5 && kernel.size() == 2 && dilation.size() == 2,
                  "neighborhood_attn: [B, h, w, H, D] and two axes expected");
  for (const Tensor* t : {&k, &v}) {
    STD_TORCH_CHECK(t->dim() == 5 && t->scalar_type() == q.scalar_type(),
                    "neighborhood_attn: q, k and v that do not fit");
    for (int64_t i = 0; i < 5; ++i)
      STD_TORCH_CHECK(t->size(i) == q.size(i), "neighborhood_attn: q, k and v that do not fit");
  }
  for (int64_t i = 0; i < 2; ++i)
    STD_TORCH_CHECK(kernel[i] > 0 && kernel[i] % 2 == 1 && dilation[i] > 0 &&
                        kernel[i] * dilation[i] <= q.size(1 + i),
                    "neighborhood_attn: a kernel that does not fit the map");
  STD_TORCH_CHECK(bias.numel() == q.size(3) * (2 * kernel[0] - 1) * (2 * kernel[1] - 1),
                  "neighborhood_attn: a bias that does not fit the kernel");
}

Tensor neighborhood_attn(Tensor q, Tensor k, Tensor v, Tensor bias, IntList kernel,
                         IntList dilation, double scale) {
  check(q, k, v, bias, kernel, dilation);
  const Tensor out = empty_as(q, IntList(q.sizes().begin(), q.sizes().end()));
  dispatch_storage(q, "neighborhood_attn", [&](auto storage, auto zero) {
    using T = decltype(zero);
    const Sizes n = sizes_of<T>(q, kernel, dilation);
    forward<decltype(storage), T>(q, k, v, bias, n, scale, out);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> neighborhood_attn_backward(Tensor grad, Tensor q,
                                                                      Tensor k, Tensor v,
                                                                      Tensor bias, IntList kernel,
                                                                      IntList dilation,
                                                                      double scale) {
  check(q, k, v, bias, kernel, dilation);
  const IntList sizes(q.sizes().begin(), q.sizes().end());
  const Tensor grad_q = empty_as(q, sizes), grad_k = empty_as(q, sizes);
  const Tensor grad_v = empty_as(q, sizes);
  Tensor grad_bias;
  dispatch_storage(q, "neighborhood_attn_backward", [&](auto storage, auto zero) {
    using T = decltype(zero);
    const Sizes n = sizes_of<T>(q, kernel, dilation);
    grad_bias = empty<T>(q, {n.H, n.y.table(), n.x.table()});
    backward<decltype(storage), T>(grad, q, k, v, bias, n, scale, grad_q, grad_k, grad_v,
                                   grad_bias);
  });
  return {grad_q, grad_k, grad_v, grad_bias};
}

}  // namespace
}  // namespace segkern

STABLE_TORCH_LIBRARY_IMPL(segkern, CPU, m) {
  m.impl("neighborhood_attn", TORCH_BOX(&segkern::neighborhood_attn));
  m.impl("neighborhood_attn_backward", TORCH_BOX(&segkern::neighborhood_attn_backward));
}
