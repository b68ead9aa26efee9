#include "scaling/past.hpp"

#include <algorithm>
#include <cstring>

namespace tulle {

ConvolutionPast::ConvolutionPast(RecurrentStates& states, std::size_t slots, std::size_t batch, std::size_t image)
    : states_(states), size_(image), images_(batch * image), zeros_(image), origins_(batch * kPast), last_of_(slots),
      kept_(batch) {}

void ConvolutionPast::find(const std::int32_t* slots, const std::int32_t* positions, std::size_t n) {
  std::fill(last_of_.begin(), last_of_.end(), 0);
  for (std::size_t t = 0; t < n; ++t) {
    const std::size_t slot = static_cast<std::size_t>(slots[t]), position = static_cast<std::size_t>(positions[t]);
    const std::size_t before = last_of_[slot];
    states_.check_next(slot, position, before > 0 ? positions + before - 1 : nullptr);
    for (std::size_t tap = 0; tap < kPast; ++tap) {
      const std::size_t back = kPast - tap;
      Origin& o = origins_[t * kPast + tap];
      if (position < back) o = {Place::before_the_first, 0, slot};
      else if (before > 0 && back == 1) o = {Place::this_pass, before - 1, slot};
      // The token before has found its own past.
      else if (before > 0) o = origins_[(before - 1) * kPast + tap + 1];
      else o = {Place::kept, (position - back) % kPast, slot};
    }
    last_of_[slot] = t + 1;
  }
  // From the end: the last kPast of each sequence.
  std::fill(last_of_.begin(), last_of_.end(), 0);
  for (std::size_t t = n; t-- > 0;) kept_[t] = last_of_[static_cast<std::size_t>(slots[t])]++ < kPast;
}

const float* ConvolutionPast::tap(std::size_t layer, std::size_t t, std::size_t tap) const {
  if (tap == kPast) return images_.data() + t * size_;
  const Origin& o = origins_[t * kPast + tap];
  if (o.place == Place::this_pass) return images_.data() + o.index * size_;
  if (o.place == Place::kept) return states_.of(o.slot) + (layer * kPast + o.index) * size_;
  return zeros_.data();
}

void ConvolutionPast::keep(std::size_t layer, std::size_t t, std::int32_t slot, std::int32_t position) {
  if (!kept_[t]) return;
  const std::size_t index = layer * kPast + static_cast<std::size_t>(position) % kPast;
  std::memcpy(states_.of(static_cast<std::size_t>(slot)) + index * size_, image(t), size_ * sizeof(float));
}

}  // namespace tulle
