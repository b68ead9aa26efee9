// What the kernel files of linears share, each compiling it with its own flags. Internal linkage only: see tables.hpp.

// Bytes of one tile's dense values.
static inline std::size_t tile_bytes(const LinearView& w) {
  switch (w.kind) {
    case WeightKind::codes4: return w.padded() * kTileRows / 2;
    case WeightKind::codes8: return w.padded() * kTileRows;
    case WeightKind::bf16: return w.padded() * kTileRows * 2;
    default: return w.padded() * kTileRows * 4;
  }
}

static inline float from_bf16(std::uint16_t bits) {
  const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// Outputs of a tile that exist.
static inline std::size_t rows_of(const LinearView& w, std::size_t tile) {
  const std::size_t left = w.rows - tile * kTileRows;
  return left < kTileRows ? left : kTileRows;
}
