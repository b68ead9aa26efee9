// In which order a token's active inputs are multiplied, and what is prefetched meanwhile: of the kernel files on x86,
// each compiling it with its own flags. Internal linkage only: see cpu/tables.hpp.
//
//   segment   [ quad quad quad … | quad quad … ]         active inputs, four at a time
//               range 0            range 1               as many quads as the level-2 cache holds lines of
//
//   while range r is multiplied with line 0, line 1, … of a panel, the Prefetcher brings range r + 1 into the level-2
//   cache: a burst of lines at every step

// A token's quads of segments [begin, end).
struct Quads {
  const std::uint32_t* starts;  // of segments
  std::size_t end, per_quad;    // behind the last quad; blocks of a quad: 4 inputs, or 1 block of 4
  const std::uint32_t* blocks;
  const std::int8_t* in[2];

  Quads(const LinearView& w, const Inputs& x, std::size_t token, std::size_t last) {
    starts = x.quad_starts + token * (w.segments + 1);
    end = starts[last];
    per_quad = 4 / w.block_inputs();
    blocks = x.quads + token * x.quad_stride * per_quad;
    for (std::size_t p = 0; p < x.planes; ++p) in[p] = x.quad_plane[p] + token * x.quad_stride * 4;
  }

  const std::uint32_t* at(std::size_t quad) const { return blocks + per_quad * quad; }
};

// Brings what the next quads read into the level-2 cache, a block's lines together, a burst at every step of these. The
// processor's own prefetchers follow a stream, and inactive inputs tear it.
template <int kLines>
class Prefetcher {
 public:
  // Of quads [first, last): dense blocks of `bytes`, or sparse ones between their starts.
  Prefetcher(const Quads& quads, std::size_t first, std::size_t last, const std::uint8_t* from, std::size_t bytes,
        const std::uint32_t* starts, std::size_t steps)
      : block_(quads.at(first)), end_(quads.at(last)), from_(from), starts_(starts), bytes_(bytes) {
    std::size_t bursts = static_cast<std::size_t>(end_ - block_) * ((bytes + kBytes - 1) / kBytes);
    if (starts != nullptr) {
      for (const std::uint32_t* p = block_; p != end_; ++p)
        bursts += (starts[*p + 1] - starts[*p] + kBytes - 1) / kBytes;
    }
    more_ = steps == 0 || bursts <= steps ? 0 : (bursts - 1) / steps;
    open();
  }

  void step() {
    burst();
    for (std::size_t i = 0; i < more_; ++i) burst();
  }

  void finish() {
    while (next_ != nullptr) burst();
  }

 private:
  static constexpr std::size_t kBytes = kLines * kUnitBytes;

  void open() {
    if (block_ == end_) {
      next_ = nullptr;
      return;
    }
    const std::uint32_t block = *block_++;
    next_ = from_ + (starts_ != nullptr ? starts_[block] : block * bytes_);
    block_end_ = starts_ != nullptr ? from_ + starts_[block + 1] : next_ + bytes_;
  }

  void burst() {
    if (next_ == nullptr) return;
#pragma GCC unroll 4
    for (int line = 0; line < kLines; ++line)
      _mm_prefetch(reinterpret_cast<const char*>(next_) + 64 * line, _MM_HINT_T1);
    next_ += kBytes;
    if (next_ >= block_end_) open();
  }

  const std::uint32_t *block_, *end_;
  const std::uint8_t *from_, *next_ = nullptr, *block_end_ = nullptr;  // next_: null where nothing is left
  const std::uint32_t* starts_;
  std::size_t bytes_, more_ = 0;
};

// What is multiplied at once: quads [first, last) of a segment, what follows being prefetched meanwhile.
struct QuadRange {
  std::size_t segment, first, last;
  bool opens_segment, closes_segment;  // the segment's first, its last one
};

// f(range, the last quad to prefetch meanwhile) for ranges of at most `most` quads of segments [begin, end).
template <class F>
void for_each_range(const Quads& quads, std::size_t begin, std::size_t end, std::size_t most, F f) {
  for (std::size_t segment = begin; segment < end; ++segment) {
    const std::size_t first = quads.starts[segment], last = quads.starts[segment + 1];
    if (first == last) continue;
    const std::size_t ranges = (last - first + most - 1) / most, step = (last - first + ranges - 1) / ranges;
    for (std::size_t quad = first; quad < last; quad += step) {
      const std::size_t stop = least(quad + step, last);
      f(QuadRange{segment, quad, stop, quad == first, stop == last}, least(stop + step, quads.end));
    }
  }
}

// Into the level-1 cache, what the next line reads: streams that take turns line by line are none to the processor.
inline void prefetch_l1(const std::uint8_t* from) { _mm_prefetch(reinterpret_cast<const char*>(from), _MM_HINT_T0); }

// Where a segment's scales and zero points lie.
struct ScaleIndex {
  std::size_t first;

  ScaleIndex(const LinearView& w, std::size_t segment) : first(w.scale_at(0, segment)) {}

  std::size_t of(std::size_t tile) const { return first + tile * kTileRows; }
};
