// One parallel region a kernel, on the threads of the OpenMP runtime that torch uses.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <thread>
#include <utility>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace dspark {

// A meeting point of threads that all run: they spin, since the wait is some microseconds and a
// sleeping thread takes longer than that to wake. One that waits long gives up its core, for the
// case that the others have none.
class Barrier {
 public:
  void wait(int threads) {
    const int phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
      if (spins < 20000) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> phase_{0};
};

// A thread's place among those that run a kernel together.
struct Team {
  int thread = 0;
  int threads = 1;
  Barrier* meeting = nullptr;

  // This thread's share of `count` items, in whole `grain`s: [first, last).
  std::pair<int64_t, int64_t> share(int64_t count, int64_t grain = 1) const {
    const int64_t grains = (count + grain - 1) / grain;
    const int64_t first = grains * thread / threads * grain;
    const int64_t last = grains * (thread + 1) / threads * grain;
    return {std::min(first, count), std::min(last, count)};
  }

  // Every thread has come here, and sees what the others wrote before.
  void barrier() const {
    if (threads > 1) meeting->wait(threads);
  }
};

// Runs body(Team) on `threads` threads. The runtime may give fewer: kernels read team.threads.
template <class Body>
inline void parallel(int threads, Body&& body) {
#ifdef _OPENMP
  if (threads > 1) {
    Barrier meeting;
#pragma omp parallel num_threads(threads)
    { body(Team{omp_get_thread_num(), omp_get_num_threads(), &meeting}); }
    return;
  }
#endif
  body(Team{});
}

// Memory that a kernel borrows for one call: it belongs to the calling thread, and grows.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }

  // `bytes` bytes at a cache line's start; what an earlier call left is lost.
  void* get(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = (bytes + 4095) / 4096 * 4096;
      data_ = std::aligned_alloc(4096, size_);
      if (data_ == nullptr) size_ = 0;
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

inline Scratch& scratch() {
  thread_local Scratch memory;
  return memory;
}

inline size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace dspark
