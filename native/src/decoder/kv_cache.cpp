#include "decoder/kv_cache.hpp"

#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

namespace tulle {
namespace {

std::size_t key_page_bytes(CacheKind kind, std::size_t d) {
  if (kind == CacheKind::u4) return (d + 1) / 2 * kKeyBlock;
  return d * kKeyBlock * (kind == CacheKind::f32 ? 4 : kind == CacheKind::bf16 ? 2 : 1);
}

std::size_t value_page_bytes(CacheKind kind, std::size_t d) {
  return kind == CacheKind::u4 ? round_up(d, 32) / 2 * kKeyBlock : key_page_bytes(kind, d);
}

// So many of so many bytes or numbers each. Throws std::invalid_argument where that is more than memory has.
template <typename T>
Buffer<T> reserve(std::size_t pages, double each) {
  const double count = static_cast<double>(pages) * each;
  try {
    if (count < 0x1p47) return Buffer<T>(static_cast<std::size_t>(count));
  } catch (const std::bad_alloc&) {
  }
  throw std::invalid_argument("pages of the KV cache: expected as many as memory has room for, found " +
                              std::to_string(pages));
}

}  // namespace

KvCache::KvCache(CacheKind kind, const std::vector<KvSizes>& layers, std::size_t pages) : kind_(kind), pages_(pages) {
  // Of a page, all layers and heads together; whole numbers far beyond any memory.
  double keys = 0, values = 0, heads = 0;
  for (const KvSizes& sizes : layers) {
    const LayerPages found = {sizes, key_page_bytes(kind, sizes.key_dim), value_page_bytes(kind, sizes.value_dim),
                              static_cast<std::size_t>(keys) * pages, static_cast<std::size_t>(values) * pages,
                              static_cast<std::size_t>(heads)};
    layers_.push_back(found);
    heads += static_cast<double>(sizes.heads);
    keys += static_cast<double>(sizes.heads) * static_cast<double>(found.key_bytes);
    values += static_cast<double>(sizes.heads) * static_cast<double>(found.value_bytes);
  }
  keys_ = reserve<std::uint8_t>(pages, keys);
  values_ = reserve<std::uint8_t>(pages, values);
  if (codes()) scales_ = reserve<float>(pages, heads * kPageScales);
  page_bytes_ = static_cast<std::uint64_t>(keys + values + (codes() ? heads * kPageScales * sizeof(float) : 0));
}

CacheView KvCache::view(std::size_t layer, std::size_t head, const std::int32_t* table) const {
  const LayerPages& own = layers_[layer];
  const std::size_t first = head * pages_;
  return {kind_,
          own.sizes.key_dim,
          own.sizes.value_dim,
          keys_.data() + own.keys + first * own.key_bytes,
          values_.data() + own.values + first * own.value_bytes,
          codes() ? scales_.data() + (own.head * pages_ + first) * kPageScales : nullptr,
          own.key_bytes,
          own.value_bytes,
          table};
}

void KvCache::append(const OpsKernels& ops, const CacheView& view, std::size_t position, float* key, float* value,
                     const Grid& key_grid, const Grid& value_grid) const {
  const int bits = kind_ == CacheKind::u8 ? 8 : kind_ == CacheKind::u4 ? 4 : 0;
  const auto range = [&](float* x, std::size_t n, const Grid& grid) {
    // The cache's codes are the grid's where they have room for it.
    if (grid.bits > 0 && grid.bits <= bits) return ops.range(x, n, grid);
    if (grid.bits > 0) ops.fake_quantise(x, n, ops.range(x, n, grid));
    return bits > 0 ? ops.range(x, n, {bits, false, 1.0f}) : GridRange{};
  };
  const GridRange key_range = range(key, view.key_dim, key_grid), value_range = range(value, view.value_dim, value_grid);
  ops.append_to_cache(view, position, key, value, key_range, value_range);
}

void KvCache::copy(std::size_t source, std::size_t target) {
  if (source == target) return;
  const auto move = [&](auto* data, std::size_t size) {
    std::memcpy(data + target * size, data + source * size, size * sizeof *data);
  };
  for (std::size_t layer = 0; layer < layers_.size(); ++layer) {
    for (std::size_t head = 0; head < layers_[layer].sizes.heads; ++head) {
      const CacheView pages = view(layer, head, nullptr);
      move(pages.keys, pages.key_bytes);
      move(pages.values, pages.value_bytes);
      if (codes()) move(pages.scales, kPageScales);
    }
  }
}

}  // namespace tulle
