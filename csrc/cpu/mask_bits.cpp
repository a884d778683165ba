// mask_bits on the CPU: a panel of keys at a time, product, comparison and packing in one pass;
// the product is never stored whole. Letters: B image, Q query, C channel, S key.
#include <algorithm>
#include <numeric>

#include "tile.h"

namespace segkern {
namespace {

constexpr int64_t kPanel = 128;  // keys at a time: a whole number of words, its tiles stay in L2

// A panel of features as tiles [groups, C, lanes]; keys that do not exist are zero.
template <class S, class T>
SEGKERN_CLONES void copy_panel(const S* features /*[C, keys]*/, int64_t stride, int64_t keys,
                               int64_t C, T* out) {
  constexpr int64_t G = kLanes<T>;
  for (int64_t c = 0; c < C; ++c) {
    const S* from = features + c * stride;
    for (int64_t s = 0; s < kPanel; s += G) {
      T* to = out + s * C + c * G;
      const int64_t n = std::min(G, std::max<int64_t>(0, keys - s));
      if (n == G) {
#pragma omp simd
        for (int64_t j = 0; j < G; ++j) to[j] = static_cast<T>(from[s + j]);
      } else {
        for (int64_t j = 0; j < G; ++j) to[j] = j < n ? static_cast<T>(from[s + j]) : T(0);
      }
    }
  }
}

// Bits of products at or above the threshold, false for NaN; they join `words` at `shift`.
template <class T>
SEGKERN_CLONES void compare_rows(const T* x /*[Q, lanes]*/, int64_t Q, T threshold, uint32_t all,
                                 int shift, uint32_t* words /*[Q]*/) {
  constexpr int64_t G = kLanes<T>;
  for (int64_t q = 0; q < Q; ++q) {
    uint32_t word = 0;
#pragma omp simd reduction(| : word)
    for (int64_t j = 0; j < G; ++j)
      word |= x[q * G + j] >= threshold ? uint32_t(1) << j : uint32_t(0);
    words[q] |= (word & all) << shift;
  }
}

template <class S, class T>
void run(const Tensor& queries, const Tensor& features, T threshold, const Tensor& bits,
         const Tensor& open) {
  constexpr int64_t G = kLanes<T>;
  const Tensor q = dense<T>(queries);
  const Tensor f = features.stride(2) == 1 ? features : torch::stable::contiguous(features);
  const int64_t B = q.size(0), Q = q.size(1), C = q.size(2), S_ = f.size(2), W = bits.size(2);
  const int64_t panels = (S_ + kPanel - 1) / kPanel, stride = f.stride(1), image = f.stride(0);
  const Tiles<T>& tile = tiles<T>();
  int32_t* to = mutable_data<int32_t>(bits);
  parallel_for(0, B * panels, 1, [&](int64_t begin, int64_t end) {
    const Scratch<T> panel(kPanel * C), x(Q * G);
    const Scratch<int32_t> row(Q);
    const Scratch<uint32_t> words(Q);
    std::iota(row.get(), row.get() + Q, 0);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / panels, first = i % panels * kPanel;
      const int64_t keys = std::min(kPanel, S_ - first);
      copy_panel<S, T>(static_cast<const S*>(f.const_data_ptr()) + b * image + first, stride, keys,
                       C, panel.get());
      for (int64_t s = 0; s < keys; s += 32) {
        std::fill_n(words.get(), Q, 0u);
        for (int64_t j = s; j < std::min(keys, s + 32); j += G) {
          const int64_t left = keys - j;
          tile.dot(data<T>(q) + b * Q * C, C, row.get(), Q, panel.get() + j * C, C, x.get());
          compare_rows(x.get(), Q, threshold, left < G ? (1u << left) - 1 : (1u << G) - 1,
                       static_cast<int>(j - s), words.get());
        }
        for (int64_t r = 0; r < Q; ++r)
          to[(b * Q + r) * W + (first + s) / 32] = static_cast<int32_t>(words[r]);
      }
    }
  });
  int32_t* counts = mutable_data<int32_t>(open);
  for (int64_t r = 0; r < B * Q; ++r) {
    int32_t count = 0;
    for (int64_t w = 0; w < W; ++w) count += __builtin_popcount(to[r * W + w]);
    counts[r] = count;
  }
}

std::tuple<Tensor, Tensor> mask_bits(Tensor queries, Tensor features, double threshold) {
  const int64_t B = queries.size(0), Q = queries.size(1), S = features.size(2);
  const Tensor bits = empty<int32_t>(queries, {B, Q, (S + 31) / 32});
  const Tensor open = empty<int32_t>(queries, {B, Q});
  dispatch_storage(queries, "mask_bits", [&](auto storage, auto zero) {
    using T = decltype(zero);
    run<decltype(storage), T>(queries, features, static_cast<T>(threshold), bits, open);
  });
  return {bits, open};
}

}  // namespace
}  // namespace segkern

STABLE_TORCH_LIBRARY_IMPL(segkern, CPU, m) { m.impl("mask_bits", TORCH_BOX(&segkern::mask_bits)); }
