// Skinny products with int8 or int4 weights: y[M, N] = x[M, K] ((q - z) s)[N, K]^T, M = 1 ... 16.
//
// q is read as it lies: int8 rows, or int4 rows packed by `pack_int4` (dspark_compile/ops/
// quantized.py): of each 64 numbers, byte j holds number j low and number 32 + j high. s and z have
// one value for each row, or for each group of a multiple of 32 in a row. x is never quantised.
//
//   Fused    float lanes: q widened to float                          any type, any CPU
//   Tiles    a block of rows widened to bf16 in L1, then tdpbf16ps    bf16, AMX, M >= 5
//
// (dpbf16ps would need q as bf16: to make that costs more than the instruction saves.)
//
// A row's scale multiplies its sum; a group's the sum over 32 products (Fused, M = 1), the widened
// weights (Fused), or the weights before they are rounded to bf16 (Tiles), as code does that
// dequantises.
// Zero points cost a correction: the sum of (q - z) s x is that of q s x less z s times x's own sum
// over the group, which is computed once for all rows of W.
#pragma once
#include "product.h"

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

template <class Q, class T, int M>
constexpr Form int_form() {
  if (!std::is_same<T, bf16>::value) return Form::Fused;
#if defined(DSPARK_TILES)
  if (M >= 5) return Form::Tiles;
#endif
  return Form::Fused;
}

// -- x

// x as a product wants it, and the sums of its groups. Threads share the work, or for one row make
// a copy each.
template <class Q, class T, int M>
class IntStaged {
 public:
  static constexpr Form FORM = int_form<Q, T, M>();
  using Element = typename std::conditional<FORM == Form::Fused, float, bf16>::type;

  static int64_t padded(int64_t K) { return (K + PAIR - 1) / PAIR * PAIR; }
  static size_t bytes(int64_t K, int64_t G, int threads) {
    const size_t one = aligned(sizeof(Element) * M * padded(K)) + aligned(sizeof(float) * M * G);
    return one * (M == 1 ? threads : 1);
  }

  const Element* x;
  const float* sums;  // [M][G], where there are zero points
  int64_t ldx;

  IntStaged(Team team, const T* from, int64_t ld, int64_t K, int64_t G, bool zeros, char* memory) {
    if (M == 1) memory += bytes(K, G, 1) * team.thread;
    const Team workers = M == 1 ? Team{} : team;
    ldx = padded(K);
    Element* to = reinterpret_cast<Element*>(memory);
    const auto [first, last] = workers.share(ldx, PAIR);
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
    if constexpr (FORM == Form::Tiles) {
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

// The products of R rows of W with MT rows of x; result r, m goes to out[m * BLOCK + r]. With
// GROUPED, scales[r * lds + p] multiplies plane p of row r. `next` is where the rows read after
// these start, in bytes from these.
template <class Q, int R, int MT, bool GROUPED>
inline void int_tile(const uint8_t* w, int64_t ldw, int64_t next, const float* packed, int64_t ldx,
                     int64_t K, const float* scales, int64_t lds, float* out) {
  constexpr int W = Vec::W;
  constexpr int COUNT = (R * MT + W - 1) / W * W;
  constexpr int BYTES = STEP_BYTES<Q>;
  Vec a[COUNT];
  for (int i = 0; i < COUNT; ++i) a[i] = zero();
  auto steps = [&](int64_t from, int64_t to, int64_t ahead, bool whole)
                   __attribute__((always_inline)) {
    for (int64_t s = from; s < to; ++s) {
      const uint8_t* q = w + s * BYTES;
      if (BYTES == 64 || s % 2 == 0)
        for (int r = 0; r < R; ++r) __builtin_prefetch(q + r * ldw + ahead, 0, 3);
      const float* x = packed + s * PAIR;
      Vec part[2][R];
      for (int j = 0; j < PLANE; j += W) {
        Vec b[2][MT];
        for (int m = 0; m < MT; ++m)
          for (int p : {0, 1}) b[p][m] = load(x + m * ldx + p * PLANE + j);
        for (int r = 0; r < R; ++r) {
          Vec c[2];
          numbers<Q>(q + r * ldw, j, whole, int(K - s * PAIR), c[0], c[1]);
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
  const int64_t ahead = std::min<int64_t>(AHEAD / BYTES, whole);
  steps(0, whole - ahead, ahead * BYTES, true);
  steps(whole - ahead, whole, (ahead - whole) * BYTES + next, true);
  if (Q::BITS == 8 && whole * PAIR < K) steps(whole, whole + 1, 0, false);
  float flat[COUNT];
  for (int i = 0; i < COUNT; i += W) store(flat + i, sums(a + i));
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < MT; ++m) out[m * BLOCK + r] = flat[r * MT + m];
}

// All M for R rows, a few at a time; q comes from memory the first time, from cache after.
template <class Q, int R, int M, int MT, bool GROUPED>
inline void int_tiles_of(const uint8_t* w, int64_t ldw, int64_t next, const float* packed,
                         int64_t ldx, int64_t K, const float* scales, int64_t lds, float* out) {
  constexpr int NOW = M < MT ? M : MT;
  int_tile<Q, R, NOW, GROUPED>(w, ldw, next, packed, ldx, K, scales, lds, out);
  if constexpr (M > MT)
    int_tiles_of<Q, R, M - MT, MT, GROUPED>(w, ldw, next, packed + MT * ldx, ldx, K, scales, lds,
                                            out + MT * BLOCK);
}

// How many scales a row takes as floats, one for each plane of whole steps.
inline int64_t spread(int64_t K) { return (K + PAIR - 1) / PAIR * 2; }

// The scales of R rows as floats; 0 for a plane behind K.
template <int R, class Weight>
inline void spread_scales(const Weight& w, int64_t n, int64_t K, int64_t G, float* to) {
  const int64_t each = K / PLANE / G;
  for (int r = 0; r < R; ++r) {
    const typename Weight::S* from = w.scale + (n + r) * G;
    float* row = to + r * spread(K);
    row[spread(K) - 1] = 0;
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
}

// Takes the zero points of `count` rows out of results, where each group has its own.
template <int M, class Weight>
inline void correct(const Weight& w, int64_t n, int count, int64_t G, const float* sums_of_x,
                    float (*results)[BLOCK]) {
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

// Memory that one thread works in.
template <class Q, class T, int M>
size_t int_work_bytes(int64_t K) {
  if (int_form<Q, T, M>() == Form::Tiles) return 16 * BLOCK * PLANE * sizeof(bf16);
  return aligned(sizeof(float) * 4 * spread(K));
}

// The products of rows [first, last) of MATS weights of one shape with x. After each block of rows
// calls done(n, count, results), results[i][m][r] for weight i, row n + r, scaled.
template <class Q, class T, int M, int MATS, bool GROUPED, class Weight, class Done>
void product_int(int64_t first, int64_t last, const Weight (&w)[MATS], int64_t K, int64_t G,
                 const IntStaged<Q, T, M>& x, char* work, Done&& done) {
  constexpr Form FORM = int_form<Q, T, M>();
  if (first >= last) return;
  alignas(64) float results[MATS][M][BLOCK];
#if defined(DSPARK_TILES)
  if constexpr (FORM == Form::Tiles) {
    configure_tiles();
    // Rows that a last block lacks are multiplied too.
    std::memset(work, 0, int_work_bytes<Q, T, M>(K));
  }
#endif
  for (int64_t n = first; n < last; n += BLOCK) {
    const int count = int(std::min<int64_t>(BLOCK, last - n));
    for (int i = 0; i < MATS; ++i) {
      if constexpr (FORM == Form::Tiles) {
#if defined(DSPARK_TILES)
        int_tile_block<Q, M, GROUPED>(w[i], n, count, K, G, x.x, reinterpret_cast<bf16*>(work),
                                      results[i]);
#endif
      } else {
        constexpr int MT = Vec::W == 16 ? (M < 4 ? M : 4) : (M < 2 ? M : 2);
        constexpr int R = 4;
        const int64_t ld = w[i].ld, lds = spread(K);
        float* scales = reinterpret_cast<float*>(work);
        int r = 0;
        for (; r + R <= count; r += R) {
          if constexpr (GROUPED) spread_scales<R>(w[i], n + r, K, G, scales);
          int_tiles_of<Q, R, M, MT, GROUPED>(w[i].q + (n + r) * ld, ld, R * ld, x.x, x.ldx, K,
                                                   scales, lds, &results[i][0][r]);
        }
        for (; r < count; ++r) {
          if constexpr (GROUPED) spread_scales<1>(w[i], n + r, K, G, scales);
          int_tiles_of<Q, 1, M, MT, GROUPED>(w[i].q + (n + r) * ld, ld, ld, x.x, x.ldx, K,
                                                   scales, lds, &results[i][0][r]);
        }
        if constexpr (GROUPED && Weight::ZEROS)
          correct<M>(w[i], n, count, G, x.sums, results[i]);
      }
      if constexpr (!GROUPED) {
        for (int m = 0; m < M; ++m)
          for (int j = 0; j < count; j += Vec::W) {
            const int lanes = std::min(Vec::W, count - j);
            Vec v = load(results[i][m] + j);
            if constexpr (Weight::ZEROS)
              v = v - load(w[i].zero + n + j, lanes) * all(x.sums[m]);
            store(results[i][m] + j, v * load(w[i].scale + n + j, lanes));
          }
      }
    }
    done(n, count, results);
  }
#if defined(DSPARK_TILES)
  if constexpr (FORM == Form::Tiles) _tile_release();
#endif
}

}  // namespace dspark
