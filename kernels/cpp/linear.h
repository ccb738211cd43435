// Linear layers and feed-forward blocks of up to 16 rows, as one parallel region each:
//
//   linear      y = act(norm(x) W^T + bias) + residual, W and y in parts for linears on one input
//   mlp         y = act(x U^T + bu) D^T + bd
//   gated_mlp   y = (act(x G^T + bg) * (x U^T + bu)) D^T + bd, G and U read side by side
//
// Sums are float. A value is rounded to T where it is stored, and nowhere else.
#pragma once
#include "activation.h"
#include "norm.h"
#include "product.h"

namespace dspark {

// A weight [n, K] with its bias or null, and its result [M, n], contiguous. Members of 8 bytes: the
// callers pass arrays of these.
template <class T>
struct Part {
  const T* w;
  int64_t ldw;
  const T* bias;
  T* y;
  int64_t n;
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

// x as `product` wants it. Threads share the work of packing; of few numbers each makes its own copy,
// which costs less than to meet, and to fetch what others wrote from their caches.
template <class T, int M>
class Staged {
  using P = Packed<T, M>;
  using Element = typename P::Element;

 public:
  // Whether x [M, K], its rows `ld` apart, is used where it lies.
  static bool direct(int64_t K, int64_t ld) {
    return std::is_same<T, Element>::value && P::FORM != Form::Tiles && K % P::STEP == 0 &&
           !P::crowded(ld);
  }
  static bool alone(int64_t K) { return M == 1 || M * K <= 8192; }
  static size_t bytes(int64_t K, int threads) {
    return (P::bytes(K) + aligned(sizeof(T) * M * K)) * (alone(K) ? threads : 1);
  }

  const Element* x;
  int64_t ldx;

  template <class Before>
  Staged(Team team, const T* from, int64_t ld, int64_t K, const Before& before, char* memory) {
    if (alone(K)) memory += bytes(K, 1) * team.thread;
    const Team workers = alone(K) ? Team{} : team;
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
    if (direct(K, ld)) {
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

template <class T, int M>
size_t linear_bytes(int64_t K, int threads) {
  return Staged<T, M>::bytes(K, threads);
}

// N rows of weights in `count` parts; the residual is [M, N].
template <class T, int M, class Act, class Before>
void linear(Team team, const T* x, int64_t ldx, const Part<T>* parts, int count, const T* residual,
            int64_t N, int64_t K, const Before& before, char* memory) {
  constexpr int W = Vec::W;
  const Staged<T, M> staged(team, x, ldx, K, before, memory);
  const auto [first, last] = team.share(N, BLOCK);
  int64_t start = 0;
  for (int i = 0; i < count; start += parts[i++].n) {
    const Part<T>& part = parts[i];
    const T* const weights[1] = {part.w};
    product<T, M, 1>(
        std::max<int64_t>(first - start, 0), std::min(last - start, part.n), weights, part.ldw, K,
        staged.x, staged.ldx, [&](int64_t n, int rows, const float(*results)[M][BLOCK]) {
          for (int m = 0; m < M; ++m)
            for (int j = 0; j < rows; j += W) {
              const int lanes = std::min(W, rows - j);
              Vec v = Act::of(biased(load(results[0][m] + j), part.bias, n + j, lanes));
              if (residual != nullptr) v = v + load(residual + m * N + start + n + j, lanes);
              store(part.y + m * part.n + n + j, v, lanes);
            }
        });
  }
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
    const auto [first, last] = team.share(I, BLOCK);
    product<T, M, MATS>(
        first, last, both, ldu, K, staged.x, staged.ldx,
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
  const Part<T> part{down, ldd, down_bias, y, N};
  linear<T, M, identity>(team, hidden, I, &part, 1, residual, N, I, Plain{}, rest);
}

}  // namespace dspark
