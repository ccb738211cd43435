// Choosing the next token from a row of logits, as `dspark_compile.ops.token` defines it:
//
//   repetition penalty · arg-max, or temperature · top-k · top-p · min-p · inverse CDF of a uniform
//
// Nothing is sorted but what can be in the answer: top-k keeps a heap, top-p sorts the most likely
// 64 and eight times as many where they do not suffice.
#pragma once
#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "vec.h"

namespace dspark {

struct Choice {
  double temperature;  // not used by arg-max
  int64_t top_k;       // 0: off
  double top_p;        // 1: off
  double min_p;        // 0: off
  double penalty;      // 1: off
};

// What `choose` is called with; members of 8 bytes, since Python fills it in.
struct ChooseArguments {
  const void* logits;  // rows of V, ld apart
  int64_t ld, rows, V;
  Choice how;
  const float* uniform;  // null: arg-max; it moves on by `advance` numbers a call
  int64_t advance;
  uint8_t* seen;  // [rows, V]: what the penalty hits; gains the chosen tokens; may be null
  const int64_t* eos;
  int64_t eos_count, pad;
  uint8_t* done;    // [rows]
  int64_t* tokens;  // [rows]
  float* z;         // memory for V floats
};

// The first largest; NaN counts as largest, as torch has it. One number at a time.
template <class T>
int64_t arg_max_plain(const T* z, int64_t V) {
  int64_t at = 0;
  float best = to_float(z[0]);
  for (int64_t i = 1; i < V && best == best; ++i)
    if (!(to_float(z[i]) <= best)) best = to_float(z[i]), at = i;
  return at;
}

// The same by blocks: the largest of each, and then its place in the block that has it. A difference
// that is not zero says that there is a NaN or an infinity, which is left to the plain way.
template <class T>
int64_t arg_max(const T* z, int64_t V) {
  constexpr int W = Vec::W;
  constexpr int64_t BLOCK = 16 * W;
  float best = -INFINITY;
  int64_t at = 0, end = V / BLOCK * BLOCK;
  Vec odd = zero();
  for (int64_t b = 0; b < end; b += BLOCK) {
    Vec most = load(z + b);
    odd = odd + (most - most);
    for (int64_t i = W; i < BLOCK; i += W) {
      const Vec x = load(z + b + i);
      most = max(most, x);
      odd = odd + (x - x);
    }
    const float m = largest(most);
    if (m > best) best = m, at = b;
  }
  if (!(sum(odd) == 0)) return arg_max_plain(z, V);
  for (int64_t i = end; i < V; ++i) {
    const float x = to_float(z[i]);
    if (x != x) return arg_max_plain(z, V);
    if (x > best) best = x, at = i;
  }
  while (at < V && to_float(z[at]) != best) ++at;
  return at < V ? at : 0;
}

// The k-th largest of z.
inline float kth_largest(const float* z, int64_t V, int64_t k, std::vector<float>& work) {
  work.assign(z, z + k);
  if (k <= 1024) {
    std::make_heap(work.begin(), work.end(), std::greater<float>());
    for (int64_t i = k; i < V; ++i)
      if (z[i] > work.front()) {
        std::pop_heap(work.begin(), work.end(), std::greater<float>());
        work.back() = z[i];
        std::push_heap(work.begin(), work.end(), std::greater<float>());
      }
    return work.front();
  }
  work.assign(z, z + V);
  std::nth_element(work.begin(), work.begin() + (k - 1), work.end(), std::greater<float>());
  return work[k - 1];
}

struct Candidate {
  int32_t token;
  float z, weight;  // e^(z - largest)
};

// The most likely candidates, down to the one with which their mass reaches top_p.
inline void keep_nucleus(std::vector<Candidate>& c, double top_p) {
  const auto before = [](const Candidate& a, const Candidate& b) { return a.z > b.z; };
  double all = 0;
  for (const Candidate& x : c) all += x.weight;
  const size_t count = c.size();
  double mass = 0;
  for (size_t done = 0, n = std::min<size_t>(64, count);; done = n, n = std::min(8 * n, count)) {
    if (n < count) std::nth_element(c.begin() + done, c.begin() + n, c.end(), before);
    std::sort(c.begin() + done, c.begin() + n, before);
    for (size_t i = done; i < n; ++i) {
      // A token stays while the mass of those before it is below top_p.
      if (i > 0 && mass >= top_p * all) {
        c.resize(i);
        return;
      }
      mass += c[i].weight;
    }
    if (n == count) return;
  }
}

// What may be drawn, by token. z: the row, penalised and divided by the temperature. Whether that is
// anything: with a NaN, an infinity, or nothing finite at all there are no probabilities.
inline bool find_candidates(const float* z, int64_t V, const Choice& how, std::vector<float>& work,
                            std::vector<Candidate>& c) {
  float least = -INFINITY, most = -INFINITY;
  int none = 0;
  for (int64_t i = 0; i < V; ++i) {
    none |= z[i] != z[i];
    most = z[i] > most ? z[i] : most;
  }
  const bool drawable = !none && std::isfinite(most);
  if (how.top_k > 0 && how.top_k < V) least = kth_largest(z, V, how.top_k, work);
  if (how.min_p > 0 && how.top_p >= 1)
    least = std::max(least, most + float(std::log(how.min_p)));
  c.clear();
  for (int64_t i = 0; i < V; ++i)
    if (z[i] >= least && z[i] > -INFINITY)
      c.push_back({int32_t(i), z[i], std::exp(z[i] - most)});
  if (how.top_p < 1 && !c.empty()) {
    keep_nucleus(c, how.top_p);
    if (how.min_p > 0)
      c.erase(std::remove_if(c.begin(), c.end(),
                             [&](const Candidate& x) { return x.weight < how.min_p; }),
              c.end());
    std::sort(c.begin(), c.end(),
              [](const Candidate& a, const Candidate& b) { return a.token < b.token; });
  }
  return drawable;
}

// -1: there is nothing to draw from.
inline int64_t sample(const float* z, int64_t V, const Choice& how, float uniform,
                      std::vector<float>& work, std::vector<Candidate>& c) {
  if (!find_candidates(z, V, how, work, c)) return -1;
  double all = 0, mass = 0;
  for (const Candidate& x : c) all += x.weight;
  for (const Candidate& x : c)
    if ((mass += x.weight) > double(uniform) * all) return x.token;
  return c.back().token;
}

// Tokens of the rows; those that are done get `pad`. A row whose token is one of `eos` is done from
// then on. Returns how many are not done; -1 where there is nothing to draw from.
template <class T>
int64_t choose(ChooseArguments& a) {
  static thread_local std::vector<float> work;
  static thread_local std::vector<Candidate> candidates;
  constexpr int W = Vec::W;
  const int64_t V = a.V;
  float* z = a.z;
  int64_t open = 0;
  for (int64_t b = 0; b < a.rows; ++b) {
    if (a.done[b]) {
      a.tokens[b] = a.pad;
      continue;
    }
    const T* x = static_cast<const T*>(a.logits) + b * a.ld;
    uint8_t* marks = a.seen == nullptr ? nullptr : a.seen + b * V;
    const bool greedy = a.uniform == nullptr;
    for (int64_t i = 0; i < V && !(greedy && marks == nullptr); i += W) {
      const int n = int(std::min<int64_t>(W, V - i));
      store(z + i, load(x + i, n), n);
    }
    if (marks != nullptr) {
      const float penalty = float(a.how.penalty);
      for (int64_t i = 0; i < V; ++i)
        if (marks[i]) z[i] = z[i] < 0 ? z[i] * penalty : z[i] / penalty;
    }
    int64_t token;
    if (greedy) {
      token = marks == nullptr ? arg_max(x, V) : arg_max(z, V);
    } else {
      const Vec t = all(float(a.how.temperature));
      for (int64_t i = 0; i < V; i += W) {
        const int n = int(std::min<int64_t>(W, V - i));
        store(z + i, load(z + i, n) / t, n);
      }
      token = sample(z, V, a.how, a.uniform[b], work, candidates);
      if (token < 0) return -1;
    }
    a.tokens[b] = token;
    if (marks != nullptr) marks[token] = 1;
    for (int64_t i = 0; i < a.eos_count; ++i) a.done[b] |= token == a.eos[i];
    open += !a.done[b];
  }
  if (a.uniform != nullptr) a.uniform += a.advance;
  return open;
}

}  // namespace dspark
