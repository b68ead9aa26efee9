// Every supported instruction set against the scalar linears, on exactly sized heap buffers. Codes give the same bits
// everywhere; sums of floats may be taken in another order.
//
//     tulle_test_linear [EVERY [NEEDED]]
//
// takes only every EVERY-th case, and fails where the instruction set NEEDED is not among those compared.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "support.hpp"
#include "tulle/check.hpp"
#include "tulle/dispatch.hpp"
#include "linear/amx.hpp"

namespace {

using tulle::Inputs;
using tulle::LinearView;
using tulle::WeightKind;

struct Case {
  WeightKind kind;
  bool sparse, zeros;
  std::size_t rows, columns, segment, segments, segments_per_scale, tokens, planes;
  double density;
  tulle::ScaleKind scales = tulle::ScaleKind::bf16;
  bool minima = false;
};

// Numbers of either sign; of half precision, numbers below its smallest normal one too; of a byte, all of them.
std::unique_ptr<std::uint8_t[]> numbers(std::size_t n, tulle::ScaleKind kind, std::mt19937& rng) {
  std::vector<std::uint8_t> bytes(n * tulle::scale_bytes(kind));
  for (std::size_t i = 0; i < n; ++i) {
    const float sign = rng() % 2 ? 1.0f : -1.0f, value = sign * (1 + static_cast<float>(rng() & 0xffff) / 65536);
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (kind == tulle::ScaleKind::u8) bits = rng() & 0xff;
    if (kind == tulle::ScaleKind::bf16) bits = bits >> 16;
    if (kind == tulle::ScaleKind::f16) bits = (rng() & 0x83ff) | (rng() % 4 == 0 ? 0 : 0x3c00);
    std::memcpy(&bytes[i * (bytes.size() / n)], &bits, bytes.size() / n);
  }
  return exact(bytes);
}

// A linear of random weights, its arrays exactly as long as check() asks for.
struct Weights {
  LinearView view{};
  tulle::LinearSizes sizes{};
  std::unique_ptr<std::uint8_t[]> values, masks, zeros;
  std::unique_ptr<std::uint64_t[]> offsets;
  std::unique_ptr<std::uint8_t[]> scales, minima;
  std::unique_ptr<float[]> row_scales;

  Weights(const Case& c, std::mt19937& rng) {
    view.kind = c.kind;
    view.layout = c.sparse ? tulle::Layout::sparse_tiles : tulle::Layout::tiles;
    view.rows = c.rows;
    view.columns = c.columns;
    view.segment = c.segment;
    view.segments = c.segments;
    view.segments_per_scale = c.segments_per_scale;
    const std::size_t bits = tulle::bits_of(c.kind);
    view.zero = static_cast<std::uint8_t>(1u << (std::min<std::size_t>(bits, 8) - 1));
    const std::size_t count = view.tiles() * tulle::kTileRows * view.padded();
    const auto bytes_of = [&](std::size_t n) { return n * bits / 8; };
    std::size_t stored = bytes_of(count);
    if (c.sparse) {
      std::vector<std::uint8_t> kept_bits(count / 8, 0);
      std::bernoulli_distribution keep(c.density);
      for (std::size_t i = 0; i < count; ++i) kept_bits[i / 8] |= static_cast<std::uint8_t>(keep(rng) << (i % 8));
      std::vector<std::uint64_t> ends = {0};
      std::size_t at = 0;
      for (std::size_t tile = 0; tile < view.tiles(); ++tile) {
        for (std::size_t chunk = 0; chunk < view.chunks(); ++chunk) {
          const std::size_t n = view.segments_of(chunk) * view.segment * tulle::kTileRows;
          std::size_t kept = 0, bytes = 0, pair[2] = {0, 0};
          for (std::size_t i = 0; i < n; ++i, ++at) {
            const std::size_t bit = (kept_bits[at / 8] >> (at % 8)) & 1;
            kept += bit;
            pair[i / tulle::kUnitBytes % 2] += bit;
            if (i % tulle::kPairCodes == tulle::kPairCodes - 1) {
              bytes += std::max(pair[0], pair[1]);
              pair[0] = pair[1] = 0;
            }
          }
          ends.push_back(ends.back() + (c.kind == WeightKind::codes4 ? bytes : bytes_of(kept)));
        }
      }
      stored = ends.back();
      masks = exact(kept_bits);
      offsets = exact(ends);
      sizes.masks = kept_bits.size();
      sizes.offsets = ends.size();
    }
    std::vector<std::uint8_t> bytes(stored + tulle::kSlack);
    if (view.is_codes()) {
      for (auto& b : bytes) b = static_cast<std::uint8_t>(rng());
    } else {
      std::normal_distribution<float> normal;
      const std::size_t size = c.kind == WeightKind::bf16 ? 2 : 4;
      for (std::size_t i = 0; i + size <= stored; i += size) {
        const float value = normal(rng);
        std::uint32_t number;
        std::memcpy(&number, &value, 4);
        if (size == 2) number >>= 16;
        std::memcpy(&bytes[i], &number, size);
      }
    }
    values = exact(bytes);
    sizes.values = bytes.size();
    if (view.is_codes()) {
      const std::size_t n = view.tiles() * view.scales_per_row() * tulle::kTileRows;
      view.scale_kind = c.scales;
      scales = numbers(n, c.scales, rng);
      sizes.scales = n;
      if (c.scales == tulle::ScaleKind::u8) {
        std::vector<float> rows(view.tiles() * tulle::kTileRows);
        for (auto& r : rows) r = 1 + static_cast<float>(rng() & 0xffff) / 65536;
        row_scales = exact(rows);
        sizes.row_scales = rows.size();
      }
      if (c.minima) {
        minima = numbers(n, c.scales, rng);
        sizes.minima = n;
      }
      if (c.zeros) {
        std::vector<std::uint8_t> z(n);
        for (auto& x : z) x = static_cast<std::uint8_t>(rng() & ((1u << bits) - 1));
        zeros = exact(z);
        sizes.zeros = n;
      }
    }
    view.values = values.get();
    view.masks = masks.get();
    view.offsets = offsets.get();
    view.scales = scales.get();
    view.zeros = zeros.get();
    view.minima = minima.get();
    view.row_scales = row_scales.get();
  }
};

struct Tokens {
  std::unique_ptr<std::int8_t[]> plane[2];
  std::unique_ptr<std::int32_t[]> sums[2];
  std::unique_ptr<float[]> floats, steps;
  Inputs view{};

  Tokens(const Case& c, const LinearView& w, std::mt19937& rng) {
    std::vector<float> x(c.tokens * w.padded()), s(c.tokens);
    std::normal_distribution<float> normal;
    for (auto& v : x) v = normal(rng);
    for (auto& v : s) v = 0.01f * (1 + std::fabs(normal(rng)));
    floats = exact(x);
    steps = exact(s);
    for (int p = 0; p < 2; ++p) {
      std::vector<std::int8_t> q(c.tokens * w.padded());
      // The extremes of 8 bits occur, so that narrow sums would overflow.
      for (auto& v : q) v = static_cast<std::int8_t>(rng() % 4 == 0 ? (rng() % 2 ? 127 : -128) : rng());
      std::vector<std::int32_t> totals(c.tokens * w.segments, 0);
      for (std::size_t t = 0; t < c.tokens; ++t) {
        for (std::size_t i = 0; i < w.padded(); ++i) totals[t * w.segments + i / w.segment] += q[t * w.padded() + i];
      }
      plane[p] = exact(q);
      sums[p] = exact(totals);
    }
    view = {c.tokens, w.padded(), floats.get(), c.planes, {plane[0].get(), plane[1].get()},
            {sums[0].get(), sums[1].get()}, w.segments, steps.get()};
  }
};

std::vector<float> run(const tulle::Isa& isa, const LinearView& w, const Inputs& x, std::size_t split) {
  constexpr float kPoison = -12345.0f;
  const std::size_t stride = w.rows + 3;
  std::vector<float> y(x.tokens * stride, kPoison);
  auto* scratch = static_cast<std::uint8_t*>(std::aligned_alloc(64, (tulle::scratch_bytes(x.tokens) + 63) / 64 * 64));
  isa.linear->run(w, x, 0, split, y.data(), stride, scratch);
  isa.linear->run(w, x, split, w.tiles(), y.data(), stride, scratch);
  std::free(scratch);
  for (std::size_t t = 0; t < x.tokens; ++t) {
    for (std::size_t r = w.rows; r < stride; ++r) {
      if (y[t * stride + r] != kPoison) {
        std::printf("FAILED %s wrote beyond its rows\n", isa.name);
        ++failures;
      }
    }
  }
  return y;
}

// Those of this machine, and AMX with tiles in plain loops.
std::vector<tulle::Isa> all_isas() {
  std::vector<tulle::Isa> isas = tulle::supported_isas();
#if defined(TULLE_HAVE_AMX)
  const auto wide = std::find_if(isas.begin(), isas.end(),
                                 [](const tulle::Isa& isa) { return std::strcmp(isa.name, "avx512") == 0; });
  if (wide != isas.end()) {
    tulle::Isa amx = *wide;
    amx.name = "amx in loops";
    amx.linear = &tulle::amx_emulated_linear;
    isas.push_back(amx);
  }
#endif
  return isas;
}

void compare(const Case& c, std::mt19937& rng) {
  const Weights weights(c, rng);
  tulle::check(weights.view, weights.sizes);
  const Tokens tokens(c, weights.view, rng);
  static const std::vector<tulle::Isa> isas = all_isas();
  const std::size_t split = weights.view.tiles() / 2;
  const std::vector<float> expected = run(isas.front(), weights.view, tokens.view, split);
  for (const tulle::Isa& isa : isas) {
    const std::vector<float> found = run(isa, weights.view, tokens.view, split);
    double worst = 0;
    for (std::size_t i = 0; i < found.size(); ++i)
      worst = std::max(worst, std::fabs(double(found[i]) - double(expected[i])));
    const double limit = weights.view.is_codes() ? 0.0 : 2e-6 * static_cast<double>(c.columns);
    if (worst > limit || std::isnan(worst)) {
      std::printf(
          "FAILED %s kind=%d sparse=%d zeros=%d scales=%d minima=%d rows=%zu columns=%zu segment=%zu tokens=%zu planes=%zu: off by %g\n",
          isa.name, static_cast<int>(c.kind), c.sparse, c.zeros, static_cast<int>(c.scales), c.minima, c.rows, c.columns, c.segment, c.tokens, c.planes,
          worst);
      ++failures;
    }
  }
}

template <typename Change>
void refused(const char* what, Change change) {
  std::mt19937 rng(5);
  Weights w({WeightKind::codes4, true, false, 40, 256, 64, 4, 1, 1, 1, 0.3}, rng);
  refused_of(std::move(w), what, change);
}

// The same of dense weights, codes with scales of a byte.
template <typename Change>
void refused_dense(WeightKind kind, const char* what, Change change) {
  std::mt19937 rng(6);
  const auto scales = kind <= WeightKind::codes8 ? tulle::ScaleKind::u8 : tulle::ScaleKind::bf16;
  Weights w({kind, false, false, 40, 256, 64, 4, 1, 1, 1, -1, scales}, rng);
  tulle::check(w.view, w.sizes);
  refused_of(std::move(w), what, change);
}

}  // namespace

int main(int count, char** arguments) {
  const std::size_t every = count > 1 ? std::max(1ul, std::stoul(arguments[1])) : 1;
  const std::string needed = count > 2 ? arguments[2] : "scalar";
  std::mt19937 rng(1);
  struct Shape { std::size_t rows, columns, segment, segments, per_scale; };
  const Shape shapes[] = {{16, 64, 64, 1, 1}, {1, 8, 8, 1, 1}, {40, 256, 128, 2, 1}, {33, 1024, 512, 2, 2},
                          {70, 1100, 376, 3, 3}, {17, 96, 32, 3, 1}, {64, 24, 8, 3, 1}, {50, 1536, 384, 4, 2}};
  std::size_t cases = 0, compared = 0;
  for (std::size_t number = 0; number < tulle::kWeightKinds; ++number) {
    const auto kind = static_cast<WeightKind>(number);
    const bool codes = kind <= WeightKind::codes8;
    const bool dense_alone = codes && kind != WeightKind::codes4 && kind != WeightKind::codes8;
    const std::size_t step = std::max<std::size_t>(8, 4 * tulle::group_units(kind));
    for (Shape s : shapes) {
      if (dense_alone) s.segment = (s.segment + step - 1) / step * step;
      for (double density : {-1.0, 0.0, 0.3, 0.5, 1.0}) {
        if (dense_alone && density >= 0) continue;
        for (std::size_t tokens : {1, 2, 3, 5, 12, 17, 29, 32, 70}) {
          if (tokens > 29 && ((density != 0.3 && density >= 0) || !codes || s.columns > 300)) continue;
          for (std::size_t planes = 1; planes <= (codes ? 2u : 1u); ++planes) {
            for (int zeros = 0; zeros <= (codes ? 1 : 0); ++zeros) {
              if (cases++ % every != 0) continue;
              ++compared;
              compare({kind, density >= 0, zeros == 1, s.rows, s.columns, s.segment, s.segments, s.per_scale, tokens,
                       planes, density},
                      rng);
            }
            // Scales of other kinds, with and without minima, in turn.
            if (!codes || cases % every != 0) continue;
            for (tulle::ScaleKind scales :
                 {tulle::ScaleKind::bf16, tulle::ScaleKind::f16, tulle::ScaleKind::f32, tulle::ScaleKind::u8}) {
              const bool minima = density < 0 && scales != tulle::ScaleKind::u8 &&
                                  (compared % 2 == 0 || scales == tulle::ScaleKind::bf16);
              ++compared;
              compare({kind, density >= 0, false, s.rows, s.columns, s.segment, s.segments, s.per_scale, tokens, planes,
                       density, scales, minima},
                      rng);
            }
          }
        }
      }
    }
  }
  refused("a mask with another number of bits", [](Weights& w) { std::fill_n(w.masks.get(), 8, std::uint8_t{255}); });
  refused("a falling offset", [](Weights& w) { w.offsets[2] = w.offsets[1] - 1; });
  refused("an offset far beyond", [](Weights& w) { w.offsets[1] = ~std::uint64_t{0} - 3; });
  refused("too few values", [](Weights& w) { --w.sizes.values; });
  refused("no slack", [](Weights& w) { w.sizes.values = 10; });
  refused("too few scales", [](Weights& w) { --w.sizes.scales; });
  refused("minima of sparse weights", [](Weights& w) {
    w.minima = exact(std::vector<std::uint8_t>(2 * w.sizes.scales));
    w.view.minima = w.minima.get();
    w.sizes.minima = w.sizes.scales;
  });
  refused("too few masks", [](Weights& w) { --w.sizes.masks; });
  refused("too few offsets", [](Weights& w) { --w.sizes.offsets; });
  refused("segments beyond a chunk", [](Weights& w) { w.view.segment = 1024; });
  refused("segments of odd length", [](Weights& w) { w.view.segment = 60; });
  refused("no rows", [](Weights& w) { w.view.rows = 0; });
  refused("rows without end", [](Weights& w) { w.view.rows = ~std::size_t{0} - 7; });
  refused("scales for parts of segments", [](Weights& w) { w.view.segments_per_scale = 3; });
  refused("more columns than segments hold", [](Weights& w) { w.view.columns = 257; });
  for (WeightKind kind : {WeightKind::codes2, WeightKind::codes3, WeightKind::codes5, WeightKind::codes6}) {
    refused_dense(kind, "too few bytes of a group", [](Weights& w) { --w.sizes.values; });
    refused_dense(kind, "too many bytes", [](Weights& w) { ++w.sizes.values; });
    refused_dense(kind, "segments of parts of groups", [](Weights& w) {
      w.view.segment = 8;
      w.view.segments = 32;
      w.view.segments_per_scale = 8;
    });
    refused_dense(kind, "too few scales of rows", [](Weights& w) { --w.sizes.row_scales; });
    refused_dense(kind, "no scales of rows", [](Weights& w) { w.view.row_scales = nullptr; });
    refused_dense(kind, "scales of rows beside others", [](Weights& w) { w.view.scale_kind = tulle::ScaleKind::f16; });
    refused_dense(kind, "sparse ones", [](Weights& w) { w.view.layout = tulle::Layout::sparse_tiles; });
    refused_dense(kind, "input-major ones", [](Weights& w) { w.view.layout = tulle::Layout::input_major; });
    refused_dense(kind, "minima beside scales of a byte", [](Weights& w) {
      w.minima = exact(std::vector<std::uint8_t>(w.sizes.scales));
      w.view.minima = w.minima.get();
      w.sizes.minima = w.sizes.scales;
    });
  }
  for (WeightKind kind : {WeightKind::codes6, WeightKind::f32}) {
    refused_dense(kind, "a product of sizes beyond 64 bits", [](Weights& w) {
      w.view.rows = std::size_t{1} << 30;
      w.view.segment = 512;
      w.view.segments = std::size_t{1} << 21;
      w.view.segments_per_scale = w.view.segments;
      w.sizes.values = tulle::kSlack;
      w.sizes.scales = w.sizes.row_scales = w.view.tiles() * tulle::kTileRows;
    });
  }
  std::string names;
  bool found = false;
  for (const tulle::Isa& isa : all_isas()) {
    names += (names.empty() ? "" : ", ") + std::string(isa.name);
    found = found || isa.name == needed;
  }
  if (!found) {
    std::printf("FAILED expected the instruction set %s, found %s\n", needed.c_str(), names.c_str());
    ++failures;
  }
  std::printf("linears: %zu cases on %s: %d failures\n", compared, names.c_str(), failures);
  return failures == 0 ? 0 : 1;
}
