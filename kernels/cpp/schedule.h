// How many drafted tokens a round verifies (`state.verify_length`), on the CPU.
#pragma once
#include <algorithm>

#include "speculation.h"

namespace dspark {

struct Schedule {
  int64_t width_index;
  double value;  // expected tokens of all requests a second
};

// By `found` and `survival`, where drafting took `draft_seconds`. What is left of the width that is
// stopped in is filled.
inline Schedule schedule(const Speculation& s, double draft_seconds) {
  const int64_t most = s.widths[s.width_count - 1] - 1;
  int64_t length = 0, wanted = 0;
  double tau = 0;
  for (int64_t b = 0; b < s.batch; ++b) {
    if (s.done[b]) continue;
    tau += 1;
    wanted = std::max(wanted, s.found[b]);
  }
  double best = tau / (draft_seconds + s.table[1]);
  if (s.fixed) {
    length = std::min(most, wanted);
  } else if (wanted > 0) {
    for (; length < std::min(most, s.count); ++length) {
      for (int64_t b = 0; b < s.batch; ++b)
        if (!s.done[b]) tau += s.survival[b * s.count + length];
      const double value = tau / (draft_seconds + s.table[length + 2]);
      if (!(value > best)) break;
      best = value;
    }
  }
  int64_t i = 0;
  while (s.widths[i] <= length) ++i;
  return {i, best};
}

}  // namespace dspark
