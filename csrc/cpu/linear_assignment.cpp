// linear_assignment on the CPU: shortest augmenting paths with dual variables, in double for every
// input, one problem a time and problems in parallel. The smaller side of a problem is augmented,
// so that the inner loop runs over the larger one. Letters: N problem, Q query, T target; inside a
// problem n rows (the smaller side) and m columns, in lines of 8 * blocks >= m doubles whose tail
// is +inf.
#include <algorithm>
#include <optional>
#include <tuple>

#include "../common.h"

namespace segkern {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
enum Status : int32_t { kOk = 0, kNotANumber = 1, kInfeasible = 2 };

// Copies one problem to doubles; true if it holds NaN or -inf.
template <class S>
SEGKERN_CLONES bool load_rows(const S* from, int64_t line_from, int64_t n, int64_t m, double* to,
                              int64_t line) {
  int64_t bad = 0;
  for (int64_t i = 0; i < n; ++i) {
    const S* x = from + i * line_from;
    double* y = to + i * line;
#pragma omp simd reduction(| : bad)
    for (int64_t j = 0; j < m; ++j) {
      y[j] = static_cast<double>(x[j]);
      bad |= !(y[j] > -kInf);
    }
    for (int64_t j = m; j < line; ++j) y[j] = kInf;
  }
  return bad != 0;
}

// The same, transposed: row i of the result is column i of `from`. In bands of source rows that
// stay in the first-level cache while each is read n times.
template <class S>
SEGKERN_CLONES bool load_columns(const S* from, int64_t line_from, int64_t n, int64_t m,
                                 double* to, int64_t line) {
  int64_t bad = 0;
  for (int64_t first = 0; first < m; first += 64) {
    const int64_t last = first + 64 < m ? first + 64 : m;
    for (int64_t i = 0; i < n; ++i) {
      double* y = to + i * line;
#pragma omp simd reduction(| : bad)
      for (int64_t j = first; j < last; ++j) {
        y[j] = static_cast<double>(from[j * line_from + i]);
        bad |= !(y[j] > -kInf);
      }
    }
  }
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = m; j < line; ++j) to[i * line + j] = kInf;
  return bad != 0;
}

SEGKERN_CLONES double least_of(const double* x, int64_t blocks) {
  double least = kInf;
#pragma omp simd reduction(min : least)
  for (int64_t j = 0; j < 8 * blocks; ++j) least = x[j] < least ? x[j] : least;
  return least;
}

// The lowest rank of the columns whose value is `least`.
SEGKERN_CLONES double lowest_rank(const double* x, double least, const double* rank,
                                  int64_t blocks) {
  double found = kInf;
#pragma omp simd reduction(min : found)
  for (int64_t j = 0; j < 8 * blocks; ++j) {
    const double here = x[j] == least ? rank[j] : kInf;
    found = here < found ? here : found;
  }
  return found;
}

// Shortens the distances of all columns by way of `row`; returns the least of them. A column
// already on the tree has v = -inf and distance = +inf, so nothing reaches it.
SEGKERN_CLONES double relax(const double* cost, const double* v, double base, int64_t row,
                            int64_t blocks, double* distance, int64_t* from) {
  double least = kInf;
#pragma omp simd reduction(min : least)
  for (int64_t j = 0; j < 8 * blocks; ++j) {
    const double by_row = base + (cost[j] - v[j]), before = distance[j];
    from[j] = by_row < before ? row : from[j];
    // in this form gcc stores the line as it is; asking "closer?" twice it branches around the
    // store
    const double d = before <= by_row ? before : by_row;
    distance[j] = d;
    least = d < least ? d : least;
  }
  return least;
}

class Solver {
 public:
  // for problems whose smaller side is at most n and larger side at most m
  Solver(int64_t n, int64_t m)
      : cost_(n * padded(m)),
        u_(n),
        v_(padded(m)),
        distance_(padded(m)),
        rank_(padded(m)),
        from_(padded(m)),
        row_of_(padded(m)),
        column_of_(n),
        tree_(n) {}

  // `cost` is [Q, T] in lines of `line`; fills query_of_target [T] and target_of_query [Q], which
  // hold -1
  template <class S>
  Status solve(const S* cost, int64_t Q, int64_t T, int64_t line, int64_t* query_of_target,
               int64_t* target_of_query) {
    const bool columns = T < Q;
    n_ = std::min(Q, T);
    m_ = std::max(Q, T);
    blocks_ = padded(m_) / 8;
    if (columns ? load_columns(cost, line, n_, m_, cost_.get(), 8 * blocks_)
                : load_rows(cost, line, n_, m_, cost_.get(), 8 * blocks_))
      return kNotANumber;
    if (!reduce_rows()) return kInfeasible;
    for (int64_t i = 0; i < n_; ++i)
      if (column_of_[i] < 0 && !augment(i)) return kInfeasible;
    int64_t* row_side = columns ? query_of_target : target_of_query;
    int64_t* column_side = columns ? target_of_query : query_of_target;
    for (int64_t i = 0; i < n_; ++i) {
      row_side[i] = column_of_[i];
      column_side[column_of_[i]] = i;
    }
    return kOk;
  }

 private:
  static int64_t padded(int64_t m) { return (m + 7) / 8 * 8; }
  const double* row(int64_t i) const { return cost_.get() + i * 8 * blocks_; }

  // Ranks order columns of equal value: free before taken, then by number.
  bool taken(double rank) const { return rank >= static_cast<double>(8 * blocks_); }
  void take(int64_t i, int64_t j) {
    column_of_[i] = j;
    row_of_[j] = i;
    rank_[j] += static_cast<double>(8 * blocks_);
  }

  // u = row minima, v = 0, and every row that can have a free column at its minimum takes it.
  // False if a row is +inf throughout.
  bool reduce_rows() {
    for (int64_t j = 0; j < 8 * blocks_; ++j) {
      v_[j] = 0.0;
      rank_[j] = static_cast<double>(j);
    }
    for (int64_t i = 0; i < n_; ++i) {
      column_of_[i] = -1;
      u_[i] = least_of(row(i), blocks_);
      if (u_[i] == kInf) return false;
      const double rank = lowest_rank(row(i), u_[i], rank_.get(), blocks_);
      if (!taken(rank)) take(i, static_cast<int64_t>(rank));
    }
    return true;
  }

  // Grows a shortest-path tree from row `root` until it meets a free column, and flips the path.
  // False if there is none.
  bool augment(int64_t root) {
    std::fill_n(distance_.get(), 8 * blocks_, kInf);
    int64_t i = root, count = 0, sink = -1;
    double low = 0.0;
    while (true) {
      low = relax(row(i), v_.get(), low - u_[i], i, blocks_, distance_.get(), from_.get());
      if (low == kInf) return false;
      const double rank = lowest_rank(distance_.get(), low, rank_.get(), blocks_);
      if (!taken(rank)) {
        sink = static_cast<int64_t>(rank);
        break;
      }
      const int64_t j = static_cast<int64_t>(rank) - 8 * blocks_;
      tree_[count++] = {j, low, v_[j]};
      v_[j] = -kInf;
      distance_[j] = kInf;
      i = row_of_[j];
    }
    u_[root] += low;
    for (int64_t k = 0; k < count; ++k) {
      const Branch& b = tree_[k];
      v_[b.column] = b.v - (low - b.distance);
      u_[row_of_[b.column]] += low - b.distance;
    }
    rank_[sink] += static_cast<double>(8 * blocks_);
    for (int64_t j = sink; j >= 0;) {
      i = from_[j];
      row_of_[j] = i;
      std::swap(column_of_[i], j);
      if (i == root) break;
    }
    return true;
  }

  struct Branch {
    int64_t column;
    double distance, v;
  };
  int64_t n_ = 0, m_ = 0, blocks_ = 0;
  Scratch<double> cost_, u_, v_, distance_, rank_;
  Scratch<int64_t> from_, row_of_, column_of_;
  Scratch<Branch> tree_;
};

template <class S>
void solve_all(const Tensor& cost, const std::optional<Tensor>& n_targets, int64_t N,
               const Tensor& query_of_target, const Tensor& target_of_query,
               const Tensor& status) {
  const Tensor c = dense<S>(cost);
  const Tensor counts = n_targets ? torch::stable::contiguous(*n_targets) : Tensor();
  const int64_t Q = c.size(-2), T = c.size(-1);
  const int64_t* count = n_targets ? data<int64_t>(counts) : nullptr;
  parallel_for(0, N, 1 + 16384 / (Q * T + 1), [&](int64_t begin, int64_t end) {
    Solver solver(std::min(Q, T), std::max(Q, T));
    for (int64_t k = begin; k < end; ++k) {
      const int64_t targets = count ? std::clamp<int64_t>(count[k], 0, T) : T;
      int64_t* query = mutable_data<int64_t>(query_of_target) + k * T;
      int64_t* target = mutable_data<int64_t>(target_of_query) + k * Q;
      std::fill_n(query, T, -1);
      std::fill_n(target, Q, -1);
      mutable_data<int32_t>(status)[k] =
          solver.solve(data<S>(c) + k * Q * T, Q, targets, T, query, target);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> linear_assignment(Tensor cost,
                                                     std::optional<Tensor> n_targets) {
  IntList lead;
  int64_t N = 1;
  for (int64_t d = 0; d + 2 < cost.dim(); ++d) {
    lead.push_back(cost.size(d));
    N *= cost.size(d);
  }
  STD_TORCH_CHECK(!n_targets || n_targets->numel() == N, "linear_assignment: one count a problem");
  IntList targets = lead, queries = lead;
  targets.push_back(cost.size(-1));
  queries.push_back(cost.size(-2));
  Tensor query_of_target = empty<int64_t>(cost, targets);
  Tensor target_of_query = empty<int64_t>(cost, queries);
  Tensor status = empty<int32_t>(cost, lead);
  dispatch_accumulate(cost, "linear_assignment", [&](auto zero) {
    solve_all<decltype(zero)>(cost, n_targets, N, query_of_target, target_of_query, status);
  });
  return {query_of_target, target_of_query, status};
}

}  // namespace
}  // namespace segkern

STABLE_TORCH_LIBRARY_IMPL(segkern, CPU, m) {
  m.impl("linear_assignment", TORCH_BOX(&segkern::linear_assignment));
}
