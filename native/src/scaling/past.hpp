// What the convolutions of sparse attention see of earlier tokens. They run over the outputs of the multiplicative
// layer ("images") of a token and the kPast before it, which are of the same pass or kept from earlier ones.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/buffer.hpp"
#include "decoder/recurrent_states.hpp"
#include "tulle/scaling.hpp"

namespace tulle {

class ConvolutionPast {
 public:
  // `image`: floats of one. The last kPast of every sequence are kept in `states`, of which floats(layers, image) from
  // the beginning of a record on are this class's.
  ConvolutionPast(RecurrentStates& states, std::size_t slots, std::size_t batch, std::size_t image);
  static std::size_t floats(std::size_t layers, std::size_t image) { return layers * kPast * image; }

  // Before a pass: where the images before each token are found. Throws std::invalid_argument where a sequence goes on
  // from somewhere else.
  void find(const std::int32_t* slots, const std::int32_t* positions, std::size_t n);

  // The image of this pass's token t, to be filled in.
  float* image(std::size_t t) { return images_.data() + t * size_; }
  // Tap `tap` of token t: of the token kPast − tap before it; zeros before the first.
  const float* tap(std::size_t layer, std::size_t t, std::size_t tap) const;
  // Keeps token t's image if it is one of the last kPast of its sequence.
  void keep(std::size_t layer, std::size_t t, std::int32_t slot, std::int32_t position);

  std::uint64_t work_bytes() const { return images_.bytes() + zeros_.bytes(); }

 private:
  enum class Place { before_the_first, kept, this_pass };
  struct Origin {
    Place place;
    std::size_t index;  // this_pass: the token; kept: position % kPast
    std::size_t slot;
  };

  RecurrentStates& states_;  // of a slot: [layer][kPast][size]
  std::size_t size_;
  Buffer<float> images_;  // [batch][size]
  Buffer<float> zeros_;
  std::vector<Origin> origins_;       // [batch][kPast], oldest first
  std::vector<std::size_t> last_of_;  // [slots]: one more than the last token of it in this pass so far
  std::vector<bool> kept_;            // [batch]
};

}  // namespace tulle
