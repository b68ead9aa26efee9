// Which queries of a pass go over a sequence's keys together, and attention of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "tulle/ops.hpp"

namespace tulle {

// Of one sequence and KV head, `count` query rows from `first` on: row = token · queries per KV head + query head.
// They share one pass over the keys and values.
struct QueryBlock {
  std::size_t first, count;
};

// Vectors of all tokens and heads: of head h of token t at data + t · stride + h · head.
struct Vectors {
  float* data;
  std::size_t stride, head;
};

class Attention {
 public:
  // scale 0: 1 / √head_dim. cap: of scores, 0 for none.
  Attention(std::size_t heads, std::size_t kv_heads, std::size_t head_dim, std::size_t batch, float scale = 0,
            float cap = 0);

  // Groups the query rows of n tokens. Consecutive tokens of one slot share blocks.
  void group(const std::int32_t* slots, std::size_t n);
  const std::vector<QueryBlock>& blocks() const { return blocks_; }
  std::size_t slot_of(const QueryBlock& block, const std::int32_t* slots) const {
    return static_cast<std::size_t>(slots[block.first / shared_]);
  }

  // softmax(scale · q·Kᵀ)·V of a block and KV head: A token at
  // position p sees [p − window + 1, p], or [0, p] where window is 0. `sinks` [heads]: as of OpsKernels::attend.
  // `scores`: kQueries · context floats.
  void run(const OpsKernels& ops, const CacheView& cache, std::size_t kv_head, const QueryBlock& block,
           const std::int32_t* positions, std::size_t window, const Vectors& queries, const Vectors& outputs,
           const float* sinks, float* scores) const;

 private:
  std::size_t shared_;  // queries per KV head
  float scale_, cap_;
  std::vector<QueryBlock> blocks_;
};

}  // namespace tulle
