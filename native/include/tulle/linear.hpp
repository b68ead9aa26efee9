// The engine's linears: y = W·x with packed weights (docs/guide/run.md). What is packed how, smallest first:
//
//   unit      what one instruction multiplies: 4 inputs × 16 outputs of 8-bit codes (output major, inputs within),
//             2 × 16 of bfloat16, 1 × 16 of float32
//   tile      16 outputs (rows of W) × all inputs, unit after unit
//   segment   inputs that share a scale, padded alike, at most kChunkInputs
//   chunk     as many segments as fit into kChunkInputs inputs
//
// Layouts (enum Layout). In *tiles*, a token that has all inputs streams through the weights:
//
//      inputs ─►   0…3     4…7     8…11
//   tile 0       [unit 0][unit 1][unit 2] …     a sparse one has a bit per weight in that order, and of every chunk the
//   tile 1       [unit 0][unit 1][unit 2] …     kept codes or values alone, from its offset on
//
// *Input-major*, where tokens leave most inputs out: what one input multiplies of 64 bytes' worth of outputs (256 of
// 2-bit codes, 128 of 4 bits, 64 of 8) is a *cache line*; up to kPanelLines lines of outputs are a *panel*, in which
// inputs follow each other. Only the lines of a token's active inputs are read:
//
//      panel 0                                  panel 1
//   input 0   [line 0][line 1] … [line 95]     [line 96] …       each a contiguous run of memory
//   input 1   [line 0][line 1] … [line 95]     [line 96] …
//
//   byte 16·q + 4·t + i of a line: outputs 16·t + 4·q + i of its first 64 (the lowest bits), of the next 64, …, so that
//   the bytes of four inputs, interleaved, are units again
//
// A sparse line (4 bits) is a pair of 64-bit masks and the codes they keep; of an input, the masks of all its lines of
// a panel come first, then the codes. In *blocks of 4*, where tokens keep or drop four neighbouring inputs at a time, a
// block takes the place of an input: its line is four times as long, in units of its outputs' tiles. Unit p of the k-th
// codes of its bytes belongs to tile 4·k + p; of a sparse one, masks and codes of each p follow each other as lines'
// do.
//
// Two codes of 4 bits share a byte, of a unit (low) and of the next one (high): the j-th codes, of a sparse linear the
// j-th kept ones, so that a pair of units takes as many bytes as the fuller one keeps codes.
//
// Of other widths that do not fill a byte, dense tiles alone: as many units as fill whole *parts* of 64 bytes are a
// *group*. Byte i of a part holds code i of as many units as fit, the first in the lowest bits. What is left at the top
// of the bytes, 2 bits (of 3 and 6) or 3 bits (of 5), are the codes of the group's last units, highest bits first:
//
//   bits   units   parts   byte of a part, lowest bits first        units in the bits that are left
//     2      4       1     [u0 u1 u2 u3]
//     3      8       3     [u0 u1 +] [u2 u3 +] [u4 u5 +]             u6: bits 1–2 of part 0, bit 0 the lower one of part 2
//                                                                    u7: bits 1–2 of part 1, bit 0 the upper one of part 2
//     5      8       5     [u0 +] [u1 +] [u2 +] [u3 +] [u4 +]        u5: bits 2–4 of part 0, 0–1 the upper ones of part 3
//                                                                    u6: bits 2–4 of part 1, 0–1 the upper ones of part 4
//                                                                    u7: bits 2–4 of part 2, bit 0 the lowest of part 3,
//                                                                        bit 1 the lowest of part 4
//     6      4       3     [u0 +] [u1 +] [u2 +]                      u3: bits 4–5 of part 0, 2–3 of part 1, 0–1 of part 2
//
// Segments are whole groups. Codes of 7 bits take 8; sparse ones and input-major ones the next of 2 (dense input-major
// alone), 4 and 8.
//
// Codes are unsigned, activations signed 8-bit integers in one or two planes (x = hi, or 256·hi + lo). A pruned weight
// is the code of its zero point, so that Σ w·x = Σ u·x − z·Σ x holds as integers, dense or sparse. Where scales come
// with a minimum, weight = scale·(u − z) + minimum, and minimum·Σ x is added per scale, in floats. Scales of a byte are
// whole numbers, and a row has a float that all of them are multiplied with, after the row's sum.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tulle {

constexpr std::size_t kTileRows = 16;
constexpr std::size_t kChunkInputs = 512;
constexpr std::size_t kUnitBytes = 64;
// Codes of a pair of units, the even one's and the odd one's.
constexpr std::size_t kPairCodes = 2 * kUnitBytes;
// Readable bytes behind the last code or value: kernels load whole registers.
constexpr std::size_t kSlack = 64;

// Of weights that are floats, an output is the sum of two: of the even inputs, and of the odd ones, each added up input
// after input. One token alone needs two, since none can wait for its own last result; of several tokens there are two
// as well, so that a token's outputs are the same bits whatever others it is multiplied with. (The scalar file adds up
// input after input.)
constexpr std::size_t kFloatSums = 2;

// Lines of a panel, at most: the longer the run that an input's lines are, the nearer memory comes to the speed that it
// gives to what has no gaps (a machine's gaps of half: 256 bytes 50 %, 1 KiB 70 %, 2 KiB 85 %).
// Of 2-bit codes half as many: sums of a panel stay in the level-1 and level-2 caches.
constexpr std::size_t kPanelLines = 96;
// Bytes of a sparse line's masks, of one input.
constexpr std::size_t kLineMaskBytes = 16;

// Sparse codes have 4 or 8 bits, input-major ones 2, 4 or 8.
enum class WeightKind : std::uint8_t { codes2, codes3, codes4, codes5, codes6, codes8, bf16, f32 };
constexpr std::size_t kWeightKinds = 8;

constexpr std::size_t bits_of(WeightKind kind) {
  constexpr std::size_t bits[kWeightKinds] = {2, 3, 4, 5, 6, 8, 16, 32};
  return bits[static_cast<std::size_t>(kind)];
}

// Units of dense tiles that share bytes, and how many bytes those are.
constexpr std::size_t group_units(WeightKind kind) {
  constexpr std::size_t units[kWeightKinds] = {4, 8, 2, 8, 4, 1, 1, 1};
  return units[static_cast<std::size_t>(kind)];
}

// Of scales and minima. f16 is IEEE half precision; f32 holds products of two smaller scales exactly (GGUF's K-quants).
// u8: whole numbers, with LinearView::row_scales and without minima; in tiles.
enum class ScaleKind : std::uint8_t { bf16, f16, f32, u8 };
constexpr std::size_t kScaleKinds = 4;

constexpr std::size_t scale_bytes(ScaleKind kind) { return kind == ScaleKind::u8 ? 1 : kind == ScaleKind::f32 ? 4 : 2; }

// Input-major layouts hold codes, sparse ones of 4 bits.
enum class Layout : std::uint8_t {
  tiles,
  sparse_tiles,
  input_major,
  sparse_input_major,
  input_major_blocks4,
  sparse_input_major_blocks4,
};

struct LinearView {
  WeightKind kind;
  Layout layout;
  std::size_t rows, columns;
  std::size_t segment;           // inputs per segment, a multiple of segment_step(), at most kChunkInputs
  std::size_t segments;          // per row
  std::size_t segments_per_scale;
  const std::uint8_t* values;    // dense: units tile by tile; sparse: what the masks keep, chunks aligned to bytes
  const std::uint8_t* masks;     // sparse tiles: a bit per weight in the order of the units, tile by tile
  const std::uint64_t* offsets;  // sparse tiles: [tiles · chunks + 1] bytes into values where a tile's chunk begins;
                                 // sparse input-major: [panels + 1], where a panel does
  const std::uint32_t*
      starts;  // sparse input-major: [panels][input_blocks + 1] bytes into a panel where a block begins
  const void* scales;            // codes: of `scale_kind`, in tiles [tiles][scales][16], input-major
                                 // [scales][tiles][16]
  const std::uint8_t* zeros;     // codes: like scales, or null where all are `zero`
  std::uint8_t zero;
  ScaleKind scale_kind = ScaleKind::bf16;
  const void* minima = nullptr;  // dense codes in tiles: like scales, or null where all are 0
  const float* row_scales = nullptr;  // scales of one byte: [tiles][16], which a row's sum is multiplied with

  bool is_codes() const { return kind <= WeightKind::codes8; }
  bool sparse() const {
    return layout == Layout::sparse_tiles || layout == Layout::sparse_input_major ||
           layout == Layout::sparse_input_major_blocks4;
  }
  bool input_major() const { return layout >= Layout::input_major; }
  bool blocks4() const { return layout >= Layout::input_major_blocks4; }

  // Input-major ones of whole lines.
  std::size_t tiles() const {
    return input_major() ? lines() * line_tiles() : (rows + kTileRows - 1) / kTileRows;
  }
  std::size_t line_tiles() const { return kind == WeightKind::codes2 ? 16 : kind == WeightKind::codes4 ? 8 : 4; }
  std::size_t lines() const { return (rows + line_tiles() * kTileRows - 1) / (line_tiles() * kTileRows); }
  std::size_t panels() const {
    const std::size_t most = kind == WeightKind::codes2 ? kPanelLines / 2 : kPanelLines;
    return (lines() + most - 1) / most;
  }
  std::size_t panel_lines() const { return (lines() + panels() - 1) / panels(); }
  std::size_t lines_of(std::size_t panel) const {
    const std::size_t left = lines() - panel * panel_lines();
    return left < panel_lines() ? left : panel_lines();
  }
  std::size_t panel_outputs() const { return panel_lines() * line_tiles() * kTileRows; }  // of whole lines
  std::size_t padded() const { return segment * segments; }  // inputs
  std::size_t block_inputs() const { return blocks4() ? 4 : 1; }
  std::size_t input_blocks() const { return padded() / block_inputs(); }
  std::size_t line_bytes() const { return kUnitBytes * block_inputs(); }  // dense
  std::size_t line_mask_bytes() const { return kLineMaskBytes * block_inputs(); }  // bytes of them
  std::size_t chunk_segments() const { return segment >= kChunkInputs ? 1 : kChunkInputs / segment; }
  std::size_t chunks() const { return (segments + chunk_segments() - 1) / chunk_segments(); }
  // Whole groups of units; at least 8 inputs.
  std::size_t segment_step() const {
    const std::size_t group = layout == Layout::tiles ? 4 * group_units(kind) : 8;
    return group < 8 ? 8 : group;
  }
  std::size_t unit_inputs() const { return is_codes() ? 4 : kind == WeightKind::bf16 ? 2 : 1; }
  std::size_t scales_per_row() const { return segments / segments_per_scale; }
  // Where a tile's scales (and zero points) of a segment are. Input-major, those of all tiles follow each other, as an
  // input is multiplied with them.
  std::size_t scale_at(std::size_t tile, std::size_t of_segment) const {
    const std::size_t scale = of_segment / segments_per_scale;
    return (input_major() ? scale * tiles() + tile : tile * scales_per_row() + scale) * kTileRows;
  }
  // Segments of a chunk: the last one may have fewer.
  std::size_t segments_of(std::size_t chunk) const {
    const std::size_t first = chunk * chunk_segments(), left = segments - first;
    return left < chunk_segments() ? left : chunk_segments();
  }
};

// Tokens' inputs of a linear, in the padded order of its segments.
struct Inputs {
  std::size_t tokens;
  std::size_t stride;            // elements from one token to the next
  const float* floats;           // float weights: [tokens][stride]
  std::size_t planes;            // codes: 1 or 2
  const std::int8_t* plane[2];   // [tokens][stride]; with two, the first is the high one
  const std::int32_t* sums[2];   // per plane Σ x of a segment, [tokens][sum_stride]
  std::size_t sum_stride;
  const float* steps;            // [tokens]: x̂ = step · integer
  // For input-major weights: the active inputs, those that are not zero, in quads of four, of one segment after
  // another; a segment's last quad is padded with zeros of any index.
  const std::uint32_t* quads;         // [tokens][quad_stride · 4]: indices in the padded order; blocks of 4:
                                      // [tokens][quad_stride] which block, inputs in the row's order
  const std::int8_t* quad_plane[2];   // [tokens][quad_stride · 4]
  const std::uint32_t* quad_starts;   // [tokens][segments + 1]: a segment's first quad
  std::size_t quad_stride;            // quads
};

struct LinearKernels {
  // y[token][row] for the rows of tiles [first, last); y has `y_stride` floats per token and is written only at real
  // rows. `scratch`: scratch_bytes(tokens) bytes, 64-byte aligned, of this thread. Not for input-major weights.
  void (*run)(const LinearView& w, const Inputs& x, std::size_t first, std::size_t last, float* y,
              std::size_t y_stride, std::uint8_t* scratch);
  // Input-major weights: sums[token][output of the panel], 64-byte aligned like `stride` floats from one token to the
  // next, over segments [first, last), not yet times a token's step; outputs of whole lines, those that do
  // not exist too. `scratch`: input_major_scratch_bytes(tokens) bytes, aligned, of this thread.
  void (*run_input_major)(const LinearView& w, const Inputs& x, std::size_t panel, std::size_t first, std::size_t last,
                      float* sums, std::size_t stride, std::uint8_t* scratch);
};

// Of one thread, for up to so many tokens at once.
std::size_t scratch_bytes(std::size_t tokens);
std::size_t input_major_scratch_bytes(std::size_t tokens);

}  // namespace tulle
