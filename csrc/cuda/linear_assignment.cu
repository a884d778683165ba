// linear_assignment on the GPU: shortest augmenting paths with dual variables, in double for every
// input, a block a problem. The block brings the costs in, looks for NaN and takes the row minima;
// then its first warp goes on alone, or, above 256 columns, the whole block. A step of the search
// is one chain of dependent operations (estimated at 250 cycles for 100 columns), so its latency
// is what counts. All sizes below were chosen by arithmetic, not yet measured. Letters: N problem,
// Q query, T target; inside a problem n rows (the smaller side), m columns, i row, j column, k
// column of a thread (assignment_columns.h).
#include <algorithm>
#include <optional>
#include <tuple>

#include "assignment_columns.h"

namespace segkern {
namespace {

enum Status : int32_t { kOk = 0, kNotANumber = 1, kInfeasible = 2 };
constexpr int kWarpMost = 256;         // columns of a problem that one warp solves, eight a lane
constexpr int kRegistersMost = 2048;   // columns above which a block keeps them in memory
constexpr int kMultiprocessors = 128;  // about as many as there are

struct Batch {
  const void* cost;  // [N, Q, T] of `type`
  ScalarType type;
  int64_t stride_n, stride_q, stride_t;
  const int64_t* n_targets;  // [N], or null for all T
  int64_t stride_count;
  int Q, T;
  int near;                  // costs that shared memory holds, in whole lines
  unsigned char* workspace;  // null where that is all of them
  int64_t workspace_stride;  // bytes a problem
  int64_t* query_of_target;  // [N, T]
  int64_t* target_of_query;  // [N, Q]
  int32_t* status;           // [N]
};

struct Shape {
  int count;        // targets that take part
  bool transposed;  // rows are targets
  int n, m;
  int line;  // elements from a row of costs to the next
  int rows;  // in shared memory
};

__device__ __forceinline__ Shape shape_of(const Batch& b, int64_t problem) {
  const int64_t given = b.n_targets ? b.n_targets[problem * b.stride_count] : b.T;
  const int count = static_cast<int>(min(max(given, int64_t{0}), static_cast<int64_t>(b.T)));
  // a transposed matrix is written down its columns: in lines of odd length no two writes of a
  // warp meet in a bank
  Shape s{count, false, b.Q, count, count, 0};
  if (count < b.Q) s = {count, true, count, b.Q, b.Q | 1, 0};
  s.rows = min(s.n, b.near / max(s.line, 1));
  return s;
}

// The most elements that the lines of a problem take, whatever its count.
int64_t cells_of(int64_t Q, int64_t T) { return T < Q ? T * (Q | 1) : Q * T; }

// The least x of a warp, not NaN: by the upper and then the lower half of a key that orders as the
// doubles do.
__device__ __forceinline__ double least_of_warp(double x) {
  constexpr unsigned kSign = 1u << 31;
  const uint64_t bits = static_cast<uint64_t>(__double_as_longlong(x));
  const unsigned flip = static_cast<unsigned>(static_cast<int>(bits >> 32) >> 31);
  const unsigned upper = static_cast<unsigned>(bits >> 32) ^ (flip | kSign);
  const unsigned lower = static_cast<unsigned>(bits) ^ flip;
  const unsigned u = min_of_warp(upper);
  const unsigned l = min_of_warp(upper == u ? lower : ~0u);
  const unsigned back = u & kSign ? 0 : ~0u;
  const uint64_t least = static_cast<uint64_t>(u ^ (back | kSign)) << 32 | (l ^ back);
  return __longlong_as_double(static_cast<int64_t>(least));
}

template <int kSolvers>
__device__ __forceinline__ void wait_for_solvers() {
  if constexpr (kSolvers == kWarp) {
    __syncwarp(kAllLanes);
  } else {
    __syncthreads();
  }
}

// Calls f with row i of the costs. It is compiled for either place: a pointer that may lead to
// both would be slower to follow. A lone warp has all in shared memory.
template <class Columns, class X, class F>
__device__ __forceinline__ void with_row(const Arrays<X>& a, const Shape& s, int i, const F& f) {
  if (Columns::kSolvers == kWarp || (!Columns::kInMemory && i < s.rows))
    f(a.near + static_cast<int64_t>(i) * s.line);
  else
    f(a.far + static_cast<int64_t>(i - s.rows) * s.line);
}

// Brings the costs in, in lines of rows; true if this thread met NaN or -inf.
template <class Columns, class S, class X>
__device__ __forceinline__ bool load_costs(const S* from, const Batch& b, const Shape& s,
                                           const Arrays<X>& to) {
  using Wide = std::conditional_t<std::is_same_v<S, double>, double, float>;
  constexpr int kAtOnce = 8;  // loads in flight
  const int threads = blockDim.x, down = threads / s.count, right = threads % s.count;
  int q = threadIdx.x / s.count, t = threadIdx.x % s.count;
  const int64_t step_q = s.transposed ? 1 : s.line, step_t = s.transposed ? s.line : 1;
  const int64_t near = int64_t{s.rows} * s.line;
  bool bad = false;
  while (q < b.Q) {
    S x[kAtOnce];
    int64_t place[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const bool exists = q < b.Q;
      x[k] = exists ? from[q * b.stride_q + t * b.stride_t] : S(0.0f);
      place[k] = exists ? q * step_q + t * step_t : -1;
      q += down;
      t += right;
      if (t >= s.count) {
        t -= s.count;
        ++q;
      }
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const Wide wide = static_cast<Wide>(x[k]);
      bad |= !(wide > -kInf);
      if (place[k] < 0) continue;
      if (Columns::kSolvers == kWarp || (!Columns::kInMemory && place[k] < near))
        to.near[place[k]] = static_cast<X>(wide);
      else
        to.far[place[k] - near] = static_cast<X>(wide);
    }
  }
  return bad;
}

template <class Columns, class X>
__device__ __forceinline__ bool load_costs(const Batch& b, int64_t problem, const Shape& s,
                                           const Arrays<X>& to) {
  using torch::headeronly::BFloat16, torch::headeronly::Half;
  const int64_t start = problem * b.stride_n;
  switch (b.type) {
    case ScalarType::Double:
      if constexpr (std::is_same_v<X, double>)
        return load_costs<Columns>(static_cast<const double*>(b.cost) + start, b, s, to);
      return true;
    case ScalarType::Float:
      return load_costs<Columns>(static_cast<const float*>(b.cost) + start, b, s, to);
    case ScalarType::Half:
      return load_costs<Columns>(static_cast<const Half*>(b.cost) + start, b, s, to);
    default:
      return load_costs<Columns>(static_cast<const BFloat16*>(b.cost) + start, b, s, to);
  }
}

// u = row minima, a warp a row; of the rows whose first minimum is in one column, the first takes
// it. Returns, to all threads, false if a row is +inf throughout.
template <class Columns, class X>
__device__ __forceinline__ bool reduce_rows(const Arrays<X>& a, const Shape& s, int* verdict) {
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  for (int i = threadIdx.x / kWarp; i < s.n; i += warps) {
    double least = kInf;
    unsigned where = kFree;
    with_row<Columns>(a, s, i, [&](const X* cost) {
      for (int j = lane; j < s.m; j += kWarp) {
        const double x = static_cast<double>(cost[j]);
        where = x < least ? j : where;
        least = x < least ? x : least;
      }
    });
    const double u = least_of_warp(least);
    where = min_of_warp(least == u ? where : kFree);
    if (lane == 0) {
      a.u[i] = u;
      a.column_of[i] = where;
      if (where == kFree) {
        atomicMax(verdict, static_cast<int>(kInfeasible));
      } else {
        atomicMin(a.row_of + where, i);
      }
    }
  }
  __syncthreads();
  if (*verdict == kInfeasible) return false;
  for (int i = threadIdx.x; i < s.n; i += blockDim.x)
    if (a.row_of[a.column_of[i]] != i) a.column_of[i] = kFree;
  __syncthreads();
  return true;
}

struct Nearest {
  double distance;
  unsigned rank;
};

// The nearest open column, the same for all solvers.
template <class Columns>
__device__ __forceinline__ Nearest nearest(Columns& c, int step) {
  double low = least_of_warp(c.least());
  unsigned rank = ~0u;
#pragma unroll
  for (int k = 0; k < c.count(); ++k)
    if (c.open(k) && c.distance(k) == low) rank = min(rank, c.rank(k));
  rank = min_of_warp(rank);
  if constexpr (Columns::kSolvers > kWarp) {
    // by turns in two places: who is ahead writes the next before others have read the last
    constexpr unsigned kWarps = Columns::kSolvers / kWarp;
    SEGKERN_STATIC_SHARED(Nearest, of_warp, [2][kWarps]);
    const unsigned lane = threadIdx.x % kWarp;
    if (lane == 0) of_warp[step % 2][threadIdx.x / kWarp] = {low, rank};
    __syncthreads();
    const Nearest mine = lane < kWarps ? of_warp[step % 2][lane] : Nearest{kInf, ~0u};
    low = least_of_warp(mine.distance);
    rank = min_of_warp(mine.distance == low ? mine.rank : ~0u);
  }
  return {low, rank};
}

// Grows a shortest-path tree from row `root` until it meets a free column, and flips the path.
// False if there is none. At most n rows are on the tree, so n steps are enough.
template <class X, class Columns>
__device__ __forceinline__ bool augment(const Arrays<X>& a, const Shape& s, Columns& c, int root) {
  c.start();
  Nearest next{0.0, 0};
  int i = root;
  for (int step = 0;; ++step) {
    const double base = next.distance - a.u[i];
    with_row<Columns>(a, s, i, [&](const X* cost) {
#pragma unroll
      for (int k = 0; k < c.count(); ++k) {
        // a lone warp reads past the end of a line, where shared memory goes on, sooner than ask
        // each time; such columns are not open
        const bool readable = Columns::kSolvers == kWarp || c.exists(k);
        const double x = readable ? static_cast<double>(cost[c.column(k)]) : kInf;
        const double by_row = base + (x - c.v(k));
        if (c.open(k) && by_row < c.distance(k)) {
          c.distance(k) = by_row;
          c.from(k) = i;
        }
      }
    });
    next = nearest(c, step);
    if (!(next.distance < kInf) || step == s.n) return false;
    if (!(next.rank & kTaken)) break;
    i = c.row(next.rank);
    c.enter_tree(next.rank);
  }
  if constexpr (Columns::kSolvers == kWarp) __syncwarp(kAllLanes);  // u has been read
#pragma unroll
  for (int k = 0; k < c.count(); ++k) {
    if (!c.in_tree(k)) continue;
    const double moved = next.distance - c.distance(k);
    c.v(k) -= moved;
    a.u[c.row(c.rank(k))] += moved;
  }
  c.show_from(a.from);
  wait_for_solvers<Columns::kSolvers>();
  if (threadIdx.x == 0) {
    a.u[root] += next.distance;
    int j = c.column_of_rank(next.rank);
    for (int step = 0; step < s.n; ++step) {
      const int row = a.from[j], before = a.column_of[row];
      a.row_of[j] = row;
      a.column_of[row] = j;
      if (row == root) break;
      j = before;
    }
  }
  wait_for_solvers<Columns::kSolvers>();
  c.follow_rows();
  return true;
}

// Augments every row that has no column.
template <class X, class Columns>
__device__ __forceinline__ bool augment_all(const Arrays<X>& a, const Shape& s) {
  Columns c(a, s.m);
  for (int first = 0; first < s.n; first += kWarp) {
    const int i = first + threadIdx.x % kWarp;
    unsigned left = __ballot_sync(kAllLanes, i < s.n && a.column_of[i] == kFree);
    for (; left != 0; left &= left - 1)
      if (!augment(a, s, c, first + __ffs(left) - 1)) return false;
  }
  return true;
}

__device__ __forceinline__ void write_partners(const int* partner /*[count]*/, int count,
                                               int64_t* to /*[size]*/, int size, int threads) {
  for (int k = threadIdx.x; k < size; k += threads)
    to[k] = k < count && partner[k] != kFree ? partner[k] : -1;
}

__device__ __forceinline__ void write_nobody(const Batch& b, int64_t problem, Status status,
                                             int threads) {
  for (int q = threadIdx.x; q < b.Q; q += threads) b.target_of_query[problem * b.Q + q] = -1;
  for (int t = threadIdx.x; t < b.T; t += threads) b.query_of_target[problem * b.T + t] = -1;
  if (threadIdx.x == 0) b.status[problem] = status;
}

// X: the type of the costs in the working arrays; it holds every value of b.type.
template <class X, class Columns>
__global__ void __launch_bounds__(Columns::kSolvers > 256 ? Columns::kSolvers : 256, 1)
    solve(const Batch b) {
  SEGKERN_SHARED(unsigned char, shared);
  SEGKERN_STATIC_SHARED(int, verdict);
  constexpr int kSolvers = Columns::kSolvers;
  const int64_t problem = blockIdx.x;
  const int threads = blockDim.x;
  const Shape s = shape_of(b, problem);
  if (s.n == 0) return write_nobody(b, problem, kOk, threads);

  unsigned char* own = b.workspace + problem * b.workspace_stride;
  Arrays<X> a = lay_out<X, Columns::kInMemory>(Columns::kInMemory ? own : shared, s.n, s.m);
  if (!Columns::kInMemory) a.far = reinterpret_cast<X*>(own);
  if (threadIdx.x == 0) verdict = kOk;
  for (int j = threadIdx.x; j < s.m; j += threads) a.row_of[j] = kFree;
  __syncthreads();
  if (load_costs<Columns>(b, problem, s, a)) atomicMax(&verdict, static_cast<int>(kNotANumber));
  __syncthreads();
  if (verdict == kNotANumber) return write_nobody(b, problem, kNotANumber, threads);
  if (!reduce_rows<Columns>(a, s, &verdict)) return write_nobody(b, problem, kInfeasible, threads);

  if (kSolvers == kWarp && threadIdx.x >= kWarp) return;
  if (!augment_all<X, Columns>(a, s)) return write_nobody(b, problem, kInfeasible, kSolvers);
  int64_t* targets = b.target_of_query + problem * b.Q;
  int64_t* queries = b.query_of_target + problem * b.T;
  write_partners(s.transposed ? a.row_of : a.column_of, b.Q, targets, b.Q, kSolvers);
  write_partners(s.transposed ? a.column_of : a.row_of, s.count, queries, b.T, kSolvers);
  if (threadIdx.x == 0) b.status[problem] = kOk;
}

template <class X>
void launch_solver(const Tensor& cost, const Batch& b, unsigned N, size_t shared) {
  const int m = std::max(b.Q, b.T);
  const auto go = [&](auto kernel, unsigned threads) {
    SEGKERN_LAUNCH(cost, kernel, N, threads, shared, b);
  };
  if (m <= kWarpMost && b.workspace == nullptr) {
    // eight warps load fast, and three such blocks fit the registers of a multiprocessor; where
    // there are more problems than that, two warps leave room for more of them
    const unsigned threads = N <= 3 * kMultiprocessors ? 256 : 64;
    if constexpr (std::is_same_v<X, double>) {  // a matrix this small is never in float
      if (m <= 32) return go(solve<X, Registers<1, 32>>, threads);
      if (m <= 64) return go(solve<X, Registers<2, 32>>, threads);
    }
    if (m <= 128) return go(solve<X, Registers<4, 32>>, threads);
    return go(solve<X, Registers<8, 32>>, threads);
  }
  if (m <= 512) return go(solve<X, Registers<2, 256>>, 256);
  if (m <= 1024) return go(solve<X, Registers<4, 256>>, 256);
  if (m <= kRegistersMost) return go(solve<X, Registers<8, 256>>, 256);
  go(solve<X, Memory>, Memory::kSolvers);
}

std::tuple<Tensor, Tensor, Tensor> linear_assignment(Tensor cost,
                                                     std::optional<Tensor> n_targets) {
  const DeviceScope scope(cost);
  IntList lead;
  int64_t N = 1;
  for (int64_t d = 0; d + 2 < cost.dim(); ++d) {
    lead.push_back(cost.size(d));
    N *= cost.size(d);
  }
  const int64_t Q = cost.size(-2), T = cost.size(-1), n = std::min(Q, T), m = std::max(Q, T);
  STD_TORCH_CHECK(!n_targets || n_targets->numel() == N, "linear_assignment: one count a problem");
  STD_TORCH_CHECK(N <= kFree && m <= kFree / 2, "linear_assignment: too many problems or costs");
  IntList targets = lead, queries = lead;
  targets.push_back(T);
  queries.push_back(Q);
  Tensor query_of_target = empty<int64_t>(cost, targets);
  Tensor target_of_query = empty<int64_t>(cost, queries);
  Tensor status = empty<int32_t>(cost, lead);
  dispatch_accumulate(cost, "linear_assignment", [](auto) {});  // floating point only
  if (N == 0) return {query_of_target, target_of_query, status};

  const Tensor flat = torch::stable::reshape(cost, {N, Q, T});
  const Tensor counts = n_targets ? torch::stable::reshape(*n_targets, {N}) : Tensor();
  Batch b{};
  b.cost = flat.const_data_ptr();
  b.type = flat.scalar_type();
  b.stride_n = flat.stride(0);
  b.stride_q = flat.stride(1);
  b.stride_t = flat.stride(2);
  if (n_targets) {
    b.n_targets = data<int64_t>(counts);
    b.stride_count = counts.stride(0);
  }
  b.Q = static_cast<int>(Q);
  b.T = static_cast<int>(T);
  b.query_of_target = mutable_data<int64_t>(query_of_target);
  b.target_of_query = mutable_data<int64_t>(target_of_query);
  b.status = mutable_data<int32_t>(status);

  // Costs in double where two problems still fit a multiprocessor, which has a kilobyte more than
  // a block may ask for and takes one for each block (a conversion in each step is a seventh of
  // its time); else in float, if that loses nothing.
  constexpr int64_t kStatic =
      512;  // above the static memory of a kernel: tests/kernels/test_cuda.py
  const int64_t limit = static_cast<int64_t>(shared_limit(cost));
  const int64_t half = (limit + 1024) / 2 - 1024 - kStatic, whole = limit - kStatic;
  const bool in_memory = m > kRegistersMost;
  const int64_t arrays = bytes_of_arrays(n, m, in_memory);
  const int64_t cells = cells_of(Q, T) + (m <= kWarpMost ? kWarpMost : 0);  // read past the end
  const bool in_double =
      b.type == ScalarType::Double || (!in_memory && arrays + 8 * cells <= half);
  // Where a whole block solves a problem, and there are more of them than multiprocessors, two
  // share one, with what each has of shared memory: its first rows.
  const int64_t size = in_double ? 8 : 4;
  const int64_t room = (m > kWarpMost && N > kMultiprocessors ? half : whole) - arrays;
  const int64_t near = in_memory ? 0 : std::clamp<int64_t>(room / size, 0, cells);
  b.near = static_cast<int>(near);
  Tensor workspace;
  if (near < cells) {
    const int64_t rest = cells - near + m + 1;  // and up to a line that did not fit
    b.workspace_stride = ((in_memory ? arrays : 0) + size * rest + 7) / 8 * 8;
    workspace = empty<uint8_t>(cost, {N, b.workspace_stride});
    b.workspace = mutable_data<uint8_t>(workspace);
  }
  const size_t shared = in_memory ? 0 : static_cast<size_t>(arrays + size * near);
  if (in_double) {
    launch_solver<double>(cost, b, static_cast<unsigned>(N), shared);
  } else {
    launch_solver<float>(cost, b, static_cast<unsigned>(N), shared);
  }
  return {query_of_target, target_of_query, status};
}

}  // namespace
}  // namespace segkern

STABLE_TORCH_LIBRARY_IMPL(segkern, SEGKERN_CUDA_KEY, m) {
  m.impl("linear_assignment", TORCH_BOX(&segkern::linear_assignment));
}
