// Every supported instruction set against the scalar kernels of the Scaling Transformer, on exactly sized heap buffers.
// Codes give the same bits everywhere; sums of floats may be taken in another order.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "tulle/dispatch.hpp"

namespace {

using tulle::kPanel;
using tulle::Matrix;
using tulle::Panels;
using tulle::RowInputs;
using tulle::WeightKind;

constexpr float kPoison = -12345.0f;
int failures = 0;

void expect(bool ok, const char* isa, const char* what, std::size_t a, std::size_t b) {
  if (ok) return;
  std::printf("FAILED %s %s (%zu, %zu)\n", isa, what, a, b);
  ++failures;
}

std::size_t item(WeightKind kind) { return kind == WeightKind::f32 ? 4 : kind == WeightKind::bf16 ? 2 : 1; }

// `count` random numbers of a kind, in a buffer of exactly their size.
std::unique_ptr<std::uint8_t[]> numbers(WeightKind kind, std::size_t count, std::mt19937& rng) {
  std::unique_ptr<std::uint8_t[]> bytes(new std::uint8_t[count * item(kind)]);
  std::normal_distribution<float> normal;
  for (std::size_t i = 0; i < count; ++i) {
    const float value = normal(rng);
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (kind == WeightKind::f32) std::memcpy(&bytes[4 * i], &bits, 4);
    else if (kind == WeightKind::bf16) bytes[2 * i] = (bits >> 16) & 255, bytes[2 * i + 1] = bits >> 24;
    // The extremes occur, so that narrow sums would overflow.
    else bytes[i] = static_cast<std::uint8_t>(rng() % 4 == 0 ? (rng() % 2 ? 255 : 0) : rng());
  }
  return bytes;
}

std::unique_ptr<float[]> floats(std::size_t count, std::mt19937& rng) {
  std::unique_ptr<float[]> found(new float[count]);
  std::normal_distribution<float> normal;
  for (std::size_t i = 0; i < count; ++i) found[i] = normal(rng);
  return found;
}

struct Weights {
  Matrix view;
  std::unique_ptr<std::uint8_t[]> values;
  std::unique_ptr<float[]> scales;

  Weights(WeightKind kind, std::size_t rows, std::size_t columns, std::mt19937& rng) {
    values = numbers(kind, rows * columns, rng);
    if (kind == WeightKind::codes8) scales = floats(rows, rng);
    view = {kind, rows, columns, values.get(), scales.get()};
  }
};

struct Tokens {
  std::unique_ptr<float[]> values, steps;
  std::unique_ptr<std::int8_t[]> codes;
  std::unique_ptr<std::int32_t[]> sums;
  RowInputs view{};

  Tokens(std::size_t tokens, std::size_t columns, std::mt19937& rng) {
    values = floats(tokens * columns, rng);
    steps = floats(tokens, rng);
    codes.reset(new std::int8_t[tokens * columns]);
    sums.reset(new std::int32_t[tokens]);
    for (std::size_t t = 0; t < tokens; ++t) {
      sums[t] = 0;
      for (std::size_t i = 0; i < columns; ++i) {
        codes[t * columns + i] =
            static_cast<std::int8_t>(rng() % 3 == 0 ? (rng() % 2 ? 127 : -127) : static_cast<int>(rng() % 255) - 127);
        sums[t] += codes[t * columns + i];
      }
    }
    view = {tokens, columns, false, values.get(), codes.get(), steps.get(), sums.get()};
  }
};

void compare(const char* isa, const char* what, const std::vector<float>& found, const std::vector<float>& expected,
             double limit, std::size_t a, std::size_t b) {
  double worst = 0;
  for (std::size_t i = 0; i < found.size(); ++i) {
    worst = std::max(worst, std::fabs(static_cast<double>(found[i]) - static_cast<double>(expected[i])));
  }
  expect(worst <= limit, isa, what, a, b);
}

void rows_case(WeightKind kind, std::size_t rows, std::size_t columns, std::size_t tokens, std::mt19937& rng) {
  const Weights w(kind, rows, columns, rng);
  const Tokens x(tokens, columns, rng);
  const std::size_t stride = rows + 3, split = rows / 3;
  std::vector<std::int32_t> list(rows + 2);
  for (auto& row : list) row = static_cast<std::int32_t>(rng() % rows);
  const auto factors = floats(list.size(), rng);
  std::vector<std::vector<float>> first;
  for (const tulle::Isa& isa : tulle::supported_isas()) {
    std::vector<float> all(tokens * stride, kPoison), some(list.size(), kPoison), added(columns, 1.0f), scaled(columns);
    isa.scaling->rows(w.view, 0, split, x.view, all.data(), stride);
    isa.scaling->rows(w.view, split, rows, x.view, all.data(), stride);
    for (std::size_t t = 0; t < tokens; ++t) {
      for (std::size_t r = rows; r < stride; ++r)
        expect(all[t * stride + r] == kPoison, isa.name, "beyond the rows", rows, columns);
    }
    isa.scaling->chosen(w.view, list.data(), list.size(), x.view, tokens - 1, some.data());
    isa.scaling->add_rows(w.view, list.data(), factors.get(), list.size(), added.data());
    const std::size_t from = columns / 3;
    if (kind != WeightKind::codes8) isa.scaling->scaled(w.view, rows - 1, from, columns, x.values.get(), scaled.data());
    if (first.empty()) {
      first = {all, some, added, scaled};
      continue;
    }
    const double exact = kind == WeightKind::codes8 ? 0.0 : 2e-6 * static_cast<double>(columns);
    compare(isa.name, "rows", all, first[0], exact, rows, columns);
    compare(isa.name, "chosen", some, first[1], exact, rows, columns);
    compare(isa.name, "add_rows", added, first[2],
            1e-5 * (kind == WeightKind::codes8 ? 128.0 : 1.0) * static_cast<double>(rows), rows, columns);
    compare(isa.name, "scaled", scaled, first[3], 0.0, rows, columns);
  }
}

void panels_case(WeightKind kind, std::size_t inputs, std::size_t outputs, std::size_t rows, std::mt19937& rng) {
  Panels b;
  b.kind = kind;
  b.inputs = inputs;
  b.outputs = outputs;
  const auto values = numbers(kind, b.panels() * kPanel * inputs, rng);
  b.values = values.get();
  const std::size_t a_stride = inputs + 1, first = b.panels() / 4, from = inputs / 5;
  const auto a = floats(rows * a_stride, rng);
  const std::size_t stride = (b.panels() - first) * kPanel;
  std::vector<float> expected;
  for (const tulle::Isa& isa : tulle::supported_isas()) {
    std::vector<float> c(rows * stride, 1.0f);
    isa.scaling->panels(b, first, b.panels(), from, inputs, a.get(), a_stride, rows, c.data(), stride);
    if (expected.empty()) expected = c;
    compare(isa.name, "panels", c, expected, 2e-6 * static_cast<double>(inputs), inputs, outputs);
  }
}

void argmax_case(std::size_t blocks, std::size_t block, std::mt19937& rng) {
  // Few values, so that there are many ties: the first one counts.
  const auto x = floats(blocks * block, rng);
  for (std::size_t i = 0; i < blocks * block; ++i) x[i] = std::nearbyint(x[i]);
  if (blocks > 2) std::fill(x.get(), x.get() + block, std::nanf(""));
  std::vector<std::int32_t> expected;
  for (const tulle::Isa& isa : tulle::supported_isas()) {
    std::vector<std::int32_t> units(blocks, -1);
    isa.scaling->argmax(x.get(), blocks, block, 7, units.data());
    if (expected.empty()) expected = units;
    expect(units == expected, isa.name, "argmax", blocks, block);
  }
}

template <typename Change>
void refused(const char* what, const Change& change) {
  // A dense model of one layer that check() accepts.
  static float data[64] = {};
  tulle::ScalingModel m;
  m.hidden = 4;
  m.intermediate = 8;
  m.heads = 2;
  m.vocabulary = 3;
  m.embedding = m.norm = data;
  m.head = {WeightKind::f32, 3, 4, data, nullptr};
  tulle::ScalingLayer l;
  l.input_norm = l.post_norm = data;
  for (tulle::Projection* p : {&l.q, &l.k, &l.v, &l.o}) p->weight = {WeightKind::f32, 4, 4, data, nullptr};
  l.w1.weight = {WeightKind::f32, 8, 4, data, nullptr};
  l.w2.weight = {WeightKind::f32, 4, 8, data, nullptr};
  m.layers.push_back(l);
  tulle::check(m);
  change(m);
  try {
    tulle::check(m);
  } catch (const std::invalid_argument& error) {
    expect(std::strchr(error.what(), '\n') == nullptr, "check", what, 0, 0);
    return;
  }
  expect(false, "check accepted", what, 0, 0);
}

}  // namespace

int main() {
  std::mt19937 rng(1);
  for (const WeightKind kind : {WeightKind::f32, WeightKind::bf16, WeightKind::codes8}) {
    for (const std::size_t columns : {1, 7, 16, 33, 64, 100, 129, 200, 512}) {
      for (const std::size_t rows : {1, 5, 8, 21}) {
        for (const std::size_t tokens : {1, 2, 5}) rows_case(kind, rows, columns, tokens, rng);
      }
    }
  }
  // Rows that share the loads of a wide token.
  for (const WeightKind kind : {WeightKind::f32, WeightKind::bf16, WeightKind::codes8})
    rows_case(kind, 7, 5003, 1, rng);
  for (const WeightKind kind : {WeightKind::f32, WeightKind::bf16}) {
    for (const std::size_t outputs : {1, 16, 40, 64, 144}) {
      for (const std::size_t inputs : {1, 9, 64}) {
        for (const std::size_t rows : {1, 2, 3, 4, 7}) panels_case(kind, inputs, outputs, rows, rng);
      }
    }
  }
  for (const std::size_t block : {1, 3, 8, 16, 24, 64, 100}) argmax_case(9, block, rng);
  refused("a width that no head divides", [](tulle::ScalingModel& m) { m.heads = 3; });
  refused("no head", [](tulle::ScalingModel& m) { m.head.values = nullptr; });
  refused("modules without their layers", [](tulle::ScalingModel& m) { m.modules = 2; });
  refused("modules that do not divide", [](tulle::ScalingModel& m) { m.modules = 3; });
  refused("blocks without a controller", [](tulle::ScalingModel& m) { m.block = 4; });
  refused("blocks that do not divide", [](tulle::ScalingModel& m) { m.block = 5; });
  refused("a loss layer that is not there", [](tulle::ScalingModel& m) { m.loss_modules = 3; });
  refused("a short w1", [](tulle::ScalingModel& m) { m.layers[0].w1.weight.rows = 7; });
  refused("codes without scales", [](tulle::ScalingModel& m) { m.layers[0].q.weight.kind = WeightKind::codes8; });
  refused("codes of 4 bits", [](tulle::ScalingModel& m) { m.layers[0].q.weight.kind = WeightKind::codes4; });
  refused("frequencies of another head", [](tulle::ScalingModel& m) { m.inverse_frequencies = {1, 2, 3}; });
  if (failures == 0) std::printf("ok\n");
  return failures == 0 ? 0 : 1;
}
