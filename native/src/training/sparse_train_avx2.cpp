// Products with held masks by AVX2.
//
//   ymm  sums[0 … 7]   a row's sums of 64 tokens, 8 each
//        weights       four values, loaded at once;  one broadcast per entry
//   step (one entry): sums[h] = fma(weight, panel[column][8h … 8h + 7], sums[h])
#include <immintrin.h>

#include <cstring>

#include "cpu/tables.hpp"

namespace tulle {
namespace {

#include "training/sparse_train_pack.inl"

// The first n of 4 lanes.
__m128i lanes(std::size_t n) {
  return _mm_cmpgt_epi32(_mm_set1_epi32(static_cast<int>(n)), _mm_setr_epi32(0, 1, 2, 3));
}

template <int kIndex, int kHalves>
void add(__m256 (&sums)[kHalves], __m256 weights, const float* panel, std::uint64_t offsets) {
  const __m256 weight = _mm256_permute_ps(weights, kIndex * 0x55);
  const float* x = column<kIndex>(panel, offsets);
  for (int h = 0; h < kHalves; ++h) sums[h] = _mm256_fmadd_ps(weight, _mm256_loadu_ps(x + 8 * h), sums[h]);
}

template <int kVectors>
void multiply_vectors(const SparseBlock& block, const float* values, const float* panel, float* all) {
  const std::uint16_t* offsets = block.offsets;
  for (std::size_t i = 0; i < block.run_count; ++i) {
    float* const row = all + (block.runs[i] >> 8) * kPanelTokens;
    __m256 sums[2 * kVectors];
    for (int h = 0; h < 2 * kVectors; ++h) sums[h] = _mm256_loadu_ps(row + 8 * h);
    std::size_t left = block.runs[i] & 255;
    for (; left >= 4; left -= 4, offsets += 4, values += 4) {
      const std::uint64_t four = load4(offsets);
      const __m128 loaded = _mm_loadu_ps(values);
      const __m256 weights = _mm256_set_m128(loaded, loaded);
      add<0>(sums, weights, panel, four);
      add<1>(sums, weights, panel, four);
      add<2>(sums, weights, panel, four);
      add<3>(sums, weights, panel, four);
    }
    if (left > 0) {
      const std::uint64_t four = load4(offsets);
      const __m128 loaded = _mm_maskload_ps(values, lanes(left));
      const __m256 weights = _mm256_set_m128(loaded, loaded);
      add<0>(sums, weights, panel, four);
      if (left > 1) add<1>(sums, weights, panel, four);
      if (left > 2) add<2>(sums, weights, panel, four);
      offsets += left;
      values += left;
    }
    for (int h = 0; h < 2 * kVectors; ++h) _mm256_storeu_ps(row + 8 * h, sums[h]);
  }
}

void multiply(const SparseBlock& block, const float* values, const float* panel, std::size_t tokens, float* sums) {
  TULLE_BY_VECTORS(multiply_vectors, tokens, block, values, panel, sums)
}

// 16 lanes.
struct Lanes {
  __m256 half[2];
};

template <int kIndex, int kHalves>
Lanes dot(const __m256 (&row)[kHalves], const float* panel, std::uint64_t offsets) {
  const float* x = column<kIndex>(panel, offsets);
  Lanes sum;
  for (int h = 0; h < 2; ++h) {
    sum.half[h] = _mm256_mul_ps(row[h], _mm256_loadu_ps(x + 8 * h));
    for (int v = h + 2; v < kHalves; v += 2) {
      sum.half[h] = _mm256_fmadd_ps(row[v], _mm256_loadu_ps(x + 8 * v), sum.half[h]);
    }
  }
  return sum;
}

__m256 merge(__m256 a, __m256 b) { return _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)); }

__m256 merge_pairs(__m256 a, __m256 b) {
  const __m256d low = _mm256_castps_pd(a), high = _mm256_castps_pd(b);
  return _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(low, high)),
                       _mm256_castpd_ps(_mm256_unpackhi_pd(low, high)));
}

// The sums of the lanes of four.
__m128 reduce(const Lanes& a, const Lanes& b, const Lanes& c, const Lanes& d) {
  __m256 quarters[2];
  for (int h = 0; h < 2; ++h) {
    quarters[h] = merge_pairs(merge(a.half[h], b.half[h]), merge(c.half[h], d.half[h]));
  }
  const __m256 half = _mm256_add_ps(quarters[0], quarters[1]);
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

using Vector = __m256;
constexpr int kParts = 2;
__m256 load(const float* from) { return _mm256_loadu_ps(from); }
Lanes no_lanes() { return {{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
__m128 load_first(const float* from, __m128i mask) { return _mm_maskload_ps(from, mask); }
void store_first(float* to, __m128i mask, __m128 values) { _mm_maskstore_ps(to, mask, values); }

#include "training/sparse_train_correlate.inl"

}  // namespace

const SparseTrainKernels avx2_sparse_train = {pack, unpack, multiply, correlate};

}  // namespace tulle
