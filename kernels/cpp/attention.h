// Decode attention: up to 16 query rows over a cache, grouped heads, online softmax in float.
//
// A unit of work is one key/value head of one batch row, with all query rows that read it. Its
// keys, as far as the mask's bounds can allow them, are cut into blocks of 128 or 256; those of all
// units, one after another, are dealt out evenly, so a thread may begin and end inside a unit.
// Such pieces leave (max, sum, output) in a slot and are joined after one barrier.
//
// In a block: test the mask (nothing allowed: the keys are not read), scores, softmax step,
// output. Keys are read once however many query rows there are.
//
// Latent attention (PARTS) has one key head in two parts, of which the first is the value, too. Its
// query heads are cut into groups that act as key heads on the same memory, so that the sums of one
// stay in cache. Pairs are put together from both parts; other products read a copy of the block, in
// which a key is one row. There is so much work for each number of a key that neither the copy nor
// another group's reading matters much beside it.
#pragma once
#include "attention_config.h"
#include "attention_lanes.h"
#include "attention_pairs.h"
#include "attention_vectors.h"

namespace dspark {

template <class C, class Mask>
class Attention {
  using Q = typename C::Q;
  using K = typename C::K;
  static constexpr int R = C::R, M = C::M, G = C::G, KEYS = C::KEYS;

 public:
  Attention(const Tensors<C>& tensors, const Shape& shape, const Mask& mask)
      : t(tensors), s(shape), mask(mask) {}

  void run(Team team, char* memory) {
    Room<C>* rooms = reinterpret_cast<Room<C>*>(memory);
    Room<C>& room = rooms[team.thread];
#if defined(DSPARK_TILES)
    if constexpr (C::MATRIX) configure_square_tiles();
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
    if constexpr (C::MATRIX) _tile_release();
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
#if defined(DSPARK_TILES) || defined(DSPARK_DOT)
    if constexpr (C::TILES || C::PAIRS) return column(d);
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

  // Row r of the query; in `joined` if it lies in two parts.
  const Q* query(int64_t u, int r, [[maybe_unused]] Q* joined) const {
    const Q* from = t.q + batch(u) * s.q_b + head(u, r) * s.q_h + r % M * s.q_m;
    if constexpr (C::PARTS) {
      const Q* rest = t.qr + batch(u) * s.qr_b + head(u, r) * s.qr_h + r % M * s.qr_m;
      std::memcpy(joined, from, sizeof(Q) * C::DV);
      std::memcpy(joined + C::DV, rest, sizeof(Q) * C::DR);
      return joined;
    }
    return from;
  }
  const K* keys_of(int64_t u) const { return t.k + batch(u) * s.k_b + u % s.kv_heads * s.k_h; }
  const K* values_of(int64_t u) const { return t.v + batch(u) * s.v_b + u % s.kv_heads * s.v_h; }

  void stage(int64_t u, Room<C>& room) const {
    room.inner_lower = 0, room.inner_upper = s.keys;
    for (int r = 0; r < R; ++r) {
      const Range one = limits(u, r);
      room.lower[r] = one.first, room.upper[r] = one.last;
      room.inner_lower = std::max(room.inner_lower, one.first);
      room.inner_upper = std::min(room.inner_upper, one.last);
    }
    if constexpr (C::BYTES) {
#if defined(DSPARK_BYTE_TILES)
      std::memset(&room.matrix, 0, sizeof(room.matrix));
      for (int r = 0; r < R; ++r) {
        const Q* from = query(u, r, nullptr);
        split_query(room.matrix, r, [&](int d) { return to_float(from[d]); });
      }
#endif
      return;
    }
    if constexpr (C::TILES) {
#if defined(DSPARK_TILES)
      for (int rows = 0; rows < R; rows += 16) {
        Q joined[16][C::PARTS ? C::D : 1];
        const Q* from[16];
        for (int r = 0; r < 16; ++r)
          from[r] = rows + r < R ? query(u, rows + r, joined[r]) : nullptr;
        for (int d = 0; d < C::D; d += 32) {
          // Pairs of columns, each taken for a float.
          __m512 pairs[16];
          for (int r = 0; r < 16; ++r)
            pairs[r] = from[r] != nullptr ? _mm512_loadu_ps((const float*)(from[r] + d))
                                          : _mm512_setzero_ps();
          transposed(pairs, [&](int i, __m512 row) __attribute__((always_inline)) {
            _mm512_store_ps((float*)room.matrix.q[rows / 16][d / 2 + i], row);
          });
        }
      }
#endif
      return;
    }
    Q joined[C::PARTS ? C::D : 1];
    for (int r = 0; r < R; ++r) {
      const Q* from = query(u, r, joined);
      if constexpr (C::DOT) {
        std::memcpy(room.q[r], from, sizeof(Q) * C::D);
        if (C::D < C::DP) std::memset(room.q[r] + C::D, 0, sizeof(Q) * (C::DP - C::D));
      } else {
        for (int d = 0; d < C::DP; d += Vec::W) store(room.q[r] + d, load(from + d, C::D - d));
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
    int64_t ldk = s.k_n, ldv = s.v_n;
    [[maybe_unused]] const K* rest = vp;
    if constexpr (C::JOINED) {
      join_block<C>(kp, ldk, vp, ldv, keys, room.wide);
      kp = room.wide[0];
      ldk = C::WIDTH;
    }
    if constexpr (C::PARTS) vp = kp, ldv = ldk;
    if constexpr (C::SCALED) {
      const int64_t b = batch(u), h = u % s.kv_heads;
      scales(t.ks + b * s.ks_b + h * s.ks_h + k * s.ks_n, s.ks_n, keys, t.scale, room.ks);
      scales(t.vs + b * s.vs_b + h * s.vs_h + k * s.vs_n, s.vs_n, keys, 1, room.vs);
    }
    const bool inside = !tested && k >= room.inner_lower && k + keys <= room.inner_upper;
    if constexpr (C::LANES) {
      lanes_step(u, k, keys, kp, ldk, vp, ldv, next, tested, inside, room, state);
      return;
    }
#if defined(DSPARK_BYTE_TILES)
    Follow<K, C::D, C::DV, KEYS> follow{next.k, next.v, s.k_n, s.v_n};
    if constexpr (C::BYTES) byte_scores(room.matrix, kp, s.k_n, keys, nullptr, room.scores, follow);
#endif
    if constexpr (C::WIDEN) {
      widen_block<C, C::D>(kp, s.k_n, keys, room.wide[0], vp, s.v_n);
      scores(room, room.wide[0], C::WIDTH, nullptr, 0, keys, nullptr, 0);
    } else if constexpr (!C::BYTES) {
      scores(room, kp, ldk, rest, s.v_n, keys, C::PARTS ? nullptr : vp, C::PARTS ? 0 : ldv);
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
      } else if (!inside) {
        for (int64_t j = 0; j < std::min<int64_t>(keys, room.lower[r] - k); ++j) x[j] = NEVER;
        for (int64_t j = std::max<int64_t>(0, room.upper[r] - k); j < keys; ++j) x[j] = NEVER;
      }
      for (int j = keys; j < KEYS && (j % W != 0 || j == keys); ++j) x[j] = NEVER;
      soften(x, r, keys, room, state);
    }
    if constexpr (C::WIDEN) {
      widen_block<C, C::DV>(vp, s.v_n, keys, room.wide[0], next.k, s.k_n);
      values(room, room.wide[0], C::WIDTH, keys, state, nullptr, 0);
    } else if constexpr (!C::BYTES) {
      values(room, vp, ldv, keys, state, next.k, s.k_n);
    }
#if defined(DSPARK_BYTE_TILES)
    if constexpr (C::BYTES) {
      for (int r = 0; r < R; ++r)
        for (int j = keys; j % 16 != 0; ++j) room.scores[r][j] = 0;
      split_rows(room.matrix, room.scores, keys);
      __asm__ volatile("" : : "r"(&room) : "memory");
      byte_values(room.matrix, vp, s.v_n, keys, state.out, follow);
    }
#endif
  }

  // The block's scores, of keys in two parts with the second at `rest` unless they were joined; `v`,
  // if not null, is read next.
  static void scores(Room<C>& room, const typename C::Read* k, int64_t ldk,
                     [[maybe_unused]] const typename C::Read* rest, [[maybe_unused]] int64_t ldr,
                     int keys, const typename C::Read* v, int64_t ldv) {
#if defined(DSPARK_DOT)
    if constexpr (C::PAIRS)
      return score_pairs<C>(room, k, ldk, rest, ldr, keys, room.scores, v, ldv);
#endif
    score_block<C>(room, k, ldk, keys, room.scores, v, ldv);
  }
  // The block's values into the sums; `soon`, if not null, is read next.
  static void values(Room<C>& room, const typename C::Read* v, int64_t ldv, int keys,
                     State<C>& state, const typename C::Read* soon, int64_t ld_soon) {
#if defined(DSPARK_DOT)
    if constexpr (C::PAIRS)
      return value_pairs<C>(room.scores, v, ldv, keys, state.out, soon, ld_soon);
#endif
    value_block<C>(room.scores, v, ldv, keys, state.out, soon, ld_soon);
  }

  // The scales of a block's keys or values, times `by`.
  template <class S>
  static void scales(const S* from, int64_t stride, int keys, float by, float* to) {
    if (stride == 1) {
      for (int j = 0; j < keys; j += Vec::W) store(to + j, load(from + j, keys - j) * all(by));
    } else {
      for (int j = 0; j < keys; ++j) to[j] = to_float(from[j * stride]) * by;
    }
  }

  // `step` with a query row in each lane.
  void lanes_step([[maybe_unused]] int64_t u, [[maybe_unused]] int64_t k,
                   [[maybe_unused]] int keys, [[maybe_unused]] const K* kp,
                   [[maybe_unused]] int64_t ldk, [[maybe_unused]] const K* vp,
                   [[maybe_unused]] int64_t ldv, [[maybe_unused]] Next next,
                   [[maybe_unused]] bool tested, [[maybe_unused]] bool inside,
                   [[maybe_unused]] Room<C>& room, [[maybe_unused]] State<C>& state) const {
#if defined(DSPARK_TILES)
    constexpr int ROWS = (R + 15) / 16;
    constexpr bool PAIRED = C::BYTES && R <= 8;
    using L = Lanes<PAIRED, KEYS>;
    Follow<K, C::D, C::DV, KEYS> follow{next.k, next.v, s.k_n, s.v_n};
    float factor = C::BYTES ? 1 : t.scale;
#if defined(DSPARK_BYTE_TILES)
    if constexpr (C::BYTES) byte_scores(room.matrix, kp, ldk, keys, room.ks, room.scores, follow);
#endif
    if constexpr (C::TILES) tile_scores<K>(room.matrix, kp, ldk, keys, follow);
    if (C::SOFTCAP || C::BIAS || (C::TILES && (C::SCALED || !bounded() || !(factor > 0)))) {
      for (int rows = 0; rows < ROWS; ++rows)
        for (int j = 0; j < L::LIVE; ++j) {
          float* at = room.matrix.s[rows][j];
          Vec x = load(at) * (C::BYTES ? all(1) : C::SCALED ? all(room.ks[j]) : all(factor));
          if constexpr (C::SOFTCAP) x = all(t.softcap) * tanh(x / all(t.softcap));
          store(at, x);
        }
      factor = 1;
    }
    if constexpr (C::BIAS)
      for (int r = 0; r < R; ++r) {
        const int64_t base = bias_at(u, r, k);
        for (int j = 0; j < keys; ++j)
          room.matrix.s[r / 16][L::place(j)][L::lane(r) + L::half(j)] +=
              to_float(t.bias[base + j * s.bias_n]);
      }
    if (C::TILES && !tested) {
      if (!inside || keys < KEYS) bound_lanes(room, k, keys);
    } else if (tested || !inside || keys < KEYS) {
      if (!tested && !inside)
        for (int r = 0; r < R; ++r)
          for (int j = 0; j < keys; ++j)
            room.allowed[r][j] = k + j >= room.lower[r] && k + j < room.upper[r];
      forbid_lanes(room, keys, tested || !inside, bounded() ? nullptr : &t.mask_value);
    }
    for (int rows = 0; rows < ROWS; ++rows) soften_lanes(room, state, rows, keys, factor, follow);
    __asm__ volatile("" : : "r"(&room) : "memory");
#if defined(DSPARK_BYTE_TILES)
    if constexpr (C::BYTES) byte_values(room.matrix, vp, ldv, keys, state.out, follow);
#endif
    if constexpr (C::TILES) tile_values<K>(room.matrix, vp, ldv, keys, state.out, follow);
#endif
  }

  // scores[r] become weights relative to the row's new maximum.
  void soften(float* x, int r, int keys, Room<C>& room, State<C>& state) const {
    constexpr int W = Vec::W;
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
    if (state.top[r] == NEVER) {
      state.top[r] = top;  // the sums are nothing yet, or NaN
    } else if (top != state.top[r]) {
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
#if defined(DSPARK_TILES) || defined(DSPARK_DOT)
      alignas(64) float ordered[C::DVP];
      if constexpr (C::TILES || C::PAIRS) {
        for (int d = 0; d < C::DV; d += 32) in_order(from + d, ordered + d);
        from = ordered;
      } else if constexpr (C::MATRIX) {
        for (int d = 0; d < C::DV; ++d) ordered[d] = from[place(d)];
        from = ordered;
      }
#endif
      for (int d = 0; d < C::DV; d += Vec::W) store(out + d, load(from + d) * by, C::DV - d);
    }
  }

  // A row to which every key is forbidden, where mask_value is added: rare, so plain.
  void average(int64_t u, int r, Room<C>& room, State<C>& state) const {
    Q joined[C::PARTS ? C::D : 1];
    const Q* q = query(u, r, joined);
    const int64_t b = batch(u), h = u % s.kv_heads;
    float* weights = room.scores[0];
    for (int64_t k = 0; k < s.keys; k += KEYS) {
      const int keys = int(std::min<int64_t>(KEYS, s.keys - k));
      for (int j = 0; j < keys; ++j) {
        const K* kp = keys_of(u) + (k + j) * s.k_n;
        [[maybe_unused]] const K* rest = values_of(u) + (k + j) * s.v_n;
        float x = 0;
        for (int d = 0; d < C::D - C::DR; ++d) x += to_float(q[d]) * to_float(kp[d]);
        for (int d = 0; d < C::DR; ++d) x += to_float(q[C::DV + d]) * to_float(rest[d]);
        x *= t.scale;
        if constexpr (C::SCALED) {
          x *= to_float(t.ks[b * s.ks_b + h * s.ks_h + (k + j) * s.ks_n]);
          room.vs[j] = to_float(t.vs[b * s.vs_b + h * s.vs_h + (k + j) * s.vs_n]);
        }
        if (C::SOFTCAP) x = t.softcap * std::tanh(x / t.softcap);
        if constexpr (C::BIAS) x += to_float(t.bias[bias_at(u, r, k + j)]);
        weights[j] = x + t.mask_value;
      }
      for (int j = keys; j < KEYS; ++j) weights[j] = NEVER;
      soften(weights, r, keys, room, state);
      for (int j = 0; j < keys; ++j) {
        const K* vp = C::PARTS ? keys_of(u) + (k + j) * s.k_n : values_of(u) + (k + j) * s.v_n;
        for (int d = 0; d < C::DV; ++d) state.out[r][place(d)] += weights[j] * to_float(vp[d]);
      }
    }
  }
};

}  // namespace dspark
