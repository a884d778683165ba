// COCO run-length encoding of every segment of a label map in one pass, of packed masks, and back.
// Knows NumPy arrays, no tensor. COCO counts runs down the columns, zeros first, and writes each
// count as its difference to the one two before, five bits a character, lowest first, bit 5 = more
// to come, offset 48 (pycocotools' compressed form).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

#include "host.h"

using LabelMap = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;
using Bits = LabelMap;  // bit j of word w: column 32 w + j; 0 beyond the width
using Counts = std::variant<std::string, std::vector<int64_t>>;  // compressed, or as they are

namespace {

std::string compress(const std::vector<int64_t>& counts) {
  std::string out;
  for (size_t i = 0; i < counts.size(); ++i) {
    int64_t x = i > 2 ? counts[i] - counts[i - 2] : counts[i];
    for (bool more = true; more;) {
      const int64_t bits = x & 31;
      x >>= 5;
      more = (bits & 16) ? x != -1 : x != 0;
      out.push_back(static_cast<char>((bits | (more ? 32 : 0)) + 48));
    }
  }
  return out;
}

std::vector<int64_t> expand(const std::string& text) {
  std::vector<int64_t> counts;
  for (size_t at = 0; at < text.size();) {
    int64_t x = 0;
    int shift = 0;
    for (bool more = true; more; shift += 5) {
      if (at >= text.size() || shift > 55) throw std::invalid_argument("rle: counts are cut off");
      const int64_t c = static_cast<unsigned char>(text[at++]) - 48;
      if (c < 0 || c > 63) throw std::invalid_argument("rle: counts hold a foreign character");
      x |= (c & 31) << shift;
      more = c & 32;
      if (!more && (c & 16)) x |= static_cast<int64_t>(~uint64_t{0} << (shift + 5));
    }
    if (counts.size() > 2) x += counts[counts.size() - 2];
    counts.push_back(x);
  }
  return counts;
}

// The compressed counts of each id, in the order of `ids`; labels [H, W]
std::vector<py::bytes> encode(const LabelMap& labels, const std::vector<int32_t>& ids) {
  if (labels.ndim() != 2) throw std::invalid_argument("rle: labels must be [H, W]");
  const int64_t H = labels.shape(0), W = labels.shape(1);
  const int32_t* map = labels.data();
  std::vector<std::string> texts(ids.size());
  {
    py::gil_scoped_release unlocked;
    std::unordered_map<int32_t, size_t> place;
    for (size_t i = 0; i < ids.size(); ++i) place.emplace(ids[i], i);
    std::vector<std::vector<int64_t>> counts(ids.size());
    std::vector<int64_t> end(ids.size(), 0);  // where the segment's last run stopped
    auto close = [&](int32_t label, int64_t begin, int64_t stop) {
      const auto found = place.find(label);
      if (found == place.end() || begin == stop) return;
      counts[found->second].push_back(begin - end[found->second]);
      counts[found->second].push_back(stop - begin);
      end[found->second] = stop;
    };
    int64_t begin = 0;
    int32_t current = H * W > 0 ? map[0] : 0;
    for (int64_t x = 0; x < W; ++x) {
      for (int64_t y = 0; y < H; ++y) {
        const int32_t label = map[y * W + x];
        if (label == current) continue;
        close(current, begin, x * H + y);
        begin = x * H + y;
        current = label;
      }
    }
    close(current, begin, H * W);
    for (size_t i = 0; i < ids.size(); ++i) {
      if (end[i] < H * W) counts[i].push_back(H * W - end[i]);
      texts[i] = compress(counts[i]);
    }
  }
  return {texts.begin(), texts.end()};
}

// Calls use(x, y) where a mask [H, ceil(W / 32)] differs from the pixel before, down the columns;
// row by row, so y never falls.
template <typename F>
void each_change(const uint32_t* mask, int64_t H, int64_t W, const F& use) {
  const int64_t words = (W + 31) / 32;
  for (int64_t y = 0; y < H; ++y) {
    const uint32_t* row = mask + y * words;
    const uint32_t* before = mask + (y ? y - 1 : H - 1) * words;
    for (int64_t w = 0; w < words; ++w) {
      uint32_t other = before[w];
      if (y == 0) {  // before a column's first pixel comes the last one of the column to the left
        other = other << 1 | (w ? before[w - 1] >> 31 : 0);
        if (w == words - 1 && W % 32) other &= (uint32_t{1} << W % 32) - 1;
      }
      for (uint32_t change = row[w] ^ other; change; change &= change - 1) {
        use(32 * w + __builtin_ctz(change), y);
      }
    }
  }
}

// The compressed counts of each mask of bits [n, H, ceil(W / 32)]
std::vector<py::bytes> encode_bits(const Bits& bits, int64_t W) {
  if (bits.ndim() != 3 || W < 0 || bits.shape(2) != (W + 31) / 32) {
    throw std::invalid_argument("rle: bits must be [n, H, ceil(W / 32)]");
  }
  const int64_t n = bits.shape(0), H = bits.shape(1), words = bits.shape(2);
  const auto* all = reinterpret_cast<const uint32_t*>(bits.data());
  std::vector<std::string> texts(n);
  {
    py::gil_scoped_release unlocked;
    std::vector<int64_t> place(W + 1), counts;
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t* mask = all + i * H * words;
      // a counting sort by column: how many changes, where those of a column go, the changes
      std::fill(place.begin(), place.end(), 0);
      each_change(mask, H, W, [&](int64_t x, int64_t) { ++place[x + 1]; });
      for (int64_t x = 0; x < W; ++x) place[x + 1] += place[x];
      counts.assign(place[W] + 1, H * W);
      each_change(mask, H, W, [&](int64_t x, int64_t y) { counts[place[x]++] = x * H + y; });
      for (size_t k = counts.size() - 1; k > 0; --k) counts[k] -= counts[k - 1];
      if (H * W == 0) counts.clear();
      texts[i] = compress(counts);
    }
  }
  return {texts.begin(), texts.end()};
}

// Begin and end of each run of ones, down the columns
std::vector<std::pair<int64_t, int64_t>> runs_of(const Counts& counts, int64_t pixels) {
  std::vector<std::pair<int64_t, int64_t>> runs;
  int64_t at = 0;
  bool inside = false;
  const auto* text = std::get_if<std::string>(&counts);
  for (const int64_t n : text ? expand(*text) : std::get<std::vector<int64_t>>(counts)) {
    if (n < 0 || n > pixels - at) throw std::invalid_argument("rle: counts exceed the size");
    if (inside && n > 0) runs.emplace_back(at, at + n);
    at += n;
    inside = !inside;
  }
  if (at != pixels) throw std::invalid_argument("rle: counts do not fill the size");
  return runs;
}

// Writes `ids[i]` into labels [H, W] (zero elsewhere) where the i-th segment is; later ones over
// earlier ones
py::array_t<int32_t> decode(const std::vector<Counts>& segments, const std::vector<int32_t>& ids,
                            int64_t H, int64_t W) {
  if (segments.size() != ids.size())
    throw std::invalid_argument("rle: as many ids as counts needed");
  py::array_t<int32_t> labels({H, W});
  int32_t* map = labels.mutable_data();
  py::gil_scoped_release unlocked;
  std::fill(map, map + H * W, 0);
  for (size_t i = 0; i < segments.size(); ++i) {
    for (const auto& [begin, end] : runs_of(segments[i], H * W)) {
      for (int64_t k = begin; k < end; ++k) map[(k % H) * W + k / H] = ids[i];
    }
  }
  return labels;
}

// [W, H] to [H, W], in squares that stay in the cache
template <typename T>
void transpose(const T* columns, int64_t H, int64_t W, T* rows) {
  constexpr int64_t side = 32;
  for (int64_t y = 0; y < H; y += side) {
    for (int64_t x = 0; x < W; x += side) {
      for (int64_t j = y; j < std::min(y + side, H); ++j) {
        for (int64_t i = x; i < std::min(x + side, W); ++i) rows[j * W + i] = columns[i * H + j];
      }
    }
  }
}

// Segments as maps of ids [l, H, W], i + 1 where segment i is and 0 where none is: each lies whole
// in one map, whose number is given, the later of those that overlap first; and their areas
template <typename T>
py::tuple layers_of(const std::vector<Counts>& segments, int64_t H, int64_t W) {
  const auto n = static_cast<int64_t>(segments.size());
  py::array_t<int64_t> layer(n), areas(n);
  int64_t *of_layer = layer.mutable_data(), *of_area = areas.mutable_data();
  std::vector<std::vector<T>> maps;  // down the columns, as runs are
  {
    py::gil_scoped_release unlocked;
    std::vector<std::vector<std::pair<int64_t, int64_t>>> runs;
    std::vector<int64_t> rest, left;
    for (int64_t i = 0; i < n; ++i) {
      runs.push_back(runs_of(segments[i], H * W));
      of_area[i] = 0;
      for (const auto& [begin, end] : runs[i]) of_area[i] += end - begin;
      rest.push_back(i);
    }
    for (; maps.empty() || !rest.empty(); std::swap(rest, left)) {
      std::vector<T> map(H * W, 0);
      for (const int64_t i : rest) {
        for (const auto& [begin, end] : runs[i]) {
          std::fill(map.begin() + begin, map.begin() + end, static_cast<T>(i + 1));
        }
      }
      left.clear();
      for (const int64_t i : rest) {
        const auto id = static_cast<T>(i + 1);
        int64_t seen = 0;
        for (const auto& [begin, end] : runs[i]) {
          seen += std::count(map.begin() + begin, map.begin() + end, id);
        }
        of_layer[i] = static_cast<int64_t>(maps.size());
        if (seen == of_area[i]) continue;
        left.push_back(i);
        for (const auto& [begin, end] : runs[i]) {
          std::replace(map.begin() + begin, map.begin() + end, id, T{0});
        }
      }
      maps.push_back(std::move(map));
    }
  }
  const auto l = static_cast<int64_t>(maps.size());
  py::array_t<T> out({l, H, W});
  T* target = out.mutable_data();
  {
    py::gil_scoped_release unlocked;
    for (int64_t k = 0; k < l; ++k) transpose(maps[k].data(), H, W, target + k * H * W);
  }
  return py::make_tuple(out, layer, areas);
}

py::tuple layers(const std::vector<Counts>& segments, int64_t H, int64_t W) {
  if (segments.size() < 256) return layers_of<uint8_t>(segments, H, W);
  return layers_of<int32_t>(segments, H, W);
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.def("encode", &encode, py::arg("labels"), py::arg("ids"));
  m.def("encode_bits", &encode_bits, py::arg("bits"), py::arg("width"));
  m.def("decode", &decode, py::arg("counts"), py::arg("ids"), py::arg("height"), py::arg("width"));
  m.def("layers", &layers, py::arg("counts"), py::arg("height"), py::arg("width"));
  bind_id_maps(m);
  bind_views(m);
}
