// Products of int8 weights, row-major as they lie, with x as whole numbers of 3 or 4 bytes (AMX).
//
// A row of x over a power of two is 3 digits to base 256 a number (4 where x is float32), from -128
// to 127. Half types keep 22 bits of the row's largest number so, and what is at least 2^-14 of it
// is exact as a bfloat16; float32 keeps 30 bits. 16 rows of W by 64 numbers are the left tile, the
// digits the right one: a digit of a row of x is a column of 4 bytes. All sums are exact, and scaled
// once.
#pragma once
#include "product_int.h"

#if defined(DSPARK_PLANES)

namespace dspark {

constexpr int64_t SUMMABLE = 65536;  // numbers whose products with digits an int32 holds

// M rows of x as digits: tiles of EACH rows, [tile][K / 4][COLUMNS][4], then a scale a row.
template <class T, int M>
struct Digits {
  static constexpr int COUNT = std::is_same<T, float>::value ? 4 : 3;  // digits of a number
  static constexpr int EACH = 16 / COUNT;                              // rows in a tile
  static constexpr int TILES = (M + EACH - 1) / EACH;
  static constexpr int COLUMNS = TILES == 1 ? M * COUNT : 16;

  static int64_t padded(int64_t K) { return (K + 63) / 64 * 64; }
  static int64_t tile_bytes(int64_t K) { return padded(K) * COLUMNS; }
  // A tile's load reaches up to a line beyond the last row.
  static size_t bytes(int64_t K) { return aligned(TILES * tile_bytes(K) + 64) + 64; }
  static float* scales(int8_t* x, int64_t K) {
    return reinterpret_cast<float*>(x + aligned(TILES * tile_bytes(K) + 64));
  }

  // Row m, of K numbers.
  static void pack(const T* row, int m, int64_t K, int8_t* x) {
    // At most 2^(8 COUNT - 2), so that the first digit is one.
    const Whole whole = whole_row(row, K, 8 * COUNT - 2);
    scales(x, K)[m] = whole.scale;
    const __m512 by = _mm512_set1_ps(whole.by);
    int8_t* to = x + m / EACH * tile_bytes(K) + m % EACH * COUNT * 4;
    alignas(16) int8_t digits[16];
    for (int64_t k = 0; k < padded(K); k += 16) {
      const int left = int(std::min<int64_t>(16, K - k));
      const __m512 v = left > 0 ? load(row + k, left).v : _mm512_setzero_ps();
      __m512i y = _mm512_cvtps_epi32(_mm512_mul_ps(v, by));
      for (int digit = 0; digit < COUNT; ++digit) {
        _mm_store_si128((__m128i*)digits, _mm512_cvtepi32_epi8(y));
        // What is left behind the digit, which is y's lowest byte with its sign.
        y = _mm512_srai_epi32(_mm512_add_epi32(y, _mm512_set1_epi32(128)), 8);
        for (int i = 0; i < 4; ++i)
          std::memcpy(to + (k / 4 + i) * COLUMNS * 4 + digit * 4, digits + 4 * i, 4);
      }
    }
  }
};

// Tiles 0, 1: results of 16 rows of W with one and another tile of x; 2, 3: of the next 16 rows;
// 4, 5: W; 6, 7: x.

// Up to 16 rows by 64 numbers of W, with zeros around them.
inline void copy_bytes(const int8_t* w, int64_t ldw, int rows, int64_t columns, int8_t (*to)[64]) {
  std::memset(to, 0, 16 * 64);
  for (int r = 0; r < rows; ++r) std::memcpy(to[r], w + r * ldw, columns);
}

// Up to 32 rows of W with tiles FROM ... FROM + MORE of x: adds to results[m][row].
template <class T, int M, int FROM, bool MORE>
inline void plane_block(const int8_t* w, int rows, int64_t ldw, Next next, const int8_t* x,
                        const float* scales, int64_t K, int64_t first, int64_t last, bool fresh,
                        float (*results)[BLOCK]) {
  using D = Digits<T, M>;
  alignas(64) float sums[4][16][16];
  alignas(64) int8_t edge[2][16][64];
  const int8_t* xa = x + FROM * D::tile_bytes(K);
  const int8_t* xb = xa + D::tile_bytes(K);
  const int8_t* wb = w + 16 * ldw;
  constexpr int LD = 4 * D::COLUMNS;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const int64_t whole = rows == BLOCK ? first + (last - first) / 64 * 64 : first;
  int64_t k = first;
  for (; k < whole; k += 64) {
    next.step();
    _tile_loadd(6, xa + k * D::COLUMNS, LD);
    _tile_loadd(4, w + k, ldw);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(5, wb + k, ldw);
    _tile_dpbssd(2, 5, 6);
    if constexpr (MORE) {
      _tile_loadd(7, xb + k * D::COLUMNS, LD);
      _tile_dpbssd(1, 4, 7);
      _tile_dpbssd(3, 5, 7);
    }
  }
  for (; k < last; k += 64) {
    const int64_t columns = std::min<int64_t>(64, last - k);
    copy_bytes(w + k, ldw, std::min(rows, 16), columns, edge[0]);
    copy_bytes(wb + k, ldw, std::max(rows - 16, 0), columns, edge[1]);
    __asm__ volatile("" : : "r"(edge) : "memory");
    _tile_loadd(6, xa + k * D::COLUMNS, LD);
    _tile_loadd(4, edge[0], 64);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(5, edge[1], 64);
    _tile_dpbssd(2, 5, 6);
    if constexpr (MORE) {
      _tile_loadd(7, xb + k * D::COLUMNS, LD);
      _tile_dpbssd(1, 4, 7);
      _tile_dpbssd(3, 5, 7);
    }
  }
  _tile_stored(0, sums[0], 64);
  _tile_stored(2, sums[2], 64);
  if constexpr (MORE) {
    _tile_stored(1, sums[1], 64);
    _tile_stored(3, sums[3], 64);
  }
  __asm__ volatile("" : : "r"(sums) : "memory");
  for (int part = 0; part < (MORE ? 4 : 3); part += MORE ? 1 : 2) {
    __m512 in[16], digit[16];
    for (int i = 0; i < 16; ++i) in[i] = _mm512_load_ps(sums[part][i]);
    transposed(in, [&](int i, __m512 row) __attribute__((always_inline)) { digit[i] = row; });
    const int from = (FROM + part % 2) * D::EACH;
    for (int i = 0; i < D::EACH && from + i < M; ++i) {
      __m512 y = _mm512_cvtepi32_ps((__m512i)digit[i * D::COUNT + D::COUNT - 1]);
      for (int d = D::COUNT - 2; d >= 0; --d)
        y = _mm512_fmadd_ps(y, _mm512_set1_ps(256),
                            _mm512_cvtepi32_ps((__m512i)digit[i * D::COUNT + d]));
      float* to = results[from + i] + part / 2 * 16;
      y = _mm512_mul_ps(y, _mm512_set1_ps(scales[from + i]));
      _mm512_store_ps(to, fresh ? y : _mm512_add_ps(y, _mm512_load_ps(to)));
    }
  }
}

// All M rows of x; W comes from memory the first time, from cache after.
template <class T, int M, int FROM = 0>
inline void plane_blocks(const int8_t* w, int rows, int64_t ldw, Next next, const int8_t* x,
                         const float* scales, int64_t K, float (*results)[BLOCK]) {
  constexpr bool MORE = FROM + 1 < Digits<T, M>::TILES;
  for (int64_t k = 0; k < K; k += SUMMABLE)
    plane_block<T, M, FROM, MORE>(w, rows, ldw, next, x, scales, K, k, std::min(K, k + SUMMABLE),
                                  k == 0, results);
  if constexpr (FROM + 2 < Digits<T, M>::TILES)
    plane_blocks<T, M, FROM + 2>(w, rows, ldw, Next{}, x, scales, K, results);
}

}  // namespace dspark
#endif
