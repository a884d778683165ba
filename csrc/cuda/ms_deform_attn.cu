// The forward of ms_deform_attn: one pass. The lanes of a group prepare a query's samples, four
// pixels and their weights, in shared memory of their own warp; then each lane adds up its
// channels of all of them. What is read again and again, the rows of value, comes from the
// first-level cache: a block's queries are a tile of pixels where they are pixels.
#include "ms_deform_attn.h"

namespace segkern::deform {
namespace {

// At most, of a query in shared memory, in rounds of four lanes: three blocks of 256 threads then
// fit a multiprocessor that has 100 KB, and value's rows keep most of the first-level cache.
constexpr int kSamples = 12;

template <class E>
struct alignas(16) Weights {
  E upper_left, upper_right, lower_left, lower_right;
};

template <class E>
struct Prepared {
  Weights<E> weights;
  uint4 corners;  // as Path::row takes them, in the order of the weights
};

// Bytes from a group's samples to those of the next: an odd number of 16 bytes, and a sample of
// floats is two. A phase of a warp's access, 8 threads of 16 bytes, then meets every bank once:
// where each group reads its next sample, and where four lanes of two groups write theirs (more
// lanes meet in twos).
template <class E>
__host__ __device__ constexpr int group_bytes(int samples /*even*/) {
  return samples * static_cast<int>(sizeof(Prepared<E>)) + 16;
}

// Registers for 1,024 threads a multiprocessor: chosen by arithmetic, not yet measured.
template <class Path>
__global__ void __launch_bounds__(Path::kThreads, 1024 / Path::kThreads)
    forward(const Call c, const int blocks /*of a plane*/,
            const int samples /*of a query at a time*/,
            const typename Path::T* __restrict__ value /*[B, S, H, D]*/,
            typename Path::T* __restrict__ out /*[B, Q, H, D]*/) {
  using T = typename Path::T;
  using E = typename Path::E;
  constexpr int kVector = Path::kVector, kLanes = Path::kLanes;
  SEGKERN_SHARED(unsigned char, shared);
  Prepared<E>* prepared = reinterpret_cast<Prepared<E>*>(
      shared + threadIdx.x / kLanes * group_bytes<E>(samples));  // of this group: [samples]
  const int lane = threadIdx.x % kLanes, group = threadIdx.x % 32 / kLanes;
  if (tile_of_grid() >= blocks) return;
  const Plane plane = plane_of(static_cast<int>(blockIdx.x), c.H);
  const int q = query_of(c, tile_of_grid(), threadIdx.x / kLanes);
  const int M = q < 0 ? 0 : c.M;
  const Query<T> query(c, plane, max(q, 0));
  const E top = largest<kLanes>(c, query, c.normalized ? 0 : M);
  const unsigned stride = Path::stride(c.H, c.D);

  for (int turn = 0; turn < Path::turns_end(c.D); turn += Path::kTurn) {
    const int channel = turn + lane * kVector;
    const T* rows = settled(value + (int64_t{plane.b} * c.S * c.H + plane.h) * c.D + channel);
    E sum[kVector] = {}, total = 0;  // of the weights that this lane prepares
    Walk<kLanes> walk(c.P);
    for (int first = 0; first < c.M; first += samples) {
      int near = 0;  // samples that touch their level, of the whole group
#pragma unroll 1
      for (int k = 0; k < samples; k += kLanes, walk.next(c.P)) {
        Sample<E> s{};
        E a = 0;
        if (walk.m < M) {
          s = locate(c, query, walk.l, walk.m);
          a = query.logit(c, walk.m);
          if (!c.normalized) a = exponential(a - top);
          total += a;
        }
        const unsigned found = __ballot_sync(kAllLanes, s.near) >> (group * kLanes);
        const int at = near + __popc(found & ((1u << lane) - 1));
        near += __popc(found & ((1u << kLanes) - 1));
        if (!s.near) continue;
        const E left = s.left() ? E(1) - s.fx : E(0), right = s.right() ? s.fx : E(0);
        const E upper = s.above() ? a * (E(1) - s.fy) : E(0);
        const E lower = s.below() ? a * s.fy : E(0);
        prepared[at].weights = {upper * left, upper * right, lower * left, lower * right};
        const unsigned pixel = s.pixel() * stride, below = pixel + s.to_below() * stride;
        const unsigned to_right = s.to_right() * stride;
        prepared[at].corners = make_uint4(pixel, pixel + to_right, below, below + to_right);
      }
      __syncwarp();
      if (channel < c.D) {
#pragma unroll 1
        for (int n = 0; n < near; ++n) {
          const uint4 p = prepared[n].corners;
          const Weights<E> w = prepared[n].weights;
          E v[4][kVector];
          load_row(Path::row(rows, p.x), v[0]);
          load_row(Path::row(rows, p.y), v[1]);
          load_row(Path::row(rows, p.z), v[2]);
          load_row(Path::row(rows, p.w), v[3]);
#pragma unroll
          for (int d = 0; d < kVector; ++d) {
            sum[d] = fused(w.upper_left, v[0][d], sum[d]);
            sum[d] = fused(w.upper_right, v[1][d], sum[d]);
            sum[d] = fused(w.lower_left, v[2][d], sum[d]);
            sum[d] = fused(w.lower_right, v[3][d], sum[d]);
          }
        }
      }
      __syncwarp();
    }
    total = group_sum<kLanes>(total);
    const E scale = c.normalized ? E(1) : E(1) / total;
#pragma unroll
    for (int d = 0; d < kVector; ++d) sum[d] *= scale;
    if (q >= 0 && channel < c.D) store(sum, out + query.row * c.D + channel);
  }
}

Tensor ms_deform_attn(Tensor value, IntList shapes, Tensor reference, Tensor offsets,
                      Tensor logits, bool normalized) {
  const DeviceScope scope(value);
  const IntList sizes{value.size(0), offsets.size(1), value.size(2) * value.size(3)};
  if (value.numel() == 0 || logits.numel() == 0) return torch::stable::new_zeros(value, sizes);
  const Tensor out = fresh(value, sizes, value.scalar_type());
  dispatch_path(value.scalar_type(), value.size(3), [&](auto path) {
    using Path = decltype(path);
    using T = typename Path::T;
    const Inputs in(value, shapes, reference, offsets, logits, normalized, Path::kRun);
    in.check_reach<Path>();
    // equal portions of a query's samples, in whole rounds of its lanes
    const int portions = (in.call.M + kSamples - 1) / kSamples;
    const int rounds = (in.call.M + portions * Path::kLanes - 1) / (portions * Path::kLanes);
    const int samples = rounds * Path::kLanes;
    const unsigned threads = in.call.run * Path::kLanes;
    SEGKERN_LAUNCH(value, forward<Path>, grid_of(in.planes, in.blocks), threads,
                   in.call.run * group_bytes<typename Path::E>(samples), in.call, in.blocks,
                   samples, data<T>(in.value), mutable_data<T>(out));
  });
  return out;
}

}  // namespace
}  // namespace segkern::deform

STABLE_TORCH_LIBRARY_IMPL(segkern, SEGKERN_CUDA_KEY, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&segkern::deform::ms_deform_attn));
}
