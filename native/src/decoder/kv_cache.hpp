// Keys and values of all layers, sequences ("slots") and KV heads. Shared by the decoder and the Scaling Transformer.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/buffer.hpp"
#include "tulle/ops.hpp"

namespace tulle {

// [layer][slot][KV head], of each
//
//   keys     [context / 16][head_dim][16]    one query times 16 keys is head_dim multiply-adds of a vector
//   values   [context][head_dim]
//   scales   [context][4]                    8-bit caches only: step and zero point of the key, of the value
class KvCache {
 public:
  KvCache(CacheKind kind, std::size_t layers, std::size_t slots, std::size_t heads, std::size_t context,
          std::size_t head_dim);

  CacheKind kind() const { return kind_; }
  CacheView view(std::size_t layer, std::size_t slot, std::size_t head) const;

  // Appends the token at `position`. `key_grid`, `value_grid`: of 8-bit caches; one of 0 bits stands for 8 bits,
  // asymmetric.
  void append(const OpsKernels& ops, const CacheView& view, std::size_t position, const float* key, const float* value,
              const Grid& key_grid, const Grid& value_grid) const;

  std::uint64_t bytes() const { return keys_.bytes() + values_.bytes() + scales_.bytes(); }

 private:
  CacheKind kind_;
  std::size_t slots_, heads_, context_, head_dim_;
  Buffer<std::uint8_t> keys_, values_;
  Buffer<float> scales_;
};

}  // namespace tulle
