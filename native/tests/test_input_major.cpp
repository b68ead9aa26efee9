// Input-major linears on every supported instruction set: the same bits as sums written out over the weights that were
// packed. Buffers are exactly sized heap memory.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "support.hpp"
#include "tulle/check.hpp"
#include "tulle/dispatch.hpp"

namespace {

using tulle::Inputs;
using tulle::kTileRows;
using tulle::Layout;
using tulle::LinearView;
using tulle::WeightKind;

struct Case {
  WeightKind kind;
  bool sparse, zeros, blocks4;
  std::size_t rows, segment, segments, segments_per_scale, tokens, planes;
  double density, active;
};

Layout layout_of(bool sparse, bool blocks4) {
  if (blocks4) return sparse ? Layout::sparse_input_major_blocks4 : Layout::input_major_blocks4;
  return sparse ? Layout::sparse_input_major : Layout::input_major;
}

int code_bits(WeightKind kind) { return static_cast<int>(tulle::bits_of(kind)); }

std::size_t byte_of(std::size_t output) { return output % 16 / 4 * 16 + output / 16 * 4 + output % 4; }

// Random weights [outputs of whole lines][padded], packed.
struct Weights {
  LinearView view{};
  tulle::LinearSizes sizes{};
  std::vector<int> codes;  // pruned ones at their zero point
  std::unique_ptr<std::uint8_t[]> values, zeros;
  std::unique_ptr<std::uint64_t[]> offsets;
  std::unique_ptr<std::uint32_t[]> starts;
  std::unique_ptr<std::uint16_t[]> scales;

  Weights(const Case& c, std::mt19937& rng) {
    view.kind = c.kind;
    view.layout = layout_of(c.sparse, c.blocks4);
    view.rows = c.rows;
    view.columns = c.segment * c.segments;
    view.segment = c.segment;
    view.segments = c.segments;
    view.segments_per_scale = c.segments_per_scale;
    const int bits = code_bits(c.kind);
    view.zero = static_cast<std::uint8_t>(1 << (bits - 1));
    const std::size_t tiles = view.tiles(), scale_count = tiles * view.scales_per_row() * kTileRows;
    std::vector<std::uint16_t> s(scale_count);
    for (auto& x : s) x = static_cast<std::uint16_t>(0x3c00 + (rng() & 0xff));
    scales = exact(s);
    sizes.scales = scale_count;
    std::vector<std::uint8_t> z(scale_count, view.zero);
    for (auto& x : z) x = c.zeros ? static_cast<std::uint8_t>(rng() & ((1u << bits) - 1)) : view.zero;
    if (c.zeros) {
      zeros = exact(z);
      sizes.zeros = scale_count;
    }
    const std::size_t outputs = tiles * kTileRows, padded = view.padded();
    std::vector<bool> kept(outputs * padded, true);
    codes.resize(outputs * padded);
    std::bernoulli_distribution keep(c.density);
    for (std::size_t o = 0; o < outputs; ++o) {
      for (std::size_t i = 0; i < padded; ++i) {
        const std::size_t at = o * padded + i;
        if (c.sparse) kept[at] = keep(rng);
        codes[at] = kept[at] ? static_cast<int>(rng() & ((1u << bits) - 1)) : z[index(o, i)];
      }
    }
    std::vector<std::uint8_t> bytes;
    std::vector<std::uint64_t> begins = {0};
    std::vector<std::uint32_t> indices;
    const std::size_t line_outputs = view.line_tiles() * kTileRows;
    for (std::size_t panel = 0; panel < view.panels(); ++panel) {
      const std::size_t inputs = c.blocks4 ? 4 : 1;
      for (std::size_t column = 0; column < padded / inputs; ++column) {
        indices.push_back(static_cast<std::uint32_t>(bytes.size() - begins.back()));
        const std::size_t masks = bytes.size(), lines = view.lines_of(panel) * inputs;
        if (c.sparse) bytes.resize(masks + lines * tulle::kLineMaskBytes);
        for (std::size_t l = 0; l < lines; ++l) {
          const std::size_t first = (panel * view.panel_lines() + l / inputs) * line_outputs;
          std::vector<std::uint8_t> line(64, 0), packed;
          std::size_t lengths[2] = {0, 0};
          for (std::size_t half = 0; half < line_outputs / 64; ++half) {
            for (std::size_t byte = 0; byte < 64; ++byte) {
              // In blocks of 4, a line is 64 codes of one tile after those of another.
              std::size_t o = c.blocks4 ? l % 4 * 16 + byte / 4 : 0;
              const std::size_t i = c.blocks4 ? column * 4 + byte % 4 : column;
              while (!c.blocks4 && byte_of(o) != byte) ++o;
              const std::size_t at = (first + half * 64 + o) * padded + i;
              line[byte] = static_cast<std::uint8_t>(line[byte] | codes[at] << (static_cast<int>(half) * bits));
              if (!c.sparse || !kept[at]) continue;
              bytes[masks + l * tulle::kLineMaskBytes + half * 8 + byte / 8] |=
                  static_cast<std::uint8_t>(1 << (byte % 8));
              if (lengths[half] == packed.size()) packed.push_back(0);
              std::uint8_t& to = packed[lengths[half]++];
              to = static_cast<std::uint8_t>(to | codes[at] << (4 * half));
            }
          }
          const std::vector<std::uint8_t>& stored = c.sparse ? packed : line;
          bytes.insert(bytes.end(), stored.begin(), stored.end());
        }
      }
      indices.push_back(static_cast<std::uint32_t>(bytes.size() - begins.back()));
      begins.push_back(bytes.size());
    }
    bytes.resize(bytes.size() + tulle::kSlack, 0xee);
    values = exact(bytes);
    sizes.values = bytes.size();
    if (c.sparse) {
      offsets = exact(begins);
      starts = exact(indices);
      sizes.offsets = begins.size();
      sizes.starts = indices.size();
    }
    view.values = values.get();
    view.offsets = offsets.get();
    view.starts = starts.get();
    view.scales = scales.get();
    view.zeros = zeros.get();
  }

  // Where scale and zero point of an output and an input are.
  std::size_t index(std::size_t output, std::size_t input) const {
    const std::size_t scale = input / (view.segment * view.segments_per_scale);
    return (scale * view.tiles() + output / kTileRows) * kTileRows + output % kTileRows;
  }
};

struct Tokens {
  std::unique_ptr<std::int8_t[]> plane[2], quad_plane[2];
  std::unique_ptr<std::int32_t[]> sums[2];
  std::unique_ptr<std::uint32_t[]> quads, quad_starts;
  std::unique_ptr<float[]> steps;
  Inputs view{};

  Tokens(const Case& c, const LinearView& w, std::mt19937& rng) {
    const std::size_t padded = w.padded(), stride = padded / 4;
    std::vector<float> s(c.tokens, 0.25f);
    steps = exact(s);
    std::vector<std::int8_t> x[2], quad_x[2];
    std::vector<std::int32_t> totals[2];
    std::vector<std::uint32_t> indices(c.tokens * stride * 4, 0), begins;
    std::bernoulli_distribution active(c.active);
    for (int p = 0; p < 2; ++p) {
      x[p].assign(c.tokens * padded, 0);
      quad_x[p].assign(c.tokens * stride * 4, 0);
      totals[p].assign(c.tokens * w.segments, 0);
    }
    for (std::size_t t = 0; t < c.tokens; ++t) {
      std::size_t next = 0;
      for (std::size_t segment = 0; segment < w.segments; ++segment) {
        begins.push_back(static_cast<std::uint32_t>(next / 4));
        bool kept = false;
        for (std::size_t i = segment * w.segment; i < (segment + 1) * w.segment; ++i) {
          if (!c.blocks4 || i % 4 == 0) kept = active(rng);
          if (!kept) continue;
          for (int p = 0; p < 2; ++p) {
            // The extremes of 8 bits occur, so that narrow sums would overflow.
            const auto value = static_cast<std::int8_t>(rng() % 4 == 0 ? (rng() % 2 ? 127 : -128) : rng());
            x[p][t * padded + i] = quad_x[p][t * stride * 4 + next] = value;
            totals[p][t * w.segments + segment] += value;
          }
          if (c.blocks4) indices[t * stride + next / 4] = static_cast<std::uint32_t>(i / 4);
          else indices[t * stride * 4 + next] = static_cast<std::uint32_t>(i);
          ++next;
        }
        for (; next % 4 != 0; ++next) indices[t * stride * 4 + next] = static_cast<std::uint32_t>(padded - 1);
      }
      begins.push_back(static_cast<std::uint32_t>(next / 4));
    }
    for (int p = 0; p < 2; ++p) {
      plane[p] = exact(x[p]);
      quad_plane[p] = exact(quad_x[p]);
      sums[p] = exact(totals[p]);
    }
    quads = exact(indices);
    quad_starts = exact(begins);
    view = {c.tokens,
            padded,
            nullptr,
            c.planes,
            {plane[0].get(), plane[1].get()},
            {sums[0].get(), sums[1].get()},
            w.segments,
            steps.get(),
            quads.get(),
            {quad_plane[0].get(), quad_plane[1].get()},
            quad_starts.get(),
            stride};
  }
};

std::vector<float> expected(const Weights& weights, const Inputs& x, std::size_t first, std::size_t last) {
  const LinearView& w = weights.view;
  const std::size_t outputs = w.tiles() * kTileRows;
  std::vector<float> y(x.tokens * outputs, 0.0f);
  for (std::size_t t = 0; t < x.tokens; ++t) {
    for (std::size_t o = 0; o < outputs; ++o) {
      for (std::size_t segment = first; segment < last; ++segment) {
        const std::size_t at = weights.index(o, segment * w.segment);
        const int zero = w.zeros ? w.zeros[at] : w.zero;
        float whole = 0;
        for (std::size_t p = 0; p < x.planes; ++p) {
          std::int32_t total = 0;
          for (std::size_t i = segment * w.segment; i < (segment + 1) * w.segment; ++i) {
            total += (weights.codes[o * w.padded() + i] - zero) * x.plane[p][t * x.stride + i];
          }
          whole = whole * 256 + static_cast<float>(total);
        }
        const std::uint32_t wide = static_cast<std::uint32_t>(static_cast<const std::uint16_t*>(w.scales)[at]) << 16;
        float scale;
        std::memcpy(&scale, &wide, 4);
        y[t * outputs + o] = std::fma(whole, scale, y[t * outputs + o]);
      }
    }
  }
  return y;
}

void compare(const Case& c, std::mt19937& rng) {
  const Weights weights(c, rng);
  const LinearView& w = weights.view;
  tulle::check(w, weights.sizes);
  Tokens tokens(c, w, rng);
  const std::size_t outputs = w.tiles() * kTileRows, stride = (w.panel_lines() * w.line_tiles()) * kTileRows + 16;
  const std::size_t size = (tulle::input_major_scratch_bytes(c.tokens) + 63) / 64 * 64;
  auto* scratch = static_cast<std::uint8_t*>(std::aligned_alloc(64, size));
  auto* sums = static_cast<float*>(std::aligned_alloc(64, c.tokens * stride * sizeof(float)));
  const std::size_t half = w.segments / 2;
  for (std::size_t part = 0; part < 2; ++part) {
    const std::size_t first = part ? half : 0, last = part ? w.segments : half;
    if (first == last) continue;
    const std::vector<float> wanted = expected(weights, tokens.view, first, last);
    for (const tulle::Isa& isa : tulle::supported_isas()) {
      std::vector<float> found(c.tokens * outputs);
      for (std::size_t panel = 0; panel < w.panels(); ++panel) {
        std::fill_n(sums, c.tokens * stride, -12345.0f);
        isa.linear->run_input_major(w, tokens.view, panel, first, last, sums, stride, scratch);
        const std::size_t n = w.lines_of(panel) * w.line_tiles() * kTileRows;
        const std::size_t at = panel * w.panel_lines() * w.line_tiles() * kTileRows;
        for (std::size_t t = 0; t < c.tokens; ++t) std::copy_n(sums + t * stride, n, found.data() + t * outputs + at);
      }
      if (std::memcmp(found.data(), wanted.data(), found.size() * sizeof(float)) == 0) continue;
      std::printf(
          "FAILED %s bits=%d sparse=%d blocks4=%d zeros=%d rows=%zu segment=%zu segments=%zu tokens=%zu planes=%zu "
          "density=%g active=%g\n",
          isa.name, code_bits(c.kind), c.sparse, c.blocks4, c.zeros, c.rows, c.segment, c.segments, c.tokens, c.planes,
          c.density, c.active);
      ++failures;
    }
  }
  std::free(sums);
  std::free(scratch);
}

template <typename Change>
void refused(const char* what, Change change, const char* line = "") {
  std::mt19937 rng(5);
  for (const bool blocks4 : {false, true}) {
    Weights w({WeightKind::codes4, true, false, blocks4, 256, 64, 4, 1, 1, 1, 0.3, 1.0}, rng);
    refused_of(std::move(w), what, change, line);
  }
}

// What a token keeps: on every instruction set the same as written out.
void lists() {
  std::mt19937 rng(7);
  for (std::size_t n : {1, 2, 15, 16, 17, 64, 130}) {
    for (int percent : {0, 40, 100}) {
      for (const bool two : {false, true}) {
        std::vector<std::int8_t> high(4 * n, 0), low(4 * n, 0);
        std::vector<std::uint32_t> indices;
        std::vector<std::int8_t> kept_high, kept_low;
        for (std::size_t i = 0; i < n; ++i) {
          const bool here = static_cast<int>(rng() % 100) < percent;
          // One of the four alone, in one plane alone, is enough.
          if (here) (two && rng() % 2 ? low : high)[4 * i + rng() % 4] = static_cast<std::int8_t>(1 + rng() % 127);
          if (!here) continue;
          indices.push_back(static_cast<std::uint32_t>(100 + i));
          kept_high.insert(kept_high.end(), high.begin() + static_cast<long>(4 * i),
                           high.begin() + static_cast<long>(4 * i + 4));
          kept_low.insert(kept_low.end(), low.begin() + static_cast<long>(4 * i),
                          low.begin() + static_cast<long>(4 * i + 4));
        }
        std::vector<float> size(4 * n), x(4 * n);
        for (std::size_t i = 0; i < 4 * n; ++i) x[i] = static_cast<float>(size[i] = static_cast<float>(rng() % 8));
        for (const tulle::Isa& isa : tulle::supported_isas()) {
          const auto h = exact(high), l = exact(low);
          const auto at = exact(std::vector<std::uint32_t>(n, 9));
          const auto of_high = exact(std::vector<std::int8_t>(4 * n, 9)),
                     of_low = exact(std::vector<std::int8_t>(4 * n, 9));
          const std::size_t found = isa.ops->nonzero_blocks4(h.get(), two ? l.get() : nullptr, n, 100, at.get(),
                                                             of_high.get(), two ? of_low.get() : nullptr);
          bool right = found == indices.size() && std::equal(indices.begin(), indices.end(), at.get()) &&
                       std::equal(kept_high.begin(), kept_high.end(), of_high.get()) &&
                       (!two || std::equal(kept_low.begin(), kept_low.end(), of_low.get()));
          for (std::size_t unit : {1, 3, 4}) {
            const std::size_t units = 4 * n / unit;
            for (const bool norm : {false, true}) {
              const auto sizes = exact(std::vector<float>(units)), from = exact(size), y = exact(x);
              isa.ops->unit_sizes(from.get(), units, unit, norm, sizes.get());
              isa.ops->drop_units_below(y.get(), sizes.get(), units, unit, 5);
              for (std::size_t i = 0; i < units * unit; ++i) {
                float value = 0;
                for (std::size_t j = i / unit * unit; j < (i / unit + 1) * unit; ++j) {
                  value = norm ? value + size[j] * size[j] : std::max(value, size[j]);  // whole numbers
                }
                right = right && sizes[i / unit] == value && y[i] == (value >= 5 ? x[i] : 0.0f);
              }
            }
          }
          if (right) continue;
          std::printf("FAILED %s lists of %zu blocks of 4, %d %%, planes %d\n", isa.name, n, percent, 1 + two);
          ++failures;
        }
      }
    }
  }
}

}  // namespace

int main() {
  std::mt19937 rng(1);
  struct Shape { std::size_t rows, segment, segments, per_scale; };
  // The last but one has several panels, its own chunk boundaries and inputs of one scale in parts; the last so many
  // inputs that scratch has no room for where all columns' codes go on at once.
  const Shape shapes[] = {{1, 8, 1, 1},     {64, 16, 3, 1},   {129, 64, 2, 2},  {300, 512, 3, 1},
                          {520, 24, 25, 5}, {12500, 8, 3, 3}, {130, 512, 70, 1}};
  std::size_t cases = 0;
  for (WeightKind kind : {WeightKind::codes2, WeightKind::codes4, WeightKind::codes8}) {
    for (const Shape& s : shapes) {
      for (double density : {-1.0, 0.0, 0.3, 1.0}) {
        if (density >= 0 && kind != WeightKind::codes4) continue;
        for (double active : {0.0, 0.5, 1.0}) {
          for (std::size_t tokens : {1, 2, 5, 17}) {
            if (s.rows > 1000 && (tokens == 2 || tokens > 5 || density == 1.0 || active == 0.0)) continue;
            if (s.segments > 30 && (tokens != 5 || density != 0.3 || active != 0.5)) continue;
            for (std::size_t variant = 0; variant < 4; ++variant, ++cases) {
              const std::size_t planes = 1 + variant % 2;
              compare({kind, density >= 0, cases / 4 % 2 == 0, variant >= 2, s.rows, s.segment, s.segments, s.per_scale,
                       tokens, planes, density, active},
                      rng);
            }
          }
        }
      }
    }
  }
  refused("a mask with another number of bits", [](Weights& w) { std::fill_n(w.values.get(), 8, std::uint8_t{255}); });
  refused("a falling start", [](Weights& w) { w.starts[3] = w.starts[2] - 1; });
  refused("a start far beyond", [](Weights& w) { w.starts[1] = ~std::uint32_t{0} - 3; });
  refused("a first start that is not 0", [](Weights& w) { w.starts[0] = 1; });
  refused("an offset far beyond", [](Weights& w) { w.offsets[0] = ~std::uint64_t{0} - 3; });
  refused("too few values", [](Weights& w) { --w.sizes.values; });
  refused("no slack", [](Weights& w) { w.sizes.values = 10; });
  refused("too few scales", [](Weights& w) { --w.sizes.scales; });
  refused("too few starts", [](Weights& w) { --w.sizes.starts; });
  refused("too few offsets", [](Weights& w) { --w.sizes.offsets; });
  // Of 256 rows, which are whole tiles and lines of every kind.
  refused("sparse codes of 8 bits", [](Weights& w) { w.view.kind = WeightKind::codes8; }, "sparse ones of 4 bits");
  refused("floats", [](Weights& w) { w.view.kind = WeightKind::bf16; }, "expected codes");
  for (WeightKind kind : {WeightKind::codes3, WeightKind::codes5, WeightKind::codes6}) {
    refused("3, 5 and 6 bits", [&](Weights& w) {
      w.view.kind = kind;
      w.view.layout = Layout::input_major;
    }, "input-major ones of 2, 4 or 8");
  }
  refused("scales of one byte", [](Weights& w) { w.view.scale_kind = tulle::ScaleKind::u8; }, "scales of rows");
  lists();
  std::printf("input-major linears: %zu cases on %zu instruction sets, %d failures\n", cases,
              tulle::supported_isas().size(), failures);
  return failures == 0 ? 0 : 1;
}
