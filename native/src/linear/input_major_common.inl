// Where the kernels for input-major weights find them. Internal linkage only: see cpu/tables.hpp.

// Bytes of a dense input (or block of 4) of a panel.
static inline std::size_t block_bytes(const LinearView& w, std::size_t panel) {
  return w.lines_of(panel) * w.line_bytes();
}

static inline const std::uint8_t* dense_panel(const LinearView& w, std::size_t panel) {
  return w.values + panel * w.panel_lines() * kUnitBytes * w.padded();
}

// Of a sparse panel: where each block's masks and codes begin, in bytes behind the panel's first.
static inline const std::uint8_t* sparse_panel(const LinearView& w, std::size_t panel) {
  return w.values + w.offsets[panel];
}
static inline const std::uint32_t* sparse_starts(const LinearView& w, std::size_t panel) {
  return w.starts + panel * (w.input_blocks() + 1);
}
