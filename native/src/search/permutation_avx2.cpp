// Scores of swaps by AVX2.
//
//    8 bits   vpsubusb(value, limit): max(0, ·) of 32 rows; vpsadbw adds 8 of them into each of four 64-bit sums
//   16 bits   vpsubusw of 16 rows; vpmaddwd with ones adds pairs into 32 bits
#include <immintrin.h>

#include "cpu/tables.hpp"

namespace tulle {
namespace {

#include "search/stripe_limits.inl"

std::uint64_t add_lanes(__m256i sums) {
  alignas(32) std::uint64_t lanes[4];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sums);
  return lanes[0] + lanes[1] + lanes[2] + lanes[3];
}

__m256i load(const void* from) { return _mm256_load_si256(static_cast<const __m256i*>(from)); }

std::uint64_t excess8(const std::uint8_t* values, const std::uint8_t* limits, std::size_t n) {
  const __m256i zero = _mm256_setzero_si256();
  __m256i a = zero, b = zero;
  for (std::size_t i = 0; i < n; i += 64) {
    a = _mm256_add_epi64(a, _mm256_sad_epu8(_mm256_subs_epu8(load(values + i), load(limits + i)), zero));
    b = _mm256_add_epi64(b, _mm256_sad_epu8(_mm256_subs_epu8(load(values + i + 32), load(limits + i + 32)), zero));
  }
  return add_lanes(_mm256_add_epi64(a, b));
}

std::uint64_t excess16(const std::int16_t* values, const std::int16_t* limits, std::size_t n) {
  const __m256i ones = _mm256_set1_epi16(1), low = _mm256_set1_epi64x(0xffffffff);
  __m256i sums = _mm256_setzero_si256();
  for (std::size_t start = 0; start < n; start += 1 << 18) {  // 2^14 sums of two below 2^16 fit 32 bits
    const std::size_t end = n - start < (1 << 18) ? n : start + (1 << 18);
    __m256i part = _mm256_setzero_si256();
    for (std::size_t i = start; i < end; i += 16) {
      part = _mm256_add_epi32(part, _mm256_madd_epi16(_mm256_subs_epu16(load(values + i), load(limits + i)), ones));
    }
    sums = _mm256_add_epi64(sums, _mm256_add_epi64(_mm256_and_si256(part, low), _mm256_srli_epi64(part, 32)));
  }
  return add_lanes(sums);
}

}  // namespace

const PermutationKernels avx2_permutation = {
    {excess8, stripe_limits<std::uint8_t>},
    {excess16, stripe_limits<std::int16_t>},
};

}  // namespace tulle
