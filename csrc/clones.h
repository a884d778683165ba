// How hot loops are compiled for several CPUs. Knows neither tensors nor arrays.
#pragma once

// A hot loop is a free function over a range, marked SEGKERN_CLONES: gcc compiles it for AVX-512,
// AVX2 and the baseline and picks at load time. Lambdas are not cloned, so what parallel_for calls
// must only call such functions. What a cloned function calls must be SEGKERN_INLINE, or it stays
// baseline code; so does all of it with clang, which clones no templates, and on other CPUs. A
// library built with SEGKERN_AVX2 has no clone above AVX2: for tests.
#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__) && !defined(SEGKERN_SANITIZE)
#define SEGKERN_X86_CLONES
#ifdef SEGKERN_AVX2
#define SEGKERN_CLONES __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define SEGKERN_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#endif
#else
#define SEGKERN_CLONES
#endif
#define SEGKERN_INLINE inline __attribute__((always_inline))
