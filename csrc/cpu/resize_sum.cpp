// resize_sum on the CPU: for a row of the result the rows that it reads of each map are blended to
// a line; then a pixel adds one or two values of each line and is rounded once. A map's gradient
// goes the same way back: rows first, then the pixels of the line.
// Letters: B image, h w size of the result, L map, E channel. Everything is [B, h, w, E].
#include "resample.h"

namespace segkern {
namespace {

template <class T>
struct Tap {
  int64_t at;
  T weight;
};
template <class T>
using Taps = std::vector<std::vector<Tap<T>>>;

// What each of `out` values reads of `in`; what has no weight is not read.
template <class T>
Taps<T> taps_of(int64_t in, int64_t out) {
  Taps<T> taps(out);
  for (int64_t i = 0; i < out; ++i) {
    const Pair p = resized(i, in, out);
    if (p.a == p.b || p.weight == 0.0) {
      taps[i] = {{p.a, T(1)}};
    } else {
      taps[i] = {{p.a, static_cast<T>(1.0 - p.weight)}, {p.b, static_cast<T>(p.weight)}};
    }
  }
  return taps;
}

// The transpose: by which of the `out` values each of `in` is read.
template <class T>
Taps<T> takers_of(int64_t in, int64_t out) {
  Taps<T> takers(in);
  const Taps<T> taps = taps_of<T>(in, out);
  for (int64_t i = 0; i < out; ++i)
    for (const Tap<T>& t : taps[i]) takers[t.at].push_back({i, t.weight});
  return takers;
}

// out[c] = sum of weight x[at, c]; n values, lines of x `stride` apart
template <class In, class Out, class T>
SEGKERN_CLONES void weighted_sum(const In* x, int64_t stride, const Tap<T>* taps, int64_t count,
                                 int64_t n, Out* out) {
  constexpr int64_t kBlock = 4 * kLanes<T>;  // whose sums stay in registers
  for (int64_t c = 0; c < n; c += kBlock) {
    const int64_t size = std::min(kBlock, n - c);
    T sum[kBlock] = {};
    if (size == kBlock) {
      for (int64_t t = 0; t < count; ++t) {
        const In* from = x + taps[t].at * stride + c;
        const T weight = taps[t].weight;
#pragma omp simd
        for (int64_t k = 0; k < kBlock; ++k) sum[k] += weight * widened<T>(from[k]);
      }
#pragma omp simd
      for (int64_t k = 0; k < kBlock; ++k) out[c + k] = rounded<Out>(sum[k]);
      continue;
    }
    for (int64_t t = 0; t < count; ++t)
      for (int64_t k = 0; k < size; ++k)
        sum[k] += taps[t].weight * widened<T>(x[taps[t].at * stride + c + k]);
    for (int64_t k = 0; k < size; ++k) out[c + k] = rounded<Out>(sum[k]);
  }
}

// A row of the result: x + bias + what it reads of L lines, cut at 0 if so asked
template <class S, class T>
SEGKERN_CLONES void sum_row(const S* x /*[w, E]*/, const T* bias, const T* const* lines,
                            const Taps<T>* columns, int64_t L, int64_t w, int64_t E, bool relu,
                            T* sum /*[E]*/, S* out) {
  for (int64_t j = 0; j < w; ++j, x += E, out += E) {
#pragma omp simd
    for (int64_t c = 0; c < E; ++c) sum[c] = widened<T>(x[c]) + bias[c];
    for (int64_t l = 0; l < L; ++l) {
      const Tap<T>* taps = columns[l][j].data();
      const T *a = lines[l] + taps[0].at * E, share = taps[0].weight;
      if (columns[l][j].size() == 1) {
#pragma omp simd
        for (int64_t c = 0; c < E; ++c) sum[c] += a[c];
        continue;
      }
      const T *b = lines[l] + taps[1].at * E, rest = taps[1].weight;
#pragma omp simd
      for (int64_t c = 0; c < E; ++c) sum[c] += share * a[c] + rest * b[c];
    }
    if (relu)
#pragma omp simd
      for (int64_t c = 0; c < E; ++c) sum[c] = sum[c] < T(0) ? T(0) : sum[c];  // NaN stays
#pragma omp simd
    for (int64_t c = 0; c < E; ++c) out[c] = rounded<S>(sum[c]);
  }
}

int64_t grain(int64_t values) { return 1 + 32768 / (values + 1); }  // rows of a thread at least

template <class S, class T>
void run(const std::vector<Tensor>& maps, const T* bias, bool relu, const Tensor& out) {
  const int64_t B = out.size(0), h = out.size(1), w = out.size(2), E = out.size(3);
  const int64_t L = static_cast<int64_t>(maps.size()) - 1;
  const S* first = static_cast<const S*>(maps[0].const_data_ptr());
  S* to = static_cast<S*>(out.mutable_data_ptr());
  std::vector<Taps<T>> rows, columns;
  std::vector<int64_t> start{0};  // of each map's line
  for (int64_t l = 1; l <= L; ++l) {
    rows.push_back(taps_of<T>(maps[l].size(1), h));
    columns.push_back(taps_of<T>(maps[l].size(2), w));
    start.push_back(start.back() + maps[l].size(2) * E);
  }
  parallel_for(0, B * h, grain(w * E), [&](int64_t begin, int64_t end) {
    const Scratch<T> memory(start.back()), sum(E);
    std::vector<const T*> lines;
    for (int64_t l = 0; l < L; ++l) lines.push_back(memory.get() + start[l]);
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t l = 0; l < L; ++l) {
        const int64_t size = start[l + 1] - start[l];
        const S* map = static_cast<const S*>(maps[l + 1].const_data_ptr());
        const auto& taps = rows[l][i % h];
        weighted_sum(map + i / h * maps[l + 1].size(1) * size, size, taps.data(),
                     static_cast<int64_t>(taps.size()), size, memory.get() + start[l]);
      }
      sum_row(first + i * w * E, bias, lines.data(), columns.data(), L, w, E, relu, sum.get(),
              to + i * w * E);
    }
  });
}

template <class S, class T>
void run_backward(const Tensor& grad, const Tensor& out) {
  const int64_t h = grad.size(1), w = grad.size(2), E = grad.size(3);
  const int64_t B = out.size(0), H = out.size(1), W = out.size(2);
  const S* from = static_cast<const S*>(grad.const_data_ptr());
  S* to = static_cast<S*>(out.mutable_data_ptr());
  const Taps<T> rows = takers_of<T>(H, h), columns = takers_of<T>(W, w);
  parallel_for(0, B * H, grain(h * w * E / H), [&](int64_t begin, int64_t end) {
    const Scratch<T> line(w * E);
    for (int64_t i = begin; i < end; ++i) {
      const auto& down = rows[i % H];
      weighted_sum(from + i / H * h * w * E, w * E, down.data(), static_cast<int64_t>(down.size()),
                   w * E, line.get());
      for (int64_t j = 0; j < W; ++j)
        weighted_sum(line.get(), E, columns[j].data(), static_cast<int64_t>(columns[j].size()), E,
                     to + (i * W + j) * E);
    }
  });
}

Tensor resize_sum(std::vector<Tensor> maps, std::optional<Tensor> bias, bool relu) {
  STD_TORCH_CHECK(!maps.empty(), "resize_sum: a map expected");
  const int64_t B = maps[0].size(0), E = maps[0].size(3);
  for (Tensor& map : maps) {
    STD_TORCH_CHECK(map.dim() == 4 && map.size(0) == B && map.size(3) == E &&
                        map.size(1) * map.size(2) > 0 &&
                        map.scalar_type() == maps[0].scalar_type(),
                    "resize_sum: maps that do not fit");
    map = torch::stable::contiguous(map);
  }
  STD_TORCH_CHECK(!bias || bias->numel() == E, "resize_sum: bias must have E values");
  const Tensor out = empty_as(maps[0], {B, maps[0].size(1), maps[0].size(2), E});
  dispatch_storage(out, "resize_sum", [&](auto storage, auto zero) {
    using T = decltype(zero);
    const Tensor shift = bias ? dense<T>(*bias) : zeros<T>(out, {E});
    run<decltype(storage), T>(maps, data<T>(shift), relu, out);
  });
  return out;
}

std::vector<Tensor> resize_sum_backward(Tensor grad, IntList sizes) {
  const Tensor from = torch::stable::contiguous(grad);
  std::vector<Tensor> found;
  for (size_t i = 0; i + 1 < sizes.size(); i += 2) {
    STD_TORCH_CHECK(sizes[i] > 0 && sizes[i + 1] > 0,
                    "resize_sum_backward: sizes above 0 expected");
    found.push_back(empty_as(grad, {grad.size(0), sizes[i], sizes[i + 1], grad.size(3)}));
    dispatch_storage(grad, "resize_sum_backward", [&](auto storage, auto zero) {
      run_backward<decltype(storage), decltype(zero)>(from, found.back());
    });
  }
  return found;
}

}  // namespace
}  // namespace segkern

STABLE_TORCH_LIBRARY_IMPL(segkern, CPU, m) {
  m.impl("resize_sum", TORCH_BOX(&segkern::resize_sum));
  m.impl("resize_sum_backward", TORCH_BOX(&segkern::resize_sum_backward));
}
