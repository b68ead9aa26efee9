// One code of dense tiles, whatever its bits: the definition of the groups that linear.hpp draws. Not for kernel files
// that are compiled for wider instruction sets (see cpu/tables.hpp).
#pragma once

#include <cstddef>
#include <cstdint>

#include "tulle/linear.hpp"

namespace tulle {

// Code number `index` in the order of units.
inline unsigned dense_code(WeightKind kind, const std::uint8_t* values, std::size_t index) {
  const std::size_t units = group_units(kind), unit = index / kUnitBytes % units, within = index % kUnitBytes;
  const std::uint8_t* const group = values + index / (units * kUnitBytes) * (units * bits_of(kind) * kUnitBytes / 8);
  // Bits [first, first + count) of a part's byte.
  const auto bits = [&](std::size_t part, unsigned first, unsigned count) {
    return static_cast<unsigned>(group[part * kUnitBytes + within]) >> first & ((1u << count) - 1);
  };
  switch (kind) {
    case WeightKind::codes2: return bits(0, static_cast<unsigned>(2 * unit), 2);
    case WeightKind::codes3:
      if (unit == 6) return bits(0, 6, 2) << 1 | bits(2, 6, 1);
      if (unit == 7) return bits(1, 6, 2) << 1 | bits(2, 7, 1);
      return bits(unit / 2, static_cast<unsigned>(unit % 2 * 3), 3);
    case WeightKind::codes4: return bits(0, static_cast<unsigned>(4 * unit), 4);
    case WeightKind::codes5:
      if (unit == 5) return bits(0, 5, 3) << 2 | bits(3, 6, 2);
      if (unit == 6) return bits(1, 5, 3) << 2 | bits(4, 6, 2);
      if (unit == 7) return bits(2, 5, 3) << 2 | bits(4, 5, 1) << 1 | bits(3, 5, 1);
      return bits(unit, 0, 5);
    case WeightKind::codes6:
      if (unit == 3) return bits(0, 6, 2) << 4 | bits(1, 6, 2) << 2 | bits(2, 6, 2);
      return bits(unit, 0, 6);
    default: return bits(0, 0, 8);
  }
}

}  // namespace tulle
