// Experts over int8 or int4 weights: moe.h's two steps, weights read as they lie.
//
// An expert's tokens are the rows of one product over its numbers (product_int.h) as long as one
// pass takes them. Where there are more, a block of rows of the weights is widened to T once, in the
// second cache, and all passes multiply that: numbers of 8 bits are exact in every T, so that the
// scales of whole rows multiply the sums. Groups are dequantised and rounded to T, as code does that
// dequantises.
#pragma once
#include <new>

#include "moe.h"
#include "product_int4.h"
#include "product_int8.h"

namespace dspark {

// The quantised weight of every expert; rows of q are `ld` bytes apart.
template <class Weight>
struct IntStack {
  using S = typename Weight::S;
  using Zero = typename std::decay<decltype(*Weight::zero)>::type;

  Stack<uint8_t> q;
  int64_t ld;
  Stack<S> scale;
  Stack<Zero> zero;

  Weight of(int64_t e) const { return {q.of(e), ld, scale.of(e), zero.of(e)}; }
};

// 32 numbers of row n, from column k on: where they lie, or in `room`.
template <class Q>
inline const int8_t* plane_numbers(const uint8_t* q, int64_t ld, int64_t n, int64_t k,
                                   int8_t* room) {
  if constexpr (std::is_same<Q, Int8>::value) {
    return reinterpret_cast<const int8_t*>(q) + n * ld + k;
  } else {
    const uint8_t* line = q + n / LANES * ld + k / PLANE * UNIT + n % LANES * 4;
#if defined(__AVX2__)
    int32_t lines[4];
    for (int i = 0; i < 4; ++i) std::memcpy(lines + i, line + 64 * i, 4);
    const __m128i x = _mm_loadu_si128((const __m128i*)lines), bits = _mm_set1_epi8(15);
    const __m128i sign = _mm_set1_epi8(8);
    const auto whole = [&](__m128i y) { return _mm_sub_epi8(_mm_xor_si128(y, sign), sign); };
    const __m128i low = whole(_mm_and_si128(x, bits));
    const __m128i high = whole(_mm_and_si128(_mm_srli_epi16(x, 4), bits));
    _mm_storeu_si128((__m128i*)room, _mm_unpacklo_epi32(low, high));
    _mm_storeu_si128((__m128i*)(room + 16), _mm_unpackhi_epi32(low, high));
#else
    for (int i = 0; i < PLANE; i += 8, line += 64)
      for (int j = 0; j < 4; ++j) {
        room[i + j] = int8_t(((line[j] & 15) ^ 8) - 8);
        room[i + 4 + j] = int8_t(((line[j] >> 4) ^ 8) - 8);
      }
#endif
    return room;
  }
}

// Rows of a weight as T.
template <class Q, class T, bool GROUPED, class Weight>
struct WideRows {
  using Zero = typename IntStack<Weight>::Zero;
  // Whether they are the numbers themselves, less the zero point: whole numbers below 256.
  static constexpr bool EXACT =
      !GROUPED && (!Weight::ZEROS || std::is_integral<Zero>::value);

  static int64_t ld(int64_t K) { return (K + PLANE - 1) / PLANE * PLANE; }

  static void make(const Weight& w, int64_t n, int count, int64_t K, int64_t G, T* to) {
    const int64_t each = K / G;
    alignas(64) int8_t room[PLANE];
    for (int r = 0; r < count; ++r, to += ld(K)) {
      float s = 1, z = 0;
      for (int64_t k = 0, g = (n + r) * G, until = 0; k < K; k += PLANE) {
        if (k == until) {
          if constexpr (!EXACT) s = to_float(w.scale[g]);
          if constexpr (Weight::ZEROS) z = to_float(w.zero[g]);
          until = GROUPED ? until + each : K;
          ++g;
        }
        const int8_t* q = plane_numbers<Q>(w.q, w.ld, n + r, k, room);
        const int left = int(std::min<int64_t>(PLANE, K - k));
        const auto number = [&](Vec v) __attribute__((always_inline)) {
          if constexpr (Weight::ZEROS) v = v - all(z);
          if constexpr (!EXACT) v = v * all(s);
          return v;
        };
        if (left == PLANE) {
          for (int j = 0; j < PLANE; j += Vec::W) store(to + k + j, number(load(q + j)));
          continue;
        }
        for (int j = 0; j < left; j += Vec::W) {
          const int lanes = std::min(Vec::W, left - j);
          store(to + k + j, number(load(q + j, lanes)), lanes);
        }
      }
    }
  }
};

// What is one for all sites of a kernel, as for Experts; besides:
//   Q        Int8 or Int4;  Weight  Quantized<...>
//   GROUPED, DOWN_GROUPED   whether G, the groups of a row of gate and up, and H, of down, are more
//                           than one
template <class Q, class T, class Index, class Share, int CAP, int MATS, bool GROUPED,
          bool DOWN_GROUPED, bool WEIGH_INPUT, class Weight, class Act>
struct IntExperts {
  const T* x;
  const Index* indices;
  const Share* weights;
  IntStack<Weight> gate, up, down;
  Stack<T> gate_bias, up_bias, down_bias;
  int64_t G, H;
  T* y;
  Load* load;
  ExpertSizes s;

  static size_t bytes(const ExpertSizes& s, int64_t G, int64_t H, int threads) {
    return shared_bytes(s) + threads * own_bytes(s, G, H) + 4096;
  }

  void run(Team team, char* memory) const {
    T* hidden = (T*)memory;
    float* total = (float*)(memory + aligned(sizeof(T) * s.tokens * s.k * s.I));
    memory += shared_bytes(s) + own_bytes(s, G, H) * team.thread;
    const Routing routing(indices, s, memory);
    memory += Routing::bytes(s);
    if (team.thread == 0) load->count(routing, s.tokens);
    first_step(team, routing, hidden, memory);
    const auto [first, last] = team.share(s.N, BLOCK);
    if (routing.hits > 0) fetch(down.of(routing.expert[0]), first, last);
    team.barrier();
    if (first < last) second_step(routing, first, last, hidden, total, memory);
  }

 private:
  template <bool GROUPS>
  using One = IntStaged<Q, T, 1, GROUPS>;

  // -- memory

  static size_t shared_bytes(const ExpertSizes& s) {
    return aligned(sizeof(T) * s.tokens * s.k * s.I) + aligned(sizeof(float) * s.tokens * s.N);
  }

  // Of a pass of M rows or fewer.
  template <int M, bool GROUPS>
  static size_t pass_bytes(int64_t K, int64_t groups) {
    const size_t mine = aligned(sizeof(T) * M * K) +
                        IntStaged<Q, T, M, GROUPS>::bytes(K, groups, 1) +
                        int_work_bytes<Q, T, M, GROUPS>(K);
    if constexpr (M == 1) {
      return mine;
    } else {
      return std::max(mine, pass_bytes<M / 2, GROUPS>(K, groups));
    }
  }
  template <bool GROUPS>
  static size_t wide_bytes(int64_t K) {
    return aligned(sizeof(T) * BLOCK * WideRows<Q, T, GROUPS, Weight>::ld(K));
  }
  template <bool GROUPS>
  static size_t product_bytes(const ExpertSizes& s, int64_t K, int64_t groups) {
    return std::max(pass_bytes<CAP, GROUPS>(K, groups),
                    MATS * wide_bytes<GROUPS>(K) + packed_bytes<T, CAP>(K, s.tokens * s.k));
  }
  // Of tokens that are packed once for all their experts.
  static size_t token_bytes(const ExpertSizes& s, int64_t G) {
    return s.tokens > FEW ? 0 : s.tokens * (aligned(sizeof(One<GROUPED>)) +
                                            One<GROUPED>::bytes(s.K, G, 1));
  }
  static size_t own_bytes(const ExpertSizes& s, int64_t G, int64_t H) {
    const size_t first = token_bytes(s, G) + product_bytes<GROUPED>(s, s.K, G);
    return aligned(Routing::bytes(s) + std::max(first, product_bytes<DOWN_GROUPED>(s, s.I, H)));
  }

  // -- products

  // The beginning of rows [first, last), which are read next.
  static void fetch(const Weight& w, int64_t first, int64_t last) {
    constexpr int64_t EACH = std::is_same<Q, Int8>::value ? 1 : LANES;  // rows of `ld` bytes
    const char* from = (const char*)(w.q + first / EACH * w.ld);
    const int64_t rows = std::min<int64_t>(BLOCK, last - first);
    for (int64_t at = 0; at < rows / EACH * w.ld; at += 64) __builtin_prefetch(from + at, 0, 2);
  }

  // done(row, live, n, count, results) for `live` rows from `row` on of what `read` gives, with
  // rows [n, n + count) of the weights.
  template <bool GROUPS, int NUMBER, class Read, class Done>
  void products(const Weight (&w)[NUMBER], int64_t first, int64_t last, int64_t K, int64_t groups,
                int64_t rows, const Read& read, char* memory, Done&& done) const {
    if (rows > CAP) {
      for (int64_t at = 0; at < rows; at += ROOM) {
        const int64_t count = std::min<int64_t>(ROOM, rows - at);
        many<GROUPS>(w, first, last, K, groups, at, count, read, memory, done);
      }
      return;
    }
    with_rows<CAP>(rows, [&](auto constant) {
      constexpr int M = decltype(constant)::value;
      T* copy = (T*)memory;
      char* rest = memory + aligned(sizeof(T) * M * K);
      const T* from = copy;
      if (M == 1 && Read::AS_IT_LIES) {
        from = read(0);
      } else {
        for (int64_t m = 0; m < M; ++m) {
          if (m < rows) {
            read.copy(m, copy + m * K);
          } else {
            std::memset(copy + m * K, 0, sizeof(T) * K);
          }
        }
      }
      const IntStaged<Q, T, M, GROUPS> staged(Team{}, from, K, K, groups, Weight::ZEROS, rest);
      rest += IntStaged<Q, T, M, GROUPS>::bytes(K, groups, 1);
      product_int<Q, T, M, NUMBER, GROUPS>(
          first, last, w, K, groups, staged, rest,
          [&](int64_t n, int count, const float(*results)[M][BLOCK]) {
            done(0, rows, n, count, results);
          });
    });
  }

  // More than one pass: a block of the weights is widened for all of them.
  template <bool GROUPS, int NUMBER, class Read, class Done>
  void many(const Weight (&w)[NUMBER], int64_t first, int64_t last, int64_t K, int64_t groups,
            int64_t row, int64_t rows, const Read& read, char* memory, Done&& done) const {
    using Wide = WideRows<Q, T, GROUPS, Weight>;
    using P = Packed<T, CAP>;
    T* wide[NUMBER];
    const T* blocks[NUMBER];
    for (int i = 0; i < NUMBER; ++i) {
      blocks[i] = wide[i] = (T*)memory;
      memory += wide_bytes<GROUPS>(K);
    }
    struct {
      const Read& read;
      int64_t row;
      void copy(int64_t i, T* to) const { read.copy(row + i, to); }
    } const behind{read, row};
    const auto* packed = pack_passes<T, CAP>(rows, K, behind, memory);
    const int64_t pass = int64_t(P::bytes(K) / sizeof(typename P::Element));
    const T* const(&both)[NUMBER] = blocks;
    for (int64_t n = first; n < last; n += BLOCK) {
      const int count = int(std::min<int64_t>(BLOCK, last - n));
      for (int i = 0; i < NUMBER; ++i) {
        Wide::make(w[i], n, count, K, groups, wide[i]);
        if (n + BLOCK < last) fetch(w[i], n + BLOCK, last);
      }
      __asm__ volatile("" : : "r"(wide[0]), "r"(wide[NUMBER - 1]) : "memory");
      for (int64_t p = 0; p * CAP < rows; ++p)
        product<T, CAP, NUMBER>(
            0, count, both, Wide::ld(K), K, packed + p * pass, P::padded(K),
            [&](int64_t at, int found, auto& results) {
              const int64_t live = std::min<int64_t>(CAP, rows - p * CAP);
              if constexpr (Wide::EXACT)
                for (int i = 0; i < NUMBER; ++i)
                  for (int64_t m = 0; m < live; ++m)
                    for (int j = 0; j < found; j += Vec::W) {
                      float* sum = &results[i][m][j];
                      const Vec by = dspark::load(w[i].scale + n + at + j, std::min(Vec::W, found - j));
                      store(sum, dspark::load(sum) * by);
                    }
              done(row + p * CAP, live, n + at, found, results);
            });
    }
  }

  // -- the steps

  struct Tokens : FromTokens<T, Share, WEIGH_INPUT> {
    static constexpr bool AS_IT_LIES = !WEIGH_INPUT;
  };
  struct Hidden : FromHidden<T> {
    static constexpr bool AS_IT_LIES = true;
  };

  void first_step(Team team, const Routing& routing, T* hidden, char* memory) const {
    One<GROUPED>* const known = (One<GROUPED>*)memory;
    bool is_known[FEW] = {};
    const bool few = s.tokens <= FEW && !WEIGH_INPUT;
    char* rest = memory + token_bytes(s, G);
    const auto passes = [&](int64_t h) { return (routing.size(h) + CAP - 1) / CAP; };
    share_rows(team, routing, s.I, passes, [&](int64_t h, int64_t first, int64_t last) {
      const int64_t e = routing.expert[h], begin = routing.start[h];
      Weight w[MATS] = {up.of(e)};
      if constexpr (MATS == 2) w[1] = gate.of(e);
      const Weight(&both)[MATS] = w;
      const T *bu = up_bias.of(e), *bg = gate_bias.of(e);
      const auto done = [&](int64_t row, int64_t live, int64_t n, int count, const auto& results) {
        for (int64_t m = 0; m < live; ++m)
          for (int j = 0; j < count; j += Vec::W) {
            const int lanes = std::min(Vec::W, count - j);
            const Vec u = biased(dspark::load(&results[0][m][j]), bu, n + j, lanes);
            Vec g = u;
            if constexpr (MATS == 2) g = biased(dspark::load(&results[1][m][j]), bg, n + j, lanes);
            store(hidden + (begin + row + m) * s.I + n + j, Act::of(g, u), lanes);
          }
      };
      const int64_t t = routing.choice[begin] / s.k;
      if (few && routing.size(h) == 1) {
        if (!is_known[t]) {
          char* room = memory + aligned(sizeof(One<GROUPED>) * s.tokens) +
                       One<GROUPED>::bytes(s.K, G, 1) * t;
          new (known + t) One<GROUPED>(Team{}, x + t * s.ldx, s.ldx, s.K, G, Weight::ZEROS, room);
          is_known[t] = true;
        }
        product_int<Q, T, 1, MATS, GROUPED>(
            first, last, both, s.K, G, known[t], rest,
            [&](int64_t n, int count, const float(*results)[1][BLOCK]) {
              done(0, 1, n, count, results);
            });
      } else {
        const Tokens read{{x, weights, routing.choice + begin, s}};
        products<GROUPED>(both, first, last, s.K, G, routing.size(h), read, rest, done);
      }
      if (h + 1 < routing.hits && last == s.I) {
        fetch(up.of(routing.expert[h + 1]), 0, s.I);
        if (MATS == 2) fetch(gate.of(routing.expert[h + 1]), 0, s.I);
      }
    });
  }

  void second_step(const Routing& routing, int64_t first, int64_t last, const T* hidden,
                   float* total, char* memory) const {
    for (int64_t t = 0; t < s.tokens; ++t)
      std::memset(total + t * s.N + first, 0, sizeof(float) * (last - first));
    for (int64_t h = 0; h < routing.hits; ++h) {
      const int64_t e = routing.expert[h], begin = routing.start[h];
      const T* bias = down_bias.of(e);
      const Weight w[1] = {down.of(e)};
      const Hidden read{{hidden + begin * s.I, s.I}};
      products<DOWN_GROUPED>(
          w, first, last, s.I, H, routing.size(h), read, memory,
          [&](int64_t row, int64_t live, int64_t n, int count, const auto& results) {
            for (int64_t m = 0; m < live; ++m) {
              const int64_t choice = routing.choice[begin + row + m];
              const Vec share = all(WEIGH_INPUT ? 1.0f : to_float(weights[choice]));
              float* sum = total + choice / s.k * s.N + n;
              for (int j = 0; j < count; j += Vec::W) {
                const int lanes = std::min(Vec::W, count - j);
                const Vec v = biased(dspark::load(&results[0][m][j]), bias, n + j, lanes);
                store(sum + j, fma(share, v, dspark::load(sum + j, lanes)), lanes);
              }
            }
          });
      if (h + 1 < routing.hits) fetch(down.of(routing.expert[h + 1]), first, last);
    }
    for (int64_t t = 0; t < s.tokens; ++t)
      for (int64_t n = first; n < last; n += Vec::W) {
        const int lanes = int(std::min<int64_t>(Vec::W, last - n));
        store(y + t * s.N + n, dspark::load(total + t * s.N + n, lanes), lanes);
      }
  }
};

}  // namespace dspark
