// Products of a line of queries (16 in float, 8 in double) with the keys around each: every query
// is a lane, so that nothing is summed across a register. The lines of a row of keys are channels;
// neighbors_body.h is compiled once per instruction set, as tile_body.h, whose types it takes.
#pragma once

#include "tile.h"

namespace segkern {

// The keys of a query: columns in each of some rows, `step` apart.
struct Reach {
  int64_t rows, columns, step;
};

// y[d, x] of a row of keys is at rows[a][d ld + x], and readable for a line behind the last key.
// The first key of query i is at column key[i]; these rise by at most 1 from a lane to the next.
// Of the two functions the second is for queries whose first keys all lie beside each other.
template <class T>
struct Neighbors {
  // out[a, b, i] = sum_d q[d, i] y[a][d, key[i] + b step]
  void (*dots[2])(const T* q /*[D, lanes]*/, const T* const* rows, const int32_t* key /*[lanes]*/,
                  const Reach& n, int64_t ld, int64_t D, T* out /*[rows, columns, lanes]*/);
  // out[d, i] = sum_ab p[a, b, i] y[a][d, key[i] + b step]
  void (*sums[2])(const T* p /*[rows, columns, lanes]*/, const T* const* rows,
                  const int32_t* key /*[lanes]*/, const Reach& n, int64_t ld, int64_t D,
                  T* out /*[D, lanes]*/);
};

#ifdef SEGKERN_X86_CLONES
#ifndef SEGKERN_AVX2
#define SEGKERN_ISA v4
#define SEGKERN_TARGET __attribute__((target("arch=x86-64-v4")))
#define SEGKERN_WIDTH 64
#include "neighbors_body.h"
#endif
#define SEGKERN_ISA v3
#define SEGKERN_TARGET __attribute__((target("arch=x86-64-v3")))
#define SEGKERN_WIDTH 32
#include "neighbors_body.h"
#endif
#define SEGKERN_ISA baseline
#define SEGKERN_TARGET
#define SEGKERN_WIDTH 16
#include "neighbors_body.h"

template <class T>
const Neighbors<T>& neighbors() {
  static const Neighbors<T> best = [] {
#ifdef SEGKERN_X86_CLONES
#ifndef SEGKERN_AVX2
    if (__builtin_cpu_supports("x86-64-v4")) return v4::neighbors<T>();
#endif
    if (__builtin_cpu_supports("x86-64-v3")) return v3::neighbors<T>();
#endif
    return baseline::neighbors<T>();
  }();
  return best;
}

}  // namespace segkern
