#include "decoder/pass.hpp"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
namespace tulle {
namespace {

void inside(const char* what, std::int32_t value, std::size_t limit) {
  if (value >= 0 && static_cast<std::size_t>(value) < limit) return;
  throw std::invalid_argument(std::string("expected ") + what + " below " + std::to_string(limit) +
                              " and at least 0, found " + std::to_string(value));
}

}  // namespace

const EngineSizes& checked(const EngineSizes& sizes) {
  constexpr std::size_t kMost = std::numeric_limits<std::int32_t>::max();  // what a number of a pass can name
  const auto within = [](const char* what, std::size_t found) {
    require(found >= 1 && found <= kMost, what, kMost, found);
  };
  within("pages of 1, at most", sizes.pages);
  within("slots of 1, at most", sizes.slots);
  within("tokens of context of 1, at most", sizes.context);
  within("tokens of a pass of 1, at most", sizes.batch);
  return sizes;
}

PassCheck::PassCheck(std::size_t vocabulary, const EngineSizes& sizes)
    : vocabulary_(vocabulary), pages_(sizes.pages), slots_(sizes.slots), context_(sizes.context), batch_(sizes.batch),
      blocks_((sizes.context + kKeyBlock - 1) / kKeyBlock), written_(sizes.pages), used_(sizes.slots) {}

void PassCheck::run(const PassInput& p) {
  require(p.n >= 1 && p.n <= batch_, "tokens of one pass, at most", batch_, p.n);
  require(p.wanted <= p.n, "rows of outputs, at most", p.n, p.wanted);
  for (std::size_t i = 0; i < p.n; ++i) {
    inside("tokens", p.tokens[i], vocabulary_);
    inside("slots", p.slots[i], slots_);
    inside("positions", p.positions[i], context_);
  }
  for (std::size_t i = 0; i < p.wanted; ++i) {
    inside("rows", p.rows[i], p.n);
    require(i == 0 || p.rows[i] > p.rows[i - 1], "rising rows; more than",
            i == 0 ? 0 : static_cast<std::size_t>(p.rows[i - 1]), static_cast<std::size_t>(p.rows[i]));
  }
  const auto place = [](std::size_t slot, std::size_t block) {
    return "page of block " + std::to_string(block) + " of slot " + std::to_string(slot);
  };
  const auto shared = [&](std::size_t cell, std::size_t other, std::size_t page) {
    throw std::invalid_argument(place(cell / blocks_, cell % blocks_) + ": expected one of its own, since it is written" +
                                " to; found " + std::to_string(page) + ", which block " +
                                std::to_string(other % blocks_) + " of slot " + std::to_string(other / blocks_) +
                                " has too");
  };
  const auto page_at = [&](std::size_t cell) {
    const std::int32_t page = p.tables[cell];
    if (page >= 0 && static_cast<std::size_t>(page) < pages_) return static_cast<std::size_t>(page);
    throw std::invalid_argument(place(cell / blocks_, cell % blocks_) + ": expected 0 to " +
                                std::to_string(pages_ - 1) + ", found " + std::to_string(page));
  };
  ++pass_;
  std::fill(used_.begin(), used_.end(), 0);
  for (std::size_t i = 0; i < p.n; ++i) {
    const std::size_t slot = static_cast<std::size_t>(p.slots[i]), position = static_cast<std::size_t>(p.positions[i]);
    const std::size_t block = position / kKeyBlock, cell = slot * blocks_ + block, page = page_at(cell);
    Written& w = written_.data()[page];
    if (w.pass != pass_) w = {pass_, cell, 0};
    if (w.cell != cell) shared(cell, w.cell, page);
    const std::uint32_t bit = std::uint32_t{1} << position % kKeyBlock;
    if (w.tokens & bit) {
      throw std::invalid_argument("positions of slot " + std::to_string(slot) + ": expected each once, found " +
                                  std::to_string(position) + " twice");
    }
    w.tokens |= bit;
    used_[slot] = std::max(used_[slot], block + 1);
  }
  for (std::size_t slot = 0; slot < slots_; ++slot) {
    for (std::size_t block = 0; block < used_[slot]; ++block) {
      const std::size_t cell = slot * blocks_ + block, page = page_at(cell);
      const Written& w = written_.data()[page];
      if (w.pass == pass_ && w.cell != cell) shared(w.cell, cell, page);
    }
  }
}

void PassCheck::slot(std::size_t number) const {
  if (number >= slots_) require(false, "slots, fewer than", slots_, number);
}

void PassCheck::page(std::size_t number) const {
  if (number >= pages_) require(false, "pages, fewer than", pages_, number);
}

}  // namespace tulle
