// What a sequence carries from token to token beside its keys and values, as large after one token as after a thousand:
// the Scaling Transformer's convolutions see the two tokens before; linear attention and state spaces would keep their
// matrices here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/buffer.hpp"

namespace tulle {

// A record of floats per sequence, and snapshots of such records: with a snapshot taken after its first p tokens and the
// pages that hold them, a sequence goes on from position p as if it had gone through them itself. Whose floats these
// are is for the model's parts to say (at which offset of a record, in which layer).
class RecurrentStates {
 public:
  // `floats` of a sequence, all layers together; 0: the model has no such state.
  RecurrentStates(std::size_t slots, std::size_t snapshots, std::size_t floats);

  float* of(std::size_t slot) const { return records_.data() + slot * stride_; }
  // Where the slot's sequence goes on: how many tokens its record has seen.
  std::size_t next(std::size_t slot) const { return next_[slot]; }
  void set_next(std::size_t slot, std::size_t position) { next_[slot] = position; }

  // Throw std::invalid_argument for numbers out of range, for a snapshot that was never saved, and where there is no
  // state.
  void save(std::size_t slot, std::size_t snapshot);
  void load(std::size_t snapshot, std::size_t slot);

  // Of one record.
  std::uint64_t record_bytes() const { return stride_ * sizeof(float); }
  std::uint64_t bytes() const { return record_bytes() * next_.size(); }

 private:
  void check(std::size_t slot, std::size_t snapshot) const;
  void copy(std::size_t from, std::size_t to);

  std::size_t slots_, snapshots_, stride_;
  Buffer<float> records_;          // [slots + snapshots][stride]
  std::vector<std::size_t> next_;  // [slots + snapshots]
};

}  // namespace tulle
