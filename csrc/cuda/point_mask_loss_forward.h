// The forward kernel of point_mask_loss, and the choice of the important points.
#pragma once

#include "point_mask_loss.h"

namespace segkern {
namespace {

template <class T>
using Key = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

// The order of |x| as integers; NaN are equal and come last, but for points that do not count
__device__ __forceinline__ uint32_t magnitude(float x) {
  return min(__float_as_uint(x) & 0x7FFFFFFFu, 0x7F800001u);
}

__device__ __forceinline__ uint64_t magnitude(double x) {
  const uint64_t bits = static_cast<uint64_t>(__double_as_longlong(x));
  return min(bits & (~uint64_t(0) >> 1), uint64_t(0x7FF0000000000001));
}

// Where the chosen candidates end: those with a key below `low` are chosen, none above low + span,
// and between those drawn up to number first + reach
template <class T>
struct Border {
  static constexpr int kBits = 8 * sizeof(T) - 1;  // of a key
  static constexpr int kCut = kBits - 16;          // of these not in its upper half

  Key<T> low = 0, span = ~Key<T>(0) >> 1;
  uint32_t first = 0, reach = ~0u;
  int shift = kBits;  // span = 2^shift - 1

  __device__ __forceinline__ bool touches(Key<T> key, uint32_t i) const {
    return key - low <= span && i - first <= reach;
  }
  __device__ __forceinline__ bool chooses(Key<T> key, uint32_t i) const {
    return key < low || (key - low <= span && i <= first + reach);
  }
};

// Of eight candidates, a bit each: those below the border and those at it, as far as the upper
// halves of their keys tell. Without halves: all are at it
struct Eight {
  uint32_t below, at;
};

template <class T>
__device__ __forceinline__ Eight compare(const Border<T>& border, uint32_t begin, uint32_t n,
                                         bool halved, const uint16_t* halves /*[n], aligned*/) {
  const uint32_t all = begin + 8 <= n ? 0xFF : begin < n ? (1u << (n - begin)) - 1 : 0;
  if (!halved) return {0, all};
  const uint32_t low = static_cast<uint32_t>(border.low >> Border<T>::kCut);
  const uint32_t span = static_cast<uint32_t>(border.span >> Border<T>::kCut);
  const uint4 packed = *reinterpret_cast<const uint4*>(halves + begin);
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
  uint32_t below = 0, at = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const uint32_t half = words[j / 2] >> (j % 2 * 16) & 0xFFFF;
    below |= static_cast<uint32_t>(half < low) << j;
    at |= static_cast<uint32_t>(half - low <= span) << j;
  }
  return {below & all, at & all};
}

// Radix select of the k smallest of n > k > 0 keys, of equal ones those drawn first. Each pass
// counts one digit of the keys that are still open and goes on with the bin that holds the k-th; a
// last one or two do the same with the candidates' numbers where keys are equal. Most keys are
// decided by their upper halves; exact(i) computes one anew. Expects the bins at 0, or, with the
// halves, the counts of the first digit.
template <class T, class F>
__device__ __forceinline__ Border<T> select(uint32_t n, uint32_t k, bool halved,
                                            const uint16_t* halves /*[n]*/, const F& exact,
                                            Shared& shared) {
  constexpr unsigned kOwn = kBins / kThreads<T>;
  constexpr int kCut = Border<T>::kCut;
  Border<T> border;
  int turn = 32 - __clz(static_cast<int>(n));  // bits of the numbers that are still open
  uint32_t left = k, open = n;
  for (bool counted = halved; left < open; counted = false) {
    const bool by_key = border.shift > 0;
    const int rest = !by_key ? turn : border.shift > kCut ? border.shift - kCut : border.shift;
    const int digit = min(static_cast<int>(kDigit), rest);
    const int shift = (by_key ? border.shift : turn) - digit;
    const bool by_half = halved && by_key && shift >= kCut;
    for (uint32_t begin = 8 * threadIdx.x; !counted && begin < n; begin += 8 * kThreads<T>) {
      for (uint32_t at = compare(border, begin, n, halved, halves).at; at != 0; at &= at - 1) {
        const uint32_t i = begin + __ffs(static_cast<int>(at)) - 1;
        const Key<T> key = by_half ? static_cast<Key<T>>(halves[i]) << kCut : exact(i);
        if (!border.touches(key, i)) continue;
        const Key<T> place = by_key ? (key - border.low) >> shift : (i - border.first) >> shift;
        atomic_add(&shared.bins[place], 1u);
      }
    }
    __syncthreads();
    uint32_t counts[kOwn], own = 0, total;
#pragma unroll
    for (unsigned j = 0; j < kOwn; ++j) {
      uint32_t& bin = shared.bins[threadIdx.x * kOwn + j];
      own += counts[j] = bin;
      bin = 0;
    }
    uint32_t before = scan(own, shared, total);
#pragma unroll
    for (unsigned j = 0; j < kOwn; ++j) {
      if (before < left && left <= before + counts[j]) {
        shared.bin = threadIdx.x * kOwn + j;
        shared.before = before;
        shared.count = counts[j];
      }
      before += counts[j];
    }
    __syncthreads();
    left -= shared.before;
    open = shared.count;
    if (by_key) {
      border.low += static_cast<Key<T>>(shared.bin) << shift;
      border.span = (Key<T>(1) << shift) - 1;
      border.shift = shift;
    } else {
      border.first += shared.bin << shift;
      border.reach = (1u << shift) - 1;
      turn = shift;
    }
  }
  return border;
}

template <class S, unsigned kThreads>
__device__ __forceinline__ void copy(const S* from /*[n]*/, uint32_t n, S* to /*[n], aligned*/) {
  constexpr uint32_t kEach = sizeof(uint4) / sizeof(S), kAtOnce = 8;
  const bool aligned = reinterpret_cast<uintptr_t>(from) % sizeof(uint4) == 0;
  const uint32_t whole = aligned ? n / kEach : 0;
#pragma unroll 1
  for (uint32_t begin = threadIdx.x; begin < whole; begin += kAtOnce * kThreads) {
    uint4 v[kAtOnce];  // several loads under way: they come from afar
#pragma unroll
    for (uint32_t j = 0, i = begin; j < kAtOnce; ++j, i += kThreads)
      if (i < whole) v[j] = reinterpret_cast<const uint4*>(from)[i];
#pragma unroll
    for (uint32_t j = 0, i = begin; j < kAtOnce; ++j, i += kThreads)
      if (i < whole) reinterpret_cast<uint4*>(to)[i] = v[j];
  }
  for (uint32_t i = whole * kEach + threadIdx.x; i < n; i += kThreads) to[i] = from[i];
}

// Shared memory: Shared; upper halves of the keys [n], if halved, later the list; the map if
// kStaged.
template <class S, class T, bool kStaged>
__global__ void __launch_bounds__(kThreads<T>, 1)
    point_mask_loss_kernel(Problem p, const S* logits /*[B, R, T, h, w]*/, bool halved,
                           uint32_t list_bytes, uint32_t chunk, T* bce /*[B, R, T]*/,
                           T* dice /*[B, R, T]*/, T* sums /*[B, R, T, 3]*/,
                           uint32_t* marks /*[B, R, T, words]*/) {
  SEGKERN_SHARED(unsigned char, memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  uint16_t* list = reinterpret_cast<uint16_t*>(memory + sizeof(Shared));
  const Slot slot = find_slot(p);
  uint32_t* words = marks + uint64_t(slot.index) * p.words();
  if (!p.active[slot.index]) {
    for (uint32_t i = threadIdx.x; i < p.words(); i += kThreads<T>) words[i] = 0;
    if (threadIdx.x == 0) {
      bce[slot.index] = dice[slot.index] = T(0);
      for (int j = 0; j < 3; ++j) sums[3ull * slot.index + j] = T(0);
    }
    return;
  }
  const uint32_t area = static_cast<uint32_t>(p.h) * p.w;
  const S* map = logits + uint64_t(slot.index) * area;
  if constexpr (kStaged) {
    S* staged = reinterpret_cast<S*>(memory + sizeof(Shared) + list_bytes);
    copy<S, kThreads<T>>(map, area, staged);
    map = staged;
  }
  for (uint32_t i = threadIdx.x; i < kBins; i += kThreads<T>) shared.bins[i] = 0;
  __syncthreads();

  const uint32_t n = p.candidates, k = p.important;
  const bool some = 0 < k && k < n;
  const auto exact = [&](uint32_t i) {
    const Point at = slot.draw(i);
    return counts<T>(p, slot, at) ? magnitude(sample<T>(at, map, p.h, p.w)) : ~Key<T>(0) >> 1;
  };
  Border<T> border;
  if (some) {
    for (uint32_t i = threadIdx.x; halved && i < n; i += kThreads<T>) {
      list[i] = static_cast<uint16_t>(exact(i) >> Border<T>::kCut);
      atomic_add(&shared.bins[list[i] >> (16 - kDigit)], 1u);
    }
    __syncthreads();
    border = select<T>(n, k, halved, list, exact, shared);
  }
  // a byte is eight candidates
  uint8_t* bytes = reinterpret_cast<uint8_t*>(words);
  for (uint32_t byte = threadIdx.x; byte < 4 * p.words(); byte += kThreads<T>) {
    auto [chosen, at] = compare(border, 8 * byte, n, some && halved, list);
    if (k == n || (some && halved && border.shift >= Border<T>::kCut)) {
      chosen |= at;
      at = 0;
    }
    for (; some && at != 0; at &= at - 1) {
      const uint32_t j = __ffs(static_cast<int>(at)) - 1, i = 8 * byte + j;
      chosen |= static_cast<uint32_t>(border.chooses(exact(i), i)) << j;
    }
    bytes[byte] = static_cast<uint8_t>(chosen);
  }
  __syncthreads();

  if (threadIdx.x == 0) shared.count = 0;  // of points that do not count
  T total[4] = {};                         // bce, p t, p, t
  for (uint32_t base = 0, taken = 0; base < n + p.random; base += chunk) {
    const Points points = list_points<T>(p, words, base, chunk, k - taken, list, shared);
    taken += points.listed;
    for (uint32_t q = threadIdx.x; q < points.total; q += kThreads<T>) {
      const Point at = slot.draw(base + points.offset(q, list));
      if (!counts<T>(p, slot, at)) {
        atomic_add(&shared.count, 1u);
        continue;
      }
      const T x = sample<T>(at, map, p.h, p.w), t = sample_mask<T>(p, slot, at);
      const T e = exp(x < T(0) ? x : -x);
      const T s = T(1) / (T(1) + e), prob = x < T(0) ? e * s : s;
      total[0] += (x > T(0) ? x : T(0)) + log1p(e) - x * t;
      total[1] += prob * t;
      total[2] += prob;
      total[3] += t;
    }
    __syncthreads();
  }
  join(total, shared, [](T a, T b) { return a + b; });
  if (threadIdx.x == 0) {
    const T both = total[2] + total[3], n = static_cast<T>(max(p.points() - shared.count, 1u));
    bce[slot.index] = total[0] / n;
    dice[slot.index] = T(1) - (T(2) * total[1] + T(1)) / (both + T(1));
    sums[3ull * slot.index] = total[1];
    sums[3ull * slot.index + 1] = both;
    sums[3ull * slot.index + 2] = n;
  }
}

}  // namespace
}  // namespace segkern
