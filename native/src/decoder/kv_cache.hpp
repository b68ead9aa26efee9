// Keys and values of all layers and KV heads, in pages of kKeyBlock tokens. Which pages a sequence has is said with every
// pass (PassInput::tables). Shared by the decoder and the Scaling Transformer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/buffer.hpp"
#include "tulle/ops.hpp"

namespace tulle {

// Of a layer: KV heads, and channels of a key and of a value.
struct KvSizes {
  std::size_t heads, key_dim, value_dim;
};

// [layer][KV head][page] of what CacheView describes: pages that follow each other are one run of memory.
class KvCache {
 public:
  // Reserved at once, and only as resident as it is used. Throws std::invalid_argument for sizes that no memory holds.
  KvCache(CacheKind kind, const std::vector<KvSizes>& layers, std::size_t pages);

  std::size_t pages() const { return pages_; }
  // `table`: the pages of a sequence.
  CacheView view(std::size_t layer, std::size_t head, const std::int32_t* table) const;

  // Appends the token at `position`. `key_grid`, `value_grid`: the model's; one of 0 bits is none. Numbers on a grid of
  // as many bits as a cache of codes has, or fewer, are kept exactly; others on a plain asymmetric one.
  void append(const OpsKernels& ops, const CacheView& view, std::size_t position, float* key, float* value,
              const Grid& key_grid, const Grid& value_grid) const;
  // Page `target` becomes what page `source` is.
  void copy(std::size_t source, std::size_t target);

  std::uint64_t page_bytes() const { return page_bytes_; }
  std::uint64_t bytes() const { return page_bytes() * pages_; }

 private:
  struct LayerPages {
    KvSizes sizes;
    std::size_t key_bytes, value_bytes;  // of a page and head
    std::size_t keys, values, head;      // where they begin: bytes of keys and of values, and KV heads of all before
  };

  bool codes() const { return kind_ == CacheKind::u8 || kind_ == CacheKind::u4; }

  CacheKind kind_;
  std::size_t pages_;
  std::vector<LayerPages> layers_;
  std::uint64_t page_bytes_ = 0;
  Buffer<std::uint8_t> keys_, values_;
  Buffer<float> scales_;
};

}  // namespace tulle
