// point_mask_loss on the GPU: one block of threads a slot (one image, prediction and target). The
// same points, choice and sums as on the CPU (csrc/cpu/point_mask_loss.cpp). Letters there and in
// point_mask_loss.h. S stores the logits, T computes.
//
// forward:  the logit map is copied into shared memory where it fits. All candidates are sampled
//           once; the upper half of each |logit| is kept, 2 bytes a candidate; radix select on
//           them, where only those that share the border's half are sampled anew; marks, sums.
// backward: the points are sorted by the row of their cell; bands of rows are added up in shared
//           memory, from the top. The sums are integers, so that their order does not matter:
//           bit-identical from run to run. What a band puts on the row below it is carried over.
//
// Chosen by arithmetic, not yet measured: one block an SM with all of its shared memory. For
// 256x256 logits of 2 bytes and 37632 candidates 131 + 75 KB: the random reads then cost 3 to 4
// cycles a warp, an eighth of what they cost in L1. An A100 (163 KB) and float maps read through
// L1 and L2.
#include "point_mask_loss.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace segkern {
namespace {

using c10::BFloat16;
using c10::Half;

template <class S>
__device__ void copy(const S* from /*[n]*/, uint32_t n, S* to /*[n], aligned*/) {
  constexpr uint32_t kEach = sizeof(uint4) / sizeof(S);
  const bool aligned = reinterpret_cast<uintptr_t>(from) % sizeof(uint4) == 0;
  const uint32_t whole = aligned ? n / kEach : 0;
#pragma unroll 4
  for (uint32_t i = threadIdx.x; i < whole; i += blockDim.x)
    reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
  for (uint32_t i = whole * kEach + threadIdx.x; i < n; i += blockDim.x) to[i] = from[i];
}

// Shared memory: Shared; kept halves of the keys [n], later the list; the map if kStaged.
template <class S, class T, bool kStaged>
__global__ void __launch_bounds__(kThreads<T>)
    point_mask_loss_kernel(Problem p, const S* logits /*[B, R, T, h, w]*/, bool keep,
                           uint32_t list_bytes, T* bce /*[B, R, T]*/, T* dice /*[B, R, T]*/,
                           T* sums /*[B, R, T, 2]*/, uint32_t* marks /*[B, R, T, words]*/) {
  SEGKERN_SHARED(unsigned char, memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  uint16_t* list = reinterpret_cast<uint16_t*>(memory + sizeof(Shared));
  const Slot slot = find_slot(p);
  uint32_t* words = marks + slot.index * p.words();
  if (!p.active[slot.index]) {
    for (uint32_t i = threadIdx.x; i < p.words(); i += kThreads<T>) words[i] = 0;
    if (threadIdx.x == 0) {
      bce[slot.index] = dice[slot.index] = T(0);
      sums[2 * slot.index] = sums[2 * slot.index + 1] = T(0);
    }
    return;
  }
  const uint32_t area = static_cast<uint32_t>(p.h) * p.w;
  const S* map = logits + slot.index * area;
  if constexpr (kStaged) {
    S* staged = reinterpret_cast<S*>(memory + sizeof(Shared) + list_bytes);
    copy(map, area, staged);
    map = staged;
  }
  for (uint32_t i = threadIdx.x; i < kBins; i += kThreads<T>) shared.bins[i] = 0;
  __syncthreads();

  const uint32_t n = p.candidates, k = p.important;
  const auto exact = [&](uint32_t i) { return magnitude(sample<T>(slot.draw(i), map, p.h, p.w)); };
  const uint16_t* kept = keep ? list : nullptr;
  Border<T> border;  // k = n: all
  if (0 < k && k < n) {
    for (uint32_t i = threadIdx.x; keep && i < n; i += kThreads<T>)
      list[i] = static_cast<uint16_t>(exact(i) >> Border<T>::kCut);
    __syncthreads();
    border = select<T>(n, k, kept, exact, shared);
  }
  for (uint32_t begin = 0; begin < n; begin += kThreads<T>) {
    const uint32_t i = begin + threadIdx.x;
    bool chosen = i < n && k == n;
    if (i < n && 0 < k && k < n)
      chosen = border.chooses(border.look(i, kept, border.shift, exact), i);
    const uint32_t word = __ballot_sync(kAllLanes, chosen);
    if (i < n && threadIdx.x % kWarp == 0) words[i / 32] = word;
  }
  __syncthreads();

  T total[4] = {};  // bce, p t, p, t
  for (uint32_t base = 0, taken = 0; base < n + p.random; base += kChunk) {
    const Points points = list_points<T>(p, words, base, kChunk, k - taken, list, shared);
    taken += points.listed;
    for (uint32_t q = threadIdx.x; q < points.total; q += kThreads<T>) {
      const Point at = slot.draw(base + points.offset(q, list));
      const T x = sample<T>(at, map, p.h, p.w), t = sample<T>(at, slot.mask, p.H, p.W);
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
    const T both = total[2] + total[3];
    bce[slot.index] = total[0] / static_cast<T>(p.points());
    dice[slot.index] = T(1) - (T(2) * total[1] + T(1)) / (both + T(1));
    sums[2 * slot.index] = total[1];
    sums[2 * slot.index + 1] = both;
  }
}

// How backward cuts a slot: points into chunks, the map into strips of columns and these into
// bands of rows. Usually one chunk and one strip.
struct Cut {
  uint32_t chunk, room;   // points numbered together, at most kChunk; of these listed at most
  int32_t rows, columns;  // of a band
  int32_t bands, strips;
  int32_t row_shift;  // rows of cells 2^row_shift at a time have a bin
  uint32_t sums;      // pixels in shared memory: a band and the row below it
};

// A sum of fixed-point numbers of 64 bits as two words: no GPU adds 64 bits in shared memory with
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

// Shared memory: Shared; offsets of the sorted points [room]; their derivatives [room], before
// that the list and the bins of its points; words of the sums [2 or 4, cut.sums].
template <class S, class T>
__global__ void __launch_bounds__(kThreads<T>)
    point_mask_loss_backward_kernel(Problem p, Cut cut, const T* grad_bce /*[B, R, T]*/,
                                    const T* grad_dice /*[B, R, T]*/,
                                    const T* sums /*[B, R, T, 2]*/,
                                    const uint32_t* marks /*[B, R, T, words]*/,
                                    const S* logits /*[B, R, T, h, w]*/,
                                    S* grad /*[B, R, T, h, w]*/) {
  constexpr unsigned kOwn = kBins / kThreads<T>;
  constexpr int kSums = sizeof(T) / 4;  // of a pixel: a double needs more than 64 bits
  SEGKERN_SHARED(unsigned char, memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  uint16_t* sorted = reinterpret_cast<uint16_t*>(memory + sizeof(Shared));
  T* weights = reinterpret_cast<T*>(sorted + cut.room);
  uint16_t *list = reinterpret_cast<uint16_t*>(weights), *bin_of = list + cut.room;
  uint32_t* pixels = reinterpret_cast<uint32_t*>(weights + cut.room);
  const Slot slot = find_slot(p);
  const uint32_t area = static_cast<uint32_t>(p.h) * p.w, N = p.candidates + p.random;
  const S* map = logits + slot.index * area;
  S* out = grad + slot.index * area;
  if (!p.active[slot.index]) {
    for (uint32_t i = threadIdx.x; i < area; i += kThreads<T>) out[i] = static_cast<S>(T(0));
    return;
  }
  for (uint32_t i = threadIdx.x; i < 2 * kSums * cut.sums; i += kThreads<T>) pixels[i] = 0;

  // d loss / d logit at a point: bce gives (p - t) / P; dice, with a = sum p t and
  // c = sum p + sum t, gives ((2 a + 1) - 2 t (c + 1)) / (c + 1)^2 p (1 - p)
  const T a = sums[2 * slot.index], c = sums[2 * slot.index + 1];
  const T scale_bce = grad_bce[slot.index] / static_cast<T>(p.points());
  const T scale_dice = grad_dice[slot.index] / ((c + T(1)) * (c + T(1)));
  const auto differentiate = [&](Point at) {
    const T x = sample<T>(at, map, p.h, p.w), t = sample<T>(at, slot.mask, p.H, p.W);
    const T e = exp(x < T(0) ? x : -x), s = T(1) / (T(1) + e), prob = x < T(0) ? e * s : s;
    const T dice = (T(2) * a + T(1)) - T(2) * t * (c + T(1));
    return scale_bce * (prob - t) + scale_dice * dice * prob * (T(1) - prob);
  };
  const auto row_bin = [&](int32_t y) {
    return static_cast<uint32_t>(min(y, p.h - 1) + 1) >> cut.row_shift;
  };
  const auto sum_of = [&](uint32_t pixel, int k) {
    uint32_t* low = pixels + 2 * k * cut.sums + pixel;
    return FixedSum{low, low + cut.sums};
  };

  const bool one_chunk = cut.chunk >= N;
  const int32_t pieces = cut.bands * cut.strips;
  T largest[2] = {};  // finite |derivative|; 1 where one is not finite
  // |derivative| < 2^(exponent + 1), P < 2^bits: sums of derivative 2^(fraction - exponent) stay
  // below 2^62
  const int fraction = 61 - (32 - __clz(static_cast<int>(p.points())));
  int exponent = 0;
  bool spoilt = false;
  // step 0 finds the largest derivative, then one step a piece of the map, then, where derivatives
  // are not finite, one that makes NaN of the pixels that they touch
  for (int32_t step = 0; step <= pieces + spoilt; ++step) {
    const int32_t strip = (step - 1) / cut.bands, band = (step - 1) % cut.bands;
    const int32_t top = band * cut.rows, column = strip * cut.columns;
    for (uint32_t base = 0, taken = 0; base < N; base += cut.chunk) {
      const uint32_t* words = marks + slot.index * p.words();
      if (step == 0 || !one_chunk) {
        __syncthreads();
        const Points points =
            list_points<T>(p, words, base, cut.chunk, p.important - taken, list, shared);
        taken += points.listed;
        for (uint32_t i = threadIdx.x; i < kBins; i += kThreads<T>) shared.bins[i] = 0;
        __syncthreads();
        for (uint32_t q = threadIdx.x; q < points.total; q += kThreads<T>) {
          const Point at = slot.draw(base + points.offset(q, list));
          const uint32_t bin = row_bin(locate<T>(at, p.h, p.w).y);
          bin_of[q] = static_cast<uint16_t>(bin);
          atomic_add(&shared.bins[bin], 1u);
        }
        __syncthreads();
        uint32_t own[kOwn], total;
#pragma unroll
        for (unsigned j = 0; j < kOwn; ++j) own[j] = shared.bins[threadIdx.x * kOwn + j];
        scan_bins(own, shared, total);
        for (uint32_t q = threadIdx.x; q < points.total; q += kThreads<T>)
          sorted[atomicAdd(&shared.bins[bin_of[q]], 1u)] =
              static_cast<uint16_t>(points.offset(q, list));
        __syncthreads();  // a bin's entry is now the end of its points
        for (uint32_t q = threadIdx.x; q < points.total; q += kThreads<T>) {
          const T g = differentiate(slot.draw(base + sorted[q])), size = fabs(g);
          const bool finite = size - size == T(0);
          weights[q] = g;
          largest[0] = finite ? max(largest[0], size) : largest[0];
          largest[1] = finite ? largest[1] : T(1);
        }
        __syncthreads();
      }
      if (step == 0) continue;
      const bool last = step > pieces;
      const uint32_t from_bin = last ? 0 : row_bin(band == 0 ? -1 : top);
      const uint32_t to_bin = row_bin(last ? p.h - 1 : top + min(cut.rows, p.h - top) - 1);
      const uint32_t from = from_bin > 0 ? shared.bins[from_bin - 1] : 0;
      for (uint32_t q = from + threadIdx.x; q < shared.bins[to_bin]; q += kThreads<T>) {
        const T g = weights[q];
        const Cell<T> cell = locate<T>(slot.draw(base + sorted[q]), p.h, p.w);
        const bool finite = g - g == T(0);
        if (last) {
          each_corner(cell, p.w, [&](uint32_t at, T weight) {
            if (!finite && weight != T(0)) out[at] = static_cast<S>(g - g);
          });
          continue;
        }
        // y = -1 belongs to the first band
        const int32_t below = max(cell.y, 0) - top;
        const bool inside = 0 <= below && below < cut.rows;
        if (!finite || !inside) continue;
        const T fixed = scalbn(g, fraction - exponent);
        Cell<T> local = cell;
        local.y -= top;
        local.x -= column;
        if (!(0 <= local.x && local.x < cut.columns)) local.left = T(0);
        if (!(0 <= local.x + 1 && local.x + 1 < cut.columns)) local.right = T(0);
        each_corner(local, cut.columns, [&](uint32_t at, T weight) {
          if (weight == T(0)) return;
          T rest = weight * fixed;
#pragma unroll
          for (int k = 0; k < kSums; ++k) {
            const int64_t whole = llrint(rest);
            sum_of(at, k).add(whole);
            rest = scalbn(rest - static_cast<T>(whole), fraction);
          }
        });
      }
    }
    __syncthreads();
    if (step == 0) {
      join(largest, shared, [](T a, T b) { return max(a, b); });
      exponent = largest[0] > T(0) ? ilogb(largest[0]) : 0;
      spoilt = largest[1] > T(0);
    } else if (step <= pieces) {
      const T one = scalbn(T(1), -fraction), unit = scalbn(T(1), exponent);
      const uint32_t carried = static_cast<uint32_t>(cut.rows) * cut.columns;
      for (uint32_t i = threadIdx.x; i < carried; i += kThreads<T>) {
        T value = T(0);
#pragma unroll
        for (int k = kSums - 1; k >= 0; --k) {
          const FixedSum sum = sum_of(i, k), below = sum_of(i + carried, k);
          value = (value + static_cast<T>(sum.get())) * one;
          // the first row takes over what was put on the row below the band
          const bool first = i < static_cast<uint32_t>(cut.columns);
          *sum.low = first ? *below.low : 0;
          *sum.high = first ? *below.high : 0;
          if (first) *below.low = *below.high = 0;
        }
        uint32_t at = static_cast<uint32_t>(top) * p.w + i;
        bool inside = at < area;
        if (cut.strips > 1) {
          const int32_t y = top + static_cast<int32_t>(i) / cut.columns;
          const int32_t x = column + static_cast<int32_t>(i) % cut.columns;
          at = static_cast<uint32_t>(y) * p.w + x;
          inside = y < p.h && x < p.w;
        }
        if (inside) out[at] = static_cast<S>(value * unit);
      }
      __syncthreads();
    }
  }
}

// What lies outside would be read or written outside the tensors
void check(const Tensor& logits, const Tensor& masks, const Tensor& active, const Tensor& ids,
           const Tensor& seed, int64_t candidates, int64_t important, int64_t random) {
  const char* op = "point_mask_loss: ";
  STD_TORCH_CHECK(logits.dim() == 5 && masks.dim() == 4 && active.dim() == 3 && ids.dim() == 1, op,
                  "wrong number of dimensions");
  const int64_t B = logits.size(0), R = logits.size(1), T = logits.size(2);
  STD_TORCH_CHECK(masks.size(0) == B && masks.size(1) == T && ids.size(0) == B, op, "wrong sizes");
  STD_TORCH_CHECK(active.numel() == B * R * T && seed.numel() == 1, op, "wrong sizes");
  STD_TORCH_CHECK(masks.element_size() == 1 && active.element_size() == 1, op, "wrong dtype");
  STD_TORCH_CHECK(ids.element_size() == 8 && seed.element_size() == 8, op, "wrong dtype");
  STD_TORCH_CHECK(B * R * T <= INT32_MAX, op, "too many slots");
  STD_TORCH_CHECK(logits.size(3) * logits.size(4) <= INT32_MAX, op, "logit map too large");
  STD_TORCH_CHECK(masks.size(2) * masks.size(3) <= INT32_MAX, op, "mask too large");
  STD_TORCH_CHECK(0 <= important && important <= candidates && 0 <= random, op,
                  "more important points than candidates");
  STD_TORCH_CHECK(candidates + random <= INT32_MAX, op, "too many points");
  for (const Tensor* t : {&masks, &active, &ids, &seed})
    STD_TORCH_CHECK(
        t->is_cuda() == logits.is_cuda() && t->get_device_index() == logits.get_device_index(), op,
        "tensors on different devices");
}

// The arguments of both directions, dense
struct Arguments {
  Arguments(const Tensor& mask_logits, const Tensor& masks, const Tensor& active,
            const Tensor& sample_ids, const Tensor& seed, int64_t candidates, int64_t important,
            int64_t random)
      : logits(torch::stable::contiguous(mask_logits)),
        masks(torch::stable::contiguous(masks)),
        active(torch::stable::contiguous(active)),
        ids(torch::stable::contiguous(sample_ids)),
        seed(seed),
        slots(active.numel()),
        area(logits.size(3) * logits.size(4)),
        limit(static_cast<int64_t>(shared_limit(logits))) {
    const auto small = [](int64_t size) { return static_cast<int32_t>(size); };
    problem = {data<uint8_t>(this->masks),
               data<uint8_t>(this->active),
               data<int64_t>(ids),
               data<int64_t>(seed),
               static_cast<uint32_t>(logits.size(1)),
               static_cast<uint32_t>(logits.size(2)),
               small(logits.size(3)),
               small(logits.size(4)),
               small(masks.size(2)),
               small(masks.size(3)),
               static_cast<uint32_t>(candidates),
               static_cast<uint32_t>(important),
               static_cast<uint32_t>(random)};
  }
  IntList shape(std::initializer_list<int64_t> more = {}) const {
    IntList sizes = {logits.size(0), logits.size(1), logits.size(2)};
    sizes.insert(sizes.end(), more);
    return sizes;
  }

  Tensor logits, masks, active, ids, seed;
  int64_t slots, area, limit;  // limit: bytes of shared memory that a block may have
  Problem problem;
};

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class S, class T>
Results forward(const Arguments& in) {
  const Problem& p = in.problem;
  Tensor bce = empty<T>(in.logits, in.shape()), dice = empty<T>(in.logits, in.shape());
  Tensor sums = empty<T>(in.logits, in.shape({2}));
  Tensor marks = empty<int32_t>(in.logits, in.shape({p.words()}));
  // the list holds no more than the kept keys
  const int64_t fixed = sizeof(Shared), kept = round_up(2 * int64_t(p.candidates), 16);
  const bool keep = fixed + kept <= in.limit;
  const int64_t list = keep ? kept : 2 * std::min<int64_t>(kChunk, round_up(p.important, 8));
  const int64_t map = in.area * sizeof(S);
  const auto run = [&](auto kernel, int64_t bytes) {
    SEGKERN_LAUNCH(in.logits, kernel, in.slots, kThreads<T>, bytes, p, data<S>(in.logits), keep,
                   list, mutable_data<T>(bce), mutable_data<T>(dice), mutable_data<T>(sums),
                   mutable_data<uint32_t>(marks));
  };
  if (fixed + list + map <= in.limit)
    run(point_mask_loss_kernel<S, T, true>, fixed + list + map);
  else
    run(point_mask_loss_kernel<S, T, false>, fixed + list);
  return {bce, dice, sums, marks};
}

template <class T>
Cut cut_slot(const Problem& p, int64_t limit) {
  constexpr int64_t kPixel = 2 * sizeof(T);  // bytes of its sums
  const int64_t N = int64_t(p.candidates) + p.random;
  Cut cut;
  int64_t chunk = std::min<int64_t>(kChunk, round_up(N, 32)), room, left;
  while (true) {  // at least an eighth of the memory is for the sums
    room = round_up(std::min<int64_t>(chunk, p.points()), 8);
    left = limit - sizeof(Shared) - room * (2 + sizeof(T));
    if (8 * left >= limit) break;
    chunk = round_up(chunk / 2, 32);
  }
  const int64_t pixels = left / kPixel, columns = std::min<int64_t>(p.w, pixels / 2);
  const int64_t rows = std::min<int64_t>(p.h, pixels / columns - 1);
  cut.chunk = chunk;
  cut.room = room;
  cut.columns = columns;
  cut.strips = (p.w + columns - 1) / columns;
  cut.bands = (p.h + rows - 1) / rows;
  cut.rows = (p.h + cut.bands - 1) / cut.bands;  // of like height
  cut.sums = (cut.rows + 1) * columns;
  cut.row_shift = 0;
  while (p.h >> cut.row_shift >= int32_t(kBins)) ++cut.row_shift;
  return cut;
}

template <class S, class T>
Tensor backward(const Arguments& in, const Tensor& grad_bce, const Tensor& grad_dice,
                const Tensor& sums, const Tensor& marks) {
  const Tensor gb = dense<T>(grad_bce), gd = dense<T>(grad_dice), kept = dense<T>(sums);
  const Tensor chosen = torch::stable::contiguous(marks);
  Tensor out = torch::stable::new_empty(in.logits, in.shape({in.problem.h, in.problem.w}));
  if (out.numel() == 0) return out;
  if (out.is_cpu()) poison_fill(out.mutable_data_ptr(), out.numel() * sizeof(S));
  const Cut cut = cut_slot<T>(in.problem, in.limit);
  const int64_t bytes =
      sizeof(Shared) + cut.room * (2 + sizeof(T)) + int64_t(cut.sums) * 2 * sizeof(T);
  SEGKERN_LAUNCH(in.logits, (point_mask_loss_backward_kernel<S, T>), in.slots, kThreads<T>, bytes,
                 in.problem, cut, data<T>(gb), data<T>(gd), data<T>(kept), data<uint32_t>(chosen),
                 data<S>(in.logits), mutable_data<S>(out));
  return out;
}

template <class F>
void dispatch_stored(const Tensor& logits, const F& f) {
  switch (logits.scalar_type()) {
    case ScalarType::Double:
      return f(double{}, double{});
    case ScalarType::Float:
      return f(float{}, float{});
    case ScalarType::Half:
      return f(Half{}, float{});
    case ScalarType::BFloat16:
      return f(BFloat16{}, float{});
    default:
      STD_TORCH_CHECK(false, "point_mask_loss: floating point logits expected");
  }
}

Results point_mask_loss(Tensor mask_logits, Tensor masks, Tensor active, Tensor sample_ids,
                        Tensor seed, int64_t candidates, int64_t important, int64_t random) {
  check(mask_logits, masks, active, sample_ids, seed, candidates, important, random);
  const DeviceScope scope(mask_logits);
  const Arguments in(mask_logits, masks, active, sample_ids, seed, candidates, important, random);
  Results out;
  dispatch_stored(mask_logits, [&]<class S, class T>(S, T) { out = forward<S, T>(in); });
  return out;
}

Tensor point_mask_loss_backward(Tensor grad_bce, Tensor grad_dice, Tensor sums, Tensor marks,
                                Tensor mask_logits, Tensor masks, Tensor active, Tensor sample_ids,
                                Tensor seed, int64_t candidates, int64_t important,
                                int64_t random) {
  check(mask_logits, masks, active, sample_ids, seed, candidates, important, random);
  const DeviceScope scope(mask_logits);
  const Arguments in(mask_logits, masks, active, sample_ids, seed, candidates, important, random);
  STD_TORCH_CHECK(grad_bce.numel() == in.slots && grad_dice.numel() == in.slots &&
                      sums.numel() == 2 * in.slots &&
                      marks.numel() == in.slots * in.problem.words() && marks.element_size() == 4,
                  "point_mask_loss_backward: wrong sizes");
  Tensor out;
  dispatch_stored(mask_logits, [&]<class S, class T>(S, T) {
    out = backward<S, T>(in, grad_bce, grad_dice, sums, marks);
  });
  return out;
}

}  // namespace
}  // namespace segkern

STABLE_TORCH_LIBRARY_IMPL(segkern, SEGKERN_CUDA_KEY, m) {
  m.impl("point_mask_loss", TORCH_BOX(&segkern::point_mask_loss));
  m.impl("point_mask_loss_backward", TORCH_BOX(&segkern::point_mask_loss_backward));
}
