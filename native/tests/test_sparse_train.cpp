// Products with held masks: every instruction set against the scalar kernels, byte for byte, and those against plain
// sums, on exactly sized heap buffers: under the address sanitizer a read or write past an end aborts.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "tulle/dispatch.hpp"
#include "tulle/sparse_train.hpp"

namespace {

int failures = 0;

void check(bool ok, const char* what, std::size_t rows, std::size_t columns, std::size_t tokens) {
  if (ok) return;
  std::printf("FAILED %s %s %zu x %zu, %zu tokens\n", tulle::active_isa().name, what, rows, columns, tokens);
  ++failures;
}

// Exactly n floats on the heap.
struct Floats {
  explicit Floats(std::size_t n) : size(n), data(new float[n]) {
    for (std::size_t i = 0; i < n; ++i) data[i] = std::numeric_limits<float>::quiet_NaN();
  }
  Floats(std::size_t n, std::mt19937& rng) : Floats(n) {
    std::normal_distribution<float> normal;
    for (std::size_t i = 0; i < n; ++i) data[i] = normal(rng);
  }
  std::size_t size;
  std::unique_ptr<float[]> data;
};

// |found - Σ| within rounding of `terms` terms that add up to `magnitude`.
bool near(float found, double sum, double magnitude, std::size_t terms) {
  return std::abs(found - sum) <= static_cast<double>(terms + 2) * 0x1p-24 * magnitude;
}

void test(std::size_t rows, std::size_t columns, std::size_t tokens, double density, std::mt19937& rng) {
  std::unique_ptr<std::uint8_t[]> mask(new std::uint8_t[rows * columns]);
  std::bernoulli_distribution keep(density);
  for (std::size_t i = 0; i < rows * columns; ++i) mask[i] = keep(rng) ? static_cast<std::uint8_t>(1 + rng() % 255) : 0;
  const tulle::SparsePattern pattern(mask.get(), rows, columns);

  std::vector<std::int64_t> entries(pattern.kept());
  pattern.entries(entries.data());
  std::vector<int> seen(rows * columns);
  for (std::int64_t e : entries) ++seen[static_cast<std::size_t>(e)];
  for (std::size_t i = 0; i < rows * columns; ++i) check(seen[i] == (mask[i] != 0), "entries", rows, columns, tokens);

  const Floats values(pattern.kept(), rng), x(tokens * columns, rng), dy(tokens * rows, rng), bias(rows, rng);
  std::vector<float> w(rows * columns);
  for (std::size_t i = 0; i < entries.size(); ++i) w[static_cast<std::size_t>(entries[i])] = values.data[i];

  Floats y(tokens * rows), dx(tokens * columns), dvalues(pattern.kept());
  pattern.product(values.data.get(), x.data.get(), bias.data.get(), tokens, y.data.get(), 2);
  pattern.input_gradient(values.data.get(), dy.data.get(), tokens, dx.data.get(), 2);
  pattern.weight_gradient(x.data.get(), dy.data.get(), tokens, dvalues.data.get(), 2);

  // The definition in the header, to the bit, for Y and dX.
  for (std::size_t t = 0; t < tokens; ++t) {
    for (std::size_t o = 0; o < rows; ++o) {
      float sum = bias.data[o];
      for (std::size_t k = 0; k < columns; ++k) {
        if (mask[o * columns + k]) sum = std::fma(w[o * columns + k], x.data[t * columns + k], sum);
      }
      check(sum == y.data[t * rows + o], "product", rows, columns, tokens);
    }
    for (std::size_t k = 0; k < columns; ++k) {
      float sum = 0;
      for (std::size_t o = 0; o < rows; ++o) {
        if (mask[o * columns + k]) sum = std::fma(w[o * columns + k], dy.data[t * rows + o], sum);
      }
      check(sum == dx.data[t * columns + k], "input_gradient", rows, columns, tokens);
    }
  }
  for (std::size_t i = 0; i < entries.size(); ++i) {
    const std::size_t o = static_cast<std::size_t>(entries[i]) / columns,
                      k = static_cast<std::size_t>(entries[i]) % columns;
    double sum = 0, magnitude = 0;
    for (std::size_t t = 0; t < tokens; ++t) {
      const double term = static_cast<double>(dy.data[t * rows + o]) * static_cast<double>(x.data[t * columns + k]);
      sum += term;
      magnitude += std::abs(term);
    }
    check(near(dvalues.data[i], sum, magnitude, tokens), "weight_gradient", rows, columns, tokens);
  }

  Floats again(pattern.kept()), y1(tokens * rows);
  pattern.weight_gradient(x.data.get(), dy.data.get(), tokens, again.data.get(), 5);
  pattern.product(values.data.get(), x.data.get(), bias.data.get(), tokens, y1.data.get(), 1);
  check(std::memcmp(again.data.get(), dvalues.data.get(), again.size * sizeof(float)) == 0 &&
            std::memcmp(y1.data.get(), y.data.get(), y.size * sizeof(float)) == 0,
        "threads", rows, columns, tokens);
}

// One part and block of random runs, of every kernel of `isa` against the scalar ones.
void compare(const tulle::Isa& isa, std::size_t tokens, std::size_t columns, std::mt19937& rng) {
  const tulle::SparseTrainKernels &ours = *isa.sparse_train, &plain = *tulle::supported_isas().front().sparse_train;
  constexpr std::size_t kRows = 24;
  const std::size_t stride = columns + 3;
  const Floats x(tokens == 0 ? 0 : (tokens - 1) * stride + columns, rng);
  Floats panel(columns * tulle::kPanelTokens), expected(columns * tulle::kPanelTokens);
  ours.pack(x.data.get(), stride, tokens, columns, panel.data.get());
  plain.pack(x.data.get(), stride, tokens, columns, expected.data.get());
  bool equal = true;
  for (std::size_t c = 0; c < columns; ++c) {
    const std::size_t row = c * tulle::kPanelTokens;
    equal = equal && std::memcmp(&panel.data[row], &expected.data[row], (tokens + 15) / 16 * 16 * sizeof(float)) == 0;
  }
  check(equal, "pack", kRows, columns, tokens);

  std::vector<std::uint32_t> runs;
  std::vector<std::uint16_t> offsets;
  for (std::size_t r = 0; r < kRows; ++r) {
    const std::size_t count = r % (std::min<std::size_t>(columns, 255) + 1);
    if (count == 0) continue;
    runs.push_back(static_cast<std::uint32_t>(r << 8 | count));
    for (std::size_t i = 0; i < count; ++i)
      offsets.push_back(static_cast<std::uint16_t>(rng() % columns * tulle::kPanelTokens));
  }
  const std::size_t kept = offsets.size();
  offsets.resize(kept + 4);
  const std::unique_ptr<std::uint16_t[]> exact(new std::uint16_t[offsets.size()]);
  std::memcpy(exact.get(), offsets.data(), offsets.size() * sizeof(std::uint16_t));
  const tulle::SparseBlock block = {runs.data(), runs.size(), exact.get()};
  const Floats values(kept, rng), start(kRows * tulle::kPanelTokens, rng);
  Floats sums(start.size), other(start.size);
  std::memcpy(sums.data.get(), start.data.get(), start.size * sizeof(float));
  std::memcpy(other.data.get(), start.data.get(), start.size * sizeof(float));
  ours.multiply(block, values.data.get(), panel.data.get(), tokens, sums.data.get());
  plain.multiply(block, values.data.get(), panel.data.get(), tokens, other.data.get());
  check(std::memcmp(sums.data.get(), other.data.get(), sums.size * sizeof(float)) == 0, "multiply", kRows, columns,
        tokens);

  Floats gradient(kept), wanted(kept);
  for (bool add : {false, true}) {
    ours.correlate(block, panel.data.get(), start.data.get(), tokens, add, gradient.data.get());
    plain.correlate(block, panel.data.get(), start.data.get(), tokens, add, wanted.data.get());
    check(std::memcmp(gradient.data.get(), wanted.data.get(), kept * sizeof(float)) == 0, "correlate", kRows, columns,
          tokens);
  }
  for (std::size_t rows : {std::size_t{1}, std::size_t{7}, std::size_t{8}, kRows - 1}) {
    Floats y(tokens * rows), y2(tokens * rows);
    ours.unpack(start.data.get(), tokens, rows, y.data.get(), rows);
    plain.unpack(start.data.get(), tokens, rows, y2.data.get(), rows);
    check(std::memcmp(y.data.get(), y2.data.get(), y.size * sizeof(float)) == 0, "unpack", rows, columns, tokens);
  }
}

}  // namespace

int main() {
  std::mt19937 rng(1);
  for (const tulle::Isa& isa : tulle::supported_isas()) {
    for (std::size_t tokens : {1, 7, 8, 9, 15, 16, 17, 31, 33, 47, 48, 49, 63, 64}) {
      for (std::size_t columns : {1, 5, 8, 13, 16, 112, 192}) compare(isa, tokens, columns, rng);
    }
    std::printf("%s: compared with scalar\n", isa.name);
  }
  for (double density : {0.0, 0.05, 0.3, 1.0}) {
    for (std::size_t tokens : {0, 1, 63, 64, 65, 130}) test(37, 230, tokens, density, rng);
    test(1, 1, 3, density, rng);
    test(1030, 9, 20, density, rng);
    test(9, 1030, 20, density, rng);
    test(2060, 3, 5, density, rng);
  }
  try {
    const std::uint8_t one = 1;
    tulle::SparsePattern(&one, 0, 1);
    check(false, "empty mask accepted", 0, 1, 0);
  } catch (const std::invalid_argument&) {
  }
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
