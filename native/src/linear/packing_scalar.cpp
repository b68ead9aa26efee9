// Packing of codes and masks, plain loops: the definition that the other files must equal bit for bit.
//
//   nibbles    codes c0 c1 c2 …   ─►  bytes  c0 | c1 << 4,  c2 | c3 << 4, …
//   masks      dense  a 0 b c 0   ─►  bits   1 0 1 1 0      values  a b c
#include "cpu/tables.hpp"

namespace tulle {
namespace {

std::uint8_t pack_nibbles(const std::uint8_t* codes, std::size_t n, std::uint8_t* packed) {
  std::uint8_t any = 0;
  for (std::size_t i = 0; i < n; i += 2) {
    const std::uint8_t low = codes[i];
    const std::uint8_t high = i + 1 < n ? codes[i + 1] : 0;
    any |= low | high;
    packed[i / 2] = static_cast<std::uint8_t>(low | (high << 4));
  }
  return any;
}

void unpack_nibbles(const std::uint8_t* packed, std::size_t n, std::uint8_t* codes) {
  for (std::size_t i = 0; i < n; ++i) {
    codes[i] = (packed[i / 2] >> (i % 2 * 4)) & 0xf;
  }
}

bool is_set(const std::uint8_t* mask, std::size_t i) { return (mask[i / 8] >> (i % 8)) & 1; }

std::size_t count_bits(const std::uint8_t* mask, std::size_t n) {
  std::size_t count = 0;
  for (std::size_t i = 0; i < n; ++i) count += is_set(mask, i);
  return count;
}

template <typename T>
std::size_t expand(const std::uint8_t* mask, std::size_t n, const T* values, std::size_t, T* dense) {
  std::size_t used = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const bool stored = is_set(mask, i);
    dense[i] = stored ? values[used] : T{0};
    used += stored;
  }
  return used;
}

template <typename T>
std::size_t compress(const std::uint8_t* mask, std::size_t n, const T* dense, T* values) {
  std::size_t count = 0;
  for (std::size_t i = 0; i < n; ++i) {
    if (is_set(mask, i)) values[count++] = dense[i];
  }
  return count;
}

}  // namespace

const PackingKernels scalar_packing = {
    pack_nibbles,
    unpack_nibbles,
    count_bits,
    {expand<std::uint8_t>, compress<std::uint8_t>},
    {expand<std::uint16_t>, compress<std::uint16_t>},
    {expand<std::uint32_t>, compress<std::uint32_t>},
};

}  // namespace tulle
