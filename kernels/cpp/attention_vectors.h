// Scores and values of attention in vectors: few query rows, or a CPU without matrix tiles.
#pragma once
#include "attention_config.h"

namespace dspark {

// Memory may give more to several readers that are pages apart than to one: a block's keys are then
// read as KR runs side by side, and its values as RUNS. Otherwise in order.
constexpr int RUNS = SEQUENCE ? 1 : 4;

// Whether a row's element `d`, or one of the `step` behind it, begins a cache line: the rows of the
// next block are asked for a line at a time, between the instructions that work on this one.
template <class K>
constexpr bool begins_line(int d, int step) {
  constexpr int LINE = 64 / int(sizeof(K));
  return step >= LINE || d % LINE == 0;
}


// The block's rows as the products read them, with `soon`, the rows that are read next, asked for.
template <class C, int D>
inline void widen_block(const typename C::K* from, int64_t ld, int keys, typename C::Read* to,
                        const typename C::K* soon, int64_t ld_soon) {
  constexpr int W = Vec::W;
  for (int j = 0; j < keys; ++j, from += ld, to += C::WIDTH) {
    if (soon != nullptr)
      for (int d = 0; d < D; d += 64) __builtin_prefetch(soon + j * ld_soon + d, 0, 2);
    for (int d = 0; d < D; d += W) {
      const Vec x = d + W <= D ? load(from + d) : load(from + d, D - d);
#if defined(DSPARK_DOT)
      // Whole numbers below 256 need no rounding: their upper half is the bfloat16.
      if constexpr (std::is_same<typename C::Read, bf16>::value) {
        const __m512i bits = _mm512_srli_epi32(_mm512_castps_si512(x.v), 16);
        _mm256_storeu_si256((__m256i*)(to + d), _mm512_cvtepi32_epi16(bits));
        continue;
      }
#endif
      store(to + d, x);
    }
    for (int d = (D + W - 1) / W * W; d < C::WIDTH; d += W) store(to + d, zero());
  }
}

// The block's keys, both parts of each in one row: their values are the first part.
template <class C>
inline void join_block(const typename C::K* k, int64_t ldk, const typename C::K* r, int64_t ldr,
                       int keys, typename C::K (*to)[C::WIDTH]) {
  for (int j = 0; j < keys; ++j) {
    std::memcpy(to[j], k + j * ldk, sizeof(*k) * C::DV);
    std::memcpy(to[j] + C::DV, r + j * ldr, sizeof(*r) * C::DR);
  }
  // GCC 12 does not see that tiles read it.
  __asm__ volatile("" : : "r"(to) : "memory");
}

// scores[r][i * run] = q[r] . k[i * run] for i < KR keys and RR rows, one register each.
template <class C, int RR>
inline __attribute__((always_inline)) void score_tile(
    const typename C::Staged (*q)[C::DP], int rows, const typename C::Read* k, int64_t ldk,
    int64_t run, int keys, float* scores, const typename C::Read* soon) {
  constexpr int W = Vec::W, KR = W / RR;
  Vec a[W];
  for (int i = 0; i < W; ++i) a[i] = zero();
  const typename C::Read* key[KR];
  const typename C::Staged* row[RR];
  for (int i = 0; i < KR; ++i) key[i] = k + (i * run < keys ? i * run : 0) * ldk;
  for (int r = 0; r < RR; ++r) row[r] = q[r < rows ? r : rows - 1];
#pragma GCC unroll 8
  for (int d = 0; d < C::D; d += C::STEP) {
    constexpr int LAST = C::D % C::STEP;
    if (soon != nullptr && d < C::DV && begins_line<typename C::Read>(d, C::STEP))
      for (int i = 0; i < KR; ++i) __builtin_prefetch(soon + i * run * ldk + d, 0, 2);
    const bool whole = LAST == 0 || d + C::STEP <= C::D;
    if constexpr (C::DOT) {
#if defined(DSPARK_DOT)
      __m512bh b[RR];
      for (int r = 0; r < RR; ++r) b[r] = (__m512bh)_mm512_loadu_si512(row[r] + d);
      for (int i = 0; i < KR; ++i) {
        const __m512bh c = (__m512bh)(whole ? _mm512_loadu_si512(key[i] + d)
                                            : _mm512_maskz_loadu_epi16((1u << LAST) - 1, key[i] + d));
        for (int r = 0; r < RR; ++r)
          a[r * KR + i].v = _mm512_dpbf16_ps(a[r * KR + i].v, c, b[r]);
      }
#endif
    } else {
      Vec b[RR];
      for (int r = 0; r < RR; ++r) b[r] = load(row[r] + d);
      for (int i = 0; i < KR; ++i) {
        const Vec c = whole ? load(key[i] + d) : load(key[i] + d, LAST);
        for (int r = 0; r < RR; ++r) a[r * KR + i] = fma(c, b[r], a[r * KR + i]);
      }
    }
  }
  float flat[W];
  store(flat, sums(a));
  for (int i = 0; i < KR && i * run < keys; ++i)
    for (int r = 0; r < RR && r < rows; ++r) scores[r * C::KEYS + i * run] = flat[r * KR + i];
}

// `v`, if not null, is where the values lie that come next.
template <class C>
inline void score_block(const Room<C>& room, const typename C::Read* k, int64_t ldk, int keys,
                        float (*scores)[C::KEYS], const typename C::Read* v, int64_t ldv) {
  constexpr int RR = C::R >= 4 ? 4 : C::R >= 2 ? 2 : 1;
  constexpr int KR = Vec::W / RR;
  // Many long rows do not stay in the first cache: they meet a few tiles of keys that do.
  constexpr int STRIP = C::PARTS && C::R > 8 ? 4 : 1;
  const int64_t tiles = (keys + KR - 1) / KR, run = SEQUENCE ? 1 : tiles;
  for (int64_t from = 0; from < tiles; from += STRIP)
    for (int r = 0; r < C::R; r += RR)
      for (int64_t tile = from; tile < std::min(from + STRIP, tiles); ++tile) {
        const int64_t j = SEQUENCE ? tile * KR : tile;
        score_tile<C, RR>(room.q + r, C::R - r, k + j * ldk, ldk, run, keys - int(j),
                          scores[r] + j, r == 0 && ldv == ldk ? v + j * ldv : nullptr);
      }
}

// out[r] += p[r] V for RR rows and DT vectors of columns.
template <class C, int RR, int DT>
inline __attribute__((always_inline)) void value_tile(
    const float (*p)[C::KEYS], int rows, const typename C::Read* v, int64_t ldv, int keys,
    float (*out)[C::DVP], int d, const typename C::Read* soon) {
  constexpr int W = Vec::W;
  Vec a[RR][DT];
  const float* row[RR];
  for (int r = 0; r < RR; ++r) {
    row[r] = p[r < rows ? r : rows - 1];
    for (int i = 0; i < DT; ++i) a[r][i] = load(out[r < rows ? r : rows - 1] + d + i * W);
  }
  const int run = SEQUENCE ? 1 : (keys + RUNS - 1) / RUNS;
  // One loop over all, and always inlined: elsewhere GCC keeps the sums in memory.
  for (int n = 0, j = 0, from = 0; n < keys; ++n) {
    const typename C::Read* at = v + j * ldv + d;
    Vec c[DT];
    // In order, the lines that come next are those of whole rows, however many columns this is.
    constexpr int LINE = 64 / int(sizeof(typename C::Read)), LINES = (C::DV + LINE - 1) / LINE;
    constexpr int ASK = std::max(DT * W / LINE, 1);
    if (SEQUENCE && soon != nullptr && d % LINE == 0)
      for (int i = 0, line = d / LINE * keys + n * ASK; i < ASK; ++i, ++line)
        __builtin_prefetch(soon + line / LINES * ldv + line % LINES * LINE, 0, 2);
    for (int i = 0; i < DT; ++i) {
      if (!SEQUENCE && soon != nullptr && begins_line<typename C::Read>(d + i * W, W))
        __builtin_prefetch(soon + j * ldv + d + i * W, 0, 2);
      c[i] = d + (i + 1) * W <= C::DV ? load(at + i * W) : load(at + i * W, C::DV - d - i * W);
    }
    for (int r = 0; r < RR; ++r) {
      const Vec b = all(row[r][j]);
      for (int i = 0; i < DT; ++i) a[r][i] = fma(b, c[i], a[r][i]);
    }
    j += run;
    if (j >= keys) j = ++from;
  }
  for (int r = 0; r < RR && r < rows; ++r)
    for (int i = 0; i < DT; ++i) store(out[r] + d + i * W, a[r][i]);
}

template <class C>
inline void value_block(const float (*p)[C::KEYS], const typename C::Read* v, int64_t ldv, int keys,
                        float (*out)[C::DVP], const typename C::Read* k, int64_t ldk) {
  constexpr int W = Vec::W, RR = C::R >= 4 ? 4 : C::R >= 2 ? 2 : 1;
  constexpr int MOST = (W == 16 ? 16 : 8) / RR, VECTORS = C::DVP / W;
  constexpr int DT = MOST < VECTORS ? MOST : VECTORS;
  const typename C::Read* soon = ldk == ldv ? k : nullptr;
  const auto tile = [&](int r, int d, auto vectors) __attribute__((always_inline)) {
    value_tile<C, RR, decltype(vectors)::value>(p + r, C::R - r, v, ldv, keys, out + r, d,
                                                r == 0 ? soon : nullptr);
  };
  const std::integral_constant<int, DT> most;
  const std::integral_constant<int, 1> one;
  // Long rows: a few columns at a time for all r, from the first cache for all but the first.
  constexpr int TOGETHER = C::PARTS ? C::R : RR;
  for (int from = 0; from < C::R; from += TOGETHER) {
    const int to = std::min(from + TOGETHER, C::R);
    int d = 0;
    for (; d + DT * W <= C::DVP; d += DT * W)
      for (int r = from; r < to; r += RR) tile(r, d, most);
    for (; d < C::DVP; d += W)
      for (int r = from; r < to; r += RR) tile(r, d, one);
  }
}

}  // namespace dspark
