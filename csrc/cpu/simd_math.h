// exp, log and what the losses make of them, the normal distribution, and half precision, written
// so that gcc vectorises the loop around them (libm's calls stop it). exp and log in float: about
// 1 ulp over the whole range; double: libm. NaN comes out as NaN.
#pragma once

#include <cmath>
#include <cstring>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../common.h"

namespace segkern {

SEGKERN_INLINE float bits_to_float(int32_t i) {
  float f;
  std::memcpy(&f, &i, 4);
  return f;
}
SEGKERN_INLINE int32_t float_to_bits(float f) {
  int32_t i;
  std::memcpy(&i, &f, 4);
  return i;
}

SEGKERN_INLINE double simd_exp(double x) { return std::exp(x); }
SEGKERN_INLINE double simd_log(double x) { return std::log(x); }
SEGKERN_INLINE double simd_log1p(double x) { return std::log1p(x); }

// 2^f, |f| <= 1/2
SEGKERN_INLINE float power_of_rest(float f) {
  float p = 1.535336341e-4f;
  p = p * f + 1.339887502e-3f;
  p = p * f + 9.618436918e-3f;
  p = p * f + 5.550332367e-2f;
  p = p * f + 2.402264774e-1f;
  p = p * f + 6.931471825e-1f;
  return p * f + 1.0f;
}

// exp(r) of c = n ln2 + r, |r| <= ln2/2; `shifted` is n + 12582912
SEGKERN_INLINE float exp_rest(float c, float shifted) {
  const float n = shifted - 12582912.0f;
  float r = c - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * r * r + r + 1.0f;
}

// exp(x) = 2^n exp(r); 0 below -87.3, inf above 88.7
SEGKERN_INLINE float simd_exp(float x) {
  float c = x < -87.33654f ? -87.33654f : x;
  c = c > 88.72284f ? 88.72284f : c;
  const float shifted =
      c * 1.44269504f + 12582912.0f;  // the addition rounds to the nearest integer
  const float p = exp_rest(c, shifted);
  // 2^n in two halves, so that n = 128 does not overflow the exponent field before the product is
  // formed
  const int32_t e = float_to_bits(shifted) - 0x4B400000;
  const int32_t half = e >> 1;
  const float y = p * bits_to_float((half + 127) << 23) * bits_to_float((e - half + 127) << 23);
  const float low = x < -87.33654f ? 0.0f : y;
  return x > 88.72284f ? std::numeric_limits<float>::infinity() : low;
}

// simd_exp for x <= 88 without its range tests: what is below -87 comes out as 1e-38
SEGKERN_INLINE double simd_exp_low(double x) { return std::exp(x); }
SEGKERN_INLINE float simd_exp_low(float x) {
  const float c = x < -87.0f ? -87.0f : x;
  const float shifted = c * 1.44269504f + 12582912.0f;  // rounds to the nearest integer n
  const float p = exp_rest(c, shifted);
  return p * bits_to_float((float_to_bits(shifted) - 0x4B400000 + 127) << 23);
}

// A weight of a softmax, exp(x), x <= 0; in float 0 where it is next to nothing:
// such weights make slow subnormals
SEGKERN_INLINE double weight_of(double x) { return std::exp(x); }
SEGKERN_INLINE float weight_of(float x) { return x < -64.0f ? 0.0f : simd_exp_low(x); }

// log(x) for normal positive x: x = 2^e m, m in [sqrt(1/2), sqrt(2))
SEGKERN_INLINE float simd_log(float x) {
  const int32_t bits = float_to_bits(x);
  const int32_t e = (bits - 0x3F3504F3) >> 23;
  const float m = bits_to_float(bits - (e << 23)) - 1.0f;
  const float z = m * m;
  float p = 7.0376836292e-2f;
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const float n = static_cast<float>(e);
  float y = p * m * z - 2.12194440e-4f * n - 0.5f * z;
  y = m + y + 0.693359375f * n;
  return x == x ? y : x;
}

// log(1 + y) for y in [0, 1]: the rounding of 1 + y is put back in first order
SEGKERN_INLINE float simd_log1p(float y) {
  const float u = 1.0f + y;
  return simd_log(u) + (y - (u - 1.0f)) / u;
}

template <class T>
SEGKERN_INLINE T simd_sigmoid(T x) {
  const T e = simd_exp(x < T(0) ? x : -x);  // exp(-|x|): never overflows
  const T s = T(1) / (T(1) + e);
  return x < T(0) ? e * s : s;
}

// log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|))
template <class T>
SEGKERN_INLINE T simd_softplus(T x) {
  const T e = simd_exp(x < T(0) ? x : -x);
  return (x > T(0) ? x : T(0)) + simd_log1p(e);
}

// Phi(-t) = 2^r(t) / 2, Phi the normal distribution's, t >= 0; r is a polynomial without constant
// term, fitted on [0, 7]. Relative errors: 2e-7 up to t = 1, 1e-5 at 5, 3e-4 at 7; 0 from 12 on.
// Nothing branches, so that gcc vectorises the loop around it.
SEGKERN_INLINE float normal_tail(float t) {
  const float u = t * t;  // even and odd powers apart: half as long a chain
  float even = 6.709793752e-7f, odd = -2.103155872e-8f;
  even = even * u + 6.631584256e-5f, odd = odd * u - 9.087637409e-6f;
  even = even * u - 5.993325249e-5f, odd = odd * u - 2.476584923e-4f;
  even = even * u - 5.247807875e-2f, odd = odd * u + 7.011417300e-3f;
  even = even * u - 1.151104927e+0f, odd = odd * u - 4.592114389e-1f;
  float r = (odd * t + even) * t;
  r = r > -126.0f ? r : -126.0f;                // there the result is 0; also if r is inf - inf
  const float shifted = r + 12582911.0f;        // rounds; its last bits are the integer n - 1
  const float f = r - (shifted - 12582911.0f);  // r = n + f
  return bits_to_float(float_to_bits(power_of_rest(f)) +
                       (float_to_bits(shifted) << 23));  // 2^(n - 1 + f)
}
SEGKERN_INLINE double normal_tail(double t) { return 0.5 * std::erfc(t * 0.70710678118654752); }

// Phi(x), with the errors of the tail
template <class T>
SEGKERN_INLINE T normal_below(T x) {
  const T tail = normal_tail(std::fabs(x));
  return x < T(0) ? tail : T(1) - tail;
}

// A value of a type of storage in that of sums; and back, to nearest, ties to even. BFloat16's and
// Half's own conversions branch, so that gcc does not vectorise every loop around them.
template <class T, class S>
SEGKERN_INLINE T widened(S x) {
  return static_cast<T>(x);
}
template <>
SEGKERN_INLINE float widened<float, c10::Half>(c10::Half x) {
  const uint32_t bits = static_cast<uint32_t>(x.x) << 16, twice = bits + bits;
  const float normal = bits_to_float(static_cast<int32_t>((twice >> 4) + 0x70000000u)) * 0x1p-112f;
  const float small = bits_to_float(static_cast<int32_t>(twice >> 17 | 0x3F000000u)) - 0.5f;
  const int32_t pick = -static_cast<int32_t>(twice < 0x08000000u);  // no branch: all bits or none
  const int32_t size = (float_to_bits(small) & pick) | (float_to_bits(normal) & ~pick);
  return bits_to_float(static_cast<int32_t>(bits & 0x80000000u) | size);
}

// x in a type of storage, to nearest, ties to even. The conversions of BFloat16 and Half branch,
// so that gcc does not vectorise a loop around them.
template <class S, class T>
SEGKERN_INLINE S rounded(T x) {
  return static_cast<S>(x);
}
template <>
SEGKERN_INLINE c10::BFloat16 rounded<c10::BFloat16, float>(float x) {
  const uint32_t bits = static_cast<uint32_t>(float_to_bits(x));
  const uint32_t upper = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  return {static_cast<uint16_t>(x == x ? upper : 0x7FC0), c10::BFloat16::from_bits()};
}
template <>
SEGKERN_INLINE c10::Half rounded<c10::Half, float>(float x) {
  const uint32_t bits = static_cast<uint32_t>(float_to_bits(x)), twice = bits + bits;
  // beyond the largest half this is infinite
  const float size = std::fabs(x) * 0x1p+112f * 0x1p-110f;
  // an addend whose last bit is the last that the half has: the sum rounds there
  uint32_t exponent = twice & 0xFF000000u;
  exponent = exponent < 0x71000000u ? 0x71000000u : exponent;
  const float sum = bits_to_float(static_cast<int32_t>((exponent >> 1) + 0x07800000u)) + size;
  const uint32_t found = static_cast<uint32_t>(float_to_bits(sum));
  const uint32_t half = (found >> 13 & 0x7C00) + (found & 0x0FFF);
  const uint32_t sign = bits >> 16 & 0x8000;
  return {static_cast<uint16_t>(sign | (x == x ? half : 0x7E00)), c10::Half::from_bits()};
}

}  // namespace segkern
