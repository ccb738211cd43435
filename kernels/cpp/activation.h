// The dialect's activations, on floats.
#pragma once
#include "vec.h"

namespace dspark {

struct identity {
  static Vec of(Vec x) { return x; }
};
struct silu {
  static Vec of(Vec x) { return x * sigmoid(x); }
};
struct gelu {
  static Vec of(Vec x) {
    return each(x, [](float t) { return 0.5f * t * (1.0f + std::erf(t * 0.70710678118f)); });
  }
};
struct gelu_tanh {
  static Vec of(Vec x) {
    const Vec inner = all(0.79788456080f) * fma(all(0.044715f) * x * x, x, x);
    return all(0.5f) * x * (all(1.0f) + tanh(inner));
  }
};
struct quick_gelu {
  static Vec of(Vec x) { return x * dspark::sigmoid(all(1.702f) * x); }
};
struct relu {
  // x is the second operand, which NaN comes through.
  static Vec of(Vec x) { return max(zero(), x); }
};
struct relu2 {
  static Vec of(Vec x) {
    const Vec y = max(zero(), x);
    return y * y;
  }
};
struct sigmoid_ {
  static Vec of(Vec x) { return dspark::sigmoid(x); }
};
struct tanh_ {
  static Vec of(Vec x) { return dspark::tanh(x); }
};

}  // namespace dspark
