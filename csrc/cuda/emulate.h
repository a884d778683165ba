// Enough of CUDA's device language to run a kernel on the host, for tests: every CUDA thread is a
// fibre, a block's fibres take turns on one host thread, blocks follow one another. Barriers and
// warp operations wait for all whom they name; a thread that is named and never comes is an error
// with the line where the others wait. Odd blocks run their threads backwards, so that code which
// leans on an order without a barrier shows it. Under the thread sanitizer a fibre is a thread to
// it, and only barriers order memory: it then finds the races within a block.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define SEGKERN_UNSEEN __attribute__((no_sanitize("thread"), noinline))
#else
#define SEGKERN_UNSEEN __attribute__((noinline))
#endif

#define SEGKERN_CUDA_KEY CPU
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __constant__ static const
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define SEGKERN_SHARED(T, name) T* name = static_cast<T*>(::segkern::emulate::block.shared)
#define SEGKERN_STATIC_SHARED(T, name, ...) \
  static T name __VA_ARGS__;                \
  ::segkern::emulate::count_static(&name, sizeof(name))

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
#define SEGKERN_VECTOR(T, name)                                                        \
  struct __align__(2 * sizeof(T)) name##2 { T x, y; };                                 \
  struct __align__(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) name##4 { T x, y, z, w; }; \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                           \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
SEGKERN_VECTOR(int, int)
SEGKERN_VECTOR(unsigned, uint)
SEGKERN_VECTOR(float, float)
SEGKERN_VECTOR(double, double)
#undef SEGKERN_VECTOR

namespace segkern::emulate {

constexpr size_t kStack = 256 * 1024;  // of a fibre; sanitized frames are large
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kUnasked = 48 * 1024;  // of shared memory, static and dynamic, without opting in

enum class Op { sync, shuffle, ballot, min, max, add, match };

struct Fibre {
  uint3 thread;
  void* stack;    // its bottom
  void* pointer;  // stack pointer while it waits
  void* shadow;   // the thread sanitizer's name for it
  bool waits, done;
  int line;  // of the operation it waits in
  Op op;
  unsigned mask, source;  // of a warp operation: who takes part; the lane to read
  uint64_t value, result;
  unsigned barriers, syncs;  // passed: two tokens each, for the one before and the next
  char token[2];             // addresses that order memory, for the thread sanitizer
};

struct Block {
  uint3 index;
  dim3 size, grid;
  void* shared;
  const void* statics[8];  // its variables in shared memory that have been met
  unsigned n_statics;
  size_t static_bytes;
  unsigned arrived;  // threads at the block's barrier
  const void* body;
  void (*call)(const void*);
};

inline std::mutex one_at_a_time;
inline Fibre fibres[kMaxThreads];
inline Fibre* current;
inline Block block;
inline void* host_pointer;  // the host's stack pointer while a fibre runs
inline void* host_shadow;
inline char start_token, end_token, barrier_token[2];

// Saves the callee-saved registers and the stack pointer, goes on with another stack.
#if !defined(__x86_64__)
#error "csrc/cuda/emulate.h switches stacks on x86-64 only"
#endif
[[gnu::naked, gnu::noinline]] inline void switch_stack(void** /*save*/, void* /*to*/) {
  __asm__(
      "push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15;"
      "mov %rsp, (%rdi); mov %rsi, %rsp;"
      "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
}

// What a block may have of shared memory: SEGKERN_SHARED_KB, as of an H200 where that is not set.
inline size_t shared_limit() {
  const char* kilobytes = std::getenv("SEGKERN_SHARED_KB");
  return 1024 * (kilobytes ? std::strtoul(kilobytes, nullptr, 10) : 227);
}

inline std::map<const void*, size_t> opted_in;  // kernel to bytes a block, static and dynamic

inline void opt_in(const void* kernel) {
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  opted_in[kernel] = shared_limit();
}

SEGKERN_UNSEEN inline void count_static(const void* variable, size_t bytes) {
  for (unsigned i = 0; i < block.n_statics; ++i)
    if (block.statics[i] == variable) return;
  if (block.n_statics == 8) std::abort();
  block.statics[block.n_statics++] = variable;
  block.static_bytes += bytes;
}

inline void release([[maybe_unused]] void* token) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(token);
#endif
}

inline void acquire([[maybe_unused]] void* token) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(token);
#endif
}

inline void switch_shadow([[maybe_unused]] void* shadow) {
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(shadow, __tsan_switch_to_fiber_no_sync);
#endif
}

SEGKERN_UNSEEN inline void to_host() {
  switch_shadow(host_shadow);
  switch_stack(&current->pointer, host_pointer);
}

SEGKERN_UNSEEN inline void to_fibre(Fibre* fibre) {
  current = fibre;
  switch_shadow(fibre->shadow);
  switch_stack(&host_pointer, fibre->pointer);
}

[[noreturn]] SEGKERN_UNSEEN inline void stop(const char* what, int line) {
  std::fprintf(stderr, "emulated CUDA: %s (line %d, thread %u %u %u of block %u %u %u)\n", what,
               line, current->thread.x, current->thread.y, current->thread.z, block.index.x,
               block.index.y, block.index.z);
  std::abort();
}

SEGKERN_UNSEEN inline unsigned rank() { return static_cast<unsigned>(current - fibres); }
SEGKERN_UNSEEN inline unsigned threads() { return block.size.x * block.size.y * block.size.z; }

[[noreturn]] SEGKERN_UNSEEN inline void enter() {
  acquire(&start_token);
  block.call(block.body);
  release(&end_token);
  current->done = true;
  to_host();
  std::abort();  // a fibre that is done is never gone on with
}

SEGKERN_UNSEEN inline void wait(int line) {
  current->waits = true;
  current->line = line;
  to_host();
}

SEGKERN_UNSEEN inline void block_barrier(int line) {
  char* token = &barrier_token[current->barriers++ % 2];
  release(token);
  if (++block.arrived < threads()) {
    current->line = line;
    wait(line);
  } else {
    block.arrived = 0;
    for (unsigned i = 0; i < threads(); ++i) {
      Fibre& other = fibres[i];
      if (&other != current && (other.done || other.line != line))
        stop("a barrier that not all threads of the block reach", line);
      other.waits = false;
    }
  }
  acquire(token);
}

// The result of lane i, once all lanes of `lanes` are there.
SEGKERN_UNSEEN inline uint64_t lane_result(const Fibre* lanes, unsigned mask, unsigned i) {
  const Op op = lanes[i].op;
  if (op == Op::shuffle) {
    const unsigned source = lanes[i].source;
    // reading a lane that takes no part gives anything on a GPU
    return mask >> source & 1 ? lanes[source].value : 0xDEADDEADDEADDEADull;
  }
  uint64_t result = op == Op::min ? ~0ull : 0;
  for (unsigned k = 0; k < 32; ++k) {
    if (!(mask >> k & 1)) continue;
    const uint64_t v = lanes[k].value;
    if (op == Op::sync) result |= static_cast<uint64_t>(lanes[k].syncs % 2) << k;
    if (op == Op::ballot) result |= static_cast<uint64_t>(v != 0) << k;
    if (op == Op::match) result |= static_cast<uint64_t>(v == lanes[i].value) << k;
    if (op == Op::min) result = std::min(result, v);
    if (op == Op::max) result = std::max(result, v);
    if (op == Op::add) result += v;
  }
  return result;
}

SEGKERN_UNSEEN inline uint64_t warp(Op op, unsigned mask, uint64_t value, unsigned source,
                                    int line) {
  Fibre* lanes = fibres + rank() / 32 * 32;
  const unsigned lane = rank() % 32, size = std::min(32u, threads() - rank() / 32 * 32);
  if (size < 32) mask &= (1u << size) - 1;  // lanes that the block does not have
  if (!(mask >> lane & 1)) stop("a warp operation whose mask leaves its own lane out", line);
  if (op == Op::sync) release(&current->token[++current->syncs % 2]);
  current->op = op;
  current->mask = mask;
  current->value = value;
  current->source = source;
  current->line = line;
  bool all = true;
  for (unsigned i = 0; i < 32; ++i) {
    if (i == lane || !(mask >> i & 1)) continue;
    if (lanes[i].done) stop("a warp operation that names a lane that has left", line);
    all = all && lanes[i].waits && lanes[i].mask == mask && lanes[i].op == op;
  }
  if (!all) {
    wait(line);
  } else {
    for (unsigned i = 0; i < 32; ++i)
      if (mask >> i & 1) lanes[i].result = lane_result(lanes, mask, i);
    for (unsigned i = 0; i < 32; ++i)
      if (mask >> i & 1) lanes[i].waits = false, lanes[i].mask = 0;
  }
  for (unsigned i = 0; op == Op::sync && i < 32; ++i)
    if (mask >> i & 1) acquire(&lanes[i].token[current->result >> i & 1]);
  return current->result;
}

SEGKERN_UNSEEN inline void prepare(Fibre& fibre, unsigned i) {
  if (fibre.stack == nullptr) {
    fibre.stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (fibre.stack == MAP_FAILED) stop("no memory for a stack", 0);
#if defined(__SANITIZE_THREAD__)
    fibre.shadow = __tsan_create_fiber(0);
#endif
  }
  const dim3 size = block.size;
  fibre.thread = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
  fibre.waits = fibre.done = false;
  fibre.mask = fibre.barriers = 0;  // the next block may have other threads
  // what switch_stack pops: six registers, then where to return to; the ABI's alignment at entry
  void** top = reinterpret_cast<void**>(static_cast<char*>(fibre.stack) + kStack) - 2;
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&enter);
  fibre.pointer = top - 6;
}

SEGKERN_UNSEEN inline void run_block(unsigned number) {
  const unsigned n = threads();
  block.arrived = 0;
  for (unsigned i = 0; i < n; ++i) prepare(fibres[i], i);
  for (unsigned done = 0; done < n;) {
    bool moved = false;
    for (unsigned i = 0; i < n; ++i) {
      Fibre& fibre = fibres[number % 2 ? n - 1 - i : i];
      if (fibre.done || fibre.waits) continue;
      to_fibre(&fibre);
      moved = true;
      done += fibre.done;
    }
    if (!moved) {
      for (current = fibres; current->done; ++current) continue;
      stop("threads wait for threads that have left or wait elsewhere", current->line);
    }
  }
}

template <class F>
void call_body(const void* body) {
  (*static_cast<const F*>(body))();
}

template <class F>
void run(const void* kernel, dim3 grid, dim3 size, size_t shared_bytes, const F& body) {
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  block.size = size;
  block.grid = grid;
  STD_TORCH_CHECK(threads() > 0 && threads() <= kMaxThreads, "a block of ", threads(), " threads");
  const auto asked = opted_in.find(kernel);
  const size_t limit = asked == opted_in.end() ? kUnasked : std::max(kUnasked, asked->second);
  STD_TORCH_CHECK(shared_bytes <= limit, shared_bytes, " of ", limit, " bytes of shared memory");
  STD_TORCH_CHECK(grid.y <= 65535 && grid.z <= 65535, "a grid of ", grid.y, " x ", grid.z);
  Scratch<unsigned char> shared(static_cast<int64_t>(shared_bytes));
  block.shared = shared.get();
  block.n_statics = block.static_bytes = 0;
  block.body = &body;
  block.call = &call_body<F>;
#if defined(__SANITIZE_THREAD__)
  host_shadow = __tsan_get_current_fiber();
#endif
  unsigned number = 0;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x, ++number) {
        block.index = {x, y, z};
        if (shared_bytes > 0) std::memset(shared.get(), 0xFF, shared_bytes);
        release(&start_token);
        run_block(number);
        acquire(&end_token);
      }
  // a GPU would not have started it
  const size_t bytes = (block.static_bytes + 15) / 16 * 16 + shared_bytes;
  STD_TORCH_CHECK(bytes <= limit, bytes, " of ", limit, " bytes of shared memory, with static");
}

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T>
T shuffle(unsigned mask, T value, int source, int width, bool inside, int line) {
  const int lane = static_cast<int>(rank() % 32), first = lane / width * width;
  const int from = inside ? first + (source - first) % width : lane;
  return from_bits<T>(warp(Op::shuffle, mask, to_bits(value), static_cast<unsigned>(from), line));
}

template <class T>
T shuffle_index(unsigned mask, T value, int source, int line, int width = 32) {
  const int first = static_cast<int>(rank() % 32) / width * width;
  return shuffle(mask, value, first + (source & (width - 1)), width, true, line);
}

template <class T>
T shuffle_by(unsigned mask, T value, int step, int line, int width = 32) {
  const int lane = static_cast<int>(rank() % 32), first = lane / width * width;
  const int source = lane + step;
  return shuffle(mask, value, source, width, source >= first && source < first + width, line);
}

template <class T>
T shuffle_xor(unsigned mask, T value, int bits, int line, int width = 32) {
  const int lane = static_cast<int>(rank() % 32), source = lane ^ bits;
  return shuffle(mask, value, source, width, source < lane / width * width + width, line);
}

template <class T, class F>
T exchange(T* p, const F& change) {  // relaxed, as CUDA's atomics; sees floats by their bits
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  Bits* bits = reinterpret_cast<Bits*>(p);
  Bits old = __atomic_load_n(bits, __ATOMIC_RELAXED);
  while (true) {
    const T before = from_bits<T>(old);
    Bits next = static_cast<Bits>(to_bits(static_cast<T>(change(before))));
    if (__atomic_compare_exchange_n(bits, &old, next, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
      return before;
  }
}

}  // namespace segkern::emulate

#include "emulate_language.h"
