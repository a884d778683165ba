// The products of tile.h for one instruction set; included by tile.h only, once for each.
// SEGKERN_WIDTH bytes a vector register; summed at a time: SEGKERN_ROWS rows, SEGKERN_KEYS keys,
// and in a product SEGKERN_ROWS rows of SEGKERN_LINES lines.

namespace SEGKERN_ISA {

template <class T>
struct Vector {
  typedef T type __attribute__((vector_size(SEGKERN_WIDTH)));
};
template <class T>
using V = typename Vector<T>::type;
template <class T>
constexpr int kWide = SEGKERN_WIDTH / sizeof(T);  // elements a register
constexpr int kParts = 64 / SEGKERN_WIDTH;        // registers a line of a tile

// A line of a tile to and from registers, one by one: a copy of 64 bytes would pass through memory
template <class T>
SEGKERN_TARGET inline __attribute__((always_inline)) void load(V<T>* v, const T* from) {
#pragma GCC unroll 4
  for (int k = 0; k < kParts; ++k) std::memcpy(&v[k], from + k * kWide<T>, SEGKERN_WIDTH);
}
template <class T>
SEGKERN_TARGET inline __attribute__((always_inline)) void store(T* to, const V<T>* v) {
#pragma GCC unroll 4
  for (int k = 0; k < kParts; ++k) std::memcpy(to + k * kWide<T>, &v[k], SEGKERN_WIDTH);
}

// R rows of dot
template <class T, int R>
SEGKERN_TARGET void dot_rows(const T* x, int64_t ld, const int32_t* row, const T* tile, int64_t D,
                             T* out) {
  const T* line[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) line[r] = x + row[r] * ld;
  V<T> sum[R][kParts] = {};
#pragma GCC unroll 4
  for (int64_t d = 0; d < D; ++d) {
    V<T> t[kParts];
    load<T>(t, tile + d * kLanes<T>);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int k = 0; k < kParts; ++k) sum[r][k] += line[r][d] * t[k];
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) store<T>(out + r * kLanes<T>, sum[r]);
}

// R rows of accumulate
template <class T, int R>
SEGKERN_TARGET void accumulate_rows(const T* p, const int32_t* row, const T* y, int64_t ldy,
                                    int64_t D, T* out, int64_t ld) {
  for (int64_t d = 0; d < D; d += kLanes<T>) {
    V<T> sum[R][kParts] = {};  // added to out as a whole: shorter chains round less
#pragma GCC unroll 4
    for (int64_t j = 0; j < kLanes<T>; ++j) {
      V<T> t[kParts];
      load<T>(t, y + j * ldy + d);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int k = 0; k < kParts; ++k) sum[r][k] += p[r * kLanes<T> + j] * t[k];
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      V<T> before[kParts];
      load<T>(before, out + row[r] * ld + d);
#pragma GCC unroll 4
      for (int k = 0; k < kParts; ++k) before[k] += sum[r][k];
      store<T>(out + row[r] * ld + d, before);
    }
  }
}

// Calls f<R> with R = min(n, SEGKERN_ROWS), the rest split evenly, so that no call has few rows.
#define SEGKERN_ROW_CASE(R, CALL)             \
  case R:                                     \
    if constexpr (R <= SEGKERN_ROWS) CALL(R); \
    break;
#define SEGKERN_EACH_ROWS(CALL)                                                        \
  for (int64_t r = 0, left = (n + SEGKERN_ROWS - 1) / SEGKERN_ROWS, take; r < n;       \
       r += take, --left) {                                                            \
    take = (n - r + left - 1) / left;                                                  \
    switch (take) {                                                                    \
      SEGKERN_ROW_CASE(1, CALL)                                                        \
      SEGKERN_ROW_CASE(2, CALL)                                                        \
      SEGKERN_ROW_CASE(3, CALL)                                                        \
      SEGKERN_ROW_CASE(4, CALL)                                                        \
      SEGKERN_ROW_CASE(5, CALL)                                                        \
      SEGKERN_ROW_CASE(6, CALL)                                                        \
      SEGKERN_ROW_CASE(7, CALL)                                                        \
      SEGKERN_ROW_CASE(8, CALL)                                                        \
      SEGKERN_ROW_CASE(9, CALL)                                                        \
      SEGKERN_ROW_CASE(10, CALL) SEGKERN_ROW_CASE(11, CALL) SEGKERN_ROW_CASE(12, CALL) \
    }                                                                                  \
  }

template <class T>
SEGKERN_TARGET void dot(const T* x, int64_t ld, const int32_t* row, int64_t n, const T* tile,
                        int64_t D, T* out) {
#define SEGKERN_DOT(R) dot_rows<T, R>(x, ld, row + r, tile, D, out + r * kLanes<T>)
  SEGKERN_EACH_ROWS(SEGKERN_DOT)
#undef SEGKERN_DOT
}

template <class T>
SEGKERN_TARGET void accumulate(const T* p, const int32_t* row, int64_t n, const T* y, int64_t ldy,
                               int64_t D, T* out, int64_t ld) {
#define SEGKERN_ACCUMULATE(R) accumulate_rows<T, R>(p + r * kLanes<T>, row + r, y, ldy, D, out, ld)
  SEGKERN_EACH_ROWS(SEGKERN_ACCUMULATE)
#undef SEGKERN_ACCUMULATE
}

// R rows and N lines of product
template <class T, int R, int N>
SEGKERN_TARGET void product_rows(const T* x, int64_t xr, int64_t xk, const T* y, int64_t yk,
                                 int64_t yl, int64_t K, T* out, int64_t ld, bool add) {
  V<T> sum[R][N * kParts] = {};
  if (add) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int i = 0; i < N; ++i) load<T>(sum[r] + i * kParts, out + r * ld + i * kLanes<T>);
  }
  for (int64_t k = 0; k < K; ++k) {
    V<T> t[N * kParts];
#pragma GCC unroll 2
    for (int i = 0; i < N; ++i) load<T>(t + i * kParts, y + k * yk + i * yl);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const T factor = x[r * xr + k * xk];
#pragma GCC unroll 8
      for (int i = 0; i < N * kParts; ++i) sum[r][i] += factor * t[i];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int i = 0; i < N; ++i) store<T>(out + r * ld + i * kLanes<T>, sum[r] + i * kParts);
}

template <class T>
SEGKERN_TARGET void product(const T* x, int64_t xr, int64_t xk, int64_t n, const T* y, int64_t yk,
                            int64_t yl, int64_t K, int64_t lines, T* out, int64_t ld, bool add) {
  for (int64_t l = 0; l < lines; l += SEGKERN_LINES) {
    const T* part = y + l * yl;
    T* to = out + l * kLanes<T>;
#define SEGKERN_PRODUCT(R) \
  product_rows<T, R, kLines>(x + r * xr, xr, xk, part, yk, yl, K, to + r * ld, ld, add)
    if (lines - l >= SEGKERN_LINES) {
      constexpr int kLines = SEGKERN_LINES;
      SEGKERN_EACH_ROWS(SEGKERN_PRODUCT)
    } else {
      constexpr int kLines = 1;
      SEGKERN_EACH_ROWS(SEGKERN_PRODUCT)
    }
#undef SEGKERN_PRODUCT
  }
}
#undef SEGKERN_EACH_ROWS
#undef SEGKERN_ROW_CASE

template <class T>
SEGKERN_TARGET void reduce(const T* p, const T* x, int64_t ld, const int32_t* row, int64_t n,
                           int64_t D, T* out) {
  constexpr int K = SEGKERN_KEYS < kLanes<T> ? SEGKERN_KEYS : kLanes<T>;
  for (int64_t j = 0; j < kLanes<T>; j += K) {
    for (int64_t d = 0; d < D; d += kLanes<T>) {
      V<T> sum[K][kParts] = {};
      for (int64_t r = 0; r < n; ++r) {
        V<T> t[kParts];
        load<T>(t, x + row[r] * ld + d);
#pragma GCC unroll 16
        for (int i = 0; i < K; ++i)
#pragma GCC unroll 4
          for (int k = 0; k < kParts; ++k) sum[i][k] += p[r * kLanes<T> + j + i] * t[k];
      }
#pragma GCC unroll 16
      for (int i = 0; i < K; ++i) store<T>(out + (j + i) * D + d, sum[i]);
    }
  }
}

// One step of a transpose: exchanges the off-diagonal blocks of size S of rows a and b.
template <int S, class T, int... I>
SEGKERN_TARGET inline __attribute__((always_inline)) void exchange(
    V<T>& a, V<T>& b, std::integer_sequence<int, I...>) {
  constexpr int L = kWide<T>;
  const V<T> low = __builtin_shufflevector(a, b, (I & S ? L + I - S : I)...);
  b = __builtin_shufflevector(a, b, (I & S ? L + I : I + S)...);
  a = low;
}

template <int S, class T>
SEGKERN_TARGET inline __attribute__((always_inline)) void transpose_step(V<T>* v) {
  if constexpr (S < kWide<T>) {
#pragma GCC unroll 16
    for (int i = 0; i < kWide<T>; ++i)
      if (!(i & S)) exchange<S, T>(v[i], v[i + S], std::make_integer_sequence<int, kWide<T>>{});
    transpose_step<2 * S, T>(v);
  }
}

template <class T>
SEGKERN_TARGET void transpose(const T* y, int64_t ldy, int64_t D, T* out) {
  constexpr int L = kWide<T>;
  for (int64_t d = 0; d < D; d += L) {
    for (int64_t j = 0; j < kLanes<T>; j += L) {
      V<T> v[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) std::memcpy(&v[i], y + (j + i) * ldy + d, SEGKERN_WIDTH);
      transpose_step<1, T>(v);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) std::memcpy(out + (d + i) * kLanes<T> + j, &v[i], SEGKERN_WIDTH);
    }
  }
}

template <class T>
Tiles<T> tiles() {
  return {dot<T>, accumulate<T>, reduce<T>, transpose<T>, product<T>};
}

}  // namespace SEGKERN_ISA

#undef SEGKERN_ISA
#undef SEGKERN_TARGET
#undef SEGKERN_WIDTH
#undef SEGKERN_ROWS
#undef SEGKERN_KEYS
#undef SEGKERN_LINES
