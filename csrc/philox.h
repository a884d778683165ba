// Philox4x32-10 (Salmon et al., SC 2011): the counter-based generator behind every random point. A
// point depends on its counter and the seed alone, never on tile, thread, rank or place in the
// batch. Same bits as random_points in Python.
#pragma once

#include <cstdint>

namespace segkern {

#if defined(__CUDACC__)
#define SEGKERN_DEVICE __host__ __device__ __forceinline__
#else
#define SEGKERN_DEVICE inline __attribute__((always_inline))
#endif

struct Product {
  uint32_t upper, lower;
};

SEGKERN_DEVICE Product multiply(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)  // nvcc makes more instructions of the halves of a 64-bit product
  return {__umulhi(a, b), a * b};
#else
  const uint64_t product = static_cast<uint64_t>(a) * b;
  return {static_cast<uint32_t>(product >> 32), static_cast<uint32_t>(product)};
#endif
}

struct Point {
  float x, y;  // in [0, 1), multiples of 2^-24
};

// counter = (point, target, prediction, sample id), key = the two halves of the seed
SEGKERN_DEVICE Point random_point(uint64_t seed, uint32_t point, uint32_t target,
                                  uint32_t prediction, uint32_t sample) {
  uint32_t c0 = point, c1 = target, c2 = prediction, c3 = sample;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const Product p0 = multiply(0xD2511F53u, c0), p1 = multiply(0xCD9E8D57u, c2);
    c0 = p1.upper ^ c1 ^ k0;
    c2 = p0.upper ^ c3 ^ k1;
    c1 = p1.lower;
    c3 = p0.lower;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {static_cast<float>(c0 >> 8) * 0x1p-24f, static_cast<float>(c1 >> 8) * 0x1p-24f};
}

}  // namespace segkern
