// Linears in tiles by AVX2: a unit is two registers of 32 codes, 8 outputs × 4 inputs each.
//
//   ymm  a[0]  = unit u,     outputs 0–7   [o0: i0 i1 i2 i3][o1: …] … [o7: …]
//        a[1]  = unit u,     outputs 8–15
//        b[0], b[1] = unit u + 1
//        even, odd  = x[4u … 4u+3], x[4u+4 … 4u+7], broadcast to every 32-bit lane
//        total[h]   = 8 sums of 32 bits, outputs 8h … 8h+7
//
//   up to 6 bits: vpmaddubsw(a, even) → 16-bit sums of two products; of 4 bits, 8 units are added before vpmaddwd widens
//           them (kNarrow)
//   8 bits: codes and x widened to 16 bits, even and odd bytes apart, vpmaddwd
//
// Pruned codes: AVX2 has no vpexpandb. avx2.inl counts the set bits before each byte and shuffles. One token: from the
// stream of weights into the accumulators without a stop. Several tokens: a chunk of a tile is expanded into the
// level-1 cache and multiplied with four tokens at a time.
#include <immintrin.h>

#include <cstring>

#include "cpu/tables.hpp"

namespace tulle {
namespace {

#include "linear/common.inl"
#include "linear/tiles_stream.inl"
#include "linear/avx2.inl"

// Zero points of a tile's outputs, four times each, in halves of 32.
void zeros_at(const LinearView& w, std::size_t scale, __m256i zeros[2]) {
  for (std::size_t h = 0; h < 2; ++h) {
    const __m256i wide = w.zeros
        ? _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(w.zeros + scale + 8 * h)))
        : _mm256_set1_epi32(w.zero);
    zeros[h] = _mm256_mullo_epi32(wide, _mm256_set1_epi32(0x01010101));
  }
}

// Units that are taken at once: a group of codes that share bytes (linear.hpp), at least a pair.
template <int kBits>
constexpr int kUnits = kBits == 3 || kBits == 5 ? 8 : kBits == 2 || kBits == 6 ? 4 : 2;

// Units whose sums of two products are added in 16 bits before they are widened: kNarrow · 2 · (2^kBits − 1) · 128 < 2^15.
template <int kBits>
constexpr int kNarrow = kBits == 8 ? 1 : 128 >> kBits;

// Every byte's bits from kFirst on, shifted to the right by as many; those of the mask remain.
template <int kFirst>
__m256i bits_at(__m256i bytes, int mask) {
  return _mm256_and_si256(_mm256_srli_epi16(bytes, kFirst), _mm256_set1_epi8(static_cast<char>(mask)));
}
__m256i either(__m256i a, __m256i b) { return _mm256_or_si256(a, b); }

// 32 codes of each of a group's units, `from` their first part.
template <int kBits>
TULLE_INLINE void group_codes(const std::uint8_t* from, __m256i unit[kUnits<kBits>]) {
  const auto part = [&](std::size_t number) { return load(from + number * kUnitBytes); };
  const __m256i a = part(0);
  if constexpr (kBits == 2) {
    unit[0] = bits_at<0>(a, 3);
    unit[1] = bits_at<2>(a, 3);
    unit[2] = bits_at<4>(a, 3);
    unit[3] = bits_at<6>(a, 3);
  } else if constexpr (kBits == 3) {
    const __m256i b = part(1), c = part(2);
    unit[0] = bits_at<0>(a, 7);
    unit[1] = bits_at<3>(a, 7);
    unit[2] = bits_at<0>(b, 7);
    unit[3] = bits_at<3>(b, 7);
    unit[4] = bits_at<0>(c, 7);
    unit[5] = bits_at<3>(c, 7);
    unit[6] = either(bits_at<5>(a, 6), bits_at<6>(c, 1));
    unit[7] = either(bits_at<5>(b, 6), bits_at<7>(c, 1));
  } else if constexpr (kBits == 4) {
    unit[0] = part_of<Part::low>(a);
    unit[1] = part_of<Part::high>(a);
  } else if constexpr (kBits == 5) {
    const __m256i b = part(1), c = part(2), d = part(3), e = part(4);
    unit[0] = bits_at<0>(a, 31);
    unit[1] = bits_at<0>(b, 31);
    unit[2] = bits_at<0>(c, 31);
    unit[3] = bits_at<0>(d, 31);
    unit[4] = bits_at<0>(e, 31);
    unit[5] = either(bits_at<3>(a, 0x1c), bits_at<6>(d, 3));
    unit[6] = either(bits_at<3>(b, 0x1c), bits_at<6>(e, 3));
    unit[7] = either(bits_at<3>(c, 0x1c), either(bits_at<5>(d, 1), bits_at<4>(e, 2)));
  } else if constexpr (kBits == 6) {
    const __m256i b = part(1), c = part(2);
    unit[0] = bits_at<0>(a, 63);
    unit[1] = bits_at<0>(b, 63);
    unit[2] = bits_at<0>(c, 63);
    unit[3] = either(bits_at<2>(a, 0x30), either(bits_at<4>(b, 0x0c), bits_at<6>(c, 3)));
  } else {
    unit[0] = a;
    unit[1] = part(1);
  }
}

// A tile's codes, kUnits at a time of one chunk.
template <int kBits, bool kSparse>
class Stream {
 public:
  static_assert(!kSparse || kBits == 4 || kBits == 8, "sparse codes");

  explicit Stream(const Start& start) : next_(start.values), masks_(start.masks) {}

  // In halves of 32; `zeros`: zero points, of sparse weights.
  TULLE_INLINE void take(const __m256i zeros[2], __m256i half[2][kUnits<kBits>]) {
    if constexpr (kSparse) {
      prefetch_streams(next_, masks_);
      __m256i first[2], second[2];
      if constexpr (kBits == 4) {
        const std::size_t n = expand_unit<Part::low>(next_, masks_, zeros, first);
        const std::size_t m = expand_unit<Part::high>(next_, masks_ + 8, zeros, second);
        next_ += n > m ? n : m;
      } else {
        next_ += expand_unit<Part::whole>(next_, masks_, zeros, first);
        next_ += expand_unit<Part::whole>(next_, masks_ + 8, zeros, second);
      }
      masks_ += 16;
      for (int h = 0; h < 2; ++h) {
        half[h][0] = first[h];
        half[h][1] = second[h];
      }
    } else {
      for (int h = 0; h < 2; ++h) group_codes<kBits>(next_ + 32 * h, half[h]);
      next_ += kUnits<kBits> * kBits * kUnitBytes / 8;
    }
  }

 private:
  const std::uint8_t* next_;
  const std::uint8_t* masks_;
};

// y of a tile's rows.
void write(const LinearView& w, std::size_t tile, const float* sums, float step, float* y) {
  for (std::size_t row = 0; row < rows_of(w, tile); ++row) {
    const std::size_t at = tile * kTileRows + row;
    y[at] = row_scaled(w, at, sums[row]) * step;
  }
}

// One token.
template <int kBits, bool kSparse, int kPlanes>
void multiply(const LinearView& w, const Inputs& x, std::size_t first, std::size_t last, float* y) {
  // Groups that are added in 16 bits before they are widened; or parts of a group that are, each with sums of its own.
  constexpr int kTaken = kUnits<kBits>, kGroups = kNarrow<kBits> > kTaken ? kNarrow<kBits> / kTaken : 1;
  constexpr int kParts = kBits < 8 && kNarrow<kBits> < kTaken ? kTaken / kNarrow<kBits> : 1;
  const std::size_t units = w.segment / 4;
  for (std::size_t tile = first; tile < last; ++tile) {
    __m256 sum[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    std::size_t segment = 0;
    for (std::size_t chunk = 0; chunk < w.chunks(); ++chunk) {
      Stream<kBits, kSparse> stream(start_of(w, tile, chunk));
      const std::size_t end = segment + w.segments_of(chunk);
      for (; segment < end; ++segment) {
        const std::size_t scale = w.scale_at(tile, segment);
        __m256i zeros[2];
        if constexpr (kSparse) zeros_at(w, scale, zeros);
        const std::int8_t* in[kPlanes];
        __m256i total[kPlanes][2];
        for (int p = 0; p < kPlanes; ++p) {
          in[p] = x.plane[p] + segment * w.segment;
          for (std::size_t h = 0; h < 2; ++h) total[p][h] = correction(w, scale, h, x.sums[p][segment]);
        }
        for (std::size_t u = 0; u < units;) {
          const std::size_t stop = least(units, u + kGroups * kTaken);
          __m256i narrow[kPlanes][2][kParts];
          for (int p = 0; p < kPlanes; ++p) {
            for (int i = 0; i < kParts; ++i) narrow[p][0][i] = narrow[p][1][i] = _mm256_setzero_si256();
          }
          for (; u < stop; u += kTaken) {
            __m256i half[2][kTaken];
            stream.take(zeros, half);
#pragma GCC unroll 16
            for (int i = 0; i < kTaken; ++i) {
              for (int p = 0; p < kPlanes; ++p) {
                const __m256i four = broadcast4(in[p] + 4 * (u + static_cast<std::size_t>(i)));
                for (int h = 0; h < 2; ++h) {
                  if constexpr (kBits < 8) {
                    __m256i& part = narrow[p][h][i * kParts / kTaken];
                    part = _mm256_add_epi16(part, _mm256_maddubs_epi16(half[h][i], four));
                  } else {
                    total[p][h] = dot<8>(total[p][h], half[h][i], four);
                  }
                }
              }
            }
          }
          if constexpr (kBits < 8) {
            for (int p = 0; p < kPlanes; ++p) {
              for (int h = 0; h < 2; ++h) {
                for (int i = 0; i < kParts; ++i) {
                  const __m256i wide = _mm256_madd_epi16(narrow[p][h][i], _mm256_set1_epi16(1));
                  total[p][h] = _mm256_add_epi32(total[p][h], wide);
                }
              }
            }
          }
        }
        for (std::size_t h = 0; h < 2; ++h) {
          __m256 whole = _mm256_cvtepi32_ps(total[0][h]);
          if constexpr (kPlanes == 2)
            whole = _mm256_fmadd_ps(whole, _mm256_set1_ps(256), _mm256_cvtepi32_ps(total[1][h]));
          sum[h] = _mm256_fmadd_ps(whole, scales_at(w.scales, w.scale_kind, scale + 8 * h), sum[h]);
          if (w.minima) {
            const __m256 inputs = _mm256_set1_ps(input_sum(x, 0, segment));
            sum[h] = _mm256_fmadd_ps(inputs, scales_at(w.minima, w.scale_kind, scale + 8 * h), sum[h]);
          }
        }
      }
    }
    alignas(32) float sums[kTileRows];
    for (int h = 0; h < 2; ++h) _mm256_store_ps(sums + 8 * h, sum[h]);
    write(w, tile, sums, x.steps[0], y);
  }
}

// Codes of a tile's chunk, pruned ones at their zero point.
template <int kBits, bool kSparse>
const std::uint8_t* expand(const LinearView& w, std::size_t tile, std::size_t chunk, std::uint8_t* codes) {
  const Start start = start_of(w, tile, chunk);
  if (kBits == 8 && !kSparse) return start.values;
  Stream<kBits, kSparse> stream(start);
  std::uint8_t* to = codes;
  for (std::size_t s = 0; s < w.segments_of(chunk); ++s) {
    __m256i zeros[2];
    if constexpr (kSparse) zeros_at(w, w.scale_at(tile, chunk * w.chunk_segments() + s), zeros);
    for (std::size_t u = 0; u < w.segment / 4; u += kUnits<kBits>) {
      __m256i half[2][kUnits<kBits>];
      stream.take(zeros, half);
      for (int i = 0; i < kUnits<kBits>; ++i, to += kUnitBytes) {
        store(to, half[0][i]);
        store(to + 32, half[1][i]);
      }
    }
  }
  return codes;
}

template <int kBits, bool kSparse>
void multiply_many(const LinearView& w, const Inputs& x, std::size_t first, std::size_t last, float* y,
                   std::size_t y_stride, std::uint8_t* scratch) {
  float* const sums = reinterpret_cast<float*>(scratch + kChunkInputs * kTileRows * sizeof(float));
  for (std::size_t tile = first; tile < last; ++tile) {
    std::memset(sums, 0, x.tokens * kTileRows * sizeof(float));
    for (std::size_t chunk = 0; chunk < w.chunks(); ++chunk) {
      const std::uint8_t* codes = expand<kBits, kSparse>(w, tile, chunk, scratch);
      for (std::size_t s = 0; s < w.segments_of(chunk); ++s, codes += w.segment * kTileRows) {
        multiply_accumulate_all<kBits>(w, x, tile, chunk * w.chunk_segments() + s, codes, sums);
      }
    }
    for (std::size_t t = 0; t < x.tokens; ++t) write(w, tile, sums + t * kTileRows, x.steps[t], y + t * y_stride);
  }
}

template <int kBits, bool kSparse>
void run_codes(const LinearView& w, const Inputs& x, std::size_t first, std::size_t last, float* y,
               std::size_t y_stride, std::uint8_t* scratch) {
  if (x.tokens > 1) return multiply_many<kBits, kSparse>(w, x, first, last, y, y_stride, scratch);
  if (x.planes == 1) return multiply<kBits, kSparse, 1>(w, x, first, last, y);
  multiply<kBits, kSparse, 2>(w, x, first, last, y);
}

// For 8 mask bits: where each of 8 numbers comes from, the highest bit set where its own is clear. Of two bytes each as
// vpshufb takes it, of four as vpermd does.
struct Sources {
  std::uint8_t halves[256][16];
  std::uint8_t singles[256][8];
  constexpr Sources() : halves(), singles() {
    for (int mask = 0; mask < 256; ++mask) {
      int next = 0;
      for (int bit = 0; bit < 8; ++bit) {
        const bool kept = (mask >> bit) & 1;
        halves[mask][2 * bit] = static_cast<std::uint8_t>(kept ? 2 * next : 0x80);
        halves[mask][2 * bit + 1] = static_cast<std::uint8_t>(kept ? 2 * next + 1 : 0x80);
        singles[mask][bit] = static_cast<std::uint8_t>(kept ? next++ : 0x80);
      }
    }
  }
};
constexpr Sources kSources;

// A tile's weights as float32, two inputs of one chunk at a time, whatever the unit.
template <bool kHalf, bool kSparse>
class Floats {
 public:
  explicit Floats(const Start& start) : next_(start.values), masks_(start.masks) {}

  // Each in halves of 8 outputs.
  void take(__m256 even[2], __m256 odd[2]) {
    if constexpr (kSparse) prefetch_streams(next_, masks_);
    if constexpr (kHalf) {
      for (int h = 0; h < 2; ++h) {
        const __m256i pairs = halves();
        even[h] = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
        odd[h] = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
      }
    } else {
      for (int h = 0; h < 2; ++h) even[h] = singles();
      for (int h = 0; h < 2; ++h) odd[h] = singles();
    }
  }

 private:
  static __m128i load_half(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

  // 16 of two bytes.
  __m256i halves() {
    if constexpr (!kSparse) {
      next_ += 32;
      return load(next_ - 32);
    } else {
      const int first = _mm_popcnt_u32(masks_[0]), second = _mm_popcnt_u32(masks_[1]);
      const __m256i values =
          _mm256_inserti128_si256(_mm256_castsi128_si256(load_half(next_)), load_half(next_ + 2 * first), 1);
      const __m256i from = _mm256_inserti128_si256(_mm256_castsi128_si256(load_half(kSources.halves[masks_[0]])),
                                                   load_half(kSources.halves[masks_[1]]), 1);
      next_ += 2 * (first + second);
      masks_ += 2;
      return _mm256_shuffle_epi8(values, from);
    }
  }

  // 8 of four bytes.
  __m256 singles() {
    const __m256 values = _mm256_loadu_ps(reinterpret_cast<const float*>(next_));
    if constexpr (!kSparse) {
      next_ += 32;
      return values;
    } else {
      const __m256i from =
          _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kSources.singles[*masks_])));
      next_ += 4 * _mm_popcnt_u32(*masks_++);
      return _mm256_blendv_ps(_mm256_permutevar8x32_ps(values, from), _mm256_setzero_ps(), _mm256_castsi256_ps(from));
    }
  }

  const std::uint8_t* next_;
  const std::uint8_t* masks_;
};

// One token.
template <bool kHalf, bool kSparse>
void multiply_floats(const LinearView& w, const Inputs& x, std::size_t first, std::size_t last, float* y) {
  for (std::size_t tile = first; tile < last; ++tile) {
    __m256 sum[kFloatSums][2];
    for (auto& both : sum) both[0] = both[1] = _mm256_setzero_ps();
    for (std::size_t chunk = 0; chunk < w.chunks(); ++chunk) {
      Floats<kHalf, kSparse> stream(start_of(w, tile, chunk));
      const float* in = x.floats + chunk * w.chunk_segments() * w.segment;
      const std::size_t inputs = w.segments_of(chunk) * w.segment;
      for (std::size_t i = 0; i < inputs; i += 4) {
        for (std::size_t j = 0; j < 4; j += 2) {
          __m256 even[2], odd[2];
          stream.take(even, odd);
          for (int h = 0; h < 2; ++h) {
            sum[0][h] = _mm256_fmadd_ps(even[h], _mm256_set1_ps(in[i + j]), sum[0][h]);
            sum[1][h] = _mm256_fmadd_ps(odd[h], _mm256_set1_ps(in[i + j + 1]), sum[1][h]);
          }
        }
      }
    }
    alignas(32) float sums[kTileRows];
    for (int h = 0; h < 2; ++h) _mm256_store_ps(sums + 8 * h, _mm256_add_ps(sum[0][h], sum[1][h]));
    write(w, tile, sums, 1.0f, y);
  }
}

// Weights of a tile's chunk as [inputs][16].
template <bool kHalf, bool kSparse>
void expand_floats(const LinearView& w, std::size_t tile, std::size_t chunk, float* out) {
  Floats<kHalf, kSparse> stream(start_of(w, tile, chunk));
  for (std::size_t i = 0; i < w.segments_of(chunk) * w.segment; i += 2, out += 2 * kTileRows) {
    __m256 even[2], odd[2];
    stream.take(even, odd);
    for (int h = 0; h < 2; ++h) {
      _mm256_store_ps(out + 8 * h, even[h]);
      _mm256_store_ps(out + kTileRows + 8 * h, odd[h]);
    }
  }
}

// The two sums of each output lie `apart` floats apart.
template <int kTokens>
void multiply_accumulate_floats(const float* weights, const float* in, std::size_t stride, std::size_t inputs,
                                float* sums, std::size_t apart) {
  __m256 sum[kFloatSums][2][kTokens];
#pragma GCC unroll 16
  for (std::size_t j = 0; j < kFloatSums; ++j) {
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) {
      for (int h = 0; h < 2; ++h) sum[j][h][t] = _mm256_load_ps(sums + j * apart + t * kTileRows + 8 * h);
    }
  }
  for (std::size_t k = 0; k < inputs; k += kFloatSums) {
#pragma GCC unroll 16
    for (std::size_t j = 0; j < kFloatSums; ++j) {
      const float* unit = weights + (k + j) * kTileRows;
      const __m256 lower = _mm256_load_ps(unit), upper = _mm256_load_ps(unit + 8);
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) {
        const __m256 one = _mm256_set1_ps(in[t * stride + k + j]);
        sum[j][0][t] = _mm256_fmadd_ps(lower, one, sum[j][0][t]);
        sum[j][1][t] = _mm256_fmadd_ps(upper, one, sum[j][1][t]);
      }
    }
  }
#pragma GCC unroll 16
  for (std::size_t j = 0; j < kFloatSums; ++j) {
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) {
      for (int h = 0; h < 2; ++h) _mm256_store_ps(sums + j * apart + t * kTileRows + 8 * h, sum[j][h][t]);
    }
  }
}

template <bool kHalf, bool kSparse>
void run_floats(const LinearView& w, const Inputs& x, std::size_t first, std::size_t last, float* y,
                std::size_t y_stride, std::uint8_t* scratch) {
  if (x.tokens == 1) return multiply_floats<kHalf, kSparse>(w, x, first, last, y);
  float* const weights = reinterpret_cast<float*>(scratch);
  float* const sums = weights + kChunkInputs * kTileRows;
  const std::size_t apart = x.tokens * kTileRows;
  for (std::size_t tile = first; tile < last; ++tile) {
    std::memset(sums, 0, kFloatSums * apart * sizeof(float));
    for (std::size_t chunk = 0; chunk < w.chunks(); ++chunk) {
      expand_floats<kHalf, kSparse>(w, tile, chunk, weights);
      const std::size_t inputs = w.segments_of(chunk) * w.segment;
      const float* in = x.floats + chunk * w.chunk_segments() * w.segment;
      std::size_t t = 0;
      const auto go = [&](auto count) {
        constexpr int kTokens = decltype(count)::value;
        multiply_accumulate_floats<kTokens>(weights, in + t * x.stride, x.stride, inputs, sums + t * kTileRows, apart);
        t += kTokens;
      };
      while (t + 3 <= x.tokens) go(Int<3>());
      if (t + 2 <= x.tokens) go(Int<2>());
      if (t < x.tokens) go(Int<1>());
    }
    for (std::size_t t = 0; t < x.tokens; ++t) {
      alignas(32) float total[kTileRows];
      for (int h = 0; h < 2; ++h) {
        const float* const even = sums + t * kTileRows + 8 * h;
        _mm256_store_ps(total + 8 * h, _mm256_add_ps(_mm256_load_ps(even), _mm256_load_ps(even + apart)));
      }
      write(w, tile, total, 1.0f, y + t * y_stride);
    }
  }
}

void run(const LinearView& w, const Inputs& x, std::size_t first, std::size_t last, float* y, std::size_t y_stride,
         std::uint8_t* scratch) {
  const auto go = [&](auto dense, auto sparse) {
    (w.sparse() ? sparse : dense)(w, x, first, last, y, y_stride, scratch);
  };
  switch (w.kind) {
    case WeightKind::codes2: return run_codes<2, false>(w, x, first, last, y, y_stride, scratch);
    case WeightKind::codes3: return run_codes<3, false>(w, x, first, last, y, y_stride, scratch);
    case WeightKind::codes5: return run_codes<5, false>(w, x, first, last, y, y_stride, scratch);
    case WeightKind::codes6: return run_codes<6, false>(w, x, first, last, y, y_stride, scratch);
    case WeightKind::codes4: return go(run_codes<4, false>, run_codes<4, true>);
    case WeightKind::codes8: return go(run_codes<8, false>, run_codes<8, true>);
    case WeightKind::bf16: return go(run_floats<true, false>, run_floats<true, true>);
    case WeightKind::f32: return go(run_floats<false, false>, run_floats<false, true>);
  }
}

}  // namespace

const LinearKernels avx2_linear = {run, avx2_run_input_major};

}  // namespace tulle
