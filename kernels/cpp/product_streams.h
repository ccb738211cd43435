// Products by vectors: W's rows are read as several streams side by side, and a tile of a few rows of
// W and of x at a time runs over K in registers. The forms Fused and Dot of product.h.
#pragma once
#include "product_form.h"
#include "reading.h"
#include "transpose.h"

namespace dspark {

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
// registers for, 16 of AVX-512's 32 and 8 of 16 elsewhere.
//
// More rows of x than 4: of bf16 and fp16 eight at a time meet two of W, so that each number of W is
// loaded, and widened, once; those of x come from the first cache. Of float a number of W is twice
// as many bytes for the same work. Then four by four, in passes, do it with the fewest loads and
// leave the most room to what waits for memory: eight rows took as long as their products and
// their reading together, and now take what the longer of the two does. Five and six are one pass.
template <class T, int M>
struct Passes {
  static constexpr bool WIDE = Vec::W == 16, FLOAT = std::is_same<T, float>::value;
  static constexpr int MOST = !WIDE ? 2 : !FLOAT ? 8 : M <= 6 ? 6 : 4;
  static constexpr int PASSES = (M + MOST - 1) / MOST;
  static constexpr int MT = (M + PASSES - 1) / PASSES;
  static constexpr int R = !WIDE ? 4 : M <= 2 ? 8 : M <= 4 || FLOAT ? 4 : 2;
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
  constexpr int STEP = Step<FORM>::SIZE;
  constexpr int LINE = 64 / int(sizeof(T)) / STEP > 1 ? 64 / int(sizeof(T)) : STEP;
  using Element = typename Step<FORM>::Element;
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
    constexpr int LEFT = std::is_same<T, float>::value ? 2 : 4;  // rows of x, at most
    if (SEQUENCE && (MT == 1 || (MT <= LEFT && row >= AHEAD))) {
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
    const auto* rest = static_cast<const typename Step<FORM>::Element*>(packed) + MT * ldx;
    tiles_of<T, R, M - MT, MT, FORM, PASS + 1, PASSES>(w, next, rest, ldx, K, out + each, each, add);
  }
}

// How many rows of x go over rows of W: a run of `count` columns at a time, for `rows` rows of each
// stream one after another. x's part of the run stays in the first cache meanwhile.
template <class T, int M, Form FORM>
struct Chunks {
  using Element = typename Step<FORM>::Element;
  static constexpr bool ANY = Passes<T, M>::PASSES > 1 || M > 4;
  static constexpr int64_t STEP = Step<FORM>::SIZE;
  // Bytes of x, of W: parts of the first cache and of the second, which CPUs with AVX-512 have more of.
  static constexpr int64_t NEAR = 32768, FAR = Vec::W == 16 ? 262144 : 131072;

  int64_t count;
  int rows = 1;

  Chunks(int64_t K, int64_t ldw) : count(K) {
    if constexpr (ANY) {
      // Rows of W that lie whole pages apart fall on few sets, and stay there from pass to pass.
      const bool crowded = Passes<T, M>::PASSES > 1 && ldw * int64_t(sizeof(T)) % 4096 == 0;
      const int64_t near = crowded ? NEAR / 2 : NEAR;
      const int64_t runs = (K * M * int64_t(sizeof(Element)) + near - 1) / near;
      const int64_t row = Passes<T, M>::R * K * int64_t(sizeof(T));
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
  constexpr int MT = Passes<T, M>::MT, R = Passes<T, M>::R, PASSES = Passes<T, M>::PASSES;
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

}  // namespace dspark
