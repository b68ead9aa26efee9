// Products with held masks by AVX-512.
//
//   zmm  sums[0 … 3]   a row's sums of 64 tokens, 16 each
//        weights       four values, loaded at once;  one broadcast per entry
//   step (one entry): sums[v] = fma(weight, panel[column][16v … 16v + 15], sums[v])
#include <immintrin.h>

#include <cstring>

#include "cpu/tables.hpp"

namespace tulle {
namespace {

#include "training/sparse_train_pack.inl"

template <int kIndex, int kVectors>
void add(__m512 (&sums)[kVectors], __m512 weights, const float* panel, std::uint64_t offsets) {
  const __m512 weight = _mm512_permute_ps(weights, kIndex * 0x55);
  const float* x = column<kIndex>(panel, offsets);
  for (int v = 0; v < kVectors; ++v) sums[v] = _mm512_fmadd_ps(weight, _mm512_loadu_ps(x + 16 * v), sums[v]);
}

template <int kVectors>
void multiply_vectors(const SparseBlock& block, const float* values, const float* panel, float* all) {
  const std::uint16_t* offsets = block.offsets;
  for (std::size_t i = 0; i < block.run_count; ++i) {
    float* const row = all + (block.runs[i] >> 8) * kPanelTokens;
    __m512 sums[kVectors];
    for (int v = 0; v < kVectors; ++v) sums[v] = _mm512_loadu_ps(row + 16 * v);
    std::size_t left = block.runs[i] & 255;
    for (; left >= 4; left -= 4, offsets += 4, values += 4) {
      const std::uint64_t four = load4(offsets);
      const __m512 weights = _mm512_broadcast_f32x4(_mm_loadu_ps(values));
      add<0>(sums, weights, panel, four);
      add<1>(sums, weights, panel, four);
      add<2>(sums, weights, panel, four);
      add<3>(sums, weights, panel, four);
    }
    if (left > 0) {
      const std::uint64_t four = load4(offsets);
      const auto mask = static_cast<__mmask8>((1u << left) - 1);
      const __m512 weights = _mm512_broadcast_f32x4(_mm_maskz_loadu_ps(mask, values));
      add<0>(sums, weights, panel, four);
      if (left > 1) add<1>(sums, weights, panel, four);
      if (left > 2) add<2>(sums, weights, panel, four);
      offsets += left;
      values += left;
    }
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(row + 16 * v, sums[v]);
  }
}

void multiply(const SparseBlock& block, const float* values, const float* panel, std::size_t tokens, float* sums) {
  TULLE_BY_VECTORS(multiply_vectors, tokens, block, values, panel, sums)
}

template <int kIndex, int kVectors>
__m512 dot(const __m512 (&row)[kVectors], const float* panel, std::uint64_t offsets) {
  const float* x = column<kIndex>(panel, offsets);
  __m512 sum = _mm512_mul_ps(row[0], _mm512_loadu_ps(x));
  for (int v = 1; v < kVectors; ++v) sum = _mm512_fmadd_ps(row[v], _mm512_loadu_ps(x + 16 * v), sum);
  return sum;
}

__m512 merge(__m512 a, __m512 b) { return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); }

// The sums of the lanes of four vectors.
__m128 reduce(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512d low = _mm512_castps_pd(merge(a, b)), high = _mm512_castps_pd(merge(c, d));
  const __m512 quarters = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)),
                                     _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
  const __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(quarters), 1));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(quarters), upper);
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

using Vector = __m512;
using Lanes = __m512;
constexpr int kParts = 1;
__m512 load(const float* from) { return _mm512_loadu_ps(from); }
Lanes no_lanes() { return _mm512_setzero_ps(); }
__mmask8 lanes(std::size_t n) { return static_cast<__mmask8>((1u << n) - 1); }
__m128 load_first(const float* from, __mmask8 mask) { return _mm_maskz_loadu_ps(mask, from); }
void store_first(float* to, __mmask8 mask, __m128 values) { _mm_mask_storeu_ps(to, mask, values); }

#include "training/sparse_train_correlate.inl"

}  // namespace

const SparseTrainKernels avx512_sparse_train = {pack, unpack, multiply, correlate};

}  // namespace tulle
