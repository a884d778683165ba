// point_sample on the CPU: bilinear samples of C feature maps at P points, and the scatter of its
// gradient. Letters: B image, C channel, P point.
#include "bilinear.h"

namespace segkern {
namespace {

template <class S, class T>
Tensor forward(const Tensor& features, const Tensor& points) {
  const Tensor f = torch::stable::contiguous(features), pts = dense<T>(points);
  const int64_t B = f.size(0), C = f.size(1), h = f.size(2), w = f.size(3), P = pts.size(1);
  Tensor out = empty<T>(pts, {B, C, P});
  const S* fp = static_cast<const S*>(f.const_data_ptr());
  T* op = mutable_data<T>(out);
  for (int64_t b = 0; b < B; ++b) {
    const Corners<T> corners(P);
    find_corners(data<T>(pts) + b * P * 2, h, w, corners);
    parallel_for(0, C, 1 + 16384 / (P + 1), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c)
        gather(fp + (b * C + c) * h * w, corners.offset.get(), corners.weight.get(), P,
               op + (b * C + c) * P);
    });
  }
  return out;
}

template <class T>
Tensor backward(const Tensor& grad, const Tensor& points, int64_t h, int64_t w) {
  const Tensor g = dense<T>(grad), pts = dense<T>(points);
  const int64_t B = g.size(0), C = g.size(1), P = g.size(2);
  Tensor out = zeros<T>(g, {B, C, h, w});
  for (int64_t b = 0; b < B; ++b) {
    const Corners<T> corners(P);
    find_corners(data<T>(pts) + b * P * 2, h, w, corners);
    parallel_for(0, C, 1 + 16384 / (P + 1), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c)
        scatter(data<T>(g) + (b * C + c) * P, corners, mutable_data<T>(out) + (b * C + c) * h * w);
    });
  }
  return out;
}

Tensor point_sample(Tensor features, Tensor points) {
  STD_TORCH_CHECK(features.size(2) * features.size(3) <= INT32_MAX, "point_sample: map too large");
  switch (features.scalar_type()) {
    case ScalarType::Double:
      return forward<double, double>(features, points);
    case ScalarType::Float:
      return forward<float, float>(features, points);
    case ScalarType::Bool:
    case ScalarType::Byte:
      return forward<uint8_t, float>(features, points);
    default:  // half, bfloat16
      return cast_to(forward<float, float>(dense<float>(features), points),
                     features.scalar_type());
  }
}

// always deterministic: one thread adds up a map, in the points' order
Tensor point_sample_backward(Tensor grad, Tensor points, int64_t h, int64_t w,
                             bool /*deterministic*/) {
  Tensor out;
  dispatch_accumulate(grad, "point_sample_backward", [&](auto zero) {
    out = cast_to(backward<decltype(zero)>(grad, points, h, w), grad.scalar_type());
  });
  return out;
}

}  // namespace
}  // namespace segkern

STABLE_TORCH_LIBRARY_IMPL(segkern, CPU, m) {
  m.impl("point_sample", TORCH_BOX(&segkern::point_sample));
  m.impl("point_sample_backward", TORCH_BOX(&segkern::point_sample_backward));
}
