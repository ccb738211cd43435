// One matrix an expert over rows that are sorted by expert: y[s] = W_e x[s] + b_e.
//
// Experts without rows are not read, the others once for up to ROOM rows: an expert's rows are the
// rows of one product, as in moe.h, and work is cut by expert and passes.
#pragma once
#include "linear.h"
#include "moe_product.h"
#include "moe_rows.h"

namespace dspark {

// Runs of rows from the ends of all experts' runs, a table that each thread makes for itself. What
// falls or lies outside of the rows is cut off.
struct Groups {
  int64_t hits = 0;
  int32_t* expert;  // [hits]
  int64_t* start;   // [hits + 1]

  static size_t bytes(int64_t experts) {
    return aligned(4 * experts) + aligned(8 * (experts + 1));
  }

  template <class Index>
  Groups(const Index* ends, int64_t experts, int64_t rows, char* memory) {
    expert = (int32_t*)memory;
    start = (int64_t*)(memory + aligned(4 * experts));
    start[0] = 0;
    for (int64_t e = 0; e < experts; ++e) {
      const int64_t end = std::min<int64_t>(ends[e], rows);
      if (end <= start[hits]) continue;
      expert[hits] = int32_t(e);
      start[++hits] = end;
    }
  }

  int64_t size(int64_t h) const { return start[h + 1] - start[h]; }
};

// Row i of a run.
template <class T>
struct FromRows {
  const T* x;
  int64_t ldx, K;

  const T* operator()(int64_t i) const { return x + i * ldx; }
  void copy(int64_t i, T* to) const { std::memcpy(to, x + i * ldx, sizeof(T) * K); }
};

// CAP: rows of a pass; TURNED: weights lie [in][out].
template <class T, class Index, int CAP, bool TURNED>
struct GroupedLinear {
  const T* x;
  int64_t ldx;
  const Index* ends;
  Stack<T> weight, bias;
  int64_t ldw;
  T* y;
  int64_t rows, experts, K, N;

  static size_t bytes(int64_t rows, int64_t experts, int64_t K, int threads) {
    return threads * own_bytes(rows, experts, K) + 4096;
  }

  void run(Team team, char* memory) const {
    memory += own_bytes(rows, experts, K) * team.thread;
    const Groups groups(ends, experts, rows, memory);
    memory += Groups::bytes(experts);
    const auto passes = [&](int64_t h) { return (groups.size(h) + CAP - 1) / CAP; };
    share_rows(team, groups, N, passes, [&](int64_t h, int64_t first, int64_t last) {
      for (int64_t at = groups.start[h]; at < groups.start[h + 1]; at += ROOM)
        some(groups.expert[h], at, std::min<int64_t>(ROOM, groups.start[h + 1] - at), first, last,
             memory);
    });
  }

 private:
  static size_t own_bytes(int64_t rows, int64_t experts, int64_t K) {
    return aligned(Groups::bytes(experts) + packed_bytes<T, CAP>(K, rows));
  }

  // Rows [begin, begin + count), all of expert e, with rows [first, last) of its matrix.
  void some(int64_t e, int64_t begin, int64_t count, int64_t first, int64_t last,
            char* memory) const {
    with_rows<CAP>(count, [&](auto constant) {
      constexpr int M = decltype(constant)::value;
      using P = Packed<T, M>;
      const FromRows<T> read{x + begin * ldx, ldx, K};
      const auto* packed = pack_passes<T, M>(count, K, read, memory);
      const int64_t pass = int64_t(P::bytes(K) / sizeof(typename P::Element));
      const T* const w[1] = {weight.of(e)};
      const T* b = bias.of(e);
      auto done = [&](int64_t p, int64_t n, int found, const auto& results) {
        const int64_t live = std::min<int64_t>(M, count - p * M);
        for (int64_t m = 0; m < live; ++m)
          for (int j = 0; j < found; j += Vec::W) {
            const int lanes = std::min(Vec::W, found - j);
            const Vec v = biased(dspark::load(&results[0][m][j]), b, n + j, lanes);
            store(y + (begin + p * M + m) * N + n + j, v, lanes);
          }
      };
      const int64_t all = (count + M - 1) / M;
      if constexpr (TURNED) {
        turned_passes<T, M, 1>(first, last, w, ldw, 1, K, packed, P::padded(K), pass, all, done);
      } else {
        product_passes<T, M, 1>(first, last, w, ldw, K, packed, P::padded(K), pass, all, done);
      }
    });
  }
};

}  // namespace dspark
