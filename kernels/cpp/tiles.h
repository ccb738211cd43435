// The inner products of attention on AMX: a block of keys times up to 16 query rows at once.
//
//   scores    K [16 keys, 32 features] as the left tile, as it lies; q as the right one
//   values    p [16 rows, 32 keys] in bf16 as the left tile; V as the right one, the rows of two
//             keys interleaved, as the instruction wants them
//
// Interleaving by unpacking within 128-bit lanes permutes the columns of each group of 32: the sums
// keep that order (`column`) until they are written. int8 keys and values become bf16 on the way,
// which holds each of them exactly. All tiles are 16 by 64 bytes, padded with zeros.
#pragma once
#include <algorithm>
#include <type_traits>

#include "vec.h"

#if defined(__AMX_BF16__) && defined(__AMX_TILE__)
#define DSPARK_TILES 1

namespace dspark {

// Where column d of V lies in the sums.
inline constexpr int column(int d) {
  return d / 32 * 32 + (d % 8 < 4 ? 0 : 16) + d % 32 / 8 * 4 + d % 4;
}

template <int R, int D, int DV, int KEYS>
struct alignas(64) TileRoom {
  static constexpr int ROWS = (R + 15) / 16;  // tiles of query rows
  static constexpr int STRIP = 64;            // keys whose scores are computed together
  bf16 q[ROWS][D / 2][16][2];
  bf16 p[ROWS * 16][KEYS];
  bf16 v[4][16][16][2];
  bf16 k[STRIP][D];
  float s[4][16][16];
};

inline void configure_square_tiles() {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } c;
  for (int i = 0; i < 8; ++i) c.bytes[i] = 64, c.rows[i] = 16;
  __asm__ volatile("" : : "r"(&c) : "memory");
  _tile_loadconfig(&c);
}

inline __m512i load_bf16(const bf16* x) { return _mm512_loadu_si512(x); }
inline __m512i load_bf16(const int8_t* x) {
  const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)x)));
  const __m512 high =
      _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(x + 16))));
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

// Asks for the next block's keys and values while this one is worked on, a line of each page at a
// time: memory gives more to several readers that are pages apart than to one, and the hardware
// follows each of them. All of it takes STEPS steps.
template <class K, int D, int DV, int KEYS>
struct Follow {
  static constexpr int STEPS = 64, LINE = 64 / int(sizeof(K));
  const K *k, *v;  // null: nothing comes next
  int64_t ldk, ldv;
  int step = 0;

  template <int FEATURES>
  static inline __attribute__((always_inline)) void line(const K* from, int64_t ld, int step) {
    constexpr int LINES = (FEATURES + LINE - 1) / LINE;
    constexpr int ROWS = LINES < STEPS ? STEPS / LINES : 1;  // of one run
    const int row = step / LINES, at = step % LINES * LINE;
    if (row >= ROWS) return;
    for (int j = row; j < KEYS; j += ROWS) __builtin_prefetch(from + j * ld + at, 0, 2);
  }
  inline __attribute__((always_inline)) void go(int steps) {
    if (k == nullptr) return;
    for (int i = 0; i < steps; ++i, ++step) {
      line<D>(k, ldk, step);
      line<DV>(v, ldv, step);
    }
  }
};

// A 16 by 16 block of floats, transposed: `lanes` of the first `rows` rows, which are `ld` apart.
inline void transpose(const float (*from)[16], float* to, int64_t ld, int rows,
                      __mmask16 lanes = 0xffff) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_load_ps(from[i]);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
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
    const __m512 out[4] = {_mm512_shuffle_f32x4(u, x, 0x88), _mm512_shuffle_f32x4(u, x, 0xdd),
                           _mm512_shuffle_f32x4(v, y, 0x88), _mm512_shuffle_f32x4(v, y, 0xdd)};
    for (int l = 0; l < 4; ++l)
      if (4 * l + c < rows) _mm512_mask_storeu_ps(to + (4 * l + c) * ld, lanes, out[l]);
  }
}

// scores[r][j] = q[r] . k[j] for `keys` keys; what lies behind them up to a multiple of 64 is
// whatever.
template <class K, int R, int D, int DV, int KEYS>
inline void tile_scores(TileRoom<R, D, DV, KEYS>& room, const K* k, int64_t ldk, int keys,
                        float (*scores)[KEYS], Follow<K, D, DV, KEYS>& next) {
  using Room = TileRoom<R, D, DV, KEYS>;
  // Half of the steps in here, over all strips and features.
  constexpr int SHARE = (Follow<K, D, DV, KEYS>::STEPS / 2 + KEYS / Room::STRIP * D / 8 - 1) /
                        (KEYS / Room::STRIP * D / 8);
  for (int from = 0; from < keys; from += Room::STRIP) {
    const int strip = std::min(Room::STRIP, keys - from);
    const bf16* left = reinterpret_cast<const bf16*>(k + from * ldk);
    int64_t ld = ldk;
    if (!std::is_same<K, bf16>::value || strip < Room::STRIP) {
      for (int j = 0; j < Room::STRIP; ++j)
        for (int d = 0; d < D; d += 32)
          _mm512_store_si512(room.k[j] + d, j < strip ? load_bf16(k + (from + j) * ldk + d)
                                                      : _mm512_setzero_si512());
      left = room.k[0];
      ld = D;
      __asm__ volatile("" : : "r"(left) : "memory");
    }
    for (int rows = 0; rows < Room::ROWS; ++rows) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      const int steps = rows == 0 ? SHARE : 0;
      for (int d = 0; d < D; d += 32) {
        _tile_loadd(5, room.q[rows][d / 2], 64);
        _tile_loadd(4, left + d, 2 * ld);
        _tile_dpbf16ps(0, 4, 5);
        next.go(steps);
        _tile_loadd(6, left + 16 * ld + d, 2 * ld);
        _tile_dpbf16ps(1, 6, 5);
        next.go(steps);
        _tile_loadd(4, left + 32 * ld + d, 2 * ld);
        _tile_dpbf16ps(2, 4, 5);
        next.go(steps);
        _tile_loadd(6, left + 48 * ld + d, 2 * ld);
        _tile_dpbf16ps(3, 6, 5);
        next.go(steps);
      }
      _tile_stored(0, room.s[0], 64);
      _tile_stored(1, room.s[1], 64);
      _tile_stored(2, room.s[2], 64);
      _tile_stored(3, room.s[3], 64);
      __asm__ volatile("" : : "r"(room.s) : "memory");
      const int count = std::min(16, R - 16 * rows);
      for (int g = 0; g < 4 && from + 16 * g < keys; ++g)
        transpose(room.s[g], scores[16 * rows] + from + 16 * g, KEYS, count);
    }
  }
}

// out[r] += p[r] V, columns in the order of `column`; p is zero behind the keys, up to a multiple
// of 16. A few columns at a time, so that what is interleaved stays in the nearest cache.
template <class K, int R, int D, int DV, int KEYS>
inline void tile_values(TileRoom<R, D, DV, KEYS>& room, const float (*p)[KEYS], const K* v,
                        int64_t ldv, int keys, float (*out)[DV], Follow<K, D, DV, KEYS>& next) {
  using Room = TileRoom<R, D, DV, KEYS>;
  constexpr int PARTS = DV / 32 * (KEYS / 32), SHARE = (Follow<K, D, DV, KEYS>::STEPS / 2 + PARTS - 1) / PARTS;
  const int whole = (keys + 31) / 32 * 32;
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < whole; j += 32) {
      const __m512 low = _mm512_loadu_ps(p[r] + j);
      const __m512 high = j + 16 < keys ? _mm512_loadu_ps(p[r] + j + 16) : _mm512_setzero_ps();
      _mm512_store_si512(room.p[r] + j, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
  auto interleave = [&](int j, int d, int to) __attribute__((always_inline)) {
    for (int i = 0; i < 32; i += 2) {
      const K* row = v + (j + i) * ldv + d;
      const __m512i a = j + i < keys ? load_bf16(row) : _mm512_setzero_si512();
      const __m512i b = j + i + 1 < keys ? load_bf16(row + ldv) : _mm512_setzero_si512();
      _mm512_store_si512(room.v[to][i / 2][0], _mm512_unpacklo_epi16(a, b));
      _mm512_store_si512(room.v[to + 1][i / 2][0], _mm512_unpackhi_epi16(a, b));
    }
  };
  for (int rows = 0; rows < Room::ROWS; rows += 2) {
    const bool both = rows + 1 < Room::ROWS;
    for (int d = 0; d < DV; d += 32) {
      float* to = out[16 * rows] + d;
      float* below = both ? out[16 * rows + 16] + d : to;
      _tile_loadd(0, to, 4 * DV);
      _tile_loadd(1, to + 16, 4 * DV);
      if (both) {
        _tile_loadd(2, below, 4 * DV);
        _tile_loadd(3, below + 16, 4 * DV);
      }
      for (int j = 0; j < whole; j += 32) {
        const int turn = j / 32 % 2 * 2;
        next.go(rows == 0 ? SHARE : 0);
        interleave(j, d, turn);
        __asm__ volatile("" : : "r"(&room) : "memory");
        _tile_loadd(5, room.v[turn], 64);
        _tile_loadd(6, room.v[turn + 1], 64);
        _tile_loadd(4, room.p[16 * rows] + j, 2 * KEYS);
        _tile_dpbf16ps(0, 4, 5);
        _tile_dpbf16ps(1, 4, 6);
        if (both) {
          _tile_loadd(7, room.p[16 * rows + 16] + j, 2 * KEYS);
          _tile_dpbf16ps(2, 7, 5);
          _tile_dpbf16ps(3, 7, 6);
        }
      }
      _tile_stored(0, to, 4 * DV);
      _tile_stored(1, to + 16, 4 * DV);
      if (both) {
        _tile_stored(2, below, 4 * DV);
        _tile_stored(3, below + 16, 4 * DV);
      }
    }
  }
  __asm__ volatile("" : : "r"(out) : "memory");
}

}  // namespace dspark
#endif
