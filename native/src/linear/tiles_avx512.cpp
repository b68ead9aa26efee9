// Linears in tiles by AVX-512 VNNI: a unit is one register, one vpdpbusd multiplies it.
//
//   zmm  a, b   = units u, u + 1:  [o0: i0 i1 i2 i3][o1: i0 i1 i2 i3] … [o15: …]       64 codes each
//        x      = x[4u … 4u+3], broadcast to every 32-bit lane
//        total  = 16 sums of 32 bits, one per output;  total += Σ₄ codes · x            vpdpbusd
//        sum    = 16 floats;  after a segment  sum = fma(float(total − zero·Σx), scales, sum), and
//                             with minima      sum = fma(float(Σx), minima, sum)
//
//   4 bits: 64 bytes hold both units, a = low nibbles, b = high ones, left times 16 (its sums are divided once)
//   2, 3, 5 and 6 bits: groups of four or eight units, some of them times a power of two (avx512.inl)
//   sparse: vpexpandb spreads the next kept bytes over the set bits of a 64-bit mask, zero points elsewhere
//
// One token: from the stream of weights into four accumulators. Several tokens: chunks of two tiles are expanded into
// the level-1 cache and multiplied with up to twelve tokens at a time (avx512_multiply_accumulate.inl).
#include <immintrin.h>

#include <cstring>

#include "cpu/tables.hpp"

namespace tulle {
namespace {

#include "linear/avx512.inl"
#include "linear/avx512_multiply_accumulate.inl"

// One token.
template <int kBits, bool kSparse, int kPlanes>
void multiply(const LinearView& w, const Inputs& x, std::size_t first, std::size_t last, float* y) {
  using P = Packed<kBits>;
  // Groups in turn, each with sums of its own, so that none waits for its own last result.
  constexpr int kTurns = kPlanes == 1 && P::kUnits < 8 ? 2 : 1, kSums = kTurns * P::kWays;
  const std::size_t units = w.segment / 4;
  for (std::size_t tile = first; tile < last; ++tile) {
    __m512 sum = _mm512_setzero_ps();
    std::size_t segment = 0;
    for (std::size_t chunk = 0; chunk < w.chunks(); ++chunk) {
      Stream<kBits, kSparse> stream(start_of(w, tile, chunk));
      const std::size_t end = segment + w.segments_of(chunk);
      for (; segment < end; ++segment) {
        const std::size_t scale = (tile * w.scales_per_row() + segment / w.segments_per_scale) * kTileRows;
        const Zeros zeros = zeros_at(w, scale);
        const std::int8_t* in[kPlanes];
        __m512i total[kPlanes][kSums];
        for (int p = 0; p < kPlanes; ++p) {
          in[p] = x.plane[p] + segment * w.segment;
          total[p][0] = correction(w, zeros, x.sums[p][segment]);
#pragma GCC unroll 16
          for (int way = 1; way < kSums; ++way) total[p][way] = _mm512_setzero_si512();
        }
        const auto group = [&](std::size_t u, int turn) {
          __m512i unit[P::kUnits];
          stream.take(zeros, unit);
#pragma GCC unroll 16
          for (int i = 0; i < P::kUnits; ++i) {
            const int way = turn * P::kWays + P::kWay[i];
            for (int p = 0; p < kPlanes; ++p) {
              const __m512i four = broadcast4(in[p] + 4 * (u + static_cast<std::size_t>(i)));
              total[p][way] = _mm512_dpbusd_epi32(total[p][way], unit[i], four);
            }
          }
        };
        std::size_t u = 0;
        if constexpr (kTurns == 2) {
          for (; u + 2 * P::kUnits <= units; u += 2 * P::kUnits) {
            group(u, 0);
            group(u + P::kUnits, 1);
          }
        }
        for (; u < units; u += P::kUnits) group(u, 0);
        __m512 whole[kPlanes];
        for (int p = 0; p < kPlanes; ++p) {
#pragma GCC unroll 16
          for (int way = 0; way < P::kWays; ++way) {
            if constexpr (kTurns == 2) total[p][way] = _mm512_add_epi32(total[p][way], total[p][P::kWays + way]);
            const unsigned shift = shift_of_way<kBits>(way);
            if (shift) total[p][way] = _mm512_srai_epi32(total[p][way], shift);
            if (way) total[p][0] = _mm512_add_epi32(total[p][0], total[p][way]);
          }
          whole[p] = _mm512_cvtepi32_ps(total[p][0]);
        }
        if constexpr (kPlanes == 2) whole[0] = _mm512_fmadd_ps(whole[0], _mm512_set1_ps(256), whole[1]);
        sum = _mm512_fmadd_ps(whole[0], scales_at(w.scales, w.scale_kind, scale), sum);
        if (w.minima) {
          const __m512 inputs = _mm512_set1_ps(input_sum(x, 0, segment));
          sum = _mm512_fmadd_ps(inputs, scales_at(w.minima, w.scale_kind, scale), sum);
        }
      }
    }
    const __mmask16 real = static_cast<__mmask16>((1u << rows_of(w, tile)) - 1);
    sum = _mm512_mul_ps(row_scaled(w, tile, sum), _mm512_set1_ps(x.steps[0]));
    _mm512_mask_storeu_ps(y + tile * kTileRows, real, sum);
  }
}

template <int kBits, bool kSparse, int kPlanes>
void multiply_many(const LinearView& w, const Inputs& x, std::size_t first, std::size_t last, float* y,
                   std::size_t y_stride, std::uint8_t* scratch) {
  constexpr std::size_t kChunkCodes = kChunkInputs * kTileRows;
  float* const sums = reinterpret_cast<float*>(scratch + 2 * kChunkCodes);
  for (std::size_t tile = first; tile < last; tile += 2) {
    const std::size_t tiles = least(2, last - tile);
    std::memset(sums, 0, x.tokens * 2 * kTileRows * sizeof(float));
    for (std::size_t chunk = 0; chunk < w.chunks(); ++chunk) {
      for (std::size_t i = 0; i < tiles; ++i) {
        expand<kBits, kSparse>(w, tile + i, chunk, scratch + i * kChunkCodes);
      }
      for (std::size_t s = 0; s < w.segments_of(chunk); ++s) {
        const std::size_t segment = chunk * w.chunk_segments() + s;
        const std::uint8_t* codes = scratch + s * w.segment * kTileRows;
        if (tiles == 2) multiply_accumulate_all<2, kPlanes>(w, x, tile, segment, codes, kChunkCodes, sums);
        else multiply_accumulate_all<1, kPlanes>(w, x, tile, segment, codes, kChunkCodes, sums);
      }
    }
    write_scaled(w, x, tile, tiles, sums, y, y_stride);
  }
}

template <int kBits, bool kSparse>
void run_codes(const LinearView& w, const Inputs& x, std::size_t first, std::size_t last, float* y,
               std::size_t y_stride, std::uint8_t* scratch) {
  if (x.tokens == 1) {
    if (x.planes == 1) return multiply<kBits, kSparse, 1>(w, x, first, last, y);
    return multiply<kBits, kSparse, 2>(w, x, first, last, y);
  }
  if (x.planes == 1) return multiply_many<kBits, kSparse, 1>(w, x, first, last, y, y_stride, scratch);
  return multiply_many<kBits, kSparse, 2>(w, x, first, last, y, y_stride, scratch);
}

// A tile's weights as float32, unit after unit of one chunk: two inputs of bfloat16 or one of float32.
template <bool kHalf, bool kSparse>
class Floats {
 public:
  explicit Floats(const Start& start) : next_(start.values), masks_(start.masks) {}

  // Two inputs, whatever the unit.
  void take(__m512& even, __m512& odd) {
    if constexpr (kHalf) {
      __m512i pairs;
      if constexpr (kSparse) {
        prefetch_streams(next_, masks_);
        std::uint32_t mask;
        std::memcpy(&mask, masks_, 4);
        masks_ += 4;
        pairs = _mm512_mask_expand_epi16(zero_, mask, _mm512_loadu_si512(next_));
        next_ += 2 * static_cast<std::size_t>(_mm_popcnt_u32(mask));
      } else {
        pairs = _mm512_loadu_si512(next_);
        next_ += 64;
      }
      even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
      odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
    } else {
      even = single();
      odd = single();
    }
  }

 private:
  __m512 single() {
    if constexpr (kSparse) {
      prefetch_streams(next_, masks_);
      std::uint16_t mask;
      std::memcpy(&mask, masks_, 2);
      masks_ += 2;
      const __m512 values = _mm512_mask_expand_ps(_mm512_castsi512_ps(zero_), mask, _mm512_loadu_ps(next_));
      next_ += 4 * static_cast<std::size_t>(_mm_popcnt_u32(mask));
      return values;
    } else {
      const __m512 values = _mm512_loadu_ps(next_);
      next_ += 64;
      return values;
    }
  }

  // A zero that the compiler does not know for one: with zeroing instead of merging, Zen 4 waits for what the
  // destination held before, and a loop runs at less than half the speed.
  static __m512i hidden_zero() {
    __m512i zero = _mm512_setzero_si512();
#if defined(__GNUC__)
    __asm__("" : "+v"(zero));
#endif
    return zero;
  }

  const std::uint8_t* next_;
  const std::uint8_t* masks_;
  const __m512i zero_ = hidden_zero();
};

// One token.
template <bool kHalf, bool kSparse>
void multiply_floats(const LinearView& w, const Inputs& x, std::size_t first, std::size_t last, float* y) {
  for (std::size_t tile = first; tile < last; ++tile) {
    __m512 sum[kFloatSums] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (std::size_t chunk = 0; chunk < w.chunks(); ++chunk) {
      Floats<kHalf, kSparse> stream(start_of(w, tile, chunk));
      const float* in = x.floats + chunk * w.chunk_segments() * w.segment;
      const std::size_t inputs = w.segments_of(chunk) * w.segment;
      for (std::size_t i = 0; i < inputs; i += 4) {
        for (std::size_t j = 0; j < 4; j += 2) {
          __m512 even, odd;
          stream.take(even, odd);
          sum[0] = _mm512_fmadd_ps(even, _mm512_set1_ps(in[i + j]), sum[0]);
          sum[1] = _mm512_fmadd_ps(odd, _mm512_set1_ps(in[i + j + 1]), sum[1]);
        }
      }
    }
    const __mmask16 real = static_cast<__mmask16>((1u << rows_of(w, tile)) - 1);
    _mm512_mask_storeu_ps(y + tile * kTileRows, real, _mm512_add_ps(sum[0], sum[1]));
  }
}

// `inputs` inputs of kTiles tiles, expanded to [inputs][16] and kChunkInputs · 16 floats apart, with kTokens tokens.
// The two sums of each output lie `apart` floats apart.
template <int kTiles, int kTokens>
void multiply_accumulate_floats(const float* weights, const float* in, std::size_t stride, std::size_t inputs,
                                float* sums, std::size_t apart) {
  __m512 sum[kFloatSums][kTiles][kTokens];
#pragma GCC unroll 16
  for (std::size_t j = 0; j < kFloatSums; ++j) {
#pragma GCC unroll 16
    for (int i = 0; i < kTiles; ++i) {
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) sum[j][i][t] = _mm512_load_ps(sums + j * apart + (t * 2 + i) * kTileRows);
    }
  }
  for (std::size_t k = 0; k < inputs; k += kFloatSums) {
#pragma GCC unroll 16
    for (std::size_t j = 0; j < kFloatSums; ++j) {
      __m512 unit[kTiles];
#pragma GCC unroll 16
      for (int i = 0; i < kTiles; ++i) unit[i] = _mm512_load_ps(weights + (i * kChunkInputs + k + j) * kTileRows);
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) {
        const __m512 one = _mm512_set1_ps(in[t * stride + k + j]);
#pragma GCC unroll 16
        for (int i = 0; i < kTiles; ++i) sum[j][i][t] = _mm512_fmadd_ps(unit[i], one, sum[j][i][t]);
      }
    }
  }
#pragma GCC unroll 16
  for (std::size_t j = 0; j < kFloatSums; ++j) {
#pragma GCC unroll 16
    for (int i = 0; i < kTiles; ++i) {
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) _mm512_store_ps(sums + j * apart + (t * 2 + i) * kTileRows, sum[j][i][t]);
    }
  }
}

template <int kTiles>
void multiply_accumulate_all_floats(const float* weights, const float* in, std::size_t stride, std::size_t inputs,
                                    std::size_t tokens, float* sums) {
  std::size_t t = 0;
  const auto run = [&](auto count) {
    constexpr int kTokens = decltype(count)::value;
    multiply_accumulate_floats<kTiles, kTokens>(weights, in + t * stride, stride, inputs, sums + t * 2 * kTileRows,
                                                tokens * 2 * kTileRows);
    t += kTokens;
  };
  while (t + 6 <= tokens) run(Int<6>());
  switch (tokens - t) {
    case 5: run(Int<2>()); [[fallthrough]];
    case 3: return run(Int<3>());
    case 4: return run(Int<4>());
    case 2: return run(Int<2>());
    case 1: return run(Int<1>());
    default: return;
  }
}

template <bool kHalf, bool kSparse>
void multiply_many_floats(const LinearView& w, const Inputs& x, std::size_t first, std::size_t last, float* y,
                          std::size_t y_stride, std::uint8_t* scratch) {
  constexpr std::size_t kChunkCodes = kChunkInputs * kTileRows;
  float* const weights = reinterpret_cast<float*>(scratch);
  float* const sums = weights + 2 * kChunkCodes;
  const std::size_t apart = x.tokens * 2 * kTileRows;
  for (std::size_t tile = first; tile < last; tile += 2) {
    const std::size_t tiles = least(2, last - tile);
    std::memset(sums, 0, kFloatSums * apart * sizeof(float));
    for (std::size_t chunk = 0; chunk < w.chunks(); ++chunk) {
      const std::size_t inputs = w.segments_of(chunk) * w.segment;
      for (std::size_t i = 0; i < tiles; ++i) {
        Floats<kHalf, kSparse> stream(start_of(w, tile + i, chunk));
        float* out = weights + i * kChunkCodes;
        for (std::size_t k = 0; k < inputs; k += 2, out += 2 * kTileRows) {
          __m512 even, odd;
          stream.take(even, odd);
          _mm512_store_ps(out, even);
          _mm512_store_ps(out + kTileRows, odd);
        }
      }
      const float* in = x.floats + chunk * w.chunk_segments() * w.segment;
      if (tiles == 2) multiply_accumulate_all_floats<2>(weights, in, x.stride, inputs, x.tokens, sums);
      else multiply_accumulate_all_floats<1>(weights, in, x.stride, inputs, x.tokens, sums);
    }
    for (std::size_t t = 0; t < x.tokens; ++t) {
      for (std::size_t i = 0; i < tiles; ++i) {
        const __mmask16 real = static_cast<__mmask16>((1u << rows_of(w, tile + i)) - 1);
        const float* const even = sums + (t * 2 + i) * kTileRows;
        _mm512_mask_storeu_ps(y + t * y_stride + (tile + i) * kTileRows, real,
                              _mm512_add_ps(_mm512_load_ps(even), _mm512_load_ps(even + apart)));
      }
    }
  }
}

template <bool kHalf, bool kSparse>
void run_floats(const LinearView& w, const Inputs& x, std::size_t first, std::size_t last, float* y,
                std::size_t y_stride, std::uint8_t* scratch) {
  if (x.tokens == 1) return multiply_floats<kHalf, kSparse>(w, x, first, last, y);
  multiply_many_floats<kHalf, kSparse>(w, x, first, last, y, y_stride, scratch);
}

void run(const LinearView& w, const Inputs& x, std::size_t first, std::size_t last, float* y, std::size_t y_stride,
         std::uint8_t* scratch) {
  switch (w.kind) {
    case WeightKind::codes2: return run_codes<2, false>(w, x, first, last, y, y_stride, scratch);
    case WeightKind::codes3: return run_codes<3, false>(w, x, first, last, y, y_stride, scratch);
    case WeightKind::codes5: return run_codes<5, false>(w, x, first, last, y, y_stride, scratch);
    case WeightKind::codes6: return run_codes<6, false>(w, x, first, last, y, y_stride, scratch);
    case WeightKind::codes4:
      if (w.sparse()) return run_codes<4, true>(w, x, first, last, y, y_stride, scratch);
      return run_codes<4, false>(w, x, first, last, y, y_stride, scratch);
    case WeightKind::codes8:
      if (w.sparse()) return run_codes<8, true>(w, x, first, last, y, y_stride, scratch);
      return run_codes<8, false>(w, x, first, last, y, y_stride, scratch);
    case WeightKind::bf16:
      if (w.sparse()) return run_floats<true, true>(w, x, first, last, y, y_stride, scratch);
      return run_floats<true, false>(w, x, first, last, y, y_stride, scratch);
    case WeightKind::f32:
      if (w.sparse()) return run_floats<false, true>(w, x, first, last, y, y_stride, scratch);
      return run_floats<false, false>(w, x, first, last, y, y_stride, scratch);
  }
}

}  // namespace

const LinearKernels avx512_linear = {run, avx512_run_input_major};

}  // namespace tulle
