// Working memory of many megabytes, in huge pages where the system grants them: the first touch of
// a 4 KB page costs more than filling it does, and malloc gives such memory back after each call.
#pragma once

#include <sys/mman.h>

#include "../common.h"

namespace segkern {

// Uninitialised like Scratch, and like it filled with NaN under SEGKERN_POISON=1.
template <class T>
class Pages {
 public:
  explicit Pages(int64_t n) : bytes_(n * sizeof(T) + kHuge) {
    if (n == 0) return;
    memory_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    STD_TORCH_CHECK(memory_ != MAP_FAILED, "segkern: out of memory (", bytes_, " bytes)");
    // from a multiple of the huge page on, or its first part would be small pages
    data_ =
        reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_) + kHuge - 1) / kHuge * kHuge);
#ifdef MADV_HUGEPAGE
    madvise(data_, n * sizeof(T), MADV_HUGEPAGE);
#endif
    poison_fill(data_, n * sizeof(T));
  }
  ~Pages() {
    if (data_) munmap(memory_, bytes_);
  }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  T* get() const { return data_; }

 private:
  static constexpr size_t kHuge = size_t{2} << 20;
  size_t bytes_;
  void* memory_ = nullptr;
  T* data_ = nullptr;
};

}  // namespace segkern
