// Attention over an int8 cache on AMX, in integers: keys and values are multiplied as they lie.
//
// The other operand, q or the softmax weights p, is held as 16-bit numbers of one scale a row, each
// as two bytes, 256 high + low, which are two columns (or rows) of a tile. That keeps 15 bits of it
// where bfloat16 keeps 8; the sums are exact. Up to 8 query rows fit a tile.
//
// V's tile wants the bytes of four keys side by side. Interleaving within 128-bit lanes permutes the
// columns of each group of 64: the sums keep that order (`column8`) until they are written.
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
  static constexpr int STRIP = 64;
  int8_t q[D / 64][16][16][4];  // columns 2 r and 2 r + 1: row r's high and low bytes
  int8_t p[16][KEYS];           // rows 2 r and 2 r + 1, likewise
  int8_t v[4][16][16][4];
  int8_t k[STRIP][D];
  int32_t s[4][16][16];
  float t[16][STRIP];
  float q_scale[R], p_scale[R];
};

constexpr float HALF_WORD = 32512;  // 127 * 256

// Row r of the query, `at(d)` in turn.
template <class Room, class At>
inline void split_query(Room& room, int r, int D, At&& at) {
  float most = 0;
  bool nan = false;
  for (int d = 0; d < D; ++d) most = std::max(most, std::fabs(at(d))), nan |= at(d) != at(d);
  room.q_scale[r] = nan ? NAN : most / HALF_WORD;
  const float inverse = most > 0 && !nan ? HALF_WORD / most : 0;
  for (int d = 0; d < D; ++d) {
    const int value = int(std::nearbyint(at(d) * inverse)), high = (value + 128) >> 8;
    room.q[d / 64][d % 64 / 4][2 * r][d % 4] = int8_t(high);
    room.q[d / 64][d % 64 / 4][2 * r + 1][d % 4] = int8_t(value - 256 * high);
  }
}

// scores[r][j] = q[r] . k[j], without the key's scale; behind `keys` whatever, up to 64.
template <int R, int D, int DV, int KEYS>
inline void byte_scores(ByteRoom<R, D, DV, KEYS>& room, const int8_t* k, int64_t ldk, int keys,
                        float (*scores)[KEYS], Follow<int8_t, D, DV, KEYS>& next) {
  using Room = ByteRoom<R, D, DV, KEYS>;
  constexpr int PARTS = KEYS / Room::STRIP * D / 16, SHARE = (Follow<int8_t, D, DV, KEYS>::STEPS / 2 + PARTS - 1) / PARTS;
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
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int d = 0; d < D; d += 64) {
      _tile_loadd(5, room.q[d / 64], 64);
      _tile_loadd(4, left + d, ld);
      _tile_dpbssd(0, 4, 5);
      next.go(SHARE);
      _tile_loadd(6, left + 16 * ld + d, ld);
      _tile_dpbssd(1, 6, 5);
      next.go(SHARE);
      _tile_loadd(4, left + 32 * ld + d, ld);
      _tile_dpbssd(2, 4, 5);
      next.go(SHARE);
      _tile_loadd(6, left + 48 * ld + d, ld);
      _tile_dpbssd(3, 6, 5);
      next.go(SHARE);
    }
    _tile_stored(0, room.s[0], 64);
    _tile_stored(1, room.s[1], 64);
    _tile_stored(2, room.s[2], 64);
    _tile_stored(3, room.s[3], 64);
    __asm__ volatile("" : : "r"(room.s) : "memory");
    for (int g = 0; g < 4; ++g)
      transpose(reinterpret_cast<const float(*)[16]>(room.s[g]), room.t[0] + 16 * g, Room::STRIP,
                2 * R);
    for (int r = 0; r < R; ++r) {
      const __m512 scale = _mm512_set1_ps(room.q_scale[r]);
      for (int j = 0; j < Room::STRIP; j += 16) {
        const __m512i high = _mm512_castps_si512(_mm512_load_ps(room.t[2 * r] + j));
        const __m512i low = _mm512_castps_si512(_mm512_load_ps(room.t[2 * r + 1] + j));
        const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
        _mm512_storeu_ps(scores[r] + from + j, _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scale));
      }
    }
  }
}

// Splits p, which is not negative and zero behind the keys up to a multiple of 16.
template <int R, int D, int DV, int KEYS>
inline void split_weights(ByteRoom<R, D, DV, KEYS>& room, const float (*p)[KEYS], int keys) {
  for (int r = 0; r < R; ++r) {
    __m512 most = _mm512_setzero_ps();
    __mmask16 nan = 0;
    for (int j = 0; j < keys; j += 16) {
      const __m512 x = _mm512_loadu_ps(p[r] + j);
      nan |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
      most = _mm512_max_ps(most, x);
    }
    const float top = _mm512_reduce_max_ps(most);
    room.p_scale[r] = nan ? NAN : top / HALF_WORD;
    const __m512 inverse = _mm512_set1_ps(top > 0 && !nan ? HALF_WORD / top : 0);
    for (int j = 0; j < KEYS; j += 16) {
      __m512i value = _mm512_setzero_si512();
      if (j < keys) value = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(p[r] + j), inverse));
      const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(value, _mm512_set1_epi32(128)), 8);
      const __m512i low = _mm512_sub_epi32(value, _mm512_slli_epi32(high, 8));
      _mm_store_si128((__m128i*)(room.p[2 * r] + j), _mm512_cvtepi32_epi8(high));
      _mm_store_si128((__m128i*)(room.p[2 * r + 1] + j), _mm512_cvtepi32_epi8(low));
    }
  }
}

// out[r] += p[r] V, columns in the order of `column8`.
template <int R, int D, int DV, int KEYS>
inline void byte_values(ByteRoom<R, D, DV, KEYS>& room, const float (*p)[KEYS], const int8_t* v,
                        int64_t ldv, int keys, float (*out)[DV],
                        Follow<int8_t, D, DV, KEYS>& next) {
  constexpr int PARTS = DV / 64 * (KEYS / 64) * 16, EVERY = std::max(1, 2 * PARTS / Follow<int8_t, D, DV, KEYS>::STEPS);
  split_weights(room, p, keys);
  auto row = [&](int j, int d) __attribute__((always_inline)) {
    return j < keys ? _mm512_loadu_si512(v + j * ldv + d) : _mm512_setzero_si512();
  };
  for (int d = 0; d < DV; d += 64) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int j = 0; j < keys; j += 64) {
      for (int i = 0; i < 16; ++i) {
        if (i % EVERY == 0) next.go((Follow<int8_t, D, DV, KEYS>::STEPS / 2 * EVERY + PARTS - 1) / PARTS);
        const int at = j + 4 * i;
        const __m512i a = row(at, d), b = row(at + 1, d), c = row(at + 2, d), e = row(at + 3, d);
        const __m512i ab = _mm512_unpacklo_epi8(a, b), ba = _mm512_unpackhi_epi8(a, b);
        const __m512i ce = _mm512_unpacklo_epi8(c, e), ec = _mm512_unpackhi_epi8(c, e);
        _mm512_store_si512(room.v[0][i], _mm512_unpacklo_epi16(ab, ce));
        _mm512_store_si512(room.v[1][i], _mm512_unpackhi_epi16(ab, ce));
        _mm512_store_si512(room.v[2][i], _mm512_unpacklo_epi16(ba, ec));
        _mm512_store_si512(room.v[3][i], _mm512_unpackhi_epi16(ba, ec));
      }
      __asm__ volatile("" : : "r"(&room) : "memory");
      _tile_loadd(4, room.p[0] + j, KEYS);
      _tile_loadd(5, room.v[0], 64);
      _tile_dpbssd(0, 4, 5);
      _tile_loadd(6, room.v[1], 64);
      _tile_dpbssd(1, 4, 6);
      _tile_loadd(5, room.v[2], 64);
      _tile_dpbssd(2, 4, 5);
      _tile_loadd(6, room.v[3], 64);
      _tile_dpbssd(3, 4, 6);
    }
    _tile_stored(0, room.s[0], 64);
    _tile_stored(1, room.s[1], 64);
    _tile_stored(2, room.s[2], 64);
    _tile_stored(3, room.s[3], 64);
    __asm__ volatile("" : : "r"(room.s) : "memory");
    for (int r = 0; r < R; ++r) {
      const __m512 scale = _mm512_set1_ps(room.p_scale[r]);
      for (int g = 0; g < 4; ++g) {
        const __m512i high = _mm512_load_si512(room.s[g][2 * r]);
        const __m512i low = _mm512_load_si512(room.s[g][2 * r + 1]);
        const __m512 sum = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low));
        float* to = out[r] + d + 16 * g;
        _mm512_storeu_ps(to, _mm512_fmadd_ps(sum, scale, _mm512_loadu_ps(to)));
      }
    }
  }
}

}  // namespace dspark
#endif
