// One pass of an engine: which tokens stand where, and what is kept of them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tulle/ops.hpp"

namespace tulle {

// Token i stands at positions[i] of sequence slots[i]; what a sequence holds before has been given in earlier passes or
// earlier in this one. `tables` says in which pages a sequence's keys and values are: tokens [16·b, 16·b + 16) of slot s
// in page tables[s · blocks + b], blocks = ⌈context / 16⌉; −1 where there is none. Sequences may share pages, but a page
// that a pass writes to is of one block of one sequence.
struct PassInput {
  const std::int32_t *tokens, *slots, *positions;  // [n]
  std::size_t n;
  const std::int32_t* tables;  // [slots][blocks]
  const std::int32_t* rows;    // [wanted], rising: of which tokens there are outputs
  std::size_t wanted;
};

// How large an engine is made.
struct EngineSizes {
  std::size_t pages;    // of kKeyBlock tokens each, of all layers and KV heads
  std::size_t slots;    // sequences
  std::size_t context;  // tokens of a sequence, at most
  std::size_t batch;    // tokens of a pass, at most
  CacheKind cache;
  std::size_t threads;
  std::size_t snapshots = 0;  // of recurrent states; see RecurrentStates
  // A token's outputs are the same bits whatever other tokens a pass has and however a prompt is cut into passes, for
  // one number of threads. Without it that holds as well, but for Scaling Transformers: matrices of floats are added up
  // in another order for one token than for several, which is faster.
  bool deterministic = false;
};

}  // namespace tulle
