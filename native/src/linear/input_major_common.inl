// Where the kernels for weights by columns find them. Internal linkage only: see tables.hpp.

// Bytes of a dense column of a strip.
static inline std::size_t column_bytes(const LinearView& w, std::size_t strip) {
  return w.lines_of(strip) * w.line_bytes();
}

static inline const std::uint8_t* dense_strip(const LinearView& w, std::size_t strip) {
  return w.values + strip * w.strip_lines() * kUnitBytes * w.padded();
}

// Of a sparse strip: where each column's masks and codes begin, in bytes behind the strip's first.
static inline const std::uint8_t* sparse_strip(const LinearView& w, std::size_t strip) {
  return w.values + w.offsets[strip];
}
static inline const std::uint32_t* sparse_starts(const LinearView& w, std::size_t strip) {
  return w.starts + strip * (w.all_columns() + 1);
}
