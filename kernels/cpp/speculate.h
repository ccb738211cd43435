// Rounds of speculative decoding on the CPU: propose, schedule, verify, accept, commit, crop, for as
// many rounds as wanted, in one call. The tensors are those of `runtime/speculation/state.py`, and
// what is decided is what `torch_engine.py` decides with torch ops; here nothing leaves the caches.
//
//   rows      of the programs, B <= rows requests of them
//   K, M      drafted tokens of a round, tokens a program verifies (M = 1 + drafted)
#pragma once
#include <limits>

#include "draft.h"
#include "program.h"

namespace dspark {

constexpr int kMostRequests = 64;

// Word `where` of a program's block becomes the address of buffer `which` plus `offset`.
struct Patch {
  int64_t where, which, offset;
};

// A native program on tensors that stay where they are.
struct BoundStages {
  int64_t* block;
  const Patch* patches;
  int64_t patch_count;
  const int64_t* bases;
  int64_t stages;
  char* memory;
};

// Members of 8 bytes: Python fills it in, in this order.
struct Speculation {
  int64_t kind;  // 0: nothing drafts, 1: a draft model, 2: n-grams, 3: a causal model
  int64_t rows, batch, count, vocabulary, threads, ahead;
  // the target
  const BoundStages* verify;
  const int64_t* widths;
  int64_t width_count;
  const void* const* logits;       // by width: [rows, M, V]
  const int64_t* logits_rows;      // elements between tokens
  const int64_t* logits_requests;  // elements between requests
  int64_t* block;                  // [rows, K + 1]
  int64_t* positions;              // [rows]
  int64_t* slot;
  int64_t* const* held;  // lengths of the caches: the slot
  int64_t held_count;
  int64_t* mask;  // [rows, room], or null
  int64_t room, slack;
  double holes;     // the part of the cache that may be holes
  int64_t* filled;  // [rows]
  // the requests
  int64_t* text;  // [batch, text_room]
  int64_t text_room;
  int64_t* lengths;
  const int64_t* prompts;
  uint8_t* done;
  int64_t limit;
  uint8_t* seen;  // [batch, V], or null
  const int64_t* eos;
  int64_t eos_count;
  Choice how;
  int64_t greedy;
  const float* uniform;  // [rounds, batch, 2 K + 1]; moves on
  // the schedule
  int64_t fixed;
  const double* table;     // seconds by width, convex
  double* verify_seconds;  // by index of width; measured as it goes
  double* draft_seconds;
  double* conditional;  // [K]: how often a token stood, where no head says so
  // the draft model
  BoundStages propose, append;
  int64_t* draft_ids;  // [rows, draft_block]: the anchor and mask tokens
  int64_t draft_block;
  const void* const* states;  // by width: tapped states [rows, M, state_bytes]
  int64_t state_bytes;
  char* pending;  // [rows, K + 1, state_bytes]
  int64_t* context_slot;
  int64_t* context_positions;  // [rows]
  int64_t behind;              // tokens whose states wait
  Sequence sequence;
  // n-grams
  int64_t shortest, longest;
  // the causal model: two tokens first, then one at a time
  BoundStages two, one;
  const void* two_logits;
  const void* one_logits;
  int64_t model_requests_two, model_requests_one;
  int64_t* model_block;  // [rows, 2]
  int64_t* model_positions;
  int64_t* const* model_held;
  int64_t model_held_count;
  int64_t* model_mask;
  // telemetry, sums: rounds, committed, drafted, requests; then [K] each: reached, passed,
  // predicted, survived, predictions; then lengths [K + 1]; then seconds: draft, verify,
  // other, and of draft the sequential stage
  double* counters;
  // working memory
  double* survival;       // [batch, K]
  int64_t* found;         // [batch]: drafted tokens
  int64_t* verified;      // [batch]
  int64_t* choice;        // [batch, K + 1]
  float* draft_weights;   // [batch, K, V]: what drafted tokens were drawn from
  double* draft_totals;   // [batch, K]
  float* target_weights;  // [batch, K + 1, V]
  double* target_totals;  // [batch, K + 1]
  int64_t* drafted_ids;   // [batch, K]: in the draft's own vocabulary
};

// What the threads of a call share. All run every line of a round: thread 0 decides and writes, the
// others meet it before they read; so one parallel region does for all rounds of a call, which is
// worth a tenth of a round of a small model.
struct Shared {
  Outcome outcome;  // of the first program that failed, after which none runs
  int64_t width_index = 0;
  bool open = false, appends = false;
  int64_t times[4];
};

// The stages of a program, behind a meeting; whether all is well. What failed in the next program
// must not be taken for a failure here: threads meet once more before they call this again.
inline bool run(Team team, const Speculation& s, const BoundStages& p, Shared& shared) {
  return run_stages<false>(team, (const Stage*)p.block, p.stages, p.memory, s.ahead, nullptr,
                           shared.outcome);
}

inline void patch(const BoundStages& p) {
  for (int64_t i = 0; i < p.patch_count; ++i)
    p.block[p.patches[i].where] = p.bases[p.patches[i].which] + p.patches[i].offset;
}

// Every thread calls it behind a meeting, so that all see the same number.
inline bool append_context(Team team, Speculation& s, Shared& shared) {
  if (s.behind == 0) return true;
  const bool well = run(team, s, s.append, shared);
  if (team.thread == 0) s.behind = 0;
  team.barrier();
  return well;
}

// Prompt lookup: `ngram.propose`.
inline void look_up(Speculation& s, int64_t b) {
  const int64_t* text = s.text + b * s.text_room;
  const int64_t count = s.lengths[b], end = count - 1;
  int64_t best = s.shortest - 1, at = -1;
  for (int64_t j = end - 1; j >= 0 && best < s.longest; --j) {
    int64_t n = 0;
    while (n < s.longest && n <= j && text[j - n] == text[end - n]) ++n;
    if (n > best) best = n, at = j;
  }
  s.found[b] = at < 0 ? 0 : s.count;
  if (at < 0) return;
  const int64_t start = at + 1, period = std::max<int64_t>(count - start, 1);
  for (int64_t k = 0; k < s.count; ++k)
    s.block[b * (s.count + 1) + 1 + k] = text[start + k % period];
}

// The tokens behind the anchor that penalties count as seen: those drafted before position k.
inline const int64_t* drafted(const Speculation& s, int64_t b) {
  return s.block + b * (s.count + 1) + 1;
}

template <class D>
bool by_model(Team team, Speculation& s, Shared& shared) {
  const int64_t start = *s.slot, width = s.count + 1;
  for (int64_t k = 0; k < s.count; ++k) {
    if (team.thread == 0) {
      for (int64_t i = 0; i < s.model_held_count; ++i)
        *s.model_held[i] = k == 0 ? start - 1 : start + k;
      for (int64_t b = 0; b < s.rows; ++b) {
        s.model_positions[b] = s.positions[b] + (k == 0 ? -1 : k);
        int64_t* block = s.model_block + 2 * b;
        if (k == 0) {
          const int64_t n = b < s.batch ? s.lengths[b] : 0;
          block[0] = n > 1 ? s.text[b * s.text_room + n - 2] : 0;
          block[1] = s.block[b * width];
        } else {
          block[0] = s.block[b * width + k];
        }
      }
    }
    team.barrier();
    if (!run(team, s, k == 0 ? s.two : s.one, shared)) return false;
    const char* logits = (const char*)(k == 0 ? s.two_logits : s.one_logits);
    const int64_t step = k == 0 ? s.model_requests_two : s.model_requests_one;
    for (int64_t b = team.thread; b < s.batch; b += team.threads) {
      const D* x = (const D*)logits + b * step;
      float* p = s.draft_weights + (b * s.count + k) * s.vocabulary;
      const uint8_t* marks = s.seen == nullptr ? nullptr : s.seen + b * s.vocabulary;
      widen_row(x, s.vocabulary, p);
      penalise(p, 0, s.vocabulary, marks, drafted(s, b), k, s.how.penalty);
      int64_t token;
      if (s.greedy) {
        token = arg_max(p, s.vocabulary);
      } else {
        const double all = weigh(p, s.vocabulary, s.how);
        s.draft_totals[b * s.count + k] = all;
        token = pick(p, s.vocabulary, s.uniform[b * (2 * s.count + 1) + k] * all);
      }
      s.block[b * width + 1 + k] = s.drafted_ids[b * s.count + k] = token;
    }
    team.barrier();
  }
  if (team.thread == 0)
    for (int64_t b = 0; b < s.batch; ++b) s.found[b] = s.count;
  return true;
}

// Drafted tokens into the block, `found` and `survival`: thread 0 has them all at its end.
template <class U, class W>
bool draft_round(Team team, Speculation& s, Shared& shared) {
  const int64_t K = s.count, width = K + 1;
  if (s.kind == 1) {
    if (!append_context(team, s, shared)) return false;
    if (team.thread == 0)
      for (int64_t b = 0; b < s.rows; ++b) s.draft_ids[b * s.draft_block] = s.block[b * width];
    team.barrier();
    if (!run(team, s, s.propose, shared)) return false;
    Drafting d{&s.sequence, s.batch, K, s.vocabulary, s.block, s.seen, s.how, s.greedy != 0,
               s.uniform, s.draft_weights, s.draft_totals, s.drafted_ids, s.survival};
    const int64_t start = now();
    draft_sequence<U, W>(team, d);
    if (team.thread != 0) return true;
    s.counters[4 + 5 * K + K + 1 + 3] += 1e-9 * double(now() - start);
    for (int64_t b = 0; b < s.batch; ++b) s.found[b] = K;
    if (s.sequence.confidence != nullptr) return true;
  } else if (s.kind == 2) {
    if (team.thread != 0) return true;
    for (int64_t b = 0; b < s.batch; ++b)
      if (!s.done[b]) look_up(s, b);
  } else {
    if (!by_model<U>(team, s, shared)) return false;
    if (team.thread != 0) return true;
  }
  for (int64_t b = 0; b < s.batch; ++b) {
    double a = s.found[b] > 0;
    for (int64_t k = 0; k < K; ++k) s.survival[b * K + k] = a *= s.conditional[k];
  }
  return true;
}

// The index of the width to verify: `state.verify_length`, and what of its width is left is filled.
inline int64_t schedule(const Speculation& s) {
  const int64_t most = s.widths[s.width_count - 1] - 1;
  int64_t length = 0, wanted = 0;
  double tau = 0;
  for (int64_t b = 0; b < s.batch; ++b) {
    if (s.done[b]) continue;
    tau += 1;
    wanted = std::max(wanted, s.found[b]);
  }
  if (s.fixed) {
    length = std::min(most, wanted);
  } else if (wanted > 0) {
    double best = tau / (*s.draft_seconds + s.table[1]);
    for (; length < std::min(most, s.count); ++length) {
      for (int64_t b = 0; b < s.batch; ++b)
        if (!s.done[b]) tau += s.survival[b * s.count + length];
      const double value = tau / (*s.draft_seconds + s.table[length + 2]);
      if (!(value > best)) break;
      best = value;
    }
  }
  int64_t i = 0;
  while (s.widths[i] <= length) ++i;
  return i;
}

// How many drafted tokens of request b stand, and the target's token behind them.
inline std::pair<int64_t, int64_t> judge(const Speculation& s, int64_t b) {
  const int64_t K = s.count, V = s.vocabulary, length = s.verified[b];
  const int64_t* tokens = drafted(s, b);
  if (s.greedy) {
    const int64_t* choice = s.choice + b * (K + 1);
    int64_t n = 0;
    while (n < length && tokens[n] == choice[n]) ++n;
    return {n, choice[n]};
  }
  const float* uniform = s.uniform + b * (2 * K + 1);
  const bool point = s.kind == 2;
  int64_t n = 0;
  for (; n < length; ++n) {
    const int64_t at = b * (K + 1) + n;
    const double target = s.target_weights[at * V + tokens[n]] / s.target_totals[at];
    const int64_t own = b * K + n;
    const double draft =
        point ? 1 : s.draft_weights[own * V + s.drafted_ids[own]] / s.draft_totals[own];
    if (!(uniform[K + n] * draft < target)) break;
  }
  const int64_t at = b * (K + 1) + n;
  float* p = s.target_weights + at * V;
  double all = s.target_totals[at];
  const double u = uniform[2 * K];
  if (n == length) return {n, pick(p, V, u * all)};
  if (point) {
    const double rest = all - p[tokens[n]];
    if (rest / all > 1e-8) p[tokens[n]] = 0, all = rest;
    return {n, pick(p, V, u * all)};
  }
  const int64_t own = b * K + n;
  return {n, pick_residual(p, all, s.draft_weights + own * V, s.draft_totals[own], V,
                           s.sequence.vocabulary_map, s.kind == 1 ? s.sequence.vocabulary : V, u)};
}

// Scores of every verified position.
template <class T>
void read_logits(Team team, const Speculation& s, int64_t width_index) {
  const int64_t K = s.count, V = s.vocabulary;
  int64_t item = 0;
  for (int64_t b = 0; b < s.batch; ++b) {
    if (s.done[b]) continue;
    const uint8_t* marks = s.seen == nullptr ? nullptr : s.seen + b * V;
    for (int64_t m = 0; m <= s.verified[b]; ++m) {
      if (item++ % team.threads != team.thread) continue;
      const T* x = (const T*)s.logits[width_index] + b * s.logits_requests[width_index] +
                   m * s.logits_rows[width_index];
      const int64_t at = b * (K + 1) + m;
      if (s.greedy && marks == nullptr) {
        s.choice[at] = arg_max(x, V);
        continue;
      }
      float* p = s.target_weights + at * V;
      widen_row(x, V, p);
      penalise(p, 0, V, marks, drafted(s, b), m, s.how.penalty);
      if (s.greedy)
        s.choice[at] = arg_max(p, V);
      else
        s.target_totals[at] = weigh(p, V, s.how);
    }
  }
}

// What request b keeps: its text, its state; returns the number of tokens.
inline int64_t commit(Speculation& s, int64_t b, int64_t accepted, int64_t next) {
  const int64_t K = s.count;
  int64_t* tokens = s.block + b * (K + 1) + 1;
  int64_t* text = s.text + b * s.text_room + s.lengths[b];
  const int64_t left = s.limit - (s.lengths[b] - s.prompts[b]);
  int64_t count = 0;
  for (; count <= accepted && !s.done[b]; ++count) {
    const int64_t token = count < accepted ? tokens[count] : next;
    text[count] = token;
    if (s.seen != nullptr) s.seen[b * s.vocabulary + token] = 1;
    for (int64_t i = 0; i < s.eos_count; ++i) s.done[b] |= token == s.eos[i];
  }
  if (count >= left) s.done[b] = 1;
  // Telemetry, as `Counters.record` has it.
  double* c = s.counters;
  const int64_t stood = std::min(accepted, count);
  c[0] += 1, c[1] += double(count), c[2] += double(s.verified[b]);
  double *reached = c + 4, *passed = reached + K, *predicted = passed + K, *survived = predicted + K,
         *predictions = survived + K, *lengths = predictions + K;
  for (int64_t k = 0; k < s.verified[b]; ++k) {
    reached[k] += stood >= k;
    passed[k] += stood > k;
    predicted[k] += s.survival[b * K + k];
    survived[k] += stood > k;
    predictions[k] += 1;
  }
  lengths[s.verified[b]] += 1;
  s.lengths[b] += count;
  s.filled[b] += count;
  s.positions[b] += count;
  s.block[b * (K + 1)] = text[count - 1];
  return count;
}

// What thread 0 does between drafting and verifying: the width, and how much of it each request has.
inline void plan(Speculation& s, Shared& shared, bool drafting) {
  shared.width_index = drafting ? schedule(s) : 0;
  const int64_t width = s.widths[shared.width_index];
  for (int64_t b = 0; b < s.batch; ++b) {
    const int64_t left = s.limit - (s.lengths[b] - s.prompts[b]);
    s.verified[b] =
        s.done[b] ? 0 : std::min({s.found[b], width - 1, std::max<int64_t>(left - 1, 0)});
  }
}

// The tapped states of what was verified wait for the next draft.
inline void keep_states(Speculation& s, int64_t width_index) {
  const int64_t K = s.count, width = s.widths[width_index];
  if (s.behind == 0) {
    *s.context_slot = *s.slot;
    for (int64_t b = 0; b < s.rows; ++b) s.context_positions[b] = s.positions[b];
  }
  const int64_t bytes = width * s.state_bytes;
  for (int64_t b = 0; b < s.rows; ++b)
    std::memcpy(s.pending + (b * (K + 1) + s.behind) * s.state_bytes,
                (const char*)s.states[width_index] + b * bytes, size_t(bytes));
}

// Accept, correct, bonus, commit and crop, for all requests. Whether the context has to be appended
// at once: where positions of rows go on differently, the next states cannot follow these.
inline bool settle(Speculation& s, bool drafting) {
  const int64_t start_slot = *s.slot;
  int64_t most = 0;
  int64_t kept[kMostRequests] = {};
  for (int64_t b = 0; b < s.batch; ++b) {
    if (s.done[b]) continue;
    const auto [accepted, next] = judge(s, b);
    if (drafting && (s.kind > 1 || s.sequence.confidence == nullptr))
      for (int64_t k = 0; k < s.verified[b] && k <= accepted; ++k)
        s.conditional[k] += 0.1 * (double(accepted > k) - s.conditional[k]);
    kept[b] = commit(s, b, accepted, next);
    most = std::max(most, kept[b]);
    s.counters[3] += 1;
  }
  *s.slot = start_slot + most;
  for (int64_t i = 0; i < s.held_count; ++i) *s.held[i] = *s.slot;
  if (s.mask != nullptr && s.rows > 1)
    for (int64_t b = 0; b < s.rows; ++b)
      for (int64_t j = b < s.batch ? kept[b] : 0; j < most; ++j) {
        s.mask[b * s.room + start_slot + j] = 0;
        if (s.model_mask != nullptr) s.model_mask[b * s.room + start_slot + j] = 0;
      }
  if (s.uniform != nullptr) s.uniform += s.batch * (2 * s.count + 1);
  if (s.kind != 1) return false;
  s.behind += most;
  bool even = true;
  for (int64_t b = 0; b < s.batch; ++b) even &= kept[b] == most || s.done[b];
  return !even;
}

// Where the time went, and what rounds cost from now on.
inline void learn(Speculation& s, const Shared& shared, bool drafting) {
  const int64_t K = s.count, *times = shared.times;
  double* seconds = s.counters + 4 + 5 * K + K + 1;
  for (int i = 0; i < 3; ++i) seconds[i] += 1e-9 * double(times[i + 1] - times[i]);
  const auto blend = [](double& known, double seen) {
    known = known > 0 ? known + 0.1 * (std::min(seen, 2 * known) - known) : seen;
  };
  blend(s.verify_seconds[shared.width_index], 1e-9 * double(times[2] - times[1]));
  if (drafting) blend(*s.draft_seconds, 1e-9 * double(times[1] - times[0]));
}

// One round; false where a program failed. Begins behind a meeting, and ends before one.
template <class T, class U, class W>
bool round(Team team, Speculation& s, bool drafting, Shared& shared) {
  const bool leads = team.thread == 0;
  if (leads) {
    shared.times[0] = now();
    for (int64_t b = 0; b < s.batch; ++b) s.found[b] = 0;
  }
  if (drafting && !draft_round<U, W>(team, s, shared)) return false;
  if (leads) {
    plan(s, shared, drafting);
    shared.times[1] = now();
  }
  team.barrier();
  const int64_t width_index = shared.width_index;
  if (!run(team, s, s.verify[width_index], shared)) return false;
  if (s.kind == 1) {
    if (s.behind + s.widths[width_index] > s.count + 1) {
      // No thread may still be about to see whether the program before went well.
      team.barrier();
      if (!append_context(team, s, shared)) return false;
    }
    if (leads) keep_states(s, width_index);
  }
  if (leads) shared.times[2] = now();
  read_logits<T>(team, s, width_index);
  team.barrier();
  if (leads) shared.appends = settle(s, drafting);
  if (s.kind == 1) {
    team.barrier();
    if (shared.appends && !append_context(team, s, shared)) return false;
  }
  if (leads) {
    shared.times[3] = now();
    learn(s, shared, drafting);
  }
  return true;
}

// Whether another round is wanted and fits.
inline bool goes_on(const Speculation& s, int64_t made) {
  bool open = false, fits = *s.slot + s.slack <= s.room;
  int64_t longest = 0;
  for (int64_t b = 0; b < s.batch; ++b) {
    open |= !s.done[b];
    fits &= s.lengths[b] + s.count + 1 <= s.text_room;
    if (!s.done[b]) longest = std::max(longest, s.filled[b]);
  }
  if (!open || !fits) return false;
  return s.rows == 1 || made == 0 || double(*s.slot - longest) <= s.holes * double(*s.slot);
}

// Up to `count` rounds; *made says how many: fewer where all requests have ended, a round does not
// fit any more, or holes are to be closed.
template <class T, class U, class W>
int speculate(Speculation& s, int64_t count, int64_t drafting, int64_t* made) {
  *made = 0;
  for (int64_t i = 0; i < s.width_count; ++i) patch(s.verify[i]);
  if (s.kind == 1) patch(s.propose), patch(s.append);
  if (s.kind == 3) patch(s.two), patch(s.one);
  Shared shared;
  shared.outcome.failed = std::numeric_limits<int64_t>::max();
  parallel(int(s.threads), [&](Team team) {
    for (;;) {
      if (team.thread == 0) shared.open = *made < count && goes_on(s, *made);
      team.barrier();
      if (!shared.open || !round<T, U, W>(team, s, drafting != 0, shared)) return;
      if (team.thread == 0) ++*made;
    }
  });
  return shared.outcome.status.load();
}

}  // namespace dspark
