// Linears by vpmaddubsw: a chunk of a tile is expanded into the level-1 cache, pruned codes filled in through a table
// of shuffles, and met by the tokens, four at a time.
#include <immintrin.h>

#include <cstring>

#include "tables.hpp"

namespace tulle {
namespace {

#include "linear_common.inl"
#include "linear_avx2.inl"

// Codes of a tile's chunk, pruned ones at their zero point.
const std::uint8_t* expand(const LinearView& w, std::size_t tile, std::size_t chunk, std::uint8_t* codes) {
  const std::size_t first = (tile * w.padded() + chunk * w.chunk_segments() * w.segment) * kTileRows;
  const std::size_t per_segment = w.segment * kTileRows, segments = w.segments_of(chunk);
  const bool nibbles = w.kind == WeightKind::codes4;
  if (!w.sparse) {
    if (!nibbles) return w.values + first;
    for (std::size_t i = 0; i < segments * per_segment; i += 2 * kUnitBytes) {
      unpack_pair(w.values + (first + i) / 2, codes + i);
    }
    return codes;
  }
  const std::uint8_t* next = w.values + w.offsets[tile * w.chunks() + chunk];
  const std::uint8_t* masks = w.masks + first / 8;
  for (std::size_t s = 0; s < segments; ++s) {
    const std::size_t scale =
        (tile * w.scales_per_row() + (chunk * w.chunk_segments() + s) / w.segments_per_scale) * kTileRows;
    std::uint8_t zeros[kUnitBytes];
    for (std::size_t i = 0; i < kUnitBytes; ++i) zeros[i] = w.zeros ? w.zeros[scale + i / 4] : w.zero;
    std::uint8_t* to = codes + s * per_segment;
    for (std::size_t i = 0; i < per_segment; i += kPairCodes, masks += kPairCodes / 8, to += kPairCodes) {
      std::uint8_t pair[kPairCodes + 8];
      if (nibbles) unpack_pair(next, pair);
      const std::size_t even = expand_unit(nibbles ? pair : next, masks, zeros, to);
      const std::size_t odd = expand_unit(nibbles ? pair + kUnitBytes : next + even, masks + 8, zeros, to + kUnitBytes);
      next += nibbles ? (even > odd ? even : odd) : even + odd;
    }
  }
  return codes;
}

template <bool kNibbles>
void run_codes(const LinearView& w, const Inputs& x, std::size_t tile, float* sums, std::uint8_t* scratch) {
  for (std::size_t chunk = 0; chunk < w.chunks(); ++chunk) {
    const std::uint8_t* codes = expand(w, tile, chunk, scratch);
    for (std::size_t s = 0; s < w.segments_of(chunk); ++s, codes += w.segment * kTileRows) {
      const std::size_t segment = chunk * w.chunk_segments() + s;
      meet_all<kNibbles>(w, x, tile, segment, codes, sums);
    }
  }
}

// Weights of a tile's chunk as [inputs][16].
void expand_floats(const LinearView& w, std::size_t tile, std::size_t chunk, float* out) {
  const bool half = w.kind == WeightKind::bf16;
  const std::size_t size = half ? 2 : 4, pair = half ? 2 : 1;
  const std::size_t first = (tile * w.padded() + chunk * w.chunk_segments() * w.segment) * kTileRows;
  const std::size_t count = w.segments_of(chunk) * w.segment * kTileRows;
  const std::uint8_t* values = w.values + (w.sparse ? w.offsets[tile * w.chunks() + chunk] : first * size);
  for (std::size_t i = 0; i < count; ++i) {
    std::uint32_t bits = 0;
    if (!w.sparse || ((w.masks[(first + i) / 8] >> (i % 8)) & 1)) {
      std::memcpy(&bits, values, size);
      values += size;
    }
    if (half) bits <<= 16;
    std::memcpy(out + (i / (kTileRows * pair) * pair + i % pair) * kTileRows + i / pair % kTileRows, &bits, 4);
  }
}

template <int kTokens>
void meet_floats(const float* weights, const float* in, std::size_t stride, std::size_t inputs, float* sums) {
  __m256 sum[2][kTokens];
  for (int t = 0; t < kTokens; ++t) {
    for (int h = 0; h < 2; ++h) sum[h][t] = _mm256_load_ps(sums + t * kTileRows + 8 * h);
  }
  for (std::size_t k = 0; k < inputs; ++k) {
    const __m256 lower = _mm256_load_ps(weights + k * kTileRows), upper = _mm256_load_ps(weights + k * kTileRows + 8);
    for (int t = 0; t < kTokens; ++t) {
      const __m256 one = _mm256_set1_ps(in[t * stride + k]);
      sum[0][t] = _mm256_fmadd_ps(lower, one, sum[0][t]);
      sum[1][t] = _mm256_fmadd_ps(upper, one, sum[1][t]);
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    for (int h = 0; h < 2; ++h) _mm256_store_ps(sums + t * kTileRows + 8 * h, sum[h][t]);
  }
}

void run_floats(const LinearView& w, const Inputs& x, std::size_t tile, float* sums, float* weights) {
  for (std::size_t chunk = 0; chunk < w.chunks(); ++chunk) {
    expand_floats(w, tile, chunk, weights);
    const std::size_t inputs = w.segments_of(chunk) * w.segment;
    const float* in = x.floats + chunk * w.chunk_segments() * w.segment;
    std::size_t t = 0;
    for (; t + 4 <= x.tokens; t += 4) meet_floats<4>(weights, in + t * x.stride, x.stride, inputs, sums + t * kTileRows);
    for (; t < x.tokens; ++t) meet_floats<1>(weights, in + t * x.stride, x.stride, inputs, sums + t * kTileRows);
  }
}

void run(const LinearView& w, const Inputs& x, std::size_t first, std::size_t last, float* y, std::size_t y_stride,
         std::uint8_t* scratch) {
  float* const sums = reinterpret_cast<float*>(scratch + kChunkInputs * kTileRows * sizeof(float));
  for (std::size_t tile = first; tile < last; ++tile) {
    std::memset(sums, 0, x.tokens * kTileRows * sizeof(float));
    if (w.kind == WeightKind::codes4) run_codes<true>(w, x, tile, sums, scratch);
    else if (w.kind == WeightKind::codes8) run_codes<false>(w, x, tile, sums, scratch);
    else run_floats(w, x, tile, sums, reinterpret_cast<float*>(scratch));
    for (std::size_t t = 0; t < x.tokens; ++t) {
      for (std::size_t row = 0; row < rows_of(w, tile); ++row) {
        const float sum = sums[t * kTileRows + row];
        y[t * y_stride + tile * kTileRows + row] = w.is_codes() ? sum * x.steps[t] : sum;
      }
    }
  }
}

}  // namespace

const LinearKernels avx2_linear = {run, avx2_run_columns};

}  // namespace tulle
