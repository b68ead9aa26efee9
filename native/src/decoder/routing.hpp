// Which experts a token goes to (src/tulle/models/routing.py).
#pragma once

#include <cstddef>
#include <cstdint>

#include "tulle/engine.hpp"

namespace tulle {

// experts [chosen], ascending, and their weights, of the router's outputs for all `count` experts, which become their
// scores. Whatever the outputs are, NaN included, experts are different ones. `spare`: 2 · count floats; `marks`: a
// byte for every expert and group.
void choose_experts(const Router& router, float* outputs, std::size_t count, std::uint32_t* experts, float* weights,
                    float* spare, std::uint8_t* marks);

}  // namespace tulle
