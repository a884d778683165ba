// What both directions of point_mask_loss do in a block of threads: draw, sample, choose and list
// points, add up. Letters: B image, R prediction, T target, h w logit map, H W mask, n candidates,
// k important, P all points.
#pragma once

#include <math.h>

#include "../philox.h"
#include "device.h"

namespace segkern {
namespace {

constexpr unsigned kDigit = 11;  // bits that one pass of the selection decides
constexpr unsigned kBins = 1u << kDigit;
constexpr unsigned kChunk = 32 * kBins;  // points listed at a time, at most: offsets of 16 bits

template <class T>
constexpr unsigned kThreads = sizeof(T) == 8 ? 512 : 1024;  // doubles need twice the registers

struct Problem {
  const uint8_t* masks;   // [B, T, H, W]
  const uint8_t* active;  // [B, R, T]
  const int64_t* ids;     // [B]
  const int64_t* seed;    // [1]
  uint32_t R, T;
  int32_t h, w, H, W;
  uint32_t candidates, important, random;

  SEGKERN_DEVICE uint32_t points() const { return important + random; }
  SEGKERN_DEVICE uint32_t words() const { return (candidates + 31) / 32; }
};

// Working memory of a block, ahead of the rest of its shared memory
struct alignas(16) Shared {
  uint32_t bins[kBins];       // a histogram; or the first place of each word or row in a list
  uint32_t totals[kWarp];     // of the warps
  double partial[4 * kWarp];  // [value, warp]
  uint32_t bin, before, count;
};

struct Slot {
  uint64_t index;       // in [B, R, T]
  const uint8_t* mask;  // [H, W]
  uint64_t seed;
  uint32_t target, prediction, sample;

  __device__ __forceinline__ Point draw(uint32_t i) const {
    return random_point(seed, i, target, prediction, sample);
  }
};

// The slot of this block: predictions of one target follow one another and share its mask in L2
__device__ __forceinline__ Slot find_slot(const Problem& p) {
  const uint32_t r = blockIdx.x % p.R, t = blockIdx.x / p.R % p.T, b = blockIdx.x / p.R / p.T;
  const uint64_t target = static_cast<uint64_t>(b) * p.T + t;
  return {(static_cast<uint64_t>(b) * p.R + r) * p.T + t,
          p.masks + target * p.H * p.W,
          static_cast<uint64_t>(*p.seed),
          t,
          r,
          static_cast<uint32_t>(p.ids[b])};
}

// The four pixels around a point; the weight of those outside is 0. The multiply-adds are spelled
// out, so that every pass over the candidates sees the same bits.
template <class T>
struct Cell {
  int32_t x, y;  // of the top left one, from -1
  T left, right, top, bottom;
};

template <class T>
__device__ __forceinline__ Cell<T> locate(Point p, int32_t h, int32_t w) {
  const T x = fma(static_cast<T>(p.x), static_cast<T>(w), T(-0.5));
  const T y = fma(static_cast<T>(p.y), static_cast<T>(h), T(-0.5));
  const T xf = floor(x), yf = floor(y), fx = x - xf, fy = y - yf;
  const int32_t ix = static_cast<int32_t>(xf), iy = static_cast<int32_t>(yf);
  return {ix,
          iy,
          0 <= ix && ix < w ? T(1) - fx : T(0),
          ix < w - 1 ? fx : T(0),
          0 <= iy && iy < h ? T(1) - fy : T(0),
          iy < h - 1 ? fy : T(0)};
}

// f(offset, weight) of each corner; an offset is inside where the weight is not 0
template <class T, class F>
__device__ __forceinline__ void each_corner(const Cell<T>& c, int32_t w, const F& f) {
  const uint32_t row = static_cast<uint32_t>(w);
  const uint32_t at = static_cast<uint32_t>(c.y) * row + static_cast<uint32_t>(c.x);
  f(at, c.left * c.top);
  f(at + 1, c.right * c.top);
  f(at + row, c.left * c.bottom);
  f(at + row + 1, c.right * c.bottom);
}

template <class T, class S>
__device__ __forceinline__ T sample(Point p, const S* map /*[h, w]*/, int32_t h, int32_t w) {
  T sum = T(0);
  each_corner(locate<T>(p, h, w), w, [&](uint32_t at, T a) {
    const T v = a == T(0) ? T(0) : static_cast<T>(map[at]);
    sum = fma(a, v, sum);
  });
  return sum;
}

// The sum of `value` over the threads before this one, and over all
__device__ __forceinline__ uint32_t scan(uint32_t value, Shared& shared, uint32_t& total) {
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  uint32_t sum = value;
#pragma unroll
  for (unsigned d = 1; d < kWarp; d *= 2) {
    const uint32_t other = __shfl_up_sync(kAllLanes, sum, d);
    if (lane >= d) sum += other;
  }
  if (lane == kWarp - 1) shared.totals[warp] = sum;
  __syncthreads();
  uint32_t sums = lane < blockDim.x / kWarp ? shared.totals[lane] : 0;
  const uint32_t own = __shfl_sync(kAllLanes, sums, warp);
#pragma unroll
  for (unsigned d = 1; d < kWarp; d *= 2) {
    const uint32_t other = __shfl_up_sync(kAllLanes, sums, d);
    if (lane >= d) sums += other;
  }
  total = __shfl_sync(kAllLanes, sums, kWarp - 1);
  const uint32_t before = __shfl_sync(kAllLanes, sums, warp) - own;
  __syncthreads();
  return before + sum - value;
}

// Joins N values over the threads, in one fixed order; every thread gets the results. 0 must be
// neutral
template <class T, int N, class F>
__device__ __forceinline__ void join(T (&v)[N], Shared& shared, const F& f) {
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  static_assert(N <= 4);
#pragma unroll
  for (int k = 0; k < N; ++k) {
#pragma unroll
    for (unsigned d = kWarp / 2; d > 0; d /= 2)
      v[k] = f(v[k], __shfl_xor_sync(kAllLanes, v[k], d));
    if (lane == 0) shared.partial[k * kWarp + warp] = v[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < N; ++k) {
    v[k] = T(0);
    if (lane < blockDim.x / kWarp) v[k] = static_cast<T>(shared.partial[k * kWarp + lane]);
#pragma unroll
    for (unsigned d = kWarp / 2; d > 0; d /= 2)
      v[k] = f(v[k], __shfl_xor_sync(kAllLanes, v[k], d));
  }
  __syncthreads();
}

// Adds up the bins before each; own[j] is bin threadIdx.x * N + j
template <int N>
__device__ __forceinline__ void scan_bins(uint32_t (&own)[N], Shared& shared, uint32_t& total) {
  uint32_t sum = 0;
#pragma unroll
  for (int j = 0; j < N; ++j) sum += own[j];
  uint32_t before = scan(sum, shared, total);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    shared.bins[threadIdx.x * N + j] = before;
    before += own[j];
  }
  __syncthreads();
}

template <class T>
using Key = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

// The order of |x| as integers; NaN are equal and come last
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
  static constexpr int kCut = kBits - 16;          // what the kept halves of the keys leave out

  Key<T> low = 0, span = ~Key<T>(0) >> 1;
  uint32_t first = 0, reach = ~0u;
  int shift = kBits;  // span = 2^shift - 1

  __device__ __forceinline__ bool touches(Key<T> key, uint32_t i) const {
    return key - low <= span && i - first <= reach;
  }
  __device__ __forceinline__ bool chooses(Key<T> key, uint32_t i) const {
    return key < low || (key - low <= span && i <= first + reach);
  }
  // Candidate i's key; of one that the kept half decides, with the bits below it 0
  template <class F>
  __device__ __forceinline__ Key<T> look(uint32_t i, const uint16_t* kept, int bits,
                                         const F& exact) const {
    if (kept == nullptr) return exact(i);
    const Key<T> rough = static_cast<Key<T>>(kept[i]) << kCut;
    return bits < kCut && rough >> kCut == low >> kCut ? exact(i) : rough;
  }
};

// Radix select of the k smallest of n > k > 0 keys, of equal ones those drawn first. Each pass
// counts one digit of the keys that are still open and keeps the bin that holds the k-th; a last
// one or two do the same with the candidates' numbers where keys are equal. Most keys are decided
// by the half that is kept (null: none is), exact(i) computes one anew. Expects the bins at 0.
template <class T, class F>
__device__ __forceinline__ Border<T> select(uint32_t n, uint32_t k, const uint16_t* kept /*[n]*/,
                                            const F& exact, Shared& shared) {
  constexpr unsigned kOwn = kBins / kThreads<T>;
  Border<T> border;
  int turn = 32;  // bits of the numbers that are still open
  uint32_t left = k, open = n;
  while (left < open) {
    const bool by_key = border.shift > 0;
    const int rest = !by_key                          ? turn
                     : border.shift > Border<T>::kCut ? border.shift - Border<T>::kCut
                                                      : border.shift;
    const int digit = min(static_cast<int>(kDigit), rest);
    const int shift = (by_key ? border.shift : turn) - digit;
    for (uint32_t i = threadIdx.x; i < n; i += kThreads<T>) {
      const Key<T> key = border.look(i, kept, by_key ? shift : 0, exact);
      if (!border.touches(key, i)) continue;
      const Key<T> place = by_key ? (key - border.low) >> shift : (i - border.first) >> shift;
      atomic_add(&shared.bins[place], 1u);
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

// The points with numbers from `base` on, fewer than 2^16: the marked candidates in `list`, then
// the random ones in a row; as offsets from base
struct Points {
  uint32_t base, listed, random, total;

  __device__ __forceinline__ uint32_t offset(uint32_t q, const uint16_t* list) const {
    return q < listed ? list[q] : random + (q - listed);
  }
};

// Lists the points of [base, base + size), size a multiple of 32 and at most kChunk. No more than
// `room` candidates: marks may be anything.
template <class T>
__device__ __forceinline__ Points list_points(const Problem& p, const uint32_t* marks /*[words]*/,
                                              uint32_t base, uint32_t size, uint32_t room,
                                              uint16_t* list, Shared& shared) {
  constexpr unsigned kOwn = kBins / kThreads<T>;
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const uint32_t from = base / 32, words = min(size / 32, max(p.words(), from) - from);
  const auto word = [&](uint32_t w) {
    if (w >= words) return 0u;
    const uint32_t last =
        p.candidates - 32 * (from + w);  // of the word: those behind are no points
    return last < 32 ? marks[from + w] & ((1u << last) - 1) : marks[from + w];
  };
  uint32_t own[kOwn], total;
#pragma unroll
  for (unsigned j = 0; j < kOwn; ++j) own[j] = __popc(word(threadIdx.x * kOwn + j));
  scan_bins(own, shared, total);
  for (uint32_t w = warp; w < words; w += kThreads<T> / kWarp) {
    const uint32_t bits = word(w);
    const uint32_t place = shared.bins[w] + __popc(bits & ((1u << lane) - 1));
    if ((bits >> lane & 1) && place < room) list[place] = static_cast<uint16_t>(32 * w + lane);
  }
  __syncthreads();
  const uint32_t end = min(base + size, p.candidates + p.random);
  const uint32_t random = max(base, p.candidates), listed = min(total, room);
  return {base, listed, random - base, listed + (end > random ? end - random : 0)};
}

}  // namespace
}  // namespace segkern
