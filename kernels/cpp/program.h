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

// The status of a step whose scores leave nothing to draw from (`raise_for`).
constexpr int kUndrawable = 4;

// How a program went, for all threads.
struct Outcome {
  std::atomic<int> status{0};
  // The stage that failed: a thread may see it while it still leaves the stage before, and must
  // then go on to where the others will wait for it.
  std::atomic<int64_t> failed;
};

// One thread's part of the stages; whether all went well. What comes behind a stage that gave a
// status other than 0 is not run. With TIMED, spent[i] gains the nanoseconds that thread 0 spends
// in stage i, waiting included.
template <bool TIMED>
inline bool run_stages(Team team, const Stage* stages, int64_t count, char* memory,
                       int64_t ahead_bytes, int64_t* spent, Outcome& outcome) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t start = TIMED ? now() : 0;
    const int mine = stages[i].run(&team, stages[i].arguments, memory);
    if (mine != 0) {
      outcome.status.store(mine, std::memory_order_relaxed);
      outcome.failed.store(i, std::memory_order_relaxed);
    }
    fetch_ahead(team, stages[i], ahead_bytes);
    team.barrier();
    if (TIMED && team.thread == 0) spent[i] += now() - start;
    if (outcome.failed.load(std::memory_order_relaxed) <= i) return false;
  }
  return true;
}

// The stages once. Returns the first status that is not 0.
template <bool TIMED>
inline int run_program(const Stage* stages, int64_t count, char* memory, int threads,
                       int64_t ahead_bytes, int64_t* spent) {
  Outcome outcome;
  outcome.failed = count;
  parallel(threads, [&](Team team) {
    run_stages<TIMED>(team, stages, count, memory, ahead_bytes, spent, outcome);
  });
  return outcome.status.load();
}

// The stages, then `again()` on one thread, for as long as it says so: all in one parallel region,
// since to open one for each step costs more than a choice of tokens. TIMED as for `run_stages`.
template <bool TIMED, class Again>
inline int run_rounds(const Stage* stages, int64_t count, char* memory, int threads,
                      int64_t ahead_bytes, int64_t* spent, Again&& again) {
  Outcome outcome;
  outcome.failed = count;
  bool more = true;  // written by thread 0 between two meetings
  parallel(threads, [&](Team team) {
    for (;;) {
      if (!run_stages<TIMED>(team, stages, count, memory, ahead_bytes, spent, outcome)) return;
      if (team.thread == 0) more = again();
      team.barrier();
      if (!more) return;
    }
  });
  return outcome.status.load();
}

}  // namespace dspark
