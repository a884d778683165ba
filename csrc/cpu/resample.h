// Mask logits at the resolution of the result: resized to the padded input, cropped to the image,
// resized to the output (bilinear, align_corners=False, no antialiasing), the two steps composed.
// Blocks of the result are made one at a time: a window of the logits is read, widened to the
// block's columns by a small product, and its rows are blended. Letters: Q query, C channel,
// h w mask logits, S rows of a window.
#pragma once

#include <algorithm>
#include <numeric>
#include <optional>

#include "simd_math.h"
#include "tile.h"

namespace segkern {

constexpr double kFarthest = 1e30;  // bound of a logit's magnitude; NaN becomes its negative

// What position i of a line of `in` samples resized to `out` reads: a, and b with `weight`.
struct Pair {
  int64_t a, b;
  double weight;
};

inline Pair resized(int64_t i, int64_t in, int64_t out) {
  const int64_t place = (2 * i + 1) * in - out;  // in units of 1 / (2 out)
  if (place <= 0) return {0, 0, 0.0};
  const int64_t a = place / (2 * out);
  return {a, std::min(a + 1, in - 1), double(place % (2 * out)) / double(2 * out)};
}

// What one position reads of a line of the mask logits; places not needed have weight 0.
struct Taps {
  int64_t at[4] = {};
  double weight[4] = {};
  int n = 0;
  void add(int64_t place, double w) {
    if (w == 0.0) return;
    int k = 0;
    while (k < n && at[k] != place) ++k;
    if (k == n) std::fill(at + n++, at + 4, place);  // the rest reads what is read anyway
    weight[k] += w;
  }
  int64_t first() const { return *std::min_element(at, at + 4); }
  int64_t last() const { return *std::max_element(at, at + 4); }
};

// Positions along one axis at which mask logits are needed, and what an output position reads of
// them. Where the logits are resized to the output, both are the same; where scores made of them
// at the image's size are resized, an output reads two.
struct Axis {
  Axis(int64_t source, int64_t padded, int64_t image, int64_t output, bool scores)
      : two(scores && image != output) {
    const auto add = [&](Taps& to, int64_t place, double w) {
      const Pair p = resized(place, source, padded);
      to.add(p.a, w * (1.0 - p.weight));
      to.add(p.b, w * p.weight);
    };
    const bool apart = two && image >= 2 * output;  // then no two outputs share a position
    taps.resize(apart ? 2 * output : two ? image : output);
    for (int64_t i = 0; i < output; ++i) {
      const Pair p = resized(i, image, output);
      if (apart) {
        pairs.push_back({2 * i, 2 * i + 1, p.weight});
        add(taps[2 * i], p.a, 1.0);
        add(taps[2 * i + 1], p.b, 1.0);
      } else if (two) {
        pairs.push_back(p);
      } else {
        pairs.push_back({i, i, 0.0});
        add(taps[i], p.a, 1.0 - p.weight);
        add(taps[i], p.b, p.weight);
      }
    }
    if (two && !apart)
      for (int64_t i = 0; i < image; ++i) add(taps[i], i, 1.0);
  }
  int64_t size() const { return static_cast<int64_t>(pairs.size()); }
  bool two;
  std::vector<Taps> taps;
  std::vector<Pair> pairs;  // of an output position: places in `taps`
};

// Columns by groups of a tile's lanes: column j of group g is the sum of the source's columns from
// first[g] on, weighted by its tile [span, lanes].
template <class T>
struct Columns {
  explicit Columns(const std::vector<Taps>& taps) {
    const int64_t n = static_cast<int64_t>(taps.size());
    for (int64_t g = 0; g < n; g += kLanes<T>) {
      const int64_t end = std::min(n, g + kLanes<T>);
      int64_t low = taps[g].first(), high = taps[g].last();
      for (int64_t j = g + 1; j < end; ++j) {
        low = std::min(low, taps[j].first());
        high = std::max(high, taps[j].last());
      }
      first.push_back(low);
      last.push_back(high);
      tile.push_back(static_cast<int64_t>(weight.size()));
      weight.resize(weight.size() + (high - low + 1) * kLanes<T>, T(0));
      for (int64_t j = g; j < end; ++j)
        for (int k = 0; k < taps[j].n; ++k)
          weight[tile.back() + (taps[j].at[k] - low) * kLanes<T> + j - g] +=
              static_cast<T>(taps[j].weight[k]);
    }
  }
  std::vector<int64_t> first, last, tile;
  std::vector<T> weight;
};

// Outputs [begin, end) along one axis, the positions they need (of columns: in whole groups), and
// the window of the source that these read.
struct Span {
  int64_t begin, end, first, last, low, size;
};

struct Block {
  Span rows, columns;
  int64_t area() const { return rows.size * columns.size; }
};

template <class T>
struct Row {  // the taps of a row, within a window
  int32_t at[4];
  T weight[4];
};

// The blocks of one image.
template <class T>
struct Blocks {
  Blocks(const Axis& y, const Axis& x, int64_t most_rows, int64_t most_columns)
      : y(y), x(x), columns(x.taps) {
    // small enough that what a block needs stays in cache
    for (;; most_rows /= 2) {
      rows = row_spans(most_rows);
      lines = most_positions(rows);
      if (most_rows == 1 || (lines <= 20 && largest(rows) <= 16)) break;
    }
    for (;; most_columns /= 2) {
      strips = column_spans(most_columns);
      groups = most_positions(strips);
      if (most_columns <= kLanes<T> || (groups * kLanes<T> <= 96 && largest(strips) <= 64)) break;
    }
    area = largest(rows) * largest(strips);
  }
  void taps(const Span& s, Row<T>* out /*[last - first]*/) const {
    for (int64_t r = s.first; r < s.last; ++r) {
      for (int t = 0; t < 4; ++t) {
        out[r - s.first].at[t] = static_cast<int32_t>(y.taps[r].at[t] - s.low);
        out[r - s.first].weight[t] = static_cast<T>(y.taps[r].weight[t]);
      }
    }
  }
  int64_t height() const { return largest(rows); }
  const Axis &y, &x;
  Columns<T> columns;
  std::vector<Span> rows, strips;
  int64_t area, lines, groups;  // largest: pixels of a window, rows and groups of a block

 private:
  static int64_t largest(const std::vector<Span>& spans) {
    int64_t size = 0;
    for (const Span& s : spans) size = std::max(size, s.size);
    return size;
  }
  static int64_t most_positions(const std::vector<Span>& spans) {
    int64_t n = 0;
    for (const Span& s : spans) n = std::max(n, s.last - s.first);
    return n;
  }
  std::vector<Span> row_spans(int64_t most) const {
    std::vector<Span> out;
    for (int64_t i = 0; i < y.size(); i += most) {
      const int64_t end = std::min(y.size(), i + most);
      Span s{i, end, y.pairs[i].a, y.pairs[end - 1].b + 1, 0, 0};
      int64_t last = y.taps[s.first].last();
      s.low = y.taps[s.first].first();
      for (int64_t r = s.first; r < s.last; ++r) {
        s.low = std::min(s.low, y.taps[r].first());
        last = std::max(last, y.taps[r].last());
      }
      s.size = last - s.low + 1;
      out.push_back(s);
    }
    return out;
  }
  std::vector<Span> column_spans(int64_t most) const {
    constexpr int64_t G = kLanes<T>;
    std::vector<Span> out;
    for (int64_t i = 0; i < x.size(); i += most) {
      const int64_t end = std::min(x.size(), i + most);
      Span s{i, end, x.pairs[i].a / G, x.pairs[end - 1].b / G + 1, 0, 0};
      const auto low = columns.first.begin(), high = columns.last.begin();
      s.low = *std::min_element(low + s.first, low + s.last);
      s.size = *std::max_element(high + s.first, high + s.last) - s.low + 1;
      out.push_back(s);
    }
    return out;
  }
};

template <class T>
SEGKERN_INLINE T bounded(T x) {
  const T low = x > T(-kFarthest) ? x : T(-kFarthest);  // NaN too
  return low < T(kFarthest) ? low : T(kFarthest);
}

// A window of one map, dense.
template <class S, class T>
SEGKERN_CLONES void copy_window(const S* map, int64_t stride, int64_t rows, int64_t columns,
                                T* out /*[rows, columns]*/) {
  for (int64_t y = 0; y < rows; ++y) {
    const S* from = map + y * stride;
    T* to = out + y * columns;
#pragma omp simd
    for (int64_t x = 0; x < columns; ++x) to[x] = bounded(static_cast<T>(from[x]));
  }
}

// A window of features as tiles [groups of pixels, C, lanes]; the last tile ends in zeros.
template <class S, class T>
SEGKERN_CLONES void copy_features(const S* map, int64_t channel, int64_t stride, int64_t C,
                                  int64_t rows, int64_t columns, T* line /*[pixels]*/, T* out) {
  constexpr int64_t G = kLanes<T>;
  const int64_t n = (rows * columns + G - 1) / G;
  for (int64_t p = rows * columns; p < n * G; ++p) line[p] = T(0);
  for (int64_t c = 0; c < C; ++c) {
    for (int64_t y = 0; y < rows; ++y) {
      const S* from = map + c * channel + y * stride;
      T* to = line + y * columns;
#pragma omp simd
      for (int64_t x = 0; x < columns; ++x) to[x] = static_cast<T>(from[x]);
    }
    for (int64_t p = 0; p < n; ++p) {
#pragma omp simd
      for (int64_t j = 0; j < G; ++j) out[(p * C + c) * G + j] = line[p * G + j];
    }
  }
}

template <class T>
SEGKERN_CLONES void copy_bounded(const T* x, int64_t n, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = bounded(x[i]);
}

template <class T>
SEGKERN_CLONES void extremes(const T* x, int64_t n, T* low, T* high) {
  T a = x[0], b = x[0];
#pragma omp simd reduction(min : a) reduction(max : b)
  for (int64_t i = 0; i < n; ++i) {
    a = x[i] < a ? x[i] : a;
    b = x[i] > b ? x[i] : b;
  }
  *low = a;
  *high = b;
}

// The mask logits of one batch, stored, or as the product of embeddings and features.
template <class T>
class Maps {
 public:
  Maps(const Tensor& masks, const std::optional<Tensor>& features)
      : maps_(rows_dense(features ? *features : masks)),
        Q_(masks.size(1)),
        embed_(features ? dense<T>(masks) : Tensor()),
        product_(features.has_value()),
        C_(product_ ? masks.size(2) : 0) {
    dispatch_storage(maps_, "segment_map", [&](auto storage, auto) {
      using S = decltype(storage);
      read_ = &Maps::template read<S>;
    });
  }
  int64_t queries() const { return Q_; }
  int64_t h() const { return maps_.size(2); }
  int64_t w() const { return maps_.size(3); }
  int64_t scratch(int64_t pixels) const {
    return product_ ? (pixels + kLanes<T> - 1) / kLanes<T> * kLanes<T> * (C_ + 1) : 0;
  }
  // Windows [n, S, X] of n queries of image b.
  void load(int64_t b, const Block& k, const int32_t* query, int64_t n, T* scratch,
            T* line /*[n, lanes]*/, T* out) const {
    (this->*read_)(b, k, query, n, scratch, line, out);
  }

 private:
  static Tensor rows_dense(const Tensor& t) {
    return t.size(3) == 1 || t.stride(3) == 1 ? t : torch::stable::contiguous(t);
  }
  template <class S>
  void read(int64_t b, const Block& k, const int32_t* query, int64_t n, T* scratch, T* line,
            T* out) const {
    const int64_t stride = maps_.stride(2), map = maps_.stride(1), area = k.area();
    const S* base = static_cast<const S*>(maps_.const_data_ptr()) + b * maps_.stride(0) +
                    k.rows.low * stride + k.columns.low;
    if (!product_) {
      for (int64_t i = 0; i < n; ++i)
        copy_window<S, T>(base + query[i] * map, stride, k.rows.size, k.columns.size,
                          out + i * area);
      return;
    }
    constexpr int64_t G = kLanes<T>;
    T* panel = scratch + (area + G - 1) / G * G;
    copy_features<S, T>(base, map, stride, C_, k.rows.size, k.columns.size, scratch, panel);
    for (int64_t p = 0; p < area; p += G) {
      tiles<T>().dot(data<T>(embed_) + b * Q_ * C_, C_, query, n, panel + p * C_, C_, line);
      for (int64_t i = 0; i < n; ++i)
        copy_bounded(line + i * G, std::min(G, area - p), out + i * area + p);
    }
  }
  Tensor maps_;
  int64_t Q_;
  Tensor embed_;
  bool product_;
  int64_t C_;
  void (Maps::*read_)(int64_t, const Block&, const int32_t*, int64_t, T*, T*, T*) const;
};

// Windows to the block's columns. `line` names the rows of the windows wanted.
template <class T>
void widen(const Columns<T>& columns, const Block& k, const T* windows, const int32_t* line,
           int64_t lines, T* out /*[groups, lines, lanes]*/) {
  for (int64_t g = k.columns.first; g < k.columns.last; ++g) {
    tiles<T>().dot(windows + columns.first[g] - k.columns.low, k.columns.size, line, lines,
                   columns.weight.data() + columns.tile[g], columns.last[g] - columns.first[g] + 1,
                   out + (g - k.columns.first) * lines * kLanes<T>);
  }
}

// Row r of one query and group: x[j], j < lanes, from its wide rows.
template <class T>
SEGKERN_INLINE void blend(const T* wide /*[S, lanes]*/, const Row<T>& row, T* x) {
  constexpr int64_t G = kLanes<T>;
  const T *a = wide + row.at[0] * G, *b = wide + row.at[1] * G;
  const T *c = wide + row.at[2] * G, *d = wide + row.at[3] * G;
#pragma omp simd
  for (int64_t j = 0; j < G; ++j)
    x[j] =
        row.weight[0] * a[j] + row.weight[1] * b[j] + row.weight[2] * c[j] + row.weight[3] * d[j];
}

// How far rounding can move a sum of n terms, relative to the sum of their magnitudes; generous.
template <class T>
T rounding(int64_t n) {
  return std::numeric_limits<T>::epsilon() * T(4 * (n + 16));
}

// Of the padded input, the image in it and the result.
struct Sizes {
  explicit Sizes(const IntList& s)
      : padded_h(s.at(0)),
        padded_w(s.at(1)),
        image_h(s.at(2)),
        image_w(s.at(3)),
        H(s.at(4)),
        W(s.at(5)) {
    STD_TORCH_CHECK(
        *std::min_element(s.begin(), s.end()) > 0 && image_h <= padded_h && image_w <= padded_w,
        "segment_map: sizes must be positive, the image within the padded input");
  }
  int64_t padded_h, padded_w, image_h, image_w, H, W;
};

// Windows and wide rows of up to n queries, for one thread.
template <class T>
struct Memory {
  Memory(const Maps<T>& maps, const Blocks<T>& blocks, int64_t n)
      : windows(n * blocks.area),
        wide(blocks.groups * n * blocks.height() * kLanes<T>),
        features(maps.scratch(blocks.area)),
        product(n * kLanes<T>),
        low(n),
        high(n),
        line(n * blocks.height()),
        row(blocks.lines) {}
  // The windows of `query`, and the bounds of the logits made of them.
  void load(const Maps<T>& maps, int64_t b, const Block& k, const std::vector<int32_t>& query) {
    const int64_t n = static_cast<int64_t>(query.size());
    maps.load(b, k, query.data(), n, features.get(), product.get(), windows.get());
    for (int64_t i = 0; i < n; ++i) {
      extremes(windows.get() + i * k.area(), k.area(), &low[i], &high[i]);
      low[i] -= rounding<T>(8) * std::abs(low[i]);  // the signs stay
      high[i] += rounding<T>(8) * std::abs(high[i]);
    }
  }
  // The wide rows of the windows in `order`, and the taps of the block's rows.
  void open(const Blocks<T>& blocks, const Block& k, const std::vector<int32_t>& order) {
    lines = static_cast<int64_t>(order.size()) * k.rows.size;
    int32_t* to = line.get();
    for (const int32_t i : order)
      for (int64_t s = 0; s < k.rows.size; ++s) *to++ = static_cast<int32_t>(i * k.rows.size + s);
    widen(blocks.columns, k, windows.get(), line.get(), lines, wide.get());
    blocks.taps(k.rows, row.get());
  }
  // Of the i-th in that order, group g of the block.
  const T* rows_of(const Block& k, int64_t i, int64_t g) const {
    return wide.get() + (g * lines + i * k.rows.size) * kLanes<T>;
  }
  Scratch<T> windows, wide, features, product, low, high;
  Scratch<int32_t> line;
  Scratch<Row<T>> row;
  int64_t lines = 0;
};

// x = the logits of one query in a block
template <class T>
SEGKERN_CLONES void blend_block(const T* wide, int64_t group_stride, int64_t groups,
                                const Row<T>* row, int64_t rows, T* x /*[rows, groups, lanes]*/) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t g = 0; g < groups; ++g)
      blend(wide + g * group_stride, row[r], x + (r * groups + g) * kLanes<T>);
}

template <class T>
void blend_block(const Memory<T>& m, const Block& k, int64_t i, T* x) {
  blend_block(m.rows_of(k, i, 0), m.lines * kLanes<T>, k.columns.last - k.columns.first,
              m.row.get(), k.rows.end - k.rows.begin, x);
}

}  // namespace segkern
