#include <cmath>
#include <cstring>

#include "tulle/engine.hpp"

namespace tulle {

void Transform::run(const OpsKernels& ops, const float* x, float* y, float* work) const {
  switch (kind) {
    case Kind::diagonal: return ops.scale(x, numbers.data(), channels, y);
    case Kind::permutation:
      for (std::size_t i = 0; i < channels; ++i) y[i] = x[index[i]];
      return;
    case Kind::hadamard: {
      const std::size_t runs = channels / block * base, run = block / base;
      float* first = base == 1 ? y : work;
      std::memcpy(first, x, channels * sizeof(float));
      ops.butterflies(first, run, runs, 1.0f / std::sqrt(static_cast<float>(block)));
      if (base == 1) return;
      std::memset(y, 0, channels * sizeof(float));
      for (std::size_t start = 0; start < channels; start += block) {
        for (std::size_t i = 0; i < base; ++i) {
          ops.vector_matrix(numbers.data() + i * base, work + start, base, run, y + start + i * run);
        }
      }
      return;
    }
    case Kind::block_matrix:
      std::memset(y, 0, channels * sizeof(float));
      for (std::size_t start = 0; start < channels; start += block) {
        ops.vector_matrix(x + start, numbers.data() + (shared ? 0 : start * block), block, block, y + start);
      }
      return;
    case Kind::kronecker: {
      const float* right_matrix = numbers.data() + left * left;
      std::memset(work, 0, channels * sizeof(float));
      std::memset(y, 0, channels * sizeof(float));
      for (std::size_t i = 0; i < left; ++i)
        ops.vector_matrix(x + i * right, right_matrix, right, right, work + i * right);
      for (std::size_t i = 0; i < left; ++i)
        ops.vector_matrix(numbers.data() + i * left, work, left, right, y + i * right);
    }
  }
}

}  // namespace tulle
