// Which of its inputs a linear sees (docs/reference/format.md, "Sparse inputs").
#pragma once

#include <cstddef>
#include <cstdint>

#include "tulle/ops.hpp"

namespace tulle {

struct Selection {
  enum class Kind : std::uint8_t { none, top_k, threshold, relu } kind = Kind::none;
  std::size_t keep = 0, block = 0, unit = 1;  // top_k: `keep` of every `block` inputs, `unit` at a time
  bool norm = false;                          // a unit counts by its 2-norm, not by its largest
  float threshold = 0;
  bool rescale = false;
  const float* score = nullptr;               // [n]: |x| counts times this

  bool operator==(const Selection& other) const;

  // x [n] ← what is selected, zeros elsewhere; the ratio ‖x‖/‖x⊙M‖ where asked for, else 1. `spare`: 3 · (n + 16)
  // floats.
  float run(const OpsKernels& ops, float* x, std::size_t n, float* spare) const;
};

// mask [rows, n] ← of every row of size [rows, n], none below 0, the `keep` largest, ties to the lower index.
void keep_largest_mask(const OpsKernels& ops, const float* size, std::size_t rows, std::size_t n, std::size_t keep,
                       std::size_t threads, bool* mask);

// Throws std::invalid_argument, one line, where it does not fit a linear of n inputs.
void check(const Selection& selection, std::size_t n);

}  // namespace tulle
