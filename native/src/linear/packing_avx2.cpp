// Packing by AVX2, which has no expand or compress instruction: dispatch.cpp fills the mask kernels in from the scalar
// table.
//
//   ymm  lanes of 16 bits  [lo | hi << 8]  or'ed with itself >> 4  ─►  [lo | hi << 4 | …], the low bytes packed
#include <immintrin.h>

#include <cstring>

#include "cpu/tables.hpp"

namespace tulle {
namespace {

std::uint8_t pack_nibbles(const std::uint8_t* codes, std::size_t n, std::uint8_t* packed) {
  const std::size_t whole = n / 64 * 64;
  __m256i any = _mm256_setzero_si256();
  const __m256i low_bytes = _mm256_set1_epi16(0x00ff);
  for (std::size_t i = 0; i < whole; i += 64) {
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i));
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i + 32));
    any = _mm256_or_si256(any, _mm256_or_si256(a, b));
    // A 16-bit lane holds low + high * 256; or-ing it with itself >> 4 leaves low | high << 4 in its low byte.
    const __m256i pa = _mm256_and_si256(_mm256_or_si256(a, _mm256_srli_epi16(a, 4)), low_bytes);
    const __m256i pb = _mm256_and_si256(_mm256_or_si256(b, _mm256_srli_epi16(b, 4)), low_bytes);
    // packus interleaves the 128-bit halves; the permutation puts them back in order.
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(pa, pb), _MM_SHUFFLE(3, 1, 2, 0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(packed + i / 2), bytes);
  }
  alignas(32) std::uint8_t lanes[32];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), any);
  std::uint8_t seen = scalar_packing.pack_nibbles(codes + whole, n - whole, packed + whole / 2);
  for (std::uint8_t lane : lanes) seen |= lane;
  return seen;
}

void unpack_nibbles(const std::uint8_t* packed, std::size_t n, std::uint8_t* codes) {
  const std::size_t whole = n / 32 * 32;
  const __m256i nibbles = _mm256_set1_epi8(0x0f);
  for (std::size_t i = 0; i < whole; i += 32) {
    const __m256i w =
        _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + i / 2)));
    // w | w << 4 has the low nibble in bits 0..3 and the high one in bits 8..11.
    const __m256i pair = _mm256_and_si256(_mm256_or_si256(w, _mm256_slli_epi16(w, 4)), nibbles);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i), pair);
  }
  scalar_packing.unpack_nibbles(packed + whole / 2, n - whole, codes + whole);
}

std::size_t count_bits(const std::uint8_t* mask, std::size_t n) {
  std::size_t count = 0;
  const std::size_t whole = n / 64 * 64;
  for (std::size_t i = 0; i < whole; i += 64) {
    std::uint64_t word;
    std::memcpy(&word, mask + i / 8, 8);
    count += static_cast<std::size_t>(_mm_popcnt_u64(word));
  }
  return count + scalar_packing.count_bits(mask + whole / 8, n - whole);
}

}  // namespace

const PackingKernels avx2_packing = {pack_nibbles, unpack_nibbles, count_bits, {}, {}, {}};

}  // namespace tulle
