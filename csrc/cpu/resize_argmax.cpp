// resize_argmax on the CPU: the rows that an output row reads are blended into one row of each
// class; then a tile of pixels goes through the classes and keeps the best.
// Letters: B image, K class, h w size of the maps, H W size of the result, G lanes of a tile.
#include "tile.h"

namespace segkern {
namespace {

// The entries of a matrix [n, m] that are not 0, row by row.
template <class T>
struct Sparse {
  Sparse(const T* x, int64_t n, int64_t m) : start{0} {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < m; ++j)
        if (x[i * m + j] != T(0)) at.push_back(j), weight.push_back(x[i * m + j]);
      start.push_back(static_cast<int64_t>(at.size()));
    }
  }
  std::vector<int64_t> start, at;
  std::vector<T> weight;
};

// Of each G output columns: the columns they read, and a tile [those, G] of weights.
template <class T>
struct Groups {
  Groups(const T* x /*[W, w]*/, int64_t W, int64_t w) : start{0} {
    constexpr int64_t G = kLanes<T>;
    for (int64_t g = 0; g < W; g += G) {
      for (int64_t j = 0; j < w; ++j) {
        T tile[G] = {};
        bool used = false;
        for (int64_t i = g; i < std::min(W, g + G); ++i) {
          tile[i - g] = x[i * w + j];
          used |= tile[i - g] != T(0);
        }
        if (!used) continue;
        at.push_back(j);
        weight.insert(weight.end(), tile, tile + G);
      }
      start.push_back(static_cast<int64_t>(at.size()));
    }
  }
  std::vector<int64_t> start, at;
  std::vector<T> weight;
};

// line[k] = sum of n rows of map k
template <class S, class T>
SEGKERN_CLONES void blend_rows(const S* maps /*[K, h, w]*/, int64_t K, int64_t h, int64_t w,
                               const int64_t* at, const T* weight, int64_t n, T* line /*[K, w]*/) {
  for (int64_t k = 0; k < K; ++k) {
    T* to = line + k * w;
    for (int64_t j = 0; j < w; ++j) to[j] = T(0);
    for (int64_t t = 0; t < n; ++t) {
      const S* from = maps + (k * h + at[t]) * w;
#pragma omp simd
      for (int64_t j = 0; j < w; ++j) to[j] += weight[t] * static_cast<T>(from[j]);
    }
  }
}

// The first of the highest logits of G pixels, which read n columns of each line.
template <class T>
SEGKERN_CLONES void pick(const T* line /*[K, w]*/, int64_t K, int64_t w, const int64_t* at,
                         const T* weight /*[n, G]*/, int64_t n, int32_t* out /*[G]*/) {
  typedef T Values __attribute__((vector_size(64)));
  using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef Index Indices __attribute__((vector_size(64)));
  Values top = Values{} - std::numeric_limits<T>::infinity();
  Indices best = {};
  for (int64_t k = 0; k < K; ++k) {
    Values x = {};
    for (int64_t t = 0; t < n; ++t) {
      Values w_t;
      std::memcpy(&w_t, weight + t * kLanes<T>, sizeof(w_t));
      x += line[k * w + at[t]] * w_t;
    }
    best = x > top ? Indices{} + static_cast<Index>(k) : best;
    top = x > top ? x : top;
  }
  for (int64_t j = 0; j < kLanes<T>; ++j) out[j] = static_cast<int32_t>(best[j]);
}

template <class S, class T>
void run(const Tensor& maps, const Tensor& rows, const Tensor& columns, const Tensor& out) {
  constexpr int64_t G = kLanes<T>;
  const Tensor from = torch::stable::contiguous(maps);
  const int64_t B = maps.size(0), K = maps.size(1), h = maps.size(2), w = maps.size(3);
  const int64_t H = rows.size(0), W = columns.size(0), groups = (W + G - 1) / G;
  const Sparse<T> y(data<T>(dense<T>(rows)), H, h);
  const Groups<T> x(data<T>(dense<T>(columns)), W, w);
  const S* source = static_cast<const S*>(from.const_data_ptr());
  int32_t* to = mutable_data<int32_t>(out);
  parallel_for(0, B * H, 8, [&](int64_t begin, int64_t end) {
    const Scratch<T> line(K * w);
    const Scratch<int32_t> best(groups * G);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = y.start[i % H];
      blend_rows(source + i / H * K * h * w, K, h, w, y.at.data() + first, y.weight.data() + first,
                 y.start[i % H + 1] - first, line.get());
      for (int64_t g = 0; g < groups; ++g)
        pick(line.get(), K, w, x.at.data() + x.start[g], x.weight.data() + x.start[g] * G,
             x.start[g + 1] - x.start[g], best.get() + g * G);
      std::copy_n(best.get(), W, to + i * W);
    }
  });
}

Tensor resize_argmax(Tensor maps, Tensor rows, Tensor columns) {
  STD_TORCH_CHECK(rows.size(1) == maps.size(2) && columns.size(1) == maps.size(3),
                  "resize_argmax: sizes that do not fit");
  const Tensor out = empty<int32_t>(maps, {maps.size(0), rows.size(0), columns.size(0)});
  dispatch_storage(maps, "resize_argmax", [&](auto storage, auto zero) {
    run<decltype(storage), decltype(zero)>(maps, rows, columns, out);
  });
  return out;
}

}  // namespace
}  // namespace segkern

STABLE_TORCH_LIBRARY_IMPL(segkern, CPU, m) {
  m.impl("resize_argmax", TORCH_BOX(&segkern::resize_argmax));
}
