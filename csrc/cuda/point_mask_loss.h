// What both directions of point_mask_loss do in a block of threads: draw, sample, choose and list
// points, add up. Letters: B image, R prediction, T target, h w logit map, H W mask, n candidates,
// k important, P all points. Points in a cell of the mask that has a void pixel do not count: last
// of the candidates, then passed over.
#pragma once

#include <math.h>

#include "../philox.h"
#include "point_mask_loss_pack.h"

namespace segkern {
namespace {

constexpr unsigned kDigit = 11;  // bits that one pass of the selection decides
constexpr unsigned kBins = 1u << kDigit;
constexpr unsigned kChunk = 32 * kBins;  // points listed at a time, at most: offsets of 16 bits

template <class T>
constexpr unsigned kThreads = sizeof(T) == 8 ? 512 : 1024;  // doubles need twice the registers

struct Problem {
  const uint32_t* masks;  // [B, T, tiles]
  Tiles tiles;            // of a mask [H, W]
  const uint8_t* active;  // [B, R, T]
  const int64_t* ids;     // [B]
  const int64_t* seed;    // [1]
  const uint32_t* cells;  // [B, H + 1, cell_words]: void in one of its pixels; null: none is
  uint32_t R, T;
  int32_t h, w, H, W;
  uint32_t candidates, important, random;

  SEGKERN_DEVICE uint32_t points() const { return important + random; }
  SEGKERN_DEVICE uint32_t words() const { return (candidates + 31) / 32; }
  SEGKERN_DEVICE uint32_t cell_words() const { return (static_cast<uint32_t>(W) + 32) / 32; }
};

// Working memory of a block, ahead of the rest of its shared memory
struct alignas(16) Shared {
  uint32_t bins[kBins];       // a histogram; or the first place of each word or row in a list
  uint32_t totals[kWarp];     // of the warps
  double partial[4 * kWarp];  // [value, warp]
  uint32_t bin, before, count;
};

struct Slot {
  uint32_t index;        // in [B, R, T]
  const uint32_t* mask;  // [tiles]
  uint32_t cells;        // place of its [H + 1, cell_words]; cell (y, x) is bit x + 1 of row y + 1
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
  return {(b * p.R + r) * p.T + t,
          p.masks + target * p.tiles.size(),
          b * (static_cast<uint32_t>(p.H) + 1) * p.cell_words(),
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

template <class T>
__device__ __forceinline__ bool counts(const Problem& p, const Slot& slot, Point at) {
  if (p.cells == nullptr) return true;
  const Cell<T> cell = locate<T>(at, p.H, p.W);
  const uint32_t x = cell.x + 1, y = cell.y + 1;
  return (p.cells[slot.cells + y * p.cell_words() + x / 32] >> x % 32 & 1) == 0;
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

// The same of the slot's mask, 0 or 1 at each pixel. Those outside weigh 0, whatever is read for
// them
template <class T>
__device__ __forceinline__ T sample_mask(const Problem& p, const Slot& slot, Point point) {
  const Cell<T> c = locate<T>(point, p.H, p.W);
  const auto tile_of = [&](uint32_t y, uint32_t x) {
    return y / kTileRows * p.tiles.columns + x / kTileColumns;
  };
  const uint32_t x0 = max(c.x, 0), y0 = max(c.y, 0), first = tile_of(y0, x0);
  const uint32_t x1 = min(c.x + 1, p.W - 1), y1 = min(c.y + 1, p.H - 1);
  const uint32_t word = slot.mask[first];
  T sum = T(0);
  const auto add = [&](uint32_t y, uint32_t x, T a) {
    const uint32_t tile = tile_of(y, x), bits = tile == first ? word : slot.mask[tile];
    if (bits >> (y % kTileRows * kTileColumns + x % kTileColumns) & 1) sum += a;
  };
  add(y0, x0, c.left * c.top);
  add(y0, x1, c.right * c.top);
  add(y1, x0, c.left * c.bottom);
  add(y1, x1, c.right * c.bottom);
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
  constexpr unsigned kOwn = kBins / kThreads<T>;  // words of a thread
  const uint32_t from = base / 32, words = min(size / 32, max(p.words(), from) - from);
  uint32_t bits[kOwn], own = 0, total;
#pragma unroll
  for (unsigned j = 0; j < kOwn; ++j) {
    const uint32_t w = threadIdx.x * kOwn + j;
    bits[j] = w < words ? marks[from + w] : 0;
    const uint32_t valid = p.candidates - 32 * (from + w);  // bits of the last word
    if (w < words && valid < 32) bits[j] &= (1u << valid) - 1;
    own += __popc(bits[j]);
  }
  uint32_t place = scan(own, shared, total);
#pragma unroll
  for (unsigned j = 0; j < kOwn; ++j) {
    const uint32_t offset = 32 * (threadIdx.x * kOwn + j) - 1;  // __ffs counts from 1
    for (uint32_t rest = bits[j]; rest != 0 && place < room; rest &= rest - 1)
      list[place++] = static_cast<uint16_t>(offset + __ffs(static_cast<int>(rest)));
  }
  __syncthreads();
  const uint32_t end = min(base + size, p.candidates + p.random);
  const uint32_t random = max(base, p.candidates), listed = min(total, room);
  return {base, listed, random - base, listed + (end > random ? end - random : 0)};
}

}  // namespace
}  // namespace segkern
