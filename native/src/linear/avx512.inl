// What the kernel files with AVX-512 share: codes out of the stream, as registers or into the level-1 cache. Internal
// linkage only: see cpu/tables.hpp.
//
//   take() of a pair of units, 4 bits, sparse:
//     packed  = next 64 bytes             [l0|h0][l1|h1][l2|h2] …      l: codes of the first unit, h: the second's
//     first   = vpexpandb(packed & 0x0f, mask bits  0– 63)                  zero points where a bit is clear
//     second  = vpexpandb(packed & 0xf0, mask bits 64–127)                  times 16
//     next   += max(popcount of either)

#include "linear/common.inl"
#include "linear/tiles_stream.inl"

__mmask64 mask64(const std::uint8_t* bits) {
  std::uint64_t word;
  std::memcpy(&word, bits, 8);
  return word;
}

// Sixteen scales or minima from number `at` on.
__m512 scales_at(const void* from, ScaleKind kind, std::size_t at) {
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

// A tile's codes, a pair of units at a time of one chunk. Of 4-bit codes the second unit's come times 16: a mask is
// cheaper than a shift, and a sum is divided once.
template <bool kNibbles, bool kSparse>
class Stream {
 public:
  explicit Stream(const Start& start) : next_(start.values), masks_(start.masks) {}

  // `zeros`: zero points as bytes; `high`: the second unit's.
  void take(const __m512i& zeros, const __m512i& high, __m512i& first, __m512i& second) {
    if constexpr (kSparse && kNibbles) {
      prefetch_streams(next_, masks_);
      const __m512i packed = _mm512_loadu_si512(next_);
      const __mmask64 even = mask64(masks_), odd = mask64(masks_ + 8);
      first = _mm512_mask_expand_epi8(zeros, even, low_nibbles(packed));
      second = _mm512_mask_expand_epi8(high, odd, high_nibbles(packed));
      const auto n = _mm_popcnt_u64(even), m = _mm_popcnt_u64(odd);
      next_ += n > m ? n : m;
      masks_ += 16;
    } else if constexpr (kSparse) {
      first = expanded(zeros);
      second = expanded(zeros);
    } else if constexpr (kNibbles) {
      const __m512i packed = _mm512_loadu_si512(next_);
      first = low_nibbles(packed);
      second = high_nibbles(packed);
      next_ += kUnitBytes;
    } else {
      first = _mm512_loadu_si512(next_);
      second = _mm512_loadu_si512(next_ + kUnitBytes);
      next_ += 2 * kUnitBytes;
    }
  }

 private:
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

template <bool kNibbles, bool kSparse>
void expand(const LinearView& w, std::size_t tile, std::size_t chunk, std::uint8_t* codes) {
  Stream<kNibbles, kSparse> stream(start_of(w, tile, chunk));
  for (std::size_t s = 0; s < w.segments_of(chunk); ++s) {
    const std::size_t segment = chunk * w.chunk_segments() + s;
    const std::size_t scale = (tile * w.scales_per_row() + segment / w.segments_per_scale) * kTileRows;
    const Zeros zeros = zeros_at(w, scale);
    for (std::size_t u = 0; u < w.segment / 4; u += 2, codes += 2 * kUnitBytes) {
      __m512i a, b;
      stream.take(zeros.bytes, zeros.high, a, b);
      if constexpr (kNibbles) b = _mm512_srli_epi16(b, 4);
      _mm512_store_si512(codes, a);
      _mm512_store_si512(codes + kUnitBytes, b);
    }
  }
}

// The outputs of `tiles` tiles from `tile` on: sums [tokens][2][16] times each token's step.
[[maybe_unused]] void write_scaled(const LinearView& w, const Inputs& x, std::size_t tile, std::size_t tiles,
                                   const float* sums, float* y, std::size_t y_stride) {
  for (std::size_t t = 0; t < x.tokens; ++t) {
    const __m512 step = _mm512_set1_ps(x.steps[t]);
    for (std::size_t i = 0; i < tiles; ++i) {
      const __mmask16 real = static_cast<__mmask16>((1u << rows_of(w, tile + i)) - 1);
      const __m512 sum = _mm512_load_ps(sums + (t * 2 + i) * kTileRows);
      _mm512_mask_storeu_ps(y + t * y_stride + (tile + i) * kTileRows, real, _mm512_mul_ps(sum, step));
    }
  }
}
