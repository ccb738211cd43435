// Skinny products with int8 or int4 weights: y[M, N] = x[M, K] ((q - z) s)[N, K]^T, M = 1 ... 16.
//
// q is read as it lies: int8 rows, or int4 rows packed by `pack_int4` (dspark_compile/ops/
// quantized.py): of each 64 numbers, byte j holds number j low and number 32 + j high. s and z have
// one value for each row, or for each group of a multiple of 32 in a row.
//
//   Fused    float lanes: q widened to float                          any type, any CPU
//   Bytes    dpbusd: q times x as 16-bit numbers, see below           half types, AMX, M <= 2
//   Tiles    a block of rows widened to bf16 in L1, then tdpbf16ps    bf16, AMX, M >= 5
//
// (To make bf16 of q for dpbf16ps costs more than the instruction saves.) The first two read a
// share as several runs of rows side by side, see product.h.
//
// Bytes holds each 32 numbers of x as 16-bit integers of one scale, split into two bytes: what is
// at least 1/64 of their largest is exact as a bfloat16, the others to 2^-15 of the largest. Sums
// over four products are exact, and it takes fewer instructions than Fused.
//
// A row's scale multiplies its sum; a group's the sum over 32 products (Bytes; Fused, M = 1), the
// widened weights (Fused), or the weights before they are rounded to bf16 (Tiles), as code does
// that dequantises.
// Zero points cost a correction: the sum of (q - z) s x is that of q s x less z s times x's own sum
// over the group, which is computed once for all rows of W.
#pragma once
#include "product.h"

// dpbusd is asked for where it is used: every CPU with AMX has it.
#if defined(__AMX_INT8__) && defined(__GNUC__) && !defined(__clang__)
#define DSPARK_BYTE_DOT 1
#endif

namespace dspark {

struct Int8 {
  static constexpr int BITS = 8;
};
struct Int4 {
  static constexpr int BITS = 4;
};

constexpr int PLANE = 32;  // numbers that have one scale, at least
constexpr int PAIR = 64;   // two planes: one step

// Bytes that 64 numbers take.
template <class Q>
constexpr int STEP_BYTES = PAIR * Q::BITS / 8;

// No zero points.
struct Centred {};

// A weight. Rows of q are `ld` bytes apart; scale and zero are contiguous, [N] or [N, G].
template <class S_, class Z>
struct Quantized {
  using S = S_;
  static constexpr bool ZEROS = !std::is_same<Z, Centred>::value;
  const uint8_t* q;
  int64_t ld;
  const S* scale;
  const Z* zero;
};

enum class IntForm { Fused, Bytes, Tiles };

template <class Q, class T, int M>
constexpr IntForm int_form() {
#if defined(DSPARK_TILES)
  if (M >= 5 && std::is_same<T, bf16>::value) return IntForm::Tiles;
#endif
#if defined(DSPARK_BYTE_DOT)
  if (M <= 2 && !std::is_same<T, float>::value) return IntForm::Bytes;
#endif
  return IntForm::Fused;
}

// 128 numbers of x for Bytes, as the bytes of W meet them. int8: [0] the first 64, [1] the others.
// int4: [0] the first and the third 32, which low nibbles multiply, [1] the others.
struct alignas(64) ByteStep {
  int8_t high[2][64], low[2][64];  // 256 high + low
  float scale[2][16];              // of the four numbers that end up in each lane
  float offset[2][16];             // their sum, times what q is too large by: see UP
};

// Added to q to make it unsigned.
template <class Q>
constexpr int UP = 1 << (Q::BITS - 1);

// Where plane p of a step lies in a ByteStep: which half, and from which byte on.
template <class Q>
constexpr int half_of(int p) { return Q::BITS == 4 ? p % 2 : p / 2; }
template <class Q>
constexpr int byte_of(int p) { return (Q::BITS == 4 ? p / 2 : p % 2) * PLANE; }

// -- x

// x as a product wants it, and the sums of its groups. Threads share the work, or for one row make
// a copy each.
#if defined(DSPARK_BYTE_DOT)
#pragma GCC push_options
#pragma GCC target("avx512vnni")

// Numbers [0, 128) of a row of which `left` are there.
template <class Q, class T>
inline void pack_bytes(const T* row, int64_t left, ByteStep& to) {
  for (int plane = 0; plane < 4; ++plane) {
    const int which = half_of<Q>(plane), at = byte_of<Q>(plane);
    Vec x[2];
    for (int i : {0, 1}) {
      const int64_t from = plane * PLANE + 16 * i;
      x[i] = left > from ? load(row + from, int(std::min<int64_t>(16, left - from))) : zero();
    }
    const __m512 most = _mm512_max_ps(_mm512_abs_ps(x[0].v), _mm512_abs_ps(x[1].v));
    const __mmask16 odd = _mm512_cmp_ps_mask(x[0].v, x[0].v, _CMP_UNORD_Q) |
                          _mm512_cmp_ps_mask(x[1].v, x[1].v, _CMP_UNORD_Q);
    const float top = _mm512_reduce_max_ps(most);
    // A power of two, so that what fits is exact; NaN and infinity come out as NaN.
    const bool finite = !odd && top <= 3.4e38f;
    int exponent = 0;
    std::frexp(finite ? top : 0, &exponent);
    const float scale = finite ? std::ldexp(1.0f, std::max(exponent - 14, -126)) : NAN;
    // top < 2^exponent: numbers are at most 2^14, which two bytes hold with room for rounding.
    const __m512 by = _mm512_set1_ps(finite ? 1 / scale : 0);
    for (int i : {0, 1}) {
      const __m512i y = _mm512_cvtps_epi32(_mm512_mul_ps(x[i].v, by));
      const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(y, _mm512_set1_epi32(128)), 8);
      _mm_store_si128((__m128i*)(to.high[which] + at + 16 * i), _mm512_cvtepi32_epi8(high));
      _mm_store_si128((__m128i*)(to.low[which] + at + 16 * i), _mm512_cvtepi32_epi8(y));
    }
    for (int i = 0; i < 8; ++i) to.scale[which][at / 4 + i] = scale;
  }
  const __m512i up = _mm512_set1_epi8(char(UP<Q>));
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

template <class Q, class T, int M>
class IntStaged {
 public:
  static constexpr IntForm FORM = int_form<Q, T, M>();
  static constexpr bool BYTES = FORM == IntForm::Bytes;
  static constexpr int64_t STEP = BYTES ? 2 * PAIR : PAIR;  // numbers
  using Element = typename std::conditional<
      BYTES, ByteStep,
      typename std::conditional<FORM == IntForm::Fused, float, bf16>::type>::type;

  static int64_t padded(int64_t K) { return (K + STEP - 1) / STEP * STEP; }
  static int64_t elements(int64_t K) { return BYTES ? padded(K) / STEP : padded(K); }
  static size_t bytes(int64_t K, int64_t G, int threads) {
    const size_t one = aligned(sizeof(Element) * M * elements(K)) + aligned(sizeof(float) * M * G);
    return one * (M == 1 ? threads : 1);
  }

  const Element* x;
  const float* sums;  // [M][G], where there are zero points
  int64_t ldx;

  IntStaged(Team team, const T* from, int64_t ld, int64_t K, int64_t G, bool zeros, char* memory) {
    if (M == 1) memory += bytes(K, G, 1) * team.thread;
    const Team workers = M == 1 ? Team{} : team;
    ldx = elements(K);
    Element* to = reinterpret_cast<Element*>(memory);
    const auto [first, last] = workers.share(padded(K), STEP);
    for (int m = 0; m < M; ++m) pack(from + m * ld, m, K, first, last, to);
    float* total = reinterpret_cast<float*>(memory + aligned(sizeof(Element) * M * ldx));
    if (zeros) {
      const int64_t group = K / G;
      const auto [begin, end] = workers.share(M * G);
      for (int64_t i = begin; i < end; ++i) {
        const T* part = from + i / G * ld + i % G * group;
        Vec a = zero();
        for (int64_t k = 0; k < group; k += Vec::W)
          a = a + load(part + k, int(std::min<int64_t>(Vec::W, group - k)));
        total[i] = sum(a);
      }
    }
    workers.barrier();
    x = to;
    sums = total;
  }

 private:
  void pack(const T* row, int m, int64_t K, int64_t first, int64_t last, Element* to) const {
    if constexpr (BYTES) {
#if defined(DSPARK_BYTE_DOT)
      for (int64_t k = first; k < last; k += STEP)
        pack_bytes<Q>(row + k, K - k, to[m * ldx + k / STEP]);
#endif
    } else if constexpr (FORM == IntForm::Tiles) {
      // [K / 2][M][2], as tiles take their right operand.
      for (int64_t k = first; k < last; ++k)
        to[k / 2 * (2 * M) + 2 * m + k % 2] = k < K ? row[k] : bf16{0};
    } else {
      for (int64_t k = first; k < last; k += Vec::W)
        store(to + m * ldx + k,
              k < K ? load(row + k, int(std::min<int64_t>(Vec::W, K - k))) : zero());
    }
  }
};

// -- q

// 2 W numbers of a step at q: those from j on in the first plane and in the second. `left` is how
// many numbers the row has from the step's first on.
template <class Q>
inline void numbers(const uint8_t* q, int j, bool whole, int left, Vec& low, Vec& high) {
  if constexpr (Q::BITS == 8) {
    const int8_t* p = reinterpret_cast<const int8_t*>(q);
    if (whole) {
      low = load(p + j);
      high = load(p + PLANE + j);
    } else {
      low = left > j ? load(p + j, left - j) : zero();
      high = left > PLANE + j ? load(p + PLANE + j, left - PLANE - j) : zero();
    }
    return;
  }
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  const Vec table = {_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1)};
  const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(q + j)));
  // Only the lowest 4 bits of an index count.
  low = {_mm512_permutexvar_ps(both, table.v)};
  high = {_mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), table.v)};
#elif defined(__AVX2__)
  const __m256i both = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(q + j)));
  low = {_mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(both, 28), 28))};
  high = {_mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(both, 24), 28))};
#else
  for (int i = 0; i < Vec::W; ++i) {
    low.v[i] = float(((q[j + i] & 15) ^ 8) - 8);
    high.v[i] = float(((q[j + i] >> 4) ^ 8) - 8);
  }
#endif
}

// -- rows that share one pass over x

// The products of R rows of W with MT rows of x; result r, m goes to out[r][m * BLOCK]. With
// GROUPED, scales[r * lds + p] multiplies plane p of row r. The rows that are read after these
// start `next` bytes behind them.
template <class Q, int R, int MT, bool GROUPED>
inline void int_tile(const uint8_t* const (&w)[R], int64_t next, const float* packed, int64_t ldx,
                     int64_t K, const float* scales, int64_t lds, float* const (&out)[R]) {
  constexpr int W = Vec::W;
  constexpr int COUNT = (R * MT + W - 1) / W * W;
  constexpr int BYTES = STEP_BYTES<Q>;
  Vec a[COUNT];
  for (int i = 0; i < COUNT; ++i) a[i] = zero();
  auto steps = [&](int64_t from, int64_t to, int64_t ahead, bool whole)
                   __attribute__((always_inline)) {
    for (int64_t s = from; s < to; ++s) {
      if (BYTES == 64 || s % 2 == 0)
        for (int r = 0; r < R; ++r) __builtin_prefetch(w[r] + s * BYTES + ahead, 0, 3);
      const float* x = packed + s * PAIR;
      Vec part[2][R];
      for (int j = 0; j < PLANE; j += W) {
        Vec b[2][MT];
        for (int m = 0; m < MT; ++m)
          for (int p : {0, 1}) b[p][m] = load(x + m * ldx + p * PLANE + j);
        for (int r = 0; r < R; ++r) {
          Vec c[2];
          numbers<Q>(w[r] + s * BYTES, j, whole, int(K - s * PAIR), c[0], c[1]);
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
  const int64_t whole = Q::BITS == 8 ? K / PAIR : (K + PAIR - 1) / PAIR;
  if (next == whole * BYTES) {
    // One row follows on the other: the distance may be more than a row.
    steps(0, whole, AHEAD, true);
  } else {
    const int64_t ahead = std::min<int64_t>(AHEAD / BYTES, whole);
    steps(0, whole - ahead, ahead * BYTES, true);
    steps(whole - ahead, whole, (ahead - whole) * BYTES + next, true);
  }
  if (Q::BITS == 8 && whole * PAIR < K) steps(whole, whole + 1, 0, false);
  float flat[COUNT];
  for (int i = 0; i < COUNT; i += W) store(flat + i, sums(a + i));
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < MT; ++m) out[r][m * BLOCK] = flat[r * MT + m];
}

#if defined(DSPARK_BYTE_DOT)
#pragma GCC push_options
#pragma GCC target("avx512vnni")

// The same in bytes.
template <class Q, int R, int MT, bool GROUPED>
__attribute__((noinline)) void int_tile(const uint8_t* const (&w)[R], int64_t next,
                                        const ByteStep* packed, int64_t ldx, int64_t K,
                                        const float* scales, int64_t lds,
                                        float* const (&out)[R]) {
  constexpr int COUNT = (R * MT + 15) / 16 * 16;
  constexpr int BYTES = 2 * STEP_BYTES<Q>;
  Vec a[COUNT];
  for (int i = 0; i < COUNT; ++i) a[i] = zero();
  const __m512i mask = _mm512_set1_epi8(15), up = _mm512_set1_epi8(char(UP<Q>));
  // 64 numbers of step q as 0 ... 2 UP: `left` bytes of it are there. Behind them x is zero.
  auto numbers = [&](const uint8_t* q, int p, int64_t left) __attribute__((always_inline)) {
    if (Q::BITS == 8) q += 64 * p, left -= 64 * p;
    const __m512i x = left >= 64 ? _mm512_loadu_si512(q)
                                 : _mm512_maskz_loadu_epi8(
                                       left <= 0 ? 0 : (__mmask64(1) << left) - 1, q);
    if (Q::BITS == 8) return _mm512_xor_si512(x, up);
    // (x & 15) ^ 8
    return _mm512_ternarylogic_epi32(p ? _mm512_srli_epi16(x, 4) : x, mask, up, 0x6a);
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
              constexpr bool EIGHT = Q::BITS == 8;
              const __m512 each = _mm512_mask_broadcastss_ps(
                  _mm512_set1_ps(by[EIGHT ? 2 * p : p]), 0xff00,
                  _mm_load_ss(by + (EIGHT ? 2 * p + 1 : p + 2)));
              to.v = _mm512_fmadd_ps(part, each, to.v);
            } else {
              to.v = _mm512_add_ps(part, to.v);
            }
          }
        }
      }
    }
  };
  const int64_t bytes = Q::BITS == 8 ? K : (K + PAIR - 1) / PAIR * PLANE, whole = bytes / BYTES;
  if (next == bytes) {
    steps(0, whole, AHEAD, BYTES);
  } else {
    const int64_t ahead = std::min<int64_t>(AHEAD / BYTES, whole);
    steps(0, whole - ahead, ahead * BYTES, BYTES);
    steps(whole - ahead, whole, (ahead - whole) * BYTES + next, BYTES);
  }
  if (whole * BYTES < bytes) steps(whole, whole + 1, 0, bytes - whole * BYTES);
  float flat[COUNT];
  for (int i = 0; i < COUNT; i += 16) store(flat + i, sums(a + i));
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < MT; ++m) out[r][m * BLOCK] = flat[r * MT + m];
}

#pragma GCC pop_options
#endif

// All M for R rows, a few at a time; q comes from memory the first time, from cache after.
template <class Q, int R, int M, int MT, bool GROUPED, class Element>
inline void int_tiles_of(const uint8_t* const (&w)[R], int64_t next, const Element* packed,
                         int64_t ldx, int64_t K, const float* scales, int64_t lds,
                         float* const (&out)[R]) {
  constexpr int NOW = M < MT ? M : MT;
  int_tile<Q, R, NOW, GROUPED>(w, next, packed, ldx, K, scales, lds, out);
  if constexpr (M > MT) {
    float* below[R];
    for (int r = 0; r < R; ++r) below[r] = out[r] + MT * BLOCK;
    float* const(&written)[R] = below;
    int_tiles_of<Q, R, M - MT, MT, GROUPED>(w, next, packed + MT * ldx, ldx, K, scales, lds,
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

// Takes the zero points of `count` rows out of results, where each group has its own.
template <int M, class Weight>
inline void correct(const Weight& w, int64_t n, int count, int64_t G, const float* sums_of_x,
                    float (*results)[BLOCK]) {
  using Zero = typename std::decay<decltype(*w.zero)>::type;
  if constexpr (std::is_integral<Zero>::value) {
    // Symmetric weights often carry zero points all the same.
    const Zero* from = w.zero + n * G;
    Zero any = 0;
    for (int64_t i = 0; i < count * G; ++i) any |= from[i];
    if (any == 0) return;
  }
  constexpr int W = Vec::W;
  for (int r = 0; r < count; r += W) {
    const int rows = std::min(W, count - r);
    for (int m = 0; m < M; ++m) {
      Vec a[W];
      for (int i = 0; i < W; ++i) a[i] = zero();
      for (int64_t g = 0; g < G; g += W) {
        const int lanes = int(std::min<int64_t>(W, G - g));
        const Vec x = load(sums_of_x + m * G + g, lanes);
        const int64_t at = (n + r) * G + g;
        for (int i = 0; i < rows; ++i)
          a[i] = fma(load(w.scale + at + i * G, lanes) * load(w.zero + at + i * G, lanes), x, a[i]);
      }
      store(results[m] + r, load(results[m] + r, rows) - sums(a), rows);
    }
  }
}

// -- tiles

#if defined(DSPARK_TILES)

// The 16 values of a nibble as bf16, twice: an index of 5 bits finds the low 4 bits' either way.
inline __m512i nibbles(Vec values) {
  const __m256i half = (__m256i)_mm512_cvtneps_pbh(values.v);
  return _mm512_broadcast_i64x4(half);
}
inline Vec nibble_values() {
  return {_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1)};
}
inline __m512i widen_bytes(const uint8_t* q) {
  return _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)q));
}

constexpr int CHUNK = 16;  // planes of 32 rows that are widened together: 32 KiB

// One plane of a row as bf16: the numbers themselves, or (q - z) s rounded.
template <class Q, bool GROUPED>
inline __m512i plane(const uint8_t* row, int64_t p, int64_t K, float s, float z) {
  if constexpr (Q::BITS == 4) {
    const __m512i both = widen_bytes(row + p / 2 * PLANE);
    Vec values = nibble_values();
    if constexpr (GROUPED) values = (values - all(z)) * all(s);
    return _mm512_permutexvar_epi16(p % 2 ? _mm512_srli_epi16(both, 4) : both, nibbles(values));
  } else {
    const int8_t* q = reinterpret_cast<const int8_t*>(row) + p * PLANE;
    const int left = int(std::min<int64_t>(K - p * PLANE, PLANE));
    Vec low = load(q, left), high = left > 16 ? load(q + 16, left - 16) : zero();
    if constexpr (GROUPED) low = (low - all(z)) * all(s), high = (high - all(z)) * all(s);
    return (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v);
  }
}

// Up to 32 rows of W from row n on with M rows of x.
template <class Q, int M, bool GROUPED, class Weight>
inline void int_tile_block(const Weight& w, int64_t n, int count, int64_t K, int64_t G,
                           const bf16* packed, bf16* wide, float (*results)[BLOCK]) {
  const int64_t planes = (K + PLANE - 1) / PLANE, each = GROUPED ? planes / G : 1;
  _tile_zero(0);
  _tile_zero(1);
  for (int64_t from = 0; from < planes; from += CHUNK) {
    const int64_t to = std::min(from + CHUNK, planes);
    // What is read next: these rows' next chunk, or the first of the rows that follow.
    const int64_t ahead =
        to < planes ? CHUNK * STEP_BYTES<Q> / 2 : BLOCK * w.ld - from * STEP_BYTES<Q> / 2;
    // The group of the first plane, and the first plane of the next.
    const int64_t group = from / each, until = (group + 1) * each;
    for (int r = 0; r < count; ++r) {
      const uint8_t* row = w.q + (n + r) * w.ld;
      for (int64_t i = from * STEP_BYTES<Q> / 2; i < to * STEP_BYTES<Q> / 2; i += 64)
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
                           plane<Q, GROUPED>(row, p, K, s, z));
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

// Rows whose accumulators fit into registers together: runs that are read side by side.
template <int M>
constexpr int INT_ROWS = Vec::W == 16 && M <= 2 ? 8 : 4;

// Memory that one thread works in.
template <class Q, class T, int M>
size_t int_work_bytes(int64_t K) {
  if (int_form<Q, T, M>() == IntForm::Tiles) return 16 * BLOCK * PLANE * sizeof(bf16);
  return aligned(sizeof(float) * INT_ROWS<M> * spread(K));
}

// Scales sums and takes zero points out, as far as that was not done on the way.
template <bool GROUPED, bool CORRECT, int M, class Weight>
inline void int_finish(const Weight& w, int64_t n, int count, int64_t G, const float* sums_of_x,
                       float (*results)[BLOCK]) {
  if constexpr (GROUPED) {
    if constexpr (CORRECT && Weight::ZEROS) correct<M>(w, n, count, G, sums_of_x, results);
    return;
  }
  for (int m = 0; m < M; ++m)
    for (int j = 0; j < count; j += Vec::W) {
      const int lanes = std::min(Vec::W, count - j);
      Vec v = load(results[m] + j);
      if constexpr (Weight::ZEROS)
        v = v - load(w.zero + n + j, lanes) * all(sums_of_x[m]);
      store(results[m] + j, v * load(w.scale + n + j, lanes));
    }
}

// The products of rows [first, last) of MATS weights of one shape with x. After each block of rows
// calls done(n, count, results), results[i][m][r] for weight i, row n + r, scaled.
template <class Q, class T, int M, int MATS, bool GROUPED, class Weight, class Done>
void product_int(int64_t first, int64_t last, const Weight (&w)[MATS], int64_t K, int64_t G,
                 const IntStaged<Q, T, M>& x, char* work, Done&& done) {
  constexpr IntForm FORM = int_form<Q, T, M>();
  if (first >= last) return;
  if constexpr (FORM == IntForm::Tiles) {
#if defined(DSPARK_TILES)
    alignas(64) float results[MATS][M][BLOCK];
    configure_tiles();
    // Rows that a last block lacks are multiplied too.
    std::memset(work, 0, int_work_bytes<Q, T, M>(K));
    for (int64_t n = first; n < last; n += BLOCK) {
      const int count = int(std::min<int64_t>(BLOCK, last - n));
      for (int i = 0; i < MATS; ++i) {
        int_tile_block<Q, M, GROUPED>(w[i], n, count, K, G, x.x, reinterpret_cast<bf16*>(work),
                                      results[i]);
        int_finish<GROUPED, false, M>(w[i], n, count, G, x.sums, results[i]);
      }
      done(n, count, results);
    }
    _tile_release();
#endif
  } else {
    constexpr int MT = Vec::W == 16 ? (M < 4 ? M : 4) : (M < 2 ? M : 2);
    constexpr int R = INT_ROWS<M>, STREAMS = R / MATS, STRIP = 16;
    const int64_t lds = spread(K);
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
        int_tiles_of<Q, R, M, MT, GROUPED>(read, w[0].ld, x.x, x.ldx, K, scales, lds, written);
      }
      for (int s = 0; s < STREAMS; ++s) {
        const int64_t n = first + s * each + from;
        const int count = int(std::min<int64_t>(strip, std::min(n - from + each, last) - n));
        if (count <= 0) continue;
        for (int i = 0; i < MATS; ++i)
          int_finish<GROUPED, true, M>(w[i], n, count, G, x.sums, results[s][i]);
        done(n, count, results[s]);
      }
    }
  }
}

}  // namespace dspark
