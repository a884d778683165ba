// What neighborhood_attn reads and writes on the CPU: rows of queries of one head and group of
// rows, one after another; their rows of keys and values stay in the cache, turned so that 16
// pixels are a vector, each copied once. The queries of a row stand in the order of their first
// keys: a line of them reads one line of keys, also at the border and between dilated groups.
// Letters: B image, h w map, H head, D channel a head, K kernel, t dilation; E is D rounded up to
// whole lines of G values (16 in float, 8 in double), W a row's pixels with room for a line.
#pragma once

#include <numeric>

#include "heads.h"
#include "neighbors.h"
#include "simd_math.h"

namespace segkern {

constexpr int64_t kTasks = 64;  // about; from the shape alone: sums never depend on threads

// One axis of the map: pixel i is place i / t of group i % t.
struct Axis {
  int64_t length, kernel, dilation;
  int64_t places(int64_t group) const { return (length - group + dilation - 1) / dilation; }
  int64_t start(int64_t place, int64_t group) const {
    return std::clamp<int64_t>(place - kernel / 2, 0, places(group) - kernel);
  }
  int64_t table() const { return 2 * kernel - 1; }
};

struct Sizes {
  int64_t B, H, D, E, W;
  Axis y, x;
  int64_t groups() const { return B * H * y.dilation; }
  // parts of a group's rows, each of two kernels at least: a part reads rows of its neighbours
  int64_t chunks() const {
    const int64_t wanted = kTasks / std::clamp<int64_t>(groups(), 1, kTasks);
    return std::clamp<int64_t>(y.length / y.dilation / (2 * y.kernel), 1, wanted);
  }
  int64_t tasks() const { return groups() * chunks(); }
  int64_t area() const { return y.kernel * x.kernel; }
  Reach reach() const { return {y.kernel, x.kernel, x.dilation}; }
};

template <class T>
Sizes sizes_of(const Tensor& q, const IntList& kernel, const IntList& dilation) {
  constexpr int64_t G = kLanes<T>;
  const int64_t D = q.size(4), w = q.size(2), lines = (w + G - 1) / G + 1;
  // an odd number of lines: channels one above the other share no place of the first cache
  return {q.size(0),
          q.size(3),
          D,
          (D + G - 1) / G * G,
          (lines | 1) * G,
          {q.size(1), kernel[0], dilation[0]},
          {w, kernel[1], dilation[1]}};
}

// The head, rows and image of a task.
struct Part {
  Part(const Sizes& n, int64_t task) {
    const int64_t group_of = task / n.chunks(), chunk = task % n.chunks();
    group = group_of % n.y.dilation;
    head = group_of / n.y.dilation % n.H;
    image = group_of / n.y.dilation / n.H;
    const int64_t places = n.y.places(group);
    begin = chunk * places / n.chunks(), end = (chunk + 1) * places / n.chunks();
  }
  int64_t image, head, group, begin,
      end;  // rows group + place t of the map, place in [begin, end)
};

// The queries of a row, whichever row it is: in lines, the last filled up with copies.
template <class T>
struct Queries {
  explicit Queries(const Axis& x) {
    constexpr int64_t G = kLanes<T>;
    const int64_t lines = (x.length + G - 1) / G;
    std::vector<int32_t> first(x.length), offset(x.length), order(x.length);
    for (int64_t i = 0; i < x.length; ++i) {
      const int64_t place = i / x.dilation, group = i % x.dilation, start = x.start(place, group);
      first[i] = static_cast<int32_t>(start * x.dilation + group);
      offset[i] = static_cast<int32_t>(start - place + x.kernel - 1);
    }
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return first[a] < first[b]; });
    order.resize(lines * G, order.empty() ? 0 : order.back());
    for (const int32_t i : order) {
      pixel.push_back(i);
      key.push_back(first[i]);
      bias.push_back(offset[i]);
    }
    for (int64_t line = 0; line < lines; ++line) {
      bool together = true;
      for (int64_t i = line * G; i < (line + 1) * G; ++i)
        together = together && key[i] == key[line * G] + i - line * G && bias[i] == bias[line * G];
      straight.push_back(together);
    }
  }
  std::vector<int32_t> pixel;     // its column
  std::vector<int32_t> key;       // the column of its first key
  std::vector<int32_t> bias;      // what belongs to that, in a row of the bias
  std::vector<uint8_t> straight;  // of a line: the keys lie side by side, and share their biases
};

// A [B, h, w, H, D] tensor whose channels are adjacent; the other strides are free.
template <class S>
struct Map {
  explicit Map(const Tensor& t)
      : tensor(t.size(4) == 1 || t.stride(4) == 1 ? t : torch::stable::contiguous(t)),
        base(static_cast<const S*>(tensor.const_data_ptr())) {}
  const S* at(int64_t b, int64_t y, int64_t h) const {
    return base + b * tensor.stride(0) + y * tensor.stride(1) + h * tensor.stride(3);
  }
  int64_t pixel() const { return tensor.stride(2); }
  Tensor tensor;
  const S* base;
};

// out[r, d] = scale x[pixel[r], d], with zeros from D to E and in all rows from `rows` on
template <class S, class T>
SEGKERN_CLONES void gather(const S* x, int64_t stride, const int32_t* pixel, int64_t rows,
                           int64_t D, T scale, int64_t E, T* out /*[lanes, E]*/) {
  for (int64_t r = 0; r < kLanes<T>; ++r, out += E) {
    const S* from = x + pixel[r] * stride;
    const int64_t n = r < rows ? D : 0;
#pragma omp simd
    for (int64_t d = 0; d < n; ++d) out[d] = scale * widened<T>(from[d]);
    for (int64_t d = n; d < E; ++d) out[d] = T(0);
  }
}

// to[pixel[r], d] = factor[r] x[d, r] of the first `rows`
template <class S, class T>
SEGKERN_CLONES void scatter(const T* x /*[E / lanes][lanes, lanes]*/, const T* factor,
                            const int32_t* pixel, int64_t rows, int64_t D, S* to, int64_t stride) {
  constexpr int64_t G = kLanes<T>;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t first = 0; first < D; first += G) {
      const T* line = x + first * G + r * G;
      S* out = to + pixel[r] * stride + first;
      const int64_t n = std::min(G, D - first);
#pragma omp simd
      for (int64_t d = 0; d < n; ++d) out[d] = rounded<S>(factor[r] * line[d]);
    }
  }
}

// A row of keys or values as lines of channels, [D, W]
template <class S, class T>
void turn_row(const S* x, int64_t stride, const Sizes& n, T* rows /*[lanes, E]*/,
              T* turned /*[E, lanes]*/, T* out) {
  constexpr int64_t G = kLanes<T>;
  for (int64_t i = 0; i < n.x.length; i += G) {
    const int64_t pixels = std::min(G, n.x.length - i);
    copy_lines<S, T>(x + i * stride, stride, pixels, n.D, T(1), G, n.E, rows);
    tiles<T>().transpose(rows, n.E, n.E, turned);
    for (int64_t d = 0; d < n.D; ++d) std::memcpy(out + d * n.W + i, turned + d * G, 64);
  }
}

// [D, lanes] back to rows, in squares of lanes x lanes
template <class T>
void turn_back(const T* x, const Sizes& n, T* out) {
  constexpr int64_t G = kLanes<T>;
  for (int64_t d = 0; d < n.D; d += G) tiles<T>().transpose(x + d * G, G, G, out + d * G);
}

// Scores become weights, not yet divided by their sums: x = exp(x + bias - their maximum)
template <class T>
SEGKERN_CLONES void softmax(const T* bias /*[rows, of its table]*/, int64_t stride,
                            const int32_t* offset /*[lanes]*/, bool straight, const Reach& n,
                            T* x /*[rows, columns, lanes]*/, T* total /*[lanes]*/) {
  constexpr int64_t G = kLanes<T>;
  T most[G], sum[G];
  for (int64_t i = 0; i < G; ++i) most[i] = -std::numeric_limits<T>::infinity(), sum[i] = T(0);
  T* line = x;
  for (int64_t a = 0; a < n.rows; ++a, bias += stride) {
    for (int64_t j = 0; j < n.columns; ++j, line += G) {
      if (straight) {
        const T add = bias[offset[0] + j];
#pragma omp simd
        for (int64_t i = 0; i < G; ++i) line[i] += add;
      } else {
#pragma omp simd
        for (int64_t i = 0; i < G; ++i) line[i] += bias[offset[i] + j];
      }
#pragma omp simd
      for (int64_t i = 0; i < G; ++i) most[i] = line[i] > most[i] ? line[i] : most[i];
    }
  }
  line = x;
  for (int64_t m = 0; m < n.rows * n.columns; ++m, line += G) {
#pragma omp simd
    for (int64_t i = 0; i < G; ++i) {
      const T weight = weight_of(line[i] - most[i]);
      line[i] = weight;
      sum[i] += weight;
    }
  }
  for (int64_t i = 0; i < G; ++i) total[i] = sum[i];
}

// What a line of queries needs, and the rows of keys and values around a row of queries: the row
// at place s of its group is the (s mod K)-th of `keys` and `values`.
template <class T>
struct Memory {
  explicit Memory(const Sizes& n)
      : keys(n.y.kernel * n.D * n.W),
        values(n.y.kernel * n.D * n.W),
        rows(kLanes<T> * n.E),
        turned(kLanes<T> * n.E),
        q(kLanes<T> * n.E),
        p(n.area() * kLanes<T>),
        out(kLanes<T> * n.E),
        total(kLanes<T>),
        key_rows(n.y.kernel),
        value_rows(n.y.kernel) {}
  Scratch<T> keys, values, rows, turned, q, p, out, total;
  std::vector<const T*> key_rows, value_rows;  // in the order of places
};

// Copies the rows of keys and values of a row of queries, but for those that are there from the
// row before: `next` is the first place that is not. Calls fresh(place) for each.
template <class S, class T, class Fresh>
void fetch(const Map<S>& k, const Map<S>& v, const Sizes& n, const Part& part, int64_t start,
           int64_t& next, Memory<T>& memory, const Fresh& fresh) {
  for (next = std::max(next, start); next < start + n.y.kernel; ++next) {
    fresh(next);
    const int64_t y = part.group + next * n.y.dilation, at = next % n.y.kernel * n.D * n.W;
    T *rows = memory.rows.get(), *turned = memory.turned.get();
    turn_row<S, T>(k.at(part.image, y, part.head), k.pixel(), n, rows, turned,
                   memory.keys.get() + at);
    turn_row<S, T>(v.at(part.image, y, part.head), v.pixel(), n, rows, turned,
                   memory.values.get() + at);
  }
  for (int64_t a = 0; a < n.y.kernel; ++a) {
    const int64_t at = (start + a) % n.y.kernel * n.D * n.W;
    memory.key_rows[a] = memory.keys.get() + at;
    memory.value_rows[a] = memory.values.get() + at;
  }
}

}  // namespace segkern
