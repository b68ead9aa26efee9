// What the kernel files with AVX-512 share: codes out of the stream, as registers or into the level-1 cache. Internal
// linkage only: see cpu/tables.hpp.
//
//   take() of a pair of units, 4 bits, sparse:
//     packed  = next 64 bytes             [l0|h0][l1|h1][l2|h2] …      l: codes of the first unit, h: the second's
//     first   = vpexpandb(packed & 0x0f, mask bits  0– 63)                  zero points where a bit is clear
//     second  = vpexpandb(packed & 0xf0, mask bits 64–127)                  times 16
//     next   += max(popcount of either)
//
//   dense, of 2, 3, 5 and 6 bits: the units of a group (linear.hpp) by masks, left where they lie in their bytes, that is
//   times a power of two (kShift), so that their sums are divided instead. Those in the bits that are left are put
//   together by a shift and vpternlogd (`bits_of_either`).

#include "linear/common.inl"
#include "linear/tiles_stream.inl"

__mmask64 mask64(const std::uint8_t* bits) {
  std::uint64_t word;
  std::memcpy(&word, bits, 8);
  return word;
}

// Sixteen scales or minima from number `at` on.
__m512 scales_at(const void* from, ScaleKind kind, std::size_t at) {
  if (kind == ScaleKind::u8) {
    const void* const bytes = static_cast<const std::uint8_t*>(from) + at;
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(bytes))));
  }
  if (kind == ScaleKind::f32) return _mm512_loadu_ps(static_cast<const float*>(from) + at);
  const void* const halves = static_cast<const std::uint16_t*>(from) + at;
  const __m256i bits = _mm256_loadu_si256(static_cast<const __m256i*>(halves));
  if (kind == ScaleKind::f16) return _mm512_cvtph_ps(bits);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// Of 64 bytes the low nibbles, and the high ones times 16.
__m512i low_nibbles(__m512i packed) { return _mm512_and_si512(packed, _mm512_set1_epi8(15)); }
__m512i high_nibbles(__m512i packed) { return _mm512_and_si512(packed, _mm512_set1_epi8(-16)); }

// Zero points of a tile's outputs: as 32-bit numbers, and four times each as bytes; those times 16 (of 4-bit codes).
struct Zeros {
  __m512i wide, bytes, high;
};

Zeros zeros_at(const LinearView& w, std::size_t scale) {
  const __m512i wide = w.zeros
      ? _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w.zeros + scale)))
      : _mm512_set1_epi32(w.zero);
  const __m512i bytes = _mm512_mullo_epi32(wide, _mm512_set1_epi32(0x01010101));
  return {wide, bytes, w.kind == WeightKind::codes4 ? _mm512_slli_epi32(bytes, 4) : bytes};
}

// Zero points times −Σ x of a segment.
__m512i correction(const LinearView& w, const Zeros& zeros, std::int32_t sum) {
  if (w.zeros == nullptr) return _mm512_set1_epi32(-static_cast<std::int32_t>(w.zero) * sum);
  return _mm512_mullo_epi32(zeros.wide, _mm512_set1_epi32(-sum));
}

// Of codes of so many bits: units that are taken at once, and for each of them how far left its codes are, as a power of
// two, and which sum takes its products. Units share a sum (a way) where they are shifted alike; there are as many as it
// takes so that none waits for its own last result.
template <int kBits>
struct Packed {
  static constexpr int kUnits = 2, kWays = 2;
  static constexpr unsigned kShift[kUnits] = {0, kBits == 4 ? 4 : 0};
  static constexpr int kWay[kUnits] = {0, 1};
};
template <>
struct Packed<2> {
  static constexpr int kUnits = 4, kWays = 4;
  static constexpr unsigned kShift[kUnits] = {0, 2, 4, 6};
  static constexpr int kWay[kUnits] = {0, 1, 2, 3};
};
template <>
struct Packed<3> {
  static constexpr int kUnits = 8, kWays = 5;
  static constexpr unsigned kShift[kUnits] = {0, 3, 0, 3, 0, 3, 5, 5};
  static constexpr int kWay[kUnits] = {0, 2, 0, 2, 1, 3, 4, 4};
};
template <>
struct Packed<5> {
  static constexpr int kUnits = 8, kWays = 5;
  static constexpr unsigned kShift[kUnits] = {0, 0, 0, 0, 0, 3, 3, 3};
  static constexpr int kWay[kUnits] = {0, 1, 2, 0, 1, 3, 4, 3};
};
template <>
struct Packed<6> {
  static constexpr int kUnits = 4, kWays = 4;
  static constexpr unsigned kShift[kUnits] = {0, 0, 0, 2};
  static constexpr int kWay[kUnits] = {0, 1, 2, 3};
};

// How far left the codes are that a way takes.
template <int kBits>
constexpr unsigned shift_of_way(int way) {
  using P = Packed<kBits>;
  for (int i = 0; i < P::kUnits; ++i) {
    if (P::kWay[i] == way) return P::kShift[i];
  }
  return 0;
}

__m512i mask_bits(__m512i bytes, int mask) { return _mm512_and_si512(bytes, _mm512_set1_epi8(static_cast<char>(mask))); }
// The bits of a mask from `a`, the others from `b`.
__m512i bits_of_either(int mask, __m512i a, __m512i b) {
  return _mm512_ternarylogic_epi64(_mm512_set1_epi8(static_cast<char>(mask)), a, b, 0xca);
}
// Of each byte those bits that the shift keeps in it; the others have no meaning.
template <unsigned kCount>
__m512i shifted(__m512i bytes) {
  return _mm512_srli_epi16(bytes, kCount);
}

// A tile's codes, as many units at a time of one chunk as are packed together. Some come times a power of two: a mask is
// cheaper than a shift, and a sum is divided once.
template <int kBits, bool kSparse>
class Stream {
 public:
  static constexpr int kUnits = Packed<kBits>::kUnits;
  static_assert(!kSparse || kBits == 4 || kBits == 8, "sparse codes");

  explicit Stream(const Start& start) : next_(start.values), masks_(start.masks) {}

  // `zeros`: of sparse weights.
  void take(const Zeros& zeros, __m512i unit[kUnits]) {
    if constexpr (kSparse && kBits == 4) {
      prefetch_streams(next_, masks_);
      const __m512i packed = _mm512_loadu_si512(next_);
      const __mmask64 even = mask64(masks_), odd = mask64(masks_ + 8);
      unit[0] = _mm512_mask_expand_epi8(zeros.bytes, even, low_nibbles(packed));
      unit[1] = _mm512_mask_expand_epi8(zeros.high, odd, high_nibbles(packed));
      const auto n = _mm_popcnt_u64(even), m = _mm_popcnt_u64(odd);
      next_ += n > m ? n : m;
      masks_ += 16;
    } else if constexpr (kSparse) {
      unit[0] = expanded(zeros.bytes);
      unit[1] = expanded(zeros.bytes);
    } else {
      // The instructions between two lines of 2-bit codes are so many that the processor's own prefetchers fall behind:
      // with inputs of 16 bits a fifth slower without this. Other widths gain nothing.
      if constexpr (kBits == 2) _mm_prefetch(reinterpret_cast<const char*>(next_) + 2048, _MM_HINT_T0);
      take_dense(unit);
      next_ += kUnits * kBits * kUnitBytes / 8;
    }
  }

 private:
  __m512i part(std::size_t number) const { return _mm512_loadu_si512(next_ + number * kUnitBytes); }

  void take_dense(__m512i unit[kUnits]) const {
    const __m512i a = part(0);
    if constexpr (kBits == 2) {
      unit[0] = mask_bits(a, 0x03);
      unit[1] = mask_bits(a, 0x0c);
      unit[2] = mask_bits(a, 0x30);
      unit[3] = mask_bits(a, 0xc0);
    } else if constexpr (kBits == 3) {
      const __m512i b = part(1), c = part(2);
      unit[0] = mask_bits(a, 0x07);
      unit[1] = mask_bits(a, 0x38);
      unit[2] = mask_bits(b, 0x07);
      unit[3] = mask_bits(b, 0x38);
      unit[4] = mask_bits(c, 0x07);
      unit[5] = mask_bits(c, 0x38);
      unit[6] = mask_bits(bits_of_either(0xc0, a, shifted<1>(c)), 0xe0);
      unit[7] = mask_bits(bits_of_either(0xc0, b, shifted<2>(c)), 0xe0);
    } else if constexpr (kBits == 4) {
      unit[0] = low_nibbles(a);
      unit[1] = high_nibbles(a);
    } else if constexpr (kBits == 5) {
      const __m512i b = part(1), c = part(2), d = part(3), e = part(4);
      unit[0] = mask_bits(a, 0x1f);
      unit[1] = mask_bits(b, 0x1f);
      unit[2] = mask_bits(c, 0x1f);
      unit[3] = mask_bits(d, 0x1f);
      unit[4] = mask_bits(e, 0x1f);
      unit[5] = mask_bits(bits_of_either(0xe0, a, shifted<3>(d)), 0xf8);
      unit[6] = mask_bits(bits_of_either(0xe0, b, shifted<3>(e)), 0xf8);
      unit[7] = mask_bits(bits_of_either(0xe0, c, bits_of_either(0x08, shifted<2>(d), shifted<1>(e))), 0xf8);
    } else if constexpr (kBits == 6) {
      const __m512i b = part(1), c = part(2);
      unit[0] = mask_bits(a, 0x3f);
      unit[1] = mask_bits(b, 0x3f);
      unit[2] = mask_bits(c, 0x3f);
      unit[3] = mask_bits(bits_of_either(0xc0, a, bits_of_either(0x30, shifted<2>(b), shifted<4>(c))), 0xfc);
    } else {
      unit[0] = a;
      unit[1] = part(1);
    }
  }

  __m512i expanded(const __m512i& zeros) {
    prefetch_streams(next_, masks_);
    const __mmask64 mask = mask64(masks_);
    const __m512i codes = _mm512_mask_expand_epi8(zeros, mask, _mm512_loadu_si512(next_));
    next_ += _mm_popcnt_u64(mask);
    masks_ += 8;
    return codes;
  }

  const std::uint8_t* next_;
  const std::uint8_t* masks_;
};

template <int kBits, bool kSparse>
void expand(const LinearView& w, std::size_t tile, std::size_t chunk, std::uint8_t* codes) {
  using P = Packed<kBits>;
  Stream<kBits, kSparse> stream(start_of(w, tile, chunk));
  for (std::size_t s = 0; s < w.segments_of(chunk); ++s) {
    const std::size_t segment = chunk * w.chunk_segments() + s;
    const std::size_t scale = (tile * w.scales_per_row() + segment / w.segments_per_scale) * kTileRows;
    const Zeros zeros = zeros_at(w, scale);
    for (std::size_t u = 0; u < w.segment / 4; u += P::kUnits) {
      __m512i unit[P::kUnits];
      stream.take(zeros, unit);
#pragma GCC unroll 16
      for (int i = 0; i < P::kUnits; ++i, codes += kUnitBytes) {
        _mm512_store_si512(codes, P::kShift[i] ? _mm512_srli_epi16(unit[i], P::kShift[i]) : unit[i]);
      }
    }
  }
}

// Sums of a tile's outputs times their rows' scales, where they have such.
[[maybe_unused]] __m512 row_scaled(const LinearView& w, std::size_t tile, __m512 sum) {
  return w.row_scales ? _mm512_mul_ps(sum, _mm512_loadu_ps(w.row_scales + tile * kTileRows)) : sum;
}

// The outputs of `tiles` tiles from `tile` on: sums [tokens][2][16] times each token's step.
[[maybe_unused]] void write_scaled(const LinearView& w, const Inputs& x, std::size_t tile, std::size_t tiles,
                                   const float* sums, float* y, std::size_t y_stride) {
  for (std::size_t t = 0; t < x.tokens; ++t) {
    const __m512 step = _mm512_set1_ps(x.steps[t]);
    for (std::size_t i = 0; i < tiles; ++i) {
      const __mmask16 real = static_cast<__mmask16>((1u << rows_of(w, tile + i)) - 1);
      const __m512 sum = row_scaled(w, tile + i, _mm512_load_ps(sums + (t * 2 + i) * kTileRows));
      _mm512_mask_storeu_ps(y + t * y_stride + (tile + i) * kTileRows, real, _mm512_mul_ps(sum, step));
    }
  }
}
