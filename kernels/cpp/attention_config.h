// What an attention kernel is made for, and what its threads work with.
#pragma once
#include <algorithm>
#include <limits>

#include "parallel.h"
#include "predicate.h"
#include "reading.h"
#include "tiles.h"
#include "tiles_int8.h"
#include "vec.h"

#if defined(__AVX512BF16__) && defined(__AVX512F__)
#define DSPARK_DOT 1
#endif

namespace dspark {

constexpr float NEVER = -std::numeric_limits<float>::infinity();

// Sizes and strides, in elements. The last dimension of q, k and v is contiguous. With keys in two
// parts v_b, v_h and v_n are the second part's.
struct Shape {
  int64_t batch, kv_heads, keys;
  int64_t q_b, q_h, q_m;
  int64_t k_b, k_h, k_n;
  int64_t v_b, v_h, v_n;
  int64_t ks_b, ks_h, ks_n;
  int64_t vs_b, vs_h, vs_n;
  int64_t bias_b, bias_h, bias_m, bias_n;
  int64_t qr_b, qr_h, qr_m;
};

// No scales: the cache is exact. No bias.
struct None {};
inline float to_float(None) { return 0; }

template <class Q_, class K_, class S_, class B_, class SINK_, int G_, int M_, int D_, int DV_,
          bool SOFTCAP_, bool ADD_, int DR_ = 0>
struct Config {
  using Q = Q_;        // query and output
  using K = K_;        // keys and values
  using S = S_;        // scales of an int8 cache, or None
  using B = B_;        // bias: a float type, bool, or None
  using Sink = SINK_;  // sinks, or None
  static constexpr int G = G_, M = M_, D = D_, DV = DV_, R = G * M;
  // Latent attention: a key is its value with DR numbers more, which lie elsewhere.
  static constexpr int DR = DR_;
  static constexpr bool PARTS = DR > 0;
  static constexpr bool SOFTCAP = SOFTCAP_;
  static constexpr bool ADD = ADD_;  // a forbidden key's score is moved by mask_value
  static constexpr bool SCALED = !std::is_same<S, None>::value;
  static constexpr bool SINKS = !std::is_same<Sink, None>::value;
  static constexpr bool ALLOWS = std::is_same<B, bool>::value;
  static constexpr bool BIAS = !ALLOWS && !std::is_same<B, None>::value;
#if defined(DSPARK_DOT)
  static constexpr bool DOTTED = std::is_same<Q, bf16>::value;  // whether dpbf16ps takes bf16 keys
#else
  static constexpr bool DOTTED = false;
#endif
#if defined(DSPARK_BYTE_TILES)
  // For one or two rows vectors are done sooner than tiles that are nearly empty.
  static constexpr bool BYTES = R > 2 && !std::is_same<Q, float>::value &&
                                std::is_same<K, int8_t>::value && D % 64 == 0 && DV % 64 == 0;
  static constexpr bool LONG = SCALED && R <= 4;
#else
  static constexpr bool BYTES = false, LONG = false;
#endif
#if defined(DSPARK_TILES)
  // For fewer rows vectors do as well: memory is the limit.
  static constexpr bool TILES = R >= 4 && !BYTES && std::is_same<Q, bf16>::value && D % 32 == 0 &&
                                DV % 32 == 0 &&
                                (std::is_same<K, bf16>::value || std::is_same<K, int8_t>::value);
#else
  static constexpr bool TILES = false;
#endif
  static constexpr bool MATRIX = TILES || BYTES;
  // Many rows in vectors: what int8 keys and values are is worked out once for all of them.
  static constexpr bool WIDEN = !MATRIX && std::is_same<K, int8_t>::value && R > 4;
  using Read = typename std::conditional<
      WIDEN, typename std::conditional<DOTTED, bf16, float>::type, K>::type;
  static constexpr bool DOT = DOTTED && std::is_same<Read, bf16>::value;
  // Many rows without tiles: pairs, see attention_pairs.h.
  static constexpr bool PAIRS = DOT && !MATRIX && R >= 8 && D % 32 == 0 && DV % 32 == 0;
  // Keys of a block. What is done once a block takes its time beside the bytes of few rows.
  static constexpr int KEYS = LONG ? 256 : 128;
  static constexpr bool LANES = TILES || (BYTES && R > 4);  // a row a lane, see attention_lanes.h
  static constexpr int RP = TILES ? (R + 15) / 16 * 16 : R;  // rows of sums, padded for tiles
  static constexpr int STEP = DOT ? 32 : Vec::W;
  static constexpr int DP = (D + STEP - 1) / STEP * STEP;
  static constexpr int DVP = (DV + Vec::W - 1) / Vec::W * Vec::W;
  static constexpr bool JOINED = PARTS && !PAIRS;  // pairs are put together from both parts
  static constexpr bool COPIED = WIDEN || JOINED;  // the products read a block's rows from `wide`
  static constexpr int WIDTH = std::max(DP, DVP);  // of those rows
  using Staged = typename std::conditional<DOT, bf16, float>::type;
};

template <class C>
struct Tensors {
  const typename C::Q *q, *qr;  // qr, of keys in two parts: what meets the second
  const typename C::K *k, *v;   // or the two parts
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
    for (float& x : top) x = NEVER;
    std::memset(total, 0, sizeof(total));
    std::memset(out, 0, sizeof(out));
  }
  // Another state over other keys.
  void join(const State& other) {
    for (int r = 0; r < C::R; ++r) {
      const float both = std::max(top[r], other.top[r]);
      if (both == NEVER) {
        total[r] += other.total[r];  // nothing, or NaN
        continue;
      }
      const float mine = std::exp(top[r] - both), theirs = std::exp(other.top[r] - both);
      top[r] = both;
      total[r] = total[r] * mine + other.total[r] * theirs;
      for (int d = 0; d < C::DVP; d += Vec::W)
        store(out[r] + d, load(out[r] + d) * all(mine) + load(other.out[r] + d) * all(theirs));
    }
  }
};

#if defined(DSPARK_BYTE_TILES)
template <class C>
using Bytes = ByteRoom<C::R, C::D, C::DV, C::KEYS>;
#else
template <class C>
using Bytes = None;
#endif
#if defined(DSPARK_TILES)
template <class C>
using Tiled = TileRoom<C::R, C::D, C::DV, C::KEYS>;
#else
template <class C>
using Tiled = None;
#endif
template <class C>
struct Matrix {
  using Type = typename std::conditional<
      C::BYTES, Bytes<C>, typename std::conditional<C::TILES, Tiled<C>, None>::type>::type;
};

// What a thread works with in one unit.
template <class C>
struct alignas(64) Room {
  static constexpr int KEYS = C::KEYS;
  typename Matrix<C>::Type matrix;
  State<C> state;
  State<C> slot[2];  // pieces of units: [0] one that another thread began, [1] one begun here
  typename C::Staged q[C::MATRIX ? 1 : C::R][C::DP];
  float scores[C::LANES ? 1 : C::R][KEYS];
  uint8_t allowed[C::R][KEYS];
  int64_t lower[C::R], upper[C::R];  // of the keys that each row may attend to
  int64_t inner_lower, inner_upper;  // of those that all may
  float ks[KEYS], vs[KEYS];
  typename C::Read wide[C::COPIED ? KEYS : 1][C::COPIED ? C::WIDTH : 1];
};

template <class C>
size_t attention_bytes(int threads) {
  return sizeof(Room<C>) * threads;
}

}  // namespace dspark
