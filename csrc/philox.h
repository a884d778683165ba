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

struct Point {
  float x, y;  // in [0, 1), multiples of 2^-24
};

// counter = (point, target, prediction, sample id), key = the two halves of the seed
SEGKERN_DEVICE Point random_point(uint64_t seed, uint32_t point, uint32_t target,
                                  uint32_t prediction, uint32_t sample) {
  uint32_t c0 = point, c1 = target, c2 = prediction, c3 = sample;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {static_cast<float>(c0 >> 8) * 0x1p-24f, static_cast<float>(c1 >> 8) * 0x1p-24f};
}

}  // namespace segkern
