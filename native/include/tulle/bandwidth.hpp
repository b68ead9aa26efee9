#pragma once

#include <cstddef>
#include <cstdint>

namespace tulle {

// Bytes per second at which `threads` threads read `bytes` bytes of memory, the best of `passes`.
double read_bandwidth(std::size_t bytes, std::size_t threads, std::size_t passes);

}  // namespace tulle
