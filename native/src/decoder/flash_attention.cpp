// flash_attention: packs keys and values of every KV head, then hands tiles of queries to the kernel.
//
//     keys [T, d]                 packed, per half block of 64 keys          values, per block of 128 keys
//     ┌ k0: c0 c1 c2 … ┐          ┌ k0[c0 c1]  k1[c0 c1] … k63[c0 c1] ┐     ┌ c0[k0 k1]  c1[k0 k1] … ┐
//     │ k1: c0 c1 c2 … │    →     │ k0[c2 c3]  …                       │     │ c0[k2 k3]  …            │
//     └ …              ┘          └ …          zeros beyond T          ┘     └ …                       ┘
//
// A query's channels, and later its probabilities, are read as words of two: one word times one row of a packed block
// is 64 keys' products with two channels, or 64 channels' products with two keys.
#include "tulle/flash_attention.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

namespace tulle {
namespace {

constexpr std::size_t kHalf = kFlashKeys / 2;
constexpr std::size_t kTilesPerTask = 8;

void pack_keys(const FlashAttention& a, std::size_t b, std::size_t h, std::size_t block, std::uint32_t* to) {
  const std::size_t first = block * kFlashKeys, pairs = a.head_dim / 2;
  for (std::size_t key = 0; key < kFlashKeys; ++key) {
    std::uint32_t* const column = to + key / kHalf * pairs * kHalf + key % kHalf;
    if (first + key >= a.tokens) {
      for (std::size_t i = 0; i < pairs; ++i) column[i * kHalf] = 0;
      continue;
    }
    const std::uint16_t* const from = a.k.at(b, h, first + key);
    for (std::size_t i = 0; i < pairs; ++i) std::memcpy(column + i * kHalf, from + 2 * i, sizeof *column);
  }
}

void pack_values(const FlashAttention& a, std::size_t b, std::size_t h, std::size_t block, std::uint32_t* to) {
  static const std::uint16_t zeros[kFlashChannels] = {};
  const std::size_t first = block * kFlashKeys;
  for (std::size_t pair = 0; pair < kHalf; ++pair, to += a.head_dim) {
    const std::size_t t = first + 2 * pair;
    const std::uint16_t* const low = t < a.tokens ? a.v.at(b, h, t) : zeros;
    const std::uint16_t* const high = t + 1 < a.tokens ? a.v.at(b, h, t + 1) : zeros;
    for (std::size_t i = 0; i < a.head_dim; ++i) to[i] = low[i] | static_cast<std::uint32_t>(high[i]) << 16;
  }
}

}  // namespace

void flash_attention(FlashKernel kernel, const FlashAttention& a, std::size_t threads) {
  if (a.batch == 0 || a.heads == 0 || a.tokens == 0) return;
  const std::size_t blocks = (a.tokens + kFlashKeys - 1) / kFlashKeys;
  const std::size_t words = blocks * kHalf * a.head_dim, kv = a.batch * a.kv_heads;  // words: of one KV head
  std::vector<std::uint32_t> keys(kv * words), values(kv * words);
  const std::size_t rows = kTilesPerTask * kFlashQueries, groups = (a.tokens + rows - 1) / rows;
  const std::size_t shared = a.heads / a.kv_heads;
#pragma omp parallel num_threads(static_cast<int>(threads)) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (std::int64_t i = 0; i < static_cast<std::int64_t>(kv * blocks); ++i) {
      const std::size_t head = static_cast<std::size_t>(i) / blocks, block = static_cast<std::size_t>(i) % blocks;
      const std::size_t at = head * words + block * kHalf * a.head_dim;
      pack_keys(a, head / a.kv_heads, head % a.kv_heads, block, keys.data() + at);
      pack_values(a, head / a.kv_heads, head % a.kv_heads, block, values.data() + at);
    }
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t i = 0; i < static_cast<std::int64_t>(a.batch * a.heads * groups); ++i) {
      // The last queries see most keys: they go first.
      const std::size_t task = static_cast<std::size_t>(i), group = groups - 1 - task / (a.batch * a.heads);
      const std::size_t head = task % (a.batch * a.heads), b = head / a.heads, h = head % a.heads;
      const std::size_t at = (b * a.kv_heads + h / shared) * words;
      for (std::size_t first = group * rows; first < std::min(group * rows + rows, a.tokens); first += kFlashQueries) {
        FlashTile tile = {std::min(kFlashQueries, a.tokens - first), {}, {}, first, a.window, a.head_dim, keys.data() + at, values.data() + at, a.scale};
        std::uint32_t copy[kFlashQueries][kFlashChannels / 2];
        for (std::size_t r = 0; r < kFlashQueries; ++r) {
          const std::size_t t = std::min(first + r, a.tokens - 1);
          std::memcpy(copy[r], a.q.at(b, h, t), a.head_dim * sizeof(std::uint16_t));
          tile.queries[r] = copy[r];
          tile.out[r] = a.out.at(b, h, t);
        }
        kernel(tile);
      }
    }
  }
}

}  // namespace tulle
