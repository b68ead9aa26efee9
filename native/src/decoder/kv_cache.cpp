#include "decoder/kv_cache.hpp"

namespace tulle {
namespace {

constexpr Grid kPlain{8, false, 1.0f};

std::size_t item_bytes(CacheKind kind) { return kind == CacheKind::f32 ? 4 : kind == CacheKind::bf16 ? 2 : 1; }

}  // namespace

KvCache::KvCache(CacheKind kind, std::size_t layers, std::size_t slots, std::size_t heads, std::size_t context,
                 std::size_t head_dim)
    : kind_(kind), slots_(slots), heads_(heads), context_(context), head_dim_(head_dim),
      keys_(layers * slots * heads * context * head_dim * item_bytes(kind)),
      values_(layers * slots * heads * context * head_dim * item_bytes(kind)) {
  if (kind == CacheKind::u8) scales_ = Buffer<float>(layers * slots * heads * context * 4);
}

CacheView KvCache::view(std::size_t layer, std::size_t slot, std::size_t head) const {
  const std::size_t index = ((layer * slots_ + slot) * heads_ + head) * context_;
  const std::size_t bytes = index * head_dim_ * item_bytes(kind_);
  return {kind_, head_dim_, keys_.data() + bytes, values_.data() + bytes,
          kind_ == CacheKind::u8 ? scales_.data() + index * 4 : nullptr};
}

void KvCache::append(const OpsKernels& ops, const CacheView& view, std::size_t position, const float* key,
                     const float* value, const Grid& key_grid, const Grid& value_grid) const {
  GridRange key_range{}, value_range{};
  if (kind_ == CacheKind::u8) {
    key_range = ops.range(key, head_dim_, key_grid.bits ? key_grid : kPlain);
    value_range = ops.range(value, head_dim_, value_grid.bits ? value_grid : kPlain);
  }
  ops.append_to_cache(view, position, key, value, key_range, value_range);
}

}  // namespace tulle
