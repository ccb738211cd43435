// Linear layers and feed-forward blocks of up to 16 rows, as one parallel region each:
//
//   linear      y = act(norm(x) W^T + bias) + residual, y cut into parts where linears are merged
//   mlp         y = act(x U^T + bu) D^T + bd
//   gated_mlp   y = (act(x G^T + bg) * (x U^T + bu)) D^T + bd, G and U read side by side
//
// Sums are float. A value is rounded to T where it is stored, and nowhere else.
#pragma once
#include "activation.h"
#include "norm.h"
#include "product.h"

namespace dspark {

constexpr int MAX_PARTS = 8;

// y as one or several contiguous [M, n] tensors, columns one after another.
template <class T>
struct Parts {
  int count;
  T* y[MAX_PARTS];
  int64_t start[MAX_PARTS + 1];  // part i holds columns start[i] ... start[i + 1] - 1
};

// No norm in front.
struct Plain {
  static constexpr bool NONE = true;
};
// A norm of x in front of the product.
template <class WT, bool CENTRE_, bool FIRST_>
struct Normed : Norm<WT> {
  static constexpr bool NONE = false, CENTRE = CENTRE_, FIRST = FIRST_;
  using Weight = WT;
};

// x as `product` wants it. Threads share the work of packing; for one row each makes its own copy,
// which costs less than to meet.
template <class T, int M>
class Staged {
  using P = Packed<T, M>;
  using Element = typename P::Element;

 public:
  // Whether x [M, K] is used where it lies.
  static bool direct(int64_t K) {
    return std::is_same<T, Element>::value && P::FORM != Form::Tiles && K % P::STEP == 0;
  }
  static size_t bytes(int64_t K, int threads) {
    return (P::bytes(K) + aligned(sizeof(T) * M * K)) * (M == 1 ? threads : 1);
  }

  const Element* x;
  int64_t ldx;

  template <class Before>
  Staged(Team team, const T* from, int64_t ld, int64_t K, const Before& before, char* memory) {
    if (M == 1) memory += bytes(K, 1) * team.thread;
    const Team workers = M == 1 ? Team{} : team;
    if constexpr (!Before::NONE) {
      T* normed = reinterpret_cast<T*>(memory + P::bytes(K));
      const Norm<typename Before::Weight>& norm = before;
      const auto [first, last] = workers.share(M);
      for (int64_t m = first; m < last; ++m)
        norm_row<T, typename Before::Weight, T, Before::CENTRE, Before::FIRST, false>(
            from + m * ld, nullptr, nullptr, normed + m * K, K, norm);
      workers.barrier();
      from = normed;
      ld = K;
    }
    ldx = P::padded(K);
    if (direct(K)) {
      x = reinterpret_cast<const Element*>(from);
      ldx = ld;
      return;
    }
    Element* to = reinterpret_cast<Element*>(memory);
    const auto [first, last] = workers.share(ldx, P::STEP);
    pack<T, M>(from, ld, K, first, last, to);
    workers.barrier();
    x = to;
  }
};

template <class T>
inline Vec biased(Vec x, const T* bias, int64_t n, int count) {
  return bias == nullptr ? x : x + load(bias + n, count);
}

// Stores up to BLOCK columns of row m from column n on, in the parts they belong to.
template <class T>
inline void store_parts(const Parts<T>& parts, int m, int64_t n, int count, const float* values) {
  for (int i = 0; i < parts.count; ++i) {
    const int64_t from = std::max(n, parts.start[i]);
    const int64_t to = std::min(n + count, parts.start[i + 1]);
    const int64_t size = parts.start[i + 1] - parts.start[i];
    for (int64_t j = from; j < to; j += Vec::W)
      store(parts.y[i] + m * size + (j - parts.start[i]), load(values + (j - n)),
            int(std::min<int64_t>(Vec::W, to - j)));
  }
}

template <class T, int M>
size_t linear_bytes(int64_t K, int threads) {
  return Staged<T, M>::bytes(K, threads);
}

template <class T, int M, class Act, class Before>
void linear(Team team, const T* x, int64_t ldx, const T* w, int64_t ldw, const T* bias,
            const T* residual, const Parts<T>& parts, int64_t N, int64_t K, const Before& before,
            char* memory) {
  constexpr int W = Vec::W;
  const Staged<T, M> staged(team, x, ldx, K, before, memory);
  const T* const weights[1] = {w};
  product<T, M, 1>(
      team, weights, ldw, N, K, staged.x, staged.ldx,
      [&](int64_t n, int count, const float(*results)[M][BLOCK]) {
        for (int m = 0; m < M; ++m) {
          float values[BLOCK + W];
          for (int j = 0; j < count; j += W) {
            const int lanes = std::min(W, count - j);
            Vec v = Act::of(biased(load(results[0][m] + j), bias, n + j, lanes));
            if (residual != nullptr) v = v + load(residual + m * N + n + j, lanes);
            store(values + j, v);
          }
          store_parts(parts, m, n, count, values);
        }
      });
}

template <class T, int M>
size_t mlp_bytes(int64_t K, int64_t I, int threads) {
  return aligned(sizeof(T) * M * I) +
         std::max(Staged<T, M>::bytes(K, threads), Staged<T, M>::bytes(I, threads));
}

// MATS = 2 is the gated form: up and gate; MATS = 1 has no gate.
template <class T, int M, class Act, int MATS, class Before>
void mlp(Team team, const T* x, int64_t ldx, const T* gate, const T* up, int64_t ldu,
         const T* down, int64_t ldd, const T* gate_bias, const T* up_bias, const T* down_bias,
         const T* residual, T* y, int64_t N, int64_t I, int64_t K, const Before& before,
         char* memory) {
  constexpr int W = Vec::W;
  T* hidden = reinterpret_cast<T*>(memory);
  char* rest = memory + aligned(sizeof(T) * M * I);
  {
    const Staged<T, M> staged(team, x, ldx, K, before, rest);
    const T* weights[MATS];
    weights[0] = up;
    if constexpr (MATS == 2) weights[1] = gate;
    const auto& both = weights;
    product<T, M, MATS>(
        team, both, ldu, I, K, staged.x, staged.ldx,
        [&](int64_t n, int count, const float(*results)[M][BLOCK]) {
          for (int m = 0; m < M; ++m)
            for (int j = 0; j < count; j += W) {
              const int lanes = std::min(W, count - j);
              Vec v = biased(load(results[0][m] + j), up_bias, n + j, lanes);
              if constexpr (MATS == 2) {
                v = v * Act::of(biased(load(results[1][m] + j), gate_bias, n + j, lanes));
              } else {
                v = Act::of(v);
              }
              store(hidden + m * I + n + j, v, lanes);
            }
        });
  }
  team.barrier();
  Parts<T> parts{1, {y}, {0, N}};
  linear<T, M, identity>(team, hidden, I, down, ldd, down_bias, residual, parts, N, I, Plain{},
                         rest);
}

}  // namespace dspark
