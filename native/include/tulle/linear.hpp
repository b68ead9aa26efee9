// The engine's linears: y = W·x with weights in the kernel layout of docs/engine.md.
//
// Rows (outputs) come in tiles of 16. Of a tile, a *unit* is what one instruction meets: 4 inputs × 16 outputs of
// 8-bit codes (output major, inputs within), 2 × 16 of bfloat16, 1 × 16 of float32. Inputs come in *segments*, padded
// alike, of at most kChunkInputs inputs that share a scale, and segments in *chunks* of at most kChunkInputs inputs.
//
// Two codes of 4 bits share a byte, of a unit (low) and of the next one (high): the j-th codes, of a sparse linear the
// j-th kept ones, so that a pair of units takes as many bytes as the fuller one keeps codes.
//
// Where tokens leave most inputs at zero, weights stand by *columns* instead: what one input meets of 64 bytes' worth of
// outputs (256 of 2-bit codes, 128 of 4 bits, 64 of 8) is a *line*, a few lines of one input after another are a *strip*
// of outputs, and of a strip only the lines of inputs that a token has are read. Byte 16·q + 4·t + i of a line belongs to
// outputs 16·t + 4·q + i of its first 64, of the next 64, and so on, so that bytes of four inputs, interleaved, are
// units again. Of a sparse linear (4 bits), a line is a pair of 64-bit masks and the codes they keep, sharing bytes as
// above; an input's masks of a strip come first, then its codes. Where tokens keep or leave out inputs by fours of
// neighbours, a column is four inputs: its line is four times as long, units of its outputs' tiles: unit p of codes k of
// its bytes belongs to tile 4·k + p. Of a sparse one, masks and codes of each p follow each other as lines' do.
//
// Codes are unsigned, activations signed 8-bit integers in one or two planes (x = hi, or 256·hi + lo). A pruned
// weight is the code of its zero point, so that Σ w·x = Σ u·x − z·Σ x holds as integers, dense or sparse.
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

// Lines of a strip, at most: the longer the piece that an input's lines are, the nearer memory comes to the speed that
// it gives to what has no gaps (a machine's gaps of half: 256 bytes 50 %, 1 KiB 70 %, 2 KiB 85 %).
// Of 2-bit codes half as many: sums of a strip stay in the level-1 and level-2 caches.
constexpr std::size_t kStripLines = 96;
// Bytes of a sparse line's masks, of one input.
constexpr std::size_t kLineMasks = 16;

// codes2 comes by columns only.
enum class WeightKind : std::uint8_t { codes2, codes4, codes8, bf16, f32 };

struct LinearView {
  WeightKind kind;
  bool sparse;
  bool by_columns;               // codes alone, sparse ones of 4 bits
  bool fours;                    // a column is four inputs
  std::size_t rows, columns;
  std::size_t segment;           // inputs per segment, a multiple of 8, at most kChunkInputs
  std::size_t segments;          // per row
  std::size_t segments_per_scale;
  const std::uint8_t* values;    // dense: units tile by tile; sparse: what the masks keep, chunks aligned to bytes
  const std::uint8_t* masks;     // sparse: a bit per weight in the order of the units, tile by tile
  const std::uint64_t* offsets;  // sparse: [tiles · chunks + 1] bytes into values where a tile's chunk begins;
                                 // by columns [strips + 1], where a strip does
  const std::uint32_t* starts;   // sparse, by columns: [strips][columns + 1] bytes into a strip where a column begins
  const std::uint16_t* scales;   // codes: bfloat16 [tiles][scales][16], by columns [scales][tiles][16]
  const std::uint8_t* zeros;     // codes: like scales, or null where all are `zero`
  std::uint8_t zero;

  bool is_codes() const { return kind <= WeightKind::codes8; }
  // By columns, of whole lines.
  std::size_t tiles() const {
    return by_columns ? lines() * line_tiles() : (rows + kTileRows - 1) / kTileRows;
  }
  std::size_t line_tiles() const { return kind == WeightKind::codes2 ? 16 : kind == WeightKind::codes4 ? 8 : 4; }
  std::size_t lines() const { return (rows + line_tiles() * kTileRows - 1) / (line_tiles() * kTileRows); }
  std::size_t strips() const {
    const std::size_t most = kind == WeightKind::codes2 ? kStripLines / 2 : kStripLines;
    return (lines() + most - 1) / most;
  }
  std::size_t strip_lines() const { return (lines() + strips() - 1) / strips(); }
  std::size_t lines_of(std::size_t strip) const {
    const std::size_t left = lines() - strip * strip_lines();
    return left < strip_lines() ? left : strip_lines();
  }
  std::size_t panel_outputs() const { return strip_lines() * line_tiles() * kTileRows; }  // of whole lines
  std::size_t padded() const { return segment * segments; }  // inputs
  std::size_t column_inputs() const { return fours ? 4 : 1; }
  std::size_t all_columns() const { return padded() / column_inputs(); }
  std::size_t line_bytes() const { return kUnitBytes * column_inputs(); }  // dense
  std::size_t line_masks() const { return kLineMasks * column_inputs(); }  // bytes of them
  std::size_t chunk_segments() const { return segment >= kChunkInputs ? 1 : kChunkInputs / segment; }
  std::size_t chunks() const { return (segments + chunk_segments() - 1) / chunk_segments(); }
  std::size_t unit_inputs() const { return is_codes() ? 4 : kind == WeightKind::bf16 ? 2 : 1; }
  std::size_t scales_per_row() const { return segments / segments_per_scale; }
  // Where a tile's scales (and zero points) of a segment are. By columns, of all tiles one after another: an input meets
  // them in turn.
  std::size_t scale_at(std::size_t tile, std::size_t of_segment) const {
    const std::size_t scale = of_segment / segments_per_scale;
    return (by_columns ? scale * tiles() + tile : tile * scales_per_row() + scale) * kTileRows;
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
  // For weights by columns: the inputs that are not zero, four at a time, of one segment after another; a segment's
  // last quad is filled up with zeros that stand anywhere in the row.
  const std::uint32_t* quads;         // [tokens][quad_stride · 4]: places in the padded order; columns of fours:
                                      // [tokens][quad_stride] which column, inputs in the row's order
  const std::int8_t* quad_plane[2];   // [tokens][quad_stride · 4]
  const std::uint32_t* quad_starts;   // [tokens][segments + 1]: a segment's first quad
  std::size_t quad_stride;            // quads
};

struct LinearKernels {
  // y[token][row] for the rows of tiles [first, last); y has `y_stride` floats per token and is written only at real
  // rows. `scratch`: scratch_bytes(tokens) bytes, 64-byte aligned, of this thread. Not for weights by columns.
  void (*run)(const LinearView& w, const Inputs& x, std::size_t first, std::size_t last, float* y,
              std::size_t y_stride, std::uint8_t* scratch);
  // Weights by columns: sums[token][output of the strip], 64-byte aligned like `stride` floats from one token to the
  // next, over segments [first, last), not yet times a token's step; outputs of whole lines, those that do
  // not exist too. `scratch`: column_scratch_bytes(tokens) bytes, aligned, of this thread.
  void (*run_columns)(const LinearView& w, const Inputs& x, std::size_t strip, std::size_t first, std::size_t last,
                      float* sums, std::size_t stride, std::uint8_t* scratch);
};

// Of one thread, for up to so many tokens at once.
std::size_t scratch_bytes(std::size_t tokens);
std::size_t column_scratch_bytes(std::size_t tokens);

}  // namespace tulle
