// RMS and layer norm of rows, alone, behind a residual addition, or in front of a product.
//
//   rms(x)   = x / sqrt(mean(x^2) + eps) * (w + offset)
//   layer(x) = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * (w + offset) + b
//
// Computed in float. FIRST rounds to T before the weight, as Llama does; otherwise the result is
// rounded once, at the end, as Gemma and ATen do.
#pragma once
#include "parallel.h"
#include "vec.h"

namespace dspark {

template <class WT>
struct Norm {
  const WT* weight;  // [D] or null
  const WT* bias;    // [D] or null
  float eps;
  float offset;
};

// y = norm(x) for one row of D elements. With ADD, x + residual is rounded to T, stored in
// `total`, and normed.
template <class T, class WT, class OT, bool CENTRE, bool FIRST, bool ADD>
inline void norm_row(const T* x, const T* residual, T* total, OT* y, int64_t D,
                     const Norm<WT>& norm) {
  constexpr int W = Vec::W;
  auto width = [&](int64_t i) { return int(D - i < W ? D - i : W); };
  if (ADD) {
    for (int64_t i = 0; i < D; i += W) {
      const int n = width(i);
      store(total + i, load(x + i, n) + load(residual + i, n), n);
    }
    x = total;
  }
  float mean = 0;
  if (CENTRE) {
    Vec a = zero();
    for (int64_t i = 0; i < D; i += W) a = a + load(x + i, width(i));
    mean = sum(a) / float(D);
  }
  Vec a = zero(), b = zero();
  int64_t i = 0;
  for (; i + 2 * W <= D; i += 2 * W) {
    const Vec u = load(x + i) - all(mean), v = load(x + i + W) - all(mean);
    a = fma(u, u, a);
    b = fma(v, v, b);
  }
  for (; i < D; i += W) {
    const int n = width(i);
    // Missing lanes must stay zero, so the mean is taken off lane by lane there.
    float lane[W] = {};
    store(lane, load(x + i, n) - all(mean), n);
    const Vec u = load(lane);
    a = fma(u, u, a);
  }
  const float scale = 1.0f / std::sqrt(sum(a + b) / float(D) + norm.eps);
  const auto scaled = [&](Vec u, const auto& of) __attribute__((always_inline)) {
    Vec z = (u - all(mean)) * all(scale);
    if (FIRST) z = rounded<T>(z);
    if (norm.weight != nullptr) {
      Vec w = of(norm.weight);
      if (norm.offset != 0) {
        w = w + all(norm.offset);
        if (FIRST) w = rounded<WT>(w);
      }
      z = z * w;
    }
    if (norm.bias != nullptr) z = z + of(norm.bias);
    return z;
  };
  for (i = 0; i + W <= D; i += W)
    store(y + i, scaled(load(x + i), [&](const WT* p) { return load(p + i); }));
  if (i < D) {
    const int n = width(i);
    store(y + i, scaled(load(x + i, n), [&](const WT* p) { return load(p + i, n); }), n);
  }
}

// Rows with strides: x and residual may be views; total and y are contiguous. The rows form a
// grid [a, b, c], and a stride of 0 broadcasts.
struct Rows {
  int64_t size[3];
  int64_t x[3];
  int64_t residual[3];
};

template <class T, class WT, class OT, bool CENTRE, bool FIRST, bool ADD>
void norms(Team team, const T* x, const T* residual, T* total, OT* y, int64_t D, const Rows& rows,
           const Norm<WT>& norm) {
  const auto [first, last] = team.share(rows.size[0] * rows.size[1] * rows.size[2]);
  for (int64_t r = first; r < last; ++r) {
    const int64_t c = r % rows.size[2], b = r / rows.size[2] % rows.size[1],
                  a = r / rows.size[2] / rows.size[1];
    const int64_t at = a * rows.x[0] + b * rows.x[1] + c * rows.x[2];
    const int64_t of = a * rows.residual[0] + b * rows.residual[1] + c * rows.residual[2];
    norm_row<T, WT, OT, CENTRE, FIRST, ADD>(x + at, ADD ? residual + of : nullptr,
                                            ADD ? total + r * D : nullptr, y + r * D, D, norm);
  }
}

}  // namespace dspark
