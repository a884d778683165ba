// The backward of ms_deform_attn. No floating-point atomics: the gradient of value is gathered,
// not scattered. Samples are first sorted by the pixel they lie on, a counting sort with integers;
// then each pixel adds up the samples around it, in registers, and is written once.
//   count     each sample takes its rank in its bucket
//   place     the buckets of a row of pixels get a range of records
//   samples   gradients of offsets and logits; the record of each sample goes to its place
//   sort      deterministic mode only: within a bucket records are in the order of the atomics
//   gather    gradient of value
// Traffic of value's gradient: 16 bytes written, 40 read and 2.5 rows of grad read from cache a
// sample, where adding to value would be 4 rows of float atomics.
// Its worst case is that all samples lie on one pixel: `count` then adds to one number one sample
// after the other, and the groups of one run of pixels read all records (an estimate for a plane
// of 258,048 samples: 2 ms).
// Buckets: sample (x, y) of a level, -1 <= x < w and -1 <= y < h its upper left pixel, is in
// bucket (y + 1) * (w + 2) + x + 1; a row ends with an empty bucket, the end of the one before.
#include "ms_deform_attn.h"

namespace segkern::deform {
namespace {

// Planes are worked on in chunks whose 20 bytes a sample stay in a second-level cache of 50 MB;
// the tests' are small.
#ifdef SEGKERN_EMULATE
constexpr int64_t kChunkSamples = 1 << 9, kChunkBuckets = 1 << 9;
constexpr int kLong = 32;
#else
constexpr int64_t kChunkSamples = 1 << 21, kChunkBuckets = 1 << 24;
constexpr int kLong = 1024;  // a bucket of more records is sorted by a whole block
#endif
constexpr int kBlock = 256;
constexpr int kSorted = 64;     // buckets of a block that sorts
constexpr int kAcross = 4;      // pixels of a row that one group gathers
constexpr int kShareFrom = 32;  // records of a pixel worth a group more

// A sample on its way to its pixels.
template <class E>
struct alignas(16) Record {
  int q;
  E a, fx, fy;  // attention weight; place within the four pixels
};

// Of a sample between kernels: its rank in its bucket, until `samples` has read it.
template <class E>
union Note {
  int rank;
  E weight;  // gradient of the attention weight
};

// Planes [first, first + n) of the B * H and their buckets.
struct Chunk {
  int first, n;
  int buckets;  // of a plane
};

template <class E>
__device__ inline int bucket_of(const Sample<E>& s, const Chunk& k, int plane /*of the chunk*/) {
  return plane * k.buckets + s.level.bucket + (s.y + 1) * (s.level.w + 2) + s.x + 1;
}

// One thread a sample: [Q, planes, M].
template <class E>
__global__ void __launch_bounds__(kBlock)
    count(const Call c, const Chunk k, int* buckets /*[planes, buckets]*/,
          Note<E>* notes /*[Q, planes, M]*/) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x, group = i / c.M, m = i % c.M;
  const unsigned q = group / k.n, plane = group % k.n;
  if (q >= static_cast<unsigned>(c.Q)) return;
  const Query<E> query(c, plane_of(k.first + static_cast<int>(plane), c.H), static_cast<int>(q));
  const Sample<E> s = locate(c, query, static_cast<int>(m) / c.P, static_cast<int>(m));
  if (s.near) notes[i].rank = atomicAdd(&buckets[bucket_of(s, k, static_cast<int>(plane))], 1);
}

// One warp a row of buckets: counts become beginnings; `used` counts the records of all.
__global__ void __launch_bounds__(kBlock)
    place(const Levels levels, const Chunk k, const int rows /*of a plane*/, int* buckets,
          int* used) {
  const unsigned warp = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (warp >= static_cast<unsigned>(rows) * k.n) return;
  int row = static_cast<int>(warp % rows), l = 0;
  for (; row > levels[l].h; ++l) row -= levels[l].h + 1;
  const int lane = threadIdx.x % 32, w = levels[l].w;
  int* at = buckets + static_cast<int>(warp / rows) * k.buckets + levels[l].bucket + row * (w + 2);
  int n = 0;
  for (int x = lane; x <= w; x += 32) n += at[x];
  n = group_sum<32>(n);
  int begin = 0;
  if (lane == 0 && n > 0) begin = atomicAdd(used, n);
  begin = __shfl_sync(kAllLanes, begin, 0);
  for (int first = 0; first < w + 2; first += 32) {
    const int x = first + lane, mine = x <= w ? at[x] : 0;
    int sum = mine;  // of the lanes up to this one
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int left = __shfl_up_sync(kAllLanes, sum, step);
      if (lane >= step) sum += left;
    }
    if (x < w + 2) at[x] = begin + sum - mine;
    begin += __shfl_sync(kAllLanes, sum, 31);
  }
}

// x[j][.] of all lanes of a group are added up; lane i has the sums of j = i % n in x[0].
template <int kLanes, int n, class E>
__device__ inline void transpose_sum(E (&x)[n][4]) {
  int step = 1;
#pragma unroll
  for (int left = n / 2; left > 0; left /= 2, step *= 2) {
    const bool odd = threadIdx.x & step;
#pragma unroll
    for (int j = 0; j < left; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const E keep = odd ? x[2 * j + 1][i] : x[2 * j][i];
        const E give = odd ? x[2 * j][i] : x[2 * j + 1][i];
        x[j][i] = keep + __shfl_xor_sync(kAllLanes, give, step);
      }
  }
#pragma unroll
  for (; step < kLanes; step *= 2)
#pragma unroll
    for (int i = 0; i < 4; ++i) x[0][i] += __shfl_xor_sync(kAllLanes, x[0][i], step);
}

// What belongs to a chunk.
template <class E>
struct Workspace {
  const int* buckets;  // [planes, buckets]: their first records
  Note<E>* notes;      // [Q, planes, M]
  Record<E>* records;  // [at most Q * planes * M]
};

// A group a query. Each lane owns every kLanes-th sample; the products of grad with the four
// corner rows are summed over the group so that the owner gets its own.
template <class Path>
__global__ void __launch_bounds__(Path::kThreads,
                                  (sizeof(typename Path::E) == 8 ? 512 : 768) / Path::kThreads)
    samples(const Call c, const int blocks /*of a plane*/, const Chunk k,
            const Workspace<typename Path::E> work,
            const typename Path::T* __restrict__ value /*[B, S, H, D]*/,
            const typename Path::T* __restrict__ grad /*[B, Q, H, D]*/,
            typename Path::E* __restrict__ grad_offsets /*[B, Q, H, M, 2]*/,
            void* __restrict__ grad_logits /*[B, Q, H, M], as Call has the logits*/) {
  using T = typename Path::T;
  using E = typename Path::E;
  constexpr int kVector = Path::kVector, kLanes = Path::kLanes;
  constexpr int kBatch = kLanes < 4 ? kLanes : 4;  // samples whose products are summed together
  if (tile_of_grid() >= blocks) return;
  const int lane = threadIdx.x % kLanes, local = static_cast<int>(blockIdx.x);
  const Plane plane = plane_of(k.first + local, c.H);
  const int q = query_of(c, tile_of_grid(), threadIdx.x / kLanes);
  const int M = q < 0 ? 0 : c.M;
  const Query<T> query(c, plane, max(q, 0));
  const int64_t chunked = (int64_t{max(q, 0)} * k.n + local) * c.M;  // in [Q, planes, M]
  const unsigned stride = Path::stride(c.H, c.D);
  const T* rows = settled(value + (int64_t{plane.b} * c.S * c.H + plane.h) * c.D + lane * kVector);
  const T* grads = grad + query.row * c.D + lane * kVector;

  E top = 0, scale = 1;
  if (!c.normalized) {
    top = largest<kLanes>(c, query, M);
    E sum = 0;
#pragma unroll 1
    for (int m = lane; m < M; m += kLanes) sum += exponential(query.logit(c, m) - top);
    scale = E(1) / group_sum<kLanes>(sum);
  }
  const auto weight = [&](int m) {
    const E x = query.logit(c, m);
    return c.normalized ? x : exponential(x - top) * scale;
  };
  E g[kVector] = {};
  if (Path::kWhole && q >= 0 && lane * kVector < c.D) load_row(grads, g);

  E mean = 0;  // of the gradient of the weights, by the weights
  Walk<kLanes> walk(c.P);
#pragma unroll 1
  for (int first = 0; first < c.M; first += kLanes, walk.next(c.P)) {
    Sample<E> s{};
    if (walk.m < M) s = locate(c, query, walk.l, walk.m);
    const unsigned corner = s.near ? s.pixel() * stride : 0;
    const unsigned to = s.near ? s.to_below() * 2u + s.to_right() : 0;
    E own[4] = {};
#pragma unroll
    for (int batch = 0; batch < kLanes; batch += kBatch) {
      if (first + batch >= c.M) break;
      E dots[kBatch][4] = {};
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const unsigned pixel = __shfl_sync(kAllLanes, corner, batch + j, kLanes);
        const unsigned steps = __shfl_sync(kAllLanes, to, batch + j, kLanes);
        const unsigned right = steps % 2 * stride, below = pixel + steps / 2 * stride;
        const unsigned corners[4] = {pixel, pixel + right, below, below + right};
        for (int turn = 0; turn < Path::turns_end(c.D); turn += Path::kTurn) {
          if (q < 0 || turn + lane * kVector >= c.D) break;
          if (!Path::kWhole) load_row(grads + turn, g);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            E v[kVector];
            load_row(Path::row(rows + turn, corners[i]), v);
#pragma unroll
            for (int d = 0; d < kVector; ++d) dots[j][i] = fused(g[d], v[d], dots[j][i]);
          }
        }
      }
      transpose_sum<kLanes>(dots);
#pragma unroll
      for (int i = 0; i < 4; ++i) own[i] = lane / kBatch * kBatch == batch ? dots[0][i] : own[i];
    }
    if (walk.m >= M) continue;
    const E a = weight(walk.m);
    // what lies outside counts as zero
    const E d00 = s.near && s.left() && s.above() ? own[0] : E(0);
    const E d01 = s.near && s.right() && s.above() ? own[1] : E(0);
    const E d10 = s.near && s.left() && s.below() ? own[2] : E(0);
    const E d11 = s.near && s.right() && s.below() ? own[3] : E(0);
    const E gx = E(1) - s.fx, gy = E(1) - s.fy;
    const E of_weight = gy * (gx * d00 + s.fx * d01) + s.fy * (gx * d10 + s.fx * d11);
    const E along_x = gy * (d01 - d00) + s.fy * (d11 - d10);
    const E along_y = gx * (d10 - d00) + s.fx * (d11 - d01);
    const E moved[2] = {s.near ? a * along_x : E(0), s.near ? a * along_y : E(0)};
    store(moved, grad_offsets + 2 * (query.sample + walk.m));
    mean += a * of_weight;
    if (s.near) {
      const int place = work.buckets[bucket_of(s, k, local)];
      work.records[place + work.notes[chunked + walk.m].rank] = {q, a, s.fx, s.fy};
    }
    work.notes[chunked + walk.m].weight = of_weight;
  }
  mean = group_sum<kLanes>(mean);
#pragma unroll 1
  for (int m = lane; m < M; m += kLanes) {
    const E of_weight = work.notes[chunked + m].weight;
    const E x = c.normalized ? of_weight : weight(m) * (of_weight - mean);
    if (c.exact)
      static_cast<E*>(grad_logits)[query.sample + m] = x;
    else
      static_cast<T*>(grad_logits)[query.sample + m] = static_cast<T>(x);
  }
}

// An order of records that are not equal in every bit that counts.
template <class E>
__device__ inline bool before(const Record<E>& a, const Record<E>& b) {
  if (a.q != b.q) return a.q < b.q;
  if (a.fx != b.fx) return a.fx < b.fx;
  if (a.fy != b.fy) return a.fy < b.fy;
  return a.a < b.a;
}

// Bitonic, with all comparisons in one direction, so that n need not be a power of two; by
// `threads` threads that `sync` brings together.
template <class E, class F>
__device__ inline void sort_records(Record<E>* records, unsigned n, unsigned thread,
                                    unsigned threads, const F& sync) {
  for (unsigned half = 1; half < n; half *= 2) {
    for (unsigned step = half; step > 0; step /= 2) {
      for (unsigned i = thread;; i += threads) {
        const unsigned low = 2 * i - (i & (step - 1));  // step is a power of two
        const unsigned high = step == half ? low ^ (2 * half - 1) : low + step;
        if (low >= n) break;
        if (high >= n || !before(records[high], records[low])) continue;
        const Record<E> moved = records[low];
        records[low] = records[high];
        records[high] = moved;
      }
      sync();
    }
  }
}

// The number of records in bucket i of the chunk.
__device__ inline int size_of(const Levels& levels, const Chunk& k, const int* buckets, int i) {
  if (i >= k.n * k.buckets) return 0;
  int at = i % k.buckets, l = 0;
  while (l + 1 < levels.L && at >= levels[l + 1].bucket) ++l;
  const int across = levels[l].w + 2;
  const bool end = (at - levels[l].bucket) % across == across - 1;
  return end ? 0 : buckets[i + 1] - buckets[i];
}

// A warp a bucket, or the whole block where it is long.
template <class E>
__global__ void __launch_bounds__(kBlock)
    sort(const Levels levels, const Chunk k, const int* __restrict__ buckets, Record<E>* records) {
  const int first = static_cast<int>(blockIdx.x) * kSorted;
  for (int i = threadIdx.x / 32; i < kSorted; i += kBlock / 32) {
    const int n = size_of(levels, k, buckets, first + i);
    if (n > 1 && n <= kLong)
      sort_records(records + buckets[first + i], n, threadIdx.x % 32, 32, [] { __syncwarp(); });
  }
  for (int i = 0; i < kSorted; ++i) {
    const int n = size_of(levels, k, buckets, first + i);
    if (n > kLong)
      sort_records(records + buckets[first + i], n, threadIdx.x, kBlock, [] { __syncthreads(); });
  }
}

// A group or several a run of pixels along a row of a plane. They walk the buckets above and below
// from left to right, with two sums: a record adds to the pixel on its left and to the next one.
template <class Path>
__global__ void __launch_bounds__(Path::kThreads, 1024 / Path::kThreads)
    gather(const Call c, const Levels levels /*in tiles of pixels*/, const int tiles,
           const Chunk k, const int* __restrict__ buckets,
           const Record<typename Path::E>* __restrict__ records,
           const typename Path::T* __restrict__ grad /*[B, Q, H, D]*/,
           typename Path::T* __restrict__ grad_value /*[B, S, H, D]*/) {
  using T = typename Path::T;
  using E = typename Path::E;
  constexpr int kVector = Path::kVector, kLanes = Path::kLanes, kRuns = kSide / kAcross;
  if (tile_of_grid() >= tiles) return;
  const int local = static_cast<int>(blockIdx.x), group = threadIdx.x / kLanes;
  const Plane plane = plane_of(k.first + local, c.H);
  const Tile tile = tile_of(levels, tile_of_grid());
  const int share = tile.level.share, w = tile.level.w;
  const int part = group & (share - 1), i = group >> (__ffs(share) - 1);
  const int y = tile.y + i / kRuns, x = tile.x + i % kRuns * kAcross;
  // buckets x to x + steps, of which the first lies left of the run
  const int steps = y < tile.level.h ? min(w - x, kAcross) : 0;
  const int* above = buckets + local * k.buckets + tile.level.bucket + y * (w + 2) + x;
  const int* below = above + w + 2;
  const unsigned stride = Path::stride(c.H, c.D);
  const T* grads = settled(grad + (int64_t{plane.b} * c.Q * c.H + plane.h) * c.D +
                           threadIdx.x % kLanes * kVector);
  T* out =
      grad_value +
      ((int64_t{plane.b} * c.S + tile.level.start + int64_t{y} * w + x) * c.H + plane.h) * c.D +
      threadIdx.x % kLanes * kVector;
  for (int turn = 0; turn < Path::turns_end(c.D); turn += Path::kTurn) {
    const bool mine = steps > 0 && turn + static_cast<int>(threadIdx.x) % kLanes * kVector < c.D;
    int first[2] = {mine ? above[0] : 0, mine ? below[0] : 0};
    E sum[kVector] = {}, next[kVector] = {};  // of pixels x + step - 1 and x + step
#pragma unroll 1
    for (int step = 0; step <= kAcross; ++step) {
      const bool reads = mine && step <= steps;
      const int last[2] = {reads ? above[step + 1] : first[0], reads ? below[step + 1] : first[1]};
      const int n = last[0] - first[0], all = n + last[1] - first[1];
#pragma unroll 1
      for (int j = part; j < all; j += 2 * share) {
        // two records at a time, so that their loads overlap; at the end the last one again, by 0
        const bool two = j + share < all;
        E left[2], right[2], g[2][kVector];
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          const int i = two ? j + t * share : j;
          const bool upper = i < n;  // the sample's upper left pixel is in the row above
          const Record<E> r = records[upper ? first[0] + i : first[1] + i - n];
          const E down = upper ? r.fy : E(1) - r.fy, a = t == 0 || two ? r.a : E(0);
          left[t] = a * ((E(1) - r.fx) * down);
          right[t] = a * (r.fx * down);
          load_row(Path::row(grads + turn, static_cast<unsigned>(r.q) * stride), g[t]);
        }
#pragma unroll
        for (int d = 0; d < kVector; ++d) {
          sum[d] = fused(left[1], g[1][d], fused(left[0], g[0][d], sum[d]));
          next[d] = fused(right[1], g[1][d], fused(right[0], g[0][d], next[d]));
        }
      }
      if (step > 0) {
        for (int lanes = kLanes; lanes < kLanes * share; lanes *= 2) {
#pragma unroll
          for (int d = 0; d < kVector; ++d) sum[d] += __shfl_xor_sync(kAllLanes, sum[d], lanes);
        }
        if (part == 0 && reads) store(sum, out + turn + (step - 1) * c.H * c.D);
      }
#pragma unroll
      for (int d = 0; d < kVector; ++d) {
        sum[d] = next[d];
        next[d] = E(0);
      }
      first[0] = last[0], first[1] = last[1];
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward(Tensor grad, Tensor value,
                                                           IntList shapes, Tensor reference,
                                                           Tensor offsets, Tensor logits,
                                                           bool normalized, bool deterministic) {
  const DeviceScope scope(value);
  const auto make = [&](const Tensor& like, ScalarType type) {
    const IntList sizes(like.sizes().begin(), like.sizes().end());
    if (value.numel() == 0 || logits.numel() == 0)
      return torch::stable::new_zeros(value, sizes, type);
    return fresh(value, sizes, type);
  };
  const Tensor grad_value = make(value, value.scalar_type());
  const Tensor grad_offsets = make(offsets, exact_type(value));
  const Tensor grad_logits = make(logits, logits_type(value, logits));
  const auto results = [&] {
    return std::tuple(grad_value, grad_offsets, cast_to(grad_logits, logits.scalar_type()));
  };
  if (value.numel() == 0 || logits.numel() == 0) return results();

  dispatch_path(value.scalar_type(), value.size(3), [&](auto path) {
    using Path = decltype(path);
    using T = typename Path::T;
    using E = typename Path::E;
    const Inputs in(value, shapes, reference, offsets, logits, normalized, Path::kRun);
    in.check_reach<Path>();
    const Tensor grads = aligned(cast_to(grad, value.scalar_type()));
    const int64_t M = in.call.M;
    const LevelTable pixels(value, shapes, Path::kRun * kAcross, [&](int64_t area) {
      int share = 1;
      while (2 * share * Path::kLanes <= 32 && share < kSide &&
             4 * in.Q * in.P > kShareFrom * share * area)
        share *= 2;
      return share;
    });
    const int64_t fit = std::min(kChunkSamples / (in.Q * M), kChunkBuckets / pixels.buckets);
    const int planes = static_cast<int>(std::clamp<int64_t>(fit, 1, in.planes));
    const int64_t most = in.Q * planes * M, buckets = int64_t{planes} * pixels.buckets;
    Tensor counts = fresh(value, {buckets + 1}, ScalarType::Int);  // and one for the records used
    const Tensor notes = fresh(value, {most}, scalar_type_of<E>());
    const Tensor records = fresh(value, {most, int64_t{sizeof(Record<E>)}}, ScalarType::Byte);
    int* at = mutable_data<int>(counts);
    const Workspace<E> work{at, mutable_data<Note<E>>(notes), mutable_data<Record<E>>(records)};
    const auto blocks = [](int64_t n, int64_t each) {
      return static_cast<unsigned>((n + each - 1) / each);
    };
    for (int first = 0; first < in.planes; first += planes) {
      const Chunk k{first, std::min(planes, in.planes - first), pixels.buckets};
      torch::stable::zero_(counts);
      SEGKERN_LAUNCH(value, count<E>, blocks(in.Q * k.n * M, kBlock), kBlock, 0, in.call, k, at,
                     work.notes);
      SEGKERN_LAUNCH(value, place, blocks(int64_t{k.n} * pixels.rows, kBlock / 32), kBlock, 0,
                     pixels.levels, k, pixels.rows, at, at + buckets);
      SEGKERN_LAUNCH(value, samples<Path>, grid_of(k.n, in.blocks), in.call.run * Path::kLanes, 0,
                     in.call, in.blocks, k, work, data<T>(in.value), data<T>(grads),
                     mutable_data<E>(grad_offsets), grad_logits.mutable_data_ptr());
      if (deterministic)
        SEGKERN_LAUNCH(value, sort<E>, blocks(int64_t{k.n} * k.buckets, kSorted), kBlock, 0,
                       pixels.levels, k, at, work.records);
      SEGKERN_LAUNCH(value, gather<Path>, grid_of(k.n, pixels.tiles), Path::kThreads, 0, in.call,
                     pixels.levels, pixels.tiles, k, at, work.records, data<T>(grads),
                     mutable_data<T>(grad_value));
    }
  });
  return results();
}

}  // namespace
}  // namespace segkern::deform

STABLE_TORCH_LIBRARY_IMPL(segkern, SEGKERN_CUDA_KEY, m) {
  m.impl("ms_deform_attn_backward", TORCH_BOX(&segkern::deform::ms_deform_attn_backward));
}
