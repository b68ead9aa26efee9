// Input-major linears, plain loops: the definition. A line of a segment is expanded, then every input is multiplied.
//
//   line, 64 bytes of one input:   byte 16·q + 4·t + i  ─►  output 16·t + 4·q + i  (of its k-th codes: + 64·k)
//   sums[token][output of the panel]  +=  per segment  fma(float(Σ code·x − zero·Σx), scale, ·)
#include <cmath>
#include <cstring>

#include "cpu/tables.hpp"

namespace tulle {
namespace {

#include "linear/common.inl"
#include "linear/input_major_common.inl"

// Which byte of a line an output is, of its 64.
std::size_t byte_of(std::size_t output) { return output % 16 / 4 * 16 + output / 16 * 4 + output % 4; }

// Codes of a line's inputs [first, first + count), to[input][output of the line].
void expand_line(const LinearView& w, std::size_t line, std::size_t first, std::size_t count, std::uint8_t* to) {
  const std::size_t panel = line / w.panel_lines(), within = line % w.panel_lines();
  const std::size_t outputs = w.line_tiles() * kTileRows;
  for (std::size_t c = first; c < first + count; ++c, to += outputs) {
    // A block of 4: four times as many lines, and bytes of three other inputs among them.
    const std::size_t parts = w.block_inputs(), column = c / parts;
    if (!w.sparse()) {
      const std::uint8_t* from = dense_panel(w, panel) + column * block_bytes(w, panel) + within * w.line_bytes();
      const unsigned bits = static_cast<unsigned>(8 * kUnitBytes / outputs);
      for (std::size_t o = 0; o < outputs; ++o) {
        const std::size_t byte = w.blocks4() ? o % 64 / 16 * kUnitBytes + o % 16 * 4 + c % 4 : byte_of(o % 64);
        to[o] = static_cast<std::uint8_t>((from[byte] >> (o / 64 * bits)) & ((1u << bits) - 1));
      }
      continue;
    }
    const std::uint8_t* masks = sparse_panel(w, panel) + sparse_starts(w, panel)[column];
    const std::uint8_t* codes = masks + w.lines_of(panel) * w.line_mask_bytes();
    for (std::size_t l = 0; l < (within + 1) * parts; ++l, masks += kLineMaskBytes) {
      std::size_t kept[2] = {0, 0};
      for (std::size_t half = 0; half < 2; ++half) {
        for (std::size_t byte = 0; byte < 64; ++byte) {
          const bool stored = (masks[half * 8 + byte / 8] >> (byte % 8)) & 1;
          if (l / parts == within && (!w.blocks4() || byte % 4 == c % 4)) {
            const std::size_t o =
                half * 64 + (w.blocks4() ? l % 4 * 16 + byte / 4 : byte % 16 / 4 * 16 + byte / 16 * 4 + byte % 4);
            const std::size_t tile = line * w.line_tiles() + o / kTileRows;
            const std::size_t at = w.scale_at(tile, c / w.segment) + o % kTileRows;
            const unsigned code = stored ? (codes[kept[half]] >> (4 * half)) & 15u : w.zeros ? w.zeros[at] : w.zero;
            to[o] = static_cast<std::uint8_t>(code);
          }
          kept[half] += stored;
        }
      }
      codes += kept[0] > kept[1] ? kept[0] : kept[1];
    }
  }
}

}  // namespace

void scalar_run_input_major(const LinearView& w, const Inputs& x, std::size_t panel, std::size_t first,
                            std::size_t last, float* sums, std::size_t stride, std::uint8_t* scratch) {
  const std::size_t outputs = w.line_tiles() * kTileRows;
  for (std::size_t t = 0; t < x.tokens; ++t)
    std::memset(sums + t * stride, 0, w.lines_of(panel) * outputs * sizeof(float));
  for (std::size_t within = 0; within < w.lines_of(panel); ++within) {
    const std::size_t line = panel * w.panel_lines() + within;
    for (std::size_t segment = first; segment < last; ++segment) {
      expand_line(w, line, segment * w.segment, w.segment, scratch);
      for (std::size_t t = 0; t < x.tokens; ++t) {
        for (std::size_t o = 0; o < outputs; ++o) {
          const std::size_t tile = line * w.line_tiles() + o / kTileRows;
          const std::size_t at = w.scale_at(tile, segment) + o % kTileRows;
          const std::int32_t zero = w.zeros ? w.zeros[at] : w.zero;
          float whole = 0;
          for (std::size_t p = 0; p < x.planes; ++p) {
            const std::int8_t* in = x.plane[p] + t * x.stride + segment * w.segment;
            std::int32_t total = -zero * x.sums[p][t * x.sum_stride + segment];
            for (std::size_t i = 0; i < w.segment; ++i) {
              total += static_cast<std::int32_t>(scratch[i * outputs + o]) * in[i];
            }
            whole = whole * 256 + static_cast<float>(total);
          }
          float& sum = sums[t * stride + within * outputs + o];
          sum = std::fma(whole, scale_value(w.scales, w.scale_kind, at), sum);
        }
      }
    }
  }
}

}  // namespace tulle
