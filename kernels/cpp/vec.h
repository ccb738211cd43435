// Vectors of floats: 16 lanes (AVX-512), 8 (AVX2) or 4 (any compiler with vector extensions).
//
// Loads take float, bf16, half or int8 and give floats; stores round to nearest even. Partial
// forms touch `n` elements and no memory behind them; missing lanes read as zero.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace dspark {

struct bf16 {
  uint16_t bits;
};
struct half {
  uint16_t bits;
};

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(int8_t x) { return x; }
inline float to_float(bf16 x) { return from_bits(uint32_t(x.bits) << 16); }
inline float to_float(half x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest >= 0x400) return from_bits(sign | ((rest << 13) + (112u << 23)));
  const float small = float(rest) * 5.9604644775390625e-8f;  // 2^-24
  return sign ? -small : small;
#endif
}

inline void from_float(float& y, float x) { y = x; }
inline void from_float(bf16& y, float x) {
  const uint32_t bits = to_bits(x);
  y.bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void from_float(half& y, float x) {
#if defined(__F16C__)
  y.bits = _cvtss_sh(x, 0);
#else
  const uint32_t bits = to_bits(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) {
    y.bits = uint16_t(sign | 0x7e00);
  } else if (rest >= 0x477ff000) {  // rounds to 65536 or more
    y.bits = uint16_t(sign | 0x7c00);
  } else if (rest < 0x38800000) {  // below 2^-14: the addition rounds to a multiple of 2^-24
    y.bits = uint16_t(sign | (to_bits(from_bits(rest) + 0.5f) - 0x3f000000));
  } else {
    y.bits = uint16_t(sign | ((rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13));
  }
#endif
}
template <class T>
inline float round_to(float x) {
  T y;
  from_float(y, x);
  return to_float(y);
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)

struct Vec {
  static constexpr int W = 16;
  __m512 v;
};
inline Vec zero() { return {_mm512_setzero_ps()}; }
inline Vec all(float x) { return {_mm512_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec widen(__m256i x) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))};
}
inline Vec load(const bf16* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
inline Vec load(const half* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
inline Vec load(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
inline __mmask16 first(int n) { return n >= 16 ? 0xffff : __mmask16((1u << n) - 1); }
inline Vec load(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
inline Vec load(const bf16* p, int n) { return widen(_mm256_maskz_loadu_epi16(first(n), p)); }
inline Vec load(const half* p, int n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p))};
}
inline Vec load(const int8_t* p, int n) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(n), p)))};
}
inline __m256i narrow(Vec x) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  const __m512i y =
      _mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), nan, _mm512_set1_epi32(0x7fc0));
  return _mm512_cvtepi32_epi16(y);
}
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x.v); }
inline void store(bf16* p, Vec x) { _mm256_storeu_si256((__m256i*)p, narrow(x)); }
inline void store(half* p, Vec x) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x.v, 0)); }
inline void store(float* p, Vec x, int n) { _mm512_mask_storeu_ps(p, first(n), x.v); }
inline void store(bf16* p, Vec x, int n) { _mm256_mask_storeu_epi16(p, first(n), narrow(x)); }
inline void store(half* p, Vec x, int n) {
  _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtps_ph(x.v, 0));
}
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// b where a is NaN, as the instruction has it.
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
inline Vec nearest(Vec a) { return {_mm512_roundscale_ps(a.v, 8)}; }
// a * 2^n for whole n; zero and infinity come out right.
inline Vec scale2(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline Vec where_less(Vec a, Vec b, Vec yes, Vec no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float largest(Vec a) { return _mm512_reduce_max_ps(a.v); }

// The sums of W vectors, as one vector.
inline Vec sums(const Vec* a) {
  __m512 u[4];
  for (int i = 0; i < 4; ++i) {
    const __m512 s = _mm512_add_ps(_mm512_unpacklo_ps(a[4 * i].v, a[4 * i + 1].v),
                                   _mm512_unpackhi_ps(a[4 * i].v, a[4 * i + 1].v));
    const __m512 t = _mm512_add_ps(_mm512_unpacklo_ps(a[4 * i + 2].v, a[4 * i + 3].v),
                                   _mm512_unpackhi_ps(a[4 * i + 2].v, a[4 * i + 3].v));
    const __m512d p = _mm512_castps_pd(s), q = _mm512_castps_pd(t);
    u[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(p, q)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(p, q)));
  }
  const __m512 v = _mm512_add_ps(_mm512_shuffle_f32x4(u[0], u[1], 0x88),
                                 _mm512_shuffle_f32x4(u[0], u[1], 0xdd));
  const __m512 w = _mm512_add_ps(_mm512_shuffle_f32x4(u[2], u[3], 0x88),
                                 _mm512_shuffle_f32x4(u[2], u[3], 0xdd));
  return {_mm512_add_ps(_mm512_shuffle_f32x4(v, w, 0x88), _mm512_shuffle_f32x4(v, w, 0xdd))};
}

#elif defined(__AVX2__)

struct Vec {
  static constexpr int W = 8;
  __m256 v;
};
inline Vec zero() { return {_mm256_setzero_ps()}; }
inline Vec all(float x) { return {_mm256_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load(const bf16* p) {
  const __m256i x = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(x, 16))};
}
inline Vec load(const half* p) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))}; }
inline Vec load(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)))};
}
template <class T>
inline Vec load(const T* p, int n) {
  T buffer[8] = {};
  std::memcpy(buffer, p, sizeof(T) * (n < 8 ? n : 8));
  return load(buffer);
}
inline __m128i narrow(Vec x) {
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
  const __m256i y =
      _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), _mm256_set1_epi32(0x7fc0), nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
}
inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x.v); }
inline void store(bf16* p, Vec x) { _mm_storeu_si128((__m128i*)p, narrow(x)); }
inline void store(half* p, Vec x) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.v, 0)); }
template <class T>
inline void store(T* p, Vec x, int n) {
  T buffer[8];
  store(buffer, x);
  std::memcpy(p, buffer, sizeof(T) * (n < 8 ? n : 8));
}
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline Vec nearest(Vec a) { return {_mm256_round_ps(a.v, 8)}; }
inline Vec power2(__m256i n) {
  return {_mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23))};
}
inline Vec scale2(Vec a, Vec n) {
  // In two steps, so that results below the normal range round once.
  const __m256i whole = _mm256_cvtps_epi32(n.v), part = _mm256_srai_epi32(whole, 1);
  return a * power2(part) * power2(_mm256_sub_epi32(whole, part));
}
inline Vec where_less(Vec a, Vec b, Vec yes, Vec no) {
  return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
inline Vec sums(const Vec* a) {
  const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(a[0].v, a[1].v), _mm256_hadd_ps(a[2].v, a[3].v));
  const __m256 high =
      _mm256_hadd_ps(_mm256_hadd_ps(a[4].v, a[5].v), _mm256_hadd_ps(a[6].v, a[7].v));
  return {_mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20),
                        _mm256_permute2f128_ps(low, high, 0x31))};
}
inline float sum(Vec a) {
  float x[8];
  store(x, a);
  return ((x[0] + x[4]) + (x[1] + x[5])) + ((x[2] + x[6]) + (x[3] + x[7]));
}
inline float largest(Vec a) {
  float x[8];
  store(x, a);
  float y = x[0];
  for (int i = 1; i < 8; ++i) y = x[i] > y ? x[i] : y;
  return y;
}

#else

struct Vec {
  static constexpr int W = 4;
  typedef float Lanes __attribute__((vector_size(16)));
  Lanes v;
};
inline Vec zero() { return {Vec::Lanes{}}; }
inline Vec all(float x) { return {Vec::Lanes{x, x, x, x}}; }
template <class T>
inline Vec load(const T* p, int n = 4) {
  Vec x = zero();
  for (int i = 0; i < (n < 4 ? n : 4); ++i) x.v[i] = to_float(p[i]);
  return x;
}
template <class T>
inline void store(T* p, Vec x, int n = 4) {
  for (int i = 0; i < (n < 4 ? n : 4); ++i) from_float(p[i], x.v[i]);
}
inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
template <class F>
inline Vec lanes(Vec a, Vec b, F f) {
  Vec y;
  for (int i = 0; i < 4; ++i) y.v[i] = f(a.v[i], b.v[i]);
  return y;
}
inline Vec max(Vec a, Vec b) {
  return lanes(a, b, [](float x, float y) { return x > y ? x : y; });
}
inline Vec min(Vec a, Vec b) {
  return lanes(a, b, [](float x, float y) { return x < y ? x : y; });
}
inline Vec abs(Vec a) {
  return lanes(a, a, [](float x, float) { return std::fabs(x); });
}
inline Vec nearest(Vec a) {
  return lanes(a, a, [](float x, float) { return std::nearbyint(x); });
}
inline Vec scale2(Vec a, Vec n) {
  return lanes(a, n, [](float x, float y) { return std::ldexp(x, int(y)); });
}
inline Vec where_less(Vec a, Vec b, Vec yes, Vec no) {
  Vec y;
  for (int i = 0; i < 4; ++i) y.v[i] = a.v[i] < b.v[i] ? yes.v[i] : no.v[i];
  return y;
}
inline float sum(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
inline Vec sums(const Vec* a) { return {Vec::Lanes{sum(a[0]), sum(a[1]), sum(a[2]), sum(a[3])}}; }
inline float largest(Vec a) {
  float y = a.v[0];
  for (int i = 1; i < 4; ++i) y = a.v[i] > y ? a.v[i] : y;
  return y;
}

#endif

// e^x to about one unit in the last place; 0 below -87.3, and -inf gives 0. NaN stays NaN.
// Results under the normal range would cost a hundred times the instruction, for keys that a mask
// forbids as for any other.
inline Vec exp(Vec x) {
  const Vec low = all(-87.3f);
  // max and min give their second operand where the first is NaN, so x comes second.
  const Vec z = min(all(89.0f), max(low, x));
  const Vec n = nearest(z * all(1.44269504f));
  Vec r = fma(n, all(-0.693359375f), z);
  r = fma(n, all(2.12194440e-4f), r);
  Vec p = all(1.9875691500e-4f);
  p = fma(p, r, all(1.3981999507e-3f));
  p = fma(p, r, all(8.3334519073e-3f));
  p = fma(p, r, all(4.1665795894e-2f));
  p = fma(p, r, all(1.6666665459e-1f));
  p = fma(p, r, all(5.0000001201e-1f));
  p = fma(p * r, r, r + all(1.0f));
  return where_less(x, low, zero(), scale2(p, n));
}

// tanh x: a polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel.
inline Vec tanh(Vec x) {
  const Vec z = x * x;
  Vec p = all(-5.70498872745e-3f);
  p = fma(p, z, all(2.06390887954e-2f));
  p = fma(p, z, all(-5.37397155531e-2f));
  p = fma(p, z, all(1.33314422036e-1f));
  p = fma(p, z, all(-3.33332819422e-1f));
  const Vec near = fma(p * z, x, x);
  const Vec far = all(1.0f) - all(2.0f) / (exp(x + x) + all(1.0f));
  return where_less(abs(x), all(0.625f), near, far);
}

inline Vec sigmoid(Vec x) { return all(1.0f) / (all(1.0f) + exp(zero() - x)); }

// Lane by lane, for what has no vector form.
template <class F>
inline Vec each(Vec x, F f) {
  float y[Vec::W];
  store(y, x);
  for (int i = 0; i < Vec::W; ++i) y[i] = f(y[i]);
  return load(y);
}

// Rounded to T and back.
template <class T>
inline Vec rounded(Vec x) {
  T y[Vec::W];
  store(y, x);
  return load(y);
}
template <>
inline Vec rounded<float>(Vec x) {
  return x;
}

}  // namespace dspark
