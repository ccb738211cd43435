// Blocks of 16 by 16 values of 32 bits, transposed in registers, and columns in the order that
// unpacking pairs of rows leaves them in (AVX-512).
#pragma once
#include "vec.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)

namespace dspark {

// A 16 by 16 block of 32-bit values, transposed: put(i, row i).
template <class Put>
inline __attribute__((always_inline)) void transposed(const __m512 (&in)[16], Put&& put) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(in[i], in[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(in[i], in[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      const __m512d u = (__m512d)b[i + j], v = (__m512d)b[i + 2 + j];
      a[i + 2 * j] = (__m512)_mm512_unpacklo_pd(u, v);
      a[i + 2 * j + 1] = (__m512)_mm512_unpackhi_pd(u, v);
    }
  // a[4 g + c] holds, in 128-bit lane l, column 4 l + c of rows 4 g ... 4 g + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512 u = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x44);
    const __m512 v = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xee);
    const __m512 x = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x44);
    const __m512 y = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xee);
    put(c, _mm512_shuffle_f32x4(u, x, 0x88));
    put(4 + c, _mm512_shuffle_f32x4(u, x, 0xdd));
    put(8 + c, _mm512_shuffle_f32x4(v, y, 0x88));
    put(12 + c, _mm512_shuffle_f32x4(v, y, 0xdd));
  }
}

// A 16 by 16 block of floats, transposed: the first `rows` rows, which are `ld` apart.
template <int ROWS>
inline void transpose(const float (*from)[16], float* to, int64_t ld) {
  __m512 a[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_load_ps(from[i]);
  transposed(a, [&](int i, __m512 row) __attribute__((always_inline)) {
    if (i < ROWS) _mm512_store_ps(to + i * ld, row);
  });
}

// A 16 by 16 block of floats, transposed: `lanes` of the first `rows` rows, which are `ld` apart.
inline void transpose(const float (*from)[16], float* to, int64_t ld, int rows,
                      __mmask16 lanes = 0xffff) {
  __m512 a[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_load_ps(from[i]);
  transposed(a, [&](int i, __m512 row) {
    if (i < rows) _mm512_mask_storeu_ps(to + i * ld, lanes, row);
  });
}

// Where column d lies in sums over pairs of rows: two vectors, of the low and the high half of each
// four pairs.
inline constexpr int column(int d) {
  return d / 32 * 32 + (d % 8 < 4 ? 0 : 16) + d % 32 / 8 * 4 + d % 4;
}

// 32 columns of the sums, in their own order.
inline void in_order(const float* sums, float* to) {
  // Lanes of four: 0, 4 of the first vector and the second in turns, then those behind them.
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  const __m512 a = _mm512_load_ps(sums), b = _mm512_load_ps(sums + 16);
  _mm512_store_ps(to, _mm512_permutex2var_ps(a, low, b));
  _mm512_store_ps(to + 16, _mm512_permutex2var_ps(a, high, b));
}

}  // namespace dspark
#endif
