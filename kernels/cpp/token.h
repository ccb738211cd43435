// What a loop that samples does to a row of logits, in the ops that user code spells it with.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "parallel.h"
#include "vec.h"

namespace dspark {

// y = softmax(x): V numbers. z: memory for V floats.
template <class T, class Y>
void softmax_row(const T* x, Y* y, int64_t V, float* z) {
  constexpr int W = Vec::W;
  float most = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < V; i += W) {
    const int n = int(std::min<int64_t>(W, V - i));
    store(z + i, load(x + i, n), n);
  }
  for (int64_t i = 0; i < V; ++i) most = z[i] > most || z[i] != z[i] ? z[i] : most;
  double total = 0;
  for (int64_t i = 0; i < V; i += W) {
    const int n = int(std::min<int64_t>(W, V - i));
    // What is forbidden weighs exactly nothing.
    store(z + i, exp(load(z + i, n) - all(most)), n);
  }
  for (int64_t i = 0; i < V; ++i) {
    const float from = to_float(x[i]);
    if (from == -std::numeric_limits<float>::infinity()) z[i] = most == from ? NAN : 0;
    total += z[i];
  }
  const Vec scale = all(float(1.0 / total));
  for (int64_t i = 0; i < V; i += W) {
    const int n = int(std::min<int64_t>(W, V - i));
    store(y + i, load(z + i, n) * scale, n);
  }
}

// The k largest of V numbers and where they stand, largest first; NaN counts as largest.
template <class T>
void top_row(const T* x, int64_t V, int64_t k, T* values, int64_t* indices) {
  using Item = std::pair<float, int64_t>;
  static thread_local std::vector<Item> kept;
  const auto before = [](const Item& a, const Item& b) {
    const bool odd_a = a.first != a.first, odd_b = b.first != b.first;
    if (odd_a || odd_b) return odd_a && !odd_b;
    return a.first > b.first;
  };
  kept.clear();
  kept.reserve(size_t(k) + 1);
  for (int64_t i = 0; i < V; ++i) {
    const Item item{to_float(x[i]), i};
    if (int64_t(kept.size()) < k) {
      kept.push_back(item);
      std::push_heap(kept.begin(), kept.end(), before);
    } else if (before(item, kept.front())) {
      std::pop_heap(kept.begin(), kept.end(), before);
      kept.back() = item;
      std::push_heap(kept.begin(), kept.end(), before);
    }
  }
  std::sort(kept.begin(), kept.end(), before);
  for (int64_t i = 0; i < k; ++i) values[i] = x[kept[i].second], indices[i] = kept[i].second;
}

// The token whose share of the weights `uniform` (in [0, 1)) falls on; -1: they are no weights.
template <class T>
int64_t draw_row(const T* p, int64_t V, float uniform) {
  double total = 0, mass = 0;
  bool good = true;
  for (int64_t i = 0; i < V; ++i) {
    const float w = to_float(p[i]);
    good = good && w >= 0;  // not so of NaN
    total += w;
  }
  if (!good || !(total > 0) || total > std::numeric_limits<double>::max()) return -1;
  int64_t last = 0;
  for (int64_t i = 0; i < V; ++i) {
    const float w = to_float(p[i]);
    if (w == 0) continue;
    last = i;
    if ((mass += w) > double(uniform) * total) return i;
  }
  return last;
}

// The same for argmax(p / noise) of weights that are not negative: where they are none, what arg-max
// takes, the first NaN or the first of all.
template <class T>
int64_t race_row(const T* p, int64_t V, float uniform) {
  const int64_t token = draw_row(p, V, uniform);
  if (token >= 0) return token;
  for (int64_t i = 0; i < V; ++i)
    if (to_float(p[i]) != to_float(p[i])) return i;
  return 0;
}

}  // namespace dspark
