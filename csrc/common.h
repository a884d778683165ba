// What every kernel file shares: the tensor alias, dtype dispatch, parallel loop and scratch
// memory; the attribute that compiles a loop once per instruction set is in clones.h. LibTorch's
// stable ABI only; nothing from Python.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "clones.h"

namespace segkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using IntList = std::vector<int64_t>;

// Calls f with a value of the accumulation type: double for double, float for float, half and
// bfloat16.
template <class F>
void dispatch_accumulate(const Tensor& t, const char* op, const F& f) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return f(double{});
    case ScalarType::Float:
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return f(float{});
    default:
      STD_TORCH_CHECK(false, op, ": floating point values expected");
  }
}

template <class T>
constexpr ScalarType scalar_type_of() {
  if constexpr (std::is_same_v<T, double>) return ScalarType::Double;
  if constexpr (std::is_same_v<T, float>) return ScalarType::Float;
  if constexpr (std::is_same_v<T, int32_t>) return ScalarType::Int;
  if constexpr (std::is_same_v<T, int64_t>) return ScalarType::Long;
  if constexpr (std::is_same_v<T, uint8_t>) return ScalarType::Byte;
}

// A dense copy of `t` in type T, or `t` itself where it already is one. CPU kernels compute in
// float or double: half and bfloat16 are converted once on the way in and once on the way out.
template <class T>
Tensor dense(const Tensor& t) {
  constexpr ScalarType want = scalar_type_of<T>();
  return torch::stable::contiguous(t.scalar_type() == want ? t : torch::stable::to(t, want));
}

inline Tensor cast_to(const Tensor& t, ScalarType want) {
  return t.scalar_type() == want ? t : torch::stable::to(t, want);
}

inline bool poison() {
  static const bool on = std::getenv("SEGKERN_POISON") != nullptr;
  return on;
}

// All bits set: NaN in every floating type, -1 or 255 in an integer.
inline void poison_fill(void* data, size_t bytes) {
  if (poison()) std::memset(data, 0xFF, bytes);
}

// Uninitialised working memory, 64-byte aligned; filled with NaN under SEGKERN_POISON=1 so that a
// forgotten write is seen.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t n) {
    const size_t bytes = ((n > 0 ? n : 1) * sizeof(T) + 63) / 64 * 64;
    data_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
    STD_TORCH_CHECK(data_ != nullptr, "segkern: out of memory (", bytes, " bytes of scratch)");
    poison_fill(data_.get(), bytes);
  }
  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T[], Free> data_;
};

// An output tensor on `like`'s device; on the CPU poisoned like scratch.
template <class T>
Tensor empty(const Tensor& like, const IntList& sizes) {
  Tensor out = torch::stable::new_empty(like, sizes, scalar_type_of<T>());
  if (out.numel() > 0 && out.is_cpu())
    poison_fill(out.mutable_data_ptr(), out.numel() * sizeof(T));
  return out;
}

template <class T>
Tensor zeros(const Tensor& like, const IntList& sizes) {
  return torch::stable::new_zeros(like, sizes, scalar_type_of<T>());
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

using torch::stable::parallel_for;

// Runs task(i) for i in [0, tasks), whichever thread is free: some places cost
// more than others. make() gives each thread its working memory.
template <class Make, class Task>
void run_tasks(int64_t tasks, const Make& make, const Task& task) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    auto memory = make();
    for (int64_t i; (i = next++) < tasks;) task(i, memory);
  });
}

}  // namespace segkern
