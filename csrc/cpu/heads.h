// What kernels of attention read: tensors [B, S, H, D] of heads, and their rows copied to lines.
// Letters: B image, S row, H head, D channel a head; E is D rounded up to whole lines.
#pragma once

#include "../common.h"

namespace segkern {

// A [B, S, H, D] tensor whose channels are adjacent; the other strides are free.
template <class S>
struct Heads {
  explicit Heads(const Tensor& t)
      : tensor(t.size(3) == 1 || t.stride(3) == 1 ? t : torch::stable::contiguous(t)),
        base(static_cast<const S*>(tensor.const_data_ptr())),
        image(tensor.stride(0)),
        row(tensor.stride(1)),
        head(tensor.stride(2)) {}
  const S* at(int64_t b, int64_t s, int64_t h) const {
    return base + b * image + s * row + h * head;
  }
  Tensor tensor;
  const S* base;
  int64_t image, row, head;
};

// out[r, d] = scale x[r, d], with zeros up to [lines, E]
template <class S, class T>
SEGKERN_CLONES void copy_lines(const S* x, int64_t stride, int64_t rows, int64_t D, T scale,
                               int64_t lines, int64_t E, T* out /*[lines, E]*/) {
  for (int64_t r = 0; r < lines; ++r) {
    const int64_t n = r < rows ? D : 0;
#pragma omp simd
    for (int64_t d = 0; d < n; ++d) out[r * E + d] = scale * static_cast<T>(x[r * stride + d]);
    for (int64_t d = n; d < E; ++d) out[r * E + d] = T(0);
  }
}

}  // namespace segkern
