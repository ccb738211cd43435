// Scores and values of attention for many query rows by dpbf16ps, where there are no tiles
// (AVX-512-BF16). Both work on pairs of numbers that are put together once for all rows, so that no
// sum runs across a vector:
//
//   scores    pairs of a key's numbers, transposed: a key a lane, a pair of the query to all lanes
//   values    pairs of two keys' numbers of a column: a column a lane, a pair of weights in bf16 to
//             all lanes. The sums keep the order of columns that interleaving gives (`column`)
#pragma once
#include "attention_config.h"
#include "transpose.h"

#if defined(DSPARK_DOT)
namespace dspark {

// Query rows that are worked on together: their sums are 16 vectors at most.
template <class C>
struct Together {
  static constexpr int GROUPS = (C::R + 7) / 8, ROWS = (C::R + GROUPS - 1) / GROUPS;
};

// A pair of bfloat16 in all lanes.
inline __attribute__((always_inline)) __m512bh pair_to_all(const bf16* at) {
  int32_t both;
  std::memcpy(&both, at, sizeof(both));
  return (__m512bh)_mm512_set1_epi32(both);
}

// scores[r][j] = q[r] . k[j], for whole groups of 32 keys; those behind the last are anything. Keys
// in two parts end at `rest`. `v`, if not null, is where the values lie that come next.
template <class C>
inline void score_pairs(const Room<C>& room, const bf16* k, int64_t ldk,
                        [[maybe_unused]] const bf16* rest, [[maybe_unused]] int64_t ldr, int keys,
                        float (*scores)[C::KEYS], const bf16* v, int64_t ldv) {
  constexpr int ROWS = Together<C>::ROWS;
  // The values' lines are asked for in order, between the products of the first rows.
  constexpr int LINES = C::DV / 32, ASK = (32 * LINES + C::D / 2 - 1) / (C::D / 2);
  alignas(64) float turned[C::D / 2][2][16];
  for (int j = 0; j < keys; j += 32) {
    for (int half = 0; half < 2; ++half)
      for (int d = 0; d < C::D; d += 32) {
        __m512 in[16];
        for (int i = 0; i < 16; ++i) {
          const int64_t key = std::min(j + 16 * half + i, keys - 1);
          const bf16* at = k + key * ldk + d;
          if constexpr (C::PARTS)
            if (d >= C::DV) at = rest + key * ldr + d - C::DV;
          in[i] = _mm512_loadu_ps(reinterpret_cast<const float*>(at));
        }
        transposed(in, [&](int i, __m512 row) __attribute__((always_inline)) {
          _mm512_store_ps(turned[d / 2 + i][half], row);
        });
      }
    for (int r = 0; r < C::R; r += ROWS) {
      const bf16* q[ROWS];
      for (int i = 0; i < ROWS; ++i) q[i] = room.q[std::min(r + i, C::R - 1)];
      __m512 a[ROWS][2];
      for (int i = 0; i < ROWS; ++i) a[i][0] = a[i][1] = _mm512_setzero_ps();
      for (int d = 0; d < C::D / 2; ++d) {
        const __m512bh low = (__m512bh)_mm512_load_si512(turned[d][0]);
        const __m512bh high = (__m512bh)_mm512_load_si512(turned[d][1]);
        if (r == 0 && v != nullptr)
          for (int line = ASK * d; line < ASK * d + ASK; ++line)
            __builtin_prefetch(v + (j + line / LINES) * ldv + line % LINES * 32, 0, 2);
        for (int i = 0; i < ROWS; ++i) {
          const __m512bh b = pair_to_all(q[i] + 2 * d);
          a[i][0] = _mm512_dpbf16_ps(a[i][0], low, b);
          a[i][1] = _mm512_dpbf16_ps(a[i][1], high, b);
        }
      }
      for (int i = 0; i < ROWS && r + i < C::R; ++i) {
        _mm512_storeu_ps(scores[r + i] + j, a[i][0]);
        _mm512_storeu_ps(scores[r + i] + j + 16, a[i][1]);
      }
    }
  }
}

// out[r] += p[r] V. The weights become bfloat16 where they lie. `soon`, if not null, is where the
// keys lie that come next.
template <class C>
inline void value_pairs(float (*p)[C::KEYS], const bf16* v, int64_t ldv, int keys,
                        float (*out)[C::DVP], const bf16* soon, int64_t ld_soon) {
  constexpr int ROWS = Together<C>::ROWS;
  constexpr int LINES = C::D / 32, PASSES = C::DV / 32, ASK = (2 * LINES + PASSES - 1) / PASSES;
  for (int r = 0; r < C::R; ++r)
    for (int j = 0; j < keys; j += 32) {
      // What lies behind the last key weighs nothing.
      const uint32_t lanes = keys - j < 32 ? (1u << (keys - j)) - 1 : 0xffffffffu;
      const __m512 a = _mm512_maskz_loadu_ps(__mmask16(lanes), p[r] + j);
      const __m512 b = _mm512_maskz_loadu_ps(__mmask16(lanes >> 16), p[r] + j + 16);
      _mm512_storeu_si512(reinterpret_cast<bf16*>(p[r]) + j, (__m512i)_mm512_cvtne2ps_pbh(b, a));
    }
  for (int r = 0; r < C::R; r += ROWS) {
    const bf16* weights[ROWS];
    for (int i = 0; i < ROWS; ++i)
      weights[i] = reinterpret_cast<const bf16*>(p[std::min(r + i, C::R - 1)]);
    for (int d = 0; d < C::DV; d += 32) {
      __m512 a[ROWS][2];
      for (int i = 0; i < ROWS; ++i)
        for (int half = 0; half < 2; ++half)
          a[i][half] = _mm512_load_ps(out[std::min(r + i, C::R - 1)] + d + 16 * half);
      for (int j = 0; j < keys; j += 2) {
        const int64_t other = std::min(j + 1, keys - 1);
        // As above: the keys' lines in order.
        if (r == 0 && soon != nullptr)
          for (int i = 0, line = (d / 32 * ((keys + 1) / 2) + j / 2) * ASK; i < ASK; ++i, ++line)
            __builtin_prefetch(soon + line / LINES * ld_soon + line % LINES * 32, 0, 2);
        const __m512i x = _mm512_loadu_si512(v + j * ldv + d);
        const __m512i y = _mm512_loadu_si512(v + other * ldv + d);
        const __m512bh low = (__m512bh)_mm512_unpacklo_epi16(x, y);
        const __m512bh high = (__m512bh)_mm512_unpackhi_epi16(x, y);
        for (int i = 0; i < ROWS; ++i) {
          const __m512bh b = pair_to_all(weights[i] + j);
          a[i][0] = _mm512_dpbf16_ps(a[i][0], low, b);
          a[i][1] = _mm512_dpbf16_ps(a[i][1], high, b);
        }
      }
      for (int i = 0; i < ROWS && r + i < C::R; ++i)
        for (int half = 0; half < 2; ++half)
          _mm512_store_ps(out[r + i] + d + 16 * half, a[i][half]);
    }
  }
}

}  // namespace dspark
#endif
