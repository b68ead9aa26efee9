// The tile of accumulate_outer with AVX-512 BF16: vdpbf16ps multiplies the two bfloat16 of a word with those of another
// and adds both products to a float32 lane. It rounds to nearest even and takes denormals for zero.
//
//     8 channels of A x 48 of B = 24 of the 32 registers hold sums:
//
//                      b[pair][c…c+15]  b[…+16…]  b[…+32…]      3 registers, loaded once per pair
//     a[pair][r]   →   sum 0 0          sum 0 1   sum 0 2
//     a[pair][r+1] →   sum 1 0          sum 1 1   sum 1 2       one word of A in all lanes, 8 times per pair
//     …
//     a[pair][r+7] →   sum 7 0          sum 7 1   sum 7 2
//
// Six of these, one below the other, are a tile. 24 sums are enough to hide the instruction's latency, and 11 loads
// per 24 products leave the load ports half idle.
#include <immintrin.h>

#include <algorithm>

#include "tables.hpp"

namespace tulle {
namespace {

constexpr std::size_t kRows = 8, kVectors = kOuterChannels / 16;
static_assert(kOuterChannels % kRows == 0, "a tile is whole groups of rows");

static inline __m512 multiply(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

void outer(const OuterTile& tile) {
  const __m512 alpha = _mm512_set1_ps(tile.alpha), beta = _mm512_set1_ps(tile.beta);
  for (std::size_t r = 0; r < tile.rows; r += kRows) {
    __m512 sum[kRows][kVectors];
    for (auto& row : sum) {
      for (__m512& s : row) s = _mm512_setzero_ps();
    }
    const std::uint32_t *a = tile.a + r, *b = tile.b;
    for (std::size_t k = 0; k < tile.pairs; ++k, a += kOuterChannels, b += kOuterChannels) {
      __m512i right[kVectors];
      for (std::size_t v = 0; v < kVectors; ++v) right[v] = _mm512_load_si512(b + 16 * v);
      for (std::size_t i = 0; i < kRows; ++i) {
        const __m512i left = _mm512_set1_epi32(static_cast<int>(a[i]));
        for (std::size_t v = 0; v < kVectors; ++v) sum[i][v] = multiply(sum[i][v], left, right[v]);
      }
    }
    for (std::size_t i = 0; i < kRows; ++i) {
      if (r + i >= tile.rows) break;
      for (std::size_t v = 0; v < kVectors; ++v) {
        if (16 * v >= tile.columns) break;
        const std::size_t left = std::min<std::size_t>(16, tile.columns - 16 * v);
        const auto lanes = static_cast<__mmask16>((1u << left) - 1);
        float* const to = tile.total + (r + i) * tile.stride + 16 * v;
        const __m512 before = _mm512_mul_ps(beta, _mm512_maskz_loadu_ps(lanes, to));
        _mm512_mask_storeu_ps(to, lanes, _mm512_fmadd_ps(alpha, sum[i][v], before));
      }
    }
  }
}

}  // namespace

const OuterKernel avx512bf16_outer = outer;

}  // namespace tulle
