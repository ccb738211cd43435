// RoPE of rows, appends to caches, and both in one with the norm of queries and keys before.
//
//   half-split    pairs (i, i + R/2)      interleaved    pairs (2i, 2i + 1)
//   out = x * cos + turned(x) * sin       over the first R features; the rest pass through
//
// A row is widened to float, worked on, and rounded where it is stored. An int8 row is stored as
// round(x / scale), scale = max|x| / 127 rounded to the scale's type first.
#pragma once
#include "norm.h"

namespace dspark {

constexpr int MAX_FEATURES = 1024;

// What turns a row. `features` of cos and sin is R, or R / 2 that serve both of a pair.
struct Turn {
  int64_t rotary, features;
  bool interleaved;
};

template <class CT>
inline void rope_row(float* x, const CT* cos, const CT* sin, const Turn& turn) {
  const int64_t R = turn.rotary, half = R / 2;
  const bool shared = turn.features != R;
  float c[MAX_FEATURES], s[MAX_FEATURES], y[MAX_FEATURES];
  for (int64_t i = 0; i < turn.features; ++i) c[i] = to_float(cos[i]), s[i] = to_float(sin[i]);
  if (turn.interleaved) {
    for (int64_t i = 0; i < half; ++i) {
      const int64_t a = shared ? i : 2 * i, b = shared ? i : 2 * i + 1;
      y[2 * i] = x[2 * i] * c[a] - x[2 * i + 1] * s[a];
      y[2 * i + 1] = x[2 * i + 1] * c[b] + x[2 * i] * s[b];
    }
  } else {
    const int64_t second = shared ? 0 : half;
    for (int64_t i = 0; i < half; ++i) y[i] = x[i] * c[i] - x[i + half] * s[i];
    for (int64_t i = 0; i < half; ++i)
      y[i + half] = x[i + half] * c[i + second] + x[i] * s[i + second];
  }
  std::memcpy(x, y, sizeof(float) * R);
}

template <class T>
inline void widen_row(const T* x, int64_t D, float* y) {
  for (int64_t i = 0; i < D; i += Vec::W) {
    const int n = int(D - i < Vec::W ? D - i : Vec::W);
    store(y + i, load(x + i, n), n);
  }
}

template <class T>
inline void store_row(const float* x, int64_t D, T* y) {
  for (int64_t i = 0; i < D; i += Vec::W) {
    const int n = int(D - i < Vec::W ? D - i : Vec::W);
    store(y + i, load(x + i, n), n);
  }
}

template <class ST>
inline void quantize_row(const float* x, int64_t D, int8_t* y, ST* scale) {
  float most = 0;
  bool nan = false;
  for (int64_t i = 0; i < D; ++i) most = std::max(most, std::fabs(x[i])), nan |= x[i] != x[i];
  from_float(*scale, nan ? NAN : most / 127.0f);
  const float step = to_float(*scale), inverse = step > 0 ? 1.0f / step : 0.0f;
  for (int64_t i = 0; i < D; ++i) {
    const float q = std::nearbyint(x[i] * inverse);
    y[i] = int8_t(std::min(127.0f, std::max(-127.0f, q)));
  }
}

// x of a grid [a, b, c] of rows; y is contiguous.
struct Grid {
  int64_t size[3], x[3], cos[3], sin[3];
};

template <class T, class CT, class OT>
void ropes(Team team, const T* x, const CT* cos, const CT* sin, OT* y, int64_t D, const Grid& grid,
           const Turn& turn) {
  const auto [first, last] = team.share(grid.size[0] * grid.size[1] * grid.size[2]);
  float row[MAX_FEATURES];
  for (int64_t r = first; r < last; ++r) {
    const int64_t c = r % grid.size[2], b = r / grid.size[2] % grid.size[1],
                  a = r / grid.size[2] / grid.size[1];
    auto at = [&](const int64_t* stride) { return a * stride[0] + b * stride[1] + c * stride[2]; };
    widen_row(x + at(grid.x), D, row);
    rope_row(row, cos + at(grid.cos), sin + at(grid.sin), turn);
    store_row(row, D, y + r * D);
  }
}

// A cache [B, H, N, D] and what is appended, [B, H, M, D]; strides of the first three.
struct Appended {
  int64_t cache[3], scale[3], fresh[3];
};

struct Append {
  int64_t batch, heads, kv_heads, rows, keys, D, DV;
  int64_t q[3];
  Appended k, v;
  int64_t cos[2], sin[2];  // strides over batch and rows
};

inline bool positions_fit(const int64_t* positions, int64_t rows, int64_t keys) {
  for (int64_t m = 0; m < rows; ++m)
    if (positions[m] < 0 || positions[m] >= keys) return false;
  return true;
}

template <class KT, class ST>
inline void append_row(const float* row, int64_t D, KT* cache, ST* scale, const Appended& s,
                       int64_t b, int64_t h, int64_t at) {
  KT* to = cache + b * s.cache[0] + h * s.cache[1] + at * s.cache[2];
  if constexpr (std::is_same<KT, int8_t>::value) {
    quantize_row(row, D, to, scale + b * s.scale[0] + h * s.scale[1] + at * s.scale[2]);
  } else {
    store_row(row, D, to);
  }
}

// New rows [B, H, M, D] into a cache; a.k holds the strides.
template <class T, class KT, class ST>
void appends(Team team, const T* fresh, KT* cache, ST* scale, const int64_t* positions,
             const Append& a) {
  const auto [first, last] = team.share(a.batch * a.kv_heads);
  float row[MAX_FEATURES];
  for (int64_t u = first; u < last; ++u)
    for (int64_t m = 0; m < a.rows; ++m) {
      const int64_t b = u / a.kv_heads, h = u % a.kv_heads;
      widen_row(fresh + b * a.k.fresh[0] + h * a.k.fresh[1] + m * a.k.fresh[2], a.D, row);
      append_row(row, a.D, cache, scale, a.k, b, h, positions[m]);
    }
}

// Everything between QKV and attention. NORM is 0 without a norm, 1 for the weight after the
// rounding, 2 for the weight before.
template <class T, class WT, class CT, class KT, class ST, int NORM>
void prepare(Team team, const T* q, const T* k, const T* v, const Norm<WT>& q_norm,
             const Norm<WT>& k_norm, const CT* cos, const CT* sin, KT* k_cache, ST* k_scale,
             KT* v_cache, ST* v_scale, const int64_t* positions, T* out, const Append& a,
             const Turn& turn) {
  const int64_t each = a.heads + 2 * a.kv_heads;
  const auto [first, last] = team.share(a.batch * each);
  float row[MAX_FEATURES];
  T normed[MAX_FEATURES];
  auto turned = [&](const T* x, const Norm<WT>& norm, int64_t b, int64_t m) {
    if constexpr (NORM != 0) {
      norm_row<T, WT, T, false, NORM == 1, false>(x, nullptr, nullptr, normed, a.D, norm);
      x = normed;
    }
    widen_row(x, a.D, row);
    rope_row(row, cos + b * a.cos[0] + m * a.cos[1], sin + b * a.sin[0] + m * a.sin[1], turn);
  };
  for (int64_t u = first; u < last; ++u)
    for (int64_t m = 0; m < a.rows; ++m) {
      const int64_t b = u / each;
      int64_t h = u % each;
      if (h < a.heads) {
        turned(q + b * a.q[0] + h * a.q[1] + m * a.q[2], q_norm, b, m);
        store_row(row, a.D, out + ((b * a.heads + h) * a.rows + m) * a.D);
      } else if ((h -= a.heads) < a.kv_heads) {
        turned(k + b * a.k.fresh[0] + h * a.k.fresh[1] + m * a.k.fresh[2], k_norm, b, m);
        // Rounded to T first, as the cache would get it from the op alone.
        for (int64_t i = 0; i < a.D; ++i) row[i] = round_to<T>(row[i]);
        append_row(row, a.D, k_cache, k_scale, a.k, b, h, positions[m]);
      } else {
        h -= a.kv_heads;
        widen_row(v + b * a.v.fresh[0] + h * a.v.fresh[1] + m * a.v.fresh[2], a.DV, row);
        append_row(row, a.DV, v_cache, v_scale, a.v, b, h, positions[m]);
      }
    }
}

}  // namespace dspark
