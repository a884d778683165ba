// What forward and backward of ms_deform_attn share on the GPU: arguments, levels, the order of
// the queries, softmax and place of a sample, wide loads.
// Letters: B image, Q query, S pixels of all levels, H head, D channels a head, L level, P point;
// M = L * P samples of a query and head. A plane is one head of one image.
// A group of kLanes neighbouring lanes works on one query (or pixel) of one plane; a lane holds
// kVector channels, 16 bytes, and prepares each kLanes-th sample for the whole group.
#pragma once

#include "device.h"

namespace segkern::deform {

constexpr int kSide = 8;       // pixels across a tile
constexpr int kFewLevels = 8;  // go with the kernel's arguments

template <class T>
using Exact = std::conditional_t<std::is_same_v<T, double>, double, float>;

// How rows of D channels are read: kWhole groups hold a row at once; others, for any D, loop.
template <class T_, int kVector_, int kLanes_>
struct Path {
  using T = T_;
  using E = Exact<T>;
  static constexpr int kVector = kVector_, kLanes = kLanes_, kGroups = 32 / kLanes;
  static constexpr bool kWhole = kVector > 1;
  static constexpr int kRun = kLanes > 4 ? 256 / kLanes : 64;  // groups of a block
  static constexpr int kThreads = kRun * kLanes;
  static constexpr int kTurn = kVector * kLanes;  // channels of a group in one turn
  __device__ static int turns_end(int D) { return kWhole ? 1 : D; }
  // a pixel's row of a plane by its distance in vectors: 32 bits reach 64 GB of an image
  __device__ static unsigned stride(int H, int D) {
    return static_cast<unsigned>(H) * static_cast<unsigned>(D) / kVector;
  }
  __device__ static const T* row(const T* plane, unsigned vectors) {
    return plane + static_cast<uint64_t>(vectors) * kVector;
  }
};

template <class T, class F>
void dispatch_lanes(int64_t D, const F& f) {
  constexpr int kVector = 16 / sizeof(T);
  if (D % kVector != 0 || D > 64) return f(Path<T, 1, 8>{});
  if (D <= 16) return f(Path<T, kVector, 16 / kVector>{});
  if (D <= 32) return f(Path<T, kVector, 32 / kVector>{});
  f(Path<T, kVector, 64 / kVector>{});
}

// Calls f with the Path for value's dtype and D channels.
template <class F>
void dispatch_path(ScalarType type, int64_t D, const F& f) {
  switch (type) {
    case ScalarType::Double:
      return f(Path<double, 1, 8>{});
    case ScalarType::Float:
      return dispatch_lanes<float>(D, f);
    case ScalarType::Half:
      return dispatch_lanes<torch::headeronly::Half>(D, f);
    case ScalarType::BFloat16:
      return dispatch_lanes<torch::headeronly::BFloat16>(D, f);
    default:
      STD_TORCH_CHECK(false, "ms_deform_attn: floating point values expected");
  }
}

struct Level {
  int h, w;
  int start;   // its first pixel
  int tile;    // its first tile of pixels
  int share;   // groups that share the work of a pixel, a power of two
  int rows;    // of pixels in a tile
  int bucket;  // its first bucket in a plane: (h + 1) * (w + 2), see the backward
};

struct Levels {
  Level few[kFewLevels];
  const Level* many;  // in device memory, where they are more than `few`; else null
  int L;
  __device__ Level operator[](int l) const {
    if (many) return many[l];
    return few[l];
  }
};

struct Call {
  const void* reference;  // [B|1, Q, L|1, 2] of E
  const void* offsets;    // [B, Q, H, L, P, 2] of E
  const void* logits;     // [B, Q, H, L, P] of E if `exact`, else of T
  bool exact;
  int64_t reference_image;
  int reference_query, reference_level;  // its strides in pairs; 0 where there is one for all
  int S, Q, H, D, P, M;
  bool normalized;
  bool tiled;  // queries are pixels: a block takes a tile of them
  int run;     // queries of a block
  Levels levels;
};

struct Plane {
  int b, h;
};

__device__ inline Plane plane_of(int plane, int H) { return {plane / H, plane % H}; }

// Blocks of a grid: a plane each, the planes of a tile one after the other; the tiles go on in z.
#ifdef SEGKERN_EMULATE
constexpr unsigned kGridY = 5;  // so that small tests reach z
#else
constexpr unsigned kGridY = 1 << 15;
#endif
__device__ inline int tile_of_grid() { return static_cast<int>(blockIdx.z * kGridY + blockIdx.y); }
inline dim3 grid_of(int planes, int tiles) {
  const unsigned n = static_cast<unsigned>(tiles);
  return dim3(static_cast<unsigned>(planes), std::min(n, kGridY), (n + kGridY - 1) / kGridY);
}

template <class E>
__device__ inline E exponential(E x) {
  if constexpr (std::is_same_v<E, float>) return expf(x);
  return exp(x);
}

template <class E>
__device__ inline E fused(E a, E b, E c) {
  if constexpr (std::is_same_v<E, float>) return fmaf(a, b, c);
  return fma(a, b, c);
}

// A product that is rounded, never fused with what follows.
template <class E>
__device__ inline E rounded(E a, E b) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<E, float>) return __fmul_rn(a, b);
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

template <class T, int kVector>
struct alignas(kVector * sizeof(T)) Pack {
  T at[kVector];
};

template <class T, int kVector, class E>
__device__ inline void load(const T* from, E (&to)[kVector]) {
  const auto pack = *reinterpret_cast<const Pack<T, kVector>*>(from);
#pragma unroll
  for (int v = 0; v < kVector; ++v) to[v] = static_cast<E>(pack.at[v]);
}

// Channels of a tensor that nobody writes meanwhile.
template <class T, int kVector, class E>
__device__ inline void load_row(const T* from, E (&to)[kVector]) {
  if constexpr (kVector == 1) {
    load(from, to);
  } else if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>) {
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(from));
    const unsigned pairs[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int v = 0; v < 4; ++v) {  // an instruction a number
      to[2 * v] = __uint_as_float(pairs[v] << 16);
      to[2 * v + 1] = __uint_as_float(pairs[v] & 0xFFFF0000u);
    }
  } else {
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(from));
    Pack<T, kVector> pack;
    memcpy(&pack, &bits, sizeof(bits));
#pragma unroll
    for (int v = 0; v < kVector; ++v) to[v] = static_cast<E>(pack.at[v]);
  }
}

// The same pointer, of which the compiler forgets how it came about: it would add up the parts
// again for every load.
template <class T>
__device__ inline const T* settled(const T* p) {
#if defined(__CUDA_ARCH__)
  asm("" : "+l"(p));
#endif
  return p;
}

template <class T, int kVector, class E>
__device__ inline void store(const E (&from)[kVector], T* to) {
  Pack<T, kVector> pack;
#pragma unroll
  for (int v = 0; v < kVector; ++v) pack.at[v] = static_cast<T>(from[v]);
  *reinterpret_cast<Pack<T, kVector>*>(to) = pack;
}

// A tile of pixels of a level; it may hang over the level's edges.
struct Tile {
  Level level;
  int y, x;
};

__device__ inline Tile tile_of(const Levels& levels, int tile) {
  int l = 0;
  while (l + 1 < levels.L && tile >= levels[l + 1].tile) ++l;
  Tile t{levels[l], 0, 0};
  const int across = (t.level.w + kSide - 1) / kSide;
  t.y = (tile - t.level.tile) / across * t.level.rows;
  t.x = (tile - t.level.tile) % across * kSide;
  return t;
}

// Query i of a block, -1 where there is none. In tiles the windows of neighbours overlap in the
// first-level cache.
__device__ inline int query_of(const Call& c, int block, int i) {
  if (!c.tiled) {
    const int q = block * c.run + i;
    return q < c.Q ? q : -1;
  }
  const Tile t = tile_of(c.levels, block);
  const int y = t.y + i / kSide, x = t.x + i % kSide;
  return y < t.level.h && x < t.level.w ? t.level.start + y * t.level.w + x : -1;
}

// Where the inputs of one query of a plane begin; T as value has it.
template <class T>
struct Query {
  using E = Exact<T>;
  __device__ Query(const Call& c, const Plane& plane, int q)
      : row((int64_t{plane.b} * c.Q + q) * c.H + plane.h),
        sample(row * c.M),
        centre(static_cast<const E*>(c.reference) +
               2 * (plane.b * c.reference_image + int64_t{q} * c.reference_query)),
        offsets(static_cast<const E*>(c.offsets) + 2 * sample),
        exact_logits(static_cast<const E*>(c.logits) + sample),
        logits(static_cast<const T*>(c.logits) + sample) {}
  __device__ E logit(const Call& c, int m) const {
    return c.exact ? exact_logits[m] : static_cast<E>(logits[m]);
  }
  int64_t row;     // of B * Q * H
  int64_t sample;  // of all samples
  const E *centre, *offsets, *exact_logits;
  const T* logits;
};

// The largest of the first n logits; all lanes of the warp come here.
template <int kLanes, class T>
__device__ inline Exact<T> largest(const Call& c, const Query<T>& query, int n) {
  Exact<T> top = -INFINITY;
#pragma unroll 1
  for (int m = threadIdx.x % kLanes; m < n; m += kLanes) top = max(top, query.logit(c, m));
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2)
    top = max(top, __shfl_xor_sync(kAllLanes, top, step));
  return top;
}

// Sums over a group's lanes; all lanes of the warp come here.
template <int kLanes, class E>
__device__ inline E group_sum(E x) {
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// The samples of a lane, each kLanes-th, with their level.
template <int kLanes>
struct Walk {
  __device__ explicit Walk(int P) : m(threadIdx.x % kLanes), l(0), p(m) { settle(P); }
  __device__ void next(int P) {
    m += kLanes;
    p += kLanes;
    settle(P);
  }
  __device__ void settle(int P) {
    for (; p >= P; p -= P) ++l;
  }
  int m, l, p;
};

template <class E>
struct Sample {
  Level level;
  bool near;  // of its four pixels one is inside
  int x, y;   // the upper left one, -1 <= x < w
  E fx, fy;   // from there, 0 <= fx < 1

  __device__ bool left() const { return x >= 0; }
  __device__ bool right() const { return x + 1 < level.w; }
  __device__ bool above() const { return y >= 0; }
  __device__ bool below() const { return y + 1 < level.h; }
  // a corner outside takes the place of its neighbour inside
  __device__ int pixel() const { return level.start + max(y, 0) * level.w + max(x, 0); }
  __device__ int to_right() const { return left() && right() ? 1 : 0; }
  __device__ int to_below() const { return above() && below() ? level.w : 0; }
};

// Sample m of a query, of level l. All kernels round a place alike, as the reference does.
template <class T, class E = Exact<T>>
__device__ inline Sample<E> locate(const Call& c, const Query<T>& query, int l, int m) {
  Sample<E> s;
  s.level = c.levels[l];
  E centre[2], offset[2];
  load(query.centre + 2 * c.reference_level * l, centre);
  load(query.offsets + 2 * m, offset);
  const E w = static_cast<E>(s.level.w), h = static_cast<E>(s.level.h);
  const E x = rounded(centre[0], w) + offset[0] - E(0.5);
  const E y = rounded(centre[1], h) + offset[1] - E(0.5);
  s.near = x > E(-1) && x < w && y > E(-1) && y < h;  // not for NaN
  const E xs = s.near ? x : E(0), ys = s.near ? y : E(0);
  s.x = static_cast<int>(floor(xs));
  s.y = static_cast<int>(floor(ys));
  s.fx = xs - static_cast<E>(s.x);
  s.fy = ys - static_cast<E>(s.y);
  return s;
}

// On the host.

// Uninitialised; on the CPU filled with NaN under SEGKERN_POISON=1.
inline Tensor fresh(const Tensor& like, const IntList& sizes, ScalarType type) {
  Tensor out = torch::stable::new_empty(like, sizes, type);
  if (out.numel() > 0 && out.is_cpu())
    poison_fill(out.mutable_data_ptr(), out.numel() * out.element_size());
  return out;
}

// A dense copy that begins on 16 bytes, or the tensor itself where it does.
inline Tensor aligned(const Tensor& t) {
  const Tensor whole = torch::stable::contiguous(t);
  const bool fits = reinterpret_cast<uintptr_t>(whole.const_data_ptr()) % 16 == 0;
  return fits ? whole : torch::stable::clone(whole);
}

static __global__ void write_levels(const Levels part, Level* to) {
  if (static_cast<int>(threadIdx.x) < part.L) to[threadIdx.x] = part.few[threadIdx.x];
}

// The levels on their way to the device, for blocks of `run` groups of which share(h * w) work on
// one pixel.
struct LevelTable {
  template <class F>
  LevelTable(const Tensor& like, const IntList& shapes, int run, const F& share) {
    const int L = static_cast<int>(shapes.size() / 2);
    std::vector<Level> all(L);
    int64_t pixel = 0, bucket = 0;
    for (int l = 0; l < L; ++l) {
      const int64_t h = shapes[2 * l], w = shapes[2 * l + 1];
      STD_TORCH_CHECK(h > 0 && w > 0, "ms_deform_attn: a level without pixels");
      const int part = share(h * w), high = run / kSide / part;
      all[l] = {int(h), int(w), int(pixel), tiles, part, high, int(bucket)};
      pixel += h * w;
      bucket += (h + 1) * (w + 2);
      rows += static_cast<int>(h + 1);
      tiles += static_cast<int>((h + high - 1) / high * ((w + kSide - 1) / kSide));
      STD_TORCH_CHECK(bucket <= INT32_MAX, "ms_deform_attn: more than 2^31 pixels");
    }
    pixels = pixel;
    buckets = static_cast<int>(bucket);
    if (L > kFewLevels) memory = fresh(like, {L, int64_t{sizeof(Level)}}, ScalarType::Byte);
    for (int first = 0; first < L; first += kFewLevels) {
      levels.L = std::min(kFewLevels, L - first);
      std::copy_n(all.begin() + first, levels.L, levels.few);
      levels.many = nullptr;
      if (L > kFewLevels)
        SEGKERN_LAUNCH(like, write_levels, 1, 32, 0, levels, mutable_data<Level>(memory) + first);
    }
    levels.L = L;
    if (L > kFewLevels) levels.many = data<Level>(memory);
  }

  Levels levels{};
  Tensor memory;
  int64_t pixels = 0;
  int tiles = 0, rows = 0, buckets = 0;  // rows of h + 1 a level, see the backward
};

// The types that kernels compute in, and that they read and write logits in.
inline ScalarType exact_type(const Tensor& value) {
  return value.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}
inline ScalarType logits_type(const Tensor& value, const Tensor& logits) {
  return logits.scalar_type() == value.scalar_type() ? logits.scalar_type() : exact_type(value);
}

// The arguments of one call, dense; keeps the memory that `call` points to. Kernels read places in
// E and logits in E or T; what comes otherwise is converted first.
struct Inputs {
  Inputs(const Tensor& value, const IntList& shapes, const Tensor& reference,
         const Tensor& offsets, const Tensor& logits, bool normalized, int run)
      : value(aligned(value)),
        reference(aligned(cast_to(reference, exact_type(value)))),
        offsets(aligned(cast_to(offsets, exact_type(value)))),
        logits(aligned(cast_to(logits, logits_type(value, logits)))),
        queries(value, shapes, run, [](int64_t) { return 1; }) {
    STD_TORCH_CHECK(queries.pixels == S && int64_t(shapes.size()) == 2 * L,
                    "ms_deform_attn: level sizes that do not fit value and offsets");
    STD_TORCH_CHECK(Q * L * P < INT32_MAX / 2 && B * H < INT32_MAX,
                    "ms_deform_attn: more than 2^30 samples a head");
    call.reference = this->reference.const_data_ptr();
    call.offsets = this->offsets.const_data_ptr();
    call.logits = this->logits.const_data_ptr();
    call.exact = this->logits.scalar_type() == exact_type(value);
    call.reference_level = reference.size(2) == 1 ? 0 : 1;
    call.reference_query = static_cast<int>(reference.size(2));
    call.reference_image = reference.size(0) == 1 ? 0 : Q * call.reference_query;
    call.S = static_cast<int>(S), call.Q = static_cast<int>(Q), call.H = static_cast<int>(H);
    call.D = static_cast<int>(D), call.P = static_cast<int>(P), call.M = static_cast<int>(L * P);
    call.normalized = normalized;
    call.tiled = Q == S;
    call.run = call.tiled ? run : 16;  // more blocks, where there may be few queries
    call.levels = queries.levels;
    blocks = call.tiled ? queries.tiles : static_cast<int>((Q + call.run - 1) / call.run);
  }

  template <class Path>
  void check_reach() const {
    STD_TORCH_CHECK(std::max(S, Q) * H * D / Path::kVector <= UINT32_MAX,
                    "ms_deform_attn: too large an image");
  }

  const Tensor value, reference, offsets, logits;
  const int64_t B = value.size(0), S = value.size(1), H = value.size(2), D = value.size(3);
  const int64_t Q = offsets.size(1), L = offsets.size(3), P = offsets.size(4);
  const int planes = static_cast<int>(B * H);
  const LevelTable queries;
  Call call;
  int blocks;  // of a plane's queries
};

}  // namespace segkern::deform
