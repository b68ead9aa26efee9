// What is checked before the tokens of a pass reach an engine.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/buffer.hpp"
#include "tulle/pass.hpp"

namespace tulle {

// The sizes themselves. Throws std::invalid_argument where one is out of range.
const EngineSizes& checked(const EngineSizes& sizes);

class PassCheck {
 public:
  PassCheck(std::size_t vocabulary, const EngineSizes& sizes);

  // Throws std::invalid_argument, one line, for anything out of range; for a position without a page, and for a page
  // that is written to and belongs to more than one block of a sequence; for a position that is given twice.
  void run(const PassInput& pass);
  void slot(std::size_t number) const;
  void page(std::size_t number) const;

 private:
  // Of a page that this pass writes to.
  struct Written {
    std::size_t pass;      // number of the pass that wrote last, from 1 on
    std::size_t cell;      // slot · blocks + block
    std::uint32_t tokens;  // a bit each
  };

  std::size_t vocabulary_, pages_, slots_, context_, batch_, blocks_;
  std::size_t pass_ = 0;
  Buffer<Written> written_;        // [pages]
  std::vector<std::size_t> used_;  // [slots]: blocks that the pass reads
};

}  // namespace tulle
