// Products with int4 weights, 16 rows of W side by side in the lanes of a register.
//
// `pack_int4` (dspark_compile/ops/quantized.py) has made a unit of 256 bytes of each 16 rows by 32
// numbers: four lines of 8 numbers, of which row r has bytes 4 r ... 4 r + 3, numbers 0 ... 3 in the
// low halves and 4 ... 7 in the high ones. Units of 16 rows follow each other along K, so a block of
// rows is one run of memory. No sum over lanes is ever needed, and a group's scales are a vector.
//
//   Fused    float lanes: q widened to float                              any type, any CPU
//   Dot      dpbusd: four numbers by four of x as digits, see below       VNNI
//   Tiles    a unit widened to bf16 in L1, then tdpbf16ps                 bf16, AMX, M >= 5
//
// Dot holds each 32 numbers of x as integers of one scale, split into bytes. Half types take two:
// what is at least 1/64 of their largest is exact as a bfloat16, the others to 2^-15 of the largest.
// float32 takes four: its numbers to 2^-31 of the largest. Sums over the 32 are exact by digit.
// Tiles multiply q itself, which bfloat16 holds exactly, and scale a group's sums.
#pragma once
#include "product_int.h"
#include "transpose.h"

namespace dspark {

constexpr int LANES = 16;   // rows of W in a unit
constexpr int UNIT = 256;   // bytes of a unit: 16 rows by PLANE numbers

inline int64_t units(int64_t K) { return (K + PLANE - 1) / PLANE; }

enum class Int4Form { Fused, Dot, Tiles };

template <class T, int M>
constexpr Int4Form int4_form() {
#if defined(DSPARK_TILES)
  if (M >= 5 && std::is_same<T, bf16>::value) return Int4Form::Tiles;
#endif
#if defined(DSPARK_BYTE_DOT)
  return Int4Form::Dot;
#endif
  return Int4Form::Fused;
}

// The scales of rows n ... n + count as floats, [G][16]: a vector for each group; rows behind are 0.
template <class Weight>
inline void lane_scales(const Weight& w, int64_t n, int count, int64_t G, float* to) {
  const typename Weight::S* from = w.scale + n * G;
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  for (int64_t g = 0; g < G; g += 16) {
    const int groups = int(std::min<int64_t>(16, G - g));
    __m512 rows[16];
    for (int r = 0; r < 16; ++r) {
      // Those of the next block: nothing else reads so far ahead of them.
      __builtin_prefetch(from + (LANES + r) * G + g, 0, 2);
      rows[r] = r < count ? load(from + r * G + g, groups).v : zero().v;
    }
    transposed(rows, [&](int i, __m512 lanes) __attribute__((always_inline)) {
      if (i < groups) _mm512_storeu_ps(to + (g + i) * LANES, lanes);
    });
  }
#else
  for (int r = 0; r < LANES; ++r)
    for (int64_t g = 0; g < G; ++g) to[g * LANES + r] = r < count ? to_float(from[r * G + g]) : 0.0f;
#endif
}

// -- Fused

// W lanes' number `i` of 8 in a line, from their four bytes each.
inline Vec number(const uint8_t* line, int i) {
  const int shift = 8 * (i % 4) + i / 4 * 4;
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
  // Only the lowest 4 bits of an index count.
  return {_mm512_permutexvar_ps(_mm512_srli_epi32(_mm512_loadu_si512(line), shift), table)};
#elif defined(__AVX2__)
  const __m256i x = _mm256_loadu_si256((const __m256i*)line);
  return {_mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(x, 28 - shift), 28))};
#else
  Vec x;
  for (int lane = 0; lane < Vec::W; ++lane)
    x.v[lane] = float(((line[4 * lane + i % 4] >> (i / 4 * 4) & 15) ^ 8) - 8);
  return x;
#endif
}

// The products of R blocks of 16 rows with MT rows of x [MT][32 units]: out[r][m * BLOCK + row].
// `each` units have one scale; scales [R][groups][16], `lds` apart.
template <int R, int MT, bool GROUPED>
inline void int4_floats(const uint8_t* const (&w)[R], const float* x, int64_t units, int64_t each,
                        const float* scales, int64_t lds, float* const (&out)[R]) {
  constexpr int W = Vec::W, PARTS = LANES / W;
  Vec a[R][PARTS][MT];
  for (int r = 0; r < R; ++r)
    for (int h = 0; h < PARTS; ++h)
      for (int m = 0; m < MT; ++m) a[r][h][m] = zero();
  const int64_t ldx = units * PLANE;
  for (int64_t u = 0, left = each; u < units; ++u) {
    for (int r = 0; r < R; ++r) {
      const uint8_t* unit = w[r] + u * UNIT;
      for (int i = 0; i < UNIT; i += 64) __builtin_prefetch(unit + i + AHEAD, 0, 3);
      for (int h = 0; h < PARTS; ++h) {
        // Two sums each, so that an addition need not wait for the one before.
        Vec part[2][MT];
        for (int k = 0; k < PLANE; ++k) {
          const Vec q = number(unit + k / 8 * 64 + h * 4 * W, k % 8);
          for (int m = 0; m < MT; ++m) {
            const Vec b = all(x[m * ldx + u * PLANE + k]);
            part[k % 2][m] = k < 2 ? q * b : fma(q, b, part[k % 2][m]);
          }
        }
        for (int m = 0; m < MT; ++m) {
          const Vec sum = part[0][m] + part[1][m];
          a[r][h][m] = GROUPED ? fma(sum, load(scales + r * lds + h * W), a[r][h][m])
                               : a[r][h][m] + sum;
        }
      }
    }
    if (GROUPED && --left == 0) scales += LANES, left = each;
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < MT; ++m)
      for (int h = 0; h < PARTS; ++h) store(out[r] + m * BLOCK + h * W, a[r][h][m]);
}

// -- Dot

// 32 numbers of x in COUNT digits to base 256, lowest first.
template <int COUNT>
struct LaneStep {
  int8_t digits[COUNT][PLANE];
  float scale;
  int32_t start[COUNT];  // -8 times the sum of a digit: the bytes of W are too large by 8
};
template <class T>
using LaneStepOf = LaneStep<std::is_same<T, float>::value ? 4 : 2>;

#if defined(DSPARK_BYTE_DOT)
#pragma GCC push_options
#pragma GCC target("avx512vnni")

// Numbers [0, 32) of a row of which `left` are there.
template <class T, int COUNT>
inline void pack_lanes(const T* row, int64_t left, LaneStep<COUNT>& to) {
  Vec x[2];
  for (int i : {0, 1})
    x[i] = left > 16 * i ? load(row + 16 * i, int(std::min<int64_t>(16, left - 16 * i))) : zero();
  const __m512 most = _mm512_max_ps(_mm512_abs_ps(x[0].v), _mm512_abs_ps(x[1].v));
  // The digits have room for rounding: numbers are at most half of what they hold.
  const Whole whole(most, is_nan(x[0].v) | is_nan(x[1].v), 8 * COUNT - 2);
  const __m512 by = _mm512_set1_ps(whole.by);
  __m512i y[2];
  for (int i : {0, 1}) y[i] = _mm512_cvtps_epi32(_mm512_mul_ps(x[i].v, by));
  for (int digit = 0; digit < COUNT; ++digit) {
    __m512i total = _mm512_setzero_si512();
    for (int i : {0, 1}) {
      // What is left behind the digit, which is y's lowest byte with its sign.
      const __m512i rest = _mm512_srai_epi32(_mm512_add_epi32(y[i], _mm512_set1_epi32(128)), 8);
      const __m512i now =
          digit + 1 < COUNT ? _mm512_sub_epi32(y[i], _mm512_slli_epi32(rest, 8)) : y[i];
      _mm_storeu_si128((__m128i*)(to.digits[digit] + 16 * i), _mm512_cvtepi32_epi8(now));
      total = _mm512_add_epi32(total, now);
      y[i] = rest;
    }
    to.start[digit] = -8 * _mm512_reduce_add_epi32(total);
  }
  to.scale = whole.scale;
}

// As `int4_floats`, for all M rows of x [M][units].
template <int R, int M, bool GROUPED, int COUNT>
__attribute__((noinline)) void int4_dot(const uint8_t* const (&w)[R], const LaneStep<COUNT>* x,
                                        int64_t units, int64_t each, const float* scales,
                                        int64_t lds, float* const (&out)[R]) {
  __m512 a[R][M];
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) a[r][m] = _mm512_setzero_ps();
  const __m512i mask = _mm512_set1_epi8(15), up = _mm512_set1_epi8(8);
  for (int64_t u = 0, left = each; u < units; ++u) {
    for (int r = 0; r < R; ++r) {
      const uint8_t* unit = w[r] + u * UNIT;
      __m512i q[8];  // four numbers of each row, as 0 ... 15: (x & 15) ^ 8
      for (int i = 0; i < 4; ++i) {
        __builtin_prefetch(unit + 64 * i + AHEAD, 0, 3);
        const __m512i both = _mm512_loadu_si512(unit + 64 * i);
        q[2 * i] = _mm512_ternarylogic_epi32(both, mask, up, 0x6a);
        q[2 * i + 1] = _mm512_ternarylogic_epi32(_mm512_srli_epi16(both, 4), mask, up, 0x6a);
      }
      const __m512 by = GROUPED ? _mm512_loadu_ps(scales + r * lds) : _mm512_set1_ps(1);
      for (int m = 0; m < M; ++m) {
        const LaneStep<COUNT>& y = x[m * units + u];
        __m512i part[COUNT];
        for (int d = 0; d < COUNT; ++d) part[d] = _mm512_set1_epi32(y.start[d]);
        for (int i = 0; i < 8; ++i)
          for (int d = 0; d < COUNT; ++d) {
            int32_t four;
            std::memcpy(&four, y.digits[d] + 4 * i, 4);
            part[d] = _mm512_dpbusd_epi32(part[d], q[i], _mm512_set1_epi32(four));
          }
        __m512 sum;
        if constexpr (COUNT == 2) {
          sum = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(part[1], 8), part[0]));
        } else {
          sum = _mm512_cvtepi32_ps(part[COUNT - 1]);
          for (int d = COUNT - 2; d >= 0; --d)
            sum = _mm512_fmadd_ps(sum, _mm512_set1_ps(256), _mm512_cvtepi32_ps(part[d]));
        }
        const __m512 scale = _mm512_set1_ps(y.scale);
        a[r][m] = _mm512_fmadd_ps(sum, GROUPED ? _mm512_mul_ps(scale, by) : scale, a[r][m]);
      }
    }
    if (GROUPED && --left == 0) scales += LANES, left = each;
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) _mm512_storeu_ps(out[r] + m * BLOCK, a[r][m]);
}

#pragma GCC pop_options
#endif

// -- Tiles

#if defined(DSPARK_TILES)

// Tiles 0 ... 3: results of M rows; 4, 5: a unit of W; 6: M rows of x.
template <int M>
inline void configure_unit_tiles() {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } c;
  for (int i = 0; i < 7; ++i) c.bytes[i] = 64, c.rows[i] = i == 4 || i == 5 ? 16 : M;
  __asm__ volatile("" : : "r"(&c) : "memory");
  _tile_loadconfig(&c);
}

// A unit as bf16, [16 pairs of numbers][16 rows][2]: the right operand of a tile product.
inline void widen_unit(const uint8_t* unit, bf16 (*to)[32]) {
  const Vec values = {_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1)};
  // Twice: an index of 5 bits finds the low 4 bits' value either way.
  const __m512i table = _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(values.v));
  // Bytes 0 and 1 of each lane as the low bytes of its two words, and 2 and 3.
  const __m512i first = _mm512_set1_epi32(0x01010000), second = _mm512_set1_epi32(0x03030202);
  const __m512i lane = _mm512_broadcast_i32x4(
      _mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c));
  const __m512i low = _mm512_add_epi8(first, lane), high = _mm512_add_epi8(second, lane);
  for (int i = 0; i < 4; ++i) {
    const __m512i both = _mm512_loadu_si512(unit + 64 * i);
    const __m512i upper = _mm512_srli_epi16(both, 4);
    const auto put = [&](int row, __m512i x, __m512i bytes) __attribute__((always_inline)) {
      _mm512_store_si512(to[row],
                         _mm512_permutexvar_epi16(_mm512_shuffle_epi8(x, bytes), table));
    };
    put(4 * i, both, low);
    put(4 * i + 1, both, high);
    put(4 * i + 2, upper, low);
    put(4 * i + 3, upper, high);
  }
}

struct alignas(64) UnitRoom {
  bf16 wide[4][16][32];
  float sums[4][16][16];
};

// The products of a block of 16 rows with M rows of x [M][32 units]: out[m * BLOCK + row].
template <int M, bool GROUPED>
inline void int4_tiles(const uint8_t* w, const bf16* x, int64_t units, int64_t each,
                       const float* scales, UnitRoom& room, float* out) {
  const int64_t ldx = 2 * PLANE * units;
  Vec a[M];
  for (int m = 0; m < M; ++m) a[m] = zero();
  const auto clear = [] {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  };
  const auto keep = [&] {
    _tile_stored(0, room.sums[0], 64);
    _tile_stored(1, room.sums[1], 64);
    _tile_stored(2, room.sums[2], 64);
    _tile_stored(3, room.sums[3], 64);
    __asm__ volatile("" : : "r"(&room) : "memory");
  };
  clear();
  for (int64_t u = 0; u < units; u += 4) {
    const int count = int(std::min<int64_t>(4, units - u));
    const uint8_t* from = w + u * UNIT;
    for (int i = 0; i < 4 * UNIT; i += 64) __builtin_prefetch(from + i + AHEAD, 0, 3);
    for (int i = 0; i < count; ++i) widen_unit(from + i * UNIT, room.wide[i]);
    __asm__ volatile("" : : "r"(&room) : "memory");
    if (GROUPED && u > 0) clear();
    const bf16* rows = x + u * PLANE;
    _tile_loadd(4, room.wide[0], 64);
    _tile_loadd(6, rows, ldx);
    _tile_dpbf16ps(0, 6, 4);
    if (count > 1) {
      _tile_loadd(5, room.wide[1], 64);
      _tile_loadd(6, rows + PLANE, ldx);
      _tile_dpbf16ps(1, 6, 5);
    }
    if (count > 2) {
      _tile_loadd(4, room.wide[2], 64);
      _tile_loadd(6, rows + 2 * PLANE, ldx);
      _tile_dpbf16ps(2, 6, 4);
    }
    if (count > 3) {
      _tile_loadd(5, room.wide[3], 64);
      _tile_loadd(6, rows + 3 * PLANE, ldx);
      _tile_dpbf16ps(3, 6, 5);
    }
    if constexpr (GROUPED) {
      keep();
      for (int i = 0; i < count; ++i) {
        const Vec by = load(scales + (u + i) / each * LANES);
        for (int m = 0; m < M; ++m) a[m] = fma(load(room.sums[i][m]), by, a[m]);
      }
    }
  }
  if constexpr (!GROUPED) {
    keep();
    for (int m = 0; m < M; ++m)
      a[m] = (load(room.sums[0][m]) + load(room.sums[1][m])) +
             (load(room.sums[2][m]) + load(room.sums[3][m]));
  }
  for (int m = 0; m < M; ++m) store(out + m * BLOCK, a[m]);
}

#endif

// All M rows of x for R blocks of float lanes, a few at a time.
template <int R, int M, int MT, bool GROUPED>
inline void int4_floats_of(const uint8_t* const (&w)[R], const float* x, int64_t units,
                           int64_t each, const float* scales, int64_t lds, float* const (&out)[R]) {
  constexpr int NOW = M < MT ? M : MT;
  int4_floats<R, NOW, GROUPED>(w, x, units, each, scales, lds, out);
  if constexpr (M > MT) {
    float* below[R];
    for (int r = 0; r < R; ++r) below[r] = out[r] + MT * BLOCK;
    float* const(&written)[R] = below;
    int4_floats_of<R, M - MT, MT, GROUPED>(w, x + MT * units * PLANE, units, each, scales, lds,
                                           written);
  }
}

template <class T, int M, bool GROUPED>
struct IntProduct<Int4, T, M, GROUPED> {
  static constexpr Int4Form FORM = int4_form<T, M>();
  using Element = typename std::conditional<
      FORM == Int4Form::Dot, LaneStepOf<T>,
      typename std::conditional<FORM == Int4Form::Fused, float, bf16>::type>::type;
  static constexpr int64_t EACH = FORM == Int4Form::Dot ? 1 : PLANE;  // elements of a unit
  // Blocks of rows that are worked on side by side: runs of memory, few where it is read in order.
  static constexpr int R = FORM != Int4Form::Tiles && M <= 2 && !SEQUENCE ? 4 : 2;

  static size_t size(int64_t K) { return sizeof(Element) * M * units(K) * EACH; }
  static size_t work(int64_t K) {
    const size_t scales = GROUPED ? sizeof(float) * R * LANES * units(K) : 0;
    return scales + (FORM == Int4Form::Tiles ? 8192 : 0);
  }

  static void pack(Team team, const T* x, int64_t ldx, int64_t K, Element* to) {
    const auto [first, last] = team.share(M * units(K));
    for (int64_t i = first; i < last; ++i) {
      const int64_t k = i % units(K) * PLANE;
      const T* row = x + i / units(K) * ldx + k;
      Element* out = to + i * EACH;
      if constexpr (FORM == Int4Form::Dot) {
#if defined(DSPARK_BYTE_DOT)
        pack_lanes(row, K - k, *out);
#endif
      } else if constexpr (FORM == Int4Form::Fused) {
        for (int j = 0; j < PLANE; j += Vec::W)
          store(out + j,
                k + j < K ? load(row + j, int(std::min<int64_t>(Vec::W, K - k - j))) : zero());
      } else {
        for (int j = 0; j < PLANE; ++j) out[j] = k + j < K ? row[j] : bf16{0};
      }
    }
  }

  template <class Weight, int MATS, class Done>
  static void run(int64_t first, int64_t last, const Weight (&w)[MATS], int64_t K, int64_t G,
                  const Element* x, const float* sums, char* work, Done&& done) {
    constexpr int STREAMS = R / MATS;
    const int64_t count = units(K), each = GROUPED ? count / G : 1, lds = G * LANES;
    float* scales = reinterpret_cast<float*>(work + (FORM == Int4Form::Tiles ? 8192 : 0));
    alignas(64) float results[STREAMS][MATS][M][BLOCK];
    const int64_t begin = first / LANES, end = (last + LANES - 1) / LANES;
    const int64_t share = (end - begin + STREAMS - 1) / STREAMS;
#if defined(DSPARK_TILES)
    if constexpr (FORM == Int4Form::Tiles) configure_unit_tiles<M>();
#endif
    for (int64_t j = 0; j < share; ++j) {
      const uint8_t* blocks[R];
      float* out[R];
      for (int s = 0; s < STREAMS; ++s) {
        // The last stream may be shorter; what it reads again is not used.
        const int64_t block = std::min(begin + s * share + j, end - 1), n = block * LANES;
        for (int i = 0; i < MATS; ++i) {
          const int at = s * MATS + i;
          blocks[at] = w[i].q + block * w[i].ld;
          out[at] = &results[s][i][0][0];
          if constexpr (GROUPED)
            lane_scales(w[i], n, int(std::min<int64_t>(LANES, last - n)), G, scales + at * lds);
        }
      }
      const uint8_t* const(&read)[R] = blocks;
      float* const(&written)[R] = out;
      if constexpr (FORM == Int4Form::Tiles) {
#if defined(DSPARK_TILES)
        for (int r = 0; r < R; ++r)
          int4_tiles<M, GROUPED>(read[r], x, count, each, scales + r * lds,
                                 *reinterpret_cast<UnitRoom*>(work), written[r]);
#endif
      } else if constexpr (FORM == Int4Form::Dot) {
#if defined(DSPARK_BYTE_DOT)
        int4_dot<R, M, GROUPED>(read, x, count, each, scales, lds, written);
#endif
      } else {
        constexpr int MT = Vec::W == 16 ? (M < 4 ? M : 4) : (M < 2 ? M : 2);
        int4_floats_of<R, M, MT, GROUPED>(read, x, count, each, scales, lds, written);
      }
      for (int s = 0; s < STREAMS; ++s) {
        const int64_t block = begin + s * share + j, n = block * LANES;
        if (j >= share || block >= std::min(begin + (s + 1) * share, end)) continue;
        const int rows = int(std::min<int64_t>(LANES, last - n));
        for (int i = 0; i < MATS; ++i)
          int_finish<GROUPED, true, M>(w[i], n, rows, G, sums, results[s][i]);
        done(n, rows, results[s]);
      }
    }
#if defined(DSPARK_TILES)
    if constexpr (FORM == Int4Form::Tiles) _tile_release();
#endif
  }
};

}  // namespace dspark
