// segment_map on the CPU. A task is a band of rows of the result; it goes from block to block, and
// in each does only what the bounds of the mask logits leave open. Letters: B image, Q query, K
// class, h w mask logits, H W result; a block's arrays have rows of ld columns, n of them pixels.
#include <mutex>

#include "resample.h"

namespace segkern {
namespace {

// Where score * sigmoid(x) is above `best`, query q takes the pixel; it is written as ~q where x
// is negative.
template <class T>
SEGKERN_CLONES void challenge(const T* x /*[rows, ld]*/, int64_t rows, int64_t ld, int64_t n,
                              T score, int32_t q, T* best, int32_t* winner) {
  for (int64_t r = 0; r < rows; ++r) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const int64_t i = r * ld + j;
      const T value = score * simd_sigmoid(x[i]);
      const int32_t code = x[i] >= T(0) ? q : ~q;
      winner[i] = value > best[i] ? code : winner[i];
      best[i] = value > best[i] ? value : best[i];
    }
  }
}

template <class T>
SEGKERN_CLONES int64_t count_inside(const T* x /*[rows, ld]*/, int64_t rows, int64_t ld,
                                    int64_t n) {
  int64_t sum = 0;
  for (int64_t r = 0; r < rows; ++r) {
    int32_t count = 0;
#pragma omp simd reduction(+ : count)
    for (int64_t j = 0; j < n; ++j) count += x[r * ld + j] >= T(0) ? 1 : 0;
    sum += count;
  }
  return sum;
}

SEGKERN_CLONES int64_t count_equal(const int32_t* x /*[rows, ld]*/, int64_t rows, int64_t ld,
                                   int64_t n, int32_t value) {
  int64_t sum = 0;
  for (int64_t r = 0; r < rows; ++r) {
    int32_t count = 0;
#pragma omp simd reduction(+ : count)
    for (int64_t j = 0; j < n; ++j) count += x[r * ld + j] == value ? 1 : 0;
    sum += count;
  }
  return sum;
}

struct Counts {  // pixels of each query
  explicit Counts(int64_t Q) : area(Q), won(Q), own(Q) {}
  void add(const Counts& o) {
    for (size_t q = 0; q < area.size(); ++q) {
      area[q] += o.area[q];
      won[q] += o.won[q];
      own[q] += o.own[q];
    }
  }
  std::vector<int64_t> area, won, own;  // won and inside; won; inside
};

// The segment of each query, from 1 in the order of queries, stuff merged; 0 for none.
std::vector<int32_t> merge(const Counts& counts, const int64_t* labels, const uint8_t* stuff,
                           int64_t K, double overlap) {
  std::vector<int32_t> ids(counts.area.size(), 0), first(K, 0);
  int32_t last = 0;
  for (size_t q = 0; q < ids.size(); ++q) {
    if (!counts.area[q] || double(counts.won[q]) / double(counts.own[q]) < overlap) continue;
    const int64_t label = labels[q];
    const bool fused = stuff && label >= 0 && label < K && stuff[label];
    ids[q] = fused && first[label] ? first[label] : ++last;
    if (fused) first[label] = ids[q];
  }
  return ids;
}

template <class T>
void panoptic_block(const Maps<T>& maps, const Blocks<T>& blocks, int64_t b, const Block& k,
                    const std::vector<int32_t>& kept, const T* scores, Memory<T>& m, T* x, T* best,
                    int32_t* winner, Counts& counts) {
  const int64_t rows = k.rows.end - k.rows.begin, n = k.columns.end - k.columns.begin;
  const int64_t ld = (k.columns.last - k.columns.first) * kLanes<T>;
  const T slack = rounding<T>(1);
  m.load(maps, b, k, kept);
  T least = T(0);  // the best score is at least this everywhere
  for (size_t i = 0; i < kept.size(); ++i)
    least = std::max(least, scores[kept[i]] * simd_sigmoid(m.low[i]) * (T(1) - slack));
  std::vector<int32_t> open, rivals;
  for (size_t i = 0; i < kept.size(); ++i) {
    const bool rival = !(scores[kept[i]] * simd_sigmoid(m.high[i]) * (T(1) + slack) < least);
    if (rival) rivals.push_back(static_cast<int32_t>(i));
    if (m.low[i] >= T(0)) counts.own[kept[i]] += rows * n;
    if (rival || (m.low[i] < T(0) && m.high[i] >= T(0))) open.push_back(static_cast<int32_t>(i));
  }
  const int32_t first = rivals[0];
  std::fill_n(best, rows * ld, T(-1));
  std::fill_n(winner, rows * ld, m.low[first] >= T(0) ? kept[first] : ~kept[first]);
  if (rivals.size() == 1 && (m.low[first] >= T(0) || m.high[first] < T(0)))
    std::erase(open, first);  // it takes the whole block, all inside or all outside
  m.open(blocks, k, open);
  for (size_t j = 0, r = 0; j < open.size(); ++j) {
    const int32_t i = open[j], q = kept[i];
    while (r < rivals.size() && rivals[r] < i) ++r;
    const bool rival = r < rivals.size() && rivals[r] == i;
    blend_block(m, k, static_cast<int64_t>(j), x);
    if (m.low[i] < T(0) && m.high[i] >= T(0)) counts.own[q] += count_inside(x, rows, ld, n);
    if (rival) challenge(x, rows, ld, n, scores[q], q, best, winner);
  }
  for (const int32_t i : rivals) {
    const int64_t inside = count_equal(winner, rows, ld, n, kept[i]);
    counts.area[kept[i]] += inside;
    counts.won[kept[i]] += inside + count_equal(winner, rows, ld, n, ~kept[i]);
  }
}

SEGKERN_CLONES void relabel(const int32_t* ids, int64_t n, int32_t* map) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) map[i] = map[i] < 0 ? 0 : ids[map[i]];
}

template <class T>
void panoptic(const Tensor& scores, const Tensor& labels, const std::optional<Tensor>& stuff,
              const Maps<T>& maps, const Sizes& z, double overlap, const Tensor& map,
              const Tensor& ids, const Tensor& areas) {
  const int64_t B = scores.size(0), Q = scores.size(1), K = stuff ? stuff->size(0) : 0;
  const Axis y(maps.h(), z.padded_h, z.image_h, z.H, false);
  const Axis x(maps.w(), z.padded_w, z.image_w, z.W, false);
  const Blocks<T> blocks(y, x, 16, 64);
  const Tensor score = dense<T>(scores), label = dense<int64_t>(labels);
  const Tensor is_stuff = stuff ? torch::stable::contiguous(*stuff) : Tensor();
  const uint8_t* fused = stuff ? static_cast<const uint8_t*>(is_stuff.const_data_ptr()) : nullptr;
  for (int64_t b = 0; b < B; ++b) {
    const T* s = data<T>(score) + b * Q;
    int32_t* to = mutable_data<int32_t>(map) + b * z.H * z.W;
    std::vector<int32_t> kept;
    for (int64_t q = 0; q < Q; ++q)
      if (s[q] > T(0)) kept.push_back(static_cast<int32_t>(q));
    const int64_t n = static_cast<int64_t>(kept.size());
    Counts counts(Q);
    std::mutex lock;
    const auto make = [&] { return Memory<T>(maps, blocks, n); };
    const auto band = [&](int64_t task, Memory<T>& memory) {
      const Span& rows = blocks.rows[task];
      const int64_t pixels = blocks.lines * blocks.groups * kLanes<T>;
      const Scratch<T> logits(pixels), best(pixels);
      const Scratch<int32_t> winner(pixels);
      Counts here(Q);
      for (const Span& columns : blocks.strips) {
        const int64_t ld = (columns.last - columns.first) * kLanes<T>;
        panoptic_block(maps, blocks, b, {rows, columns}, kept, s, memory, logits.get(), best.get(),
                       winner.get(), here);
        for (int64_t r = rows.begin; r < rows.end; ++r)
          std::copy_n(winner.get() + (r - rows.begin) * ld, columns.end - columns.begin,
                      to + r * z.W + columns.begin);
      }
      const std::lock_guard<std::mutex> guard(lock);
      counts.add(here);
    };
    if (n == 0) {
      std::fill_n(to, z.H * z.W, -1);
    } else {
      run_tasks(static_cast<int64_t>(blocks.rows.size()), make, band);
    }
    const std::vector<int32_t> found =
        merge(counts, data<int64_t>(label) + b * Q, fused, K, overlap);
    parallel_for(0, z.H, 64, [&](int64_t begin, int64_t end) {
      relabel(found.data(), (end - begin) * z.W, to + begin * z.W);
    });
    for (int64_t q = 0; q < Q; ++q) {
      mutable_data<int32_t>(ids)[b * Q + q] = found[q];
      mutable_data<int64_t>(areas)[b * Q + q] = counts.area[q];
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> segment_map(Tensor scores, Tensor labels,
                                               std::optional<Tensor> stuff, Tensor masks,
                                               std::optional<Tensor> features, IntList sizes,
                                               double overlap) {
  const Sizes z(sizes);
  const int64_t B = scores.size(0), Q = scores.size(1);
  const Tensor map = empty<int32_t>(scores, {B, z.H, z.W});
  const Tensor ids = empty<int32_t>(scores, {B, Q}), areas = empty<int64_t>(scores, {B, Q});
  dispatch_accumulate(scores, "segment_map", [&](auto zero) {
    using T = decltype(zero);
    panoptic<T>(scores, labels, stuff, Maps<T>(masks, features), z, overlap, map, ids, areas);
  });
  return {map, ids, areas};
}

// The mask x > 0 of a block whose first column is bit `shift` of a word: its bits join `words`,
// its pixels `area`; returns the sum of sigmoid(x) over it.
template <class T>
SEGKERN_CLONES double pack_block(const T* x /*[rows, ld]*/, int64_t rows, int64_t ld, int64_t n,
                                 int64_t shift, uint32_t* words, int64_t stride, int64_t* area) {
  constexpr int64_t lanes = 64;  // a block is not wider
  T sums[lanes] = {};
  for (int64_t r = 0; r < rows; ++r) {
    const T* v = x + r * ld;
    for (int64_t c = 0, end; c < n; c = end) {
      const int64_t first = (shift + c) % 32;
      end = c + 32 - first < n ? c + 32 - first : n;
      uint32_t bits = 0;
#pragma omp simd reduction(| : bits)
      for (int64_t j = c; j < end; ++j) bits |= v[j] > T(0) ? uint32_t(1) << (j - c) : uint32_t(0);
      words[r * stride + (shift + c) / 32] |= bits << first;
      *area += __builtin_popcount(bits);
    }
  }
  // 1/a + 1/b = (a + b) / (a b): a division costs as much as the exponential
  for (int64_t r = 0; r < rows; r += 2) {
    const T *v = x + r * ld, *u = r + 1 < rows ? v + ld : v;
    const T other = r + 1 < rows ? T(1) : T(0);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const T a = T(1) + simd_exp(-(v[j] > T(0) ? v[j] : T(0)));
      const T b = T(1) + simd_exp(-(u[j] > T(0) ? u[j] : T(0)));
      const T one = v[j] > T(0) ? b : T(0), two = u[j] > T(0) ? other * a : T(0);
      sums[j] += (one + two) / (a * b);
    }
  }
  double sum = 0.0;
  for (int64_t j = 0; j < lanes; ++j) sum += sums[j];
  return sum;
}

template <class T>
void instance(const Tensor& queries, const Maps<T>& maps, const Sizes& z, const Tensor& bits,
              const Tensor& areas, const Tensor& sums) {
  const int64_t B = queries.size(0), n = queries.size(1), words = bits.size(3);
  const Axis y(maps.h(), z.padded_h, z.image_h, z.H, false);
  const Axis x(maps.w(), z.padded_w, z.image_w, z.W, false);
  const Blocks<T> blocks(y, x, 16, 64);
  const int64_t bands = static_cast<int64_t>(blocks.rows.size());
  const Tensor query = dense<int64_t>(queries);
  uint32_t* out = mutable_data<uint32_t>(bits);
  for (int64_t b = 0; b < B; ++b) {
    std::vector<int32_t> slots, chosen;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t q = data<int64_t>(query)[b * n + i];
      if (q < 0 || q >= maps.queries()) continue;
      slots.push_back(static_cast<int32_t>(i));
      chosen.push_back(static_cast<int32_t>(q));
    }
    const int64_t m = static_cast<int64_t>(chosen.size());
    // of each band: added in the order of bands, so that threads do not matter
    std::vector<double> sum(bands * m, 0.0);
    std::vector<int64_t> area(bands * m, 0);
    const auto make = [&] { return Memory<T>(maps, blocks, m); };
    const auto band = [&](int64_t task, Memory<T>& memory) {
      const Span& rows = blocks.rows[task];
      const Scratch<T> logits(blocks.lines * blocks.groups * kLanes<T>);
      std::vector<int32_t> open;
      for (const Span& columns : blocks.strips) {
        const Block k{rows, columns};
        const int64_t ld = (columns.last - columns.first) * kLanes<T>;
        memory.load(maps, b, k, chosen);
        open.clear();
        for (int32_t i = 0; i < m; ++i)
          if (memory.high[i] > T(0)) open.push_back(i);
        memory.open(blocks, k, open);
        for (size_t j = 0; j < open.size(); ++j) {
          const int64_t i = open[j];
          blend_block(memory, k, static_cast<int64_t>(j), logits.get());
          uint32_t* to = out + ((b * n + slots[i]) * z.H + rows.begin) * words;
          sum[task * m + i] +=
              pack_block(logits.get(), rows.end - rows.begin, ld, columns.end - columns.begin,
                         columns.begin % 32, to + columns.begin / 32, words, &area[task * m + i]);
        }
      }
    };
    if (m > 0) run_tasks(bands, make, band);
    for (int64_t i = 0; i < m; ++i) {
      double total = 0.0;
      int64_t pixels = 0;
      for (int64_t k = 0; k < bands; ++k) {
        total += sum[k * m + i];
        pixels += area[k * m + i];
      }
      mutable_data<T>(sums)[b * n + slots[i]] = static_cast<T>(total);
      mutable_data<int64_t>(areas)[b * n + slots[i]] = pixels;
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> segment_map_instance(Tensor queries, Tensor masks,
                                                        std::optional<Tensor> features,
                                                        IntList sizes) {
  const Sizes z(sizes);
  const int64_t B = queries.size(0), n = queries.size(1);
  const Tensor bits = zeros<int32_t>(queries, {B, n, z.H, (z.W + 31) / 32});
  const Tensor areas = zeros<int64_t>(queries, {B, n});
  Tensor sums;
  dispatch_accumulate(masks, "segment_map_instance", [&](auto zero) {
    using T = decltype(zero);
    sums = zeros<T>(queries, {B, n});
    instance<T>(queries, Maps<T>(masks, features), z, bits, areas, sums);
  });
  return {bits, areas, sums};
}

// A row of the map: of the masks in `order`, 1 + the first that covers the pixel.
void cover_row(const uint32_t* bits /*[n, mask]*/, int64_t mask, int64_t n, const int64_t* order,
               int64_t m, int64_t W, int32_t* out /*[W]*/) {
  std::fill_n(out, W, 0);
  for (int64_t w = 0; w * 32 < W; ++w) {
    uint32_t left = ~uint32_t(0);
    for (int64_t i = 0; i < m && left; ++i) {
      if (order[i] < 0 || order[i] >= n) continue;
      uint32_t here = bits[order[i] * mask + w] & left;
      left &= ~here;
      for (; here; here &= here - 1) {
        const int64_t c = w * 32 + __builtin_ctz(here);
        if (c < W) out[c] = static_cast<int32_t>(i + 1);
      }
    }
  }
}

Tensor segment_map_cover(Tensor bits, Tensor order, int64_t width) {
  const Tensor words = torch::stable::contiguous(bits), slots = dense<int64_t>(order);
  const int64_t B = bits.size(0), n = bits.size(1), H = bits.size(2), row = bits.size(3);
  const int64_t m = order.size(1);
  const Tensor map = empty<int32_t>(bits, {B, H, width});
  parallel_for(0, B * H, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / H, r = i % H;
      cover_row(data<uint32_t>(words) + (b * n * H + r) * row, H * row, n,
                data<int64_t>(slots) + b * m, m, width, mutable_data<int32_t>(map) + i * width);
    }
  });
  return map;
}

}  // namespace
}  // namespace segkern

STABLE_TORCH_LIBRARY_IMPL(segkern, CPU, m) {
  m.impl("segment_map", TORCH_BOX(&segkern::segment_map));
  m.impl("segment_map_instance", TORCH_BOX(&segkern::segment_map_instance));
  m.impl("segment_map_cover", TORCH_BOX(&segkern::segment_map_cover));
}
