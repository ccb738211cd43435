// Prompt lookup: what followed the same tokens before is proposed (`ngram.propose`), and whether it
// stands in for a draft. How far a look-up can be trusted is learned by the length of its match.
//
// Whether tokens are looked up or drafted is decided by what rounds before were worth, not by what
// this round's draft says: a choice that knew the drafted tokens would bias sampling.
#pragma once
#include "schedule.h"

namespace dspark {

// The longest match of the end of request b's text, of equals the latest: `match`, `looked`.
inline void look_up(Speculation& s, int64_t b) {
  const int64_t* text = s.text + b * s.text_room;
  const int64_t count = s.lengths[b], end = count - 1;
  int64_t best = s.shortest - 1, at = -1;
  for (int64_t j = end - 1; j >= 0 && best < s.longest; --j) {
    int64_t n = 0;
    while (n < s.longest && n <= j && text[j - n] == text[end - n]) ++n;
    if (n > best) best = n, at = j;
  }
  s.match[b] = at < 0 ? 0 : best;
  if (at < 0) return;
  const int64_t start = at + 1, period = std::max<int64_t>(count - start, 1);
  for (int64_t k = 0; k < s.count; ++k) s.looked[b * s.count + k] = text[start + k % period];
}

// How often tokens behind such a match stood; null where nothing matches.
inline double* trust(const Speculation& s, int64_t b) {
  return s.match[b] == 0 ? nullptr : s.matched + (s.match[b] - 1) * s.count;
}

// What was looked up for request b becomes what is verified; returns how many tokens it is thought
// to bring.
inline double propose_looked(Speculation& s, int64_t b) {
  const int64_t K = s.count;
  const double* known = trust(s, b);
  s.found[b] = known == nullptr ? 0 : K;
  double a = known != nullptr, tokens = 0;
  for (int64_t k = 0; k < K; ++k) {
    s.survival[b * K + k] = a *= known == nullptr ? 0 : known[k];
    tokens += a;
  }
  if (known != nullptr)
    std::copy(s.looked + b * K, s.looked + (b + 1) * K, s.block + b * (K + 1) + 1);
  return tokens;
}

// Looks tokens up for all requests, and decides on the round and on each request's `point`.
inline Source look_up_all(Speculation& s, bool drafts) {
  int64_t live = 0, found = 0;
  double tokens[kMostRequests];
  for (int64_t b = 0; b < s.batch; ++b) {
    s.match[b] = s.point[b] = 0;
    if (s.done[b]) continue;
    look_up(s, b);
    tokens[b] = propose_looked(s, b);
    s.point[b] = s.match[b] > 0;
    live += 1, found += s.point[b];
  }
  if (!drafts || found == live) {
    // A draft may be better than look-ups that seldom stand.
    const bool known = drafts && !s.fixed && s.drafted[1] > 0;
    if (!known || schedule(s, 0, true).value >= double(live) * s.drafted[0] / s.drafted[1])
      return kLookup;
  }
  for (int64_t b = 0; b < s.batch; ++b)
    s.point[b] = s.point[b] && (s.fixed || 1 + tokens[b] > s.drafted[0]);
  return kDraft;
}

// What the round taught of a look-up: `tokens` were committed. It need not have been verified.
inline void learn_looked(Speculation& s, int64_t b, const int64_t* tokens, int64_t count) {
  double* known = trust(s, b);
  for (int64_t k = 0; known != nullptr && k < std::min(count, s.count); ++k) {
    const bool stood = s.looked[b * s.count + k] == tokens[k];
    known[k] += kLearned * (double(stood) - known[k]);
    if (!stood) break;
  }
}

}  // namespace dspark
