// CUDA's names for what emulate.h does: built-in variables, barriers, warp operations, atomics and
// intrinsic functions. Included by emulate.h alone.
#pragma once

#define threadIdx (::segkern::emulate::current->thread)
#define blockIdx (::segkern::emulate::block.index)
#define blockDim (::segkern::emulate::block.size)
#define gridDim (::segkern::emulate::block.grid)
#define __syncthreads() ::segkern::emulate::block_barrier(__LINE__)
#define SEGKERN_WARP(op, mask, value) \
  ::segkern::emulate::warp(::segkern::emulate::Op::op, mask, value, 0, __LINE__)
#define __syncwarp(...) SEGKERN_WARP(sync, (0xFFFFFFFFu __VA_OPT__(&(__VA_ARGS__))), 0)
#define __ballot_sync(mask, value) static_cast<unsigned>(SEGKERN_WARP(ballot, mask, (value) != 0))
#define __any_sync(mask, value) static_cast<int>(__ballot_sync(mask, value) != 0)
#define __all_sync(mask, value) static_cast<int>(__ballot_sync(mask, !(value)) == 0)
#define __match_any_sync(mask, value) \
  static_cast<unsigned>(SEGKERN_WARP(match, mask, ::segkern::emulate::to_bits(value)))
// of 32-bit unsigned values
#define __reduce_min_sync(mask, value) static_cast<unsigned>(SEGKERN_WARP(min, mask, value))
#define __reduce_max_sync(mask, value) static_cast<unsigned>(SEGKERN_WARP(max, mask, value))
#define __reduce_add_sync(mask, value) static_cast<unsigned>(SEGKERN_WARP(add, mask, value))
#define __shfl_sync(mask, value, source, ...) \
  ::segkern::emulate::shuffle_index(mask, value, source, __LINE__ __VA_OPT__(, ) __VA_ARGS__)
#define __shfl_down_sync(mask, value, step, ...)                      \
  ::segkern::emulate::shuffle_by(mask, value, static_cast<int>(step), \
                                 __LINE__ __VA_OPT__(, ) __VA_ARGS__)
#define __shfl_up_sync(mask, value, step, ...)                         \
  ::segkern::emulate::shuffle_by(mask, value, -static_cast<int>(step), \
                                 __LINE__ __VA_OPT__(, ) __VA_ARGS__)
#define __shfl_xor_sync(mask, value, bits, ...) \
  ::segkern::emulate::shuffle_xor(mask, value, bits, __LINE__ __VA_OPT__(, ) __VA_ARGS__)

using std::max;
using std::min;
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) {
  return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x));
}
inline unsigned __float_as_uint(float x) {
  return segkern::emulate::from_bits<unsigned>(segkern::emulate::to_bits(x));
}
inline float __uint_as_float(unsigned x) { return segkern::emulate::from_bits<float>(x); }
inline int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }
inline float __int_as_float(int x) { return __uint_as_float(static_cast<unsigned>(x)); }
inline long long __double_as_longlong(double x) {
  return segkern::emulate::from_bits<long long>(segkern::emulate::to_bits(x));
}
inline double __longlong_as_double(long long x) {
  return segkern::emulate::from_bits<double>(segkern::emulate::to_bits(x));
}
inline void __threadfence() {}
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T atomicAdd(T* p, std::type_identity_t<T> x) {
  return segkern::emulate::exchange(p, [x](T old) { return old + x; });
}
template <class T>
T atomicMin(T* p, std::type_identity_t<T> x) {
  return segkern::emulate::exchange(p, [x](T old) { return std::min(old, x); });
}
template <class T>
T atomicMax(T* p, std::type_identity_t<T> x) {
  return segkern::emulate::exchange(p, [x](T old) { return std::max(old, x); });
}
template <class T>
T atomicOr(T* p, std::type_identity_t<T> x) {
  return segkern::emulate::exchange(p, [x](T old) { return old | x; });
}
template <class T>
T atomicExch(T* p, std::type_identity_t<T> x) {
  return segkern::emulate::exchange(p, [x](T) { return x; });
}
template <class T>
T atomicCAS(T* p, std::type_identity_t<T> compare, std::type_identity_t<T> x) {
  return segkern::emulate::exchange(p, [=](T old) { return old == compare ? x : old; });
}
