// Scores of swaps by AVX-512.
//
//    8 bits   vpsubusb(value, limit): max(0, ·) of 64 rows; vpsadbw adds 8 of them into each of eight 64-bit sums
//   16 bits   vpsubusw of 32 rows; vpmaddwd with ones adds pairs into 32 bits
#include <immintrin.h>

#include "cpu/tables.hpp"

namespace tulle {
namespace {

#include "search/stripe_limits.inl"

std::size_t least(std::size_t a, std::size_t b) { return a < b ? a : b; }

std::uint64_t excess8(const std::uint8_t* values, const std::uint8_t* limits, std::size_t n) {
  const __m512i zero = _mm512_setzero_si512();
  __m512i sums = zero;
  for (std::size_t i = 0; i < n; i += 64) {
    const __m512i above = _mm512_subs_epu8(_mm512_load_si512(values + i), _mm512_load_si512(limits + i));
    sums = _mm512_add_epi64(sums, _mm512_sad_epu8(above, zero));
  }
  return static_cast<std::uint64_t>(_mm512_reduce_add_epi64(sums));
}

std::uint64_t excess16(const std::int16_t* values, const std::int16_t* limits, std::size_t n) {
  const __m512i ones = _mm512_set1_epi16(1), low = _mm512_set1_epi64(0xffffffff);
  __m512i sums = _mm512_setzero_si512();
  for (std::size_t start = 0; start < n; start += 1 << 19) {  // 2^14 sums of two below 2^16 fit 32 bits
    const std::size_t end = least(n, start + (1 << 19));
    __m512i part = _mm512_setzero_si512();
    for (std::size_t i = start; i < end; i += 32) {
      const __m512i above = _mm512_subs_epu16(_mm512_load_si512(values + i), _mm512_load_si512(limits + i));
      part = _mm512_add_epi32(part, _mm512_madd_epi16(above, ones));
    }
    sums = _mm512_add_epi64(sums, _mm512_add_epi64(_mm512_and_si512(part, low), _mm512_srli_epi64(part, 32)));
  }
  return static_cast<std::uint64_t>(_mm512_reduce_add_epi64(sums));
}

}  // namespace

const PermutationKernels avx512_permutation = {
    {excess8, stripe_limits<std::uint8_t>},
    {excess16, stripe_limits<std::int16_t>},
};

}  // namespace tulle
