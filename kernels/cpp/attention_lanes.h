// The softmax step of attention on tiles: scores lie key by key, a query row in each lane.
//
// So the maximum and the sum over keys are plain vector operations, a block's weights cost about
// ten instructions for 16 rows of a key, and the only transposition is of weights that are already
// packed to half or a quarter. Where at most 8 rows share a tile a vector holds two keys
// (`PAIRED`): lanes 8 to 15 are the same rows half a block later.
//
// A row's maximum is raised only by more than 4, or the first time: weights then reach e^4, which
// costs no precision, and the sums so far are hardly ever scaled again.
#pragma once
#include "attention_config.h"

#if defined(DSPARK_TILES)
namespace dspark {

// 2^x for x <= 127, to 1e-7 of itself; 0 below -125 (see `exp`), NaN for NaN.
inline __attribute__((always_inline)) __m512 power_of_two(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, 0x01);  // x - floor(x)
  __m512 p = _mm512_set1_ps(1.877576645e-03f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(8.989340162e-03f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.582631799e-02f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.401536171e-01f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.931530732e-01f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.999999251e-01f));
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(-125.0f), _CMP_NLT_UQ), p, x);
}

inline __m512 other_half(__m512 x) { return _mm512_shuffle_f32x4(x, x, 0x4e); }

// The scores of 16 rows: LIVE vectors.
template <bool PAIRED, int KEYS>
struct Lanes {
  static constexpr int LIVE = PAIRED ? KEYS / 2 : KEYS;

  // Lane of row r (of its 16) for the first half's keys; the second's lies 8 behind it.
  static constexpr int lane(int r) { return PAIRED ? r % 8 : r % 16; }
  static constexpr int place(int key) { return PAIRED ? key % LIVE : key; }
  static constexpr int half(int key) { return PAIRED ? key / LIVE * 8 : 0; }

  static __m512 load_rows(const float* x) {
    if (PAIRED) return _mm512_broadcast_f32x8(_mm256_load_ps(x));
    return _mm512_load_ps(x);
  }
  static void store_rows(float* x, __m512 v) {
    if (PAIRED) {
      _mm256_store_ps(x, _mm512_castps512_ps256(v));
    } else {
      _mm512_store_ps(x, v);
    }
  }
  // One value a key, for the two keys (or the one) of vector j.
  static inline __attribute__((always_inline)) __m512 of_key(const float* x, int j) {
    const __m512 y = _mm512_set1_ps(x[j]);
    return PAIRED ? _mm512_mask_mov_ps(y, 0xff00, _mm512_set1_ps(x[j + LIVE])) : y;
  }
};

// Weights of the 16 rows from 16 `rows` on, over scores s * factor: relative to the rows' new
// maxima. s becomes weights for BYTES, times vs; for bf16 they are packed to `p` at once.
template <class C, class Next>
inline void soften_lanes(Room<C>& room, State<C>& state, int rows, int keys, float factor,
                         Next& next) {
  constexpr bool PAIRED = C::BYTES && C::R <= 8;
  using L = Lanes<PAIRED, C::KEYS>;
  // Vectors that have keys, in whole steps of `tile_values`; those of an int8 cache take whole blocks.
  const int live = C::BYTES ? L::LIVE : (keys + 31) / 32 * 32;
  float(*s)[16] = room.matrix.s[rows];
  __m512 high[4];
  for (int i = 0; i < 4; ++i) high[i] = _mm512_set1_ps(NEVER);
  for (int j = 0; j < live; j += 4)
    for (int i = 0; i < 4; ++i) high[i] = _mm512_max_ps(_mm512_load_ps(s[j + i]), high[i]);
  __m512 top = _mm512_max_ps(_mm512_max_ps(high[0], high[1]), _mm512_max_ps(high[2], high[3]));
  if (PAIRED) top = _mm512_max_ps(top, other_half(top));
  top = _mm512_mul_ps(top, _mm512_set1_ps(factor));

  const __m512 old = L::load_rows(state.top + 16 * rows);
  __m512 total = L::load_rows(state.total + 16 * rows);
  const __mmask16 raised =
      _mm512_cmp_ps_mask(top, _mm512_add_ps(old, _mm512_set1_ps(4.0f)), _CMP_GT_OQ);
  top = _mm512_mask_mov_ps(old, raised, top);
  if (raised) {
    const Vec shrink = exp(Vec{_mm512_maskz_sub_ps(raised, old, top)});
    total = _mm512_mul_ps(total, shrink.v);
    L::store_rows(state.top + 16 * rows, top);
    float by[16];
    store(by, shrink);
    for (int r = 0; r < 16 && 16 * rows + r < C::R; ++r)
      if (raised >> r & 1)
        for (int d = 0; d < C::DVP; d += Vec::W) {
          float* at = state.out[16 * rows + r] + d;
          store(at, load(at) * all(by[r]));
        }
  }
  // Without a key so far, any finite number will do.
  const __mmask16 none = _mm512_cmp_ps_mask(top, _mm512_set1_ps(NEVER), _CMP_EQ_OQ);
  const __m512 base = _mm512_maskz_mul_ps(~none, top, _mm512_set1_ps(-1.44269504f));
  const __m512 by = _mm512_set1_ps(factor * 1.44269504f);

  __m512 sum = _mm512_setzero_ps();
  if constexpr (C::BYTES) {
    constexpr int STEPS = Next::part(2, (C::R + 15) / 16 * L::LIVE / 2);
    __m512 most = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
    for (int j = 0; j < live; j += 2) {
      const __m512 a = power_of_two(_mm512_fmadd_ps(_mm512_load_ps(s[j]), by, base));
      const __m512 b = power_of_two(_mm512_fmadd_ps(_mm512_load_ps(s[j + 1]), by, base));
      sum = _mm512_add_ps(sum, a);
      odd = _mm512_add_ps(odd, b);
      const __m512 x = _mm512_mul_ps(a, L::of_key(room.vs, j));
      const __m512 y = _mm512_mul_ps(b, L::of_key(room.vs, j + 1));
      most = _mm512_max_ps(_mm512_max_ps(x, y), most);
      _mm512_store_ps(s[j], x);
      _mm512_store_ps(s[j + 1], y);
      next.go(STEPS);
    }
    sum = _mm512_add_ps(sum, odd);
    if (PAIRED) sum = _mm512_add_ps(sum, other_half(sum));
    if (PAIRED) most = _mm512_max_ps(most, other_half(most));
    const __mmask16 nan = _mm512_cmp_ps_mask(sum, sum, _CMP_UNORD_Q);
    constexpr int REST = Next::part(2, (C::R + 15) / 16 * L::LIVE / 4);
    split_weights(room.matrix, rows, most, nan, next, REST);
  } else {
    constexpr int STEPS = Next::part(2, (C::R + 15) / 16 * C::KEYS / 2);
    const __m512i half = _mm512_set1_epi32(0x8000);
    for (int from = 0; from < live; from += 32) {
      __m512 pairs[16];
      for (int i = 0; i < 16; ++i) {
        const float* at = s[from + 2 * i];
        __m512 a = power_of_two(_mm512_fmadd_ps(_mm512_load_ps(at), by, base));
        __m512 b = power_of_two(_mm512_fmadd_ps(_mm512_load_ps(at + 16), by, base));
        sum = _mm512_add_ps(sum, _mm512_add_ps(a, b));
        if constexpr (C::SCALED) {
          a = _mm512_mul_ps(a, L::of_key(room.vs, from + 2 * i));
          b = _mm512_mul_ps(b, L::of_key(room.vs, from + 2 * i + 1));
        }
        const __m512i x = _mm512_add_epi32(_mm512_castps_si512(a), half);
        const __m512i y = _mm512_add_epi32(_mm512_castps_si512(b), half);
        pairs[i] = _mm512_castsi512_ps(
            _mm512_mask_mov_epi16(_mm512_srli_epi32(x, 16), 0xaaaaaaaa, y));
        next.go(STEPS);
      }
      transposed(pairs, [&](int r, __m512 row) {
        _mm512_store_ps((float*)(room.matrix.p[16 * rows + r] + from), row);
      });
    }
  }
  L::store_rows(state.total + 16 * rows, _mm512_add_ps(total, sum));
}

// Scores of keys k ... k + keys that lie outside of their rows' bounds, and all behind them up to
// what `soften_lanes` looks at: forbidden.
template <class C>
inline void bound_lanes(Room<C>& room, int64_t k, int keys) {
  const __m512 never = _mm512_set1_ps(NEVER);
  const int live = (keys + 31) / 32 * 32;
  // Keys that all rows may attend to; bounds beyond a block say no more than its ends.
  const auto place = [&](int64_t bound) { return int(std::clamp<int64_t>(bound - k, 0, keys)); };
  const int first = place(room.inner_lower), last = std::max(first, place(room.inner_upper));
  for (int rows = 0; rows < (C::R + 15) / 16; ++rows) {
    alignas(64) int32_t lower[16], upper[16];
    for (int r = 0; r < 16; ++r) {
      const int row = std::min(16 * rows + r, C::R - 1);
      lower[r] = place(room.lower[row]), upper[r] = place(room.upper[row]);
    }
    const __m512i from = _mm512_load_si512(lower), to = _mm512_load_si512(upper);
    float(*s)[16] = room.matrix.s[rows];
    const auto forbid = [&](int j) __attribute__((always_inline)) {
      const __m512i at = _mm512_set1_epi32(j);
      const __mmask16 yes =
          _mm512_cmple_epi32_mask(from, at) & _mm512_cmplt_epi32_mask(at, to);
      _mm512_store_ps(s[j], _mm512_mask_mov_ps(never, yes, _mm512_load_ps(s[j])));
    };
    for (int j = 0; j < first; ++j) forbid(j);
    for (int j = last; j < keys; ++j) forbid(j);
    for (int j = keys; j < live; ++j) _mm512_store_ps(s[j], never);
  }
}

// Scores behind the mask: lane by lane, allowed[r][j] for `keys` keys; all that lie behind them are
// forbidden. With `moved` a forbidden key's score is moved by that much instead.
template <class C>
inline void forbid_lanes(Room<C>& room, int keys, bool tested, const float* moved) {
  constexpr bool PAIRED = C::BYTES && C::R <= 8;
  using L = Lanes<PAIRED, C::KEYS>;
  const __m512 never = _mm512_set1_ps(NEVER);
  for (int rows = 0; rows < (C::R + 15) / 16; ++rows) {
    float(*s)[16] = room.matrix.s[rows];
    uint16_t lanes[C::KEYS];
    const int count = std::min(16, C::R - 16 * rows);
    std::memset(lanes, 0, sizeof(lanes));
    for (int r = 0; r < count; ++r) {
      const uint8_t* allowed = room.allowed[16 * rows + r];
      for (int j = 0; j < keys; ++j)
        lanes[j] |= uint16_t((tested ? allowed[j] : 1) << L::lane(r));
    }
    for (int j = 0; j < L::LIVE; ++j) {
      const __mmask16 yes = lanes[j] | (PAIRED ? lanes[j + L::LIVE % C::KEYS] << 8 : 0);
      __m512 x = _mm512_load_ps(s[j]);
      if (moved == nullptr) {
        x = _mm512_mask_mov_ps(never, yes, x);
      } else {
        const __mmask16 inside =
            (j < keys ? 0xffff : 0) & (PAIRED ? 0x00ff : 0xffff) |
            (PAIRED && j + L::LIVE < keys ? 0xff00 : 0);
        x = _mm512_mask_add_ps(x, ~yes, x, _mm512_set1_ps(*moved));
        x = _mm512_mask_mov_ps(never, inside, x);
      }
      _mm512_store_ps(s[j], x);
    }
  }
}

}  // namespace dspark
#endif
