// The backward kernel of point_mask_loss.
#pragma once

#include "point_mask_loss.h"

namespace segkern {
namespace {

// How backward cuts a slot: points into chunks, the map into strips of columns and these into
// bands of rows. Usually one chunk and one strip.
struct Cut {
  uint32_t chunk, room;   // points numbered together, at most kChunk; of these listed at most
  int32_t rows, columns;  // of a band
  int32_t bands, strips;
  int32_t row_shift;  // 2^row_shift rows of cells have a bin
  uint32_t sums;      // pixels in shared memory: a band and the row below it

  SEGKERN_DEVICE uint32_t bin(int32_t y /*from -1*/, int32_t h) const {
    return static_cast<uint32_t>((y < h ? y : h - 1) + 1) >> row_shift;
  }
};

// A sum of fixed-point numbers of 64 bits in two words: no GPU adds 64 bits in shared memory with
// one instruction. The carry goes along with the upper word; the order of the adders is free.
struct FixedSum {
  uint32_t *low, *high;

  __device__ __forceinline__ void add(int64_t v) const {
    const uint32_t addend = static_cast<uint32_t>(v), before = atomicAdd(low, addend);
    const uint32_t carry = before + addend < addend;
    atomic_add(high, static_cast<uint32_t>(static_cast<uint64_t>(v) >> 32) + carry);
  }
  __device__ __forceinline__ int64_t get() const {
    return static_cast<int64_t>(static_cast<uint64_t>(*high) << 32 | *low);
  }
};

// The fixed-point gradient of a band of pixels and of the row below it. A double needs two sums:
// the second takes what the first one rounds off.
template <class T>
struct Band {
  static constexpr int kSums = sizeof(T) / 4;

  uint32_t* words;  // [kSums, 2, pixels]
  uint32_t pixels;
  int fraction;  // bits behind the point

  __device__ __forceinline__ FixedSum sum(uint32_t pixel, int k) const {
    uint32_t* low = words + 2 * k * pixels + pixel;
    return {low, low + pixels};
  }
  __device__ __forceinline__ void add(uint32_t pixel, T v /*scaled by 2^fraction*/) const {
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
      const int64_t whole = llrint(v);
      sum(pixel, k).add(whole);
      v = scalbn(v - static_cast<T>(whole), fraction);
    }
  }
  // The pixel's value; `next` takes its place, and 0 that of `next`
  __device__ __forceinline__ T take(uint32_t pixel, bool replace, uint32_t next) const {
    const T one = scalbn(T(1), -fraction);
    T value = T(0);
#pragma unroll
    for (int k = kSums - 1; k >= 0; --k) {
      const FixedSum here = sum(pixel, k), there = sum(next, k);
      value = (value + static_cast<T>(here.get())) * one;
      *here.low = replace ? *there.low : 0;
      *here.high = replace ? *there.high : 0;
      if (replace) *there.low = *there.high = 0;
    }
    return value;
  }
};

// Sorts the listed points by the row of their cell; a bin then holds the end of its points. The
// order within a bin is left open. `list` and `bin_of` are free afterwards.
template <class T>
__device__ __forceinline__ void sort_by_row(const Problem& p, const Cut& cut, const Slot& slot,
                                            const Points& points, const uint16_t* list,
                                            uint16_t* bin_of, uint16_t* sorted, Shared& shared) {
  constexpr unsigned kOwn = kBins / kThreads<T>;  // bins of a thread
  for (uint32_t i = threadIdx.x; i < kBins; i += kThreads<T>) shared.bins[i] = 0;
  __syncthreads();
  for (uint32_t q = threadIdx.x; q < points.total; q += kThreads<T>) {
    const Point at = slot.draw(points.base + points.offset(q, list));
    const uint32_t bin = cut.bin(locate<T>(at, p.h, p.w).y, p.h);
    bin_of[q] = static_cast<uint16_t>(bin);
    atomic_add(&shared.bins[bin], 1u);
  }
  __syncthreads();
  uint32_t own[kOwn], sum = 0, total;
#pragma unroll
  for (unsigned j = 0; j < kOwn; ++j) sum += own[j] = shared.bins[threadIdx.x * kOwn + j];
  uint32_t before = scan(sum, shared, total);
#pragma unroll
  for (unsigned j = 0; j < kOwn; ++j) {
    shared.bins[threadIdx.x * kOwn + j] = before;
    before += own[j];
  }
  __syncthreads();
  for (uint32_t q = threadIdx.x; q < points.total; q += kThreads<T>)
    sorted[atomicAdd(&shared.bins[bin_of[q]], 1u)] = static_cast<uint16_t>(points.offset(q, list));
  __syncthreads();
}

// Shared memory: Shared; offsets of the sorted points [room]; their derivatives [room], before
// that the list and the bins of its points; the band.
template <class S, class T>
__global__ void __launch_bounds__(kThreads<T>, 1)
    point_mask_loss_backward_kernel(Problem p, Cut cut, const T* grad_bce /*[B, R, T]*/,
                                    const T* grad_dice /*[B, R, T]*/,
                                    const T* sums /*[B, R, T, 3]*/,
                                    const uint32_t* marks /*[B, R, T, words]*/,
                                    const S* logits /*[B, R, T, h, w]*/,
                                    S* grad /*[B, R, T, h, w]*/) {
  SEGKERN_SHARED(unsigned char, memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  uint16_t* sorted = reinterpret_cast<uint16_t*>(memory + sizeof(Shared));
  T* weights = reinterpret_cast<T*>(sorted + cut.room);
  uint16_t* list = reinterpret_cast<uint16_t*>(weights);
  const Slot slot = find_slot(p);
  const uint32_t area = static_cast<uint32_t>(p.h) * p.w, N = p.candidates + p.random;
  const S* map = logits + uint64_t(slot.index) * area;
  S* out = grad + uint64_t(slot.index) * area;
  if (!p.active[slot.index]) {
    for (uint32_t i = threadIdx.x; i < area; i += kThreads<T>) out[i] = static_cast<S>(T(0));
    return;
  }
  // a derivative is below 2^(exponent + 1), P below 2^bits: sums of derivatives times
  // 2^(fraction - exponent) stay below 2^62
  const Band<T> band = {reinterpret_cast<uint32_t*>(weights + cut.room), cut.sums,
                        61 - (32 - __clz(static_cast<int>(p.points())))};
  int exponent = 0;
  for (uint32_t i = threadIdx.x; i < 2 * band.kSums * cut.sums; i += kThreads<T>)
    band.words[i] = 0;

  // d loss / d logit at a point: bce gives (p - t) / n; dice, with a = sum p t and
  // c = sum p + sum t, gives ((2 a + 1) - 2 t (c + 1)) / (c + 1)^2 p (1 - p)
  const T a = sums[3ull * slot.index], c = sums[3ull * slot.index + 1];
  const T scale_bce = grad_bce[slot.index] / sums[3ull * slot.index + 2];
  const T scale_dice = grad_dice[slot.index] / ((c + T(1)) * (c + T(1)));
  const auto differentiate = [&](Point at) {
    if (!counts<T>(p, slot, at)) return T(0);
    const T x = sample<T>(at, map, p.h, p.w), t = sample_mask<T>(p, slot, at);
    const T e = exp(x < T(0) ? x : -x), s = T(1) / (T(1) + e), prob = x < T(0) ? e * s : s;
    const T dice = (T(2) * a + T(1)) - T(2) * t * (c + T(1));
    return scale_bce * (prob - t) + scale_dice * dice * prob * (T(1) - prob);
  };

  // step 0 finds the largest derivative; then a step for each piece of the map; then, where
  // derivatives are not finite, one that makes NaN of the pixels that they touch
  const bool one_chunk = cut.chunk >= N;
  const int32_t pieces = cut.bands * cut.strips;
  T largest[2] = {};  // finite |derivative|; 1 where one is not finite
  bool spoilt = false;
  for (int32_t step = 0; step <= pieces + spoilt; ++step) {
    const int32_t piece = step - 1;
    const int32_t top = piece % cut.bands * cut.rows, left = piece / cut.bands * cut.columns;
    for (uint32_t base = 0, taken = 0; base < N; base += cut.chunk) {
      if (step == 0 || !one_chunk) {
        __syncthreads();
        const Points points = list_points<T>(p, marks + uint64_t(slot.index) * p.words(), base,
                                             cut.chunk, p.important - taken, list, shared);
        taken += points.listed;
        sort_by_row<T>(p, cut, slot, points, list, list + cut.room, sorted, shared);
        for (uint32_t q = threadIdx.x; q < points.total; q += kThreads<T>) {
          const T g = differentiate(slot.draw(base + sorted[q])), size = fabs(g);
          weights[q] = g;
          if (size - size == T(0))
            largest[0] = max(largest[0], size);
          else
            largest[1] = T(1);
        }
        __syncthreads();
      }
      if (step == 0) continue;
      const bool last = piece == pieces;
      const uint32_t from_bin = last || top == 0 ? 0 : cut.bin(top, p.h);
      const uint32_t to_bin = cut.bin(last ? p.h - 1 : top + min(cut.rows, p.h - top) - 1, p.h);
      const uint32_t to = shared.bins[to_bin];
      for (uint32_t q = (from_bin > 0 ? shared.bins[from_bin - 1] : 0) + threadIdx.x; q < to;
           q += kThreads<T>) {
        const T g = weights[q];
        const bool finite = g - g == T(0);
        if (finite == last) continue;
        Cell<T> cell = locate<T>(slot.draw(base + sorted[q]), p.h, p.w);
        if (last) {  // threads that meet in a pixel write the same
          each_corner(cell, p.w, [&](uint32_t at, T weight) {
            if (weight != T(0)) out[at] = static_cast<S>(g - g);
          });
          continue;
        }
        const int32_t y = max(cell.y, 0) - top;  // cells above the map belong to the first band
        if (!(0 <= y && y < cut.rows)) continue;
        cell.y -= top;
        cell.x -= left;
        if (!(0 <= cell.x && cell.x < cut.columns)) cell.left = T(0);
        if (!(-1 <= cell.x && cell.x < cut.columns - 1)) cell.right = T(0);
        const T scaled = scalbn(g, band.fraction - exponent);
        each_corner(cell, cut.columns, [&](uint32_t at, T weight) {
          if (weight != T(0)) band.add(at, weight * scaled);
        });
      }
    }
    __syncthreads();
    if (step == 0) {
      join(largest, shared, [](T a, T b) { return max(a, b); });
      exponent = largest[0] > T(0) ? ilogb(largest[0]) : 0;
      spoilt = largest[1] > T(0);
    } else if (piece < pieces) {
      const T unit = scalbn(T(1), exponent);
      const uint32_t columns = static_cast<uint32_t>(cut.columns), carried = cut.rows * columns;
      for (uint32_t i = threadIdx.x; i < carried; i += kThreads<T>) {
        // the first row takes over what is on the row below the band
        const T value = band.take(i, i < columns, i + carried) * unit;
        uint32_t at = static_cast<uint32_t>(top) * p.w + i;
        bool inside = at < area;
        if (cut.strips > 1) {
          const int32_t y = top + static_cast<int32_t>(i / columns);
          const int32_t x = left + static_cast<int32_t>(i % columns);
          at = static_cast<uint32_t>(y) * p.w + x;
          inside = y < p.h && x < p.w;
        }
        if (inside) out[at] = static_cast<S>(value);
      }
      __syncthreads();
    }
  }
}

}  // namespace
}  // namespace segkern
