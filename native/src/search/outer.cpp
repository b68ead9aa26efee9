// accumulate_outer: packs A and B, kPackedPairs pairs of tokens at a time, and hands panel beside panel to the kernel.
//
//     A [T, M], bfloat16                packed: panels of 48 channels, a pair of tokens in one word
//     ┌──────┬──────┬─ ─ ┐              panel 0             panel 1
//     │ t    │      │      tokens       ┌ a[t][0]  a[t+1][0] │ … │ a[t][47]  a[t+1][47] ┐  one row per pair,
//     │ t+1  │      │                   │ a[t+2]…                                       │  zeros beyond T and M
//     └──────┴──────┴─ ─ ┘              └                                               ┘
//
//     total [M, N]: one panel of A beside one of B is 48 x 48 sums, and the work of one thread
//     ┌────┬────┬────┐
//     │ 00 │ 01 │ 02 │   symmetric: only on and above the diagonal; each thread mirrors
//     ├────┼────┼────┤   what it has just finished
//     │    │ 11 │ 12 │
//     └────┴────┴────┘
#include <algorithm>
#include <cstring>
#include <memory>

#include "tulle/search.hpp"

namespace tulle {
namespace {

// Pairs that are packed before they are multiplied: 2.4 MB of 1536 channels.
constexpr std::size_t kPackedPairs = 384;
// Pairs of one call of the kernel: two panels of these, 74 KB, lie in the level-2 cache.
constexpr std::size_t kPairs = 192;
static_assert(kOuterChannels % 16 == 0, "a row of a panel is whole registers");

std::size_t panels_of(std::size_t channels) { return (channels + kOuterChannels - 1) / kOuterChannels; }

// [panels][pairs][kOuterChannels], 64-byte aligned, not initialised.
class Packed {
 public:
  Packed(std::size_t channels, std::size_t pairs) : pairs_(pairs) {
    const std::size_t words = panels_of(channels) * pairs * kOuterChannels;
    std::size_t space = words * sizeof(std::uint32_t) + 64;
    memory_.reset(new std::uint8_t[space]);
    void* start = memory_.get();
    data_ = static_cast<std::uint32_t*>(std::align(64, words * sizeof(std::uint32_t), start, space));
  }
  std::uint32_t* at(std::size_t panel, std::size_t pair) const {
    return data_ + (panel * pairs_ + pair) * kOuterChannels;
  }

 private:
  std::size_t pairs_;
  std::unique_ptr<std::uint8_t[]> memory_;
  std::uint32_t* data_;
};

// Row `pair` of every panel, from tokens t and t + 1 of x [tokens, channels].
void pack_pair(const std::uint16_t* x, std::size_t tokens, std::size_t channels, std::size_t t, std::size_t pair,
               const Packed& to) {
  static const std::uint16_t zeros[kOuterChannels] = {};
  for (std::size_t panel = 0; panel < panels_of(channels); ++panel) {
    const std::size_t c = panel * kOuterChannels, n = std::min(kOuterChannels, channels - c);
    const std::uint16_t* const low = x + t * channels + c;
    const std::uint16_t* const high = t + 1 < tokens ? low + channels : zeros;
    std::uint32_t* const words = to.at(panel, pair);
    for (std::size_t i = 0; i < n; ++i) words[i] = low[i] | static_cast<std::uint32_t>(high[i]) << 16;
    std::fill(words + n, words + kOuterChannels, 0u);
  }
}

}  // namespace

void accumulate_outer(const SearchKernels& kernels, const Outer& o, std::size_t threads) {
  const bool symmetric = o.b == nullptr;
  const std::size_t columns = symmetric ? o.rows : o.columns, all = (o.tokens + 1) / 2;
  const std::size_t room = std::min(std::max<std::size_t>(all, 1), kPackedPairs);
  const Packed a(o.rows, room), other(symmetric ? 0 : columns, room);
  const Packed& b = symmetric ? a : other;
  const std::size_t high = panels_of(o.rows), wide = panels_of(columns);
#pragma omp parallel num_threads(static_cast<int>(threads)) if (threads > 1)
  // Without tokens there is one empty round, which scales the total.
  for (std::size_t first = 0; first == 0 || first < all; first += kPackedPairs) {
    const std::size_t pairs = std::min(all - first, kPackedPairs);
    const bool last = first + pairs == all;
#pragma omp for schedule(static)
    for (std::int64_t i = 0; i < static_cast<std::int64_t>(pairs); ++i) {
      const std::size_t pair = static_cast<std::size_t>(i), t = 2 * (first + pair);
      pack_pair(o.a, o.tokens, o.rows, t, pair, a);
      if (!symmetric) pack_pair(o.b, o.tokens, columns, t, pair, b);
    }
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t i = 0; i < static_cast<std::int64_t>(high * wide); ++i) {
      // All of a column of panels first: B's stays in a near cache.
      const std::size_t p = static_cast<std::size_t>(i) % high, q = static_cast<std::size_t>(i) / high;
      if (symmetric && p > q) continue;
      const std::size_t r = p * kOuterChannels, c = q * kOuterChannels;
      OuterTile tile = {0, nullptr, nullptr, o.total + r * columns + c, columns, std::min(kOuterChannels, o.rows - r),
                        std::min(kOuterChannels, columns - c), o.alpha, first == 0 ? o.beta : 1.0f};
      for (std::size_t k = 0; k == 0 || k < pairs; k += kPairs) {
        tile.pairs = std::min(kPairs, pairs - k);
        tile.a = a.at(p, k);
        tile.b = b.at(q, k);
        kernels.outer(tile);
        tile.beta = 1.0f;
      }
      if (!symmetric || !last) continue;
      for (std::size_t y = 0; y < tile.rows; ++y) {
        for (std::size_t x = p == q ? y + 1 : 0; x < tile.columns; ++x) {
          o.total[(c + x) * columns + r + y] = tile.total[y * columns + x];
        }
      }
    }
  }
}

}  // namespace tulle
