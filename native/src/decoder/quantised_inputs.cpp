#include "decoder/quantised_inputs.hpp"

#include <cstring>

namespace tulle {

void Prepared::take(const OpsKernels& ops, const Linear& l, const float* x, std::size_t t, float* kept, float* spare) {
  const LinearView& w = l.weight;
  if (!w.is_codes()) {
    float* to = floats.data() + t * w.padded();
    std::memcpy(to, x, w.columns * sizeof(float));
    if (l.input.bits > 0) ops.fake(to, w.columns, ops.range(x, w.columns, l.input));
    const float ratio = l.selection.run(ops, to, w.columns, spare);
    if (ratio != 1.0f) {
      for (std::size_t i = 0; i < w.columns; ++i) to[i] *= ratio;
    }
    std::memset(to + w.columns, 0, (w.padded() - w.columns) * sizeof(float));
    return;
  }
  const bool two = planes_of(l.input) == 2;
  GridRange range{};
  float ratio = 1;
  if (l.selection.kind == Selection::Kind::none) {
    range = ops.range(x, w.columns, l.input);
  } else {
    std::memcpy(kept, x, w.columns * sizeof(float));
    if (!l.own_grid) {
      range = ops.range(x, w.columns, l.input);
      ops.fake(kept, w.columns, range);
    }
    ratio = l.selection.run(ops, kept, w.columns, spare);
    if (l.own_grid) range = ops.range(kept, w.columns, l.input);
    x = kept;
  }
  steps.data()[t] = range.step * ratio;
  const std::size_t scales = w.scales_per_row(), real = w.columns / scales;
  const std::size_t room = w.segment * w.segments_per_scale;
  std::int8_t* high = plane[0].data() + t * w.padded();
  std::int8_t* low = two ? plane[1].data() + t * w.padded() : nullptr;
  for (std::size_t s = 0; s < scales; ++s) {
    ops.quantise(x + s * real, real, range, high + s * room, two ? low + s * room : nullptr);
    std::memset(high + s * room + real, 0, room - real);
    if (two) std::memset(low + s * room + real, 0, room - real);
  }
  for (std::size_t s = 0; s < w.segments; ++s) {
    sums[0].data()[t * w.segments + s] = ops.sum(high + s * w.segment, w.segment);
    if (two) sums[1].data()[t * w.segments + s] = ops.sum(low + s * w.segment, w.segment);
  }
  if (w.by_columns) list(ops, w, high, low, t);
}

void Prepared::list(const OpsKernels& ops, const LinearView& w, const std::int8_t* high, const std::int8_t* low,
                    std::size_t t) {
  const std::size_t at = t * quad_stride(w) * 4;
  std::uint32_t* const places = quads.data() + (w.fours ? at / 4 : at);
  std::int8_t* const kept_high = quad_plane[0].data() + at;
  std::int8_t* const kept_low = low ? quad_plane[1].data() + at : nullptr;
  std::uint32_t* const starts = quad_starts.data() + t * (w.segments + 1);
  std::size_t next = 0, total = 0;
  for (std::size_t s = 0; s < w.segments; ++s) {
    starts[s] = static_cast<std::uint32_t>(next / 4);
    const std::size_t first = s * w.segment;
    if (w.fours) {
      next += 4 * ops.nonzero_fours(high + first, low ? low + first : nullptr, w.segment / 4,
                                    static_cast<std::uint32_t>(first / 4), places + next / 4, kept_high + next,
                                    kept_low ? kept_low + next : nullptr);
      total = next;
      continue;
    }
    const std::size_t found =
        ops.nonzero(high + first, low ? low + first : nullptr, w.segment, static_cast<std::uint32_t>(first),
                    places + next, kept_high + next, kept_low ? kept_low + next : nullptr);
    total += found;
    next += found;
    for (; next % 4 != 0; ++next) {
      places[next] = places[next - 1];
      kept_high[next] = 0;
      if (kept_low) kept_low[next] = 0;
    }
  }
  starts[w.segments] = static_cast<std::uint32_t>(next / 4);
  active.data()[t] = static_cast<std::uint32_t>(total);
}

}  // namespace tulle
