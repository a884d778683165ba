// The products of neighbors.h for one instruction set; included by neighbors.h only, once for
// each. SEGKERN_WIDTH bytes a vector register.

namespace SEGKERN_ISA {

template <class T>
struct Choice {
  typedef std::conditional_t<sizeof(T) == 8, int64_t, int32_t> one;
  typedef one type __attribute__((vector_size(SEGKERN_WIDTH)));
};

// The keys of the queries in a register: those from `at` on, or of these each query's own
template <class T, bool straight>
SEGKERN_TARGET inline __attribute__((always_inline)) V<T> keys(const T* at,
                                                               typename Choice<T>::type own) {
  V<T> v;
  std::memcpy(&v, at, SEGKERN_WIDTH);
#ifdef __clang__
  if constexpr (!straight) v = __builtin_shufflevector(v, own);
#else
  if constexpr (!straight) v = __builtin_shuffle(v, own);
#endif
  return v;
}

// N keys of dots
template <class T, bool straight, int N>
SEGKERN_TARGET inline __attribute__((always_inline)) void dots_of(const T* q, const T* y,
                                                                  int64_t ld, int64_t D,
                                                                  int64_t step, T* out,
                                                                  typename Choice<T>::type own) {
  V<T> sum[N] = {};
  for (int64_t d = 0; d < D; ++d) {
    V<T> x;
    std::memcpy(&x, q + d * kLanes<T>, SEGKERN_WIDTH);
#pragma GCC unroll 16
    for (int j = 0; j < N; ++j) sum[j] += x * keys<T, straight>(y + d * ld + j * step, own);
  }
#pragma GCC unroll 16
  for (int j = 0; j < N; ++j) std::memcpy(out + j * kLanes<T>, &sum[j], SEGKERN_WIDTH);
}

// N channels of sums
template <class T, bool straight, int N>
SEGKERN_TARGET inline __attribute__((always_inline)) void sums_of(const T* p, const T* const* rows,
                                                                  const Reach& n, int64_t at,
                                                                  int64_t ld, T* out,
                                                                  typename Choice<T>::type own) {
  V<T> sum[N] = {};
  for (int64_t a = 0; a < n.rows; ++a) {
    const T* y = rows[a] + at;
    for (int64_t j = 0; j < n.columns; ++j, p += kLanes<T>, y += n.step) {
      V<T> weight;
      std::memcpy(&weight, p, SEGKERN_WIDTH);
#pragma GCC unroll 16
      for (int d = 0; d < N; ++d) sum[d] += weight * keys<T, straight>(y + d * ld, own);
    }
  }
#pragma GCC unroll 16
  for (int d = 0; d < N; ++d) std::memcpy(out + d * kLanes<T>, &sum[d], SEGKERN_WIDTH);
}

// Calls f<N> with N = n, which is at most the first N
#define SEGKERN_CASES(CALL) \
  CALL(1)                   \
  CALL(2) CALL(3) CALL(4) CALL(5) CALL(6) CALL(7) CALL(8) CALL(9) CALL(10) CALL(11) CALL(12)

template <class T, bool straight>
SEGKERN_TARGET void dots(const T* q, const T* const* rows, const int32_t* key, const Reach& n,
                         int64_t ld, int64_t D, T* out) {
  for (int64_t part = 0; part < kLanes<T>; part += kWide<T>) {
    typename Choice<T>::type own;
    for (int i = 0; i < kWide<T>; ++i) own[i] = key[part + i] - key[part];
    for (int64_t a = 0; a < n.rows; ++a) {
      T* to = out + a * n.columns * kLanes<T> + part;
      for (int64_t j = 0, left = (n.columns + 11) / 12, take; j < n.columns; j += take, --left) {
        take = (n.columns - j + left - 1) / left;
        const T* y = rows[a] + key[part] + j * n.step;
#define SEGKERN_CASE(N)                                                           \
  case N:                                                                         \
    dots_of<T, straight, N>(q + part, y, ld, D, n.step, to + j * kLanes<T>, own); \
    break;
        switch (take) { SEGKERN_CASES(SEGKERN_CASE) }
#undef SEGKERN_CASE
      }
    }
  }
}

template <class T, bool straight>
SEGKERN_TARGET void sums(const T* p, const T* const* rows, const int32_t* key, const Reach& n,
                         int64_t ld, int64_t D, T* out) {
  for (int64_t part = 0; part < kLanes<T>; part += kWide<T>) {
    typename Choice<T>::type own;
    for (int i = 0; i < kWide<T>; ++i) own[i] = key[part + i] - key[part];
    for (int64_t d = 0, take; d < D; d += take) {
      take = std::min<int64_t>(D - d, 8);
#define SEGKERN_CASE(N)                                                \
  case N:                                                              \
    sums_of<T, straight, N>(p + part, rows, n, key[part] + d * ld, ld, \
                            out + d * kLanes<T> + part, own);          \
    break;
      switch (take) { SEGKERN_CASES(SEGKERN_CASE) }
#undef SEGKERN_CASE
    }
  }
}
#undef SEGKERN_CASES

template <class T>
Neighbors<T> neighbors() {
  return {{dots<T, false>, dots<T, true>}, {sums<T, false>, sums<T, true>}};
}

}  // namespace SEGKERN_ISA

#undef SEGKERN_ISA
#undef SEGKERN_TARGET
#undef SEGKERN_WIDTH
