// AVX2 has no expand or compress instruction: dispatch.cpp fills the mask kernels in from the scalar table.
#include <immintrin.h>

#include <cstring>

#include "tables.hpp"

namespace tulle {
namespace {

#include "stripe_limits.inl"

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

const PackingKernels avx2_packing = {pack_nibbles, unpack_nibbles, count_bits, {}, {}, {}};

const PermutationKernels avx2_permutation = {
    {excess8, stripe_limits<std::uint8_t>},
    {excess16, stripe_limits<std::int16_t>},
};

}  // namespace tulle
