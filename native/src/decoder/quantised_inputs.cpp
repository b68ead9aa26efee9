#include "decoder/quantised_inputs.hpp"

#include <algorithm>
#include <cstring>

namespace tulle {
namespace {

// Quads of one token's list: it is written 16 elements at a time.
std::size_t quad_stride(const LinearView& w) { return w.padded() / 4 + 4; }

// Entries of one token's list.
std::size_t listed(const LinearView& w) { return quad_stride(w) * (w.blocks4() ? 1 : 4); }

// Elements from one token's inputs to the next: an odd number of cache lines, so that a kernel that reads several tokens
// at once finds them in different sets of the cache.
std::size_t apart(const LinearView& w) {
  const std::size_t line = w.is_codes() ? 64 : 64 / sizeof(float);
  return ((w.padded() + line - 1) / line | 1) * line;
}

}  // namespace

void InputSizes::add(const Linear& linear) {
  const LinearView& w = linear.weight;
  if (!w.is_codes()) {
    floats = std::max(floats, apart(w));
    return;
  }
  codes = std::max(codes, apart(w));
  segments = std::max(segments, w.segments);
  planes = std::max(planes, planes_of(linear.input));
  if (w.input_major()) active = std::max(active, 4 * quad_stride(w));
}

QuantisedInputs::QuantisedInputs(const InputSizes& sizes, std::size_t tokens)
    : sizes_(sizes), floats_(tokens * sizes.floats), steps_(tokens) {
  for (std::size_t p = 0; p < sizes.planes; ++p) {
    plane_[p] = Buffer<std::int8_t>(tokens * sizes.codes);
    sums_[p] = Buffer<std::int32_t>(tokens * sizes.segments);
    if (sizes.active > 0) quad_plane_[p] = Buffer<std::int8_t>(tokens * sizes.active);
  }
  if (sizes.active == 0) return;
  quads_ = Buffer<std::uint32_t>(tokens * sizes.active);
  quad_starts_ = Buffer<std::uint32_t>(tokens * (sizes.segments + 1));
  active_ = Buffer<std::uint32_t>(tokens);
}

Inputs QuantisedInputs::view(const Linear& linear, InputRow first, std::size_t tokens) const {
  const LinearView& w = linear.weight;
  Inputs x{};
  x.tokens = tokens;
  x.stride = apart(w);
  x.floats = floats_.data() + first.at(sizes_.floats, x.stride);
  x.planes = w.is_codes() ? planes_of(linear.input) : 0;
  x.sum_stride = w.segments;
  x.steps = steps_.data() + first.number();
  x.quad_stride = quad_stride(w);
  for (std::size_t p = 0; p < x.planes; ++p) {
    x.plane[p] = plane_[p].data() + first.at(sizes_.codes, x.stride);
    x.sums[p] = sums_[p].data() + first.at(sizes_.segments, x.sum_stride);
    x.quad_plane[p] = quad_plane_[p].data() + first.at(sizes_.active, x.quad_stride * 4);
  }
  x.quads = quads_.data() + first.at(sizes_.active, listed(w));
  x.quad_starts = quad_starts_.data() + first.at(sizes_.segments + 1, w.segments + 1);
  return x;
}

void QuantisedInputs::copy(const Linear& l, InputRow from, InputRow to) {
  const LinearView& w = l.weight;
  const auto row = [&](auto* data, std::size_t widest, std::size_t own) {
    std::copy_n(data + from.at(widest, own), own, data + to.at(widest, own));
  };
  if (!w.is_codes()) return row(floats_.data(), sizes_.floats, apart(w));
  steps_.data()[to.number()] = step(from);
  for (std::size_t p = 0; p < planes_of(l.input); ++p) {
    row(plane_[p].data(), sizes_.codes, apart(w));
    row(sums_[p].data(), sizes_.segments, w.segments);
    if (w.input_major()) row(quad_plane_[p].data(), sizes_.active, quad_stride(w) * 4);
  }
  if (!w.input_major()) return;
  row(quads_.data(), sizes_.active, listed(w));
  row(quad_starts_.data(), sizes_.segments + 1, w.segments + 1);
  active_.data()[to.number()] = static_cast<std::uint32_t>(active(from));
}

void QuantisedInputs::set(const OpsKernels& ops, const Linear& l, const float* x, InputRow row, float* copy,
                          float* spare) {
  const LinearView& w = l.weight;
  if (!w.is_codes()) return set_floats(ops, l, x, row, spare);
  // A grid of the model comes before the selection, one of the engine's own after it.
  GridRange range{};
  float ratio = 1;
  if (l.selection.kind == Selection::Kind::none) {
    range = ops.range(x, w.columns, l.input);
  } else {
    std::memcpy(copy, x, w.columns * sizeof(float));
    if (!l.engine_grid) {
      range = ops.range(x, w.columns, l.input);
      ops.fake_quantise(copy, w.columns, range);
    }
    ratio = l.selection.run(ops, copy, w.columns, spare);
    if (l.engine_grid) range = ops.range(copy, w.columns, l.input);
    x = copy;
  }
  steps_.data()[row.number()] = range.step * ratio;
  // Inputs of one scale are padded apart.
  const bool two = planes_of(l.input) == 2;
  const std::size_t scales = w.scales_per_row(), real = w.columns / scales;
  const std::size_t room = w.segment * w.segments_per_scale;
  const std::size_t at = row.at(sizes_.codes, apart(w)), sum_at = row.at(sizes_.segments, w.segments);
  std::int8_t* high = plane_[0].data() + at;
  std::int8_t* low = two ? plane_[1].data() + at : nullptr;
  for (std::size_t s = 0; s < scales; ++s) {
    ops.quantise(x + s * real, real, range, high + s * room, two ? low + s * room : nullptr);
    std::memset(high + s * room + real, 0, room - real);
    if (two) std::memset(low + s * room + real, 0, room - real);
  }
  for (std::size_t s = 0; s < w.segments; ++s) {
    sums_[0].data()[sum_at + s] = ops.sum(high + s * w.segment, w.segment);
    if (two) sums_[1].data()[sum_at + s] = ops.sum(low + s * w.segment, w.segment);
  }
  if (w.input_major()) list_active(ops, w, high, low, row);
}

void QuantisedInputs::set_floats(const OpsKernels& ops, const Linear& l, const float* x, InputRow row, float* spare) {
  const LinearView& w = l.weight;
  float* to = floats_.data() + row.at(sizes_.floats, apart(w));
  std::memcpy(to, x, w.columns * sizeof(float));
  if (l.input.bits > 0) ops.fake_quantise(to, w.columns, ops.range(x, w.columns, l.input));
  const float ratio = l.selection.run(ops, to, w.columns, spare);
  if (ratio != 1.0f) {
    for (std::size_t i = 0; i < w.columns; ++i) to[i] *= ratio;
  }
  std::memset(to + w.columns, 0, (w.padded() - w.columns) * sizeof(float));
}

void QuantisedInputs::list_active(const OpsKernels& ops, const LinearView& w, const std::int8_t* high,
                                  const std::int8_t* low, InputRow row) {
  const std::size_t at = row.at(sizes_.active, quad_stride(w) * 4);
  std::uint32_t* const indices = quads_.data() + row.at(sizes_.active, listed(w));
  std::int8_t* const kept_high = quad_plane_[0].data() + at;
  std::int8_t* const kept_low = low ? quad_plane_[1].data() + at : nullptr;
  std::uint32_t* const starts = quad_starts_.data() + row.at(sizes_.segments + 1, w.segments + 1);
  std::size_t next = 0, total = 0;
  for (std::size_t s = 0; s < w.segments; ++s) {
    starts[s] = static_cast<std::uint32_t>(next / 4);
    const std::size_t first = s * w.segment;
    if (w.blocks4()) {
      next += 4 * ops.nonzero_blocks4(high + first, low ? low + first : nullptr, w.segment / 4,
                                    static_cast<std::uint32_t>(first / 4), indices + next / 4, kept_high + next,
                                    kept_low ? kept_low + next : nullptr);
      total = next;
      continue;
    }
    const std::size_t found =
        ops.nonzero(high + first, low ? low + first : nullptr, w.segment, static_cast<std::uint32_t>(first),
                    indices + next, kept_high + next, kept_low ? kept_low + next : nullptr);
    total += found;
    next += found;
    // The last quad of a segment is padded with zeros, which may have any index.
    for (; next % 4 != 0; ++next) {
      indices[next] = indices[next - 1];
      kept_high[next] = 0;
      if (kept_low) kept_low[next] = 0;
    }
  }
  starts[w.segments] = static_cast<std::uint32_t>(next / 4);
  active_.data()[row.number()] = static_cast<std::uint32_t>(total);
}

std::uint64_t QuantisedInputs::bytes() const {
  std::uint64_t bytes = floats_.bytes() + steps_.bytes();
  for (int p = 0; p < 2; ++p) bytes += plane_[p].bytes() + sums_[p].bytes() + quad_plane_[p].bytes();
  return bytes + quads_.bytes() + quad_starts_.bytes() + active_.bytes();
}

}  // namespace tulle
