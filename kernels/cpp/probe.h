// What the machine can do: reading and copying, as fast as plain loops go.
#pragma once
#include "parallel.h"
#include "vec.h"

namespace dspark {

// The sum of n floats, only so that they are read.
inline void probe_read(Team team, const float* x, float* out, int64_t n) {
  constexpr int W = Vec::W;
  const auto [first, last] = team.share(n, 8 * W);
  Vec a[8];
  for (auto& v : a) v = zero();
  int64_t i = first;
  for (; i + 8 * W <= last; i += 8 * W)
    for (int j = 0; j < 8; ++j) {
      if (j * W % 16 == 0) __builtin_prefetch(x + i + j * W + 1024, 0, 3);
      a[j] = a[j] + load(x + i + j * W);
    }
  float total = 0;
  for (; i < last; ++i) total += x[i];
  for (auto& v : a) total += sum(v);
  // Never true of what the probe is given; keeps the loop.
  if (total == -1.0f) *out = total;
}

inline void probe_copy(Team team, const float* x, float* y, int64_t n) {
  const auto [first, last] = team.share(n, 16);
  if (last > first) std::memcpy(y + first, x + first, sizeof(float) * (last - first));
}

}  // namespace dspark
