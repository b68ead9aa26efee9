#include "decoder/attention.hpp"

#include <algorithm>
#include <cmath>

namespace tulle {

Attention::Attention(std::size_t heads, std::size_t kv_heads, std::size_t head_dim, std::size_t batch, float scale,
                     float cap)
    : shared_(heads / kv_heads), scale_(scale != 0 ? scale : 1.0f / std::sqrt(static_cast<float>(head_dim))), cap_(cap) {
  blocks_.reserve(batch * shared_);
}

void Attention::group(const std::int32_t* slots, std::size_t n) {
  blocks_.clear();
  for (std::size_t t = 0; t < n;) {
    std::size_t same = t + 1;
    while (same < n && slots[same] == slots[t]) ++same;
    for (std::size_t row = t * shared_; row < same * shared_; row += kQueries) {
      blocks_.push_back({row, std::min(kQueries, same * shared_ - row)});
    }
    t = same;
  }
}

void Attention::run(const OpsKernels& ops, const CacheView& cache, std::size_t kv_head, const QueryBlock& block,
                    const std::int32_t* positions, std::size_t window, const Vectors& queries, const Vectors& outputs,
                    const float* sinks, float* scores) const {
  const float* from[kQueries];
  float sink[kQueries];
  float* to[kQueries];
  std::size_t begin[kQueries], end[kQueries];
  for (std::size_t r = 0; r < block.count; ++r) {
    const std::size_t row = block.first + r, t = row / shared_;
    const std::size_t head = kv_head * shared_ + row % shared_;
    if (sinks != nullptr) sink[r] = sinks[head];
    from[r] = queries.data + t * queries.stride + head * queries.head;
    to[r] = outputs.data + t * outputs.stride + head * outputs.head;
    end[r] = static_cast<std::size_t>(positions[t]) + 1;
    begin[r] = window != 0 && end[r] > window ? end[r] - window : 0;
  }
  ops.attend(cache, block.count, from, nullptr, begin, end, scale_, cap_, sinks != nullptr ? sink : nullptr, to, scores);
}

}  // namespace tulle
