// Products by AMX: W's rows are the left tile, those of x the right one. The form Tiles of product.h.
#pragma once
#include "product_form.h"
#include "transpose.h"

#if defined(DSPARK_TILES)

namespace dspark {

// Packs columns [first, last) of up to 16 rows of x for tiles: [K / 32][16][M][2].
template <int M>
void pack_tiles(const bf16* x, int64_t ldx, int64_t K, int64_t first, int64_t last, bf16* to) {
  int64_t k = first;
  // 16 pairs of columns at a time, each taken for a float.
  for (; k + 32 <= std::min(last, K); k += 32) {
    alignas(64) float pairs[16][16] = {};
    for (int m = 0; m < M; ++m) _mm512_store_si512(pairs[m], _mm512_loadu_si512(x + m * ldx + k));
    transpose(pairs, reinterpret_cast<float*>(to + k * M), M, 16, (1u << M) - 1);
  }
  for (; k < last; k += 2) {
    bf16* row = to + k / 2 * (2 * M);
    for (int m = 0; m < M; ++m) {
      row[2 * m] = k < K ? x[m * ldx + k] : bf16{0};
      row[2 * m + 1] = k + 1 < K ? x[m * ldx + k + 1] : bf16{0};
    }
  }
}

// The same for any M: one of that after another for each 16 rows.
template <int M>
void pack_groups(const bf16* x, int64_t ldx, int64_t K, int64_t padded, int64_t first, int64_t last,
                 bf16* to) {
  pack_tiles<(M < 16 ? M : 16)>(x, ldx, K, first, last, to);
  if constexpr (M > 16)
    pack_groups<M - 16>(x + 16 * ldx, ldx, K, padded, first, last, to + 16 * padded);
}

// Up to 16 rows by 32 columns, with zeros around them.
inline void copy_tile(const bf16* w, int64_t ldw, int rows, int columns, bf16 (*to)[32]) {
  std::memset(to, 0, 16 * 64);
  for (int r = 0; r < rows; ++r) std::memcpy(to[r], w + r * ldw, 2 * columns);
}

// Asks for the rows that come after a tile pair's while the pair is worked on: a tile's 16 rows are
// often a multiple of 2 KiB apart, fall on few sets of the first cache and are more readers than the
// hardware follows. Here the next rows, which lie in one run, are read into the second cache as
// RUNS runs from end to end.
struct Next {
  static constexpr int RUNS = 8;
  const char* from = nullptr;  // null: nothing comes next
  int64_t each = 0, at = 0, lines = 0;  // bytes of a run, where it is, lines a step
  int runs = 0;

  Next() = default;
  // `bytes` from `from` on, in `steps` calls. A run is a page at least: two in one page are taken
  // for a single reader that goes back and forth.
  Next(const void* from, int64_t bytes, int64_t steps)
      : from(bytes > 0 ? static_cast<const char*>(from) : nullptr) {
    runs = int(std::min<int64_t>(std::max<int64_t>(bytes / 4096, 1), RUNS));
    each = (bytes + runs * 64 - 1) / (runs * 64) * 64;
    lines = (each / 64 + std::max<int64_t>(steps, 1) - 1) / std::max<int64_t>(steps, 1);
  }
  inline __attribute__((always_inline)) void step() {
    if (from == nullptr) return;
    for (int64_t i = 0; i < lines && at < each; ++i, at += 64)
      for (int r = 0; r < runs; ++r) __builtin_prefetch(from + r * each + at, 0, 2);
  }
};

// Two groups of up to 16 rows of W, at wa and wb, with M rows of x, and MORE at `more`.
// Tiles 0, 1: results; 2, 3: rows of W; 4: x; 5, 6, 7: results and x of a second group of its rows.
// They are square: each row of x's has 64 bytes, of which M pairs are meant and the others are the
// rows behind, for results that nobody reads. Narrower tiles are loaded and multiplied at half the
// speed.
template <int M, int MORE>
inline void tile_pair(const bf16* wa, int rows_a, const bf16* wb, int rows_b, int64_t ldw,
                      Next next, const bf16* packed, const bf16* more, int64_t K, float* out_a,
                      float* out_b) {
  alignas(64) float c[4][16][16];
  alignas(64) bf16 edge[2][16][32];
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (MORE > 0) {
    _tile_zero(5);
    _tile_zero(6);
  }
  const int64_t whole = rows_a == 16 && rows_b == 16 ? K / 32 * 32 : 0;
  int64_t k = 0;
  for (; k < whole; k += 32) {
    next.step();
    _tile_loadd(4, packed + k * M, 4 * M);
    _tile_loadd(2, wa + k, 2 * ldw);
    _tile_dpbf16ps(0, 2, 4);
    _tile_loadd(3, wb + k, 2 * ldw);
    _tile_dpbf16ps(1, 3, 4);
    if constexpr (MORE > 0) {
      _tile_loadd(7, more + k * MORE, 4 * MORE);
      _tile_dpbf16ps(5, 2, 7);
      _tile_dpbf16ps(6, 3, 7);
    }
  }
  for (; k < K; k += 32) {
    const int columns = int(K - k < 32 ? K - k : 32);
    copy_tile(wa + k, ldw, rows_a, columns, edge[0]);
    copy_tile(wb + k, ldw, rows_b, columns, edge[1]);
    __asm__ volatile("" : : "r"(edge) : "memory");
    _tile_loadd(4, packed + k * M, 4 * M);
    _tile_loadd(2, edge[0], 64);
    _tile_dpbf16ps(0, 2, 4);
    _tile_loadd(3, edge[1], 64);
    _tile_dpbf16ps(1, 3, 4);
    if constexpr (MORE > 0) {
      _tile_loadd(7, more + k * MORE, 4 * MORE);
      _tile_dpbf16ps(5, 2, 7);
      _tile_dpbf16ps(6, 3, 7);
    }
  }
  _tile_stored(0, c[0], 64);
  _tile_stored(1, c[1], 64);
  if constexpr (MORE > 0) {
    _tile_stored(5, c[2], 64);
    _tile_stored(6, c[3], 64);
  }
  __asm__ volatile("" : : "r"(c) : "memory");
  transpose<M>(c[0], out_a, BLOCK);
  transpose<M>(c[1], out_b, BLOCK);
  if constexpr (MORE > 0) {
    transpose<MORE>(c[2], out_a + M * BLOCK, BLOCK);
    transpose<MORE>(c[3], out_b + M * BLOCK, BLOCK);
  }
}

// All M rows of x with up to 32 rows of W; `next` is fetched meanwhile.
template <int M>
inline void tile_block(const bf16* w, int rows, int64_t ldw, Next next, const bf16* packed,
                       int64_t padded, int64_t K, float* out) {
  constexpr int FIRST = M < 16 ? M : 16, MORE = M - FIRST < 16 ? M - FIRST : 16;
  tile_pair<FIRST, MORE>(w, std::min(rows, 16), w + 16 * ldw, std::max(rows - 16, 0), ldw, next,
                         packed, packed + 16 * padded, K, out, out + 16);
  if constexpr (M > 32)
    tile_block<M - 32>(w, rows, ldw, Next{}, packed + 32 * padded, padded, K,
                       out + 32 * BLOCK);
}

}  // namespace dspark

#endif
