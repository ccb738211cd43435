// Skinny products with int8 or int4 weights: y[M, N] = x[M, K] ((q - z) s)[N, K]^T, M = 1 ... 16.
//
// What both widths share: the weight, x as a form of the product wants it, scales of whole rows and
// zero points. The forms are in `product_int8.h` and `product_int4.h`. s and z have one value for
// each row, or for each group of a multiple of 32 in a row.
//
// A row's scale multiplies its sum. Zero points cost a correction: the sum of (q - z) s x is that of
// q s x less z s times x's own sum over the group, which is computed once for all rows of W.
#pragma once
#include "product.h"

// Bytes are multiplied by AVX-512-VNNI, which every CPU with AMX has: there it is asked for where it
// is used.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && \
    defined(__GNUC__) && !defined(__clang__)
#if defined(DSPARK_TILES) && defined(__AMX_INT8__)
#define DSPARK_BYTE_DOT 1
#define DSPARK_PLANES 1
#elif defined(__AVX512VNNI__)
#define DSPARK_BYTE_DOT 1
#endif
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

// No zero points.
struct Centred {};

// A weight. Rows of q (int4: blocks of 16 rows) are `ld` bytes apart; scale and zero are contiguous,
// [N] or [N, G].
template <class S_, class Z>
struct Quantized {
  using S = S_;
  static constexpr bool ZEROS = !std::is_same<Z, Centred>::value;
  const uint8_t* q;
  int64_t ld;
  const S* scale;
  const Z* zero;
};

#if defined(DSPARK_BYTE_DOT)

// How numbers are held as integers of `bits` bits: times `by`, a power of two, so that what fits is
// exact; `scale` is 1 / by. NaN and infinity come out as NaN.
struct Whole {
  float scale, by;

  // `most` are the largest magnitudes, by lane; `odd` the lanes that met NaN.
  Whole(__m512 most, __mmask16 odd, int bits) {
    const float top = _mm512_reduce_max_ps(most);
    const bool finite = !odd && top <= 3.4e38f;
    int exponent = 0;
    std::frexp(finite ? top : 0, &exponent);
    const int shift = std::max(exponent - bits, -126);
    scale = finite ? std::ldexp(1.0f, shift) : NAN;
    by = finite ? std::ldexp(1.0f, -shift) : 0;
  }
};

inline __mmask16 is_nan(__m512 x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); }

// How a row of K numbers is held with one power of two.
template <class T>
inline Whole whole_row(const T* row, int64_t K, int bits) {
  __m512 most = _mm512_setzero_ps();
  __mmask16 odd = 0;
  for (int64_t k = 0; k < K; k += 16) {
    const __m512 v = load(row + k, int(std::min<int64_t>(16, K - k))).v;
    most = _mm512_max_ps(most, _mm512_abs_ps(v));
    odd |= is_nan(v);
  }
  return Whole(most, odd, bits);
}

#endif

// The product of a width Q of weights with M rows of T, specialised for each Q:
//
//   Element, size(K)           what x is packed as, in bytes
//   pack(team, x, ldx, K, to)  by all threads of a team, to be followed by a barrier
//   work(K)                    bytes that a thread works in
//   run(first, last, w, K, G, packed, work, done)
template <class Q, class T, int M, bool GROUPED>
struct IntProduct;

// x as a product wants it, and the sums of its groups. Threads share the work, or for one row make
// a copy each.
template <class Q, class T, int M, bool GROUPED>
class IntStaged {
  using Product = IntProduct<Q, T, M, GROUPED>;
  using Element = typename Product::Element;

 public:
  static size_t bytes(int64_t K, int64_t G, int threads) {
    const size_t one = aligned(Product::size(K)) + aligned(sizeof(float) * M * G);
    return one * (M == 1 ? threads : 1);
  }

  const Element* x;
  const float* sums;  // [M][G], where there are zero points

  IntStaged(Team team, const T* from, int64_t ld, int64_t K, int64_t G, bool zeros, char* memory) {
    if (M == 1) memory += bytes(K, G, 1) * team.thread;
    const Team workers = M == 1 ? Team{} : team;
    Element* to = reinterpret_cast<Element*>(memory);
    Product::pack(workers, from, ld, K, to);
    float* total = reinterpret_cast<float*>(memory + aligned(Product::size(K)));
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
};

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
                 const IntStaged<Q, T, M, GROUPED>& x, char* work, Done&& done) {
  if (first < last) IntProduct<Q, T, M, GROUPED>::run(first, last, w, K, G, x.x, x.sums, work, done);
}

// Memory that one thread works in.
template <class Q, class T, int M, bool GROUPED>
size_t int_work_bytes(int64_t K) {
  return aligned(IntProduct<Q, T, M, GROUPED>::work(K));
}

}  // namespace dspark
