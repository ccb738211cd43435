// How many drafted tokens a round verifies (`state.verify_length`), on the CPU.
#pragma once
#include <algorithm>
#include <cmath>

#include "speculation.h"

namespace dspark {

struct Schedule {
  int64_t width_index;
  double value;  // expected tokens of all requests a second
};

// What a token of each live request counts, 1 on average (`state.fair`): all wait for the one that
// has most to go, so those that are ahead of it count less.
inline void fair(const Speculation& s, double (&weight)[kMostRequests]) {
  int64_t most = 0, live = 0;
  const auto left = [&](int64_t b) { return s.limit - (s.lengths[b] - s.prompts[b]); };
  for (int64_t b = 0; b < s.batch; ++b)
    if (!s.done[b]) most = std::max(most, left(b)), ++live;
  const double scale = std::max(kAhead * double(most), 1.0);
  double sum = 0;
  for (int64_t b = 0; b < s.batch; ++b)
    sum += weight[b] = s.done[b] ? 0 : std::exp(double(left(b) - most) / scale);
  for (int64_t b = 0; b < s.batch; ++b) weight[b] *= double(live) / sum;
}

// By `found` and `survival`, where drafting took `draft_seconds`. What is left of the width that is
// stopped in is filled. `even`, of look-ups: tokens count as `fair` has it, and the first has to be
// worth more by a margin; else all count alike. `looks`: what was drafted is verified at any price.
inline Schedule schedule(const Speculation& s, double draft_seconds, bool even, bool looks = false) {
  const int64_t most = s.widths[s.width_count - 1] - 1;
  int64_t length = 0, wanted = 0;
  double tau = 0, weight[kMostRequests];
  std::fill(weight, weight + s.batch, 1.0);
  if (even && s.batch > 1) fair(s, weight);
  for (int64_t b = 0; b < s.batch; ++b) {
    if (s.done[b]) continue;
    tau += 1;
    wanted = std::max(wanted, s.found[b]);
  }
  double best = tau / (draft_seconds + s.table[1]);
  double least = even ? (1 + kMargin) * best : best;
  if (looks) {
    length = std::min(most, s.drafts);
  } else if (s.fixed) {
    length = std::min(most, wanted);
  } else if (wanted > 0) {
    for (; length < std::min(most, s.count); ++length) {
      for (int64_t b = 0; b < s.batch; ++b)
        if (!s.done[b]) tau += weight[b] * s.survival[b * s.count + length];
      const double value = tau / (draft_seconds + s.table[length + 2]);
      if (!(value > least)) break;
      best = least = value;
    }
  }
  int64_t i = 0;
  while (s.widths[i] <= length) ++i;
  return {i, best};
}

}  // namespace dspark
