// Cosines and sines of the tokens of a pass (rotary position embeddings, Su et al. 2021).
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/buffer.hpp"
#include "tulle/ops.hpp"

namespace tulle {

// [token][frequencies]
class RotaryTables {
 public:
  // `frequencies` are kept by reference; none: no position embedding. `scale`: on cosines and sines.
  RotaryTables(std::size_t batch, const std::vector<float>& frequencies, float scale, bool interleaved = false)
      : frequencies_(frequencies), scale_(scale), interleaved_(interleaved), cosines_(batch * frequencies.size()),
        sines_(batch * frequencies.size()) {}

  // Fills in token number t.
  void set(std::size_t t, std::int32_t position) {
    const std::size_t half = frequencies_.size();
    for (std::size_t i = 0; i < half; ++i) {
      const float angle = static_cast<float>(position) * frequencies_[i];
      cosines_.data()[t * half + i] = std::cos(angle) * scale_;
      sines_.data()[t * half + i] = std::sin(angle) * scale_;
    }
  }

  // Rotates the first channels of x [head_dim], a query or key of token number t.
  void rotate(const OpsKernels& ops, std::size_t t, float* x) const {
    const std::size_t half = frequencies_.size();
    if (half == 0) return;
    const auto run = interleaved_ ? ops.rope_interleaved : ops.rope;
    run(x, cosines_.data() + t * half, sines_.data() + t * half, 2 * half);
  }

  std::uint64_t bytes() const { return cosines_.bytes() + sines_.bytes(); }

 private:
  const std::vector<float>& frequencies_;
  float scale_;
  bool interleaved_;
  Buffer<float> cosines_, sines_;
};

}  // namespace tulle
