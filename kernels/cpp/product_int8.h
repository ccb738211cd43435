// Products with int8 weights, row-major as they lie.
//
//   Planes   tdpbssd: x as digits of a byte, see product_planes.h            one scale a row, AMX
//   Digits   dpbusd: x as digits of a byte, see product_digits.h            one scale a row, VNNI
//   Bytes    dpbusd: x as 16-bit numbers, see below            groups, half types, VNNI, M <= 2
//   Widened  a block of rows widened to bf16 in L1, then tdpbf16ps       groups, bf16, AMX, M >= 5
//   Fused    float lanes: q widened to float                                      any type, any CPU
//
// Bytes holds each 32 numbers of x as 16-bit integers of one scale, split into two bytes: what is
// at least 1/64 of their largest is exact as a bfloat16, the others to 2^-15 of the largest. Sums
// over four products are exact, and it takes fewer instructions than Fused.
//
// A group's scale multiplies the sum over 32 products (Bytes; Fused, M = 1), the widened weights
// (Fused), or the weights before they are rounded to bf16 (Widened), as code does that dequantises.
// Fused and Bytes read a share as several runs of rows side by side, see product_streams.h.
#pragma once
#include "product_digits.h"
#include "product_int.h"
#include "product_planes.h"

namespace dspark {

enum class Int8Form { Fused, Bytes, Widened, Digits, Planes };

template <class T, int M, bool GROUPED>
constexpr Int8Form int8_form() {
#if defined(DSPARK_PLANES)
  if (!GROUPED) return Int8Form::Planes;
#endif
#if defined(DSPARK_BYTE_DOT)
  if (!GROUPED) return Int8Form::Digits;
  if (M <= 2 && !std::is_same<T, float>::value) return Int8Form::Bytes;
#endif
#if defined(DSPARK_TILES)
  if (M >= 5 && std::is_same<T, bf16>::value) return Int8Form::Widened;
#endif
  return Int8Form::Fused;
}

// -- Bytes

// 128 numbers of x, as the bytes of W meet them: [0] the first 64, [1] the others.
struct alignas(64) ByteStep {
  int8_t high[2][64], low[2][64];  // 256 high + low
  float scale[2][16];              // of the four numbers that end up in each lane
  float offset[2][16];             // their sum, times what q is too large by: see UP
};

constexpr int UP = 128;  // added to q to make it unsigned

#if defined(DSPARK_BYTE_DOT)
#pragma GCC push_options
#pragma GCC target("avx512vnni")

// Numbers [0, 128) of a row of which `left` are there.
template <class T>
inline void pack_bytes(const T* row, int64_t left, ByteStep& to) {
  for (int plane = 0; plane < 4; ++plane) {
    const int which = plane / 2, at = plane % 2 * PLANE;
    Vec x[2];
    for (int i : {0, 1}) {
      const int64_t from = plane * PLANE + 16 * i;
      x[i] = left > from ? load(row + from, int(std::min<int64_t>(16, left - from))) : zero();
    }
    const __m512 most = _mm512_max_ps(_mm512_abs_ps(x[0].v), _mm512_abs_ps(x[1].v));
    // Numbers are at most 2^14, which two bytes hold with room for rounding.
    const Whole whole(most, is_nan(x[0].v) | is_nan(x[1].v), 14);
    const __m512 by = _mm512_set1_ps(whole.by);
    for (int i : {0, 1}) {
      const __m512i y = _mm512_cvtps_epi32(_mm512_mul_ps(x[i].v, by));
      const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(y, _mm512_set1_epi32(128)), 8);
      _mm_store_si128((__m128i*)(to.high[which] + at + 16 * i), _mm512_cvtepi32_epi8(high));
      _mm_store_si128((__m128i*)(to.low[which] + at + 16 * i), _mm512_cvtepi32_epi8(y));
    }
    for (int i = 0; i < 8; ++i) to.scale[which][at / 4 + i] = whole.scale;
  }
  const __m512i up = _mm512_set1_epi8(char(UP));
  for (int which : {0, 1}) {
    const __m512i high = _mm512_dpbusd_epi32(_mm512_setzero_si512(), up,
                                             _mm512_load_si512(to.high[which]));
    const __m512i sum = _mm512_dpbusd_epi32(_mm512_slli_epi32(high, 8), up,
                                            _mm512_load_si512(to.low[which]));
    const __m512 offset = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_load_ps(to.scale[which]));
    _mm512_store_ps(to.offset[which], _mm512_sub_ps(_mm512_setzero_ps(), offset));
  }
}

#pragma GCC pop_options
#endif

// -- Fused

// 2 W numbers of a step at q: those from j on in the first plane and in the second. `left` is how
// many numbers the row has from the step's first on.
inline void int8_numbers(const uint8_t* q, int j, bool whole, int left, Vec& low, Vec& high) {
  const int8_t* p = reinterpret_cast<const int8_t*>(q);
  if (whole) {
    low = load(p + j);
    high = load(p + PLANE + j);
  } else {
    low = left > j ? load(p + j, left - j) : zero();
    high = left > PLANE + j ? load(p + PLANE + j, left - PLANE - j) : zero();
  }
}

// The products of R rows of W with MT rows of x; result r, m goes to out[r][m * BLOCK]. With
// GROUPED, scales[r * lds + p] multiplies plane p of row r. The rows that are read after these
// start `next` bytes behind them.
template <int R, int MT, bool GROUPED>
inline void int_tile(const uint8_t* const (&w)[R], int64_t next, const float* packed, int64_t ldx,
                     int64_t K, const float* scales, int64_t lds, float* const (&out)[R]) {
  constexpr int W = Vec::W;
  constexpr int COUNT = (R * MT + W - 1) / W * W;
  Vec a[COUNT];
  for (int i = 0; i < COUNT; ++i) a[i] = zero();
  auto steps = [&](int64_t from, int64_t to, int64_t ahead, bool whole)
                   __attribute__((always_inline)) {
    for (int64_t s = from; s < to; ++s) {
      for (int r = 0; r < R; ++r) __builtin_prefetch(w[r] + s * PAIR + ahead, 0, 3);
      const float* x = packed + s * PAIR;
      Vec part[2][R];
      for (int j = 0; j < PLANE; j += W) {
        Vec b[2][MT];
        for (int m = 0; m < MT; ++m)
          for (int p : {0, 1}) b[p][m] = load(x + m * ldx + p * PLANE + j);
        for (int r = 0; r < R; ++r) {
          Vec c[2];
          int8_numbers(w[r] + s * PAIR, j, whole, int(K - s * PAIR), c[0], c[1]);
          for (int p : {0, 1}) {
            if constexpr (GROUPED && MT == 1) {
              part[p][r] = j == 0 ? c[p] * b[p][0] : fma(c[p], b[p][0], part[p][r]);
              if (j + W == PLANE) a[r] = fma(part[p][r], all(scales[r * lds + 2 * s + p]), a[r]);
            } else {
              if constexpr (GROUPED) c[p] = c[p] * all(scales[r * lds + 2 * s + p]);
              for (int m = 0; m < MT; ++m) a[r * MT + m] = fma(c[p], b[p][m], a[r * MT + m]);
            }
          }
        }
      }
    }
  };
  const int64_t whole = K / PAIR;
  if (next == whole * PAIR) {
    // One row follows on the other: the distance may be more than a row.
    steps(0, whole, AHEAD, true);
  } else {
    const int64_t ahead = std::min<int64_t>(AHEAD / PAIR, whole);
    steps(0, whole - ahead, ahead * PAIR, true);
    steps(whole - ahead, whole, (ahead - whole) * PAIR + next, true);
  }
  if (whole * PAIR < K) steps(whole, whole + 1, 0, false);
  float flat[COUNT];
  for (int i = 0; i < COUNT; i += W) store(flat + i, sums(a + i));
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < MT; ++m) out[r][m * BLOCK] = flat[r * MT + m];
}

#if defined(DSPARK_BYTE_DOT)
#pragma GCC push_options
#pragma GCC target("avx512vnni")

// The same in bytes.
template <int R, int MT, bool GROUPED>
__attribute__((noinline)) void int_tile(const uint8_t* const (&w)[R], int64_t next,
                                        const ByteStep* packed, int64_t ldx, int64_t K,
                                        const float* scales, int64_t lds,
                                        float* const (&out)[R]) {
  constexpr int COUNT = (R * MT + 15) / 16 * 16;
  constexpr int BYTES = 2 * PAIR;
  Vec a[COUNT];
  for (int i = 0; i < COUNT; ++i) a[i] = zero();
  const __m512i up = _mm512_set1_epi8(char(UP));
  // 64 numbers of step q as 0 ... 255: `left` bytes of it are there. Behind them x is zero.
  auto numbers = [&](const uint8_t* q, int p, int64_t left) __attribute__((always_inline)) {
    q += 64 * p, left -= 64 * p;
    const __m512i x = left >= 64 ? _mm512_loadu_si512(q)
                                 : _mm512_maskz_loadu_epi8(
                                       left <= 0 ? 0 : (__mmask64(1) << left) - 1, q);
    return _mm512_xor_si512(x, up);
  };
  auto steps = [&](int64_t from, int64_t to, int64_t ahead, int64_t left)
                   __attribute__((always_inline)) {
    for (int64_t s = from; s < to; ++s) {
      const ByteStep* x = packed + s;
      for (int r = 0; r < R; ++r) {
        const uint8_t* q = w[r] + s * BYTES;
        for (int i = 0; i < BYTES; i += 64) __builtin_prefetch(q + i + ahead, 0, 3);
        for (int p : {0, 1}) {
          const __m512i c = numbers(q, p, left);
          for (int m = 0; m < MT; ++m) {
            const ByteStep& y = x[m * ldx];
            const __m512i high =
                _mm512_dpbusd_epi32(_mm512_setzero_si512(), c, _mm512_load_si512(y.high[p]));
            const __m512i sum = _mm512_dpbusd_epi32(_mm512_slli_epi32(high, 8), c,
                                                    _mm512_load_si512(y.low[p]));
            const __m512 part = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_load_ps(y.scale[p]),
                                                _mm512_load_ps(y.offset[p]));
            Vec& to = a[r * MT + m];
            if constexpr (GROUPED) {
              const float* by = scales + r * lds + 4 * s;
              const __m512 each = _mm512_mask_broadcastss_ps(_mm512_set1_ps(by[2 * p]), 0xff00,
                                                             _mm_load_ss(by + 2 * p + 1));
              to.v = _mm512_fmadd_ps(part, each, to.v);
            } else {
              to.v = _mm512_add_ps(part, to.v);
            }
          }
        }
      }
    }
  };
  const int64_t whole = K / BYTES;
  if (next == K) {
    steps(0, whole, AHEAD, BYTES);
  } else {
    const int64_t ahead = std::min<int64_t>(AHEAD / BYTES, whole);
    steps(0, whole - ahead, ahead * BYTES, BYTES);
    steps(whole - ahead, whole, (ahead - whole) * BYTES + next, BYTES);
  }
  if (whole * BYTES < K) steps(whole, whole + 1, 0, K - whole * BYTES);
  float flat[COUNT];
  for (int i = 0; i < COUNT; i += 16) store(flat + i, sums(a + i));
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < MT; ++m) out[r][m * BLOCK] = flat[r * MT + m];
}

#pragma GCC pop_options
#endif

// All M for R rows, a few at a time; q comes from memory the first time, from cache after.
template <int R, int M, int MT, bool GROUPED, class Element>
inline void int_tiles_of(const uint8_t* const (&w)[R], int64_t next, const Element* packed,
                         int64_t ldx, int64_t K, const float* scales, int64_t lds,
                         float* const (&out)[R]) {
  constexpr int NOW = M < MT ? M : MT;
  int_tile<R, NOW, GROUPED>(w, next, packed, ldx, K, scales, lds, out);
  if constexpr (M > MT) {
    float* below[R];
    for (int r = 0; r < R; ++r) below[r] = out[r] + MT * BLOCK;
    float* const(&written)[R] = below;
    int_tiles_of<R, M - MT, MT, GROUPED>(w, next, packed + MT * ldx, ldx, K, scales, lds,
                                            written);
  }
}

// How many scales a row takes as floats, one for each plane of whole steps (of Bytes: 128).
inline int64_t spread(int64_t K) { return (K + 2 * PAIR - 1) / (2 * PAIR) * 4; }

// The scales of row n as floats; 0 for a plane behind K.
template <class Weight>
inline void spread_scales(const Weight& w, int64_t n, int64_t K, int64_t G, float* row) {
  const int64_t each = K / PLANE / G;
  const typename Weight::S* from = w.scale + n * G;
  for (int64_t p = K / PLANE; p < spread(K); ++p) row[p] = 0;
  if (each == 1) {
    for (int64_t g = 0; g < G; g += Vec::W) {
      const int count = int(std::min<int64_t>(Vec::W, G - g));
      store(row + g, load(from + g, count), count);
    }
  } else {
    for (int64_t g = 0; g < G; ++g)
      for (int64_t i = 0; i < each; ++i) row[g * each + i] = to_float(from[g]);
  }
}

// -- Widened

#if defined(DSPARK_TILES)

constexpr int CHUNK = 16;  // planes of 32 rows that are widened together: 32 KiB

// One plane of a row as bf16: the numbers themselves, or (q - z) s rounded.
template <bool GROUPED>
inline __m512i plane(const uint8_t* row, int64_t p, int64_t K, float s, float z) {
  const int8_t* q = reinterpret_cast<const int8_t*>(row) + p * PLANE;
  const int left = int(std::min<int64_t>(K - p * PLANE, PLANE));
  Vec low = load(q, left), high = left > 16 ? load(q + 16, left - 16) : zero();
  if constexpr (GROUPED) low = (low - all(z)) * all(s), high = (high - all(z)) * all(s);
  return (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v);
}

// Up to 32 rows of W from row n on with M rows of x.
template <int M, bool GROUPED, class Weight>
inline void int_tile_block(const Weight& w, int64_t n, int count, int64_t K, int64_t G,
                           const bf16* packed, bf16* wide, float (*results)[BLOCK]) {
  const int64_t planes = (K + PLANE - 1) / PLANE, each = GROUPED ? planes / G : 1;
  _tile_zero(0);
  _tile_zero(1);
  for (int64_t from = 0; from < planes; from += CHUNK) {
    const int64_t to = std::min(from + CHUNK, planes);
    // What is read next: these rows' next chunk, or the first of the rows that follow.
    const int64_t ahead =
        to < planes ? CHUNK * PLANE : BLOCK * w.ld - from * PLANE;
    // The group of the first plane, and the first plane of the next.
    const int64_t group = from / each, until = (group + 1) * each;
    for (int r = 0; r < count; ++r) {
      const uint8_t* row = w.q + (n + r) * w.ld;
      for (int64_t i = from * PLANE; i < to * PLANE; i += 64)
        __builtin_prefetch(row + i + ahead, 0, 3);
      float s = 1, z = 0;
      int64_t i = (n + r) * G + group, change = from;
      for (int64_t p = from; p < to; ++p) {
        if constexpr (GROUPED) {
          if (p == change) {
            s = to_float(w.scale[i]);
            if constexpr (Weight::ZEROS) z = to_float(w.zero[i]);
            change = p == from ? until : change + each;
            ++i;
          }
        }
        _mm512_store_si512(wide + ((p - from) * BLOCK + r) * PLANE,
                           plane<GROUPED>(row, p, K, s, z));
      }
    }
    __asm__ volatile("" : : "r"(wide) : "memory");
    for (int64_t p = from; p < to; ++p) {
      const bf16* rows = wide + (p - from) * BLOCK * PLANE;
      _tile_loadd(4, packed + p * PLANE * M, 4 * M);
      _tile_loadd(2, rows, 64);
      _tile_dpbf16ps(0, 2, 4);
      _tile_loadd(3, rows + 16 * PLANE, 64);
      _tile_dpbf16ps(1, 3, 4);
    }
  }
  alignas(64) float c[BLOCK][16];
  _tile_stored(0, c[0], 64);
  _tile_stored(1, c[16], 64);
  __asm__ volatile("" : : "r"(c) : "memory");
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < BLOCK; ++r) results[m][r] = c[r][m];
}

#endif


// -- the product

template <class T, int M, bool GROUPED>
struct IntProduct<Int8, T, M, GROUPED> {
  static constexpr Int8Form FORM = int8_form<T, M, GROUPED>();
  using Element = typename std::conditional<
      FORM == Int8Form::Bytes, ByteStep,
      typename std::conditional<
          FORM == Int8Form::Planes, int8_t,
          typename std::conditional<
              FORM == Int8Form::Digits, Digit,
              typename std::conditional<FORM == Int8Form::Fused, float, bf16>::type>::type>::type>::
      type;
  static constexpr int64_t STEP = FORM == Int8Form::Bytes ? 2 * PAIR : PAIR;  // numbers
  // Rows whose accumulators fit into registers together: runs that are read side by side. Of one
  // row's bytes fewer, where memory is read in order.
  static constexpr int R =
      FORM == Int8Form::Digits ? (std::is_same<T, float>::value || (SEQUENCE && M == 1) ? 4 : 8)
                               : (Vec::W == 16 && M <= 2 ? 8 : 4);

  static int64_t padded(int64_t K) { return (K + STEP - 1) / STEP * STEP; }
  static int64_t elements(int64_t K) {
#if defined(DSPARK_BYTE_DOT)
    if (FORM == Int8Form::Digits) return DigitRow<T>::bytes(K);
#endif
    return FORM == Int8Form::Bytes ? padded(K) / STEP : padded(K);
  }

  static size_t size(int64_t K) {
#if defined(DSPARK_PLANES)
    if (FORM == Int8Form::Planes) return Digits<T, M>::bytes(K);
#endif
    return sizeof(Element) * M * elements(K);
  }
  static size_t work(int64_t K) {
    if (FORM == Int8Form::Planes || FORM == Int8Form::Digits) return 0;
    if (FORM == Int8Form::Widened) return 16 * BLOCK * PLANE * sizeof(bf16);
    return sizeof(float) * R * spread(K);
  }

  static void pack(Team team, const T* x, int64_t ldx, int64_t K, Element* to) {
    if constexpr (FORM == Int8Form::Planes) {
#if defined(DSPARK_PLANES)
      const auto [first, last] = team.share(M);
      for (int64_t m = first; m < last; ++m) Digits<T, M>::pack(x + m * ldx, int(m), K, to);
#endif
    } else if constexpr (FORM == Int8Form::Digits) {
#if defined(DSPARK_BYTE_DOT)
      const auto [first, last] = team.share(M);
      for (int64_t m = first; m < last; ++m)
        DigitRow<T>::pack(x + m * ldx, K, to + m * elements(K));
#endif
    } else {
      const auto [first, last] = team.share(padded(K), STEP);
      for (int m = 0; m < M; ++m) pack_row(x + m * ldx, m, K, first, last, to);
    }
  }

  template <class Weight, int MATS, class Done>
  static void run(int64_t first, int64_t last, const Weight (&w)[MATS], int64_t K, int64_t G,
                  const Element* x, const float* sums, char* work, Done&& done) {
    if constexpr (FORM == Int8Form::Planes) {
      planes(first, last, w, K, G, x, sums, done);
    } else if constexpr (FORM == Int8Form::Widened) {
      widened(first, last, w, K, G, x, sums, work, done);
    } else {
      streams(first, last, w, K, G, x, sums, work, done);
    }
  }

 private:
  static void pack_row(const T* row, int m, int64_t K, int64_t first, int64_t last, Element* to) {
    const int64_t ldx = elements(K);
    if constexpr (FORM == Int8Form::Bytes) {
#if defined(DSPARK_BYTE_DOT)
      for (int64_t k = first; k < last; k += STEP)
        pack_bytes(row + k, K - k, to[m * ldx + k / STEP]);
#endif
    } else if constexpr (FORM == Int8Form::Widened) {
      // [K / 2][M][2], as tiles take their right operand.
      for (int64_t k = first; k < last; ++k)
        to[k / 2 * (2 * M) + 2 * m + k % 2] = k < K ? row[k] : bf16{0};
    } else {
      for (int64_t k = first; k < last; k += Vec::W)
        store(to + m * ldx + k,
              k < K ? load(row + k, int(std::min<int64_t>(Vec::W, K - k))) : zero());
    }
  }

  template <class Weight, int MATS, class Done>
  static void planes(int64_t first, int64_t last, const Weight (&w)[MATS], int64_t K, int64_t G,
                     const Element* x, const float* sums, Done&& done) {
#if defined(DSPARK_PLANES)
    alignas(64) float results[MATS][M][BLOCK];
    const float* scales = Digits<T, M>::scales(const_cast<int8_t*>(x), K);
    configure_square_tiles();
    for (int64_t n = first; n < last; n += BLOCK) {
      const int count = int(std::min<int64_t>(BLOCK, last - n));
      for (int i = 0; i < MATS; ++i) {
        // What is read after these rows: the other weight's, or the first one's next.
        const Weight& then = w[(i + 1) % MATS];
        const int64_t from = i + 1 < MATS ? n : n + BLOCK;
        const Next next(then.q + from * then.ld, std::min<int64_t>(BLOCK, last - from) * then.ld,
                        K / 64);
        plane_blocks<T, M>(reinterpret_cast<const int8_t*>(w[i].q) + n * w[i].ld, count, w[i].ld,
                           next, x, scales, K, results[i]);
        int_finish<GROUPED, false, M>(w[i], n, count, G, sums, results[i]);
      }
      done(n, count, results);
    }
    _tile_release();
#endif
  }

  template <class Weight, int MATS, class Done>
  static void widened(int64_t first, int64_t last, const Weight (&w)[MATS], int64_t K, int64_t G,
                      const Element* x, const float* sums, char* work, Done&& done) {
#if defined(DSPARK_TILES)
    alignas(64) float results[MATS][M][BLOCK];
    configure_square_tiles();
    // Rows that a last block lacks are multiplied too.
    std::memset(work, 0, IntProduct::work(K));
    for (int64_t n = first; n < last; n += BLOCK) {
      const int count = int(std::min<int64_t>(BLOCK, last - n));
      for (int i = 0; i < MATS; ++i) {
        int_tile_block<M, GROUPED>(w[i], n, count, K, G, x, reinterpret_cast<bf16*>(work),
                                   results[i]);
        int_finish<GROUPED, false, M>(w[i], n, count, G, sums, results[i]);
      }
      done(n, count, results);
    }
    _tile_release();
#endif
  }

  template <class Weight, int MATS, class Done>
  static void streams(int64_t first, int64_t last, const Weight (&w)[MATS], int64_t K, int64_t G,
                      const Element* x, const float* sums, char* work, Done&& done) {
    [[maybe_unused]] constexpr int MT = Vec::W == 16 ? (M < 4 ? M : 4) : (M < 2 ? M : 2);
    constexpr int STREAMS = R / MATS, STRIP = 16;
    [[maybe_unused]] const int64_t lds = spread(K);
    float* scales = reinterpret_cast<float*>(work);
    alignas(64) float results[STREAMS][MATS][M][BLOCK];
    const int64_t each = (last - first + STREAMS - 1) / STREAMS;
    for (int64_t from = 0; from < each; from += STRIP) {
      const int strip = int(std::min<int64_t>(STRIP, each - from));
      for (int j = 0; j < strip; ++j) {
        const uint8_t* rows[R];
        float* out[R];
        for (int s = 0; s < STREAMS; ++s) {
          // The last stream may be shorter; what it reads again is not used.
          const int64_t n = std::min(first + s * each + from + j, last - 1);
          for (int i = 0; i < MATS; ++i) {
            rows[s * MATS + i] = w[i].q + n * w[i].ld;
            out[s * MATS + i] = &results[s][i][0][j];
            if constexpr (GROUPED) spread_scales(w[i], n, K, G, scales + (s * MATS + i) * lds);
          }
        }
        const uint8_t* const(&read)[R] = rows;
        float* const(&written)[R] = out;
        if constexpr (FORM == Int8Form::Digits) {
#if defined(DSPARK_BYTE_DOT)
          digit_tiles_of<T, R, M>(read, w[0].ld, x, K, written);
#endif
        } else {
          int_tiles_of<R, M, MT, GROUPED>(read, w[0].ld, x, elements(K), K, scales, lds, written);
        }
      }
      for (int s = 0; s < STREAMS; ++s) {
        const int64_t n = first + s * each + from;
        const int count = int(std::min<int64_t>(strip, std::min(n - from + each, last) - n));
        if (count <= 0) continue;
        for (int i = 0; i < MATS; ++i)
          int_finish<GROUPED, true, M>(w[i], n, count, G, sums, results[s][i]);
        done(n, count, results[s]);
      }
    }
  }
};

}  // namespace dspark
