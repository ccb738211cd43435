// An expert's rows, gathered by its choices and packed as passes of a product.
#pragma once
#include "moe_routing.h"
#include "product.h"

namespace dspark {

// Rows that one pass of a product takes of an expert's `m`.
template <int CAP>
inline int pass_rows(int64_t m) {
  int rows = 1;
  while (rows < m && rows < CAP) rows *= 2;
  return rows;
}

// body(std::integral_constant<int, M>) for M = pass_rows.
template <int CAP, class Body>
inline void with_rows(int64_t m, Body&& body) {
  if (m <= 1) return body(std::integral_constant<int, 1>{});
  if constexpr (CAP >= 2)
    if (m <= 2) return body(std::integral_constant<int, 2>{});
  if constexpr (CAP >= 4)
    if (m <= 4) return body(std::integral_constant<int, 4>{});
  if constexpr (CAP >= 8)
    if (m <= 8) return body(std::integral_constant<int, 8>{});
  if constexpr (CAP >= 16) return body(std::integral_constant<int, 16>{});
  body(std::integral_constant<int, CAP>{});
}

// Rows of one expert that are packed at a time: what a thread needs memory for.
constexpr int64_t ROOM = 256;

// `choices`: a token may have an expert more than once.
template <class T, int CAP>
inline size_t packed_bytes(int64_t K, int64_t choices) {
  const int64_t rows = std::min<int64_t>(ROOM, (choices + CAP - 1) / CAP * CAP);
  // As wide as any form of a product packs, and the rows themselves.
  return aligned((sizeof(float) + sizeof(T)) * (rows + 16) * (K + 64)) + 256;
}

// Rows [0, count) as passes of M rows, packed; read.copy(i, to) gives row i.
template <class T, int M, class Read>
inline typename Packed<T, M>::Element* pack_passes(int64_t count, int64_t K, const Read& read,
                                                   char* memory) {
  using P = Packed<T, M>;
  using Element = typename P::Element;
  const int64_t passes = (count + M - 1) / M, pass = int64_t(P::bytes(K) / sizeof(Element));
  Element* to = (Element*)memory;
  T* rows = (T*)(memory + aligned(sizeof(Element) * pass * passes));
  for (int64_t p = 0; p < passes; ++p) {
    for (int m = 0; m < M; ++m) {
      T* row = rows + m * K;
      const int64_t i = p * M + m;
      if (i < count) {
        read.copy(i, row);
      } else {
        std::memset(row, 0, sizeof(T) * K);
      }
    }
    pack<T, M>(rows, K, K, 0, P::padded(K), to + p * pass);
  }
  return to;
}

// Rows of an expert's choices. WEIGH: times the choice's weight.
template <class T, class Share, bool WEIGH>
struct FromTokens {
  const T* x;
  const Share* weights;
  const int32_t* choice;
  const ExpertSizes& s;

  const T* operator()(int64_t i) const { return x + choice[i] / s.k * s.ldx; }
  void copy(int64_t i, T* to) const {
    const T* from = (*this)(i);
    if constexpr (WEIGH) {
      const Vec w = all(round_to<T>(to_float(weights[choice[i]])));
      for (int64_t n = 0; n < s.K; n += Vec::W) {
        const int lanes = int(std::min<int64_t>(Vec::W, s.K - n));
        store(to + n, load(from + n, lanes) * w, lanes);
      }
    } else {
      std::memcpy(to, from, sizeof(T) * s.K);
    }
  }
};

// Rows that lie one behind the other.
template <class T>
struct FromHidden {
  const T* hidden;
  int64_t I;

  const T* operator()(int64_t i) const { return hidden + i * I; }
  void copy(int64_t i, T* to) const { std::memcpy(to, hidden + i * I, sizeof(T) * I); }
};

}  // namespace dspark
