// COCO run-length encoding of every segment of a label map in one pass, and back. Knows NumPy
// arrays, no tensor. COCO counts runs down the columns, zeros first, and writes each count as its
// difference to the one two before, five bits a character, lowest first, bit 5 = more to come,
// offset 48 (pycocotools' compressed form).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace py = pybind11;
using LabelMap = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;

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

// Writes `ids[i]` into labels [H, W] (zero elsewhere) where the i-th segment is; later ones over
// earlier ones
py::array_t<int32_t> decode(const std::vector<std::string>& texts, const std::vector<int32_t>& ids,
                            int64_t H, int64_t W) {
  if (texts.size() != ids.size()) throw std::invalid_argument("rle: as many ids as counts needed");
  py::array_t<int32_t> labels({H, W});
  int32_t* map = labels.mutable_data();
  py::gil_scoped_release unlocked;
  std::fill(map, map + H * W, 0);
  for (size_t i = 0; i < texts.size(); ++i) {
    int64_t at = 0;
    bool inside = false;
    for (const int64_t n : expand(texts[i])) {
      if (n < 0 || n > H * W - at) throw std::invalid_argument("rle: counts exceed the size");
      for (int64_t k = at; inside && k < at + n; ++k) map[(k % H) * W + k / H] = ids[i];
      at += n;
      inside = !inside;
    }
    if (at != H * W) throw std::invalid_argument("rle: counts do not fill the size");
  }
  return labels;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.def("encode", &encode, py::arg("labels"), py::arg("ids"));
  m.def("decode", &decode, py::arg("counts"), py::arg("ids"), py::arg("height"), py::arg("width"));
}
