// The pixels of a view: part of a resized picture, perhaps mirrored, as bytes or normalised
// floats. Knows NumPy arrays, no tensor. Only the part is computed, row by row in the cache. The
// values are those of torchvision's antialiased bilinear resize of bytes (PyTorch's, after
// Pillow's), to the last bit: along the rows first, rounded to bytes, then along the columns, with
// weights of 16 bits. Letters: H W source, h w part, C channel, k tap.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>

#include "../clones.h"
#include "host.h"

namespace {

using Pair = std::pair<int64_t, int64_t>;
using Picture = py::array_t<uint8_t, py::array::c_style | py::array::forcecast>;

// What the pixels of a part are mixed of, along one side
struct Taps {
  int64_t most = 0;  // source pixels of any
  int shift = 0;     // bits behind the point of the weights
  std::vector<int32_t>
      first;  // of each pixel the first of its source pixels, `most` of which exist
  std::vector<int32_t> weights;  // [most, pixels]; 0 where a pixel has fewer
};

// Pixels [begin, begin + n) of `to` that a side of `from` is resized to
Taps find_taps(int64_t from, int64_t to, int64_t begin, int64_t n, bool mirror) {
  const double scale = static_cast<double>(from) / static_cast<double>(to);
  const double support = std::max(scale, 1.0), inverse = 1 / support;
  const int64_t limit = 2 * static_cast<int64_t>(std::ceil(support)) + 1;
  std::vector<double> found(n * limit, 0), one(limit);
  std::vector<int64_t> least(n), count(n);
  double greatest = 0;
  Taps taps;
  for (int64_t i = 0; i < to; ++i) {  // the precision follows from the weights of all
    const double center = scale * (static_cast<double>(i) + 0.5);
    const int64_t low = std::max<int64_t>(static_cast<int64_t>(center - support + 0.5), 0);
    const int64_t high = std::min<int64_t>(static_cast<int64_t>(center + support + 0.5), from);
    const int64_t size = std::clamp<int64_t>(high - low, 0, limit);
    double total = 0, top = 0;
    for (int64_t k = 0; k < size; ++k) {
      const double x = (static_cast<double>(k + low) - center + 0.5) * inverse;
      one[k] = std::max(0.0, 1 - std::abs(x));
      total += one[k];
      top = std::max(top, one[k]);
    }
    if (total != 0) greatest = std::max(greatest, top / total);
    if (i < begin || i >= begin + n) continue;
    const int64_t at = mirror ? begin + n - 1 - i : i - begin;
    for (int64_t k = 0; k < size && total != 0; ++k) found[at * limit + k] = one[k] / total;
    least[at] = low;
    count[at] = size;
    taps.most = std::max(taps.most, size);
  }
  while (taps.shift < 22 && static_cast<int>(0.5 + greatest * (2 << taps.shift)) < 1 << 15) {
    ++taps.shift;
  }
  taps.first.resize(n);
  taps.weights.assign(taps.most * n, 0);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t first = std::min(least[i], from - taps.most);
    taps.first[i] = static_cast<int32_t>(first);
    for (int64_t k = 0; k < count[i]; ++k) {
      const double weight = found[i * limit + k] * (1 << taps.shift) + 0.5;
      taps.weights[(least[i] - first + k) * n + i] = static_cast<int32_t>(weight);
    }
  }
  return taps;
}

SEGKERN_INLINE int32_t rounded(int32_t sum, int shift) {
  return std::clamp((sum + (1 << (shift - 1))) >> shift, 0, 255);
}

// M neighbouring channels of a row, a word a pixel: one gather then serves them all
template <int M>
SEGKERN_CLONES void pack(const uint8_t* __restrict row, int64_t W, int64_t C,
                         uint32_t* __restrict words) {
  for (int64_t x = 0; x < W; ++x) {
    uint32_t word = 0;
    for (int j = 0; j < M; ++j) word |= static_cast<uint32_t>(row[x * C + j]) << 8 * j;
    words[x] = word;
  }
}

// Words resized along their row, to M lines of bytes
template <int M>
SEGKERN_CLONES void across(const uint32_t* __restrict words, const int32_t* __restrict first,
                           const int32_t* __restrict weights, int64_t w, int64_t most, int shift,
                           int32_t* __restrict sums, uint8_t* __restrict out) {
  for (int64_t k = 0; k < most; ++k) {
    const uint32_t* from = words + k;
    const int32_t* weight = weights + k * w;
    for (int64_t x = 0; x < w; ++x) {
      const uint32_t word = from[first[x]];
      for (int j = 0; j < M; ++j) {
        const int32_t part = static_cast<int32_t>(word >> 8 * j & 255) * weight[x];
        sums[j * w + x] = k == 0 ? part : sums[j * w + x] + part;
      }
    }
  }
  for (int64_t x = 0; x < M * w; ++x) out[x] = static_cast<uint8_t>(rounded(sums[x], shift));
}

template <int M>
void resize_row(const uint8_t* row, int64_t W, int64_t C, const Taps& taps, uint32_t* words,
                int32_t* sums, uint8_t* out) {
  const auto w = static_cast<int64_t>(taps.first.size());
  pack<M>(row, W, C, words);
  across<M>(words, taps.first.data(), taps.weights.data(), w, taps.most, taps.shift, sums, out);
}

// Adds a line times a weight
SEGKERN_CLONES
void add(const uint8_t* __restrict line, int32_t weight, int64_t n, int32_t* __restrict sums) {
  for (int64_t x = 0; x < n; ++x) sums[x] += line[x] * weight;
}

SEGKERN_CLONES
void finish(const int32_t* sums, int64_t n, int shift, float, float, uint8_t* out) {
  for (int64_t x = 0; x < n; ++x) out[x] = static_cast<uint8_t>(rounded(sums[x], shift));
}

SEGKERN_CLONES
void finish(const int32_t* sums, int64_t n, int shift, float by, float less, float* out) {
  for (int64_t x = 0; x < n; ++x) {
    const float scaled = static_cast<float>(rounded(sums[x], shift)) * by;
    out[x] = scaled - less;
  }
}

// Writes the part into the upper left of out [C, height, width], and 0 beside it
template <typename T>
void draw(const uint8_t* image, int64_t W, int64_t C, const Taps& down, const Taps& right,
          const float* by, const float* less, int64_t height, int64_t width, T* out) {
  const auto h = static_cast<int64_t>(down.first.size());
  const auto w = static_cast<int64_t>(right.first.size());
  std::vector<uint8_t> lines(down.most * C * w);  // source row y, resized, at y % most
  std::vector<uint32_t> words(W);
  std::vector<int32_t> sums(std::max<int64_t>(C, 3) * w);
  int64_t done = 0;  // source rows up to here are there, if they are needed
  for (int64_t y = 0; y < h; ++y) {
    const int64_t first = down.first[y];
    for (done = std::max(done, first); done < first + down.most; ++done) {
      const uint8_t* row = image + done * W * C;
      uint8_t* target = lines.data() + done % down.most * C * w;
      int64_t c = 0;
      for (; c + 3 <= C; c += 3) {
        resize_row<3>(row + c, W, C, right, words.data(), sums.data(), target + c * w);
      }
      for (; c < C; ++c) {
        resize_row<1>(row + c, W, C, right, words.data(), sums.data(), target + c * w);
      }
    }
    std::fill(sums.begin(), sums.end(), 0);
    for (int64_t k = 0; k < down.most; ++k) {
      const int32_t weight = down.weights[k * h + y];
      const uint8_t* source = lines.data() + (first + k) % down.most * C * w;
      if (weight != 0) add(source, weight, C * w, sums.data());
    }
    for (int64_t c = 0; c < C; ++c) {
      T* target = out + (c * height + y) * width;
      finish(sums.data() + c * w, w, down.shift, by[c], less[c], target);
      std::fill(target + w, target + width, T{0});
    }
  }
  for (int64_t c = 0; c < C; ++c) {
    std::fill(out + (c * height + h) * width, out + (c + 1) * height * width, T{0});
  }
}

// image [H, W, C]; out [C, at least h, at least w]: bytes, or floats value * by[c] - less[c]
template <typename T>
void view(const Picture& image, Pair resized, Pair start, Pair size, bool mirror,
          py::array_t<T, py::array::c_style> out, const std::vector<float>& by,
          const std::vector<float>& less) {
  if (image.ndim() != 3 || out.ndim() != 3 || image.size() == 0) {
    throw std::invalid_argument("view: image must be [H, W, C], out [C, height, width]");
  }
  const int64_t H = image.shape(0), W = image.shape(1), C = image.shape(2);
  const int64_t height = out.shape(1), width = out.shape(2);
  const auto inside = [](int64_t begin, int64_t n, int64_t end, int64_t room) {
    return begin >= 0 && n > 0 && begin + n <= end && n <= room && end < int64_t{1} << 31;
  };
  if (!inside(start.first, size.first, resized.first, height) ||
      !inside(start.second, size.second, resized.second, width) || out.shape(0) != C ||
      static_cast<int64_t>(by.size()) != C || static_cast<int64_t>(less.size()) != C) {
    throw std::invalid_argument("view: no such part, or no room for it");
  }
  const uint8_t* source = image.data();
  T* target = out.mutable_data();
  py::gil_scoped_release unlocked;
  const Taps down = find_taps(H, resized.first, start.first, size.first, false);
  const Taps right = find_taps(W, resized.second, start.second, size.second, mirror);
  draw(source, W, C, down, right, by.data(), less.data(), height, width, target);
}

template <typename T>
void bind(py::module_& m) {
  m.def("view", &view<T>, py::arg("image"), py::arg("resized"), py::arg("start"), py::arg("size"),
        py::arg("mirror"), py::arg("out").noconvert(), py::arg("by"), py::arg("less"));
}

}  // namespace

void bind_views(py::module_& m) {
  bind<uint8_t>(m);
  bind<float>(m);
}
