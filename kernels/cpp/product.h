// Skinny matrix products: y[M, N] = x[M, K] W[N, K]^T for M = 1 ... 16, with tiles for more; W
// row-major as it lies.
//
// The weights are read once, from memory, and everything else follows from that. A thread takes a
// contiguous share of W's rows, and reads it as several streams or, for tiles, in blocks of 32 rows;
// a few rows at a time run over K in registers. x stays in cache as a packed copy. Three forms of
// the inner loop:
//
//   Fused    float lanes: W and x widened to float                    any type, any CPU
//   Dot      dpbf16ps: 32 products an instruction                     bf16, AVX-512-BF16, M < 4
//   Tiles    tdpbf16ps: W's rows as the left tile, x as the right     bf16, AMX, M >= 4
//
// More than 16 rows of x are groups of 16: a block of W, in cache by then, meets two at a time.
//
// A software prefetch runs some KiB ahead in each row and, at a row's end, on into a later tile: the
// hardware's own stops at every page. Where a CPU's own does not (SEQUENCE) one row of x goes
// without, and up to four (of float, two) do where W's rows are long.
#pragma once
#include "parallel.h"
#include "product_form.h"
#include "product_streams.h"
#include "product_tiles.h"

namespace dspark {

// Packs columns [first, last) of x, in whole steps: [M][K] with zeros behind K, or for tiles.
template <class T, int M>
void pack(const T* x, int64_t ldx, int64_t K, int64_t first, int64_t last,
          typename Packed<T, M>::Element* to) {
  using P = Packed<T, M>;
  const int64_t Kp = P::padded(K);
  if constexpr (P::FORM == Form::Tiles) {
#if defined(DSPARK_TILES)
    pack_groups<M>(x, ldx, K, Kp, first, last, to);
#endif
  } else {
    for (int m = 0; m < M; ++m)
      for (int64_t k = first; k < last; ++k) {
        const bool inside = k < K;
        if constexpr (P::FORM == Form::Fused) {
          to[m * Kp + k] = inside ? to_float(x[m * ldx + k]) : 0.0f;
        } else {
          to[m * Kp + k] = inside ? x[m * ldx + k] : bf16{0};
        }
      }
  }
}

// The product of rows [first, last) of MATS weights of one shape with x. After each block of rows
// calls done(n, count, results), results[i][m][r] for weight i, row n + r.
// x is packed; where that is x itself, `ldx` is its row stride (tiles do not look at it).
template <class T, int M, int MATS, class Done>
void product(int64_t first, int64_t last, const T* const (&w)[MATS], int64_t ldw, int64_t K,
             const typename Packed<T, M>::Element* packed, [[maybe_unused]] int64_t ldx,
             Done&& done) {
  using P = Packed<T, M>;
  if (first >= last) return;
  if constexpr (P::FORM != Form::Tiles) {
    streams<T, M, MATS, P::FORM>(first, last, w, ldw, K, packed, ldx, done);
  } else {
#if defined(DSPARK_TILES)
    static_assert(MATS <= 2, "a product takes one or two weights");
    alignas(64) float results[MATS][M][BLOCK];
    configure_square_tiles();
    const int64_t Kp = P::padded(K);
    for (int64_t n = first; n < last; n += BLOCK) {
      const int count = int(std::min<int64_t>(BLOCK, last - n));
      const bf16* wa = w[0] + n * ldw;
      const int64_t rest = std::min<int64_t>(BLOCK, last - n - BLOCK);
      const Next after(wa + BLOCK * ldw, rest * ldw * 2, K / 32);
      if constexpr (MATS == 1) {
        tile_block<M>(wa, count, ldw, after, packed, Kp, K, &results[0][0][0]);
      } else {
        const bf16* wb = w[1] + n * ldw;
        const Next other(wb, count * ldw * 2, K / 32);
        tile_block<M>(wa, count, ldw, other, packed, Kp, K, &results[0][0][0]);
        tile_block<M>(wb, count, ldw, after, packed, Kp, K, &results[1][0][0]);
      }
      done(n, count, results);
    }
    _tile_release();
#endif
  }
}

}  // namespace dspark
