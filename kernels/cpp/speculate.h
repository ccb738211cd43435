// Rounds of speculative decoding on the CPU: propose, schedule, verify, accept, commit, crop, for
// as many rounds as wanted, in one call. What is decided is what `torch_engine.py` decides with
// torch ops; here nothing leaves the caches.
#pragma once
#include <limits>

#include "lookup.h"

namespace dspark {

// What the threads of a call share. All run every line of a round: thread 0 decides and writes, the
// others meet it before they read; so one parallel region does for all rounds of a call, which is
// worth a tenth of a round of a small model.
struct Shared {
  Outcome outcome;  // of the first program that failed, after which none runs
  int64_t width_index = 0;
  Source source = kPlain;  // thread 0's
  bool open = false, drafts = false, appends = false;
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

// What lies in the slots from `start` on, as many as there are or as fit, goes into the causal
// model's block. In a hole, which the mask hides, there is anything.
inline void lacking(const Speculation& s, int64_t start) {
  const int64_t W = s.model_width;
  for (int64_t b = 0; b < s.rows; ++b) {
    const int64_t* text = b < s.batch ? s.text + b * s.text_room : nullptr;
    int64_t at = b < s.batch ? s.lengths[b] - 2 : 0, place = s.positions[b] - 1;
    for (int64_t j = *s.slot - 1; j >= start; --j) {
      if (j < start + W) {
        s.model_block[b * W + j - start] = text != nullptr && at >= 0 ? text[at] : 0;
        s.model_places[b * W + j - start] = std::max<int64_t>(place, 0);
      }
      if (s.mask == nullptr || s.mask[b * s.room + j] != 0) --at, --place;
    }
  }
}

// The causal model reads what it did not draft: plain steps' tokens and look-ups. What the last slot
// lacks comes with the anchor. Every thread calls it behind a meeting, as `append_context`.
inline bool catch_up(Team team, Speculation& s, Shared& shared) {
  for (int64_t left = s.behind; left > 1; left -= std::min(left, s.model_width)) {
    if (team.thread == 0) {
      lacking(s, *s.slot - left);
      for (int64_t i = 0; i < s.model_held_count; ++i) *s.model_held[i] = *s.slot - left;
    }
    team.barrier();
    if (!run(team, s, s.more, shared)) return false;
    team.barrier();
  }
  return true;
}

template <class D>
bool by_model(Team team, Speculation& s, Shared& shared) {
  if (!catch_up(team, s, shared)) return false;
  const int64_t start = *s.slot, width = s.count + 1;
  for (int64_t k = 0; k < s.drafts; ++k) {
    if (team.thread == 0) {
      for (int64_t i = 0; i < s.model_held_count; ++i)
        *s.model_held[i] = k == 0 ? start - 1 : start + k;
      for (int64_t b = 0; b < s.rows; ++b) {
        int64_t* block = s.model_block + b * s.model_width;
        int64_t* places = s.model_places + b * s.model_width;
        if (k == 0) {
          places[0] = s.positions[b] - 1, places[1] = s.positions[b];
          const int64_t n = b < s.batch ? s.lengths[b] : 0;
          block[0] = n > 1 ? s.text[b * s.text_room + n - 2] : 0;
          block[1] = s.block[b * width];
        } else {
          places[0] = s.positions[b] + k;
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
  return true;
}

// Drafted tokens into the block, `found` and `survival`: thread 0 has them all at its end.
template <class U, class W>
bool draft_round(Team team, Speculation& s, Shared& shared) {
  const int64_t K = s.count, D = s.drafts;
  if (s.kind == 1) {
    if (!append_context(team, s, shared)) return false;
    if (team.thread == 0)
      for (int64_t b = 0; b < s.rows; ++b) s.draft_ids[b * s.draft_block] = s.block[b * (K + 1)];
    team.barrier();
    if (!run(team, s, s.propose, shared)) return false;
    Drafting d{&s.sequence, s.batch, D, K, s.vocabulary, s.block, s.seen, s.how, s.greedy != 0,
               s.uniform, s.draft_weights, s.draft_totals, s.drafted_ids, s.survival,
               s.confidences};
    const int64_t start = now();
    draft_sequence<U, W>(team, d);
    if (team.thread != 0) return true;
    s.counters[4 + 5 * K + K + 1 + 3] += 1e-9 * double(now() - start);
  } else {
    if (!by_model<U>(team, s, shared)) return false;
    if (team.thread != 0) return true;
  }
  const bool knows = s.kind == 1 && s.sequence.confidence != nullptr;
  for (int64_t b = 0; b < s.batch; ++b) {
    s.found[b] = D;
    double a = 1;
    for (int64_t k = 0; k < D && !knows; ++k) s.survival[b * K + k] = a *= s.conditional[k];
    for (int64_t k = D; k < K; ++k) s.survival[b * K + k] = 0;
    if (s.point[b]) propose_looked(s, b);
  }
  return true;
}

// Tokens to verify, from where they are to be had.
template <class U, class W>
bool propose(Team team, Speculation& s, bool drafts, Shared& shared) {
  if (team.thread == 0) {
    shared.source = s.looks_up ? look_up_all(s, drafts && s.kind != 0) : kDraft;
    shared.drafts = shared.source == kDraft;
  }
  if (!s.looks_up) return draft_round<U, W>(team, s, shared);
  team.barrier();
  return !shared.drafts || draft_round<U, W>(team, s, shared);
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
  const bool point = s.point[b];
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
    if (rest / all > kResidualMass) p[tokens[n]] = 0, all = rest;
    return {n, pick(p, V, u * all)};
  }
  const int64_t own = b * K + n;
  return {n, pick_residual(p, all, s.draft_weights + own * V, s.draft_totals[own], V,
                           s.sequence.vocabulary_map, s.kind == 1 ? s.sequence.vocabulary : V, u)};
}

// Scores of every verified position.
template <class T>
void read_logits(Team team, const Speculation& s, int64_t width_index, Shared& shared) {
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
      if (s.greedy) {
        s.choice[at] = arg_max(p, V);
      } else {
        bool drawable;
        s.target_totals[at] = weigh(p, V, s.how, &drawable);
        if (!drawable) shared.outcome.status.store(kUndrawable, std::memory_order_relaxed);
      }
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
inline void plan(Speculation& s, bool looks, Shared& shared) {
  const double seconds = shared.source == kDraft ? *s.draft_seconds : 0;
  const bool looked = shared.source == kLookup;
  looks &= shared.source == kDraft;
  shared.width_index = shared.source == kPlain ? 0 : schedule(s, seconds, looked, looks).width_index;
  if (looked && shared.width_index == 0) shared.source = kPlain;
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

// What became of request b's confidences (`OnlineCalibration.record`).
inline void record(Speculation& s, int64_t b, int64_t accepted) {
  const int64_t row = *s.recorded % s.ring, D = s.drafts;
  std::memcpy(s.recorded_logits + row * D, s.confidences + b * D, sizeof(float) * size_t(D));
  s.recorded_accepted[row] = accepted;
  s.recorded_verified[row] = s.verified[b];
  *s.recorded += 1;
}

// Accept, correct, bonus, commit and crop, for all requests.
inline void settle(Speculation& s, Shared& shared) {
  const int64_t start_slot = *s.slot;
  const bool guessed = shared.source == kDraft && (s.kind == 2 || !s.sequence.confidence);
  const bool records = shared.source == kDraft && s.recorded_logits != nullptr;
  int64_t most = 0;
  int64_t kept[kMostRequests] = {};
  bool replaced = false;
  double* sums = s.counters + 4 + 5 * s.count + s.count + 1 + 4 + 4 * shared.source;
  sums[0] += 1;
  for (int64_t b = 0; b < s.batch; ++b) {
    if (s.done[b]) continue;
    const auto [accepted, next] = judge(s, b);
    replaced |= s.point[b] != 0;
    if (guessed && !s.point[b])
      for (int64_t k = 0; k < s.verified[b] && k <= accepted; ++k)
        s.conditional[k] += kLearned * (double(accepted > k) - s.conditional[k]);
    if (records && !s.point[b] && s.verified[b] > 0) record(s, b, accepted);
    const int64_t* text = s.text + b * s.text_room + s.lengths[b];
    kept[b] = commit(s, b, accepted, next);
    learn_looked(s, b, text, kept[b]);
    most = std::max(most, kept[b]);
    s.counters[3] += 1;
    sums[1] += 1, sums[2] += double(kept[b]);
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
  // Where positions of rows go on differently, the next states cannot follow these: the context is
  // appended at once.
  shared.appends = false;
  for (int64_t b = 0; b < s.batch; ++b) shared.appends |= kept[b] != most && !s.done[b];
  if (s.kind == 1) s.behind += most;
  // The causal model read the anchor and what it drafted but the last, and not what was looked up.
  if (s.kind == 2)
    s.behind = shared.source != kDraft ? s.behind + most
                                       : most - std::min(most, replaced ? 1 : s.drafts);
}

// Where the time went, and what rounds cost from now on.
inline void learn(Speculation& s, const Shared& shared, double tokens, double requests) {
  const int64_t K = s.count, *times = shared.times;
  double* seconds = s.counters + 4 + 5 * K + K + 1;
  for (int i = 0; i < 3; ++i) seconds[i] += 1e-9 * double(times[i + 1] - times[i]);
  const double whole = 1e-9 * double(times[3] - times[0]);
  seconds[4 + 4 * shared.source + 3] += whole;
  const auto blend = [](double& known, double seen) {
    known = known > 0 ? known + kLearned * (std::min(seen, kHiccup * known) - known) : seen;
  };
  const double* first = s.first_seconds;
  const int64_t used = shared.width_index;
  blend(s.verify_seconds[used], 1e-9 * double(times[2] - times[1]));
  // What is not used is not measured: one slow moment would shut a width out for good.
  for (int64_t i = 0; i < s.width_count; ++i)
    s.verify_seconds[i] +=
        kForgotten * (first[i] / first[used] * s.verify_seconds[used] - s.verify_seconds[i]);
  if (shared.source != kDraft) return;
  blend(*s.draft_seconds, 1e-9 * double(times[1] - times[0]));
  blend(s.drafted[0], tokens / requests);
  blend(s.drafted[1], whole);
}

// One round; false where a program failed. Begins behind a meeting, and ends before one.
template <class T, class U, class W>
bool round(Team team, Speculation& s, int64_t drafting, Shared& shared) {
  const bool leads = team.thread == 0;
  const double* sums = s.counters;
  double before[2];
  if (leads) {
    shared.times[0] = now();
    before[0] = sums[1], before[1] = sums[3];
    shared.source = kPlain;
    for (int64_t b = 0; b < s.batch; ++b) s.found[b] = s.match[b] = s.point[b] = 0;
  }
  if (drafting && !propose<U, W>(team, s, drafting != 2, shared)) return false;
  if (leads) {
    plan(s, drafting == 3, shared);
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
  read_logits<T>(team, s, width_index, shared);
  team.barrier();
  if (shared.outcome.status.load(std::memory_order_relaxed) != 0) return false;
  if (leads) settle(s, shared);
  if (s.kind == 1) {
    team.barrier();
    if (shared.appends && !append_context(team, s, shared)) return false;
  }
  if (leads) {
    shared.times[3] = now();
    learn(s, shared, sums[1] - before[0], sums[3] - before[1]);
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
// fit any more, or holes are to be closed. `drafting`: 0 plain steps, 1 whatever proposes, 2
// look-ups without a draft, 3 whatever proposes, and what is drafted is verified at any price.
template <class T, class U, class W>
int speculate(Speculation& s, int64_t count, int64_t drafting, int64_t* made) {
  *made = 0;
  for (int64_t i = 0; i < s.width_count; ++i) patch(s.verify[i]);
  if (s.kind == 1) patch(s.propose), patch(s.append);
  if (s.kind == 2) patch(s.more), patch(s.two), patch(s.one);
  Shared shared;
  shared.outcome.failed = std::numeric_limits<int64_t>::max();
  parallel(int(s.threads), [&](Team team) {
    for (;;) {
      if (team.thread == 0) shared.open = *made < count && goes_on(s, *made);
      team.barrier();
      if (!shared.open || !round<T, U, W>(team, s, drafting, shared)) return;
      if (team.thread == 0) ++*made;
    }
  });
  return shared.outcome.status.load();
}

}  // namespace dspark
