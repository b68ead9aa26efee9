// What is checked before the tokens of a pass reach an engine.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/buffer.hpp"

namespace tulle {

struct Limits {
  std::size_t vocabulary, slots, context, batch;
};

// Throws std::invalid_argument, one line, for anything out of range.
inline void check_pass(const Limits& limits, const std::int32_t* tokens, const std::int32_t* slots,
                       const std::int32_t* positions, std::size_t n, const std::int32_t* rows, std::size_t wanted) {
  require(n >= 1 && n <= limits.batch, "tokens of one pass, at most", limits.batch, n);
  require(wanted <= n, "rows of logits, at most", n, wanted);
  const auto inside = [](const char* what, std::int32_t value, std::size_t limit) {
    require(value >= 0 && static_cast<std::size_t>(value) < limit, what, limit, static_cast<std::size_t>(value));
  };
  for (std::size_t i = 0; i < n; ++i) {
    inside("tokens below", tokens[i], limits.vocabulary);
    inside("slots below", slots[i], limits.slots);
    inside("positions below", positions[i], limits.context);
  }
  for (std::size_t i = 0; i < wanted; ++i) {
    inside("rows below", rows[i], n);
    require(i == 0 || rows[i] > rows[i - 1], "rising rows; more than",
            i == 0 ? 0 : static_cast<std::size_t>(rows[i - 1]), static_cast<std::size_t>(rows[i]));
  }
}

}  // namespace tulle
