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

// What a thread takes at once: of a linear in tiles the tiles [first, last); of an input-major one the segments [first,
// last) of a panel, whose sums are partial sum number `part` of it. `product`: among those that are shared out together.
struct WorkItem {
  std::size_t linear, first, last;
  std::size_t panel = 0, part = 0, product = 0;
};

// A thread's items in order, and how many of them have been taken, by itself or by a thread that was done sooner.
struct WorkQueue {
  std::vector<WorkItem> items;
  alignas(kAlignment) std::atomic<std::size_t> taken{0};

  WorkQueue() = default;
  WorkQueue(WorkQueue&& other) noexcept : items(std::move(other.items)) {}
};

// Bytes of an item, at least: small enough for a thread that lost its core for a while to be helped, large enough for
// the count to cost nothing.
constexpr std::uint64_t kItemBytes = 128 * 1024;

// Tokens that input-major weights multiply at once: bounds the memory of their sums.
constexpr std::size_t kInputMajorTokens = 64;

// What a group's linears read, and where their outputs are.
struct Outline {
  std::vector<std::size_t> input_of;   // per linear: which of the group's inputs it reads
  std::vector<const Linear*> inputs;   // per input: a linear that shows how to quantise it
  std::vector<std::size_t> output;     // per linear: its first output among the group's
  std::size_t outputs = 0;
  // Per input-major linear: into how many parts its inputs are cut, where it has fewer panels than there are threads.
  // Each part gives partial sums.
  std::vector<std::size_t> parts;
  std::size_t most_parts = 1;
};

struct Plan : Outline {
  std::vector<WorkQueue> queues;  // per thread

  void restart() {
    for (WorkQueue& queue : queues) queue.taken.store(0, std::memory_order_relaxed);
  }
};

Outline outline_of(const Group& group, std::size_t threads);
Plan plan_of(const Group& group, std::size_t threads);
// All of linear number `number` of a group: tiles of `bytes` at least at once, or parts of panels.
void add_items(const Group& group, const Outline& outline, std::size_t number, std::uint64_t bytes,
               std::vector<WorkItem>& items);
// Whether what one group reads, transformed and quantised, is what the other one reads.
bool same_inputs(const Group& a, const Outline& of_a, const Group& b, const Outline& of_b);

}  // namespace tulle
