// The working state of one linear_assignment problem: the arrays that its threads share, and each
// thread's own columns, which are kept in registers or, for problems of any size, in memory.
// Letters: n rows (the smaller side), m columns, i row, j column; k numbers the columns
// j = thread, thread + threads, ... of one thread.
// A rank orders columns of equal distance: free before taken, then by number.
#pragma once

#include "device.h"

namespace segkern {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr int kFree = std::numeric_limits<int>::max();  // partner of a row or column without one
constexpr unsigned kTaken = 1u << 31;                   // in a rank: the column has a row

template <class X>
struct Arrays {
  double* u;            // [n]
  double* v;            // [m], only where columns are kept in memory, as the next two
  double* distance;     // [m]
  unsigned char* tree;  // [m]
  int* column_of;       // [n]
  int* row_of;          // [m]
  int* from;            // [m], the row by which the search reached a column
  X* near;              // [rows, line], the first rows of the costs, in shared memory
  X* far;               // [n - rows, line], the others, in global memory
};

// Of all arrays but the costs; a multiple of 8.
__host__ __device__ __forceinline__ int64_t bytes_of_arrays(int64_t n, int64_t m, bool in_memory) {
  return (8 * n + in_memory * 17 * m + 4 * n + 8 * m + 7) / 8 * 8;
}

template <class T>
__device__ __forceinline__ T* take(unsigned char*& p, int64_t count) {
  T* taken = reinterpret_cast<T*>(p);
  p += count * static_cast<int64_t>(sizeof(T));
  return taken;
}

// Carves the arrays out of `p`, and behind them the costs that lie there: the far ones if all is
// in memory, else the near ones.
template <class X, bool kInMemory>
__device__ __forceinline__ Arrays<X> lay_out(unsigned char* p, int n, int m) {
  Arrays<X> a{};
  (kInMemory ? a.far : a.near) = reinterpret_cast<X*>(p + bytes_of_arrays(n, m, kInMemory));
  a.u = take<double>(p, n);
  if constexpr (kInMemory) {
    a.v = take<double>(p, m);
    a.distance = take<double>(p, m);
  }
  a.column_of = take<int>(p, n);
  a.row_of = take<int>(p, m);
  a.from = take<int>(p, m);
  if constexpr (kInMemory) a.tree = take<unsigned char>(p, m);
  return a;
}

// All places are constants once loops over k are unrolled. A rank holds the column's row too, so
// that the next step need not look it up.
template <int kColumns, int kThreads>
class Registers {
 public:
  static constexpr bool kInMemory = false;
  static constexpr int kSolvers = kThreads;  // threads that take part in the search

  template <class X>
  __device__ __forceinline__ Registers(const Arrays<X>& a, int m) : row_of_(a.row_of), m_(m) {
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      v_[k] = 0.0;
      from_[k] = 0;
      if (!exists(k)) outside_ |= 1u << k;
    }
    follow_rows();
  }
  __device__ __forceinline__ int count() const { return kColumns; }
  __device__ __forceinline__ int column(int k) const { return threadIdx.x + k * kThreads; }
  __device__ __forceinline__ bool exists(int k) const { return column(k) < m_; }
  __device__ __forceinline__ double& v(int k) { return v_[k]; }
  __device__ __forceinline__ double& distance(int k) { return distance_[k]; }
  __device__ __forceinline__ int& from(int k) { return from_[k]; }
  __device__ __forceinline__ unsigned rank(int k) const { return rank_[k]; }
  __device__ __forceinline__ bool open(int k) const { return !(closed_ >> k & 1); }
  __device__ __forceinline__ bool in_tree(int k) const { return (closed_ & ~outside_) >> k & 1; }
  __device__ __forceinline__ int row(unsigned rank) const { return rank & 0xFFFF; }
  __device__ __forceinline__ int column_of_rank(unsigned rank) const {
    return rank >> 16 & 0x7FFF;
  }

  __device__ __forceinline__ void start() {
    closed_ = outside_;
#pragma unroll
    for (int k = 0; k < kColumns; ++k) distance_[k] = kInf;
  }
  __device__ __forceinline__ void enter_tree(unsigned rank) {
    const unsigned j = column_of_rank(rank);
    if (j % kThreads == threadIdx.x) closed_ |= 1u << j / kThreads;
  }
  // Of the open columns; by halves, a shorter chain than one by one.
  __device__ __forceinline__ double least() const {
    double x[kColumns];
#pragma unroll
    for (int k = 0; k < kColumns; ++k) x[k] = open(k) ? distance_[k] : kInf;
#pragma unroll
    for (int half = kColumns / 2; half > 0; half /= 2) {
#pragma unroll
      for (int k = 0; k < half; ++k) x[k] = x[k + half] < x[k] ? x[k + half] : x[k];
    }
    return x[0];
  }
  __device__ __forceinline__ void show_from(int* to /*[m]*/) const {
#pragma unroll
    for (int k = 0; k < kColumns; ++k)
      if (exists(k)) to[column(k)] = from_[k];
  }
  // After a path was flipped.
  __device__ __forceinline__ void follow_rows() {
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      const int i = exists(k) ? row_of_[column(k)] : kFree;
      rank_[k] = column(k) << 16 | (i == kFree ? 0 : kTaken | i);
    }
  }

 private:
  const int* row_of_;
  int m_;
  double v_[kColumns], distance_[kColumns];
  int from_[kColumns];
  unsigned rank_[kColumns];
  unsigned outside_ = 0, closed_ = 0;  // bit k: there is no column k; or the tree holds it
};

// A thread touches v, distance, from and tree of its own columns only.
class Memory {
 public:
  static constexpr bool kInMemory = true;
  static constexpr int kSolvers = 512;

  template <class X>
  __device__ Memory(const Arrays<X>& a, int m)
      : v_(a.v), distance_(a.distance), from_(a.from), row_of_(a.row_of), tree_(a.tree), m_(m) {
    for (int k = 0; k < count(); ++k) v(k) = 0.0;
  }
  __device__ int count() const {
    return (m_ - static_cast<int>(threadIdx.x) + kSolvers - 1) / kSolvers;
  }
  __device__ int column(int k) const { return threadIdx.x + k * kSolvers; }
  __device__ double& v(int k) { return v_[column(k)]; }
  __device__ double& distance(int k) { return distance_[column(k)]; }
  __device__ int& from(int k) { return from_[column(k)]; }
  __device__ unsigned rank(int k) const {
    return column(k) | (row_of_[column(k)] == kFree ? 0 : kTaken);
  }
  __device__ bool exists(int) const { return true; }
  __device__ bool open(int k) const { return !in_tree(k); }
  __device__ bool in_tree(int k) const { return tree_[column(k)]; }
  __device__ int row(unsigned rank) const { return row_of_[column_of_rank(rank)]; }
  __device__ int column_of_rank(unsigned rank) const { return rank & ~kTaken; }

  __device__ void start() {
    for (int k = 0; k < count(); ++k) {
      distance(k) = kInf;
      tree_[column(k)] = 0;
    }
  }
  __device__ void enter_tree(unsigned rank) {
    const unsigned j = column_of_rank(rank);
    if (j % kSolvers == threadIdx.x) tree_[j] = 1;
  }
  __device__ double least() const {
    double x = kInf;
    for (int k = 0; k < count(); ++k) {
      const double d = distance_[column(k)];
      if (open(k) && d < x) x = d;
    }
    return x;
  }
  __device__ void show_from(int*) const {}  // it lies there already
  __device__ void follow_rows() {}

 private:
  double *v_, *distance_;
  int *from_, *row_of_;
  unsigned char* tree_;
  int m_;
};

}  // namespace
}  // namespace segkern
