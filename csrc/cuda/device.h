// What every CUDA source shares. The same source is compiled by nvcc for the GPU and, with
// SEGKERN_EMULATE, by a C++ compiler for the host, where every CUDA thread is a fibre (emulate.h):
// the tests of an op then run on its device code, under sanitizers, on a machine without a GPU.
//   launch(tensor, kernel, grid, block, shared_bytes, args...)  on the tensor's current stream
//   SEGKERN_SHARED(T, name)   the block's dynamic shared memory, in a kernel
//   SEGKERN_STATIC_SHARED(T, name, [n])   a variable in shared memory beside it
//   SEGKERN_CUDA_KEY          the dispatch key to register for
#pragma once

#include <algorithm>
#include <mutex>

#include "../common.h"

#ifdef SEGKERN_EMULATE
#include "emulate.h"
#else
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#define SEGKERN_CUDA_KEY CUDA
// one name for all element types: the declaration may differ from kernel to kernel
#define SEGKERN_SHARED(T, name)                                         \
  extern __shared__ __align__(16) unsigned char segkern_shared_bytes[]; \
  T* name = reinterpret_cast<T*>(segkern_shared_bytes)
#define SEGKERN_STATIC_SHARED(T, name, ...) __shared__ T name __VA_ARGS__
#endif

#define SEGKERN_LAUNCH(...) ::segkern::launch(__VA_ARGS__)

namespace segkern {

constexpr unsigned kWarp = 32, kAllLanes = 0xFFFFFFFFu;

// The shared memory a block may ask for on the tensor's device, in bytes.
inline size_t shared_limit([[maybe_unused]] const Tensor& t) {
#ifdef SEGKERN_EMULATE
  return emulate::shared_limit();
#else
  int bytes = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                        t.get_device_index()));
  return static_cast<size_t>(bytes);
#endif
}

#ifdef SEGKERN_EMULATE

struct DeviceScope {
  explicit DeviceScope(const Tensor&) {}
};

template <class... P>
void opt_in(const Tensor&, void (*kernel)(P...), size_t) {
  emulate::opt_in(reinterpret_cast<const void*>(kernel));
}

template <class... P, class... A>
void start(const Tensor&, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes,
           A&&... args) {
  emulate::run(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes,
               [&] { kernel(static_cast<P>(args)...); });
}

#else

// The tensor's device is current while this lives; a launcher opens with it.
struct DeviceScope {
  explicit DeviceScope(const Tensor& t) : guard(t.get_device_index()) {}
  torch::stable::accelerator::DeviceGuard guard;
};

// Blocks of the kernel may have as much dynamic shared memory as fits beside their static one.
// Never lowered, so that no thread takes away what another one is about to use; and no less than
// what is asked for, as the static memory that is reported may count what the system keeps for
// itself.
template <class... P>
void opt_in(const Tensor& t, void (*kernel)(P...), size_t shared_bytes) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaFuncAttributes has{};
  STD_CUDA_CHECK(cudaFuncGetAttributes(&has, function));
  constexpr int kUnasked = 48 * 1024;
  const int asked = static_cast<int>(shared_bytes), allowed = has.maxDynamicSharedSizeBytes;
  if (has.sharedSizeBytes + shared_bytes <= kUnasked) return;
  if (allowed > kUnasked && allowed >= asked) return;  // by an earlier launch
  const int most = static_cast<int>(shared_limit(t) - has.sharedSizeBytes);
  STD_CUDA_CHECK(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      std::max(most, asked)));
}

template <class... P, class... A>
void start(const Tensor& t, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes,
           A&&... args) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...));
}

#endif

template <class... P, class... A>
void launch(const Tensor& t, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes,
            A&&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  // what a block has without asking, 48 KB, counts its static memory too: ask whatever it takes
  if (shared_bytes > 0) opt_in(t, kernel, shared_bytes);
  start(t, kernel, grid, block, shared_bytes, static_cast<A&&>(args)...);
}

// The least x of a warp. Before sm_80 there is no instruction for it; emulated, the sanitizer of
// races sees the other way, too.
__device__ __forceinline__ unsigned min_of_warp(unsigned x) {
#if defined(__SANITIZE_THREAD__) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800)
#pragma unroll
  for (unsigned bits = kWarp / 2; bits > 0; bits /= 2)
    x = min(x, __shfl_xor_sync(kAllLanes, x, bits));
  return x;
#else
  return __reduce_min_sync(kAllLanes, x);
#endif
}

template <class T>
__device__ __forceinline__ void atomic_add(T* p, T x) {
  atomicAdd(p, x);
}

}  // namespace segkern
