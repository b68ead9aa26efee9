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

// [layer][head][page] of `each`. Throws std::invalid_argument where that is more than memory has.
template <typename T>
Buffer<T> reserve(std::size_t layers, std::size_t pages, std::size_t heads, std::size_t each) {
  const double count = static_cast<double>(layers) * static_cast<double>(pages) * static_cast<double>(heads) *
                       static_cast<double>(each);
  try {
    if (count < 0x1p47) return Buffer<T>(layers * pages * heads * each);
  } catch (const std::bad_alloc&) {
  }
  throw std::invalid_argument("pages of the KV cache: expected as many as memory has room for, found " +
                              std::to_string(pages));
}

}  // namespace

KvCache::KvCache(CacheKind kind, std::size_t layers, std::size_t pages, std::size_t heads, std::size_t key_dim,
                 std::size_t value_dim)
    : kind_(kind), layers_(layers), pages_(pages), heads_(heads), key_dim_(key_dim), value_dim_(value_dim),
      key_bytes_(key_page_bytes(kind, key_dim)), value_bytes_(value_page_bytes(kind, value_dim)),
      keys_(reserve<std::uint8_t>(layers, pages, heads, key_bytes_)),
      values_(reserve<std::uint8_t>(layers, pages, heads, value_bytes_)) {
  if (codes()) scales_ = reserve<float>(layers, pages, heads, kPageScales);
}

CacheView KvCache::view(std::size_t layer, std::size_t head, const std::int32_t* table) const {
  const std::size_t first = (layer * heads_ + head) * pages_;
  return {kind_,
          key_dim_,
          value_dim_,
          keys_.data() + first * key_bytes_,
          values_.data() + first * value_bytes_,
          codes() ? scales_.data() + first * kPageScales : nullptr,
          key_bytes_,
          value_bytes_,
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
  const GridRange key_range = range(key, key_dim_, key_grid), value_range = range(value, value_dim_, value_grid);
  ops.append_to_cache(view, position, key, value, key_range, value_range);
}

void KvCache::copy(std::size_t source, std::size_t target) {
  if (source == target) return;
  for (std::size_t first = 0; first < layers_ * heads_ * pages_; first += pages_) {
    const auto move = [&](auto* data, std::size_t size) {
      std::memcpy(data + (first + target) * size, data + (first + source) * size, size * sizeof *data);
    };
    move(keys_.data(), key_bytes_);
    move(values_.data(), value_bytes_);
    if (codes()) move(scales_.data(), kPageScales);
  }
}

std::uint64_t KvCache::page_bytes() const {
  const std::size_t scales = codes() ? kPageScales * sizeof(float) : 0;
  return static_cast<std::uint64_t>(layers_) * heads_ * (key_bytes_ + value_bytes_ + scales);
}

}  // namespace tulle
