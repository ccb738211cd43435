// Skinny matrix products: y[M, N] = x[M, K] W[N, K]^T for M = 1 ... 16, with tiles for more; W
// row-major as it lies.
//
// The weights are read once, from memory, and everything else follows from that. A thread takes a
// contiguous share of W's rows, and reads it as several streams or, for tiles, in blocks of 32 rows;
// a few rows at a time run over K in registers. x stays in cache as a packed copy. Three forms of
// the inner loop:
//
//   Fused    float lanes: W and x widened to float                    any type, any CPU
//   Dot      dpbf16ps: 32 products an instruction                     bf16, AVX-512-BF16, M < 4
//   Tiles    tdpbf16ps: W's rows as the left tile, x as the right     bf16, AMX, M >= 4
//
// More than 16 rows of x are groups of 16: a block of W, in cache by then, meets two at a time.
//
// A software prefetch runs some KiB ahead in each row and, at a row's end, on into a later tile: the
// hardware's own stops at every page. Where a CPU's own does not (SEQUENCE) one row of x goes
// without, and up to four do where W's rows are long.
#pragma once
#include <type_traits>

#include "parallel.h"
#include "reading.h"
#include "tiles.h"
#include "transpose.h"
#include "vec.h"

namespace dspark {

constexpr int BLOCK = 32;  // rows of W whose results are finished together

#if defined(__AVX512BF16__) && defined(__AVX512F__)
#define DSPARK_DOT 1
#endif

enum class Form { Fused, Dot, Tiles };

template <class T, int M>
constexpr Form form() {
  if (!std::is_same<T, bf16>::value) return Form::Fused;
#if defined(DSPARK_TILES)
  if (M >= 4) return Form::Tiles;
#endif
#if defined(DSPARK_DOT)
  return Form::Dot;
#endif
  return Form::Fused;
}

// How many elements of K one step takes, and what x is packed as.
template <class T, int M>
struct Packed {
  static constexpr Form FORM = form<T, M>();
  static constexpr int STEP = FORM == Form::Fused ? Vec::W : 32;
  using Element = typename std::conditional<FORM == Form::Fused, float, bf16>::type;

  // Whether rows that many elements apart fall on few sets of the first cache.
  static bool crowded(int64_t ld) {
    return FORM != Form::Tiles && M > 4 && ld * int64_t(sizeof(Element)) % 1024 == 0;
  }
  // A packed row's length.
  static int64_t padded(int64_t K) {
    const int64_t whole = (K + STEP - 1) / STEP * STEP;
    return crowded(whole) ? whole + STEP : whole;
  }
  // A tile's load reaches up to a line beyond the last row.
  static constexpr size_t BEYOND = FORM == Form::Tiles ? 64 : 0;
  static size_t bytes(int64_t K) { return aligned(sizeof(Element) * M * padded(K) + BEYOND); }
};

#if defined(DSPARK_TILES)

// Packs columns [first, last) of up to 16 rows of x for tiles: [K / 32][16][M][2].
template <int M>
void pack_tiles(const bf16* x, int64_t ldx, int64_t K, int64_t first, int64_t last, bf16* to) {
  int64_t k = first;
  // 16 pairs of columns at a time, each taken for a float.
  for (; k + 32 <= std::min(last, K); k += 32) {
    alignas(64) float pairs[16][16] = {};
    for (int m = 0; m < M; ++m) _mm512_store_si512(pairs[m], _mm512_loadu_si512(x + m * ldx + k));
    transpose(pairs, reinterpret_cast<float*>(to + k * M), M, 16, (1u << M) - 1);
  }
  for (; k < last; k += 2) {
    bf16* row = to + k / 2 * (2 * M);
    for (int m = 0; m < M; ++m) {
      row[2 * m] = k < K ? x[m * ldx + k] : bf16{0};
      row[2 * m + 1] = k + 1 < K ? x[m * ldx + k + 1] : bf16{0};
    }
  }
}

// The same for any M: one of that after another for each 16 rows.
template <int M>
void pack_groups(const bf16* x, int64_t ldx, int64_t K, int64_t padded, int64_t first, int64_t last,
                 bf16* to) {
  pack_tiles<(M < 16 ? M : 16)>(x, ldx, K, first, last, to);
  if constexpr (M > 16)
    pack_groups<M - 16>(x + 16 * ldx, ldx, K, padded, first, last, to + 16 * padded);
}

#endif

// Packs columns [first, last) of x, in whole steps: [M][K] with zeros behind K, or for tiles.
template <class T, int M>
void pack(const T* x, int64_t ldx, int64_t K, int64_t first, int64_t last,
          typename Packed<T, M>::Element* to) {
  using P = Packed<T, M>;
  const int64_t Kp = P::padded(K);
  if constexpr (P::FORM == Form::Tiles) {
#if defined(DSPARK_TILES)
    pack_groups<M>(x, ldx, K, Kp, first, last, to);
#endif
  } else {
    for (int m = 0; m < M; ++m)
      for (int64_t k = first; k < last; ++k) {
        const bool inside = k < K;
        if constexpr (P::FORM == Form::Fused) {
          to[m * Kp + k] = inside ? to_float(x[m * ldx + k]) : 0.0f;
        } else {
          to[m * Kp + k] = inside ? x[m * ldx + k] : bf16{0};
        }
      }
  }
}

// A step's numbers of a row of W, of x, and their products, by the form.
using OfFused = std::integral_constant<Form, Form::Fused>;
using OfDot = std::integral_constant<Form, Form::Dot>;
template <class T>
inline Vec load_w(const T* w, OfFused) {
  return load(w);
}
template <class T>
inline Vec load_w(const T* w, int count, OfFused) {
  return load(w, count);
}
inline Vec load_x(const float* x, OfFused) { return load(x); }
inline void multiply_add(Vec w, Vec x, Vec& a) { a = fma(w, x, a); }
#if defined(DSPARK_DOT)
inline __m512bh load_w(const bf16* w, OfDot) { return (__m512bh)_mm512_loadu_si512(w); }
inline __m512bh load_w(const bf16* w, int count, OfDot) {
  return (__m512bh)_mm512_maskz_loadu_epi16((1u << count) - 1, w);
}
inline __m512bh load_x(const bf16* x, OfDot) { return (__m512bh)_mm512_loadu_si512(x); }
inline void multiply_add(__m512bh w, __m512bh x, Vec& a) { a.v = _mm512_dpbf16_ps(a.v, w, x); }
#endif

// How many rows of x one pass over W takes, and how many rows of W: as many sums as there are
// registers for, 16 of AVX-512's 32 and 8 of 16 elsewhere. Five rows of x and more meet two of W:
// each number of W is loaded once, those of x come from the first cache.
template <int M>
struct Passes {
  static constexpr bool WIDE = Vec::W == 16;
  static constexpr int PASSES = WIDE ? (M + 7) / 8 : (M + 1) / 2;
  static constexpr int MT = (M + PASSES - 1) / PASSES;
  static constexpr int R = !WIDE ? 4 : M <= 2 ? 8 : M <= 4 ? 4 : 2;
};

// How many bytes ahead a tile of R rows asks in each, of `row` bytes: fewer rows ask further.
template <int R>
constexpr int64_t asked(int64_t row) {
  return R <= 2 && row < 2 * AHEAD ? 2 * AHEAD : AHEAD;
}

// Asks for what pass PASS of PASSES has to ask for: all rows where it is the only one. Several share
// them, so that memory is asked all the time: if the first asked for all, it would wait and memory
// would rest in the others.
template <int PASS, int PASSES, class T, int R>
inline __attribute__((always_inline)) void ask(const T* const (&w)[R], int64_t at) {
  for (int r = PASS; r < R; r += PASSES) __builtin_prefetch(w[r] + at, 0, 3);
}

// How many numbers a tile of R rows of W and MT rows of x gives, in whole vectors.
constexpr int tile_results(int R, int MT) { return (R * MT + Vec::W - 1) / Vec::W * Vec::W; }

// Nothing is asked for.
struct Unasked {};

// The products of R rows of W with MT rows of x; result r, m goes to out[r * MT + m], or is added
// there. It is pass PASS of PASSES over these rows: one alone asks ahead in each row, and from a
// row's end on into the one `next` elements on; several ask for the rows `next` elements on.
template <class T, int R, int MT, Form FORM, int PASS = 0, int PASSES = 1>
inline __attribute__((always_inline)) void tile(const T* const (&w)[R], int64_t next,
                                                const void* packed, int64_t ldx, int64_t K,
                                                float* out, bool add = false) {
  constexpr int W = Vec::W;
  constexpr int COUNT = tile_results(R, MT);
  constexpr int STEP = FORM == Form::Fused ? W : 32;
  constexpr int LINE = 64 / int(sizeof(T)) / STEP > 1 ? 64 / int(sizeof(T)) : STEP;
  using Element = typename std::conditional<FORM == Form::Fused, float, bf16>::type;
  const std::integral_constant<Form, FORM> form;
  Vec a[COUNT];
  for (int i = 0; i < COUNT; ++i) a[i] = zero();
  const auto steps = [&](int64_t from, int64_t to, auto ahead, auto part)
                         __attribute__((always_inline)) {
    // Three pointers reach up to nine rows: as one for each they would be fetched from the stack.
    const Element* x0 = static_cast<const Element*>(packed) + from;
    const Element *x3 = x0 + 3 * ldx, *x6 = x3 + 3 * ldx;
    static_assert(MT <= 9, "the pointers reach no further");
    for (int64_t k = from; k < to; k += STEP) {
      if constexpr (!std::is_same<decltype(ahead), Unasked>::value)
        if (LINE == STEP || k % LINE == 0) ask<PASS, PASSES>(w, k + ahead);
      const auto of_x = [&](int m) __attribute__((always_inline)) {
        return load_x((m < 3 ? x0 : m < 6 ? x3 : x6) + m % 3 * ldx, form);
      };
      const auto of_w = [&](int r) __attribute__((always_inline)) {
        return part ? load_w(w[r] + k, int(K - k), form) : load_w(w[r] + k, form);
      };
      if constexpr (R < MT) {
        decltype(of_w(0)) c[R];
        for (int r = 0; r < R; ++r) c[r] = of_w(r);
        for (int m = 0; m < MT; ++m) {
          const auto b = of_x(m);
          for (int r = 0; r < R; ++r) multiply_add(c[r], b, a[r * MT + m]);
        }
      } else {
        decltype(of_x(0)) b[MT];
        for (int m = 0; m < MT; ++m) b[m] = of_x(m);
        for (int r = 0; r < R; ++r) {
          const auto c = of_w(r);
          for (int m = 0; m < MT; ++m) multiply_add(c, b[m], a[r * MT + m]);
        }
      }
      x0 += STEP, x3 += STEP, x6 += STEP;
      // The compiler must not see that one number would do for all three.
      if (MT > 3) __asm__("" : "+r"(x0), "+r"(x3), "+r"(x6));
    }
  };
  const std::false_type all;
  const std::true_type part;
  const int64_t whole = K / STEP * STEP, row = whole * int64_t(sizeof(T));
  if constexpr (PASSES == 1) {
    if (SEQUENCE && (MT == 1 || (MT <= 4 && row >= AHEAD))) {
      steps(0, whole, Unasked{}, all);
    } else {
      const int64_t ahead = std::min<int64_t>(asked<R>(row) / int64_t(sizeof(T)), whole);
      steps(0, whole - ahead, ahead, all);
      steps(whole - ahead, whole, ahead - whole + next, all);
    }
  } else {
    steps(0, whole, next, all);
  }
  if (whole < K) steps(whole, K, Unasked{}, part);
  for (int i = 0; i < COUNT; i += W) {
    const Vec s = sums(a + i);
    store(out + i, add ? load(out + i) + s : s);
  }
}

// All M for R rows, a few at a time; W comes from memory the first time, from cache after. The
// results of each pass lie `each` after those of the one before. (Inlined: as functions of their own
// GCC keeps the sums in memory.)
template <class T, int R, int M, int MT, Form FORM, int PASS = 0, int PASSES = (M + MT - 1) / MT>
inline __attribute__((always_inline)) void tiles_of(const T* const (&w)[R], int64_t next,
                                                    const void* packed, int64_t ldx, int64_t K,
                                                    float* out, int64_t each, bool add = false) {
  constexpr int NOW = M < MT ? M : MT;
  tile<T, R, NOW, FORM, PASS, PASSES>(w, next, packed, ldx, K, out, add);
  if constexpr (M > MT) {
    const size_t element = FORM == Form::Fused ? sizeof(float) : sizeof(bf16);
    tiles_of<T, R, M - MT, MT, FORM, PASS + 1, PASSES>(
        w, next, static_cast<const char*>(packed) + element * MT * ldx, ldx, K, out + each, each, add);
  }
}

// How many rows of x go over rows of W: a run of `count` columns at a time, for `rows` rows of each
// stream one after another. x's part of the run stays in the first cache meanwhile.
template <class T, int M, Form FORM>
struct Chunks {
  using Element = typename std::conditional<FORM == Form::Fused, float, bf16>::type;
  static constexpr bool ANY = Passes<M>::PASSES > 1 || M > 4;
  static constexpr int64_t STEP = FORM == Form::Fused ? Vec::W : 32;
  static constexpr int64_t NEAR = 32768, FAR = 131072;  // bytes of x, of W

  int64_t count;
  int rows = 1;

  Chunks(int64_t K, int64_t ldw) : count(K) {
    if constexpr (ANY) {
      // Rows of W that lie whole pages apart fall on few sets, and stay there from pass to pass.
      const bool crowded = Passes<M>::PASSES > 1 && ldw * int64_t(sizeof(T)) % 4096 == 0;
      const int64_t near = crowded ? NEAR / 2 : NEAR;
      const int64_t runs = (K * M * int64_t(sizeof(Element)) + near - 1) / near;
      const int64_t row = Passes<M>::R * K * int64_t(sizeof(T));
      count = ((K + runs - 1) / runs + STEP - 1) / STEP * STEP;
      rows = int(std::min<int64_t>(std::max<int64_t>(FAR / row, 1), 16));
    }
  }
};

// Results of STRIP tiles, one pass, to [R][M] rows of BLOCK: they come as a row of R * MT a tile.
template <int STRIP, int COUNT, int R, int MT, int M>
inline void spread(const float (*from)[COUNT], float* to) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  if constexpr (STRIP == 16 && COUNT == 16) {
    __m512 in[16];
    for (int j = 0; j < 16; ++j) in[j] = _mm512_load_ps(from[j]);
    transposed(in, [&](int i, __m512 row) __attribute__((always_inline)) {
      if (i < R * MT) _mm512_store_ps(to + (i / MT * M + i % MT) * BLOCK, row);
    });
    return;
  }
#endif
  for (int i = 0; i < R * MT; ++i)
    for (int j = 0; j < STRIP; ++j) to[(i / MT * M + i % MT) * BLOCK + j] = from[j][i];
}

// `spread` of every pass.
template <int STRIP, int COUNT, int R, int MT, int M, int FROM = 0>
inline void spread_all(const float (*from)[STRIP][COUNT], float* to) {
  constexpr int NOW = M - FROM < MT ? M - FROM : MT;
  spread<STRIP, COUNT, R, NOW, M>(from[0], to + FROM * BLOCK);
  if constexpr (M - FROM > MT) spread_all<STRIP, COUNT, R, MT, M, FROM + MT>(from + 1, to);
}

// Rows [first, last) of MATS weights as STREAMS runs of rows that are read side by side: memory
// gives more to several sequential readers than to one, and each stays sequential to its end.
template <class T, int M, int MATS, Form FORM, class Done>
inline void streams(int64_t first, int64_t last, const T* const (&w)[MATS], int64_t ldw, int64_t K,
                    const void* packed, int64_t ldx, Done&& done) {
  constexpr int MT = Passes<M>::MT, R = Passes<M>::R, PASSES = Passes<M>::PASSES;
  constexpr int STREAMS = R / MATS, STRIP = 16;
  constexpr int COUNT = tile_results(R, MT);
  using C = Chunks<T, M, FORM>;
  const C chunks(K, ldw);
  // The tile that is asked for: so many on that there are the bytes in between.
  const int64_t run = chunks.count * int64_t(sizeof(T));
  const int64_t on = std::max<int64_t>(asked<R>(run) / run, 1);
  alignas(64) float raw[PASSES][STRIP][COUNT];
  alignas(64) float results[STREAMS][MATS][M][BLOCK];
  const int64_t each = (last - first + STREAMS - 1) / STREAMS;
  for (int64_t from = 0; from < each; from += STRIP) {
    const int strip = int(std::min<int64_t>(STRIP, each - from));
    // Row j of every stream, `count` columns from `at` on; the tile to ask for is `next` on.
    const auto row = [&](int j, int64_t at, int64_t count, int64_t next)
                         __attribute__((always_inline)) {
      const T* rows[R];
      for (int s = 0; s < STREAMS; ++s) {
        // The last stream may be shorter; what it reads again is not used.
        const int64_t n = std::min(first + s * each + from + j, last - 1);
        for (int i = 0; i < MATS; ++i) rows[s * MATS + i] = w[i] + n * ldw + at;
      }
      const T* const(&read)[R] = rows;
      const auto* x = static_cast<const typename C::Element*>(packed) + at;
      tiles_of<T, R, M, MT, FORM>(read, next, x, ldx, count, raw[0][j], STRIP * COUNT, at > 0);
    };
    if (!C::ANY || chunks.count >= K) {
      for (int j = 0; j < strip; ++j) row(j, 0, K, on * ldw);
    } else {
      for (int start = 0; start < strip; start += chunks.rows) {
        const int end = std::min(strip, start + chunks.rows);
        for (int64_t at = 0; at < K; at += chunks.count)
          for (int j = start; j < end; ++j) {
            // Behind these rows come their next columns, behind the last the next rows.
            const int64_t over = j + on - end;
            const int64_t next = over < 0                 ? on * ldw
                                 : at + chunks.count < K ? (start + over - j) * ldw + chunks.count
                                                         : (end + over - j) * ldw - at;
            row(j, at, std::min(chunks.count, K - at), next);
          }
      }
    }
    spread_all<STRIP, COUNT, R, MT, M>(raw, &results[0][0][0][0]);
    for (int s = 0; s < STREAMS; ++s) {
      const int64_t n = first + s * each + from;
      const int64_t end = std::min(first + (s + 1) * each, last);
      const int count = int(std::min<int64_t>(strip, end - n));
      if (count > 0) done(n, count, results[s]);
    }
  }
}

#if defined(DSPARK_TILES)

// Tiles 0, 1: results; 2, 3: rows of W; 4: x; 5, 6, 7: results and x of a second group of its rows.
// Each row of x's tile has 64 bytes, of which M pairs are
// meant and the others are the rows behind, for results that nobody reads: narrower tiles are loaded
// and multiplied at half the speed.
inline void configure_tiles() {
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

// Up to 16 rows by 32 columns, with zeros around them.
inline void copy_tile(const bf16* w, int64_t ldw, int rows, int columns, bf16 (*to)[32]) {
  std::memset(to, 0, 16 * 64);
  for (int r = 0; r < rows; ++r) std::memcpy(to[r], w + r * ldw, 2 * columns);
}

// Asks for the rows that come after a tile pair's while the pair is worked on: a tile's 16 rows are
// often a multiple of 2 KiB apart, fall on few sets of the first cache and are more readers than the
// hardware follows. Here the next rows, which lie in one run, are read into the second cache as
// RUNS runs from end to end.
struct Next {
  static constexpr int RUNS = 8;
  const char* from = nullptr;  // null: nothing comes next
  int64_t each = 0, at = 0, lines = 0;  // bytes of a run, where it is, lines a step
  int runs = 0;

  Next() = default;
  // `bytes` from `from` on, in `steps` calls. A run is a page at least: two in one page are taken
  // for a single reader that goes back and forth.
  Next(const void* from, int64_t bytes, int64_t steps)
      : from(bytes > 0 ? static_cast<const char*>(from) : nullptr) {
    runs = int(std::min<int64_t>(std::max<int64_t>(bytes / 4096, 1), RUNS));
    each = (bytes + runs * 64 - 1) / (runs * 64) * 64;
    lines = (each / 64 + std::max<int64_t>(steps, 1) - 1) / std::max<int64_t>(steps, 1);
  }
  inline __attribute__((always_inline)) void step() {
    if (from == nullptr) return;
    for (int64_t i = 0; i < lines && at < each; ++i, at += 64)
      for (int r = 0; r < runs; ++r) __builtin_prefetch(from + r * each + at, 0, 2);
  }
};

// Two groups of up to 16 rows of W, at wa and wb, with M rows of x, and MORE at `more`.
template <int M, int MORE>
inline void tile_pair(const bf16* wa, int rows_a, const bf16* wb, int rows_b, int64_t ldw,
                      Next next, const bf16* packed, const bf16* more, int64_t K, float* out_a,
                      float* out_b) {
  alignas(64) float c[4][16][16];
  alignas(64) bf16 edge[2][16][32];
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (MORE > 0) {
    _tile_zero(5);
    _tile_zero(6);
  }
  const int64_t whole = rows_a == 16 && rows_b == 16 ? K / 32 * 32 : 0;
  int64_t k = 0;
  for (; k < whole; k += 32) {
    next.step();
    _tile_loadd(4, packed + k * M, 4 * M);
    _tile_loadd(2, wa + k, 2 * ldw);
    _tile_dpbf16ps(0, 2, 4);
    _tile_loadd(3, wb + k, 2 * ldw);
    _tile_dpbf16ps(1, 3, 4);
    if constexpr (MORE > 0) {
      _tile_loadd(7, more + k * MORE, 4 * MORE);
      _tile_dpbf16ps(5, 2, 7);
      _tile_dpbf16ps(6, 3, 7);
    }
  }
  for (; k < K; k += 32) {
    const int columns = int(K - k < 32 ? K - k : 32);
    copy_tile(wa + k, ldw, rows_a, columns, edge[0]);
    copy_tile(wb + k, ldw, rows_b, columns, edge[1]);
    __asm__ volatile("" : : "r"(edge) : "memory");
    _tile_loadd(4, packed + k * M, 4 * M);
    _tile_loadd(2, edge[0], 64);
    _tile_dpbf16ps(0, 2, 4);
    _tile_loadd(3, edge[1], 64);
    _tile_dpbf16ps(1, 3, 4);
    if constexpr (MORE > 0) {
      _tile_loadd(7, more + k * MORE, 4 * MORE);
      _tile_dpbf16ps(5, 2, 7);
      _tile_dpbf16ps(6, 3, 7);
    }
  }
  _tile_stored(0, c[0], 64);
  _tile_stored(1, c[1], 64);
  if constexpr (MORE > 0) {
    _tile_stored(5, c[2], 64);
    _tile_stored(6, c[3], 64);
  }
  __asm__ volatile("" : : "r"(c) : "memory");
  transpose<M>(c[0], out_a, BLOCK);
  transpose<M>(c[1], out_b, BLOCK);
  if constexpr (MORE > 0) {
    transpose<MORE>(c[2], out_a + M * BLOCK, BLOCK);
    transpose<MORE>(c[3], out_b + M * BLOCK, BLOCK);
  }
}

// All M rows of x with up to 32 rows of W; `next` is fetched meanwhile.
template <int M>
inline void tile_block(const bf16* w, int rows, int64_t ldw, Next next, const bf16* packed,
                       int64_t padded, int64_t K, float* out) {
  constexpr int FIRST = M < 16 ? M : 16, MORE = M - FIRST < 16 ? M - FIRST : 16;
  tile_pair<FIRST, MORE>(w, std::min(rows, 16), w + 16 * ldw, std::max(rows - 16, 0), ldw, next,
                         packed, packed + 16 * padded, K, out, out + 16);
  if constexpr (M > 32)
    tile_block<M - 32>(w, rows, ldw, Next{}, packed + 32 * padded, padded, K,
                       out + 32 * BLOCK);
}

#endif

// The product of rows [first, last) of MATS weights of one shape with x. After each block of rows
// calls done(n, count, results), results[i][m][r] for weight i, row n + r.
// x is packed; where that is x itself, `ldx` is its row stride (tiles do not look at it).
template <class T, int M, int MATS, class Done>
void product(int64_t first, int64_t last, const T* const (&w)[MATS], int64_t ldw, int64_t K,
             const typename Packed<T, M>::Element* packed, [[maybe_unused]] int64_t ldx,
             Done&& done) {
  using P = Packed<T, M>;
  if (first >= last) return;
  if constexpr (P::FORM != Form::Tiles) {
    streams<T, M, MATS, P::FORM>(first, last, w, ldw, K, packed, ldx, done);
  } else {
#if defined(DSPARK_TILES)
    static_assert(MATS <= 2, "a product takes one or two weights");
    alignas(64) float results[MATS][M][BLOCK];
    configure_tiles();
    const int64_t Kp = P::padded(K);
    for (int64_t n = first; n < last; n += BLOCK) {
      const int count = int(std::min<int64_t>(BLOCK, last - n));
      const bf16* wa = w[0] + n * ldw;
      const int64_t rest = std::min<int64_t>(BLOCK, last - n - BLOCK);
      const Next after(wa + BLOCK * ldw, rest * ldw * 2, K / 32);
      if constexpr (MATS == 1) {
        tile_block<M>(wa, count, ldw, after, packed, Kp, K, &results[0][0][0]);
      } else {
        const bf16* wb = w[1] + n * ldw;
        const Next other(wb, count * ldw * 2, K / 32);
        tile_block<M>(wa, count, ldw, other, packed, Kp, K, &results[0][0][0]);
        tile_block<M>(wb, count, ldw, after, packed, Kp, K, &results[1][0][0]);
      }
      done(n, count, results);
    }
    _tile_release();
#endif
  }
}

}  // namespace dspark
