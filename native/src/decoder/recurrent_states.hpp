// What a sequence carries from token to token beside its keys and values, as large after one token as after a thousand:
// convolutions see the tokens before, linear attention has its matrices here; state spaces would have theirs.
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
  // Throws std::invalid_argument unless a token of the slot may stand at `position`: where the record ends, or behind
  // `before`, the sequence's token before in the same pass (null: none), or at the beginning of another sequence.
  void check_next(std::size_t slot, std::size_t position, const std::int32_t* before) const;
  // The records have seen the n tokens of a pass.
  void advance(const std::int32_t* slots, const std::int32_t* positions, std::size_t n);

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
  std::vector<std::size_t> next_;  // [slots + snapshots]: tokens that a record has seen
};

// Tokens of one sequence in a pass: those that are listed from `first` on.
struct SequenceRun {
  std::size_t slot, first, count;
  bool fresh;  // it begins at position 0: with a state of zeros
};

// The tokens of a pass by sequence, in order, wherever they stand in the pass.
class SequenceRuns {
 public:
  SequenceRuns(std::size_t slots, std::size_t batch);

  // Throws what RecurrentStates::check_next does.
  void find(const RecurrentStates& states, const std::int32_t* slots, const std::int32_t* positions, std::size_t n);
  const std::vector<SequenceRun>& all() const { return runs_; }
  // Numbers of a run's tokens within the pass.
  const std::int32_t* tokens(const SequenceRun& run) const { return tokens_.data() + run.first; }

 private:
  std::vector<SequenceRun> runs_;
  std::vector<std::int32_t> tokens_;   // [batch]
  std::vector<std::size_t> run_of_;    // [slots]: one more than the number of its run
  std::vector<std::int32_t> last_of_;  // [slots]: position of its last token so far
};

}  // namespace tulle
