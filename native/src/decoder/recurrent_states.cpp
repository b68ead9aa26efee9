#include "decoder/recurrent_states.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <new>
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

Buffer<float> reserve(std::size_t count, std::size_t stride, std::size_t snapshots) {
  try {
    return Buffer<float>(count * stride);
  } catch (const std::bad_alloc&) {
    throw std::invalid_argument("recurrent states: expected as many as memory has room for, found " +
                                std::to_string(snapshots) + " snapshots");
  }
}

}  // namespace

RecurrentStates::RecurrentStates(std::size_t slots, std::size_t snapshots, std::size_t floats)
    : slots_(slots), snapshots_(snapshots), stride_(round_up(floats, kAlignment / sizeof(float))),
      records_(reserve(records(slots, snapshots, floats), stride_, snapshots)), next_(slots + snapshots, kNever) {
  for (std::size_t slot = 0; slot < slots; ++slot) next_[slot] = 0;
}

void RecurrentStates::check(std::size_t slot, std::size_t snapshot) const {
  if (stride_ == 0) throw std::invalid_argument("recurrent state: expected a model that has one, found none");
  require(slot < slots_, "slots, fewer than", slots_, slot);
  require(snapshot < snapshots_, "snapshots, fewer than", snapshots_, snapshot);
}

void RecurrentStates::check_next(std::size_t slot, std::size_t position, const std::int32_t* before) const {
  const std::size_t expected = before != nullptr ? static_cast<std::size_t>(*before) + 1 : next_[slot];
  if (position == expected || (position == 0 && before == nullptr)) return;
  throw std::invalid_argument("position of sequence " + std::to_string(slot) + ": expected " +
                              std::to_string(expected) + " or a start at 0, found " + std::to_string(position) +
                              "; a recurrent state goes on from where it is alone");
}

void RecurrentStates::advance(const std::int32_t* slots, const std::int32_t* positions, std::size_t n) {
  for (std::size_t t = 0; t < n; ++t) {
    next_[static_cast<std::size_t>(slots[t])] = static_cast<std::size_t>(positions[t]) + 1;
  }
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

SequenceRuns::SequenceRuns(std::size_t slots, std::size_t batch) : tokens_(batch), run_of_(slots), last_of_(slots) {
  runs_.reserve(std::min(slots, batch));
}

void SequenceRuns::find(const RecurrentStates& states, const std::int32_t* slots, const std::int32_t* positions,
                        std::size_t n) {
  std::fill(run_of_.begin(), run_of_.end(), 0);
  runs_.clear();
  for (std::size_t t = 0; t < n; ++t) {
    const std::size_t slot = static_cast<std::size_t>(slots[t]);
    const bool first = run_of_[slot] == 0;
    states.check_next(slot, static_cast<std::size_t>(positions[t]), first ? nullptr : &last_of_[slot]);
    if (first) {
      runs_.push_back({slot, 0, 0, positions[t] == 0});
      run_of_[slot] = runs_.size();
    }
    last_of_[slot] = positions[t];
    ++runs_[run_of_[slot] - 1].count;
  }
  std::size_t begin = 0;
  for (SequenceRun& run : runs_) {
    run.first = begin;
    begin += run.count;
    run.count = 0;  // counted again below
  }
  for (std::size_t t = 0; t < n; ++t) {
    SequenceRun& run = runs_[run_of_[static_cast<std::size_t>(slots[t])] - 1];
    tokens_[run.first + run.count++] = static_cast<std::int32_t>(t);
  }
}

}  // namespace tulle
