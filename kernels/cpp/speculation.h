// The state of speculative rounds on the CPU (`speculate.h`), which Python fills in. The tensors
// are those of `runtime/speculation/state.py`.
//
//   rows      of the programs, B <= rows requests of them
//   K, M      drafted tokens of a round, tokens a program verifies (M = 1 + drafted)
//   D         tokens that a draft gives, D <= K: look-ups may give more
//
// `Head`, `Source` and the constants (k...) that decide are Python's: `speculate.py` writes them in
// front of this file.
#pragma once
#include "draft.h"
#include "program.h"

namespace dspark {

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
  int64_t kind;  // of the draft: 0: none, 1: a draft model, 2: a causal model
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
  double* verify_seconds;       // by index of width; measured as it goes
  const double* first_seconds;  // the same, each at its best before the first round
  double* draft_seconds;
  double* conditional;  // [K]: how often a drafted token stood, where no head says so
  // the draft model
  BoundStages propose, append;
  int64_t* draft_ids;  // [rows, draft_block]: the anchor and mask tokens
  int64_t draft_block;
  const void* const* states;  // by width: tapped states [rows, M, state_bytes]
  int64_t state_bytes;
  int64_t drafts;  // D
  char* pending;   // [rows, K + 1, state_bytes]
  int64_t* context_slot;
  int64_t* context_positions;  // [rows]
  int64_t behind;              // tokens whose states wait; of the causal model: slots it lacks
  Sequence sequence;
  // look-ups of n-grams; with a draft, rounds are of the one or the other
  int64_t looks_up, shortest, longest;
  double* matched;  // [longest, K]: how often the k-th token behind a match stood
  int64_t* match;   // [batch]: tokens that match, 0 where none do
  int64_t* looked;  // [batch, K]: what came behind them
  uint8_t* point;   // [batch]: whether that is what is verified
  double* drafted;  // of a drafted round: tokens a request, seconds
  // the causal model: what it lacks, model_width = W tokens at a time; two tokens, then one by one
  BoundStages more, two, one;
  const void* two_logits;
  const void* one_logits;
  int64_t model_requests_two, model_requests_one;
  int64_t model_width;
  int64_t* model_block;   // [rows, W]
  int64_t* model_places;  // [rows, W]: positions
  int64_t* const* model_held;
  int64_t model_held_count;
  int64_t* model_mask;
  // telemetry, sums: rounds, committed, drafted, requests; then [K] each: reached, passed,
  // predicted, survived, predictions; then lengths [K + 1]; then seconds: draft, verify,
  // other, and of draft the sequential stage; then by source (plain, look-up, draft) rounds,
  // requests, tokens, seconds
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
  float* confidences;     // [batch, D]: logits of the round
  // the latest verified rounds of a request, a ring: what calibrates the confidences; null without
  float* recorded_logits;      // [ring, D]
  int64_t* recorded_accepted;  // [ring]
  int64_t* recorded_verified;  // [ring]
  int64_t* recorded;           // how many there ever were
  int64_t ring;
};

// Drafted tokens of request b, behind its anchor.
inline const int64_t* drafted(const Speculation& s, int64_t b) {
  return s.block + b * (s.count + 1) + 1;
}

}  // namespace dspark
