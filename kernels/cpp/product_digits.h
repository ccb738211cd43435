// Products of int8 weights of one scale a row, as they lie, with x as whole numbers of 3 or 4 bytes
// (AVX-512-VNNI; product_planes.h does the same with tiles).
//
// A row of x over a power of two is 3 digits to base 256 a number (4 where x is float32), from -128
// to 127: half types keep 22 bits of the row's largest number so, float32 keeps 30. dpbusd multiplies
// 64 bytes of W, with 128 added to make them unsigned, by a digit each of 64 numbers; what the 128
// are too many is what the sums start from. Lanes are exact, and become floats once.
#pragma once
#include "product_int.h"

namespace dspark {

// Bytes of a packed x.
struct Digit {
  int8_t value;
};

}  // namespace dspark

#if defined(DSPARK_BYTE_DOT)
#pragma GCC push_options
#pragma GCC target("avx512vnni")

namespace dspark {

// A row of x: [COUNT][padded K] digits, lowest first; a vector of starts for each run of numbers and
// digit; the scale.
template <class T>
struct DigitRow {
  static constexpr int COUNT = std::is_same<T, float>::value ? 4 : 3;
  static constexpr int64_t RUN = 65536;  // numbers whose products a lane of int32 holds many times

  static int64_t padded(int64_t K) { return (K + 63) / 64 * 64; }
  static int64_t runs(int64_t K) { return (K + RUN - 1) / RUN; }
  static int64_t bytes(int64_t K) { return COUNT * padded(K) + runs(K) * COUNT * 64 + 64; }

  static void pack(const T* row, int64_t K, Digit* packed) {
    int8_t* to = reinterpret_cast<int8_t*>(packed);
    const int64_t Kp = padded(K);
    // At most 2^(8 COUNT - 2), so that the last digit is one.
    const Whole whole = whole_row(row, K, 8 * COUNT - 2);
    const __m512 by = _mm512_set1_ps(whole.by);
    for (int64_t k = 0; k < Kp; k += 16) {
      const int left = int(std::min<int64_t>(16, K - k));
      const __m512 v = left > 0 ? load(row + k, left).v : _mm512_setzero_ps();
      __m512i y = _mm512_cvtps_epi32(_mm512_mul_ps(v, by));
      for (int digit = 0; digit < COUNT; ++digit) {
        _mm_storeu_si128((__m128i*)(to + digit * Kp + k), _mm512_cvtepi32_epi8(y));
        // What is left behind the digit, which is y's lowest byte with its sign.
        y = _mm512_srai_epi32(_mm512_add_epi32(y, _mm512_set1_epi32(128)), 8);
      }
    }
    const __m512i up = _mm512_set1_epi8(char(128));
    int8_t* start = to + COUNT * Kp;
    for (int64_t from = 0; from < Kp; from += RUN)
      for (int digit = 0; digit < COUNT; ++digit, start += 64) {
        __m512i sum = _mm512_setzero_si512();
        for (int64_t k = from; k < std::min(from + RUN, Kp); k += 64)
          sum = _mm512_dpbusd_epi32(sum, up, _mm512_loadu_si512(to + digit * Kp + k));
        _mm512_storeu_si512(start, _mm512_sub_epi32(_mm512_setzero_si512(), sum));
      }
    std::memcpy(start, &whole.scale, sizeof(float));
  }
};

// c + w . x, four products of bytes a lane. As the instruction itself: from its intrinsic GCC makes
// copies of the sums, and keeps them in memory.
inline __attribute__((always_inline)) __m512i byte_dot(__m512i c, __m512i w, __m512i x) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(w), "v"(x));
  return c;
}

// The products of R rows of W with one row of x, as pass PASS of PASSES: see `tile` in product_streams.h.
// Row r's result goes to *out[r]; the rows read next are `next` bytes on.
template <class T, int R, int PASS, int PASSES>
__attribute__((noinline)) void digit_tile(const uint8_t* const (&w)[R], int64_t next,
                                          const Digit* packed, int64_t K, float* const (&out)[R]) {
  using Row = DigitRow<T>;
  constexpr int COUNT = Row::COUNT;
  static_assert(R <= 16, "one vector holds all sums");
  const int8_t* x = reinterpret_cast<const int8_t*>(packed);
  const int64_t Kp = Row::padded(K);
  const __m512i up = _mm512_set1_epi8(char(128));
  Vec total[16];
  for (int i = 0; i < 16; ++i) total[i] = zero();
  for (int64_t from = 0, run = 0; from < K; from += Row::RUN, ++run) {
    __m512i a[R][COUNT];
    for (int d = 0; d < COUNT; ++d) {
      const __m512i start = _mm512_loadu_si512(x + COUNT * Kp + (run * COUNT + d) * 64);
      for (int r = 0; r < R; ++r) a[r][d] = start;
    }
    auto steps = [&](int64_t first, int64_t last, auto ahead, __mmask64 lanes)
                     __attribute__((always_inline)) {
      for (int64_t k = first; k < last; k += 64) {
        if constexpr (!std::is_same<decltype(ahead), Unasked>::value)
          ask<PASS, PASSES>(w, k + ahead);
        __m512i b[COUNT];
        for (int d = 0; d < COUNT; ++d) b[d] = _mm512_loadu_si512(x + d * Kp + k);
        for (int r = 0; r < R; ++r) {
          // Lanes that are not there come out as 128, and x is zero there.
          const __m512i c = _mm512_xor_si512(
              lanes == ~__mmask64(0) ? _mm512_loadu_si512(w[r] + k)
                                     : _mm512_maskz_loadu_epi8(lanes, w[r] + k),
              up);
          for (int d = 0; d < COUNT; ++d) a[r][d] = byte_dot(a[r][d], c, b[d]);
        }
      }
    };
    const int64_t end = std::min(K, from + Row::RUN), whole = end / 64 * 64;
    if constexpr (PASSES == 1 && SEQUENCE) {
      steps(from, whole, Unasked{}, ~__mmask64(0));
    } else if constexpr (PASSES == 1) {
      const int64_t ahead = std::min<int64_t>(AHEAD, whole - from);
      steps(from, whole - ahead, ahead, ~__mmask64(0));
      // Behind the row's end the next one begins; within it the run goes on.
      steps(whole - ahead, whole, end < K ? ahead : next - whole + ahead, ~__mmask64(0));
    } else {
      const int64_t rows = std::max<int64_t>(4 * AHEAD / std::max<int64_t>(next, 1), 1);
      steps(from, whole, rows * next, ~__mmask64(0));
    }
    if (whole < end) steps(whole, whole + 1, Unasked{}, (__mmask64(1) << (end - whole)) - 1);
    for (int r = 0; r < R; ++r) {
      __m512 y = _mm512_cvtepi32_ps(a[r][COUNT - 1]);
      for (int d = COUNT - 2; d >= 0; --d)
        y = _mm512_fmadd_ps(y, _mm512_set1_ps(256), _mm512_cvtepi32_ps(a[r][d]));
      total[r].v = _mm512_add_ps(total[r].v, y);
    }
  }
  float flat[16], scale;
  std::memcpy(&scale, x + Row::bytes(K) - 64, sizeof(float));
  store(flat, sums(total) * all(scale));
  for (int r = 0; r < R; ++r) *out[r] = flat[r];
}

// All M for R rows, one after another; W comes from memory the first time, from cache after.
template <class T, int R, int M, int PASS = 0>
inline void digit_tiles_of(const uint8_t* const (&w)[R], int64_t next, const Digit* packed,
                           int64_t K, float* const (&out)[R]) {
  digit_tile<T, R, PASS, M>(w, next, packed, K, out);
  if constexpr (PASS + 1 < M) {
    float* below[R];
    for (int r = 0; r < R; ++r) below[r] = out[r] + BLOCK;
    float* const(&written)[R] = below;
    digit_tiles_of<T, R, M, PASS + 1>(w, next, packed + DigitRow<T>::bytes(K), K, written);
  }
}

}  // namespace dspark
#pragma GCC pop_options
#endif
