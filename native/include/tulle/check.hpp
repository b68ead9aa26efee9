// The checks between an untrusted file and a kernel.
#pragma once

#include <cstdint>

#include "tulle/linear.hpp"

namespace tulle {

// Elements of the arrays that a LinearView points to.
struct LinearSizes {
  std::uint64_t values, masks, offsets, starts, scales, zeros, minima = 0, row_scales = 0;
};

// Throws std::invalid_argument, one line, unless every array is as long as the kernels will read, and masks and
// offsets agree.
void check(const LinearView& w, const LinearSizes& sizes);

}  // namespace tulle
