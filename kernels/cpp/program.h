// A native program: the stages of a decode step, one after another, in one parallel region.
//
// A stage is a kernel of this folder with its arguments. Between two stages the threads meet. Before
// a thread waits there it asks for the beginning of its share of the weights that come next, so that
// memory is never idle: the step reads one long stream.
#pragma once
#include <ctime>

#include "parallel.h"

namespace dspark {

// A weight that the next stage reads: `rows` rows, shared out in blocks of 32.
struct Ahead {
  const char* start;
  int64_t rows;
  int64_t row_bytes;
};

struct Stage {
  int (*run)(const Team* team, const void* arguments, char* memory);
  const void* arguments;
  const Ahead* ahead;
  int64_t ahead_count;
};

inline void fetch_ahead(Team team, const Stage& stage, int64_t bytes) {
  if (stage.ahead_count == 0) return;
  bytes /= stage.ahead_count;
  for (int64_t i = 0; i < stage.ahead_count; ++i) {
    const Ahead& a = stage.ahead[i];
    const auto [first, last] = team.share(a.rows, 32);
    const char* from = a.start + first * a.row_bytes;
    const int64_t size = std::min(bytes, (last - first) * a.row_bytes);
    for (int64_t at = 0; at < size; at += 64) __builtin_prefetch(from + at, 0, 2);
  }
}

// Measures: the time in nanoseconds.
inline int64_t now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return int64_t(t.tv_sec) * 1000000000 + t.tv_nsec;
}

// Returns the first status that is not 0; what comes behind the stage that gave it is not run.
// With TIMED, spent[i] gains the nanoseconds that thread 0 spends in stage i, waiting included.
template <bool TIMED>
inline int run_program(const Stage* stages, int64_t count, char* memory, int threads,
                       int64_t ahead_bytes, int64_t* spent) {
  std::atomic<int> status{0};
  // The stage that failed: a thread may see it while it still leaves the stage before, and must
  // then go on to where the others will wait for it.
  std::atomic<int64_t> failed{count};
  parallel(threads, [&](Team team) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t start = TIMED ? now() : 0;
      const int mine = stages[i].run(&team, stages[i].arguments, memory);
      if (mine != 0) {
        status.store(mine, std::memory_order_relaxed);
        failed.store(i, std::memory_order_relaxed);
      }
      fetch_ahead(team, stages[i], ahead_bytes);
      team.barrier();
      if (TIMED && team.thread == 0) spent[i] += now() - start;
      if (failed.load(std::memory_order_relaxed) <= i) return;
    }
  });
  return status.load();
}

}  // namespace dspark
