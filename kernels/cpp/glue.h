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

// n numbers, `step` apart, in order, and where they stood; equal ones stay in theirs, and NaN is
// the largest.
template <class T>
void sort_row(const T* x, int64_t step, int64_t n, bool descending, T* values, int64_t value_step,
              int64_t* indices, int64_t index_step) {
  const auto number = [&](int64_t i) {
    if constexpr (std::is_same<T, bf16>::value || std::is_same<T, half>::value)
      return to_float(x[i * step]);
    else
      return x[i * step];
  };
  const auto before = [&](int64_t a, int64_t b) {
    const auto left = number(a), right = number(b);
    const bool odd_left = left != left, odd_right = right != right;
    if (odd_left || odd_right) return descending ? odd_left && !odd_right : !odd_left && odd_right;
    return descending ? left > right : left < right;
  };
  static thread_local std::vector<int64_t> order;
  order.resize(size_t(n));
  std::iota(order.begin(), order.end(), int64_t(0));
  std::stable_sort(order.begin(), order.end(), before);
  for (int64_t i = 0; i < n; ++i) {
    values[i * value_step] = x[order[i] * step];
    indices[i * index_step] = order[i];
  }
}

}  // namespace dspark
