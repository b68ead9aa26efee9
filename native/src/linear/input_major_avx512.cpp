// Input-major linears by AVX-512 VNNI.
//
//   one quad = the lines of four active inputs a, b, c, d, 64 bytes each:
//     unpack bytes   a0 b0 a1 b1 …    c0 d0 c1 d1 …
//     unpack words   a0 b0 c0 d0 | a1 b1 c1 d1 | …   = units[0 … 3]: 16 outputs × 4 inputs
//     total[plane][4·k + i]   16 sums of units[i], of the k-th codes of their bytes (times 2^(bits·k), divided once)
//     four           the quad's x, broadcast;  step: interleave, per k mask, vpdpbusd
//   2-bit codes: 16 accumulators per plane; 4 bits 8; 8 bits 4
//
// Few tokens, one after another: a range of quads with a line at a time, sums in registers. More tokens: a line of a
// chunk is expanded to units in the level-2 cache once and multiplied with all of them.
#include <immintrin.h>

#include <cstring>

#include "cpu/tables.hpp"

namespace tulle {
namespace {

#include "linear/avx512.inl"
#include "linear/avx512_multiply_accumulate.inl"
#include "linear/input_major_common.inl"
#include "linear/input_major_stream.inl"

// Lines of four inputs → units of 16 outputs × 4 inputs, of every code in a byte.
void interleave(__m512i a, __m512i b, __m512i c, __m512i d, __m512i units[4]) {
  const __m512i ab = _mm512_unpacklo_epi8(a, b), AB = _mm512_unpackhi_epi8(a, b);
  const __m512i cd = _mm512_unpacklo_epi8(c, d), CD = _mm512_unpackhi_epi8(c, d);
  units[0] = _mm512_unpacklo_epi16(ab, cd);
  units[1] = _mm512_unpackhi_epi16(ab, cd);
  units[2] = _mm512_unpacklo_epi16(AB, CD);
  units[3] = _mm512_unpackhi_epi16(AB, CD);
}

// The k-th code of each byte, times 2^(bits · k): a mask is cheaper than a shift, and a sum is divided once.
template <int kPerByte>
__m512i code(__m512i bytes, int k) {
  if constexpr (kPerByte == 1) return bytes;
  return _mm512_and_si512(bytes,
                          _mm512_set1_epi8(static_cast<char>(((1 << (8 / kPerByte)) - 1) << (8 / kPerByte * k))));
}

template <int kPerByte>
__m512i divided(__m512i total, int k) {
  return kPerByte == 1 || k == 0 ? total : _mm512_srai_epi32(total, static_cast<unsigned>(8 / kPerByte * k));
}

// Units of a dense line at a quad.
template <int kCodes>
struct DenseLine {
  static constexpr int kPerByte = kCodes;
  static constexpr bool kOnce = false;
  static constexpr int kPrefetchLines = 1;  // prefetched at once
  static constexpr int kQuads = 8;  // of a range: what is prefetched meanwhile fits into the level-2 cache
  const std::uint8_t* from;
  std::size_t bytes;  // from one input to the next

  DenseLine(const LinearView& w, std::size_t panel, std::size_t line)
      : from(dense_panel(w, panel) + (line - panel * w.panel_lines()) * kUnitBytes), bytes(block_bytes(w, panel)) {}

  const std::uint8_t* at(std::uint32_t block) const { return from + block * bytes; }

  void take(const std::uint32_t* blocks, __m512i units[4 * kPerByte]) const {
    for (std::size_t j = 0; j < 4; ++j) prefetch_l1(at(blocks[j]) + kUnitBytes);
    __m512i wide[4];
    interleave(_mm512_loadu_si512(at(blocks[0])), _mm512_loadu_si512(at(blocks[1])), _mm512_loadu_si512(at(blocks[2])),
               _mm512_loadu_si512(at(blocks[3])), wide);
#pragma GCC unroll 4
    for (int k = 0; k < kPerByte; ++k) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) units[4 * k + i] = code<kPerByte>(wide[i], k);
    }
  }
};

// The same in blocks of 4.
template <int kCodes>
struct DenseBlocks4 {
  static constexpr int kPerByte = kCodes;
  static constexpr bool kOnce = false;
  static constexpr int kPrefetchLines = 4;
  static constexpr int kQuads = 8;
  const std::uint8_t* from;
  std::size_t bytes;  // from one block to the next

  DenseBlocks4(const LinearView& w, std::size_t panel, std::size_t line)
      : from(dense_panel(w, panel) + (line - panel * w.panel_lines()) * 4 * kUnitBytes), bytes(block_bytes(w, panel)) {}

  void take(const std::uint32_t* block, __m512i units[4 * kPerByte]) const {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512i wide = _mm512_loadu_si512(from + *block * bytes + 64 * i);
      prefetch_l1(from + *block * bytes + 64 * i + 256);
#pragma GCC unroll 4
      for (int k = 0; k < kPerByte; ++k) units[4 * k + i] = code<kPerByte>(wide, k);
    }
  }
};

// Quads of a range times a line. Sums of integers wait in totals [plane][stride], of this line, until all of
// the segment's quads are done; then sums [outputs of the line] += the segment.
template <int kPlanes, class Line>
void multiply_accumulate_quads(const LinearView& w, const Inputs& x, std::size_t token, std::size_t line,
                               const ScaleIndex& scaling, const Quads& quads, const QuadRange& s,
                               Prefetcher<Line::kPrefetchLines>& prefetcher, Line& weights, std::int32_t* totals,
                               std::size_t stride, float* sums) {
  constexpr int kPerByte = Line::kPerByte, kTiles = 4 * kPerByte;
  // Sums of both planes do not fit into the registers beside those of 2-bit codes.
  constexpr int kAtOnce = kTiles * kPlanes <= 16 ? kPlanes : 1;
  static_assert(kAtOnce == kPlanes || !Line::kOnce, "a sparse line is taken once");
  __m512 whole[kTiles];
#pragma GCC unroll 2
  for (int plane = 0; plane < kPlanes; plane += kAtOnce) {
    __m512i total[kAtOnce][kTiles];
#pragma GCC unroll 2
    for (int p = 0; p < kAtOnce; ++p) {
      const std::int32_t* const from = totals + static_cast<std::size_t>(plane + p) * stride;
#pragma GCC unroll 16
      for (int i = 0; i < kTiles; ++i)
        total[p][i] = s.opens_segment ? _mm512_setzero_si512() : _mm512_load_si512(from + 16 * i);
    }
    for (std::size_t quad = s.first; quad < s.last; ++quad) {
      __m512i units[kTiles];
      weights.take(quads.at(quad), units);
      if (plane == 0) prefetcher.step();
#pragma GCC unroll 2
      for (int p = 0; p < kAtOnce; ++p) {
        const __m512i four = broadcast4(quads.in[plane + p] + 4 * quad);
#pragma GCC unroll 16
        for (int i = 0; i < kTiles; ++i) dot(total[p][i], units[i], four);
      }
    }
#pragma GCC unroll 2
    for (int p = 0; p < kAtOnce; ++p) {
      if (!s.closes_segment) {
        std::int32_t* const to = totals + static_cast<std::size_t>(plane + p) * stride;
#pragma GCC unroll 16
        for (int i = 0; i < kTiles; ++i) _mm512_store_si512(to + 16 * i, total[p][i]);
        continue;
      }
      const std::int32_t sum = x.sums[plane + p][token * x.sum_stride + s.segment];
      const __m512i same = _mm512_set1_epi32(-static_cast<std::int32_t>(w.zero) * sum);
#pragma GCC unroll 16
      for (int i = 0; i < kTiles; ++i) {
        const std::size_t at = scaling.of(line * kTiles + static_cast<std::size_t>(i));
        const __m512i off = w.zeros == nullptr ? same : correction(w, zeros_at(w, at), sum);
        const __m512 part = _mm512_cvtepi32_ps(_mm512_add_epi32(divided<kPerByte>(total[p][i], i / 4), off));
        whole[i] = plane + p == 0 ? part : _mm512_fmadd_ps(whole[i], _mm512_set1_ps(256), part);
      }
    }
  }
  if (!s.closes_segment) return;
#pragma GCC unroll 16
  for (int i = 0; i < kTiles; ++i) {
    const __m512 scales = scales_at(w.scales, w.scale_kind, scaling.of(line * kTiles + static_cast<std::size_t>(i)));
    float* const to = sums + i * static_cast<int>(kTileRows);
    _mm512_store_ps(to, _mm512_fmadd_ps(whole[i], scales, _mm512_load_ps(to)));
  }
}

// Segments [begin, end) of a panel for one token. `totals`: a panel's sums of integers, of all planes.
template <class Line, int kPlanes>
void multiply_dense(const LinearView& w, const Inputs& x, std::size_t token, std::size_t panel, std::size_t begin,
                    std::size_t end, float* sums, std::int32_t* totals) {
  const std::size_t outputs = w.line_tiles() * kTileRows, first = panel * w.panel_lines(), lines = w.lines_of(panel);
  const std::uint8_t* const from = dense_panel(w, panel);
  const std::size_t bytes = block_bytes(w, panel), stride = lines * outputs;
  const Quads quads(w, x, token, end);
  const std::size_t start = quads.starts[begin];
  Prefetcher<Line::kPrefetchLines>(quads, start, least(start + Line::kQuads, quads.end), from, bytes, nullptr, 0)
      .finish();
  for_each_range(quads, begin, end, Line::kQuads, [&](const QuadRange& s, std::size_t later) {
    const ScaleIndex scaling(w, s.segment);
    Prefetcher<Line::kPrefetchLines> prefetcher(quads, s.last, later, from, bytes, nullptr, (s.last - s.first) * lines);
    for (std::size_t i = 0; i < lines; ++i) {
      Line weights(w, panel, first + i);
      multiply_accumulate_quads<kPlanes>(w, x, token, first + i, scaling, quads, s, prefetcher, weights,
                                         totals + i * outputs, stride, sums + i * outputs);
    }
    prefetcher.finish();
  });
}

// Blocks of a sparse panel as a range goes through them, line after line: where each block's codes go on moves along.
struct SparsePanel {
  const std::uint8_t* from;
  const std::uint32_t* starts;  // of the blocks
  std::uint32_t* next;          // where codes go on, of the blocks from `first_block` on
  const std::uint32_t* first_block;

  const std::uint8_t* masks(const std::uint32_t* block) const { return from + starts[*block]; }
  std::uint32_t& at(const std::uint32_t* block) const { return next[block - first_block]; }
};

// What the masks at `bits` keep of two times 64 codes, the second times 16, pruned ones at their zero points; returns
// the bytes.
std::uint32_t take_pair(const std::uint8_t* bits, const std::uint8_t* codes, __m512i zeros, __m512i high,
                        __m512i& first, __m512i& second) {
  const __m512i packed = _mm512_loadu_si512(codes);
  const __mmask64 even = mask64(bits), odd = mask64(bits + 8);
  first = _mm512_mask_expand_epi8(zeros, even, low_nibbles(packed));
  second = _mm512_mask_expand_epi8(high, odd, high_nibbles(packed));
  const auto n = _mm_popcnt_u64(even), m = _mm_popcnt_u64(odd);
  return static_cast<std::uint32_t>(n > m ? n : m);
}

// Zero points of four tiles, as a line's bytes.
__m512i zero_bytes(const LinearView& w, std::size_t tile, const ScaleIndex& scaling) {
  if (w.zeros == nullptr) return _mm512_set1_epi8(static_cast<char>(w.zero));
  alignas(64) std::uint8_t bytes[64];
  for (std::size_t t = 0; t < 4; ++t) {
    std::memcpy(bytes + 16 * t, w.zeros + scaling.of(tile + t), 16);
  }
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, _mm512_load_si512(bytes));
}

// Units of a sparse line at a quad, to be taken once per line.
struct SparseLine {
  static constexpr int kPerByte = 2;
  static constexpr bool kOnce = true;
  static constexpr int kPrefetchLines = 4;  // blocks are short, and what they end in is not a whole burst
  static constexpr int kQuads = 4;
  SparsePanel panel;
  std::size_t masks;  // bytes behind a block's start
  __m512i zeros, high;

  SparseLine(const LinearView& w, const SparsePanel& s, std::size_t line, std::size_t within, const ScaleIndex& scaling)
      : panel(s), masks(within * kLineMaskBytes), zeros(zero_bytes(w, line * 8, scaling)),
        high(_mm512_slli_epi16(zero_bytes(w, line * 8 + 4, scaling), 4)) {}

  void take(const std::uint32_t* blocks, __m512i units[8]) const {
    __m512i low_bytes[4], high_bytes[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      std::uint32_t& at = panel.at(blocks + j);
      at += take_pair(panel.masks(blocks + j) + masks, panel.from + at, zeros, high, low_bytes[j], high_bytes[j]);
    }
    interleave(low_bytes[0], low_bytes[1], low_bytes[2], low_bytes[3], units);
    interleave(high_bytes[0], high_bytes[1], high_bytes[2], high_bytes[3], units + 4);
  }
};

// The same in blocks of 4; kZeroPerTile: tiles have zero points of their own.
template <bool kZeroPerTile>
struct SparseBlocks4 {
  static constexpr int kPerByte = 2;
  static constexpr bool kOnce = true;
  static constexpr int kPrefetchLines = 4;
  static constexpr int kQuads = 8;
  SparsePanel panel;
  std::size_t masks;
  __m512i zeros[kZeroPerTile ? 4 : 1], high[kZeroPerTile ? 4 : 1];  // of the line's tiles

  SparseBlocks4(const LinearView& w, const SparsePanel& s, std::size_t line, std::size_t within,
                const ScaleIndex& scaling)
      : panel(s), masks(within * 4 * kLineMaskBytes) {
    for (std::size_t t = 0; t < (kZeroPerTile ? 4 : 1); ++t) {
      zeros[t] = zeros_at(w, scaling.of(line * 8 + t)).bytes;
      high[t] = zeros_at(w, scaling.of(line * 8 + 4 + t)).high;
    }
  }

  void take(const std::uint32_t* block, __m512i units[8]) const {
    const std::uint8_t* const bits = panel.masks(block) + masks;
    std::uint32_t at = panel.at(block);
    prefetch_l1(bits + 64);
    prefetch_l1(panel.from + at + 128);
    prefetch_l1(panel.from + at + 192);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      at += take_pair(bits + kLineMaskBytes * static_cast<std::size_t>(i), panel.from + at, zeros[kZeroPerTile ? i : 0],
                      high[kZeroPerTile ? i : 0], units[i], units[4 + i]);
    }
    panel.at(block) = at;
  }
};

template <class Line, int kPlanes>
void multiply_sparse(const LinearView& w, const Inputs& x, std::size_t token, std::size_t panel, std::size_t begin,
                     std::size_t end, float* sums, std::int32_t* totals) {
  const std::size_t outputs = w.line_tiles() * kTileRows, first = panel * w.panel_lines(), lines = w.lines_of(panel);
  const std::uint32_t masks = static_cast<std::uint32_t>(lines * w.line_mask_bytes());
  const std::uint8_t* const from = sparse_panel(w, panel);
  const std::uint32_t* const starts = sparse_starts(w, panel);
  const std::size_t stride = lines * outputs;
  std::uint32_t next[4 * Line::kQuads];
  const Quads quads(w, x, token, end);
  const std::size_t start = quads.starts[begin];
  Prefetcher<Line::kPrefetchLines>(quads, start, least(start + Line::kQuads, quads.end), from, 0, starts, 0).finish();
  for_each_range(quads, begin, end, Line::kQuads, [&](const QuadRange& s, std::size_t later) {
    const ScaleIndex scaling(w, s.segment);
    Prefetcher<Line::kPrefetchLines> prefetcher(quads, s.last, later, from, 0, starts, (s.last - s.first) * lines);
    const SparsePanel input_blocks{from, starts, next, quads.at(s.first)};
    for (const std::uint32_t* p = input_blocks.first_block; p != quads.at(s.last); ++p)
      input_blocks.at(p) = starts[*p] + masks;
    for (std::size_t i = 0; i < lines; ++i) {
      Line weights(w, input_blocks, first + i, i, scaling);
      multiply_accumulate_quads<kPlanes>(w, x, token, first + i, scaling, quads, s, prefetcher, weights,
                                         totals + i * outputs, stride, sums + i * outputs);
    }
    prefetcher.finish();
  });
}

template <int kPlanes>
void multiply(const LinearView& w, const Inputs& x, std::size_t token, std::size_t panel, std::size_t begin,
              std::size_t end, float* sums, std::int32_t* totals) {
  const auto run = [&](auto multiplied) { multiplied(w, x, token, panel, begin, end, sums, totals); };
  if (w.sparse() && !w.blocks4()) return run(multiply_sparse<SparseLine, kPlanes>);
  if (w.sparse())
    return run(w.zeros ? multiply_sparse<SparseBlocks4<true>, kPlanes>
                       : multiply_sparse<SparseBlocks4<false>, kPlanes>);
  switch (w.kind) {
    case WeightKind::codes2:
      return run(w.blocks4() ? multiply_dense<DenseBlocks4<4>, kPlanes> : multiply_dense<DenseLine<4>, kPlanes>);
    case WeightKind::codes4:
      return run(w.blocks4() ? multiply_dense<DenseBlocks4<2>, kPlanes> : multiply_dense<DenseLine<2>, kPlanes>);
    default: return run(w.blocks4() ? multiply_dense<DenseBlocks4<1>, kPlanes> : multiply_dense<DenseLine<1>, kPlanes>);
  }
}

// Units of four inputs, codes divided, to[tile][unit].
template <int kPerByte>
void put(const __m512i units[4 * kPerByte], std::uint8_t* to) {
  for (std::size_t t = 0; t < 4 * kPerByte; ++t) {
    const __m512i one = _mm512_srli_epi16(units[t], static_cast<unsigned>(8 / kPerByte * (t / 4)));
    _mm512_store_si512(to + t * kChunkInputs * kTileRows, one);
  }
}

// Which blocks four inputs from `input` on are.
void blocks_of(const LinearView& w, std::size_t input, std::uint32_t blocks[4]) {
  for (std::size_t j = 0; j < 4; ++j) blocks[j] = static_cast<std::uint32_t>(input / w.block_inputs() + j);
}

// Inputs [first, first + count) of a line as units, to[tile][unit]; count is a multiple of 4.
template <class Line>
void expand_quads(const LinearView& w, const Line& weights, std::size_t first, std::size_t count, std::uint8_t* to) {
  for (std::size_t i = 0; i < count; i += 4) {
    std::uint32_t blocks[4];
    blocks_of(w, first + i, blocks);
    __m512i units[4 * Line::kPerByte];
    weights.take(blocks, units);
    put<Line::kPerByte>(units, to + i * kTileRows);
  }
}

template <template <int> class Line>
void expand_dense(const LinearView& w, std::size_t line, std::size_t first, std::size_t count, std::uint8_t* to) {
  const auto run = [&](auto weights) { expand_quads(w, weights, first, count, to); };
  const std::size_t panel = line / w.panel_lines();
  switch (w.kind) {
    case WeightKind::codes2: return run(Line<4>(w, panel, line));
    case WeightKind::codes4: return run(Line<2>(w, panel, line));
    default: return run(Line<1>(w, panel, line));
  }
}

// `next`: where the codes of these inputs' blocks go on, of a panel's lines taken in order.
template <class Line>
void expand_sparse(const LinearView& w, std::size_t line, std::size_t first, std::size_t count, std::uint8_t* to,
                   std::uint32_t* next) {
  const std::size_t panel = line / w.panel_lines();
  for (std::size_t i = 0; i < count; i += 4) {
    std::uint32_t blocks[4];
    blocks_of(w, first + i, blocks);
    const SparsePanel input_blocks{sparse_panel(w, panel), sparse_starts(w, panel), next + i / w.block_inputs(),
                                   blocks};
    const Line weights(w, input_blocks, line, line - panel * w.panel_lines(), ScaleIndex(w, (first + i) / w.segment));
    __m512i units[8];
    weights.take(blocks, units);
    put<2>(units, to + i * kTileRows);
  }
}

void expand(const LinearView& w, std::size_t line, std::size_t first, std::size_t count, std::uint8_t* to,
            std::uint32_t* next) {
  if (!w.sparse())
    return w.blocks4() ? expand_dense<DenseBlocks4>(w, line, first, count, to)
                       : expand_dense<DenseLine>(w, line, first, count, to);
  if (w.blocks4()) return expand_sparse<SparseBlocks4<true>>(w, line, first, count, to, next);
  expand_sparse<SparseLine>(w, line, first, count, to, next);
}

// Segments [begin, end) of a line for all tokens, a chunk at a time, inactive inputs as the zeros that they are; added
// to `to`. `next`: of all blocks of these segments, as expand_sparse takes it.
void multiply_all(const LinearView& w, const Inputs& x, std::size_t line, std::size_t begin, std::size_t end, float* to,
                  std::size_t stride, std::uint8_t* codes, float* sums, std::uint32_t* next) {
  constexpr std::size_t kChunkCodes = kChunkInputs * kTileRows;
  const std::size_t pair = x.tokens * 2 * kTileRows;  // sums of two tiles
  // f(of a tile and token: its sums here, and there)
  const auto each = [&](auto f) {
    for (std::size_t i = 0; i < w.line_tiles(); ++i) {
      for (std::size_t t = 0; t < x.tokens; ++t)
        f(sums + i / 2 * pair + (t * 2 + i % 2) * kTileRows, to + t * stride + i * kTileRows);
    }
  };
  each([](float* here, const float* there) { _mm512_store_ps(here, _mm512_load_ps(there)); });
  for (std::size_t first = begin; first < end; first += w.chunk_segments()) {
    const std::size_t count = least(w.chunk_segments(), end - first);
    expand(w, line, first * w.segment, count * w.segment, codes, next + (first - begin) * w.segment / w.block_inputs());
    for (std::size_t i = 0; i < w.line_tiles(); i += 2) {
      for (std::size_t s = 0; s < count; ++s) {
        const std::uint8_t* from = codes + i * kChunkCodes + s * w.segment * kTileRows;
        const std::size_t tile = line * w.line_tiles() + i;
        if (x.planes == 1) multiply_accumulate_all<2, 1>(w, x, tile, first + s, from, kChunkCodes, sums + i / 2 * pair);
        else multiply_accumulate_all<2, 2>(w, x, tile, first + s, from, kChunkCodes, sums + i / 2 * pair);
      }
    }
  }
  each([](const float* here, float* there) { _mm512_store_ps(there, _mm512_load_ps(here)); });
}

// Up to so many tokens, each reads its own inputs of a panel, from the caches what another has read.
constexpr std::size_t kFew = 4;

}  // namespace

void avx512_run_input_major(const LinearView& w, const Inputs& x, std::size_t panel, std::size_t first,
                            std::size_t last, float* sums, std::size_t stride, std::uint8_t* scratch) {
  const std::size_t outputs = w.line_tiles() * kTileRows;
  for (std::size_t t = 0; t < x.tokens; ++t) {
    std::memset(sums + t * stride, 0, w.lines_of(panel) * outputs * sizeof(float));
  }
  if (x.tokens > kFew) {
    float* const own = reinterpret_cast<float*>(scratch + kChunkInputs * outputs);
    // What is left of the scratch, as much again for lines of 4-bit codes, holds where codes go on, of so many
    // segments.
    const std::size_t used = outputs * (kChunkInputs + x.tokens * sizeof(float)),
                      input_blocks = w.segment / w.block_inputs();
    const std::size_t room = (input_major_scratch_bytes(x.tokens) - used) / sizeof(std::uint32_t) / input_blocks;
    auto* const next = reinterpret_cast<std::uint32_t*>(scratch + used);
    for (std::size_t begin = first, end; begin < last; begin = end) {
      end = w.sparse() ? least(begin + room, last) : last;
      const std::uint32_t masks = static_cast<std::uint32_t>(w.lines_of(panel) * w.line_mask_bytes());
      for (std::size_t i = 0; w.sparse() && i < (end - begin) * input_blocks; ++i) {
        next[i] = sparse_starts(w, panel)[begin * input_blocks + i] + masks;
      }
      for (std::size_t i = 0; i < w.lines_of(panel); ++i) {
        multiply_all(w, x, panel * w.panel_lines() + i, begin, end, sums + i * outputs, stride, scratch, own, next);
      }
    }
    return;
  }
  for (std::size_t t = 0; t < x.tokens; ++t) {
    auto* const totals = reinterpret_cast<std::int32_t*>(scratch);
    if (x.planes == 1) multiply<1>(w, x, t, panel, first, last, sums + t * stride, totals);
    else multiply<2>(w, x, t, panel, first, last, sums + t * stride, totals);
  }
}

}  // namespace tulle
