// Linears in tiles by AMX, for several tokens: 16 consecutive units are, as they lie, a tile register of 64 inputs ×
// 16 outputs. Chunks of two tiles of outputs are expanded into the level-1 cache, then multiplied with 32 tokens at a
// time.
//
//                          tmm6  codes of tile 0      tmm7  codes of tile 1       [16 units][16 outputs · 4 inputs]
//   tmm4  tokens  0–15     tmm0  sums                 tmm1  sums                  [16 tokens][16 outputs], 32 bits
//   tmm5  tokens 16–31     tmm2  sums                 tmm3  sums
//         [16][64 inputs]
//
//   step (64 inputs): load 4, 6, 7, 5; tdpbsud 0 += 4·6, 1 += 4·7, 2 += 5·6, 3 += 5·7. After a segment: store the sums.
//   AVX-512 adds zero points and scales one segment behind, into the other half of the sums, while the tiles multiply.
//
// What does not fit (one token, few tokens, weights that are no codes, odd segments) goes to the AVX-512 kernels.
#include "linear/amx.hpp"

#include <immintrin.h>

#include <cstring>
#include <type_traits>

#include "cpu/tables.hpp"
#include "linear/amx_registers.hpp"

namespace tulle {
namespace {

#include "linear/avx512.inl"

constexpr std::size_t kTokens = 16;       // of a tile
constexpr std::size_t kFewest = 4;        // tokens; below, most of a tile would be idle
constexpr std::size_t kStepInputs = 64;   // of a tile
constexpr std::size_t kChunkCodes = kChunkInputs * kTileRows;
// Scratch: two panels of codes, of two segments four tiles of sums per plane, a chunk of the last tokens' inputs per
// plane, and where scratch_bytes() has room for them the sums of all tokens.
constexpr std::size_t kWholes = 2 * kChunkCodes;
constexpr std::size_t kSums4 = 4 * kTokens * kTileRows;
constexpr std::size_t kRest = kWholes + 2 * 2 * kSums4 * sizeof(std::int32_t);
constexpr std::size_t kRestBytes = kTokens * kChunkInputs;
constexpr std::size_t kSums = 2 * kChunkInputs * kTileRows * sizeof(float);
static_assert(kRest + 2 * kRestBytes <= kSums, "scratch");

// Inputs of one multiplication, 0 where a segment is no whole number of them.
std::size_t step_inputs(const LinearView& w) {
  const std::size_t step = least(w.segment, kStepInputs);
  return w.segment % step == 0 ? step : 0;
}

struct Rows {
  const std::int8_t* from;  // of the first token
  std::size_t stride;
};

// Sums over one segment of kTiles tiles and up to 32 tokens, [plane][token half · 2 + tile][16][16].
template <class Tiles, bool kTwoTiles>
void sum_segment(std::size_t segment, std::size_t step, const std::uint8_t* codes, const Rows& first,
                 const Rows* second, std::int32_t* to) {
  Tiles::template zero<0>();
  Tiles::template zero<1>();
  Tiles::template zero<2>();
  Tiles::template zero<3>();
  for (std::size_t i = 0; i < segment; i += step) {
    Tiles::template load<4>(first.from + i, first.stride);
    Tiles::template load<6>(codes + i * kTileRows, kUnitBytes);
    Tiles::template multiply<0, 4, 6>();
    if constexpr (kTwoTiles) {
      Tiles::template load<7>(codes + kChunkCodes + i * kTileRows, kUnitBytes);
      Tiles::template multiply<1, 4, 7>();
    }
    if (second == nullptr) continue;
    Tiles::template load<5>(second->from + i, second->stride);
    Tiles::template multiply<2, 5, 6>();
    if constexpr (kTwoTiles) Tiles::template multiply<3, 5, 7>();
  }
  constexpr std::size_t kSize = kTokens * kTileRows, kStride = kTileRows * sizeof(std::int32_t);
  Tiles::template store<0>(to, kStride);
  if constexpr (kTwoTiles) Tiles::template store<1>(to + kSize, kStride);
  if (second == nullptr) return;
  Tiles::template store<2>(to + 2 * kSize, kStride);
  if constexpr (kTwoTiles) Tiles::template store<3>(to + 3 * kSize, kStride);
}

// What sum_segment found, of `count` tokens from `token` on: wholes [plane][token half · 2 + tile][16][16].
struct Segment {
  std::size_t number, token, count;
  const std::int32_t* wholes;
};

// Adds a segment of two tiles at most to sums [token][2][16], scaled.
template <int kPlanes, bool kZeros, bool kMinima>
void add_segment(const LinearView& w, const Inputs& x, std::size_t tile, std::size_t tiles, const Segment& found,
                 float* sums) {
  const std::size_t segment = found.number;
  std::int32_t total[kPlanes][2 * kTokens];  // zero point times −Σ x, without zero points −Σ x
  for (std::size_t t = 0; t < found.count; ++t) {
    for (int p = 0; p < kPlanes; ++p) {
      const std::int32_t sum = x.sums[p][(found.token + t) * x.sum_stride + segment];
      total[p][t] = kZeros ? -sum : -static_cast<std::int32_t>(w.zero) * sum;
    }
  }
  for (std::size_t i = 0; i < tiles; ++i) {
    const std::size_t scale = ((tile + i) * w.scales_per_row() + segment / w.segments_per_scale) * kTileRows;
    const __m512i zeros = kZeros ? zeros_at(w, scale).wide : _mm512_setzero_si512();
    const __m512 scales = scales_at(w.scales, w.scale_kind, scale);
    const __m512 minima = kMinima ? scales_at(w.minima, w.scale_kind, scale) : _mm512_setzero_ps();
    const std::int32_t* from = found.wholes + i * kTokens * kTileRows;
    float* to = sums + (found.token * 2 + i) * kTileRows;
    for (std::size_t t = 0; t < found.count; ++t, from += kTileRows, to += 2 * kTileRows) {
      if (t == kTokens) from += kTokens * kTileRows;
      __m512 whole = _mm512_setzero_ps();
#pragma GCC unroll 2
      for (int p = 0; p < kPlanes; ++p) {
        __m512i corrected = _mm512_set1_epi32(total[p][t]);
        if (kZeros) corrected = _mm512_mullo_epi32(zeros, corrected);
        corrected = _mm512_add_epi32(corrected, _mm512_load_si512(from + p * kSums4));
        const __m512 plane = _mm512_cvtepi32_ps(corrected);
        whole = p == 0 ? plane : _mm512_fmadd_ps(whole, _mm512_set1_ps(256), plane);
      }
      __m512 result = _mm512_fmadd_ps(whole, scales, _mm512_load_ps(to));
      if (kMinima) {
        result = _mm512_fmadd_ps(_mm512_set1_ps(input_sum(x, found.token + t, segment)), minima, result);
      }
      _mm512_store_ps(to, result);
    }
  }
}

using AddSegment = void (*)(const LinearView& w, const Inputs& x, std::size_t tile, std::size_t tiles,
                            const Segment& found, float* sums);

AddSegment add_segment_of(const LinearView& w, const Inputs& x) {
  const auto of = [&](auto planes) -> AddSegment {
    constexpr int kPlanes = decltype(planes)::value;
    if (w.minima) return w.zeros ? add_segment<kPlanes, true, true> : add_segment<kPlanes, false, true>;
    return w.zeros ? add_segment<kPlanes, true, false> : add_segment<kPlanes, false, false>;
  };
  return x.planes == 2 ? of(std::integral_constant<int, 2>()) : of(std::integral_constant<int, 1>());
}

template <class Tiles, int kBits, bool kSparse>
void multiply(const LinearView& w, const Inputs& x, std::size_t first, std::size_t last, float* y,
              std::size_t y_stride, std::uint8_t* scratch) {
  const std::size_t step = step_inputs(w);
  std::int32_t* const wholes = reinterpret_cast<std::int32_t*>(scratch + kWholes);
  std::int8_t* const rest = reinterpret_cast<std::int8_t*>(scratch + kRest);
  float* const sums = reinterpret_cast<float*>(scratch + kSums);
  const std::size_t whole_tokens = x.tokens / kTokens * kTokens;
  const AddSegment add = add_segment_of(w, x);
  std::size_t half = 0;
  TileShapes shapes;
  for (int t = 0; t < 6; ++t) shapes.set(t, kTokens, t < 4 ? kTileRows * 4 : step);
  for (int t = 6; t < 8; ++t) shapes.set(t, step / 4, kUnitBytes);
  Tiles::begin(shapes);
  for (std::size_t tile = first; tile < last; tile += 2) {
    const std::size_t tiles = least(2, last - tile);
    std::memset(sums, 0, x.tokens * 2 * kTileRows * sizeof(float));
    for (std::size_t chunk = 0; chunk < w.chunks(); ++chunk) {
      for (std::size_t i = 0; i < tiles; ++i) expand<kBits, kSparse>(w, tile + i, chunk, scratch + i * kChunkCodes);
      const std::size_t start = chunk * w.chunk_segments(), inputs = w.segments_of(chunk) * w.segment;
      // The last tokens, fewer than a tile has rows: with zeros behind them.
      if (whole_tokens < x.tokens) {
        std::memset(rest, 0, x.planes * kRestBytes);
        for (std::size_t p = 0; p < x.planes; ++p) {
          for (std::size_t t = whole_tokens; t < x.tokens; ++t) {
            std::memcpy(rest + p * kRestBytes + (t - whole_tokens) * kChunkInputs,
                        x.plane[p] + t * x.stride + start * w.segment, inputs);
          }
        }
      }
      Segment behind{};
      for (std::size_t t = 0; t < x.tokens; t += 2 * kTokens) {
        for (std::size_t s = 0; s < w.segments_of(chunk); ++s) {
          const std::uint8_t* codes = scratch + s * w.segment * kTileRows;
          const auto rows_at = [&](std::size_t p, std::size_t token) -> Rows {
            if (token < whole_tokens) return {x.plane[p] + token * x.stride + (start + s) * w.segment, x.stride};
            return {rest + p * kRestBytes + s * w.segment, kChunkInputs};
          };
          std::int32_t* const to = wholes + half * 2 * kSums4;
          half = 1 - half;
          for (std::size_t p = 0; p < x.planes; ++p) {
            const Rows upper = rows_at(p, t), lower = rows_at(p, t + kTokens);
            const Rows* second = t + kTokens < x.tokens ? &lower : nullptr;
            if (tiles == 2) sum_segment<Tiles, true>(w.segment, step, codes, upper, second, to + p * kSums4);
            else sum_segment<Tiles, false>(w.segment, step, codes, upper, second, to + p * kSums4);
          }
          if (behind.count > 0) add(w, x, tile, tiles, behind, sums);
          behind = {start + s, t, least(2 * kTokens, x.tokens - t), to};
        }
      }
      add(w, x, tile, tiles, behind, sums);
    }
    write_scaled(w, x, tile, tiles, sums, y, y_stride);
  }
  Tiles::end();
}

template <class Tiles>
void run(const LinearView& w, const Inputs& x, std::size_t first, std::size_t last, float* y, std::size_t y_stride,
         std::uint8_t* scratch) {
  if (!w.is_codes() || x.tokens < kFewest || step_inputs(w) == 0) {
    return avx512_linear.run(w, x, first, last, y, y_stride, scratch);
  }
  switch (w.kind) {
    case WeightKind::codes2: return multiply<Tiles, 2, false>(w, x, first, last, y, y_stride, scratch);
    case WeightKind::codes3: return multiply<Tiles, 3, false>(w, x, first, last, y, y_stride, scratch);
    case WeightKind::codes5: return multiply<Tiles, 5, false>(w, x, first, last, y, y_stride, scratch);
    case WeightKind::codes6: return multiply<Tiles, 6, false>(w, x, first, last, y, y_stride, scratch);
    case WeightKind::codes4:
      if (w.sparse()) return multiply<Tiles, 4, true>(w, x, first, last, y, y_stride, scratch);
      return multiply<Tiles, 4, false>(w, x, first, last, y, y_stride, scratch);
    default:
      if (w.sparse()) return multiply<Tiles, 8, true>(w, x, first, last, y, y_stride, scratch);
      return multiply<Tiles, 8, false>(w, x, first, last, y, y_stride, scratch);
  }
}

template <class Tiles>
void product(const std::int8_t* a, const std::uint8_t* b, std::int32_t* c) {
  TileShapes shapes;
  for (int t : {0, 4, 6}) shapes.set(t, 16, 64);
  Tiles::begin(shapes);
  Tiles::template zero<0>();
  Tiles::template load<4>(a, 64);
  Tiles::template load<6>(b, 64);
  Tiles::template multiply<0, 4, 6>();
  Tiles::template store<0>(c, 64);
  Tiles::end();
}

}  // namespace

bool amx_multiplies() {
  std::int8_t a[16 * 64];
  std::uint8_t b[16 * 64];
  for (int i = 0; i < 16 * 64; ++i) {
    a[i] = static_cast<std::int8_t>(i * 37 + 11);
    b[i] = static_cast<std::uint8_t>(i * 91 + 5);
  }
  std::int32_t found[256] = {}, expected[256] = {};
  product<HardwareTiles>(a, b, found);
  product<EmulatedTiles>(a, b, expected);
  return std::memcmp(found, expected, sizeof found) == 0;
}

const LinearKernels amx_linear = {run<HardwareTiles>, avx512_run_input_major};
const LinearKernels amx_emulated_linear = {run<EmulatedTiles>, avx512_run_input_major};

}  // namespace tulle
