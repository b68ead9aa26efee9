// Rows of a table of codes. One definition: a row per token costs little beside the linears.
#include "decoder/embedding.hpp"

#include <cstring>

#include "linear/dense_code.hpp"
#include "tulle/engine.hpp"

namespace tulle {
namespace {

#include "linear/common.inl"

template <WeightKind kKind>
void decode_row(const LinearView& w, std::size_t row, float* x) {
  const std::size_t scales = w.scales_per_row(), width = w.columns / scales, room = w.segment * w.segments_per_scale;
  const std::size_t tile = row / kTileRows, own = row % kTileRows;
  const std::size_t first = tile * w.padded() * kTileRows + own * 4;
  for (std::size_t s = 0; s < scales; ++s) {
    const std::size_t at = (tile * scales + s) * kTileRows + own;
    float scale = scale_value(w.scales, w.scale_kind, at);
    if (w.row_scales != nullptr) scale = w.row_scales[row] * scale;
    const int zero = w.zeros != nullptr ? w.zeros[at] : w.zero;
    const float minimum = w.minima != nullptr ? scale_value(w.minima, w.scale_kind, at) : 0.0f;
    for (std::size_t i = 0; i < width; ++i) {
      const std::size_t input = s * room + i;
      const unsigned code = dense_code(kKind, w.values, first + input / 4 * kUnitBytes + input % 4);
      const float value = scale * static_cast<float>(static_cast<int>(code) - zero);
      *x++ = w.minima != nullptr ? value + minimum : value;
    }
  }
}

}  // namespace

void Table::copy_row(std::size_t row, std::size_t hidden, float* x) const {
  if (numbers != nullptr) return tulle::copy_row(kind, numbers, row, hidden, x);
  switch (codes.kind) {
    case WeightKind::codes2: return decode_row<WeightKind::codes2>(codes, row, x);
    case WeightKind::codes3: return decode_row<WeightKind::codes3>(codes, row, x);
    case WeightKind::codes4: return decode_row<WeightKind::codes4>(codes, row, x);
    case WeightKind::codes5: return decode_row<WeightKind::codes5>(codes, row, x);
    case WeightKind::codes6: return decode_row<WeightKind::codes6>(codes, row, x);
    default: return decode_row<WeightKind::codes8>(codes, row, x);
  }
}

}  // namespace tulle
