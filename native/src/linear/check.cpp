#include "tulle/linear.hpp"

#include <stdexcept>
#include <string>

#include "tulle/check.hpp"
#include "tulle/dispatch.hpp"

namespace tulle {
namespace {

[[noreturn]] void refuse(const std::string& what, std::uint64_t expected, std::uint64_t found) {
  throw std::invalid_argument(what + ": expected " + std::to_string(expected) + ", found " + std::to_string(found));
}

void require(const char* what, std::uint64_t expected, std::uint64_t found) {
  if (expected != found) refuse(what, expected, found);
}

// Bytes of `count` values; of less than 8 bits each, a multiple of 8. Below 2^64 for up to 2^60 of them.
std::uint64_t value_bytes(WeightKind kind, std::uint64_t count) {
  const std::uint64_t bits = bits_of(kind);
  return bits < 8 ? count / 8 * bits : count * (bits / 8);
}

// Bytes of what `count` bits of a mask keep.
std::uint64_t kept_bytes(const PackingKernels& kernels, WeightKind kind, const std::uint8_t* mask, std::size_t count) {
  if (kind != WeightKind::codes4) return value_bytes(kind, kernels.count_bits(mask, count));
  std::uint64_t bytes = 0;
  for (std::size_t i = 0; i < count; i += kPairCodes, mask += kPairCodes / 8) {
    const std::uint64_t even = kernels.count_bits(mask, kUnitBytes), odd = kernels.count_bits(mask + 8, kUnitBytes);
    bytes += even > odd ? even : odd;
  }
  return bytes;
}

// Sparse input-major weights: masks and codes of every block lie where its start says, one behind the other.
void check_input_major(const LinearView& w, const LinearSizes& sizes) {
  require("offsets", w.panels() + 1, sizes.offsets);
  require("starts", w.panels() * (static_cast<std::uint64_t>(w.input_blocks()) + 1), sizes.starts);
  require("first offset", 0, w.offsets[0]);
  if (sizes.values < kSlack) refuse("bytes of the values, at least", kSlack, sizes.values);
  const std::uint64_t end = sizes.values - kSlack;
  require("last offset", end, w.offsets[w.panels()]);
  const PackingKernels& kernels = *active_isa().packing;
  for (std::size_t panel = 0; panel < w.panels(); ++panel) {
    const std::uint32_t* const starts = w.starts + panel * (w.input_blocks() + 1);
    const std::uint64_t first = w.offsets[panel], masks = w.lines_of(panel) * w.line_mask_bytes();
    if (first > end) refuse("an offset, at most", end, first);
    require("first start of a panel", 0, starts[0]);
    for (std::size_t c = 0; c < w.input_blocks(); ++c) {
      const std::uint64_t at = first + starts[c];
      if (at + masks > end) refuse("bytes behind a start, at least", masks, at < end ? end - at : 0);
      const std::uint64_t bytes = masks + kept_bytes(kernels, w.kind, w.values + at, 8 * masks);
      if (starts[c + 1] < starts[c] || starts[c + 1] - starts[c] != bytes) {
        refuse("bytes between two starts", bytes, static_cast<std::uint64_t>(starts[c + 1]) - starts[c]);
      }
      if (at + bytes > end) refuse("bytes behind a start, at least", bytes, end - at);
    }
    require("bytes of a panel", w.offsets[panel + 1] - first, starts[w.input_blocks()]);
  }
}

}  // namespace

std::size_t scratch_bytes(std::size_t tokens) {
  return 2 * kChunkInputs * kTileRows * sizeof(float) + tokens * kFloatSums * 2 * kTileRows * sizeof(float);
}

std::size_t input_major_scratch_bytes(std::size_t tokens) {
  constexpr std::size_t kMostTiles = 16;  // of a line
  return kMostTiles * kTileRows * (kChunkInputs + tokens * sizeof(float));
}

void check(const LinearView& w, const LinearSizes& sizes) {
  constexpr std::size_t kMost = std::size_t{1} << 30;  // of rows and padded columns: no product below overflows
  if (w.rows < 1 || w.rows > kMost || w.columns < 1 || w.columns > kMost) refuse("rows or columns", 1, w.rows);
  if (w.segment < 8 || w.segment > kChunkInputs || w.segment % 8 != 0)
    refuse("inputs of a segment", kChunkInputs, w.segment);
  require("inputs of a segment beyond whole groups of units", 0, w.segment % w.segment_step());
  if (w.segments < 1 || w.segments > kMost || w.segments_per_scale < 1) refuse("segments", 1, w.segments);
  require("segments that share scales evenly", 0, w.segments % w.segments_per_scale);
  if (w.padded() < w.columns || w.padded() > kMost) refuse("inputs of all segments", w.columns, w.padded());
  const std::uint64_t weights = static_cast<std::uint64_t>(w.tiles()) * kTileRows * w.padded();
  if (w.is_codes()) {
    const std::uint64_t scales = static_cast<std::uint64_t>(w.tiles()) * w.scales_per_row() * kTileRows;
    require("scales", scales, sizes.scales);
    if (w.zeros != nullptr) require("zero points", scales, sizes.zeros);
    if (w.minima != nullptr) require("minima", scales, sizes.minima);
  }
  const bool of_rows = w.is_codes() && w.scale_kind == ScaleKind::u8;
  require("scales of rows", of_rows ? w.tiles() * kTileRows : 0, w.row_scales != nullptr ? sizes.row_scales : 0);
  if (of_rows && (w.input_major() || w.minima != nullptr)) {
    throw std::invalid_argument("scales of one byte: expected tiles without minima, found others");
  }
  if (w.minima != nullptr && w.layout != Layout::tiles) {
    throw std::invalid_argument("minima: expected them with dense codes in tiles, found another layout");
  }
  if (w.minima != nullptr && !w.is_codes()) throw std::invalid_argument("minima: expected codes, found floats");
  if (w.input_major() && (!w.is_codes() || (w.sparse() && w.kind != WeightKind::codes4))) {
    throw std::invalid_argument("input-major weights: expected codes, sparse ones of 4 bits, found others");
  }
  const bool lanes = w.kind == WeightKind::codes4 || w.kind == WeightKind::codes8;
  if (w.is_codes() && w.layout != Layout::tiles && !lanes && (w.sparse() || w.kind != WeightKind::codes2)) {
    throw std::invalid_argument("codes: expected sparse ones of 4 or 8 bits, input-major ones of 2, 4 or 8, found others");
  }
  if (!w.sparse()) {
    require("bytes of the weights", value_bytes(w.kind, weights) + kSlack, sizes.values);
    return;
  }
  if (w.input_major()) return check_input_major(w, sizes);
  require("bytes of the masks", weights / 8, sizes.masks);
  const std::uint64_t chunks = static_cast<std::uint64_t>(w.tiles()) * w.chunks();
  require("offsets", chunks + 1, sizes.offsets);
  require("first offset", 0, w.offsets[0]);
  if (sizes.values < kSlack) refuse("bytes of the values, at least", kSlack, sizes.values);
  require("last offset", sizes.values - kSlack, w.offsets[chunks]);
  const PackingKernels& kernels = *active_isa().packing;
  const std::uint8_t* mask = w.masks;
  for (std::size_t tile = 0, i = 0; tile < w.tiles(); ++tile) {
    for (std::size_t chunk = 0; chunk < w.chunks(); ++chunk, ++i) {
      const std::size_t count = w.segments_of(chunk) * w.segment * kTileRows;
      const std::uint64_t bytes = kept_bytes(kernels, w.kind, mask, count);
      // Offsets begin at 0, so that none of them can lie beyond the last where every step is right.
      if (w.offsets[i + 1] - w.offsets[i] != bytes)
        refuse("bytes between two offsets", bytes, w.offsets[i + 1] - w.offsets[i]);
      mask += count / 8;
    }
  }
}

}  // namespace tulle
