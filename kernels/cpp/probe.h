// What the machine can do: reading and copying, as fast as plain loops go.
#pragma once
#include "parallel.h"
#include "reading.h"
#include "vec.h"

namespace dspark {

// The sum of n floats, only so that they are read: each thread reads several streams side by side,
// which is what memory is fastest at.
inline void probe_read(Team team, const float* x, float* out, int64_t n) {
  constexpr int W = Vec::W, STREAMS = 8, LINES = 2;
  const auto [first, last] = team.share(n, 16 * LINES * STREAMS);
  const int64_t each = (last - first) / STREAMS / (16 * LINES) * (16 * LINES);
  Vec a[STREAMS];
  for (auto& v : a) v = zero();
  for (int64_t i = 0; i < each; i += 16 * LINES)
    for (int s = 0; s < STREAMS; ++s) {
      const float* from = x + first + s * each + i;
      if (!SEQUENCE)
        for (int line = 0; line < LINES; ++line) __builtin_prefetch(from + 16 * line + 256, 0, 3);
      for (int j = 0; j < 16 * LINES; j += W) a[s] = a[s] + load(from + j);
    }
  float total = 0;
  for (int64_t i = first + STREAMS * each; i < last; ++i) total += x[i];
  for (auto& v : a) total += sum(v);
  // Never true of what the probe is given; keeps the loop.
  if (total == -1.0f) *out = total;
}

inline void probe_copy(Team team, const float* x, float* y, int64_t n) {
  const auto [first, last] = team.share(n, 16);
  if (last > first) std::memcpy(y + first, x + first, sizeof(float) * (last - first));
}

}  // namespace dspark
