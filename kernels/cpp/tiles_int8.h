// Attention over an int8 cache on AMX, in integers: keys and values are multiplied as they lie.
//
// The other operand, q or the softmax weights p, is held as 16-bit numbers of one scale a row,
// each as two bytes, 256 high + low, which are columns (or rows) of tiles. That keeps 15 bits of
// it where bfloat16 keeps 8; the sums are exact. Up to 8 query rows share one tile, high bytes in
// lanes 0 to 7 and low ones in 8 to 15, and their scores lie two keys a vector
// (`attention_lanes.h`); more rows take a tile for high bytes and one for low ones for each 16.
//
// V's tile wants the bytes of four keys side by side. Interleaving within 128-bit lanes permutes
// the columns of each group of 64: the sums keep that order (`column8`) until they are written.
// Keys are taken in the order 0, 2, 1, 3 of each four, as packing p likes it.
#pragma once
#include "tiles.h"

#if defined(DSPARK_TILES) && defined(__AMX_INT8__)
#define DSPARK_BYTE_TILES 1

namespace dspark {

inline constexpr int column8(int d) {
  return d / 64 * 64 + d % 16 / 4 * 16 + d % 64 / 16 * 4 + d % 4;
}

template <int R, int D, int DV, int KEYS>
struct alignas(64) ByteRoom {
  static constexpr bool PAIRED = R <= 8;  // two keys a vector of scores: j and KEYS / 2 + j
  static constexpr bool ROWWISE = R <= 4;  // so few rows that each has vectors of its own
  static constexpr int STRIP = 64;
  static constexpr int ROWS = (R + 15) / 16;            // vectors of query rows
  static constexpr int TILES = PAIRED ? 1 : 2 * ROWS;   // of q, and of p
  static constexpr int LIVE = PAIRED ? KEYS / 2 : KEYS;  // vectors of scores for each of ROWS
  int8_t q[TILES][D / 64][16][16][4];
  float s[ROWS][LIVE][16];
  int8_t p[TILES][16][KEYS];
  int8_t v[KEYS / 64][4][16][16][4];
  int8_t k[STRIP][D];
  int32_t sums[2][4][16][16];
  float q_scale[ROWS][16], p_scale[ROWS][16];
};

constexpr float HALF_WORD = 32512;  // 127 * 256

// Row r of the query, `at(d)` in turn.
template <int R, int D, int DV, int KEYS, class At>
inline void split_query(ByteRoom<R, D, DV, KEYS>& room, int r, At&& at) {
  constexpr bool PAIRED = ByteRoom<R, D, DV, KEYS>::PAIRED;
  float most = 0;
  bool nan = false;
  for (int d = 0; d < D; ++d) most = std::max(most, std::fabs(at(d))), nan |= at(d) != at(d);
  room.q_scale[r / 16][r % 16] = nan ? NAN : most / HALF_WORD;
  const float inverse = most > 0 && !nan ? HALF_WORD / most : 0;
  int8_t (*highs)[16][16][4] = room.q[PAIRED ? 0 : r / 16 * 2];
  int8_t (*lows)[16][16][4] = room.q[PAIRED ? 0 : r / 16 * 2 + 1];
  for (int d = 0; d < D; ++d) {
    const int value = int(std::nearbyint(at(d) * inverse)), high = (value + 128) >> 8;
    highs[d / 64][d % 64 / 4][r % 16][d % 4] = int8_t(high);
    lows[d / 64][d % 64 / 4][r % 16 + 8 * PAIRED][d % 4] = int8_t(value - 256 * high);
  }
}

// room.s = q[r] . k[j] * scales[j]; behind `keys` whatever, up to a multiple of 64. ROWWISE it is
// rows[r][j] = q[r] . k[j] instead.
template <int R, int D, int DV, int KEYS>
inline void byte_scores(ByteRoom<R, D, DV, KEYS>& room, const int8_t* k, int64_t ldk, int keys,
                        const float* scales, float (*rows)[KEYS],
                        Follow<int8_t, D, DV, KEYS>& next) {
  using Room = ByteRoom<R, D, DV, KEYS>;
  using Next = Follow<int8_t, D, DV, KEYS>;
  constexpr int STEPS = Next::part(Room::ROWWISE ? 4 : 2,
                                   KEYS / Room::STRIP * Room::TILES * D / 16);
  constexpr int EACH = Room::PAIRED ? 1 : 2;
  for (int from = 0; from < keys; from += Room::STRIP) {
    const int strip = std::min(Room::STRIP, keys - from);
    const int8_t* left = k + from * ldk;
    int64_t ld = ldk;
    if (strip < Room::STRIP) {
      std::memset(room.k, 0, sizeof(room.k));
      for (int j = 0; j < strip; ++j) std::memcpy(room.k[j], left + j * ldk, D);
      left = room.k[0];
      ld = D;
      __asm__ volatile("" : : "r"(left) : "memory");
    }
    for (int tile = 0; tile < Room::TILES; ++tile) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int d = 0; d < D; d += 64) {
        _tile_loadd(5, room.q[tile][d / 64], 64);
        _tile_loadd(4, left + d, ld);
        _tile_dpbssd(0, 4, 5);
        next.go(STEPS);
        _tile_loadd(6, left + 16 * ld + d, ld);
        _tile_dpbssd(1, 6, 5);
        next.go(STEPS);
        _tile_loadd(4, left + 32 * ld + d, ld);
        _tile_dpbssd(2, 4, 5);
        next.go(STEPS);
        _tile_loadd(6, left + 48 * ld + d, ld);
        _tile_dpbssd(3, 6, 5);
        next.go(STEPS);
      }
      int32_t(*to)[16][16] = room.sums[tile % EACH];
      _tile_stored(0, to[0], 64);
      _tile_stored(1, to[1], 64);
      _tile_stored(2, to[2], 64);
      _tile_stored(3, to[3], 64);
      if (tile % EACH != EACH - 1) continue;
      __asm__ volatile("" : : "r"(&room) : "memory");
      if constexpr (Room::ROWWISE) {
        for (int g = 0; g < 4; ++g) {
          __m512 in[16], columns[16];
          for (int i = 0; i < 16; ++i) in[i] = _mm512_load_ps((const float*)to[g][i]);
          transposed(in, [&](int i, __m512 x) __attribute__((always_inline)) { columns[i] = x; });
          for (int r = 0; r < R; ++r) {
            const __m512i high = _mm512_slli_epi32(_mm512_castps_si512(columns[r]), 8);
            const __m512i sum = _mm512_add_epi32(high, _mm512_castps_si512(columns[8 + r]));
            const __m512 scale = _mm512_set1_ps(room.q_scale[0][r]);
            _mm512_storeu_ps(rows[r] + from + 16 * g,
                             _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scale));
          }
        }
      } else if constexpr (Room::PAIRED) {
        const __m256 scale = _mm256_load_ps(room.q_scale[0]);
        float* at = room.s[0][from % Room::LIVE] + from / Room::LIVE * 8;
        for (int j = 0; j < Room::STRIP; ++j) {
          const __m256i high = _mm256_load_si256((const __m256i*)to[0][j]);
          const __m256i low = _mm256_load_si256((const __m256i*)(to[0][j] + 8));
          const __m256i sum = _mm256_add_epi32(_mm256_slli_epi32(high, 8), low);
          const __m256 by = _mm256_mul_ps(scale, _mm256_set1_ps(scales[from + j]));
          _mm256_store_ps(at + 16 * j, _mm256_mul_ps(_mm256_cvtepi32_ps(sum), by));
        }
      } else {
        const __m512 scale = _mm512_load_ps(room.q_scale[tile / 2]);
        for (int j = 0; j < Room::STRIP; ++j) {
          const __m512i high = _mm512_load_si512(room.sums[0][0][j]);
          const __m512i low = _mm512_load_si512(room.sums[1][0][j]);
          const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
          const __m512 by = _mm512_mul_ps(scale, _mm512_set1_ps(scales[from + j]));
          _mm512_store_ps(room.s[tile / 2][from + j], _mm512_mul_ps(_mm512_cvtepi32_ps(sum), by));
        }
      }
    }
  }
}

// room.s, weights that are not negative and at most `most` in each lane, as room.p.
template <int R, int D, int DV, int KEYS>
inline void split_weights(ByteRoom<R, D, DV, KEYS>& room, int rows, __m512 most, __mmask16 nan,
                          Follow<int8_t, D, DV, KEYS>& next, int steps) {
  using Room = ByteRoom<R, D, DV, KEYS>;
  const __m512 by = _mm512_set1_ps(HALF_WORD);
  const __mmask16 some = _mm512_cmp_ps_mask(most, _mm512_setzero_ps(), _CMP_GT_OQ) & ~nan;
  const __m512 inverse = _mm512_maskz_div_ps(some, by, most);
  _mm512_store_ps(room.p_scale[rows],
                  _mm512_mask_mov_ps(_mm512_div_ps(most, by), nan, _mm512_set1_ps(NAN)));
  // Added to a number below 2^16, the number stands in the lowest bits, rounded.
  const __m512 magic = _mm512_set1_ps(12582912.0f);
  const __m512i even = _mm512_set1_epi16(0x00ff), half = _mm512_set1_epi16(0x0080);
  for (int from = 0; from < Room::LIVE; from += 64) {
    __m512 highs[16], lows[16];
    for (int i = 0; i < 16; ++i) {
      __m512i x[4];
      for (int j = 0; j < 4; ++j)
        x[j] = _mm512_castps_si512(
            _mm512_fmadd_ps(_mm512_load_ps(room.s[rows][from + 4 * i + j]), inverse, magic));
      const __m512i a = _mm512_mask_mov_epi16(x[0], 0xaaaaaaaa, _mm512_slli_epi32(x[1], 16));
      const __m512i b = _mm512_mask_mov_epi16(x[2], 0xaaaaaaaa, _mm512_slli_epi32(x[3], 16));
      const __m512i c = _mm512_add_epi16(a, half), d = _mm512_add_epi16(b, half);
      // Of two bytes the even ones of the first and the odd ones of the second.
      lows[i] = _mm512_castsi512_ps(
          _mm512_ternarylogic_epi32(even, a, _mm512_slli_epi16(b, 8), 0xca));
      highs[i] = _mm512_castsi512_ps(
          _mm512_ternarylogic_epi32(even, _mm512_srli_epi16(c, 8), d, 0xca));
      next.go(steps);
    }
    auto put = [&](int tile, int offset) __attribute__((always_inline)) {
      return [&room, from, tile, offset](int i, __m512 row) __attribute__((always_inline)) {
        if constexpr (Room::PAIRED) {
          _mm512_store_ps((float*)(room.p[0][i % 8 + offset] + i / 8 * (KEYS / 2) + from), row);
        } else {
          _mm512_store_ps((float*)(room.p[tile][i] + from), row);
        }
      };
    };
    transposed(highs, put(2 * rows, 0));
    transposed(lows, put(2 * rows + 1, 8));
  }
}

// rows[r], weights that are not negative, as room.p; they are zero behind `keys`, up to a multiple
// of 16.
template <int R, int D, int DV, int KEYS>
inline void split_rows(ByteRoom<R, D, DV, KEYS>& room, const float (*rows)[KEYS], int keys) {
  // Of each four keys the second and the third change places.
  const __m128i order = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
  for (int r = 0; r < R; ++r) {
    __m512 most = _mm512_setzero_ps();
    __mmask16 nan = 0;
    for (int j = 0; j < keys; j += 16) {
      const __m512 x = _mm512_loadu_ps(rows[r] + j);
      nan |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
      most = _mm512_max_ps(x, most);
    }
    const float top = _mm512_reduce_max_ps(most);
    room.p_scale[0][r] = nan ? NAN : top / HALF_WORD;
    const __m512 inverse = _mm512_set1_ps(top > 0 && !nan ? HALF_WORD / top : 0);
    for (int j = 0; j < KEYS; j += 16) {
      __m512i x = _mm512_setzero_si512();
      if (j < keys) x = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(rows[r] + j), inverse));
      const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(128)), 8);
      _mm_store_si128((__m128i*)(room.p[0][r] + j),
                      _mm_shuffle_epi8(_mm512_cvtepi32_epi8(high), order));
      _mm_store_si128((__m128i*)(room.p[0][8 + r] + j),
                      _mm_shuffle_epi8(_mm512_cvtepi32_epi8(x), order));
    }
  }
}

// out[r] += room.p[r] V, columns in the order of `column8`.
template <int R, int D, int DV, int KEYS>
inline void byte_values(ByteRoom<R, D, DV, KEYS>& room, const int8_t* v, int64_t ldv, int keys,
                        float (*out)[DV], Follow<int8_t, D, DV, KEYS>& next) {
  using Room = ByteRoom<R, D, DV, KEYS>;
  using Next = Follow<int8_t, D, DV, KEYS>;
  constexpr int STEPS = Next::part(Room::ROWWISE ? 4 : 2,
                                   DV / 64 * (KEYS / 64) * 16);
  constexpr int EACH = Room::PAIRED ? 1 : 2;
  auto interleave = [&](int strip, int d, auto&& row) __attribute__((always_inline)) {
    for (int i = 0; i < 16; ++i) {
      next.go(STEPS);
      const int at = 64 * strip + 4 * i;
      const __m512i a = row(at, d), b = row(at + 2, d), c = row(at + 1, d), e = row(at + 3, d);
      const __m512i ab = _mm512_unpacklo_epi8(a, b), ba = _mm512_unpackhi_epi8(a, b);
      const __m512i ce = _mm512_unpacklo_epi8(c, e), ec = _mm512_unpackhi_epi8(c, e);
      _mm512_store_si512(room.v[strip][0][i], _mm512_unpacklo_epi16(ab, ce));
      _mm512_store_si512(room.v[strip][1][i], _mm512_unpackhi_epi16(ab, ce));
      _mm512_store_si512(room.v[strip][2][i], _mm512_unpacklo_epi16(ba, ec));
      _mm512_store_si512(room.v[strip][3][i], _mm512_unpackhi_epi16(ba, ec));
    }
  };
  const int strips = (keys + 63) / 64;
  for (int d = 0; d < DV; d += 64) {
    for (int strip = 0; strip < strips; ++strip) {
      if (64 * strip + 64 <= keys) {
        interleave(strip, d, [&](int j, int d) { return _mm512_loadu_si512(v + j * ldv + d); });
      } else {
        interleave(strip, d, [&](int j, int d) {
          return j < keys ? _mm512_loadu_si512(v + j * ldv + d) : _mm512_setzero_si512();
        });
      }
    }
    __asm__ volatile("" : : "r"(&room) : "memory");
    for (int tile = 0; tile < Room::TILES; ++tile) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int strip = 0; strip < strips; ++strip) {
        _tile_loadd(4, room.p[tile][0] + 64 * strip, KEYS);
        _tile_loadd(5, room.v[strip][0], 64);
        _tile_dpbssd(0, 4, 5);
        _tile_loadd(6, room.v[strip][1], 64);
        _tile_dpbssd(1, 4, 6);
        _tile_loadd(5, room.v[strip][2], 64);
        _tile_dpbssd(2, 4, 5);
        _tile_loadd(6, room.v[strip][3], 64);
        _tile_dpbssd(3, 4, 6);
      }
      int32_t(*to)[16][16] = room.sums[tile % EACH];
      _tile_stored(0, to[0], 64);
      _tile_stored(1, to[1], 64);
      _tile_stored(2, to[2], 64);
      _tile_stored(3, to[3], 64);
      if (tile % EACH != EACH - 1) continue;
      __asm__ volatile("" : : "r"(&room) : "memory");
      const int rows = tile / EACH;
      for (int r = 0; r < 16 && 16 * rows + r < R; ++r) {
        const __m512 scale = _mm512_set1_ps(room.p_scale[rows][r]);
        for (int g = 0; g < 4; ++g) {
          const __m512i high = _mm512_load_si512(room.sums[0][g][r]);
          const __m512i low = _mm512_load_si512(Room::PAIRED ? room.sums[0][g][(8 + r) % 16]
                                                             : room.sums[1][g][r]);
          const __m512 sum = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low));
          float* at = out[16 * rows + r] + d + 16 * g;
          _mm512_storeu_ps(at, _mm512_fmadd_ps(sum, scale, _mm512_loadu_ps(at)));
        }
      }
    }
  }
}

}  // namespace dspark
#endif
