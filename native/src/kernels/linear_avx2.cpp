// Linears by vpmaddubsw: a chunk of a tile is expanded into the level-1 cache, pruned codes filled in through a table
// of shuffles, and met by the tokens, four at a time.
#include <immintrin.h>

#include <cstring>

#include "tables.hpp"

namespace tulle {
namespace {

#include "linear_common.inl"

// For 8 mask bits: where each of 8 bytes comes from, 0x80 where its bit is clear.
struct Shuffles {
  std::uint8_t from[256][8];
  constexpr Shuffles() : from() {
    for (int mask = 0; mask < 256; ++mask) {
      int next = 0;
      for (int bit = 0; bit < 8; ++bit) {
        from[mask][bit] = static_cast<std::uint8_t>((mask >> bit) & 1 ? next++ : 0x80);
      }
    }
  }
};
constexpr Shuffles kShuffles;

__m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
void store(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

__m256i broadcast4(const std::int8_t* x) {
  std::int32_t four;
  std::memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}

// Two units of 4-bit codes that share bytes.
void unpack_pair(const std::uint8_t* packed, std::uint8_t* codes) {
  const __m256i low = _mm256_set1_epi8(15);
  for (std::size_t i = 0; i < kUnitBytes; i += 32) {
    const __m256i pairs = load(packed + i);
    store(codes + i, _mm256_and_si256(pairs, low));
    store(codes + kUnitBytes + i, _mm256_and_si256(_mm256_srli_epi16(pairs, 4), low));
  }
}

// A unit's codes of those it keeps, pruned ones at their zero point; returns how many it keeps. Reads up to 7 codes more.
std::size_t expand_unit(const std::uint8_t* kept, const std::uint8_t* masks, const std::uint8_t* zeros,
                        std::uint8_t* codes) {
  const std::uint8_t* next = kept;
  for (std::size_t i = 0; i < kUnitBytes; i += 8, ++masks) {
    const __m128i from = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kShuffles.from[*masks]));
    const __m128i values = _mm_shuffle_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(next)), from);
    const __m128i zero = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(zeros + i));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + i), _mm_blendv_epi8(values, zero, from));
    next += _mm_popcnt_u32(*masks);
  }
  return static_cast<std::size_t>(next - kept);
}

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

// Adds Σ over the four inputs of each of 8 outputs. 16-bit sums of two products stay below 2^15: codes of 4 bits are
// at most 15, and 8-bit ones are cut into 7 bits and the highest.
template <bool kNibbles>
__m256i dot(__m256i total, __m256i codes, __m256i x) {
  if constexpr (kNibbles) {
    return _mm256_add_epi32(total, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), _mm256_set1_epi16(1)));
  } else {
    const __m256i low = _mm256_maddubs_epi16(_mm256_and_si256(codes, _mm256_set1_epi8(127)), x);
    const __m256i top = _mm256_and_si256(_mm256_srli_epi16(codes, 7), _mm256_set1_epi8(1));
    const __m256i high = _mm256_maddubs_epi16(top, x);
    total = _mm256_add_epi32(total, _mm256_madd_epi16(low, _mm256_set1_epi16(1)));
    return _mm256_add_epi32(total, _mm256_madd_epi16(high, _mm256_set1_epi16(128)));
  }
}

// kTokens tokens from `token` on with one segment of a tile; sums [tokens][16].
template <bool kNibbles, int kTokens>
void meet(const LinearView& w, const Inputs& x, std::size_t scale, std::size_t segment, std::size_t token,
          const std::uint8_t* codes, float* sums) {
  alignas(32) std::int32_t wide[kTileRows];
  for (std::size_t i = 0; i < kTileRows; ++i) wide[i] = w.zeros ? w.zeros[scale + i] : w.zero;
  __m256 whole[2][kTokens];
  for (auto& half : whole) {
    for (auto& one : half) one = _mm256_setzero_ps();
  }
  for (std::size_t p = 0; p < x.planes; ++p) {
    __m256i total[2][kTokens];
    for (int t = 0; t < kTokens; ++t) {
      const __m256i sum = _mm256_set1_epi32(-x.sums[p][(token + t) * x.sum_stride + segment]);
      for (int h = 0; h < 2; ++h) total[h][t] = _mm256_mullo_epi32(load(wide + 8 * h), sum);
    }
    const std::int8_t* in = x.plane[p] + token * x.stride + segment * w.segment;
    for (std::size_t u = 0; u < w.segment / 4; ++u) {
      const __m256i lower = load(codes + u * kUnitBytes), upper = load(codes + u * kUnitBytes + 32);
      for (int t = 0; t < kTokens; ++t) {
        const __m256i four = broadcast4(in + t * x.stride + 4 * u);
        total[0][t] = dot<kNibbles>(total[0][t], lower, four);
        total[1][t] = dot<kNibbles>(total[1][t], upper, four);
      }
    }
    for (int t = 0; t < kTokens; ++t) {
      for (int h = 0; h < 2; ++h) {
        const __m256 part = _mm256_cvtepi32_ps(total[h][t]);
        whole[h][t] = _mm256_fmadd_ps(whole[h][t], _mm256_set1_ps(256), part);
      }
    }
  }
  for (int h = 0; h < 2; ++h) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w.scales + scale + 8 * h));
    const __m256 scales = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    for (int t = 0; t < kTokens; ++t) {
      float* sum = sums + (token + t) * kTileRows + 8 * h;
      _mm256_store_ps(sum, _mm256_fmadd_ps(whole[h][t], scales, _mm256_load_ps(sum)));
    }
  }
}

template <bool kNibbles>
void run_codes(const LinearView& w, const Inputs& x, std::size_t tile, float* sums, std::uint8_t* scratch) {
  for (std::size_t chunk = 0; chunk < w.chunks(); ++chunk) {
    const std::uint8_t* codes = expand(w, tile, chunk, scratch);
    for (std::size_t s = 0; s < w.segments_of(chunk); ++s, codes += w.segment * kTileRows) {
      const std::size_t segment = chunk * w.chunk_segments() + s;
      const std::size_t scale = (tile * w.scales_per_row() + segment / w.segments_per_scale) * kTileRows;
      std::size_t t = 0;
      for (; t + 4 <= x.tokens; t += 4) meet<kNibbles, 4>(w, x, scale, segment, t, codes, sums);
      for (; t < x.tokens; ++t) meet<kNibbles, 1>(w, x, scale, segment, t, codes, sums);
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

const LinearKernels avx2_linear = {run};

}  // namespace tulle
