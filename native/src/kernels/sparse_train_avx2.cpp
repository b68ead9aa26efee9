// Products with held masks: eight vectors of 8 tokens in registers, weights and places four at a time.
#include <immintrin.h>

#include <cstring>

#include "tables.hpp"

namespace tulle {
namespace {

#include "sparse_train_pack.inl"

std::uint64_t load4(const std::uint16_t* places) {
  std::uint64_t four;
  std::memcpy(&four, places, sizeof four);
  return four;
}

template <int kIndex>
const float* column(const float* panel, std::uint64_t places) {
  return panel + static_cast<std::uint16_t>(places >> (16 * kIndex));
}

// The first n of 4 lanes.
__m128i lanes(std::size_t n) {
  return _mm_cmpgt_epi32(_mm_set1_epi32(static_cast<int>(n)), _mm_setr_epi32(0, 1, 2, 3));
}

template <int kIndex, int kHalves>
void add(__m256 (&sums)[kHalves], __m256 weights, const float* panel, std::uint64_t places) {
  const __m256 weight = _mm256_permute_ps(weights, kIndex * 0x55);
  const float* x = column<kIndex>(panel, places);
  for (int h = 0; h < kHalves; ++h) sums[h] = _mm256_fmadd_ps(weight, _mm256_loadu_ps(x + 8 * h), sums[h]);
}

template <int kVectors>
void multiply_vectors(const SparseBlock& block, const float* values, const float* panel, float* all) {
  const std::uint16_t* places = block.places;
  for (std::size_t i = 0; i < block.run_count; ++i) {
    float* const row = all + (block.runs[i] >> 8) * kPanelTokens;
    __m256 sums[2 * kVectors];
    for (int h = 0; h < 2 * kVectors; ++h) sums[h] = _mm256_loadu_ps(row + 8 * h);
    std::size_t left = block.runs[i] & 255;
    for (; left >= 4; left -= 4, places += 4, values += 4) {
      const std::uint64_t four = load4(places);
      const __m128 loaded = _mm_loadu_ps(values);
      const __m256 weights = _mm256_set_m128(loaded, loaded);
      add<0>(sums, weights, panel, four);
      add<1>(sums, weights, panel, four);
      add<2>(sums, weights, panel, four);
      add<3>(sums, weights, panel, four);
    }
    if (left > 0) {
      const std::uint64_t four = load4(places);
      const __m128 loaded = _mm_maskload_ps(values, lanes(left));
      const __m256 weights = _mm256_set_m128(loaded, loaded);
      add<0>(sums, weights, panel, four);
      if (left > 1) add<1>(sums, weights, panel, four);
      if (left > 2) add<2>(sums, weights, panel, four);
      places += left;
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
Lanes dot(const __m256 (&row)[kHalves], const float* panel, std::uint64_t places) {
  const float* x = column<kIndex>(panel, places);
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
  __m256 fours[2];
  for (int h = 0; h < 2; ++h) {
    fours[h] = merge_pairs(merge(a.half[h], b.half[h]), merge(c.half[h], d.half[h]));
  }
  const __m256 half = _mm256_add_ps(fours[0], fours[1]);
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

template <int kVectors, bool kAdd>
void correlate_vectors(const SparseBlock& block, const float* panel, const float* gradients, float* values) {
  const std::uint16_t* places = block.places;
  for (std::size_t i = 0; i < block.run_count; ++i) {
    const float* const from = gradients + (block.runs[i] >> 8) * kPanelTokens;
    __m256 row[2 * kVectors];
    for (int h = 0; h < 2 * kVectors; ++h) row[h] = _mm256_loadu_ps(from + 8 * h);
    std::size_t left = block.runs[i] & 255;
    for (; left >= 4; left -= 4, places += 4, values += 4) {
      const std::uint64_t four = load4(places);
      const __m128 sum = reduce(dot<0>(row, panel, four), dot<1>(row, panel, four), dot<2>(row, panel, four),
                                dot<3>(row, panel, four));
      _mm_storeu_ps(values, kAdd ? _mm_add_ps(_mm_loadu_ps(values), sum) : sum);
    }
    if (left > 0) {
      const std::uint64_t four = load4(places);
      const __m128i mask = lanes(left);
      const Lanes zero = {{_mm256_setzero_ps(), _mm256_setzero_ps()}};
      const __m128 sum = reduce(dot<0>(row, panel, four), left > 1 ? dot<1>(row, panel, four) : zero,
                                left > 2 ? dot<2>(row, panel, four) : zero, zero);
      _mm_maskstore_ps(values, mask, kAdd ? _mm_add_ps(_mm_maskload_ps(values, mask), sum) : sum);
      places += left;
      values += left;
    }
  }
}

template <int kVectors>
void correlate_vectors(const SparseBlock& block, const float* panel, const float* gradients, bool add, float* values) {
  if (add) return correlate_vectors<kVectors, true>(block, panel, gradients, values);
  return correlate_vectors<kVectors, false>(block, panel, gradients, values);
}

void correlate(const SparseBlock& block, const float* panel, const float* gradients, std::size_t tokens, bool add,
               float* values) {
  TULLE_BY_VECTORS(correlate_vectors, tokens, block, panel, gradients, add, values)
}

}  // namespace

const SparseTrainKernels avx2_sparse_train = {pack, unpack, multiply, correlate};

}  // namespace tulle
