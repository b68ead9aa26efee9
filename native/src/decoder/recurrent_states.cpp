#include "decoder/recurrent_states.hpp"

#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

namespace tulle {
namespace {

constexpr std::size_t kNever = std::numeric_limits<std::size_t>::max();

std::size_t records(std::size_t slots, std::size_t snapshots, std::size_t floats) {
  require(snapshots <= 1u << 30, "snapshots, at most", 1u << 30, snapshots);
  const double bytes = 4.0 * static_cast<double>(slots + snapshots) * static_cast<double>(floats);
  require(bytes < 0x1p47, "snapshots that fit into memory, fewer than", snapshots, snapshots);
  return slots + snapshots;
}

}  // namespace

RecurrentStates::RecurrentStates(std::size_t slots, std::size_t snapshots, std::size_t floats)
    : slots_(slots), snapshots_(snapshots), stride_(round_up(floats, kAlignment / sizeof(float))),
      records_(records(slots, snapshots, floats) * stride_), next_(slots + snapshots, kNever) {
  for (std::size_t slot = 0; slot < slots; ++slot) next_[slot] = 0;
}

void RecurrentStates::check(std::size_t slot, std::size_t snapshot) const {
  if (stride_ == 0) throw std::invalid_argument("recurrent state: expected a model that has one, found none");
  require(slot < slots_, "slots, fewer than", slots_, slot);
  require(snapshot < snapshots_, "snapshots, fewer than", snapshots_, snapshot);
}

void RecurrentStates::save(std::size_t slot, std::size_t snapshot) {
  check(slot, snapshot);
  copy(slot, slots_ + snapshot);
}

void RecurrentStates::load(std::size_t snapshot, std::size_t slot) {
  check(slot, snapshot);
  if (next_[slots_ + snapshot] == kNever) {
    throw std::invalid_argument("snapshot " + std::to_string(snapshot) + ": expected one that was saved");
  }
  copy(slots_ + snapshot, slot);
}

void RecurrentStates::copy(std::size_t from, std::size_t to) {
  std::memcpy(of(to), of(from), stride_ * sizeof(float));
  next_[to] = next_[from];
}

}  // namespace tulle
