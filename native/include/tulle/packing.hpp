// Nibble packing and bitmask compression: the byte layouts of docs/reference/format.md, sections "Codes" and "Sparse".
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace tulle {

// Every function writes exactly its output range and reads exactly its input range. A mask of n bits occupies
// ceil(n/8) bytes, bit i of byte j standing for element 8j+i; bits from n on in the last byte are ignored.
template <typename T>
struct MaskKernels {
  // dense[i] = next value where bit i is set, else 0. Returns the number of values used.
  // `available` >= the number of set bits: how many values may be read.
  std::size_t (*expand)(const std::uint8_t* mask, std::size_t n, const T* values, std::size_t available, T* dense);
  // values = the elements of dense whose bit is set, in order. Returns their number.
  std::size_t (*compress)(const std::uint8_t* mask, std::size_t n, const T* dense, T* values);
};

struct PackingKernels {
  // packed[i] = codes[2i] | codes[2i+1] << 4, the missing last code being 0; ceil(n/2) bytes.
  // Returns the bitwise or of all codes: above 15, some code did not fit and `packed` is meaningless.
  std::uint8_t (*pack_nibbles)(const std::uint8_t* codes, std::size_t n, std::uint8_t* packed);
  void (*unpack_nibbles)(const std::uint8_t* packed, std::size_t n, std::uint8_t* codes);
  std::size_t (*count_bits)(const std::uint8_t* mask, std::size_t n);
  MaskKernels<std::uint8_t> mask8;
  MaskKernels<std::uint16_t> mask16;
  MaskKernels<std::uint32_t> mask32;

  template <typename T>
  const MaskKernels<T>& mask_kernels() const {
    if constexpr (std::is_same_v<T, std::uint8_t>) return mask8;
    else if constexpr (std::is_same_v<T, std::uint16_t>) return mask16;
    else return mask32;
  }
};

}  // namespace tulle
