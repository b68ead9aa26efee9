// Rows of an embedding table.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "tulle/linear.hpp"

namespace tulle {

// x [n] ← row number `row` of a table [rows][n] in f32 or bf16.
inline void copy_row(WeightKind kind, const void* table, std::size_t row, std::size_t n, float* x) {
  if (kind == WeightKind::f32) {
    std::memcpy(x, static_cast<const float*>(table) + row * n, n * sizeof(float));
    return;
  }
  const std::uint8_t* from = static_cast<const std::uint8_t*>(table) + row * n * 2;
  for (std::size_t i = 0; i < n; ++i) {
    std::uint16_t bits;
    std::memcpy(&bits, from + 2 * i, sizeof bits);
    const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
    std::memcpy(x + i, &wide, sizeof wide);
  }
}

}  // namespace tulle
