// The largest logits, recomputed with the head as it was stored.
#pragma once

#include <algorithm>
#include <cstddef>

#include "tulle/engine.hpp"

namespace tulle {

// logits[i] ← exact(i) for the kExactLogits largest of them.
template <typename Exact>
void recompute_top_logits(float* logits, std::size_t vocabulary, const Exact& exact) {
  std::size_t largest[kExactLogits];  // a heap, the least of them first
  std::size_t count = 0;
  const auto above = [logits](std::size_t a, std::size_t b) { return logits[a] > logits[b]; };
  for (std::size_t i = 0; i < vocabulary; ++i) {
    if (count < kExactLogits) {
      largest[count++] = i;
      std::push_heap(largest, largest + count, above);
    } else if (logits[i] > logits[largest[0]]) {
      std::pop_heap(largest, largest + count, above);
      largest[count - 1] = i;
      std::push_heap(largest, largest + count, above);
    }
  }
  for (std::size_t k = 0; k < count; ++k) logits[largest[k]] = exact(largest[k]);
}

}  // namespace tulle
