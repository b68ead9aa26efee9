// How the linears' kernel files on x86 stream through weights in tiles. Internal linkage only: see cpu/tables.hpp.
//
//   dense    values ─►  [group of units][group of units] …
//   sparse   masks  ─►  [64 bits][64 bits] …       two streams side by side, each prefetched
//            values ─►  [kept of the first][kept of the second] …

// Where a tile's chunk begins; masks of sparse weights only.
struct Start {
  const std::uint8_t* values;
  const std::uint8_t* masks;
};

static inline Start start_of(const LinearView& w, std::size_t tile, std::size_t chunk) {
  const std::size_t first = (tile * w.padded() + chunk * w.chunk_segments() * w.segment) * kTileRows;
  if (w.sparse()) return {w.values + w.offsets[tile * w.chunks() + chunk], w.masks + first / 8};
  return {w.values + first * bits_of(w.kind) / 8, nullptr};
}

// Of sparse weights: masks and what they keep are two slow streams, with which the processor's own prefetchers, stopped
// at every 4 KiB, do not keep up (AVX-512: bfloat16 7 to 10 % faster, 8 and 4 bits 1 to 4; half as far the same).
static inline void prefetch_streams(const std::uint8_t* kept, const std::uint8_t* masks) {
  _mm_prefetch(reinterpret_cast<const char*>(kept) + 2048, _MM_HINT_T0);
  _mm_prefetch(reinterpret_cast<const char*>(masks) + 1024, _MM_HINT_T0);
}
