// Linear layers and gated feed-forward blocks over int8 or int4 weights, up to 16 rows.
//
//   linear_int      y = act(x W^T + bias)
//   gated_mlp_int   y = (act(x G^T + bg) * (x U^T + bu)) D^T + bd, G and U read side by side
//
// Sums are float. A value is rounded to T where it is stored, and nowhere else.
#pragma once
#include "activation.h"
#include "product_int4.h"
#include "product_int8.h"

namespace dspark {

template <class T>
inline Vec plus(Vec x, const T* bias, int64_t n, int count) {
  return bias == nullptr ? x : x + load(bias + n, count);
}

template <class Q, class T, int M, bool GROUPED>
size_t linear_int_bytes(int64_t K, int64_t G, int threads) {
  return IntStaged<Q, T, M, GROUPED>::bytes(K, G, threads) +
         int_work_bytes<Q, T, M, GROUPED>(K) * threads;
}

// GROUPED says whether G, the groups of a row, is more than one.
template <class Q, class T, int M, bool GROUPED, class Act, class Weight>
void linear_int(Team team, const T* x, int64_t ldx, const Weight& w, const T* bias, T* y, int64_t N,
                int64_t K, int64_t G, char* memory) {
  const IntStaged<Q, T, M, GROUPED> staged(team, x, ldx, K, G, Weight::ZEROS, memory);
  char* work = memory + IntStaged<Q, T, M, GROUPED>::bytes(K, G, team.threads);
  work += int_work_bytes<Q, T, M, GROUPED>(K) * team.thread;
  const auto [first, last] = team.share(N, BLOCK);
  const Weight weights[1] = {w};
  product_int<Q, T, M, 1, GROUPED>(
      first, last, weights, K, G, staged, work,
      [&](int64_t n, int count, const float(*results)[M][BLOCK]) {
        for (int m = 0; m < M; ++m)
          for (int j = 0; j < count; j += Vec::W) {
            const int lanes = std::min(Vec::W, count - j);
            const Vec v = Act::of(plus(load(results[0][m] + j), bias, n + j, lanes));
            store(y + m * N + n + j, v, lanes);
          }
      });
}

template <class Q, class T, int M, bool GROUPED, bool DOWN_GROUPED>
size_t gated_mlp_int_bytes(int64_t K, int64_t I, int64_t G, int64_t H, int threads) {
  return aligned(sizeof(T) * M * I) +
         std::max(linear_int_bytes<Q, T, M, GROUPED>(K, G, threads),
                  linear_int_bytes<Q, T, M, DOWN_GROUPED>(I, H, threads));
}

// gate and up [I, K] have G groups a row, down [N, I] has H.
template <class Q, class T, int M, bool GROUPED, bool DOWN_GROUPED, class Act, class Weight>
void gated_mlp_int(Team team, const T* x, int64_t ldx, const Weight& gate, const Weight& up,
                   const Weight& down, const T* gate_bias, const T* up_bias, const T* down_bias,
                   T* y, int64_t N, int64_t I, int64_t K, int64_t G, int64_t H, char* memory) {
  T* hidden = reinterpret_cast<T*>(memory);
  char* rest = memory + aligned(sizeof(T) * M * I);
  {
    const IntStaged<Q, T, M, GROUPED> staged(team, x, ldx, K, G, Weight::ZEROS, rest);
    char* work = rest + IntStaged<Q, T, M, GROUPED>::bytes(K, G, team.threads);
    work += int_work_bytes<Q, T, M, GROUPED>(K) * team.thread;
    const auto [first, last] = team.share(I, BLOCK);
    const Weight weights[2] = {up, gate};
    product_int<Q, T, M, 2, GROUPED>(
        first, last, weights, K, G, staged, work,
        [&](int64_t n, int count, const float(*results)[M][BLOCK]) {
          for (int m = 0; m < M; ++m)
            for (int j = 0; j < count; j += Vec::W) {
              const int lanes = std::min(Vec::W, count - j);
              const Vec u = plus(load(results[0][m] + j), up_bias, n + j, lanes);
              const Vec g = plus(load(results[1][m] + j), gate_bias, n + j, lanes);
              store(hidden + m * I + n + j, u * Act::of(g), lanes);
            }
        });
  }
  team.barrier();
  linear_int<Q, T, M, DOWN_GROUPED, identity>(team, hidden, I, down, down_bias, y, N, I, H, rest);
}

}  // namespace dspark
