// Products with a matrix for each of a batch, y[b] = x[b] W[b], of up to 16 rows: those of latent
// attention's heads with their slices of a projection's weight.
//
// A bias of the columns, if there is one, is the same for every matrix: a linear layer whose weight
// lies [in, out] is a batch of one.
//
// Each matrix is read once, where it lies: W[b] is [K, N] with unit stride along either. Work is cut
// by matrix and columns, so that few large matrices occupy all threads as many small ones do.
#pragma once
#include "moe_product.h"

namespace dspark {

// TURNED: columns of W lie side by side, else those numbers that a sum runs over.
template <class T, int M, bool TURNED>
struct Batched {
  using P = Packed<T, M>;

  const T* x;
  int64_t x_b, x_m;
  const T* w;
  int64_t w_b, ldw;
  T* y;
  int64_t y_b, y_m;
  int64_t batch, K, N;
  const T* bias;

  static size_t bytes(int64_t K, int threads) { return P::bytes(K) * threads; }

  void run(Team team, char* memory) const {
    auto* packed = reinterpret_cast<typename P::Element*>(memory + P::bytes(K) * team.thread);
    const int64_t blocks = (N + BLOCK - 1) / BLOCK;
    const auto [first, last] = team.share(batch * blocks);
    for (int64_t at = first; at < last;) {
      const int64_t b = at / blocks, end = std::min(last, (b + 1) * blocks);
      pack<T, M>(x + b * x_b, x_m, K, 0, P::padded(K), packed);
      columns_of(b, at % blocks * BLOCK, std::min(N, (end - b * blocks) * BLOCK), packed);
      at = end;
    }
  }

 private:
  void columns_of(int64_t b, int64_t first, int64_t last,
                  const typename P::Element* packed) const {
    const T* const weights[1] = {w + b * w_b};
    const auto done = [&](int64_t, int64_t n, int count, const auto& results) {
      for (int m = 0; m < M; ++m)
        for (int j = 0; j < count; j += Vec::W) {
          const int left = std::min(Vec::W, count - j);
          Vec sum = load(&results[0][m][j]);
          if (bias) sum = sum + load(bias + n + j, left);
          store(y + b * y_b + m * y_m + n + j, sum, left);
        }
    };
    const int64_t ldx = P::padded(K);
    if constexpr (TURNED) {
      turned_passes<T, M, 1>(first, last, weights, ldw, 1, K, packed, ldx, 0, 1, done);
    } else {
      product_passes<T, M, 1>(first, last, weights, ldw, K, packed, ldx, 0, 1, done);
    }
  }
};

}  // namespace dspark
