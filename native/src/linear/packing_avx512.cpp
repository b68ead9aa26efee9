// Packing by AVX-512 with VBMI2 (vpexpandb, vpcompressb and their 16-bit forms).
//
//   zmm  next    values from here on           a b c d e …
//        k       64 mask bits                  1 0 1 1 0 …
//        expand  vpexpandb(next, k)            a 0 b c 0 …      compress is the way back
//
// Expand and compress go through registers, never straight to or from memory: the memory forms are microcoded, and
// slow, on Zen 4. Masked loads and stores do not touch the bytes whose mask bit is clear, so tails neither read nor
// write past the end.
#include <immintrin.h>

#include <cstring>

#include "cpu/tables.hpp"

namespace tulle {
namespace {

// The first `count` bits, count <= 64.
__mmask64 first(std::size_t count) {
  return count >= 64 ? ~__mmask64{0} : (__mmask64{1} << count) - 1;
}

// Mask bits [i, i + count), count <= 64, i a multiple of 8.
__mmask64 load_bits(const std::uint8_t* mask, std::size_t i, std::size_t count) {
  std::uint64_t word = 0;
  std::memcpy(&word, mask + i / 8, (count + 7) / 8);
  return word & first(count);
}

std::size_t least(std::size_t a, std::size_t b) { return a < b ? a : b; }

std::size_t popcount(__mmask64 mask) { return static_cast<std::size_t>(_mm_popcnt_u64(mask)); }

std::uint8_t pack_nibbles(const std::uint8_t* codes, std::size_t n, std::uint8_t* packed) {
  __m512i any = _mm512_setzero_si512();
  for (std::size_t i = 0; i < n; i += 64) {
    const std::size_t count = least(64, n - i);
    const __m512i v = _mm512_maskz_loadu_epi8(first(count), codes + i);
    any = _mm512_or_si512(any, v);
    // A 16-bit lane holds low + high * 256; or-ing it with itself >> 4 leaves low | high << 4 in its low byte.
    const __m256i bytes = _mm512_cvtepi16_epi8(_mm512_or_si512(v, _mm512_srli_epi16(v, 4)));
    _mm256_mask_storeu_epi8(packed + i / 2, static_cast<__mmask32>(first((count + 1) / 2)), bytes);
  }
  alignas(64) std::uint8_t lanes[64];
  _mm512_store_si512(lanes, any);
  std::uint8_t seen = 0;
  for (std::uint8_t lane : lanes) seen |= lane;
  return seen;
}

void unpack_nibbles(const std::uint8_t* packed, std::size_t n, std::uint8_t* codes) {
  const __m512i nibbles = _mm512_set1_epi8(0x0f);
  for (std::size_t i = 0; i < n; i += 64) {
    const std::size_t count = least(64, n - i);
    const __mmask32 present = static_cast<__mmask32>(first((count + 1) / 2));
    const __m512i w = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(present, packed + i / 2));
    // w | w << 4 has the low nibble in bits 0..3 and the high one in bits 8..11.
    const __m512i pair = _mm512_and_si512(_mm512_or_si512(w, _mm512_slli_epi16(w, 4)), nibbles);
    _mm512_mask_storeu_epi8(codes + i, first(count), pair);
  }
}

std::size_t count_bits(const std::uint8_t* mask, std::size_t n) {
  std::size_t count = 0;
  for (std::size_t i = 0; i < n; i += 64) count += popcount(load_bits(mask, i, least(64, n - i)));
  return count;
}

// One register of T: how many lanes, and the four instructions.
template <typename T>
struct Lanes;

template <>
struct Lanes<std::uint8_t> {
  static constexpr std::size_t count = 64;
  static __m512i load(__mmask64 k, const void* p) { return _mm512_maskz_loadu_epi8(k, p); }
  static void store(void* p, __mmask64 k, __m512i v) { _mm512_mask_storeu_epi8(p, k, v); }
  static __m512i expand(__mmask64 k, __m512i v) { return _mm512_maskz_expand_epi8(k, v); }
  static __m512i compress(__mmask64 k, __m512i v) { return _mm512_maskz_compress_epi8(k, v); }
};

template <>
struct Lanes<std::uint16_t> {
  static constexpr std::size_t count = 32;
  static __mmask32 cut(__mmask64 k) { return static_cast<__mmask32>(k); }
  static __m512i load(__mmask64 k, const void* p) { return _mm512_maskz_loadu_epi16(cut(k), p); }
  static void store(void* p, __mmask64 k, __m512i v) { _mm512_mask_storeu_epi16(p, cut(k), v); }
  static __m512i expand(__mmask64 k, __m512i v) { return _mm512_maskz_expand_epi16(cut(k), v); }
  static __m512i compress(__mmask64 k, __m512i v) { return _mm512_maskz_compress_epi16(cut(k), v); }
};

template <>
struct Lanes<std::uint32_t> {
  static constexpr std::size_t count = 16;
  static __mmask16 cut(__mmask64 k) { return static_cast<__mmask16>(k); }
  static __m512i load(__mmask64 k, const void* p) { return _mm512_maskz_loadu_epi32(cut(k), p); }
  static void store(void* p, __mmask64 k, __m512i v) { _mm512_mask_storeu_epi32(p, cut(k), v); }
  static __m512i expand(__mmask64 k, __m512i v) { return _mm512_maskz_expand_epi32(cut(k), v); }
  static __m512i compress(__mmask64 k, __m512i v) { return _mm512_maskz_compress_epi32(cut(k), v); }
};

template <typename T>
std::size_t expand(const std::uint8_t* mask, std::size_t n, const T* values, std::size_t available, T* dense) {
  using L = Lanes<T>;
  std::size_t used = 0;
  for (std::size_t i = 0; i < n; i += L::count) {
    const std::size_t count = least(L::count, n - i);
    const __mmask64 stored = load_bits(mask, i, count);
    const __m512i next = L::load(first(least(L::count, available - used)), values + used);
    L::store(dense + i, first(count), L::expand(stored, next));
    used += popcount(stored);
  }
  return used;
}

template <typename T>
std::size_t compress(const std::uint8_t* mask, std::size_t n, const T* dense, T* values) {
  using L = Lanes<T>;
  std::size_t written = 0;
  for (std::size_t i = 0; i < n; i += L::count) {
    const std::size_t count = least(L::count, n - i);
    const __mmask64 stored = load_bits(mask, i, count);
    const std::size_t kept = popcount(stored);
    L::store(values + written, first(kept), L::compress(stored, L::load(first(count), dense + i)));
    written += kept;
  }
  return written;
}

}  // namespace

const PackingKernels avx512_packing = {
    pack_nibbles,
    unpack_nibbles,
    count_bits,
    {expand<std::uint8_t>, compress<std::uint8_t>},
    {expand<std::uint16_t>, compress<std::uint16_t>},
    {expand<std::uint32_t>, compress<std::uint32_t>},
};

}  // namespace tulle
