// Tokens' inputs of a linear, as its kernel reads them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/buffer.hpp"
#include "tulle/engine.hpp"

namespace tulle {

// Planes of 8 bits that integers of a grid take.
inline std::size_t planes_of(const Grid& grid) { return grid.bits > 8 || (grid.bits == 8 && !grid.symmetric) ? 2 : 1; }

// The largest of each that any linear asks for.
struct InputSizes {
  std::size_t floats = 0;    // per token, of linears in floats
  std::size_t codes = 0;     // per token and plane, of linears in codes
  std::size_t segments = 0;
  std::size_t active = 0;    // entries of a token's list of active inputs, for input-major linears
  std::size_t planes = 1;

  void add(const Linear& linear);
};

// Where a token's inputs are: number `t` of those that a linear reads from row `base` on. Linears of other widths have
// other bases.
struct InputRow {
  std::size_t base, t;

  std::size_t number() const { return base + t; }
  // Of an array with `widest` elements a row, of which the linear has `own`.
  std::size_t at(std::size_t widest, std::size_t own) const { return base * widest + t * own; }
};

// Inputs of up to `tokens` tokens: floats, or integers in one or two planes with their sums per segment. For
// input-major linears beside that the list of the inputs that are active, not zero.
class QuantisedInputs {
 public:
  QuantisedInputs(const InputSizes& sizes, std::size_t tokens);

  // x [columns] as a token's input of a linear: quantised, selected. `copy`: floats for its inputs, no part of x;
  // `spare`: as of Selection::run.
  void set(const OpsKernels& ops, const Linear& linear, const float* x, InputRow row, float* copy, float* spare);

  // The input of one token becomes another's, too.
  void copy(const Linear& linear, InputRow from, InputRow to);

  // Of so many tokens from one on.
  Inputs view(const Linear& linear, InputRow first, std::size_t tokens) const;

  // x̂ = step · integer, of a token.
  float step(InputRow row) const { return steps_.data()[row.number()]; }
  // Active inputs of a token.
  std::size_t active(InputRow row) const { return active_.data()[row.number()]; }
  std::uint64_t bytes() const;

 private:
  void set_floats(const OpsKernels& ops, const Linear& linear, const float* x, InputRow row, float* spare);
  void list_active(const OpsKernels& ops, const LinearView& w, const std::int8_t* high, const std::int8_t* low,
                   InputRow row);

  InputSizes sizes_;
  Buffer<float> floats_, steps_;
  Buffer<std::int8_t> plane_[2], quad_plane_[2];
  Buffer<std::int32_t> sums_[2];
  Buffer<std::uint32_t> quads_, quad_starts_, active_;
};

}  // namespace tulle
