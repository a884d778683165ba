// attention on the CPU in float32 and float64: for each head, its keys and values copied once to
// dense panels, a chunk of query rows after another, and for these a chunk of keys after another:
// scores, softmax and sums stay in the first cache. Letters: B image, Q query, S key, H head, D
// channel a head; E is D rounded up to whole lines.
#include <algorithm>
#include <cmath>

#include "heads.h"
#include "matrix_product.h"
#include "simd_math.h"

namespace segkern {
namespace {

constexpr int64_t kKeys = 256;  // of a chunk: eight panels
constexpr int kSlack = 8;       // that a score may lie above the top of its row, as a power of 2

// 2^x for x <= 127; 0 below -126
SEGKERN_INLINE double power_of_2(double x) { return std::exp2(x); }
SEGKERN_INLINE float power_of_2(float x) {
  const float c = x < -126.0f ? -126.0f : x;
  const float shifted = c + 12582912.0f;        // rounds to the nearest integer n
  const float f = c - (shifted - 12582912.0f);  // c = n + f
  const float y =
      power_of_rest(f) * bits_to_float((float_to_bits(shifted) - 0x4B400000 + 127) << 23);
  return x < -126.0f ? 0.0f : y;
}

// x [rows, kKeys] becomes 2^(x - top) in `keys` columns, 0 behind them. A row's top follows its
// maximum only when that is kSlack ahead, and then its sums so far are scaled: mostly once.
template <class T>
SEGKERN_CLONES void softmax(T* x, int64_t rows, int64_t keys, T* top /*[rows]*/,
                            T* sum /*[rows, lanes]*/, T* out /*[rows, E]*/, int64_t E) {
  constexpr int64_t L = kLanes<T>;
  const int64_t whole = (keys + L - 1) / L * L;
  for (int64_t r = 0; r < rows; ++r, x += kKeys, sum += L, out += E) {
    for (int64_t j = keys; j < kKeys; ++j) x[j] = -std::numeric_limits<T>::infinity();
    T most = top[r];
#pragma omp simd reduction(max : most)
    for (int64_t j = 0; j < whole; ++j) most = x[j] > most ? x[j] : most;
    if (most > top[r] + T(kSlack)) {
      const T factor = power_of_2(top[r] - most);
      top[r] = most;
      for (int64_t j = 0; j < L; ++j) sum[j] *= factor;
      for (int64_t d = 0; d < E; ++d) out[d] *= factor;
    }
    const T shift = top[r];
    T part[L];
    std::memcpy(part, sum, sizeof(part));
    for (int64_t j = 0; j < whole; j += L) {
#pragma omp simd
      for (int64_t i = 0; i < L; ++i) {
        x[j + i] = power_of_2(x[j + i] - shift);
        part[i] += x[j + i];
      }
    }
    std::memcpy(sum, part, sizeof(part));
  }
}

// out = x / sum, [rows, D] with lines of `stride`
template <class T>
SEGKERN_CLONES void divide(const T* x /*[rows, E]*/, const T* sum /*[rows, lanes]*/, int64_t rows,
                           int64_t D, int64_t E, T* out, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r, x += E, sum += kLanes<T>, out += stride) {
    T total = T(0);
    for (int64_t j = 0; j < kLanes<T>; ++j) total += sum[j];
    const T factor = T(1) / total;
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) out[d] = x[d] * factor;
  }
}

template <class T>
Tensor forward(const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  constexpr int64_t L = kLanes<T>;
  const int64_t B = q.size(0), Q = q.size(1), H = q.size(2), D = q.size(3), S = k.size(1);
  const int64_t E = (D + L - 1) / L * L, whole = (S + kKeys - 1) / kKeys * kKeys;
  const Tensor out = empty<T>(q, {B, Q, H * D});
  if (out.numel() == 0) return out;
  const Heads<T> queries(q), keys(k), values(v);
  const T factor = static_cast<T>(scale * 1.4426950408889634);  // powers of 2, not of e
  T* to = mutable_data<T>(out);
  const Tiles<T>& tile = tiles<T>();

  // some tasks more than threads; each copies the head's keys and values, for many queries
  const int64_t threads = torch::stable::get_num_threads(), wanted = threads > 1 ? 4 * threads : 1;
  const int64_t most = (Q + kRows - 1) / kRows;
  const int64_t parts = std::clamp<int64_t>(wanted / (B * H), 1, most);
  const int64_t queries_a_part = (Q + parts - 1) / parts;
  struct Memory {
    Scratch<T> k, v, q, x, out, top, sum;
  };
  const auto make = [&] {
    return Memory{Scratch<T>(whole * D),      Scratch<T>(whole * E),  Scratch<T>(kChunk * D),
                  Scratch<T>(kChunk * kKeys), Scratch<T>(kChunk * E), Scratch<T>(kChunk),
                  Scratch<T>(kChunk * L)};
  };
  run_tasks(B * H * parts, make, [&](int64_t task, const Memory& memory) {
    const int64_t part = task % parts, h = task / parts % H, b = task / parts / H;
    const int64_t begin = part * queries_a_part, end = std::min(Q, begin + queries_a_part);
    T *panels = memory.k.get(), *lines = memory.v.get(), *x = memory.x.get();
    pack<T>({keys.at(b, 0, h), 1, keys.row}, D, S, panels);
    copy_lines<T, T>(values.at(b, 0, h), values.row, S, D, T(1), whole, E, lines);
    for (int64_t first = begin; first < end; first += kChunk) {
      const int64_t rows = std::min(kChunk, end - first);
      T *head = memory.q.get(), *total = memory.out.get(), *sum = memory.sum.get();
      copy_lines<T, T>(queries.at(b, first, h), queries.row, rows, D, factor, rows, D, head);
      std::fill_n(memory.top.get(), rows, std::numeric_limits<T>::lowest());
      std::fill_n(sum, rows * L, T(0));
      std::fill_n(total, rows * E, T(0));
      for (int64_t s = 0; s < S; s += kKeys) {
        const int64_t n = std::min(kKeys, S - s), lanes = (n + L - 1) / L;
        tile.product(head, D, 1, rows, panels + s * D, L, D * L, D, lanes, x, kKeys, false);
        softmax(x, rows, n, memory.top.get(), sum, total, E);
        tile.product(x, kKeys, 1, rows, lines + s * E, E, L, n, E / L, total, E, true);
      }
      divide(total, sum, rows, D, E, to + ((b * Q + first) * H + h) * D, H * D);
    }
  });
  return out;
}

Tensor attention(Tensor q, Tensor k, Tensor v, double scale) {
  const auto type = q.scalar_type();
  const auto fits = [&](const Tensor& t) {
    return t.dim() == 4 && t.scalar_type() == type && t.size(0) == q.size(0) &&
           t.size(2) == q.size(2) && t.size(3) == q.size(3) && t.size(1) == k.size(1);
  };
  STD_TORCH_CHECK(q.dim() == 4 && fits(k) && fits(v) && k.size(1) > 0 &&
                      (type == ScalarType::Float || type == ScalarType::Double),
                  "attention: [B, Q, H, D] and [B, S, H, D] of float32 or float64 expected");
  return type == ScalarType::Double ? forward<double>(q, k, v, scale)
                                    : forward<float>(q, k, v, scale);
}

}  // namespace
}  // namespace segkern

STABLE_TORCH_LIBRARY_IMPL(segkern, CPU, m) { m.impl("attention", TORCH_BOX(&segkern::attention)); }
