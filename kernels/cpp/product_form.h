// The forms of a product's inner loop (product.h), and what x is packed as for each.
#pragma once
#include <type_traits>

#include "parallel.h"
#include "tiles.h"
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

// How many elements of K a step of a form takes, and what x is packed as.
template <Form FORM>
struct Step {
  static constexpr int SIZE = FORM == Form::Fused ? Vec::W : 32;
  using Element = typename std::conditional<FORM == Form::Fused, float, bf16>::type;
};

// x as a product of M rows takes it.
template <class T, int M>
struct Packed {
  static constexpr Form FORM = form<T, M>();
  static constexpr int STEP = Step<FORM>::SIZE;
  using Element = typename Step<FORM>::Element;

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

}  // namespace dspark
