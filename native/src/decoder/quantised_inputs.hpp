// Tokens' inputs of a linear.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/buffer.hpp"
#include "tulle/engine.hpp"

namespace tulle {

// Planes of 8 bits that whole numbers of a grid take.
inline std::size_t planes_of(const Grid& grid) { return grid.bits > 8 || (grid.bits == 8 && !grid.symmetric) ? 2 : 1; }

// Inputs of up to `batch` tokens, prepared for a kernel.
struct Prepared {
  Buffer<float> floats, steps;
  Buffer<std::int8_t> plane[2], quad_plane[2];
  Buffer<std::int32_t> sums[2];
  Buffer<std::uint32_t> quads, quad_starts, active;  // active: how many inputs a token has

  // Tokens [first, first + tokens).
  Inputs view(const Linear& linear, std::size_t first, std::size_t tokens) const {
    const LinearView& w = linear.weight;
    Inputs x{};
    x.tokens = tokens;
    x.stride = w.padded();
    x.floats = floats.data() + first * x.stride;
    x.planes = w.is_codes() ? planes_of(linear.input) : 0;
    x.sum_stride = w.segments;
    x.steps = steps.data() + first;
    x.quad_stride = quad_stride(w);
    for (std::size_t p = 0; p < x.planes; ++p) {
      x.plane[p] = plane[p].data() + first * x.stride;
      x.sums[p] = sums[p].data() + first * x.sum_stride;
      x.quad_plane[p] = quad_plane[p].data() + first * x.quad_stride * 4;
    }
    x.quads = quads.data() + first * x.quad_stride * (w.fours ? 1 : 4);
    x.quad_starts = quad_starts.data() + first * (w.segments + 1);
    return x;
  }

  // Of one token: the list is written 16 elements at a time.
  static std::size_t quad_stride(const LinearView& w) { return w.padded() / 4 + 4; }

  // x as token t's input of a linear: rounded, selected, in floats or codes. `kept`: floats for its inputs, no part of
  // x; `spare`: as of Selection::run.
  void take(const OpsKernels& ops, const Linear& l, const float* x, std::size_t t, float* kept, float* spare);

 private:
  // The inputs of token t that are not zero.
  void list(const OpsKernels& ops, const LinearView& w, const std::int8_t* high, const std::int8_t* low, std::size_t t);
};

}  // namespace tulle
