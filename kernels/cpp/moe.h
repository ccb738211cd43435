// Experts: y[t] = sum over the k choices j of w[t, j] * expert(x[t]), in two steps that meet once.
//
//   1. hidden = act(x G_e^T) * (x U_e^T) for every choice, sorted by expert
//   2. y += w * (hidden D_e^T), a thread for its own columns of y, in float: no atomics
//
// Only experts that are hit are read, each once, whatever number of tokens share it: an expert's
// tokens are rows of one product, of up to 16 rows a pass over the weights where they come from
// memory, and more where they still lie in cache. Which experts are hit is data; how the work is cut
// follows from it, in every thread alike, without a word between them.
#pragma once
#include "activation.h"
#include "linear.h"
#include "moe_product.h"
#include "moe_routing.h"
#include "moe_rows.h"

namespace dspark {

// Experts with one token each are read as STREAMS runs of rows side by side, whichever experts
// they belong to; from so many tokens on there are few of them, and they go the way of the others.
constexpr int STREAMS = Vec::W == 16 ? 8 : 4;
constexpr int64_t FEW = 64;

struct Nothing {};

// What is one for all sites of a kernel.
//   T      of x, weights and y;  Index, Share  of indices and weights
//   CAP    rows of a pass, 1 ... 16;  MATS  2 with a gate
//   TURNED_UP, TURNED_DOWN  weights lie [in][out]
//   WEIGH_INPUT  the weight multiplies the expert's input
//   NormT  of a norm's weight behind the experts, or Nothing
//   Act    of(gate, up)
template <class T, class Index, class Share, int CAP, int MATS, bool TURNED_UP, bool TURNED_DOWN,
          bool WEIGH_INPUT, class NormT, class Act>
struct Experts {
  static constexpr bool NORM = !std::is_same<NormT, Nothing>::value;

  const T* x;
  const Index* indices;
  const Share* weights;
  Stack<T> gate, up, down, gate_bias, up_bias, down_bias;
  Lie up_lie, down_lie;
  const NormT* norm;
  float eps;
  T* y;
  Load* load;
  ExpertSizes s;

  // A thread's own memory.
  static size_t own_bytes(const ExpertSizes& s) {
    const int64_t choices = s.tokens * s.k;
    size_t packed = std::max(packed_bytes<T, CAP>(s.K, choices), packed_bytes<T, CAP>(s.I, choices));
    if (s.tokens <= FEW)
      packed = std::max({packed, s.tokens * (aligned(sizeof(T) * s.K) + Packed<T, 1>::bytes(s.K)),
                         STREAMS * (aligned(sizeof(T) * s.I) + Packed<T, 1>::bytes(s.I))});
    return aligned(Routing::bytes(s) + aligned(4 * (s.experts + 1)) + packed);
  }

  static size_t bytes(const ExpertSizes& s, int threads) {
    const int64_t choices = s.tokens * s.k;
    size_t shared = aligned(sizeof(T) * choices * s.I) + aligned(sizeof(float) * s.tokens * s.N);
    if (NORM) shared += aligned(sizeof(T) * choices * s.N);
    return shared + threads * own_bytes(s) + 4096;
  }

  void run(Team team, char* memory) const {
    const int64_t choices = s.tokens * s.k;
    T* hidden = (T*)memory;
    memory += aligned(sizeof(T) * choices * s.I);
    float* total = (float*)memory;
    memory += aligned(sizeof(float) * s.tokens * s.N);
    T* results = (T*)memory;
    if (NORM) memory += aligned(sizeof(T) * choices * s.N);
    memory += own_bytes(s) * team.thread;
    const Routing routing(indices, s, memory);
    memory += Routing::bytes(s);
    // Experts with one token.
    Singles singles{(int32_t*)memory, 0};
    memory += aligned(4 * (s.experts + 1));
    if (SINGLES && s.tokens <= FEW)
      for (int64_t h = 0; h < routing.hits; ++h)
        if (routing.size(h) == 1) singles.hit[singles.count++] = int32_t(h);
    if (team.thread == 0) load->count(routing, s.tokens);
    first_step(team, routing, singles, hidden, memory);
    fetch_down(team, routing);
    team.barrier();
    second_step(team, routing, singles, hidden, total, results, memory);
    if constexpr (NORM) {
      team.barrier();
      third_step(team, routing, results);
    }
  }

 private:
  static constexpr bool SINGLES = !TURNED_UP && !TURNED_DOWN && !WEIGH_INPUT;
  struct Singles {
    int32_t* hit;
    int64_t count;
  };
  using One = typename Packed<T, 1>::Element;

  size_t slot_bytes() const { return Packed<T, 1>::bytes(s.K) + aligned(sizeof(T) * s.K); }

  FromTokens<T, Share, WEIGH_INPUT> tokens(const Routing& routing, int64_t begin) const {
    return {x, weights, routing.choice + begin, s};
  }

  float share(int64_t choice) const { return to_float(weights[choice]); }

  // The beginning of what this thread reads in the second step.
  void fetch_down(Team team, const Routing& routing) const {
    if (TURNED_DOWN || team.threads == 1) return;
    const auto [first, last] = team.share(s.N, BLOCK);
    if (first >= last || routing.hits == 0) return;
    const int64_t heads = std::min<int64_t>(STREAMS, routing.hits);
    const int64_t size =
        std::min<int64_t>(64 * 1024 / heads, (last - first) * down_lie.ld * int64_t(sizeof(T)));
    for (int64_t h = 0; h < heads; ++h) {
      const char* from = (const char*)(down.of(routing.expert[h]) + first * down_lie.ld);
      for (int64_t at = 0; at < size; at += 64) __builtin_prefetch(from + at, 0, 2);
    }
  }

  // Rows [from, from + count) of an expert's choices as M-row passes; `read(i)` is where row i lies.
  template <int M, bool TOKENS = true, class Read>
  void packed(int64_t count, int64_t K, const Read& read, char* memory,
              typename Packed<T, M>::Element*& to, int64_t& ldx, int64_t& pass) const {
    using P = Packed<T, M>;
    using Element = typename P::Element;
    ldx = P::padded(K);
    pass = int64_t(P::bytes(K) / sizeof(Element));
    constexpr bool DIRECT = std::is_same<T, Element>::value && P::FORM != Form::Tiles && M == 1;
    if (DIRECT && !(WEIGH_INPUT && TOKENS) && K % P::STEP == 0 && count == 1) {
      to = (Element*)read(0);
      return;
    }
    to = pack_passes<T, M>(count, K, read, memory);
  }

  void first_step(Team team, const Routing& routing, const Singles& singles, T* hidden,
                  char* memory) const {
    if (singles.count > 0) single_ups(team, routing, singles, hidden, memory);
    const auto passes = [&](int64_t h) {
      const int64_t rows = routing.size(h);
      return rows == 1 && singles.count > 0 ? 0 : (rows + CAP - 1) / CAP;
    };
    share_rows(team, routing, s.I, passes, [&](int64_t h, int64_t first, int64_t last) {
      up_rows(routing, h, first, last, hidden, memory);
    });
  }

  void up_rows(const Routing& routing, int64_t h, int64_t first, int64_t last, T* hidden,
               char* memory) const {
    const int64_t e = routing.expert[h];
    const T* bu = up_bias.of(e);
    const T* bg = gate_bias.of(e);
    for (int64_t c = 0; c < routing.size(h); c += ROOM) {
      const int64_t begin = routing.start[h] + c;
      const int64_t rows = std::min<int64_t>(ROOM, routing.size(h) - c);
      with_rows<CAP>(rows, [&](auto constant) {
        constexpr int M = decltype(constant)::value;
        typename Packed<T, M>::Element* packed_x;
        int64_t ldx, pass;
        packed<M>(rows, s.K, tokens(routing, begin), memory, packed_x, ldx, pass);
        const T* w[MATS];
        w[0] = up.of(e);
        if constexpr (MATS == 2) w[1] = gate.of(e);
        auto done = [&](int64_t p, int64_t n, int count, const auto& results) {
          const int64_t live = std::min<int64_t>(M, rows - p * M);
          for (int64_t m = 0; m < live; ++m)
            for (int j = 0; j < count; j += Vec::W) {
              const int lanes = std::min(Vec::W, count - j);
              const Vec u = biased(dspark::load(&results[0][m][j]), bu, n + j, lanes);
              Vec g = u;
              if constexpr (MATS == 2)
                g = biased(dspark::load(&results[1][m][j]), bg, n + j, lanes);
              store(hidden + (begin + p * M + m) * s.I + n + j, Act::of(g, u), lanes);
            }
        };
        const T* const(&both)[MATS] = w;
        const int64_t passes = (rows + M - 1) / M;
        if constexpr (TURNED_UP) {
          turned_passes<T, M, MATS>(first, last, both, up_lie.ld, up_lie.gap, s.K, packed_x, ldx,
                                    pass, passes, done);
        } else {
          product_passes<T, M, MATS>(first, last, both, up_lie.ld, s.K, packed_x, ldx, pass, passes,
                                     done);
        }
      });
    }
  }

  // Rows of all singles' gates and ups are one long list; a thread's share of it is cut into runs
  // that are read side by side, each through as many experts as it takes.
  void single_ups(Team team, const Routing& routing, const Singles& singles, T* hidden,
                  char* memory) const {
    constexpr int RUNS = STREAMS / MATS, R = RUNS * MATS;
    const auto [first, last] = team.share(singles.count * s.I, Vec::W);
    if (first >= last) return;
    // x of the tokens, packed: one of them is used where it lies.
    One* rows[FEW] = {};
    struct Place {
      int64_t at, h, n;
      const T *gate, *up;
      const One* x;
    };
    auto look = [&](Place& p) {
      const int64_t h = singles.hit[p.at / s.I];
      p.n = p.at % s.I;
      p.h = h;
      const int64_t e = routing.expert[h], choice = routing.choice[routing.start[h]];
      p.up = up.of(e) + p.n * up_lie.ld;
      p.gate = MATS == 2 ? gate.of(e) + p.n * up_lie.ld : nullptr;
      const int64_t t = choice / s.k;
      if (rows[t] == nullptr) {
        int64_t ldx, pass;
        packed<1>(1, s.K, tokens(routing, routing.start[h]),
                  memory + slot_bytes() * t, rows[t], ldx, pass);
      }
      p.x = rows[t];
    };
    const int64_t each = (last - first + RUNS - 1) / RUNS;
    Place now[RUNS], then[RUNS];
    for (int r = 0; r < RUNS; ++r) {
      now[r].at = std::min(first + r * each, last - 1);
      look(now[r]);
    }
    for (int64_t j = 0; j < each; ++j) {
      const T* w[R];
      const T* next[R];
      const One* x[R];
      float out[R];
      for (int r = 0; r < RUNS; ++r) {
        then[r] = now[r];
        // A run that is at its end reads its last row again; that is not used.
        if (now[r].at + 1 < std::min(first + (r + 1) * each, last)) {
          ++then[r].at;
          if (++then[r].n < s.I) {
            then[r].up += up_lie.ld;
            if (MATS == 2) then[r].gate += up_lie.ld;
          } else {
            look(then[r]);
          }
        }
        for (int i = 0; i < MATS; ++i) {
          w[r * MATS + i] = i == 0 ? now[r].up : now[r].gate;
          next[r * MATS + i] = i == 0 ? then[r].up : then[r].gate;
          x[r * MATS + i] = now[r].x;
        }
      }
      const T* const(&w_)[R] = w;
      const T* const(&next_)[R] = next;
      const One* const(&x_)[R] = x;
      own_rows<T, R>(w_, next_, x_, s.K, out);
      for (int r = 0; r < RUNS; ++r) {
        if (first + r * each + j >= std::min(first + (r + 1) * each, last)) continue;
        const int64_t e = routing.expert[now[r].h], n = now[r].n;
        const T *bu = up_bias.of(e), *bg = gate_bias.of(e);
        float u = out[r * MATS], g = out[r * MATS + MATS - 1];
        if (bu != nullptr) u += to_float(bu[n]);
        if (MATS == 2 && bg != nullptr) g += to_float(bg[n]);
        if (MATS == 1) g = u;
        store(hidden + routing.start[now[r].h] * s.I + n, Act::of(all(g), all(u)), 1);
      }
      for (int r = 0; r < RUNS; ++r) now[r] = then[r];
    }
  }

  void second_step(Team team, const Routing& routing, const Singles& singles, const T* hidden,
                   float* total, T* results, char* memory) const {
    const auto [first, last] = team.share(s.N, BLOCK);
    if (first >= last) return;
    if (!NORM)
      for (int64_t t = 0; t < s.tokens; ++t)
        std::memset(total + t * s.N + first, 0, sizeof(float) * (last - first));
    single_downs(routing, singles, first, last, hidden, total, results, memory);
    for (int64_t h = 0; h < routing.hits; ++h)
      if (singles.count == 0 || routing.size(h) != 1)
        down_rows(routing, h, first, last, hidden, total, results, memory);
    if (NORM) return;
    for (int64_t t = 0; t < s.tokens; ++t)
      for (int64_t n = first; n < last; n += Vec::W) {
        const int lanes = int(std::min<int64_t>(Vec::W, last - n));
        store(y + t * s.N + n, dspark::load(total + t * s.N + n, lanes), lanes);
      }
  }

  // Singles in groups that fill the streams: one expert a stream, or several runs of its rows.
  void single_downs(const Routing& routing, const Singles& singles, int64_t first, int64_t last,
                    const T* hidden, float* total, T* results, char* memory) const {
    for (int64_t i = 0; i < singles.count;) {
      int group = STREAMS;
      while (group > singles.count - i) group /= 2;
      single_group(routing, singles.hit + i, group, first, last, hidden, total, results, memory);
      i += group;
    }
  }

  void single_group(const Routing& routing, const int32_t* hit, int group, int64_t first,
                    int64_t last, const T* hidden, float* total, T* results, char* memory) const {
    constexpr int R = STREAMS;
    const int runs = R / group;  // of each expert's rows
    const int64_t each = (last - first + runs - 1) / runs;
    const One* x[R];
    const T *w[R], *bias[R];
    int64_t choice[R], at[R], end[R];
    float weight[R];
    for (int r = 0; r < R; ++r) {
      const int64_t h = hit[r / runs], e = routing.expert[h];
      if (r % runs == 0) {
        int64_t ldx, pass;
        One* to;
        packed<1, false>(1, s.I, FromHidden<T>{hidden + routing.start[h] * s.I, s.I},
                         memory + r * (Packed<T, 1>::bytes(s.I) + aligned(sizeof(T) * s.I)), to, ldx,
                         pass);
        x[r] = to;
      } else {
        x[r] = x[r - 1];
      }
      at[r] = std::min(first + r % runs * each, last - 1);
      end[r] = std::min(first + (r % runs + 1) * each, last);
      w[r] = down.of(e) + at[r] * down_lie.ld;
      bias[r] = down_bias.of(e);
      choice[r] = routing.choice[routing.start[h]];
      weight[r] = WEIGH_INPUT ? 1.0f : share(choice[r]);
    }
    for (int64_t j = 0; j < each; ++j) {
      const T* next[R];
      float out[R];
      for (int r = 0; r < R; ++r) next[r] = at[r] + 1 < end[r] ? w[r] + down_lie.ld : w[r];
      const T* const(&w_)[R] = w;
      const T* const(&next_)[R] = next;
      const One* const(&x_)[R] = x;
      own_rows<T, R>(w_, next_, x_, s.I, out);
      for (int r = 0; r < R; ++r) {
        if (first + r % runs * each + j >= end[r]) continue;
        const int64_t n = at[r];
        const float v = out[r] + (bias[r] == nullptr ? 0.0f : to_float(bias[r][n]));
        if constexpr (NORM) {
          from_float(results[choice[r] * s.N + n], v);
        } else {
          total[choice[r] / s.k * s.N + n] += weight[r] * v;
        }
        w[r] = next[r];
        at[r] += n + 1 < end[r];
      }
    }
  }

  void down_rows(const Routing& routing, int64_t h, int64_t first, int64_t last, const T* hidden,
                 float* total, T* results, char* memory) const {
    const int64_t e = routing.expert[h];
    const T* bias = down_bias.of(e);
    for (int64_t c = 0; c < routing.size(h); c += ROOM) {
      const int64_t begin = routing.start[h] + c;
      const int64_t rows = std::min<int64_t>(ROOM, routing.size(h) - c);
      with_rows<CAP>(rows, [&](auto constant) {
        constexpr int M = decltype(constant)::value;
        typename Packed<T, M>::Element* packed_x;
        int64_t ldx, pass;
        packed<M, false>(rows, s.I, FromHidden<T>{hidden + begin * s.I, s.I}, memory, packed_x, ldx, pass);
        const T* const w[1] = {down.of(e)};
        auto done = [&](int64_t p, int64_t n, int count, const auto& sums) {
          const int64_t live = std::min<int64_t>(M, rows - p * M);
          for (int64_t m = 0; m < live; ++m) {
            const int64_t choice = routing.choice[begin + p * M + m];
            const Vec share_ = dspark::all(WEIGH_INPUT ? 1.0f : share(choice));
            float* sum = total + choice / s.k * s.N + n;
            for (int j = 0; j < count; j += Vec::W) {
              const int lanes = std::min(Vec::W, count - j);
              const Vec v = biased(dspark::load(&sums[0][m][j]), bias, n + j, lanes);
              if constexpr (NORM) {
                store(results + choice * s.N + n + j, v, lanes);
              } else {
                store(sum + j, fma(share_, v, dspark::load(sum + j, lanes)), lanes);
              }
            }
          }
        };
        const int64_t passes = (rows + M - 1) / M;
        if constexpr (TURNED_DOWN) {
          turned_passes<T, M, 1>(first, last, w, down_lie.ld, down_lie.gap, s.I, packed_x, ldx,
                                 pass, passes, done);
        } else {
          product_passes<T, M, 1>(first, last, w, down_lie.ld, s.I, packed_x, ldx, pass, passes,
                                  done);
        }
      });
    }
  }

  // Norm of every expert's row, then the weighted sum, a thread for its own tokens.
  void third_step(Team team, const Routing& routing, const T* results) const {
    (void)routing;
    const auto [first, last] = team.share(s.tokens);
    for (int64_t t = first; t < last; ++t) {
      float scale[64];
      for (int64_t j = 0; j < s.k; ++j) {
        const int64_t choice = t * s.k + j;
        scale[j] = 0.0f;
        if (uint64_t(indices[choice]) >= uint64_t(s.experts)) continue;
        Vec squares = zero();
        for (int64_t n = 0; n < s.N; n += Vec::W) {
          const Vec v = dspark::load(results + choice * s.N + n, int(std::min<int64_t>(Vec::W, s.N - n)));
          squares = fma(v, v, squares);
        }
        scale[j] = 1.0f / std::sqrt(sum(squares) / float(s.N) + eps);
      }
      for (int64_t n = 0; n < s.N; n += Vec::W) {
        const int lanes = int(std::min<int64_t>(Vec::W, s.N - n));
        Vec all_ = zero();
        for (int64_t j = 0; j < s.k; ++j) {
          const int64_t choice = t * s.k + j;
          if (uint64_t(indices[choice]) >= uint64_t(s.experts)) continue;
          const Vec v = rounded<T>(dspark::load(results + choice * s.N + n, lanes) * dspark::all(scale[j]));
          const Vec w = v * dspark::load((const NormLoad*)norm + n, lanes);
          all_ = fma(dspark::all(WEIGH_INPUT ? 1.0f : share(choice)), w, all_);
        }
        store(y + t * s.N + n, all_, lanes);
      }
    }
  }

  using NormLoad = typename std::conditional<NORM, NormT, float>::type;
};

}  // namespace dspark
