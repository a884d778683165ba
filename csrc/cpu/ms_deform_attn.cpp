// ms_deform_attn on the CPU, forward and backward. Queries come in tiles: softmax, places and
// bilinear weights of a tile's samples in vector loops, then, one head after the other, 4 rows of
// D channels a sample, read from a copy of value in which a head's pixels lie together. In the
// backward a thread owns heads, so it needs no atomics.
// Letters: B image, Q query, S pixels of all levels, H head, D channels a head, L level, P point;
// M = L * P samples of a query and head; a tile is R queries and G heads, n = R * G * M samples.
#include <algorithm>

#include "pages.h"
#include "simd_math.h"

namespace segkern {
namespace {

constexpr int64_t kTile = 1536;  // samples of a tile: about 100 KB, second-level cache
constexpr int64_t kLanes = 16;   // floats in a Row; the compiler splits it for narrower registers
typedef float Row __attribute__((vector_size(64), aligned(4), may_alias));
typedef float Half __attribute__((vector_size(32)));
typedef float Quarter __attribute__((vector_size(16), aligned(4), may_alias));

// The arguments of one call, dense, in the type that computes.
template <class T>
struct Call {
  Call(const Tensor& value, const IntList& shapes, const Tensor& reference, const Tensor& offsets,
       const Tensor& logits, bool normalized)
      : value(dense<T>(value)),
        reference(dense<T>(reference)),
        offsets(dense<T>(offsets)),
        logits(dense<T>(logits)),
        shapes(shapes),
        normalized(normalized) {
    STD_TORCH_CHECK(S <= INT32_MAX, "ms_deform_attn: more than 2^31 pixels");
  }
  const Tensor value, reference, offsets, logits;
  const IntList& shapes;
  const bool normalized;
  const int64_t B = value.size(0), S = value.size(1), H = value.size(2), D = value.size(3);
  const int64_t Q = offsets.size(1), L = offsets.size(3), P = offsets.size(4), M = L * P;
  const bool one_image = reference.size(0) == 1, one_level = reference.size(2) == 1;
  const bool any = B * Q * H * D * M > 0;
  // a copy in which the rows of a head share cache lines and pages pays from many reads a pixel
  const bool copies = any && Q * M * 4 > 20 * S;
  const int64_t stride = copies ? D : H * D, head_stride = copies ? S * D : D;
};

// The samples of R queries and G heads.
template <class T>
struct Tile {
  Tile(const Call<T>& c, int64_t G)
      : G(G), R(std::max<int64_t>(1, kTile / (G * c.M))), n(R * G * c.M), per_query(G * c.M) {
    for (int64_t i = 0; i < per_query;) {
      int64_t first = 0;
      for (int64_t l = 0; l < c.L; ++l) {
        for (int64_t p = 0; p < c.P; ++p, ++i) {
          h[i] = static_cast<int32_t>(c.shapes[2 * l]);
          w[i] = static_cast<int32_t>(c.shapes[2 * l + 1]);
          start[i] = static_cast<int32_t>(first);
        }
        first += c.shapes[2 * l] * c.shapes[2 * l + 1];
      }
    }
  }
  const int64_t G, R, n, per_query;
  Scratch<int32_t> w{per_query}, h{per_query}, start{per_query};  // level of a query's samples
  Scratch<T> cx{per_query}, cy{per_query};  // reference in pixels of the level, minus a half
  Scratch<int32_t> pixel{n};                // upper left pixel; -1 where all four lie outside
  Scratch<int32_t> right{n}, down{n};       // pixels from there to the others; 0 at an edge
  Scratch<T> offsets{2 * n};                // [n, 2]; in the backward their gradient too
  Scratch<T> e{n};                          // logits, then attention weights up to `scale`
  Scratch<T> left_w{n}, right_w{n}, top_w{n}, bottom_w{n};  // bilinear factors; 0 outside
  Scratch<T> corner{4 * n};   // [4, n] e times the corners' bilinear weights
  Scratch<T> dots{4 * n};     // [n, 4] gradient of the output . corner's row
  Scratch<T> grad_weight{n};  // gradient of the attention weights, then of the logits
  Scratch<T> scale{R * G};    // [R, G]
};

// e = exp(logits - max), scale = 1 / sum
template <class T>
SEGKERN_CLONES void softmax(int64_t rows, int64_t M, T* e /*[rows, M]*/, T* scale /*[rows]*/) {
  for (int64_t r = 0; r < rows; ++r) {
    T* row = e + r * M;
    T top = row[0];
    for (int64_t j = 1; j < M; ++j) top = row[j] > top ? row[j] : top;
    for (int64_t j = 0; j < M; ++j) row[j] -= top;
  }
#pragma omp simd
  for (int64_t i = 0; i < rows * M; ++i) e[i] = simd_exp(e[i]);
  for (int64_t r = 0; r < rows; ++r) {
    T sum = T(0);
    for (int64_t j = 0; j < M; ++j) sum += e[r * M + j];
    scale[r] = T(1) / sum;
  }
}

template <class T>
SEGKERN_CLONES void locate(const Tile<T>& t, int64_t r /*query of the tile*/,
                           int64_t n /*G * M*/) {
  const int32_t *w = t.w.get(), *h = t.h.get(), *start = t.start.get();
  const T *cx = t.cx.get(), *cy = t.cy.get(), *offsets = t.offsets.get() + 2 * r * n;
  int32_t *pixel = t.pixel.get() + r * n, *right = t.right.get() + r * n;
  int32_t* down = t.down.get() + r * n;
  T *left_w = t.left_w.get() + r * n, *right_w = t.right_w.get() + r * n;
  T *top_w = t.top_w.get() + r * n, *bottom_w = t.bottom_w.get() + r * n;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T x = cx[i] + offsets[2 * i], y = cy[i] + offsets[2 * i + 1];
    const T width = static_cast<T>(w[i]), height = static_cast<T>(h[i]);
    const bool near = (x > T(-1)) & (x < width) & (y > T(-1)) & (y < height);  // not for NaN
    const T xl = x > T(-1) ? x : T(-1), yl = y > T(-1) ? y : T(-1);
    const T xs = xl < width ? xl : width, ys = yl < height ? yl : height;
    // rounded down through int: gcc does not vectorise std::floor in cloned functions
    const int32_t xi = static_cast<int32_t>(xs), yi = static_cast<int32_t>(ys);
    const int32_t x0 = xi - static_cast<int32_t>(static_cast<T>(xi) > xs);
    const int32_t y0 = yi - static_cast<int32_t>(static_cast<T>(yi) > ys);
    const T fx = xs - static_cast<T>(x0), fy = ys - static_cast<T>(y0);
    // a corner outside gets weight 0 and the pixel of its neighbour inside
    const int32_t px = x0 > 0 ? x0 : 0, py = y0 > 0 ? y0 : 0;
    const int32_t x1 = x0 + 1 < w[i] ? x0 + 1 : px, y1 = y0 + 1 < h[i] ? y0 + 1 : py;
    pixel[i] = near ? start[i] + py * w[i] + px : -1;
    right[i] = x1 - px;
    down[i] = (y1 - py) * w[i];
    left_w[i] = x0 >= 0 ? T(1) - fx : T(0);
    right_w[i] = x0 + 1 < w[i] ? fx : T(0);
    top_w[i] = y0 >= 0 ? T(1) - fy : T(0);
    bottom_w[i] = y0 + 1 < h[i] ? fy : T(0);
  }
}

template <class T>
SEGKERN_CLONES void weigh_corners(const Tile<T>& t, int64_t n) {
  const T *e = t.e.get(), *left_w = t.left_w.get(), *right_w = t.right_w.get();
  const T *top_w = t.top_w.get(), *bottom_w = t.bottom_w.get();
  T *c00 = t.corner.get(), *c01 = c00 + t.n, *c10 = c01 + t.n, *c11 = c10 + t.n;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T top = e[i] * top_w[i], bottom = e[i] * bottom_w[i];
    c00[i] = top * left_w[i];
    c01[i] = top * right_w[i];
    c10[i] = bottom * left_w[i];
    c11[i] = bottom * right_w[i];
  }
}

// out[r] = scale * sum of the weighted corner rows of the M samples of query r and head g. kD = D
// where it is known while compiling (float only): the sums stay in registers; 0 for any other.
template <class T, int kD>
SEGKERN_CLONES void gather(const T* value, int64_t stride /*of a pixel*/, const Tile<T>& t,
                           int64_t g, int64_t rows, int64_t M, int64_t D, T* out /*[rows, ., D]*/,
                           int64_t out_stride) {
  const int32_t *pixel = t.pixel.get(), *right = t.right.get(), *down = t.down.get();
  const T *c00 = t.corner.get(), *c01 = c00 + t.n, *c10 = c01 + t.n, *c11 = c10 + t.n;
  for (int64_t r = 0; r < rows; ++r, out += out_stride) {
    constexpr int N = kD ? kD / kLanes : 1;
    Row upper[N] = {}, lower[N] = {};  // two sums, half the latency
    if constexpr (kD == 0) std::fill(out, out + D, T(0));
    const int64_t first = (r * t.G + g) * M;
    for (int64_t i = first; i < first + M; ++i) {
      if (pixel[i] < 0) continue;
      const T* v00 = value + pixel[i] * stride;
      const T *v01 = v00 + right[i] * stride, *v10 = v00 + down[i] * stride;
      const T* v11 = v10 + right[i] * stride;
      if constexpr (kD == 0) {
#pragma omp simd
        for (int64_t d = 0; d < D; ++d)
          out[d] += (c00[i] * v00[d] + c01[i] * v01[d]) + (c10[i] * v10[d] + c11[i] * v11[d]);
      } else {
        for (int k = 0; k < N; ++k) {
          upper[k] += c00[i] * reinterpret_cast<const Row*>(v00)[k];
          lower[k] += c10[i] * reinterpret_cast<const Row*>(v10)[k];
          upper[k] += c01[i] * reinterpret_cast<const Row*>(v01)[k];
          lower[k] += c11[i] * reinterpret_cast<const Row*>(v11)[k];
        }
      }
    }
    const T scale = t.scale[r * t.G + g];
    if constexpr (kD == 0) {
      for (int64_t d = 0; d < D; ++d) out[d] *= scale;
    } else {
      for (int k = 0; k < N; ++k) reinterpret_cast<Row*>(out)[k] = (upper[k] + lower[k]) * scale;
    }
  }
}

SEGKERN_INLINE void fold(const Row& x, Half& out) {
  out = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
        __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
}

// out[k] = sum of the lanes of x[k]
SEGKERN_INLINE void sum_lanes(const Row* x /*[4]*/, float* out /*[4]*/) {
  Half a, b, c, d;
  fold(x[0], a), fold(x[1], b), fold(x[2], c), fold(x[3], d);
  const Half ab = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11) +
                  __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
  const Half cd = __builtin_shufflevector(c, d, 0, 1, 2, 3, 8, 9, 10, 11) +
                  __builtin_shufflevector(c, d, 4, 5, 6, 7, 12, 13, 14, 15);
  const Half two = __builtin_shufflevector(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) +
                   __builtin_shufflevector(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);  // a a c c b b d d
  const Half one = two + __builtin_shufflevector(two, two, 1, 0, 3, 2, 5, 4, 7, 6);
  *reinterpret_cast<Quarter*>(out) = __builtin_shufflevector(one, one, 0, 4, 2, 6);
}

// dots[i] = grad[r] . the corner rows of value; grad_value's corner rows += corner * grad[r]
template <class T, int kD>
SEGKERN_CLONES void scatter(const T* value, T* grad_value, int64_t stride /*of a pixel*/,
                            const Tile<T>& t, int64_t head, int64_t rows, int64_t M, int64_t D,
                            const T* grad /*[rows, ., D]*/, int64_t grad_stride) {
  const int32_t *pixel = t.pixel.get(), *right = t.right.get(), *down = t.down.get();
  const T* corner = t.corner.get();
  T* all_dots = t.dots.get();
  const int64_t n = t.n;
  // the rows of one head lie too far apart for the hardware to fetch ahead
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t d = 0; d < D; d += kLanes) __builtin_prefetch(grad + r * grad_stride + d);
  for (int64_t r = 0; r < rows; ++r, grad += grad_stride) {
    constexpr int N = kD ? kD / kLanes : 1;
    Row g[N];
    if constexpr (kD != 0)
      for (int k = 0; k < N; ++k) g[k] = reinterpret_cast<const Row*>(grad)[k];
    const int64_t first = (r * t.G + head) * M;
    for (int64_t i = first; i < first + M; ++i) {
      T* dots = all_dots + 4 * i;
      if (pixel[i] < 0) {
        for (int c = 0; c < 4; ++c) dots[c] = T(0);
        continue;
      }
      const int64_t base = pixel[i] * stride, dx = right[i] * stride, dy = down[i] * stride;
      const int64_t at[4] = {base, base + dx, base + dy, base + dx + dy};
      Row wide[4];
      for (int c = 0; c < 4; ++c) {
        const T* v = value + at[c];
        T* gv = grad_value + at[c];
        const T a = corner[c * n + i];
        if constexpr (kD == 0) {
          T sum = T(0);
#pragma omp simd reduction(+ : sum)
          for (int64_t d = 0; d < D; ++d) {
            sum += grad[d] * v[d];
            gv[d] += a * grad[d];
          }
          dots[c] = sum;
        } else {
          wide[c] = g[0] * reinterpret_cast<const Row*>(v)[0];
          for (int k = 1; k < N; ++k) wide[c] += g[k] * reinterpret_cast<const Row*>(v)[k];
          for (int k = 0; k < N; ++k) reinterpret_cast<Row*>(gv)[k] += a * g[k];
        }
      }
      if constexpr (kD != 0) sum_lanes(wide, dots);
    }
  }
}

// From dots to the gradients of the places (over `offsets`) and of the attention weights.
template <class T>
SEGKERN_CLONES void sample_gradients(const Tile<T>& t, int64_t n) {
  const T *e = t.e.get(), *left_w = t.left_w.get(), *right_w = t.right_w.get();
  const T *top_w = t.top_w.get(), *bottom_w = t.bottom_w.get(), *dots = t.dots.get();
  const int32_t *right = t.right.get(), *down = t.down.get();
  T *offsets = t.offsets.get(), *weight = t.grad_weight.get();
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T d00 = dots[4 * i], d01 = dots[4 * i + 1], d10 = dots[4 * i + 2], d11 = dots[4 * i + 3];
    const T top = left_w[i] * d00 + right_w[i] * d01, bottom = left_w[i] * d10 + right_w[i] * d11;
    const T left = top_w[i] * d00 + bottom_w[i] * d10, rest = top_w[i] * d01 + bottom_w[i] * d11;
    weight[i] = top_w[i] * top + bottom_w[i] * bottom;
    // slope 1 of a factor where its corner is inside, 0 where it is not
    const T l = left_w[i] > T(0) ? left : T(0), u = top_w[i] > T(0) ? top : T(0);
    const T r = (right[i] != 0) | (left_w[i] == T(0)) ? rest : T(0);
    const T b = (down[i] != 0) | (top_w[i] == T(0)) ? bottom : T(0);
    offsets[2 * i] = e[i] * (r - l);
    offsets[2 * i + 1] = e[i] * (b - u);
  }
}

// grad of the weights to grad of the logits: e * (grad - sum of e * grad)
template <class T>
SEGKERN_CLONES void softmax_gradient(int64_t rows, int64_t M, const T* e /*[rows, M]*/,
                                     T* grad /*[rows, M]*/) {
  for (int64_t r = 0; r < rows; ++r, e += M, grad += M) {
    T mean = T(0);
    for (int64_t j = 0; j < M; ++j) mean += e[j] * grad[j];
    for (int64_t j = 0; j < M; ++j) grad[j] = e[j] * (grad[j] - mean);
  }
}

// Softmax, places and bilinear weights of queries [q, q + rows), heads [h, h + G) of image b.
template <class T>
void prepare(const Call<T>& c, const Tile<T>& t, int64_t b, int64_t h, int64_t q, int64_t rows) {
  const int64_t n = t.per_query, levels = c.one_level ? 1 : c.L;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t from = ((b * c.Q + q + r) * c.H + h) * c.M, to = r * n;
    std::memcpy(t.offsets.get() + 2 * to, data<T>(c.offsets) + 2 * from, 2 * n * sizeof(T));
    std::memcpy(t.e.get() + to, data<T>(c.logits) + from, n * sizeof(T));
    const T* ref = data<T>(c.reference) + ((c.one_image ? 0 : b) * c.Q + q + r) * levels * 2;
    for (int64_t l = 0, j = 0; l < c.L; ++l) {
      const T* xy = ref + (c.one_level ? 0 : 2 * l);
      const T x = xy[0] * T(c.shapes[2 * l + 1]) - T(0.5), y = xy[1] * T(c.shapes[2 * l]) - T(0.5);
      for (int64_t p = 0; p < c.P; ++p, ++j) t.cx[j] = x, t.cy[j] = y;
    }
    for (int64_t g = 1; g < t.G; ++g) {
      std::memcpy(t.cx.get() + g * c.M, t.cx.get(), c.M * sizeof(T));
      std::memcpy(t.cy.get() + g * c.M, t.cy.get(), c.M * sizeof(T));
    }
    locate(t, r, n);
  }
  if (c.normalized)
    std::fill(t.scale.get(), t.scale.get() + rows * t.G, T(1));
  else
    softmax(rows * t.G, c.M, t.e.get(), t.scale.get());
}

// [S, H, D] to [H, S, D] or back; returns `to`
template <class T>
T* swap_heads(const Call<T>& c, const T* from, T* to, bool back) {
  parallel_for(0, c.S, 256, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin * c.H; k < end * c.H; ++k) {
      const int64_t by_pixel = k * c.D, by_head = (k % c.H * c.S + k / c.H) * c.D;
      std::memcpy(to + (back ? by_pixel : by_head), from + (back ? by_head : by_pixel),
                  c.D * sizeof(T));
    }
  });
  return to;
}

template <class T, int kD>
void forward(const Call<T>& c, T* out) {
  const Pages<T> by_head(c.copies ? c.S * c.H * c.D : 0);
  for (int64_t b = 0; b < c.B; ++b) {
    const T* value = data<T>(c.value) + b * c.S * c.H * c.D;
    if (c.copies) value = swap_heads(c, value, by_head.get(), false);
    parallel_for(0, c.Q, 1 + kTile / (c.H * c.M), [&](int64_t begin, int64_t end) {
      const Tile<T> t(c, c.H);
      for (int64_t q = begin; q < end; q += t.R) {
        const int64_t rows = std::min(t.R, end - q);
        prepare(c, t, b, 0, q, rows);
        weigh_corners(t, rows * c.H * c.M);
        for (int64_t h = 0; h < c.H; ++h)
          gather<T, kD>(value + h * c.head_stride, c.stride, t, h, rows, c.M, c.D,
                        out + ((b * c.Q + q) * c.H + h) * c.D, c.H * c.D);
      }
    });
  }
}

// Heads [h, h + G) of image b; value and grad_value begin at head 0.
template <class T, int kD>
void backward_heads(const Call<T>& c, int64_t b, int64_t h, int64_t G, const T* value,
                    T* grad_value, const T* grad, T* grad_offsets, T* grad_logits) {
  const Tile<T> t(c, G);
  for (int64_t q = 0; q < c.Q; q += t.R) {
    const int64_t rows = std::min(t.R, c.Q - q), row = (b * c.Q + q) * c.H + h;
    prepare(c, t, b, h, q, rows);
    for (int64_t k = 0; k < rows * G; ++k)
      for (int64_t j = 0; j < c.M; ++j) t.e[k * c.M + j] *= t.scale[k];
    weigh_corners(t, rows * t.per_query);
    for (int64_t g = 0; g < G; ++g)
      scatter<T, kD>(value + (h + g) * c.head_stride, grad_value + (h + g) * c.head_stride,
                     c.stride, t, g, rows, c.M, c.D, grad + (row + g) * c.D, c.H * c.D);
    sample_gradients(t, rows * t.per_query);
    if (!c.normalized) softmax_gradient(rows * G, c.M, t.e.get(), t.grad_weight.get());
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t to = (row + r * c.H) * c.M, from = r * t.per_query;
      std::memcpy(grad_logits + to, t.grad_weight.get() + from, t.per_query * sizeof(T));
      std::memcpy(grad_offsets + 2 * to, t.offsets.get() + 2 * from, 2 * t.per_query * sizeof(T));
    }
  }
}

template <class T, int kD>
void backward(const Call<T>& c, const T* grad, T* grad_value, T* grad_offsets, T* grad_logits) {
  const int64_t image = c.S * c.H * c.D;
  const Pages<T> by_head(c.copies ? image : 0), grad_by_head(c.copies ? image : 0);
  for (int64_t b = 0; b < c.B; ++b) {
    const T* value = data<T>(c.value) + b * image;
    T* out = grad_value + b * image;
    if (c.copies) value = swap_heads(c, value, by_head.get(), false);
    parallel_for(0, c.H, 1, [&](int64_t begin, int64_t end) {
      T* sum = c.copies ? grad_by_head.get() : out;
      if (c.copies) std::fill(sum + begin * c.head_stride, sum + end * c.head_stride, T(0));
      backward_heads<T, kD>(c, b, begin, end - begin, value, sum, grad, grad_offsets, grad_logits);
    });
    if (c.copies) swap_heads(c, grad_by_head.get(), out, true);
  }
}

// Calls f with D as a constant where a fast loop exists, else with 0.
template <class T, class F>
void dispatch_channels(int64_t D, const F& f) {
  if constexpr (std::is_same_v<T, float>) {
    if (D == 16) return f(std::integral_constant<int, 16>{});
    if (D == 32) return f(std::integral_constant<int, 32>{});
    if (D == 64) return f(std::integral_constant<int, 64>{});
  }
  f(std::integral_constant<int, 0>{});
}

Tensor ms_deform_attn(Tensor value, IntList shapes, Tensor reference, Tensor offsets,
                      Tensor logits, bool normalized) {
  Tensor result;
  dispatch_accumulate(value, "ms_deform_attn", [&](auto zero) {
    using T = decltype(zero);
    const Call<T> c(value, shapes, reference, offsets, logits, normalized);
    const IntList sizes{c.B, c.Q, c.H * c.D};
    const Tensor out = c.any ? empty<T>(c.value, sizes) : zeros<T>(c.value, sizes);
    if (c.any) {
      dispatch_channels<T>(c.D, [&](auto channels) {
        forward<T, decltype(channels)::value>(c, mutable_data<T>(out));
      });
    }
    result = cast_to(out, value.scalar_type());
  });
  return result;
}

// `deterministic` is for the GPU: here every sum has one order.
std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward(Tensor grad, Tensor value,
                                                           IntList shapes, Tensor reference,
                                                           Tensor offsets, Tensor logits,
                                                           bool normalized, bool) {
  Tensor grad_value, grad_offsets, grad_logits;
  dispatch_accumulate(value, "ms_deform_attn_backward", [&](auto zero) {
    using T = decltype(zero);
    const Call<T> c(value, shapes, reference, offsets, logits, normalized);
    const auto make = c.any ? empty<T> : zeros<T>;
    grad_offsets = make(c.value, {c.B, c.Q, c.H, c.L, c.P, 2});
    grad_logits = make(c.value, {c.B, c.Q, c.H, c.L, c.P});
    // in place it is added to, through the copy it is written
    grad_value = (c.copies ? empty<T> : zeros<T>)(c.value, {c.B, c.S, c.H, c.D});
    if (c.any) {
      const Tensor g = dense<T>(grad);
      dispatch_channels<T>(c.D, [&](auto channels) {
        backward<T, decltype(channels)::value>(c, data<T>(g), mutable_data<T>(grad_value),
                                               mutable_data<T>(grad_offsets),
                                               mutable_data<T>(grad_logits));
      });
    }
    grad_value = cast_to(grad_value, value.scalar_type());
    grad_logits = cast_to(grad_logits, logits.scalar_type());
  });
  return {grad_value, grad_offsets, grad_logits};
}

}  // namespace
}  // namespace segkern

STABLE_TORCH_LIBRARY_IMPL(segkern, CPU, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&segkern::ms_deform_attn));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&segkern::ms_deform_attn_backward));
}
