// AMX tile registers, as instructions and as plain loops that do the same, so that a kernel can be tested where there
// is no AMX. Internal linkage only: see cpu/tables.hpp.
//
//   multiply<C, A, B>:   C [m][n] += Σ_k Σ_i A [m][4k + i] · B [k][4n + i]      A signed, B unsigned bytes, C 32 bits
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace tulle {
namespace {

// What ldtilecfg reads (Intel SDM volume 1, 18.2): bytes per row and rows of each tile.
struct alignas(64) TileShapes {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};

  void set(int tile, std::size_t height, std::size_t bytes) {
    rows[tile] = static_cast<std::uint8_t>(height);
    row_bytes[tile] = static_cast<std::uint16_t>(bytes);
  }
};
static_assert(sizeof(TileShapes) == 64, "ldtilecfg reads 64 bytes");

// Tile numbers are template arguments, because they are part of the instruction.
struct HardwareTiles {
  static void begin(const TileShapes& shapes) { __asm__ volatile("ldtilecfg %0" ::"m"(shapes)); }
  static void end() { __asm__ volatile("tilerelease"); }
  template <int kTile>
  static void zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
  }
  template <int kTile>
  static void load(const void* from, std::size_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kTile>
  static void store(void* to, std::size_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
  }
  // Adds to kTo [m][n] the sums over k and i of signed kSigned [m][4k + i] times unsigned kUnsigned [k][4n + i].
  template <int kTo, int kSigned, int kUnsigned>
  static void multiply() {
    __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kTo), "i"(kSigned), "i"(kUnsigned));
  }
};

struct EmulatedTiles {
  struct Tile {
    std::size_t rows, bytes;
    std::uint8_t data[16][64];
  };
  inline static thread_local Tile tiles[8];

  static void begin(const TileShapes& shapes) {
    for (int t = 0; t < 8; ++t) tiles[t] = {shapes.rows[t], shapes.row_bytes[t], {}};
  }
  static void end() {}
  template <int kTile>
  static void zero() {
    std::memset(tiles[kTile].data, 0, sizeof tiles[kTile].data);
  }
  template <int kTile>
  static void load(const void* from, std::size_t stride) {
    Tile& t = tiles[kTile];
    zero<kTile>();
    for (std::size_t r = 0; r < t.rows; ++r) {
      std::memcpy(t.data[r], static_cast<const std::uint8_t*>(from) + r * stride, t.bytes);
    }
  }
  template <int kTile>
  static void store(void* to, std::size_t stride) {
    const Tile& t = tiles[kTile];
    for (std::size_t r = 0; r < t.rows; ++r)
      std::memcpy(static_cast<std::uint8_t*>(to) + r * stride, t.data[r], t.bytes);
  }
  template <int kTo, int kSigned, int kUnsigned>
  static void multiply() {
    Tile& c = tiles[kTo];
    const Tile &a = tiles[kSigned], &b = tiles[kUnsigned];
    for (std::size_t m = 0; m < c.rows; ++m) {
      for (std::size_t n = 0; n < c.bytes / 4; ++n) {
        std::int32_t sum;
        std::memcpy(&sum, &c.data[m][4 * n], 4);
        for (std::size_t k = 0; k < a.bytes / 4; ++k) {
          for (std::size_t i = 0; i < 4; ++i) {
            sum += static_cast<std::int8_t>(a.data[m][4 * k + i]) * static_cast<std::int32_t>(b.data[k][4 * n + i]);
          }
        }
        std::memcpy(&c.data[m][4 * n], &sum, 4);
      }
    }
  }
};

}  // namespace
}  // namespace tulle
