// The router: logits = x W^T, and of each row's E logits the k experts with their weights.
//
// The choice among equals is torch's: the same selection on the same pairs. Eager code and this
// kernel so send a token to the same experts where two logits are one bfloat16 number.
#pragma once
#include <cmath>
#include <limits>
#include <vector>

#include "linear.h"
#include "moe_product.h"

namespace dspark {

enum class Scoring : int64_t { Identity, Softmax, Sigmoid, SqrtSoftplus, Sparsemixer };
enum class Normalise : int64_t { None, Sum, Softmax };

struct RouterSizes {
  int64_t tokens, experts, K, k, ldx;
  Scoring scoring;
  Normalise normalise;
  int64_t groups, top_groups, top2;  // top2: a group's score is the sum of its best two
};

using Candidate = std::pair<float, int64_t>;

inline bool before(const Candidate& a, const Candidate& b) {
  return (std::isnan(a.first) && !std::isnan(b.first)) || a.first > b.first;
}

// The k largest of n, first in `from`, as torch.topk picks them.
inline void select(Candidate* from, int64_t n, int64_t k) {
  if (k * 64 <= n) {
    std::partial_sort(from, from + k, from + n, before);
  } else {
    std::nth_element(from, from + k - 1, from + n, before);
    std::sort(from, from + k - 1, before);
  }
}

inline void softmax(float* x, int64_t n) {
  float most = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < n; ++i) most = x[i] > most ? x[i] : most;
  Vec total = zero();
  for (int64_t i = 0; i < n; i += Vec::W) {
    const int lanes = int(std::min<int64_t>(Vec::W, n - i));
    const Vec e = exp(load(x + i, lanes) - all(most));
    store(x + i, e, lanes);
    total = total + load(x + i, lanes);
  }
  const Vec one = all(1.0f / sum(total));
  for (int64_t i = 0; i < n; i += Vec::W) {
    const int lanes = int(std::min<int64_t>(Vec::W, n - i));
    store(x + i, load(x + i, lanes) * one, lanes);
  }
}

inline float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }

// Memory for one thread: scores, choices, groups.
inline size_t route_bytes(int64_t experts) {
  return aligned(4 * experts) + aligned(sizeof(Candidate) * experts) * 2 + aligned(experts);
}

inline void sparsemixer(const float* logits, const RouterSizes& s, float eps, float* scores,
                        float* weights, int64_t* indices) {
  const int64_t E = s.experts;
  const float low = -std::numeric_limits<float>::infinity();
  std::memcpy(scores, logits, sizeof(float) * E);
  for (int64_t j = 0; j < s.k; ++j) {
    int64_t best = 0;
    for (int64_t e = 1; e < E; ++e)
      if (scores[e] > scores[best]) best = e;
    const float most = scores[best];
    float total = 0.0f;
    for (int64_t e = 0; e < E; ++e) {
      const float size = std::max(std::fabs(logits[e]), most);
      if ((most - logits[e]) / size > 2.0f * eps) continue;
      total += std::exp(scores[e] - most);
    }
    weights[j] = 1.0f / total;
    indices[j] = best;
    scores[best] = low;
  }
}

// One token: its k weights and indices from E logits and a correction (null: none).
inline void route(const float* logits, const float* correction, const RouterSizes& s, float scale,
                  float eps, float fill, char* memory, float* weights, int64_t* indices) {
  const int64_t E = s.experts, k = s.k;
  float* scores = (float*)memory;
  Candidate* queue = (Candidate*)(memory + aligned(4 * E));
  Candidate* second = (Candidate*)((char*)queue + aligned(sizeof(Candidate) * E));
  bool* kept = (bool*)((char*)second + aligned(sizeof(Candidate) * E));
  if (s.scoring == Scoring::Sparsemixer) {
    sparsemixer(logits, s, eps, scores, weights, indices);
  } else {
    std::memcpy(scores, logits, sizeof(float) * E);
    if (s.scoring == Scoring::Softmax) softmax(scores, E);
    if (s.scoring == Scoring::Sigmoid)
      for (int64_t e = 0; e < E; ++e) scores[e] = 1.0f / (1.0f + std::exp(-scores[e]));
    if (s.scoring == Scoring::SqrtSoftplus)
      for (int64_t e = 0; e < E; ++e) scores[e] = std::sqrt(softplus(scores[e]));
    for (int64_t e = 0; e < E; ++e)
      queue[e] = {correction == nullptr ? scores[e] : scores[e] + correction[e], e};
    if (s.groups > 1) {
      const int64_t size = E / s.groups;
      for (int64_t g = 0; g < s.groups; ++g) {
        float most = -std::numeric_limits<float>::infinity(), next = most;
        for (int64_t i = 0; i < size; ++i) {
          const float x = queue[g * size + i].first;
          if (x > most) {
            next = most;
            most = x;
          } else if (x > next) {
            next = x;
          }
        }
        second[g] = {s.top2 ? most + next : most, g};
        kept[g] = false;
      }
      select(second, s.groups, s.top_groups);
      for (int64_t g = 0; g < s.top_groups; ++g) kept[second[g].second] = true;
      for (int64_t e = 0; e < E; ++e)
        if (!kept[e / size]) queue[e].first = fill;
    }
    select(queue, E, k);
    for (int64_t j = 0; j < k; ++j) {
      indices[j] = queue[j].second;
      weights[j] = scores[queue[j].second];
    }
  }
  if (s.normalise == Normalise::Sum) {
    float total = eps;
    for (int64_t j = 0; j < k; ++j) total += weights[j];
    for (int64_t j = 0; j < k; ++j) weights[j] /= total;
  } else if (s.normalise == Normalise::Softmax) {
    softmax(weights, k);
  }
  for (int64_t j = 0; j < k; ++j) weights[j] *= scale;
}

// XT, WT: of x and W; products are in WT, which is XT or float. LT, ST: of the logits and weights
// that are stored. BT, CT: of bias and correction. M: rows of a pass.
template <class XT, class WT, class LT, class ST, class BT, class CT, int M>
struct Router {
  using Element = typename Packed<WT, M>::Element;

  const XT* x;
  const WT* w;
  int64_t ldw;
  const BT* bias;
  const CT* correction;
  LT* logits;
  ST* weights;
  int64_t* indices;
  float scale, eps, fill;
  RouterSizes s;

  static size_t bytes(const RouterSizes& s, int threads) {
    const int64_t passes = (s.tokens + M - 1) / M;
    return aligned(sizeof(float) * s.tokens * s.experts) + aligned(sizeof(float) * s.experts) +
           passes * Packed<WT, M>::bytes(s.K) +
           threads * (aligned(sizeof(WT) * M * s.K) + route_bytes(s.experts) + aligned(12 * s.k));
  }

  void run(Team team, char* memory) const {
    const int64_t E = s.experts, passes = (s.tokens + M - 1) / M;
    float* raw = (float*)memory;
    memory += aligned(sizeof(float) * s.tokens * E);
    float* added = (float*)memory;
    memory += aligned(sizeof(float) * E);
    Element* packed = (Element*)memory;
    const int64_t pass = int64_t(Packed<WT, M>::bytes(s.K) / sizeof(Element));
    memory += passes * Packed<WT, M>::bytes(s.K);
    const size_t own = aligned(sizeof(WT) * M * s.K) + route_bytes(E) + aligned(12 * s.k);
    memory += own * team.thread;
    const int64_t ldx = Packed<WT, M>::padded(s.K);
    // One row of the right type and size is read where it lies.
    constexpr bool SAME = M == 1 && std::is_same<XT, WT>::value &&
                          std::is_same<WT, Element>::value &&
                          Packed<WT, M>::FORM != Form::Tiles;
    const bool direct = SAME && s.tokens == 1 && s.K % Packed<WT, M>::STEP == 0;
    if (direct) packed = (Element*)x;
    {
      WT* rows = (WT*)memory;
      const auto [first, last] = team.share(direct ? 0 : passes);
      for (int64_t p = first; p < last; ++p) {
        for (int m = 0; m < M; ++m)
          for (int64_t n = 0; n < s.K; n += Vec::W) {
            const int lanes = int(std::min<int64_t>(Vec::W, s.K - n));
            const int64_t t = p * M + m;
            const Vec v = t < s.tokens ? load(x + t * s.ldx + n, lanes) : zero();
            store(rows + m * s.K + n, v, lanes);
          }
        pack<WT, M>(rows, s.K, s.K, 0, ldx, packed + p * pass);
      }
      if (correction != nullptr && team.thread == team.threads - 1)
        for (int64_t e = 0; e < E; ++e) added[e] = to_float(correction[e]);
    }
    if (!direct) team.barrier();
    const WT* const weight[1] = {w};
    const auto [first, last] = team.share(E, E >= team.threads * BLOCK ? BLOCK : 16);
    product_passes<WT, M, 1>(
        first, last, weight, ldw, s.K, packed, ldx, pass, passes,
        [&](int64_t p, int64_t n, int count, const auto& sums) {
          for (int m = 0; m < M && p * M + m < s.tokens; ++m)
            for (int j = 0; j < count; j += Vec::W) {
              const int lanes = std::min(Vec::W, count - j);
              Vec v = load(&sums[0][m][j]);
              if (bias != nullptr) v = v + load(bias + n + j, lanes);
              const int64_t at = (p * M + m) * E + n + j;
              store(logits + at, v, lanes);
              store(raw + at, rounded<LT>(v), lanes);
            }
        });
    team.barrier();
    const auto [from, to] = team.share(s.tokens);
    float* mine = (float*)(memory + route_bytes(E));
    for (int64_t t = from; t < to; ++t) {
      route(raw + t * E, correction == nullptr ? nullptr : added, s, scale, eps, fill, memory, mine,
            indices + t * s.k);
      for (int64_t j = 0; j < s.k; ++j) from_float(weights[t * s.k + j], mine[j]);
    }
  }
};

}  // namespace dspark
