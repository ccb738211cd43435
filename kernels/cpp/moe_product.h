// Products of several passes of M rows, and with weights that lie turned, [in][out].
#pragma once
#include "product.h"

namespace dspark {

// `product` for `passes` packed blocks of M rows, `pass` elements apart. A block of the weights is
// read from memory once, and from cache by the passes that follow. done(p, n, count, results).
template <class T, int M, int MATS, class Done>
void product_passes(int64_t first, int64_t last, const T* const (&w)[MATS], int64_t ldw, int64_t K,
                    const typename Packed<T, M>::Element* packed, int64_t ldx, int64_t pass,
                    int64_t passes, Done&& done) {
  if (passes == 1) {
    product<T, M, MATS>(first, last, w, ldw, K, packed, ldx,
                        [&](int64_t n, int count, const auto& results) { done(0, n, count, results); });
    return;
  }
  for (int64_t n = first; n < last; n += BLOCK)
    for (int64_t p = 0; p < passes; ++p)
      product<T, M, MATS>(n, std::min(n + BLOCK, last), w, ldw, K, packed + p * pass, ldx,
                          [&](int64_t at, int count, const auto& results) {
                            done(p, at, count, results);
                          });
}

// R rows of weights with one row of x each: out[r] = w[r] . x[r]. The prefetch, where there is
// one, runs AHEAD in every row and from its end on into next[r]. Rows so different as those of several
// experts stream side by side.
template <class T, int R>
inline void own_rows(const T* const (&w)[R], const T* const (&next)[R],
                     const typename Packed<T, 1>::Element* const (&x)[R], int64_t K,
                     float (&out)[R]) {
  using P = Packed<T, 1>;
  constexpr int W = Vec::W, STEP = P::STEP, COUNT = (R + W - 1) / W * W;
  constexpr int LINE = 64 / int(sizeof(T)) / STEP > 1 ? 64 / int(sizeof(T)) : STEP;
  Vec a[COUNT];
  for (int i = 0; i < COUNT; ++i) a[i] = zero();
  auto steps = [&](int64_t from, int64_t to, const T* const (&ask)[R],
                   int64_t shift) __attribute__((always_inline)) {
    for (int64_t k = from; k < to; k += STEP) {
      const bool whole = k + STEP <= K;
      if (!SEQUENCE && (LINE == STEP || k % LINE == 0))
        for (int r = 0; r < R; ++r) __builtin_prefetch(ask[r] + k + shift, 0, 3);
      for (int r = 0; r < R; ++r) {
        if constexpr (P::FORM == Form::Fused) {
          const Vec c = whole ? load(w[r] + k) : load(w[r] + k, int(K - k));
          a[r] = fma(c, load(x[r] + k), a[r]);
        } else {
#if defined(DSPARK_DOT)
          const __mmask32 lanes = whole ? 0xffffffffu : (1u << (K - k)) - 1;
          const __m512i c = whole ? _mm512_loadu_si512(w[r] + k)
                                  : _mm512_maskz_loadu_epi16(lanes, w[r] + k);
          const __m512i b = _mm512_loadu_si512(x[r] + k);
          a[r].v = _mm512_dpbf16_ps(a[r].v, (__m512bh)c, (__m512bh)b);
#endif
        }
      }
    }
  };
  const int64_t whole = K / STEP * STEP;
  const int64_t ahead = std::min<int64_t>(AHEAD / int64_t(sizeof(T)), whole);
  steps(0, whole - ahead, w, ahead);
  steps(whole - ahead, whole, next, ahead - whole);
  if (whole < K) steps(whole, K, w, 0);
  float flat[COUNT];
  for (int i = 0; i < COUNT; i += W) store(flat + i, sums(a + i));
  for (int r = 0; r < R; ++r) out[r] = flat[r];
}

// The value at m, k of what `pack` made.
template <class T, int M>
inline float packed_at(const typename Packed<T, M>::Element* packed, int64_t ldx, int m, int64_t k) {
  if constexpr (Packed<T, M>::FORM == Form::Tiles) {
    return to_float(packed[k / 2 * (2 * M) + 2 * m + k % 2]);
  } else {
    return to_float(packed[m * ldx + k]);
  }
}

// M rows with C contiguous columns of a matrix [K][...] at w, rows ld apart: sums[m][c]. Columns
// from `live` on are not read.
template <class T, int M, int C>
inline void columns(const T* w, int64_t ld, int64_t K, int live,
                    const typename Packed<T, M>::Element* packed, int64_t ldx, float (&sums)[M][C]) {
  constexpr int W = Vec::W, V = C / W;
  Vec a[M][V];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) a[m][v] = zero();
  for (int64_t k = 0; k < K; ++k) {
    const T* row = w + k * ld;
    for (int c = 0; c < C; c += 64 / int(sizeof(T))) __builtin_prefetch(row + 12 * ld + c, 0, 3);
    float x[M];
    for (int m = 0; m < M; ++m) x[m] = packed_at<T, M>(packed, ldx, m, k);
    if (live >= C) {
      for (int v = 0; v < V; ++v) {
        const Vec b = load(row + v * W);
        for (int m = 0; m < M; ++m) a[m][v] = fma(all(x[m]), b, a[m][v]);
      }
    } else {
      for (int v = 0; v * W < live; ++v) {
        const Vec b = load(row + v * W, std::min(W, live - v * W));
        for (int m = 0; m < M; ++m) a[m][v] = fma(all(x[m]), b, a[m][v]);
      }
    }
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) store(&sums[m][v * W], a[m][v]);
}

// `product_passes` for weights that lie [in][out], rows n of the result `gap` elements apart. With
// two of them and a gap of 2, they alternate: one run of columns has both.
template <class T, int M, int MATS, class Done>
void turned_passes(int64_t first, int64_t last, const T* const (&w)[MATS], int64_t ld, int64_t gap,
                   int64_t K, const typename Packed<T, M>::Element* packed, int64_t ldx,
                   int64_t pass, int64_t passes, Done&& done) {
  // Wide runs for few rows, as far as registers go: memory likes them.
  constexpr int W = Vec::W, REGISTERS = W == 16 ? 16 : 8;
  constexpr int C = REGISTERS / M > 1 ? REGISTERS / M * W : W;
  alignas(64) float sums[M][C];
  alignas(64) float results[MATS][M][C];
  const bool both = MATS == 2 && gap == 2;
  const T* const base = std::min(w[0], w[MATS - 1]);
  const int even = w[0] <= w[MATS - 1] ? 0 : MATS - 1;
  const int64_t step = C / gap;
  for (int64_t n = first; n < last; n += step) {
    const int count = int(std::min<int64_t>(step, last - n));
    for (int64_t p = 0; p < passes; ++p) {
      const auto* x = packed + p * pass;
      if (both) {
        columns<T, M, C>(base + 2 * n, ld, K, 2 * count, x, ldx, sums);
        for (int m = 0; m < M; ++m)
          for (int c = 0; c < count; ++c) {
            results[even][m][c] = sums[m][2 * c];
            results[MATS - 1 - even][m][c] = sums[m][2 * c + 1];
          }
      } else {
        for (int i = 0; i < MATS; ++i) {
          columns<T, M, C>(w[i] + n * gap, ld, K, int((count - 1) * gap) + 1, x, ldx, sums);
          for (int m = 0; m < M; ++m)
            for (int c = 0; c < count; ++c) results[i][m][c] = sums[m][c * gap];
        }
      }
      done(p, n, count, results);
    }
  }
}

}  // namespace dspark
