// Decode attention: up to 16 query rows over a cache, grouped heads, online softmax in float.
//
// A unit of work is one key/value head of one batch row, with all query rows that read it. Its
// keys, as far as the mask's bounds can allow them, are cut into blocks of 128; the blocks of all
// units, one after another, are dealt out evenly, so a thread may begin and end inside a unit.
// Such pieces leave (max, sum, output) in a slot and are joined after one barrier.
//
// In a block: test the mask (nothing allowed: the keys are not read), scores, softmax step,
// output. Keys are read once however many query rows there are.
#pragma once
#include <limits>

#include "parallel.h"
#include "predicate.h"
#include "tiles.h"
#include "tiles_int8.h"
#include "vec.h"

#if defined(__AVX512BF16__) && defined(__AVX512F__)
#define DSPARK_DOT 1
#endif

namespace dspark {

constexpr int KEYS = 128;
constexpr float NEVER = -std::numeric_limits<float>::infinity();

// Sizes and strides, in elements. The last dimension of q, k and v is contiguous.
struct Shape {
  int64_t batch, kv_heads, keys;
  int64_t q_b, q_h, q_m;
  int64_t k_b, k_h, k_n;
  int64_t v_b, v_h, v_n;
  int64_t ks_b, ks_h, ks_n;
  int64_t vs_b, vs_h, vs_n;
  int64_t bias_b, bias_h, bias_m, bias_n;
};

// No scales: the cache is exact. No bias.
struct None {};
inline float to_float(None) { return 0; }

template <class Q_, class K_, class S_, class B_, class SINK_, int G_, int M_, int D_, int DV_,
          bool SOFTCAP_, bool ADD_>
struct Config {
  using Q = Q_;        // query and output
  using K = K_;        // keys and values
  using S = S_;        // scales of an int8 cache, or None
  using B = B_;        // bias: a float type, bool, or None
  using Sink = SINK_;  // sinks, or None
  static constexpr int G = G_, M = M_, D = D_, DV = DV_, R = G * M;
  static constexpr bool SOFTCAP = SOFTCAP_;
  static constexpr bool ADD = ADD_;  // a forbidden key's score is moved by mask_value
  static constexpr bool SCALED = !std::is_same<S, None>::value;
  static constexpr bool SINKS = !std::is_same<Sink, None>::value;
  static constexpr bool ALLOWS = std::is_same<B, bool>::value;
  static constexpr bool BIAS = !ALLOWS && !std::is_same<B, None>::value;
#if defined(DSPARK_DOT)
  static constexpr bool DOT = std::is_same<Q, bf16>::value && std::is_same<K, bf16>::value;
#else
  static constexpr bool DOT = false;
#endif
#if defined(DSPARK_BYTE_TILES)
  static constexpr bool BYTES = R <= 8 && !std::is_same<Q, float>::value &&
                                std::is_same<K, int8_t>::value && D % 64 == 0 && DV % 64 == 0;
#else
  static constexpr bool BYTES = false;
#endif
#if defined(DSPARK_TILES)
  // For fewer rows vectors do as well: memory is the limit.
  static constexpr bool TILES = R >= 4 && !BYTES && std::is_same<Q, bf16>::value && D % 32 == 0 &&
                                DV % 32 == 0 &&
                                (DOT || std::is_same<K, int8_t>::value);
#else
  static constexpr bool TILES = false;
#endif
  static constexpr int RP = TILES ? (R + 15) / 16 * 16 : R;  // rows of sums, padded for tiles
  static constexpr int STEP = DOT ? 32 : Vec::W;
  static constexpr int DP = (D + STEP - 1) / STEP * STEP;
  static constexpr int DVP = (DV + Vec::W - 1) / Vec::W * Vec::W;
  using Staged = typename std::conditional<DOT, bf16, float>::type;
};

template <class C>
struct Tensors {
  const typename C::Q* q;
  const typename C::K *k, *v;
  const typename C::S *ks, *vs;
  const typename C::B* bias;
  const typename C::Sink* sinks;
  typename C::Q* out;  // [B, M, Hq, DV], contiguous
  float scale, softcap, mask_value;
  // mask_value is so low that a forbidden key weighs nothing beside an allowed one.
  bool absorbing;
};

// The running softmax of R rows.
template <class C>
struct alignas(64) State {
  float top[(C::R + 15) / 16 * 16];
  float total[(C::R + 15) / 16 * 16];
  float out[C::RP][C::DVP];

  void clear() {
    for (int r = 0; r < C::R; ++r) top[r] = NEVER, total[r] = 0;
    std::memset(out, 0, sizeof(out));
  }
  // Another state over other keys.
  void join(const State& other) {
    for (int r = 0; r < C::R; ++r) {
      const float both = std::max(top[r], other.top[r]);
      if (both == NEVER) continue;
      const float mine = std::exp(top[r] - both), theirs = std::exp(other.top[r] - both);
      top[r] = both;
      total[r] = total[r] * mine + other.total[r] * theirs;
      for (int d = 0; d < C::DVP; d += Vec::W)
        store(out[r] + d, load(out[r] + d) * all(mine) + load(other.out[r] + d) * all(theirs));
    }
  }
};

#if defined(DSPARK_TILES)
template <class C>
using Tiled = typename std::conditional<C::TILES, TileRoom<C::R, C::D, C::DV, KEYS>, None>::type;
#else
template <class C>
using Tiled = None;
#endif
#if defined(DSPARK_BYTE_TILES)
template <class C>
using Bytes = typename std::conditional<C::BYTES, ByteRoom<C::R, C::D, C::DV, KEYS>, None>::type;
#else
template <class C>
using Bytes = None;
#endif

// What a thread works with in one unit.
template <class C>
struct alignas(64) Room {
  Tiled<C> tiled;
  Bytes<C> bytes;
  State<C> state;
  State<C> slot[2];  // pieces of units: [0] one that another thread began, [1] one begun here
  typename C::Staged q[C::R][C::DP];
  float scores[C::R][KEYS];
  uint8_t allowed[C::R][KEYS];
  float ks[KEYS], vs[KEYS];
};

template <class C>
size_t attention_bytes(int threads) {
  return sizeof(Room<C>) * threads;
}

// Memory gives more to several readers that are pages apart than to one, so a block's keys are read
// as KR runs side by side, and its values as RUNS.
constexpr int RUNS = 4;

// Whether a row's element `d`, or one of the `step` behind it, begins a cache line: the rows of the
// next block are asked for a line at a time, between the instructions that work on this one.
template <class K>
constexpr bool begins_line(int d, int step) {
  constexpr int LINE = 64 / int(sizeof(K));
  return step >= LINE || d % LINE == 0;
}


// scores[r][i * run] = q[r] . k[i * run] for i < KR keys and RR rows, one register each.
template <class C, int RR>
inline void score_tile(const typename C::Staged (*q)[C::DP], int rows, const typename C::K* k,
                       int64_t ldk, int64_t run, int keys, float* scores,
                       const typename C::K* soon) {
  constexpr int W = Vec::W, KR = W / RR;
  Vec a[W];
  for (int i = 0; i < W; ++i) a[i] = zero();
  const typename C::K* key[KR];
  const typename C::Staged* row[RR];
  for (int i = 0; i < KR; ++i) key[i] = k + (i * run < keys ? i * run : 0) * ldk;
  for (int r = 0; r < RR; ++r) row[r] = q[r < rows ? r : rows - 1];
#pragma GCC unroll 8
  for (int d = 0; d < C::D; d += C::STEP) {
    constexpr int LAST = C::D % C::STEP;
    if (soon != nullptr && d < C::DV && begins_line<typename C::K>(d, C::STEP))
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
    for (int r = 0; r < RR && r < rows; ++r) scores[r * KEYS + i * run] = flat[r * KR + i];
}

// `v`, if not null, is where the values lie that come next.
template <class C>
inline void score_block(const Room<C>& room, const typename C::K* k, int64_t ldk, int keys,
                        float (*scores)[KEYS], const typename C::K* v, int64_t ldv) {
  constexpr int RR = C::R >= 4 ? 4 : C::R >= 2 ? 2 : 1;
  constexpr int KR = Vec::W / RR;
  const int64_t run = (keys + KR - 1) / KR;
  for (int64_t j = 0; j < run; ++j)
    for (int r = 0; r < C::R; r += RR)
      score_tile<C, RR>(room.q + r, C::R - r, k + j * ldk, ldk, run, keys - int(j), scores[r] + j,
                        r == 0 && ldv == ldk ? v + j * ldv : nullptr);
}

// out[r] += p[r] V for RR rows and DT vectors of columns.
template <class C, int RR, int DT>
inline void value_tile(const float (*p)[KEYS], int rows, const typename C::K* v, int64_t ldv,
                       int keys, float (*out)[C::DVP], int d, const typename C::K* soon) {
  constexpr int W = Vec::W;
  Vec a[RR][DT];
  const float* row[RR];
  for (int r = 0; r < RR; ++r) {
    row[r] = p[r < rows ? r : rows - 1];
    for (int i = 0; i < DT; ++i) a[r][i] = load(out[r < rows ? r : rows - 1] + d + i * W);
  }
  const int run = (keys + RUNS - 1) / RUNS;
  for (int from = 0; from < run; ++from)
    for (int j = from; j < keys; j += run) {
      const typename C::K* at = v + j * ldv + d;
      Vec c[DT];
      for (int i = 0; i < DT; ++i) {
        if (soon != nullptr && begins_line<typename C::K>(d + i * W, W))
          __builtin_prefetch(soon + j * ldv + d + i * W, 0, 2);
        c[i] = d + (i + 1) * W <= C::DV ? load(at + i * W) : load(at + i * W, C::DV - d - i * W);
      }
      for (int r = 0; r < RR; ++r) {
        const Vec b = all(row[r][j]);
        for (int i = 0; i < DT; ++i) a[r][i] = fma(b, c[i], a[r][i]);
      }
    }
  for (int r = 0; r < RR && r < rows; ++r)
    for (int i = 0; i < DT; ++i) store(out[r] + d + i * W, a[r][i]);
}

template <class C>
inline void value_block(const float (*p)[KEYS], const typename C::K* v, int64_t ldv, int keys,
                        float (*out)[C::DVP], const typename C::K* k, int64_t ldk) {
  constexpr int W = Vec::W, RR = C::R >= 4 ? 4 : C::R >= 2 ? 2 : 1;
  constexpr int MOST = (W == 16 ? 16 : 8) / RR, VECTORS = C::DVP / W;
  constexpr int DT = MOST < VECTORS ? MOST : VECTORS;
  const typename C::K* soon = ldk == ldv ? k : nullptr;
  for (int r = 0; r < C::R; r += RR) {
    int d = 0;
    for (; d + DT * W <= C::DVP; d += DT * W)
      value_tile<C, RR, DT>(p + r, C::R - r, v, ldv, keys, out + r, d, r == 0 ? soon : nullptr);
    for (; d < C::DVP; d += W)
      value_tile<C, RR, 1>(p + r, C::R - r, v, ldv, keys, out + r, d, r == 0 ? soon : nullptr);
  }
}

template <class C, class Mask>
class Attention {
  using Q = typename C::Q;
  using K = typename C::K;
  static constexpr int R = C::R, M = C::M, G = C::G;

 public:
  Attention(const Tensors<C>& tensors, const Shape& shape, const Mask& mask)
      : t(tensors), s(shape), mask(mask) {}

  void run(Team team, char* memory) {
    Room<C>* rooms = reinterpret_cast<Room<C>*>(memory);
    Room<C>& room = rooms[team.thread];
#if defined(DSPARK_TILES)
    if constexpr (C::TILES || C::BYTES) configure_square_tiles();
#endif
    const int64_t units = s.batch * s.kv_heads;
    int64_t blocks = 0;
    for (int64_t u = 0; u < units; ++u) blocks += range(u).blocks();
    const auto [first, last] = team.share(blocks);
    int64_t at = 0;
    int64_t begun = -1;  // the unit that this thread began and left unfinished
    for (int64_t u = 0; u < units && at < last; ++u) {
      const Range keys = range(u);
      const int64_t from = std::max(first, at), to = std::min(last, at + keys.blocks());
      if (from < to) {
        const bool starts = from == at, ends = to == at + keys.blocks();
        State<C>& state = starts && ends ? room.state : room.slot[starts];
        state.clear();
        stage(u, room);
        for (int64_t block = from - at; block < to - at; ++block) {
          const int64_t k = keys.first + block * KEYS;
          Next next{nullptr, nullptr};
          if (block + 1 < to - at) {
            next = {keys_of(u) + (k + KEYS) * s.k_n, values_of(u) + (k + KEYS) * s.v_n};
          } else if (u + 1 < units) {
            const int64_t begin = range(u + 1).first;
            next = {keys_of(u + 1) + begin * s.k_n, values_of(u + 1) + begin * s.v_n};
          }
          step(u, k, int(std::min<int64_t>(KEYS, keys.last - k)), next, room, state);
        }
        if (starts && ends) finish(u, room, state);
        if (starts && !ends) begun = u;
      }
      at += keys.blocks();
    }
#if defined(DSPARK_TILES)
    if constexpr (C::TILES || C::BYTES) _tile_release();
#endif
    team.barrier();
    if (begun < 0) return;
    // The pieces that follow lie with the next threads, up to the unit's end.
    int64_t end = 0;
    for (int64_t u = 0; u <= begun; ++u) end += range(u).blocks();
    State<C>& state = room.slot[1];
    for (int thread = team.thread + 1; thread < team.threads; ++thread) {
      const auto [begin, stop] = Team{thread, team.threads}.share(blocks);
      if (begin >= end) break;
      if (begin < stop) state.join(rooms[thread].slot[0]);
    }
    finish(begun, room, state);
  }

 private:
  // Where the keys and values lie that come next, if any do.
  struct Next {
    const K *k, *v;
  };
  struct Range {
    int64_t first, last;
    // At least one, so that some thread writes the unit's output.
    int64_t blocks() const { return std::max<int64_t>(1, (last - first + KEYS - 1) / KEYS); }
  };

  const Tensors<C>& t;
  const Shape& s;
  const Mask& mask;

  // Where column d of the values lies in the sums.
  static int place([[maybe_unused]] int d) {
#if defined(DSPARK_BYTE_TILES)
    if constexpr (C::BYTES) return column8(d);
#endif
#if defined(DSPARK_TILES)
    if constexpr (C::TILES) return column(d);
#endif
    return d;
  }
  bool bounded() const { return !C::ADD || t.absorbing; }
  int64_t batch(int64_t u) const { return u / s.kv_heads; }
  int64_t head(int64_t u, int r) const { return u % s.kv_heads * G + r / M; }

  Range limits(int64_t u, int r) const {
    const int64_t b = batch(u), h = head(u, r), q = r % M;
    return {std::max<int64_t>(0, mask.lower(b, h, q)),
            std::min<int64_t>(s.keys, mask.upper(b, h, q, s.keys))};
  }

  // The keys that some row of the unit may attend to.
  Range range(int64_t u) const {
    if (!bounded()) return {0, s.keys};
    Range all{s.keys, 0};
    for (int r = 0; r < (Mask::HEADS ? R : M); ++r) {
      const Range one = limits(u, r);
      if (one.first < one.last)
        all = {std::min(all.first, one.first), std::max(all.last, one.last)};
    }
    return all.first < all.last ? all : Range{0, 0};
  }

  const Q* query(int64_t u, int r) const {
    return t.q + batch(u) * s.q_b + head(u, r) * s.q_h + r % M * s.q_m;
  }
  const K* keys_of(int64_t u) const { return t.k + batch(u) * s.k_b + u % s.kv_heads * s.k_h; }
  const K* values_of(int64_t u) const { return t.v + batch(u) * s.v_b + u % s.kv_heads * s.v_h; }

  void stage(int64_t u, Room<C>& room) const {
#if defined(DSPARK_BYTE_TILES)
    if constexpr (C::BYTES) {
      std::memset(room.bytes.q, 0, sizeof(room.bytes.q));
      std::memset(room.bytes.p, 0, sizeof(room.bytes.p));
      for (int r = 0; r < R; ++r) {
        const Q* from = query(u, r);
        split_query(room.bytes, r, C::D, [&](int d) { return to_float(from[d]); });
      }
      return;
    }
#endif
    if constexpr (C::TILES) {
      std::memset(room.tiled.q, 0, sizeof(room.tiled.q));
      std::memset(room.tiled.p, 0, sizeof(room.tiled.p));
      for (int r = 0; r < R; ++r) {
        const Q* from = query(u, r);
        for (int d = 0; d < C::D; ++d) room.tiled.q[r / 16][d / 2][r % 16][d % 2] = from[d];
      }
      return;
    }
    for (int r = 0; r < R; ++r) {
      const Q* from = query(u, r);
      for (int d = 0; d < C::DP; ++d) {
        if constexpr (C::DOT) {
          room.q[r][d] = d < C::D ? from[d] : bf16{0};
        } else {
          room.q[r][d] = d < C::D ? to_float(from[d]) : 0.0f;
        }
      }
    }
  }

  bool bias_allows(int64_t u, int r, int64_t k) const {
    if constexpr (C::ALLOWS)
      return reinterpret_cast<const uint8_t*>(t.bias)[bias_at(u, r, k)] != 0;
    return true;
  }
  int64_t bias_at(int64_t u, int r, int64_t k) const {
    return batch(u) * s.bias_b + head(u, r) * s.bias_h + r % M * s.bias_m + k * s.bias_n;
  }

  // Fills room.allowed; whether any key is.
  bool test(int64_t u, int64_t k, int keys, Room<C>& room) const {
    const bool alike = !Mask::HEADS && (!C::ALLOWS || s.bias_h == 0);
    uint8_t any = 0;
    for (int r = 0; r < R; ++r) {
      uint8_t* to = room.allowed[r];
      if (alike && r >= M) {
        std::memcpy(to, room.allowed[r - M], KEYS);
        continue;
      }
      const int64_t b = batch(u), h = head(u, r), q = r % M;
      for (int j = 0; j < keys; ++j) to[j] = mask.allowed(b, h, q, k + j);
      if constexpr (C::ALLOWS)
        for (int j = 0; j < keys; ++j) to[j] &= uint8_t(bias_allows(u, r, k + j));
      for (int j = 0; j < keys; ++j) any |= to[j];
    }
    return any != 0;
  }

  // One block of keys into the running softmax.
  void step(int64_t u, int64_t k, int keys, Next next, Room<C>& room, State<C>& state) const {
    constexpr int W = Vec::W;
    const bool tested = !Mask::EXACT || C::ALLOWS || !bounded();
    if (keys <= 0) return;
    if (tested && !test(u, k, keys, room) && bounded()) return;
    const K* kp = keys_of(u) + k * s.k_n;
    const K* vp = values_of(u) + k * s.v_n;
#if defined(DSPARK_TILES)
    Follow<K, C::D, C::DV, KEYS> follow{next.k, next.v, s.k_n, s.v_n};
#endif
    if constexpr (C::BYTES) {
#if defined(DSPARK_BYTE_TILES)
      byte_scores(room.bytes, kp, s.k_n, keys, room.scores, follow);
#endif
    } else if constexpr (C::TILES) {
#if defined(DSPARK_TILES)
      tile_scores<K>(room.tiled, kp, s.k_n, keys, room.scores, follow);
#endif
    } else {
      score_block<C>(room, kp, s.k_n, keys, room.scores, vp, s.v_n);
    }
    if constexpr (C::SCALED) {
      const int64_t b = batch(u), h = u % s.kv_heads;
      for (int j = 0; j < keys; ++j) {
        room.ks[j] = to_float(t.ks[b * s.ks_b + h * s.ks_h + (k + j) * s.ks_n]) * t.scale;
        room.vs[j] = to_float(t.vs[b * s.vs_b + h * s.vs_h + (k + j) * s.vs_n]);
      }
    }
    for (int r = 0; r < R; ++r) {
      float* x = room.scores[r];
      for (int j = 0; j < keys; j += W) {
        Vec v = load(x + j) * (C::SCALED ? load(room.ks + j) : all(t.scale));
        if constexpr (C::SOFTCAP) v = all(t.softcap) * tanh(v / all(t.softcap));
        store(x + j, v);
      }
      if constexpr (C::BIAS) {
        const int64_t base = bias_at(u, r, k);
        for (int j = 0; j < keys; ++j) x[j] += to_float(t.bias[base + j * s.bias_n]);
      }
      if (tested) {
        for (int j = 0; j < keys; ++j)
          if (!room.allowed[r][j]) x[j] = bounded() ? NEVER : x[j] + t.mask_value;
      } else {
        const Range one = limits(u, r);
        for (int64_t j = 0; j < std::min<int64_t>(keys, one.first - k); ++j) x[j] = NEVER;
        for (int64_t j = std::max<int64_t>(0, one.last - k); j < keys; ++j) x[j] = NEVER;
      }
      for (int j = keys; j < KEYS && (j % W != 0 || j == keys); ++j) x[j] = NEVER;
      soften(r, keys, room, state);
    }
    if constexpr (C::BYTES || C::TILES)
      for (int r = 0; r < R; ++r)
        for (int j = keys; j % 16 != 0; ++j) room.scores[r][j] = 0;
    if constexpr (C::BYTES) {
#if defined(DSPARK_BYTE_TILES)
      byte_values(room.bytes, room.scores, vp, s.v_n, keys, state.out, follow);
#endif
    } else if constexpr (C::TILES) {
#if defined(DSPARK_TILES)
      tile_values<K>(room.tiled, room.scores, vp, s.v_n, keys, state.out, follow);
#endif
    } else {
      value_block<C>(room.scores, vp, s.v_n, keys, state.out, next.k, s.k_n);
    }
  }

  // scores[r] become weights relative to the row's new maximum.
  void soften(int r, int keys, Room<C>& room, State<C>& state) const {
    constexpr int W = Vec::W;
    float* x = room.scores[r];
    Vec high = all(NEVER);
    for (int j = 0; j < keys; j += W) high = max(high, load(x + j));
    const float top = std::max(state.top[r], largest(high));
    if (top == NEVER) {
      // Nothing yet, unless a NaN: that must come out.
      for (int j = 0; j < keys; ++j) {
        x[j] = x[j] != x[j] ? x[j] : 0;
        state.total[r] += x[j];
      }
      return;
    }
    if (top != state.top[r]) {
      const float shrink = std::exp(state.top[r] - top);
      state.top[r] = top;
      state.total[r] *= shrink;
      for (int d = 0; d < C::DVP; d += W)
        store(state.out[r] + d, load(state.out[r] + d) * all(shrink));
    }
    Vec total = zero();
    for (int j = 0; j < keys; j += W) {
      const Vec p = exp(load(x + j) - all(top));
      total = total + p;
      store(x + j, C::SCALED ? p * load(room.vs + j) : p);
    }
    state.total[r] += sum(total);
  }

  void finish(int64_t u, Room<C>& room, State<C>& state) const {
    for (int r = 0; r < R; ++r) {
      if (C::ADD && t.absorbing && state.total[r] == 0) average(u, r, room, state);
      float top = state.top[r], total = state.total[r], shrink = 1;
      if constexpr (C::SINKS) {
        const float sink = to_float(t.sinks[head(u, r)]);
        const float both = std::max(top, sink);
        shrink = both == NEVER ? 0 : std::exp(top - both);
        total = total * shrink + (both == NEVER ? 0 : std::exp(sink - both));
      }
      const Vec by = all(total == 0 ? 0 : shrink / total);
      const int64_t heads = s.kv_heads * G;
      Q* out = t.out + ((batch(u) * M + r % M) * heads + head(u, r)) * C::DV;
      const float* from = state.out[r];
#if defined(DSPARK_TILES)
      float ordered[C::DVP];
      if constexpr (C::TILES || C::BYTES) {
        for (int d = 0; d < C::DV; ++d) ordered[d] = from[place(d)];
        from = ordered;
      }
#endif
      for (int d = 0; d < C::DV; d += Vec::W) store(out + d, load(from + d) * by, C::DV - d);
    }
  }

  // A row to which every key is forbidden, where mask_value is added: rare, so plain.
  void average(int64_t u, int r, Room<C>& room, State<C>& state) const {
    const Q* q = query(u, r);
    const int64_t b = batch(u), h = u % s.kv_heads;
    for (int64_t k = 0; k < s.keys; k += KEYS) {
      const int keys = int(std::min<int64_t>(KEYS, s.keys - k));
      for (int j = 0; j < keys; ++j) {
        const K* kp = keys_of(u) + (k + j) * s.k_n;
        float x = 0;
        for (int d = 0; d < C::D; ++d) x += to_float(q[d]) * to_float(kp[d]);
        x *= t.scale;
        if constexpr (C::SCALED) {
          x *= to_float(t.ks[b * s.ks_b + h * s.ks_h + (k + j) * s.ks_n]);
          room.vs[j] = to_float(t.vs[b * s.vs_b + h * s.vs_h + (k + j) * s.vs_n]);
        }
        if (C::SOFTCAP) x = t.softcap * std::tanh(x / t.softcap);
        if constexpr (C::BIAS) x += to_float(t.bias[bias_at(u, r, k + j)]);
        room.scores[r][j] = x + t.mask_value;
      }
      for (int j = keys; j < KEYS; ++j) room.scores[r][j] = NEVER;
      soften(r, keys, room, state);
      for (int j = 0; j < keys; ++j) {
        const K* vp = values_of(u) + (k + j) * s.v_n;
        for (int d = 0; d < C::DV; ++d) state.out[r][place(d)] += room.scores[r][j] * to_float(vp[d]);
      }
    }
  }
};

}  // namespace dspark
