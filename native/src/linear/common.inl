// What the kernel files of linears share, each compiling it with its own flags. Internal linkage only: see
// cpu/tables.hpp.

static inline float from_bf16(std::uint16_t bits) {
  const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

static inline std::size_t least(std::size_t a, std::size_t b) { return a < b ? a : b; }

// Outputs of a tile that exist.
static inline std::size_t rows_of(const LinearView& w, std::size_t tile) {
  const std::size_t left = w.rows - tile * kTileRows;
  return left < kTileRows ? left : kTileRows;
}
