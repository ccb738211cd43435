// The sequential stage of a DSpark draft: for each position of a block the Markov head's bias, the
// token choice and the confidence, left to right, K times (`models/draft_heads.py`).
//
// The vocabulary is shared out among the threads; W2 lies transposed, so that a position's bias is
// a sum of r rows. Weights of the choice are kept: rejection sampling asks for them.
#pragma once
#include "choose.h"
#include "parallel.h"

namespace dspark {

// Members of 8 bytes: a part of `Speculation`.
struct Sequence {
  int64_t head, rank, width, vocabulary;
  const void* base;  // [B, K, V] of type U
  int64_t base_row, base_request;
  const void* hidden;  // [B, K, d] of type W, dense
  const void* w1;      // [target vocabulary, r]
  const void* w2;      // [V / 64, r, 64], or with `pairs` [V / 64, r / 2, 64, 2]
  const void* gate;    // gated: [r, d + r], rnn: [3 r, 2 r + d]
  const void* gate_bias;
  const float* confidence;  // [d + r] or [d], float32; null without
  double confidence_bias;
  int64_t confidence_reads;     // features of e
  const float* temperatures;    // [K]
  const int64_t* vocabulary_map;  // draft id to target id, or null
  float* codes;                 // [B, r]
  float* memory;                // [B, r]: the rnn's state
  float* next_memory;           // [B, r]
  float* largest;               // [2, threads, B]
  int64_t* places;              // [2, threads, B]
  double* sums;                 // [threads, B]
  int64_t pairs;                // whether W2 lies in pairs, for dpbf16ps
};

struct Drafting {
  Sequence* s;
  int64_t batch, count, room, target_vocabulary;  // count tokens of blocks with room for K
  int64_t* block;                                 // [rows, K + 1]
  const uint8_t* seen;
  Choice how;
  bool greedy;
  const float* uniform;
  float* weights;   // [B, K, target vocabulary]
  double* totals;   // [B, K]
  int64_t* ids;     // [B, K]: in the draft's vocabulary
  double* survival;    // [B, K]
  float* confidences;  // [B, count]: logits
};

template <class T>
inline void widen_row(const T* x, int64_t n, float* z) {
  constexpr int W = Vec::W;
  for (int64_t i = 0; i < n; i += W) {
    const int m = int(std::min<int64_t>(W, n - i));
    store(z + i, load(x + i, m), m);
  }
}

// Repetition penalty on z[first, last) of a row: what `marks` says, and `count` tokens more.
inline void penalise(float* z, int64_t first, int64_t last, const uint8_t* marks,
                     const int64_t* more, int64_t count, double penalty,
                     const int64_t* map = nullptr) {
  if (marks == nullptr) return;
  const float p = float(penalty);
  for (int64_t i = first; i < last; ++i) {
    const int64_t token = map == nullptr ? i : map[i];
    bool hit = marks[token];
    for (int64_t k = 0; k < count && !hit; ++k) hit = more[k] == token;
    if (hit) z[i] = z[i] < 0 ? z[i] * p : z[i] / p;
  }
}

inline bool filters(const Choice& how) {
  return how.top_k > 0 || how.top_p < 1 || how.min_p > 0;
}

// Weights of what may be drawn, in place of the penalised logits; returns their sum. What a NaN or
// an infinity leaves is something, or a NaN: `drawable` is to be asked for where it must not be.
inline double weigh(float* z, int64_t V, const Choice& how, bool* drawable = nullptr) {
  constexpr int W = Vec::W;
  const Vec t = all(float(how.temperature));
  for (int64_t i = 0; i < V; i += W) {
    const int n = int(std::min<int64_t>(W, V - i));
    store(z + i, load(z + i, n) / t, n);
  }
  if (filters(how)) {
    static thread_local std::vector<float> work;
    static thread_local std::vector<Candidate> candidates;
    const bool any = find_candidates(z, V, how, work, candidates);
    if (drawable != nullptr) *drawable = any;
    const int64_t best = candidates.empty() ? arg_max(z, V) : 0;
    std::fill(z, z + V, 0.0f);
    if (candidates.empty()) {
      z[best] = 1;
      return 1;
    }
    double sum = 0;
    for (const Candidate& c : candidates) z[c.token] = c.weight, sum += c.weight;
    return sum;
  }
  float most = -INFINITY;
  for (int64_t i = 0; i < V; ++i) most = z[i] > most ? z[i] : most;
  double total = 0;
  for (int64_t i = 0; i < V; i += W) {
    const int n = int(std::min<int64_t>(W, V - i));
    Vec e = exp(load(z + i, n) - all(most));
    store(z + i, e, n);
    if (n < W) e = load(z + i, n);
    total += sum(e);
  }
  if (drawable != nullptr) *drawable = std::isfinite(total);
  return total;
}

// The token at which the running sum of weights passes `mass`.
inline int64_t pick(const float* p, int64_t V, double mass, int64_t first = 0) {
  double sum_ = 0;
  int64_t last = first;
  constexpr int W = Vec::W;
  int64_t i = first;
  for (; i + W <= V; i += W) {  // whole vectors, until the one that passes
    const double next = sum_ + sum(load(p + i));
    if (next > mass) break;
    sum_ = next;
  }
  for (int64_t j = i; j < V; ++j) {
    if (p[j] > 0) last = j;
    if ((sum_ += p[j]) > mass) return j;
  }
  for (int64_t j = V - 1; j >= first; --j)
    if (p[j] > 0) return j;
  return last;
}

// A draw from max(p / all - q / draft_all, 0), or from p where that is nothing. q has `n` entries,
// by `map` or as they are.
inline int64_t pick_residual(float* p, double all_, const float* q, double draft_all, int64_t V,
                             const int64_t* map, int64_t n, double uniform) {
  const double scale = all_ / draft_all;
  double taken = 0;
  // What the residual loses is min(p, q): its mass is known before anything is changed.
  for (int64_t i = 0; i < n; ++i) {
    const float old = p[map == nullptr ? i : map[i]];
    taken += std::min<double>(old, q[i] * scale);
  }
  const double rest = all_ - taken;
  if (!(rest / all_ > kResidualMass)) return pick(p, V, uniform * all_);
  double mass = 0;
  for (int64_t i = 0; i < n; ++i) {
    float& old = p[map == nullptr ? i : map[i]];
    old = float(std::max<double>(old - q[i] * scale, 0));
  }
  for (int64_t i = 0; i < V; ++i) mass += p[i];
  return pick(p, V, uniform * mass);
}

template <class W>
inline float dot(const W* a, const float* b, int64_t n) {
  constexpr int L = Vec::W;
  Vec acc = zero();
  for (int64_t i = 0; i < n; i += L) {
    const int m = int(std::min<int64_t>(L, n - i));
    acc = fma(load(a + i, m), load(b + i, m), acc);
  }
  return sum(acc);
}

inline float sigmoid(float x) { return 1 / (1 + std::exp(-x)); }

#if defined(__AVX512BF16__) && defined(__AVX512F__)
constexpr bool kPairs = true;
#else
constexpr bool kPairs = false;
#endif

// W2 of the head, which lies in panels of 64 tokens, [V / 64][r][64]: one run of memory, however
// long the vocabulary is. With PAIRS [V / 64][r / 2][64][2], r even, and the code is rounded to W.
template <class W, bool PAIRS>
struct Panels {
  static constexpr int N = kPanel / Vec::W;
  const W* w2;
  const float* code;
  int64_t rank;
  const uint32_t* code_pairs;

  // The bias of tokens i ... i + 63, i a multiple of 64.
  inline void sums(int64_t i, Vec (&a)[N]) const {
    const W* panel = w2 + i * rank;
    for (int j = 0; j < N; ++j) a[j] = zero();
    if constexpr (PAIRS) {
#if defined(__AVX512BF16__) && defined(__AVX512F__)
      for (int64_t r = 0; r < rank / 2; ++r) {
        const __m512bh c = (__m512bh)_mm512_set1_epi32(int(code_pairs[r]));
        for (int j = 0; j < N; ++j)
          a[j].v = _mm512_dpbf16_ps(
              a[j].v, (__m512bh)_mm512_loadu_si512(panel + (r * kPanel + j * Vec::W) * 2), c);
      }
#endif
    } else {
      for (int64_t r = 0; r < rank; ++r) {
        const Vec c = all(code[r]);
        for (int j = 0; j < N; ++j) a[j] = fma(load(panel + r * kPanel + j * Vec::W), c, a[j]);
      }
    }
  }
};

// z[first, last) = base + W2 code, first a multiple of a panel.
template <class U, class P>
inline void biased(const U* base, const P& panels, int64_t first, int64_t last, float* z) {
  constexpr int L = Vec::W, N = P::N;
  Vec a[N];
  for (int64_t i = first; i < last; i += kPanel) {
    panels.sums(i, a);
    for (int j = 0; j < N && i + j * L < last; ++j) {
      const int n = int(std::min<int64_t>(L, last - i - j * L));
      store(z + i + j * L, load(base + i + j * L, n) + a[j], n);
    }
  }
}

// Where base + W2 code is largest in [first, last), the first of them, and what it is there; false
// where there may be a NaN or an infinity, or the last panel is not whole.
template <class U, class P>
inline bool largest_biased(const U* base, const P& panels, int64_t first, int64_t last, float* most,
                           int64_t* at) {
  constexpr int L = Vec::W, N = P::N;
  if (first >= last || (last - first) % kPanel != 0) return false;
  Vec a[N], odd = zero();
  float best = -INFINITY;
  int64_t panel = first;
  const auto values = [&](int64_t i) __attribute__((always_inline)) {
    panels.sums(i, a);
    for (int j = 0; j < N; ++j) a[j] = a[j] + load(base + i + j * L);
  };
  for (int64_t i = first; i < last; i += kPanel) {
    values(i);
    Vec high = a[0];
    for (int j = 1; j < N; ++j) high = max(high, a[j]);
    for (int j = 0; j < N; ++j) odd = odd + (a[j] - a[j]);
    const float x = largest(high);
    if (x > best) best = x, panel = i;
  }
  if (!(sum(odd) == 0)) return false;
  values(panel);
  float z[kPanel];
  for (int j = 0; j < N; ++j) store(z + j * L, a[j]);
  int64_t i = 0;
  while (i + 1 < kPanel && z[i] != best) ++i;
  *most = best, *at = panel + i;
  return true;
}

// codes [B, r] of position k; needs a barrier behind it unless the head is vanilla.
template <class W>
inline void make_codes(Team team, const Drafting& d, int64_t k, std::vector<float>& local) {
  Sequence& s = *d.s;
  const int64_t r = s.rank, K = d.room, width = s.width;
  const auto [first, last] = team.share(r);
  for (int64_t b = 0; b < d.batch; ++b) {
    const int64_t previous = d.block[b * (K + 1) + k];
    float* e = local.data() + b * r;
    widen_row((const W*)s.w1 + previous * r, r, e);
    if (s.head == kVanilla) continue;
    std::vector<float> h(static_cast<size_t>(width));
    widen_row((const W*)s.hidden + (b * d.count + k) * width, width, h.data());
    const W *gate = (const W*)s.gate, *bias = (const W*)s.gate_bias;
    for (int64_t i = first; i < last; ++i) {
      if (s.head == kGated) {
        const W* row = gate + i * (width + r);
        const float g = dot(row, h.data(), width) + dot(row + width, e, r) + to_float(bias[i]);
        s.codes[b * r + i] = sigmoid(g) * e[i];
        continue;
      }
      const float* memory = s.memory + b * r;
      float joint[3];
      for (int part = 0; part < 3; ++part) {
        const W* row = gate + (part * r + i) * (2 * r + width);
        joint[part] = (k == 0 ? 0.0f : dot(row, memory, r)) + dot(row + r, e, r) +
                      dot(row + 2 * r, h.data(), width) + to_float(bias[part * r + i]);
      }
      const float g = sigmoid(joint[0]), old = k == 0 ? 0.0f : memory[i];
      s.next_memory[b * r + i] = g * old + (1 - g) * std::tanh(joint[1]);
      s.codes[b * r + i] = std::tanh(joint[2]);
    }
  }
}

template <class U, class W, bool PAIRS>
void draft_sequence(Team team, Drafting& d) {
  static thread_local std::vector<float> local, features;
  static thread_local std::vector<uint32_t> code_pairs;
  Sequence& s = *d.s;
  const int64_t B = d.batch, K = d.room, V = s.vocabulary, r = s.rank, T = team.threads;
  const auto [first, last] = team.share(V, kPanel);
  const bool plain = !d.greedy && !filters(d.how);
  // Where nobody asks for weights but for the largest, they are not written.
  const bool only_largest = d.greedy && d.seen == nullptr && s.head != kNone;
  local.resize(size_t(std::max<int64_t>(B * r, 1)));
  code_pairs.resize(size_t(r / 2 + 1));
  for (int64_t k = 0; k < d.count; ++k) {
    if (s.head != kNone) make_codes<W>(team, d, k, local);
    if (s.head == kGated || s.head == kRnn) team.barrier();
    const float* codes = s.head == kVanilla ? local.data() : s.codes;
    if (team.thread == k % T && s.confidence != nullptr)
      for (int64_t b = 0; b < B; ++b) {
        features.resize(size_t(s.width + r));
        widen_row((const W*)s.hidden + (b * d.count + k) * s.width, s.width, features.data());
        if (s.confidence_reads > 0)
          widen_row((const W*)s.w1 + d.block[b * (K + 1) + k] * r, r, features.data() + s.width);
        const float logit = dot(s.confidence, features.data(), s.width + s.confidence_reads) +
                            float(s.confidence_bias);
        d.confidences[b * d.count + k] = logit;
        // The running product is taken where all are there.
        d.survival[b * K + k] = sigmoid(logit / s.temperatures[k]);
      }
    float* largest_ = s.largest + (k & 1) * T * B;
    int64_t* places = s.places + (k & 1) * T * B;
    for (int64_t b = 0; b < B; ++b) {
      float* z = d.weights + (b * K + k) * d.target_vocabulary;
      const U* base = (const U*)s.base + b * s.base_request + k * s.base_row;
      const Panels<W, PAIRS> panels{(const W*)s.w2, codes + b * r, r, code_pairs.data()};
      if constexpr (PAIRS)
        if (s.head != kNone)
          for (int64_t i = 0; i < r; ++i)
            from_float(reinterpret_cast<W*>(code_pairs.data())[i], panels.code[i]);
      if (only_largest) {
        const int64_t at = team.thread * B + b;
        if (largest_biased(base, panels, first, last, largest_ + at, places + at)) continue;
      }
      if (s.head == kNone) {
        for (int64_t i = first; i < last; i += Vec::W) {
          const int n = int(std::min<int64_t>(Vec::W, last - i));
          store(z + i, load(base + i, n), n);
        }
      } else {
        biased(base, panels, first, last, z);
      }
      penalise(z, first, last, d.seen == nullptr ? nullptr : d.seen + b * d.target_vocabulary,
               d.block + b * (K + 1) + 1, k, d.how.penalty, s.vocabulary_map);
      if (first < last && (d.greedy || plain)) {
        const int64_t at = first + arg_max(z + first, last - first);
        largest_[team.thread * B + b] = z[at];
        places[team.thread * B + b] = at;
      } else if (d.greedy || plain) {
        largest_[team.thread * B + b] = -INFINITY;
        places[team.thread * B + b] = V;
      }
    }
    team.barrier();
    const auto best = [&](int64_t b) {
      int64_t at = 0;
      for (int64_t t = 1; t < T; ++t)
        if (places[t * B + b] < V && !(largest_[t * B + b] <= largest_[at * B + b])) at = t;
      return at;
    };
    if (plain) {
      const float scale = float(d.how.temperature);
      for (int64_t b = 0; b < B; ++b) {
        float* z = d.weights + (b * K + k) * d.target_vocabulary;
        const Vec most = all(largest_[best(b) * B + b]), t = all(scale);
        double total = 0;
        for (int64_t i = first; i < last; i += Vec::W) {
          const int n = int(std::min<int64_t>(Vec::W, last - i));
          store(z + i, exp((load(z + i, n) - most) / t), n);
          total += sum(load(z + i, n));
        }
        s.sums[team.thread * B + b] = total;
      }
      team.barrier();
    }
    if (team.thread == 0)
      for (int64_t b = 0; b < B; ++b) {
        float* z = d.weights + (b * K + k) * d.target_vocabulary;
        int64_t id;
        if (d.greedy) {
          id = places[best(b) * B + b];
        } else {
          double total = 0;
          if (plain)
            for (int64_t t = 0; t < T; ++t) total += s.sums[t * B + b];
          else
            total = weigh(z, V, d.how);
          d.totals[b * K + k] = total;
          id = pick(z, V, d.uniform[b * (2 * K + 1) + k] * total);
        }
        d.ids[b * K + k] = id;
        d.block[b * (K + 1) + 1 + k] = s.vocabulary_map == nullptr ? id : s.vocabulary_map[id];
        if (s.head == kRnn)
          std::copy(s.next_memory + b * r, s.next_memory + (b + 1) * r, s.memory + b * r);
      }
    team.barrier();
  }
  if (team.thread == 0 && s.confidence != nullptr)
    for (int64_t b = 0; b < B; ++b)
      for (int64_t k = 1; k < d.count; ++k) d.survival[b * K + k] *= d.survival[b * K + k - 1];
}

template <class U, class W>
void draft_sequence(Team team, Drafting& d) {
  if constexpr (kPairs && std::is_same<W, bf16>::value) {
    if (d.s->pairs) return draft_sequence<U, W, true>(team, d);
  }
  draft_sequence<U, W, false>(team, d);
}

}  // namespace dspark
