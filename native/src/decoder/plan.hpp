// Who computes what of linears that share an input.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/buffer.hpp"
#include "tulle/engine.hpp"

namespace tulle {

// What a thread does of a group's linears: tiles [first, last), or where weights stand by columns segments [first,
// last) of a strip, whose sums are piece number `piece` of it.
struct Part {
  std::size_t linear, first, last;
  std::size_t strip = 0, piece = 0;
};

// A thread's own parts in order, and how many of them have been taken, by itself or by a thread that was done sooner.
struct Share {
  std::vector<Part> parts;
  alignas(kAlignment) std::atomic<std::size_t> taken{0};

  Share() = default;
  Share(Share&& other) noexcept : parts(std::move(other.parts)) {}
};

// Bytes of a part, at least: small enough for a thread that lost its core for a while to be helped, large enough for
// the count to cost nothing.
constexpr std::uint64_t kPartBytes = 128 * 1024;

// Tokens that weights by columns meet at once: bounds the room for their sums.
constexpr std::size_t kColumnTokens = 64;

struct Plan {
  std::vector<std::size_t> input_of;       // per linear: which of the prepared inputs it reads
  std::vector<const Linear*> inputs;       // a linear that shows how to prepare each
  std::vector<Share> shares;               // per thread
  std::vector<std::size_t> output;         // per linear: its first output among the group's
  std::size_t outputs = 0;
  // By columns: in how many pieces a linear's inputs are cut where it has fewer strips than there are threads.
  std::vector<std::size_t> pieces;
  std::size_t most_pieces = 1;
};

Plan plan_of(const Group& group, std::size_t threads);

// Outputs of a strip, of whole lines.
inline std::size_t strip_outputs(const LinearView& w) { return w.strip_lines() * w.line_tiles() * kTileRows; }

}  // namespace tulle
