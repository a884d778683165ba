// Maps of ids [l, H, W]: how often each id occurs, the rows and columns of a view, other ids in
// place of these. Knows NumPy arrays, no tensor. Ids come in runs, which are counted as such.
#include "host.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;
using Indices = Array<int64_t>;

// Where the run of row[x] ends; eight bytes at a time
template <typename T>
int64_t run_end(const T* row, int64_t x, int64_t W) {
  constexpr int64_t step = sizeof(uint64_t) / sizeof(T);
  const T id = row[x];
  T same[step];
  std::fill(same, same + step, id);
  while (x + step <= W && std::memcmp(row + x, same, sizeof(uint64_t)) == 0) x += step;
  while (x < W && row[x] == id) ++x;
  return x;
}

// Adds to counts[id - 1] how often ids of 1 to n occur in a row
template <typename T>
void count_row(const T* row, int64_t W, int64_t n, int64_t* counts) {
  for (int64_t x = 0; x < W;) {
    const T id = row[x];
    const int64_t begin = x;
    x = run_end(row, x, W);
    if (id > 0 && static_cast<int64_t>(id) <= n) counts[id - 1] += x - begin;
  }
}

template <typename T>
py::array_t<int64_t> count(const Array<T>& ids, int64_t n) {
  py::array_t<int64_t> counts(n);
  int64_t* found = counts.mutable_data();
  const T* row = ids.data();
  const int64_t size = ids.size();
  py::gil_scoped_release unlocked;
  std::fill(found, found + n, 0);
  count_row(row, size, n, found);
  return counts;
}

// The pixels of those rows and columns, 0 where one is -1, and their counts
template <typename T>
std::pair<py::array_t<T>, py::array_t<int64_t>> take(const Array<T>& maps, const Indices& rows,
                                                     const Indices& columns, int64_t n) {
  if (maps.ndim() != 3) throw std::invalid_argument("take: maps must be [l, H, W]");
  const int64_t L = maps.shape(0), H = maps.shape(1), W = maps.shape(2);
  const int64_t h = rows.size(), w = columns.size();
  py::array_t<T> out({L, h, w});
  py::array_t<int64_t> counts(n);
  T* target = out.mutable_data();
  int64_t* found = counts.mutable_data();
  const T* source = maps.data();
  const int64_t *y = rows.data(), *x = columns.data();
  const auto outside = [](const int64_t* at, int64_t size, int64_t end) {
    return std::any_of(at, at + size, [end](int64_t i) { return i < -1 || i >= end; });
  };
  if (outside(y, h, H) || outside(x, w, W)) throw std::invalid_argument("take: no such place");
  py::gil_scoped_release unlocked;
  std::vector<int32_t> from(w);  // of a row behind which a 0 stands, for what is outside
  for (int64_t j = 0; j < w; ++j) from[j] = static_cast<int32_t>(x[j] < 0 ? W : x[j]);
  std::vector<T> padded(W + 1, 0);
  std::fill(found, found + n, 0);
  std::vector<int64_t> of_row(n, 0);
  for (int64_t l = 0; l < L; ++l) {
    for (int64_t i = 0; i < h; ++i, target += w) {
      if (i > 0 && y[i] == y[i - 1]) {  // a larger picture has its rows several times
        std::copy(target - w, target, target);
      } else {
        std::fill(of_row.begin(), of_row.end(), 0);
        const T* row = source + (l * H + std::max<int64_t>(y[i], 0)) * W;
        if (y[i] < 0 || (row[0] == 0 && run_end(row, 0, W) == W)) {  // most rows of many maps
          std::fill(target, target + w, T{0});
          continue;
        }
        std::copy(row, row + W, padded.begin());
        for (int64_t j = 0; j < w; ++j) target[j] = padded[from[j]];
        count_row(target, w, n, of_row.data());
      }
      for (int64_t k = 0; k < n; ++k) found[k] += of_row[k];
    }
  }
  return {std::move(out), std::move(counts)};
}

// Every id replaced by that of a table
template <typename T>
py::array_t<T> replace(const Array<T>& maps, const Array<T>& table) {
  py::array_t<T> out(std::vector<py::ssize_t>(maps.shape(), maps.shape() + maps.ndim()));
  const T *source = maps.data(), *by = table.data();
  T* target = out.mutable_data();
  const int64_t size = maps.size(), n = table.size();
  py::gil_scoped_release unlocked;
  for (int64_t begin = 0; begin < size;) {
    const int64_t id = source[begin], end = run_end(source, begin, size);
    std::fill(target + begin, target + end, id >= 0 && id < n ? by[id] : T{0});
    begin = end;
  }
  return out;
}

// Sets out [n, at least H, at least W], which is 0, to 1 where mask i is: id i + 1 of map layer[i]
template <typename T>
void spread(const Array<T>& maps, const Indices& layer,
            py::array_t<uint8_t, py::array::c_style> out) {
  if (maps.ndim() != 3 || out.ndim() != 3 || out.shape(0) != layer.size() ||
      out.shape(1) < maps.shape(1) || out.shape(2) < maps.shape(2)) {
    throw std::invalid_argument("spread: maps must be [l, H, W], out [n, H, W] or larger");
  }
  const int64_t L = maps.shape(0), H = maps.shape(1), W = maps.shape(2), n = layer.size();
  const int64_t height = out.shape(1), width = out.shape(2);
  const T* row = maps.data();
  const int64_t* of_layer = layer.data();
  uint8_t* target = out.mutable_data();
  py::gil_scoped_release unlocked;
  for (int64_t l = 0; l < L; ++l) {
    for (int64_t y = 0; y < H; ++y, row += W) {
      for (int64_t begin = 0; begin < W;) {
        const int64_t i = static_cast<int64_t>(row[begin]) - 1, end = run_end(row, begin, W);
        if (i >= 0 && i < n && of_layer[i] == l) {
          std::memset(target + (i * height + y) * width + begin, 1, end - begin);
        }
        begin = end;
      }
    }
  }
}

template <typename T>
void bind(py::module_& m) {
  m.def("count", &count<T>, py::arg("ids").noconvert(), py::arg("n"));
  m.def("take", &take<T>, py::arg("maps").noconvert(), py::arg("rows"), py::arg("columns"),
        py::arg("n"));
  m.def("spread", &spread<T>, py::arg("maps").noconvert(), py::arg("layer"),
        py::arg("out").noconvert());
  m.def("replace", &replace<T>, py::arg("maps").noconvert(), py::arg("table"));
}

}  // namespace

void bind_id_maps(py::module_& m) {
  bind<uint8_t>(m);
  bind<int32_t>(m);
}
