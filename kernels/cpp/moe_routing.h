// Which experts a step hits, with which tokens, and how the threads share what is read of them.
#pragma once
#include <algorithm>
#include <cstring>

#include "parallel.h"
#include "product_form.h"

namespace dspark {

// Tensors of all experts: one stacked, `step` elements an expert, or a list of pointers.
template <class T>
struct Stack {
  const T* base;
  const T* const* list;
  int64_t step;

  bool none() const { return base == nullptr && list == nullptr; }
  const T* of(int64_t e) const {
    return list != nullptr ? list[e] : base == nullptr ? nullptr : base + e * step;
  }
};

// How the matrices lie: `ld` elements from row to row; turned, from column to column, with rows
// `gap` apart (2 where gate and up alternate).
struct Lie {
  int64_t ld, gap;
};

struct ExpertSizes {
  int64_t tokens, k, experts, K, I, N, ldx;
};

// Choices sorted by expert: a table that each thread makes for itself.
struct Routing {
  int64_t hits = 0;   // experts with a token
  int32_t* expert;    // [hits]
  int32_t* start;     // [hits + 1], into choice
  int32_t* choice;    // [tokens * k]: t * k + j

  static size_t bytes(const ExpertSizes& s) {
    return aligned(4 * (s.experts + 1)) * 2 + aligned(4 * (s.experts + 2)) +
           aligned(4 * s.tokens * s.k);
  }

  template <class Index>
  Routing(const Index* indices, const ExpertSizes& s, char* memory) {
    int32_t* count = (int32_t*)memory;
    memory += aligned(4 * (s.experts + 1));
    expert = (int32_t*)memory;
    memory += aligned(4 * (s.experts + 1));
    start = (int32_t*)memory;
    choice = (int32_t*)(memory + aligned(4 * (s.experts + 2)));
    std::memset(count, 0, 4 * s.experts);
    const int64_t all = s.tokens * s.k;
    for (int64_t i = 0; i < all; ++i)
      if (uint64_t(indices[i]) < uint64_t(s.experts)) ++count[indices[i]];
    int32_t total = 0;
    for (int64_t e = 0; e < s.experts; ++e) {
      const int32_t here = count[e];
      count[e] = total;  // where its next choice goes
      if (here == 0) continue;
      expert[hits] = int32_t(e);
      start[hits++] = total;
      total += here;
    }
    start[hits] = total;
    for (int64_t i = 0; i < all; ++i)
      if (uint64_t(indices[i]) < uint64_t(s.experts)) choice[count[indices[i]]++] = int32_t(i);
  }

  int64_t size(int64_t h) const { return start[h + 1] - start[h]; }
};

// Load statistics, if `on` is not 0: calls, tokens (rows), experts hit, then tokens of each.
struct Load {
  int64_t on, calls, rows, hit;
  int64_t each[1];

  // One thread's work.
  void count(const Routing& routing, int64_t tokens) {
    if (on == 0) return;
    ++calls;
    rows += tokens;
    hit += routing.hits;
    for (int64_t h = 0; h < routing.hits; ++h) each[routing.expert[h]] += routing.size(h);
  }
};

// A thread's share of `rows` rows of every expert's weights, in whole blocks: body(h, first, last).
// One more pass over a block costs as the first: `passes(h)` says how many an expert has.
template <class Groups, class Passes, class Body>
inline void share_rows(Team team, const Groups& routing, int64_t rows, const Passes& passes,
                       Body&& body) {
  const int64_t blocks = (rows + BLOCK - 1) / BLOCK;
  int64_t all = 0;
  for (int64_t h = 0; h < routing.hits; ++h) all += blocks * passes(h);
  const int64_t begin = all * team.thread / team.threads;
  const int64_t end = all * (team.thread + 1) / team.threads;
  int64_t at = 0;
  for (int64_t h = 0; h < routing.hits; at += blocks * passes(h++)) {
    const int64_t q = passes(h);
    if (q == 0) continue;
    auto block = [&](int64_t where) {
      return std::min(std::max<int64_t>(where - at + q - 1, 0) / q, blocks);
    };
    const int64_t first = block(begin) * BLOCK, last = std::min(block(end) * BLOCK, rows);
    if (first < last) body(h, first, last);
  }
}

}  // namespace dspark
