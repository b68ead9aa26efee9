// Expanded codes of one or two tiles times several tokens. Internal linkage only: see cpu/tables.hpp.
//
//   zmm  total[tile][token][plane]   16 sums each; two tiles × twelve tokens × one plane = 24 accumulators
//        unit[tile]                  64 codes: 16 outputs × 4 inputs
//        four                        x[4u … 4u+3] of one token, broadcast
//
//   step u: load unit[0], unit[1]; per token and plane: broadcast four, vpdpbusd into total[0] and total[1]

// total += the sums of four products of unsigned codes and signed x. In place: where there are many
// accumulators, GCC 12 copies them around the intrinsic and spills them (with few it does better than this).
void dot(__m512i& total, __m512i codes, __m512i x) {
#if defined(__GNUC__)
  __asm__("vpdpbusd %2, %1, %0" : "+v"(total) : "v"(codes), "v"(x));
#else
  total = _mm512_dpbusd_epi32(total, codes, x);
#endif
}

__m512i broadcast4(const std::int8_t* x) {
  std::int32_t four;
  std::memcpy(&four, x, 4);
  return _mm512_set1_epi32(four);
}

// One segment of kTiles tiles, whose codes lie `tile_stride` bytes apart, with kTokens tokens.
template <int kTiles, int kTokens, int kPlanes>
void multiply_accumulate(const LinearView& w, const Inputs& x, std::size_t tile, std::size_t segment, std::size_t token,
          const std::uint8_t* codes, std::size_t tile_stride, float* sums) {
  const std::size_t units = w.segment / 4;
  __m512i total[kTiles][kTokens][kPlanes];
  std::size_t scale[kTiles];
#pragma GCC unroll 16
  for (int i = 0; i < kTiles; ++i) {
    scale[i] = w.scale_at(tile + i, segment);
    const Zeros zeros = zeros_at(w, scale[i]);
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 16
      for (int p = 0; p < kPlanes; ++p) {
        const std::int32_t sum = x.sums[p][(token + t) * x.sum_stride + segment];
        total[i][t][p] = correction(w, zeros, sum);
      }
    }
  }
  const std::int8_t* in[kPlanes];
#pragma GCC unroll 16
  for (int p = 0; p < kPlanes; ++p) in[p] = x.plane[p] + token * x.stride + segment * w.segment;
  for (std::size_t u = 0; u < units; ++u) {
    __m512i unit[kTiles];
#pragma GCC unroll 16
    for (int i = 0; i < kTiles; ++i) unit[i] = _mm512_load_si512(codes + i * tile_stride + u * kUnitBytes);
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 16
      for (int p = 0; p < kPlanes; ++p) {
        const __m512i four = broadcast4(in[p] + t * x.stride + 4 * u);
#pragma GCC unroll 16
        for (int i = 0; i < kTiles; ++i) dot(total[i][t][p], unit[i], four);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kTiles; ++i) {
    const __m512 scales = scales_at(w.scales, w.scale_kind, scale[i]);
    const __m512 minima = w.minima ? scales_at(w.minima, w.scale_kind, scale[i]) : _mm512_setzero_ps();
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) {
      __m512 whole = _mm512_cvtepi32_ps(total[i][t][0]);
      if constexpr (kPlanes == 2) {
        whole = _mm512_fmadd_ps(whole, _mm512_set1_ps(256), _mm512_cvtepi32_ps(total[i][t][kPlanes - 1]));
      }
      float* sum = sums + ((token + t) * 2 + i) * kTileRows;
      __m512 result = _mm512_fmadd_ps(whole, scales, _mm512_load_ps(sum));
      if (w.minima) {
        const __m512 inputs = _mm512_set1_ps(input_sum(x, token + static_cast<std::size_t>(t), segment));
        result = _mm512_fmadd_ps(inputs, minima, result);
      }
      _mm512_store_ps(sum, result);
    }
  }
}

template <int kTiles, int kPlanes>
void multiply_accumulate_all(const LinearView& w, const Inputs& x, std::size_t tile, std::size_t segment,
                             const std::uint8_t* codes, std::size_t tile_stride, float* sums) {
  constexpr int kMost = kPlanes == 1 ? 12 : 6;
  std::size_t t = 0;
  for (; t + kMost <= x.tokens; t += kMost) {
    multiply_accumulate<kTiles, kMost, kPlanes>(w, x, tile, segment, t, codes, tile_stride, sums);
  }
  for (; t + 4 <= x.tokens; t += 4)
    multiply_accumulate<kTiles, 4, kPlanes>(w, x, tile, segment, t, codes, tile_stride, sums);
  switch (x.tokens - t) {
    case 1: return multiply_accumulate<kTiles, 1, kPlanes>(w, x, tile, segment, t, codes, tile_stride, sums);
    case 2: return multiply_accumulate<kTiles, 2, kPlanes>(w, x, tile, segment, t, codes, tile_stride, sums);
    case 3: return multiply_accumulate<kTiles, 3, kPlanes>(w, x, tile, segment, t, codes, tile_stride, sums);
    default: return;
  }
}
