// Which columns a token meets when, and what is fetched meanwhile: of the kernel files on x86, each compiling it with its
// own flags. Internal linkage only: see tables.hpp.

// A token's quads of segments [begin, end).
struct Quads {
  const std::uint32_t* starts;  // of segments
  std::size_t end, per_quad;    // behind the last quad; columns
  const std::uint32_t* places;
  const std::int8_t* in[2];

  Quads(const LinearView& w, const Inputs& x, std::size_t token, std::size_t last) {
    starts = x.quad_starts + token * (w.segments + 1);
    end = starts[last];
    per_quad = 4 / w.column_inputs();
    places = x.quads + token * x.quad_stride * per_quad;
    for (std::size_t p = 0; p < x.planes; ++p) in[p] = x.quad_plane[p] + token * x.quad_stride * 4;
  }

  const std::uint32_t* at(std::size_t quad) const { return places + per_quad * quad; }
};

// Brings what the next quads read into the level-2 cache, a column's lines together, a burst at every step of these. The
// processor's own prefetchers follow a stream, and inputs that are left out tear it.
template <int kLines>
class Ahead {
 public:
  // Of quads [first, last): dense columns of `bytes`, or sparse ones between their starts.
  Ahead(const Quads& quads, std::size_t first, std::size_t last, const std::uint8_t* from, std::size_t bytes,
        const std::uint32_t* starts, std::size_t steps)
      : place_(quads.at(first)), end_(quads.at(last)), from_(from), starts_(starts), bytes_(bytes) {
    std::size_t bursts = static_cast<std::size_t>(end_ - place_) * ((bytes + kBytes - 1) / kBytes);
    if (starts != nullptr) {
      for (const std::uint32_t* p = place_; p != end_; ++p) bursts += (starts[*p + 1] - starts[*p] + kBytes - 1) / kBytes;
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
    if (place_ == end_) {
      next_ = nullptr;
      return;
    }
    const std::uint32_t place = *place_++;
    next_ = from_ + (starts_ != nullptr ? starts_[place] : place * bytes_);
    column_end_ = starts_ != nullptr ? from_ + starts_[place + 1] : next_ + bytes_;
  }

  void burst() {
    if (next_ == nullptr) return;
#pragma GCC unroll 4
    for (int line = 0; line < kLines; ++line) _mm_prefetch(reinterpret_cast<const char*>(next_) + 64 * line, _MM_HINT_T1);
    next_ += kBytes;
    if (next_ >= column_end_) open();
  }

  const std::uint32_t *place_, *end_;
  const std::uint8_t *from_, *next_ = nullptr, *column_end_ = nullptr;  // next_: null where nothing is left
  const std::uint32_t* starts_;
  std::size_t bytes_, more_ = 0;
};

// What is multiplied at once: quads [first, last) of a segment, what follows being fetched meanwhile.
struct Stretch {
  std::size_t segment, first, last;
  bool fresh, whole;  // the segment's first, its last one
};

// f(stretch, the last quad to fetch meanwhile) for stretches of at most `most` quads of segments [begin, end).
template <class F>
void stretches(const Quads& quads, std::size_t begin, std::size_t end, std::size_t most, F f) {
  for (std::size_t segment = begin; segment < end; ++segment) {
    const std::size_t first = quads.starts[segment], last = quads.starts[segment + 1];
    if (first == last) continue;
    const std::size_t pieces = (last - first + most - 1) / most, step = (last - first + pieces - 1) / pieces;
    for (std::size_t quad = first; quad < last; quad += step) {
      const std::size_t stop = least(quad + step, last);
      f(Stretch{segment, quad, stop, quad == first, stop == last}, least(stop + step, quads.end));
    }
  }
}

// Into the level-1 cache, what the next line reads: streams that take turns line by line are none to the processor.
inline void near(const std::uint8_t* from) { _mm_prefetch(reinterpret_cast<const char*>(from), _MM_HINT_T0); }

// Where a segment's scales and zero points stand.
struct Scaling {
  std::size_t first;

  Scaling(const LinearView& w, std::size_t segment) : first(w.scale_at(0, segment)) {}

  std::size_t of(std::size_t tile) const { return first + tile * kTileRows; }
};
