// What printed mask predicates are made of: Python's operators on bool and int64_t.
#pragma once
#include <cstdint>
#include <type_traits>

namespace dspark {

template <class A, class B>
constexpr bool booleans = std::is_same<A, bool>::value && std::is_same<B, bool>::value;

inline bool invert(bool a) { return !a; }
inline int64_t invert(int64_t a) { return ~a; }

template <class A, class B>
inline typename std::conditional<booleans<A, B>, bool, int64_t>::type both(A a, B b) {
  return a & b;
}
template <class A, class B>
inline typename std::conditional<booleans<A, B>, bool, int64_t>::type either(A a, B b) {
  return a | b;
}
template <class A, class B>
inline typename std::conditional<booleans<A, B>, bool, int64_t>::type differ(A a, B b) {
  return a ^ b;
}

// Both round down, as Python's do; a divisor of 0 gives 0 instead of a trap.
inline int64_t floor_divide(int64_t a, int64_t b) {
  if (b == 0) return 0;
  const int64_t q = a / b;
  return q - (a % b != 0 && (a < 0) != (b < 0));
}
inline int64_t floor_modulo(int64_t a, int64_t b) { return a - floor_divide(a, b) * b; }

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t absolute(int64_t a) { return a < 0 ? -a : a; }

inline int64_t wrap_index(int64_t i, int64_t size) { return i < 0 ? i + size : i; }
inline bool inside(int64_t i, int64_t size) { return i >= 0 && i < size; }

inline bool load_index(const bool* p, int64_t at, bool in_range) {
  return in_range && reinterpret_cast<const uint8_t*>(p)[at] != 0;
}
template <class T>
inline int64_t load_index(const T* p, int64_t at, bool in_range) {
  return in_range ? int64_t(p[at]) : 0;
}

inline bool truth(bool a) { return a; }
inline bool truth(int64_t a) { return a != 0; }

}  // namespace dspark
