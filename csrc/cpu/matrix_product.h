// A large matrix product out of the tiles of tile.h, all strides free, whose end (bias,
// activation, sums) runs while a piece of the result is still in the first cache. Letters: M rows,
// N columns of the result, K what is summed over.
//
// A task copies a group of b's columns to dense panels that stay in the second cache, and takes
// its rows through all of them, a chunk after another: a chunk's results then lie side by side.
// The copy is one pass over b, little beside the products of a few hundred rows, so that nothing
// is kept between calls and a weight may change whenever it likes.
#pragma once

#include "tile.h"

namespace segkern {

template <class T>
struct Matrix {
  const T* data;
  int64_t row, column;  // strides
  Matrix at(int64_t r, int64_t c) const { return {data + r * row + c * column, row, column}; }
};

template <class T>
constexpr int64_t kPanel = 2 * kLanes<T>;     // columns
constexpr int64_t kDepth = 256;               // of K summed in registers: short chains round less
constexpr int64_t kChunk = 24;                // rows whose sums stay in the first cache
constexpr int64_t kGroup = int64_t{1} << 18;  // bytes of the panels of a group
constexpr int64_t kRows = 10 * kChunk;        // that a copied group should serve

// panels[l, k, j] = b[k, l lanes + j] for n columns, rounded up to panels; zero from column n on
template <class T>
void pack(const Matrix<T>& b, int64_t K, int64_t n, T* panels /*[n / lanes, K, lanes]*/) {
  constexpr int64_t L = kLanes<T>;
  const int64_t whole = n / L * L, all = (n + kPanel<T> - 1) / kPanel<T> * kPanel<T>;
  int64_t done = 0;  // of K in the whole lines
  if (b.row == 1) {
    done = K / L * L;
    for (int64_t j = 0; j < whole; j += L)
      tiles<T>().transpose(b.at(0, j).data, b.column, done, panels + j * K);
  }
  for (int64_t k = 0; k < K; ++k) {  // b's rows as they lie in memory
    const T* from = b.at(k, 0).data;
    T* to = panels + k * L;
    int64_t j = k < done ? whole : 0;
    if (b.column == 1)
      for (; j < whole; j += L) std::memcpy(to + j * K, from + j, L * sizeof(T));
    for (; j < all; ++j) to[j / L * L * K + j % L] = j < n ? from[j * b.column] : T(0);
  }
}

// chunks[c, k, i] = a[c kChunk + i, k], for n rows: a line of `a` lies across them
template <class T>
void copy_rows(const Matrix<T>& a, int64_t K, int64_t n, T* chunks /*[n / kChunk, K, kChunk]*/) {
  for (int64_t k = 0; k < K; ++k, chunks += kChunk) {
    const T* from = a.data + k * a.column;
    T* to = chunks;
    int64_t left = n;
    for (; a.row == 1 && left >= kChunk; left -= kChunk, from += kChunk, to += K * kChunk)
      std::memcpy(to, from, kChunk * sizeof(T));
    for (int64_t i = 0; i < left; ++i) to[i / kChunk * K * kChunk + i % kChunk] = from[i * a.row];
  }
}

// Calls end(sums [rows, kPanel], row, rows, column, columns) for rows [top, bottom) of `a` times
// columns [left, right), of which `left` is the first in the panels.
template <class T, class End>
void multiply_rows(const Matrix<T>& a, int64_t top, int64_t bottom, const T* panels, int64_t left,
                   int64_t right, int64_t K, T* sums /*[kChunk, kPanel]*/, const End& end) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t r = top; r < bottom; r += kChunk) {
    const int64_t rows = std::min(kChunk, bottom - r);
    const T* panel = panels;
    for (int64_t c = left; c < right; c += kPanel<T>, panel += K * kPanel<T>) {
      const int64_t columns = std::min(right - c, kPanel<T>);
      for (int64_t k = 0; k == 0 || k < K; k += kDepth)
        tiles<T>().product(a.at(r, k).data, a.row, a.column, rows, panel + k * L, L, K * L,
                           std::min(K - k, kDepth), columns > L ? 2 : 1, sums, kPanel<T>, k > 0);
      end(sums, r, rows, c, columns);
    }
  }
}

// The same for all pieces of a b, on all threads.
template <class T, class End>
void multiply(const Matrix<T>& a, const Matrix<T>& b, int64_t M, int64_t N, int64_t K,
              const End& end) {
  if (M == 0 || N == 0) return;
  const auto parts = [](int64_t n, int64_t most) { return (n + most - 1) / most; };
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t panels = parts(N, kPanel<T>), size = std::max<int64_t>(K, 1) * kPanel<T>;
  int64_t wide = std::clamp<int64_t>(kGroup / int64_t(size * sizeof(T)), 1, panels);
  // some tasks more than threads, as another process may slow one of these
  const int64_t tasks = threads > 1 ? 4 * threads : 1;
  const bool copied = a.column != 1;  // a task copies its rows as well
  int64_t blocks = parts(M, kRows);
  if (!copied) blocks = std::clamp<int64_t>(tasks / parts(panels, wide), 1, blocks);
  wide = std::clamp<int64_t>(panels * blocks / tasks, 1, wide);
  const int64_t rows = parts(parts(M, blocks), kChunk) * kChunk, groups = parts(panels, wide);
  struct Memory {
    Scratch<T> panels, rows, sums;
  };
  const auto make = [&] {
    return Memory{Scratch<T>(wide * size), Scratch<T>(copied ? K * rows : 0),
                  Scratch<T>(kChunk * kPanel<T>)};
  };
  run_tasks(parts(M, rows) * groups, make, [&](int64_t task, Memory& memory) {
    const int64_t top = task / groups * rows, bottom = std::min(top + rows, M);
    const int64_t left = task % groups * wide * kPanel<T>;
    const int64_t right = std::min(left + wide * kPanel<T>, N);
    T *packed = memory.panels.get(), *sums = memory.sums.get(), *lines = memory.rows.get();
    pack(b.at(0, left), K, right - left, packed);
    if (!copied) return multiply_rows(a, top, bottom, packed, left, right, K, sums, end);
    copy_rows(a.at(top, 0), K, bottom - top, lines);
    for (int64_t r = top; r < bottom; r += kChunk, lines += kChunk * K)
      multiply_rows<T>({lines, 1, kChunk}, 0, std::min(kChunk, bottom - r), packed, left, right, K,
                       sums, [&](const T* sums, int64_t, int64_t n, int64_t c, int64_t columns) {
                         end(sums, r, n, c, columns);
                       });
  });
}

}  // namespace segkern
