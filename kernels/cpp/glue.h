// What printed loops between kernels use.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <type_traits>
#include <vector>

#include "parallel.h"
#include "vec.h"

namespace dspark {

// Quotients and what they leave, as torch rounds them; whole numbers by no 0.
inline int64_t trunc_div(int64_t a, int64_t b) { return b == -1 ? int64_t(0 - uint64_t(a)) : a / b; }
inline int64_t rest(int64_t a, int64_t b) { return b == -1 ? 0 : a % b; }
inline int64_t mod(int64_t a, int64_t b) {
  const int64_t r = rest(a, b);
  return r != 0 && (r < 0) != (b < 0) ? r + b : r;
}
inline int64_t floor_div(int64_t a, int64_t b) {
  return trunc_div(a, b) - (rest(a, b) != 0 && (a < 0) != (b < 0));
}
template <class T>
inline T trunc_div(T a, T b) {
  return std::trunc(a / b);
}
template <class T>
inline T rest(T a, T b) {
  return std::fmod(a, b);
}
template <class T>
inline T mod(T a, T b) {
  const T r = std::fmod(a, b);
  return r != 0 && (r < 0) != (b < 0) ? r + b : r;
}
template <class T>
inline T floor_div(T a, T b) {
  if (b == 0) return a / b;
  const T r = std::fmod(a, b);
  T whole = (a - r) / b;
  if (r != 0 && (b < 0) != (r < 0)) whole -= T(1);
  if (whole == 0) return std::copysign(T(0), a / b);
  const T low = std::floor(whole);
  return whole - low > T(0.5) ? low + T(1) : low;
}

// x with erf(x) = y: Winitzki's approximation, then Newton's steps.
inline double inverse_erf(double y) {
  if (!(y > -1 && y < 1)) return y == 1 || y == -1 ? y * INFINITY : NAN;
  const double a = 0.147, pi = 3.14159265358979323846;
  const double l = std::log1p(-y * y), m = 2 / (pi * a) + l / 2;
  double x = std::copysign(std::sqrt(std::sqrt(m * m - l / a) - m), y);
  for (int i = 0; i < 4; ++i)
    x -= (std::erf(x) - y) * std::sqrt(pi) / 2 * std::exp(x * x);
  return x;
}

// A number as one without sign in the same order; zeros are equal, and NaN is the largest.
inline uint32_t rank_of(float x) {
  if (x != x) return 0xffffffffu;
  const uint32_t bits = x == 0 ? 0 : to_bits(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
inline uint32_t rank_of(int32_t x) { return uint32_t(x) ^ 0x80000000u; }

// By their upper halves, numbers of equal ones staying in order; `other` is as long.
inline void radix_sort(std::vector<uint64_t>& items, std::vector<uint64_t>& other) {
  const size_t n = items.size();
  other.resize(n);
  for (int shift = 32; shift < 64; shift += 8) {
    size_t begin[257] = {};
    for (const uint64_t item : items) ++begin[(item >> shift & 255) + 1];
    bool one = false;  // all have the same digit
    for (int d = 1; d < 257; ++d) one = one || begin[d] == n;
    if (one) continue;
    for (int d = 1; d < 257; ++d) begin[d] += begin[d - 1];
    for (const uint64_t item : items) other[begin[item >> shift & 255]++] = item;
    items.swap(other);
  }
}

// n numbers, `step` apart, in order, and where they stood; equal ones stay in theirs, and NaN is
// the largest.
template <class T>
void sort_row(const T* x, int64_t step, int64_t n, bool descending, T* values, int64_t value_step,
              int64_t* indices, int64_t index_step) {
  constexpr bool WIDE = std::is_same<T, int64_t>::value || std::is_same<T, double>::value;
  bool narrow = !std::is_same<T, double>::value;
  if constexpr (std::is_same<T, int64_t>::value)
    for (int64_t i = 0; i < n; ++i) narrow = narrow && x[i * step] == int32_t(x[i * step]);
  static thread_local std::vector<uint64_t> items, other;
  if (narrow) {  // a rank and a place in one number
    items.resize(size_t(n));
    for (int64_t i = 0; i < n; ++i) {
      uint32_t rank;
      if constexpr (std::is_integral<T>::value || WIDE)
        rank = rank_of(int32_t(x[i * step]));
      else
        rank = rank_of(to_float(x[i * step]));
      items[size_t(i)] = uint64_t(descending ? ~rank : rank) << 32 | uint64_t(i);
    }
    if (n < 512) {
      std::sort(items.begin(), items.end());
    } else {
      radix_sort(items, other);
    }
    for (auto& item : items) item &= 0xffffffffu;
  }
  if constexpr (WIDE) if (!narrow) {
    items.resize(size_t(n));
    std::iota(items.begin(), items.end(), uint64_t(0));
    std::stable_sort(items.begin(), items.end(), [&](uint64_t a, uint64_t b) {
      const T left = x[int64_t(a) * step], right = x[int64_t(b) * step];
      const bool odd_left = left != left, odd_right = right != right;
      if (odd_left || odd_right)
        return descending ? odd_left && !odd_right : !odd_left && odd_right;
      return descending ? left > right : left < right;
    });
  }
  for (int64_t i = 0; i < n; ++i) {
    const int64_t from = int64_t(items[size_t(i)]);
    values[i * value_step] = x[from * step];
    indices[i * index_step] = from;
  }
}

}  // namespace dspark
