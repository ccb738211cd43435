// The matrix products of attention on AMX: a block of keys times 16 query rows at once.
//
//   scores    K [16 keys, 32 features] as the left tile, as it lies; q as the right one, so that a
//             key's scores lie side by side, a query row a lane (`attention_lanes.h`)
//   values    p [16 rows, 32 keys] in bf16 as the left tile; V as the right one, the rows of two
//             keys interleaved, as the instruction wants them
//
// Interleaving by unpacking within 128-bit lanes permutes the columns of each group of 32: the sums
// keep that order (`column`) until they are written. int8 keys and values become bf16 on the way,
// which holds each of them exactly. All tiles are 16 by 64 bytes, padded with zeros.
#pragma once
#include <algorithm>
#include <type_traits>

#include "transpose.h"

#if defined(__AMX_BF16__) && defined(__AMX_TILE__)
#define DSPARK_TILES 1

namespace dspark {

template <int R, int D, int DV, int KEYS>
struct alignas(64) TileRoom {
  static constexpr int ROWS = (R + 15) / 16;  // tiles of query rows
  static constexpr int STRIP = 64;            // keys whose scores are computed together
  bf16 q[ROWS][D / 2][16][2];
  float s[ROWS][KEYS][16];
  bf16 p[ROWS * 16][KEYS];
  bf16 v[2][KEYS / 16][16][16][2];
  bf16 k[STRIP][D];
};

// Eight tiles of 16 rows of 64 bytes.
inline void configure_square_tiles() {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } c;
  for (int i = 0; i < 8; ++i) c.bytes[i] = 64, c.rows[i] = 16;
  // GCC 12 may drop the stores above without it.
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

// Asks for the next block's keys and values while this one is worked on, a line of each of RUNS
// rows a step. Steps are strewn finely over all that is done with a block: a core has few requests
// under way at a time, and a burst of them would keep the loads behind it waiting. Wide rows are
// read into the second cache as runs that are pages apart: memory gives more to several readers.
// Those of an int8 cache go to the first one, in order: there it is the loads that are waited for.
template <class K, int D, int DV, int KEYS>
struct Follow {
  static constexpr int LINE = 64 / int(sizeof(K)), ROW = (std::max(D, DV) + LINE - 1) / LINE * LINE;
  static constexpr bool NEAR = sizeof(K) == 1;
  // Steps of a block: whole rows in order, or a line of each run.
  static constexpr int RUNS = 4, STEPS = NEAR ? KEYS : KEYS / RUNS * (ROW / LINE);
  const K *k, *v;  // null: nothing comes next
  int64_t ldk, ldv;
  int at = 0, left = k == nullptr ? 0 : NEAR ? KEYS : KEYS / RUNS;

  inline __attribute__((always_inline)) void go(int steps) {
    if (left <= 0) return;
    if constexpr (NEAR) {
      left -= steps;
      for (int i = 0; i < steps; ++i, k += ldk, v += ldv)
        for (int d = 0; d < ROW; d += LINE) ask(k + d), ask(v + d);
      return;
    }
    for (int i = 0; i < steps; ++i) {
      for (int r = 0; r < RUNS; ++r) ask(k + at + r * (KEYS / RUNS) * ldk);
      for (int r = 0; r < RUNS; ++r) ask(v + at + r * (KEYS / RUNS) * ldv);
      at += LINE;
      if (at == ROW) at = 0, --left, k += ldk, v += ldv;
    }
  }
  static inline __attribute__((always_inline)) void ask(const K* at) {
    if constexpr (NEAR) {
      __builtin_prefetch(at, 0, 3);
    } else {
      __builtin_prefetch(at, 0, 2);
    }
  }
  // Steps of each of `calls` calls that take `share` eighths of all together.
  static constexpr int part(int share, int calls) {
    return (STEPS * share / 8 + calls - 1) / calls;
  }
};

// room.s[r / 16][j][r % 16] = q[r] . k[j] for `keys` keys; what lies behind them up to a multiple
// of 64 is whatever.
template <class K, int R, int D, int DV, int KEYS>
inline void tile_scores(TileRoom<R, D, DV, KEYS>& room, const K* k, int64_t ldk, int keys,
                        Follow<K, D, DV, KEYS>& next) {
  using Room = TileRoom<R, D, DV, KEYS>;
  constexpr int STEPS = Follow<K, D, DV, KEYS>::part(2, KEYS / Room::STRIP * Room::ROWS * D / 8);
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
    // Two tiles of rows at a time, so that a tile of keys is loaded once for both; one alone takes
    // the whole strip.
    int rows = 0;
    for (; rows + 1 < Room::ROWS; rows += 2)
      for (int part = 0; part < Room::STRIP; part += 32) {
        const bf16* at = left + part * ld;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int d = 0; d < D; d += 32) {
          _tile_loadd(4, at + d, 2 * ld);
          _tile_loadd(6, room.q[rows][d / 2], 64);
          _tile_dpbf16ps(0, 4, 6);
          next.go(STEPS);
          _tile_loadd(7, room.q[rows + 1][d / 2], 64);
          _tile_dpbf16ps(1, 4, 7);
          next.go(STEPS);
          _tile_loadd(5, at + 16 * ld + d, 2 * ld);
          _tile_dpbf16ps(2, 5, 6);
          next.go(STEPS);
          _tile_dpbf16ps(3, 5, 7);
          next.go(STEPS);
        }
        _tile_stored(0, room.s[rows][from + part], 64);
        _tile_stored(1, room.s[rows + 1][from + part], 64);
        _tile_stored(2, room.s[rows][from + part + 16], 64);
        _tile_stored(3, room.s[rows + 1][from + part + 16], 64);
      }
    for (; rows < Room::ROWS; ++rows) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int d = 0; d < D; d += 32) {
        _tile_loadd(5, room.q[rows][d / 2], 64);
        _tile_loadd(4, left + d, 2 * ld);
        _tile_dpbf16ps(0, 4, 5);
        next.go(STEPS);
        _tile_loadd(6, left + 16 * ld + d, 2 * ld);
        _tile_dpbf16ps(1, 6, 5);
        next.go(STEPS);
        _tile_loadd(4, left + 32 * ld + d, 2 * ld);
        _tile_dpbf16ps(2, 4, 5);
        next.go(STEPS);
        _tile_loadd(6, left + 48 * ld + d, 2 * ld);
        _tile_dpbf16ps(3, 6, 5);
        next.go(STEPS);
      }
      _tile_stored(0, room.s[rows][from], 64);
      _tile_stored(1, room.s[rows][from + 16], 64);
      _tile_stored(2, room.s[rows][from + 32], 64);
      _tile_stored(3, room.s[rows][from + 48], 64);
    }
  }
  __asm__ volatile("" : : "r"(&room) : "memory");
}

// out[r] += room.p[r] V, columns in the order of `column`; p is zero behind the keys, up to a
// multiple of 32. A few columns at a time, so that what is interleaved stays in the nearest cache.
template <class K, int R, int D, int DV, int KEYS>
inline void tile_values(TileRoom<R, D, DV, KEYS>& room, const K* v, int64_t ldv, int keys,
                        float (*out)[DV], Follow<K, D, DV, KEYS>& next) {
  using Room = TileRoom<R, D, DV, KEYS>;
  constexpr int STEPS = Follow<K, D, DV, KEYS>::part(4, DV * KEYS / 64);
  const int whole = (keys + 31) / 32 * 32;
  const auto interleave = [&](int j, int d, bf16 (*to)[16][16][2]) __attribute__((always_inline)) {
    const K* row = v + j * ldv + d;
    if (j + 32 <= keys) {
      for (int i = 0; i < 16; ++i, row += 2 * ldv) {
        const __m512i a = load_bf16(row), b = load_bf16(row + ldv);
        next.go(STEPS);
        _mm512_store_si512(to[0][i][0], _mm512_unpacklo_epi16(a, b));
        _mm512_store_si512(to[1][i][0], _mm512_unpackhi_epi16(a, b));
      }
      return;
    }
    for (int i = 0; i < 16; ++i, row += 2 * ldv) {
      const __m512i a = j + 2 * i < keys ? load_bf16(row) : _mm512_setzero_si512();
      const __m512i b = j + 2 * i + 1 < keys ? load_bf16(row + ldv) : _mm512_setzero_si512();
      _mm512_store_si512(to[0][i][0], _mm512_unpacklo_epi16(a, b));
      _mm512_store_si512(to[1][i][0], _mm512_unpackhi_epi16(a, b));
    }
  };
  // While 32 columns are multiplied the next 32 are interleaved.
  for (int j = 0; j < whole; j += 32) interleave(j, 0, room.v[0] + j / 16);
  for (int d = 0; d < DV; d += 32) {
    const auto from = room.v[d / 32 % 2], into = room.v[d / 32 % 2 ^ 1];
    __asm__ volatile("" : : "r"(&room) : "memory");
    for (int rows = 0; rows < Room::ROWS; rows += 2) {
      const bool both = rows + 1 < Room::ROWS;
      float* to = out[16 * rows] + d;
      float* below = both ? out[16 * rows + 16] + d : to;
      _tile_loadd(0, to, 4 * DV);
      _tile_loadd(1, to + 16, 4 * DV);
      if (both) {
        _tile_loadd(2, below, 4 * DV);
        _tile_loadd(3, below + 16, 4 * DV);
      }
      for (int j = 0; j < whole; j += 32) {
        _tile_loadd(5, from[j / 16], 64);
        _tile_loadd(4, room.p[16 * rows] + j, 2 * KEYS);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(6, from[j / 16 + 1], 64);
        _tile_dpbf16ps(1, 4, 6);
        if (both) {
          _tile_loadd(7, room.p[16 * rows + 16] + j, 2 * KEYS);
          _tile_dpbf16ps(2, 7, 5);
          _tile_dpbf16ps(3, 7, 6);
        }
        if (rows == 0 && d + 32 < DV) interleave(j, d + 32, into + j / 16);
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
