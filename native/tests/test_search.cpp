// The search for codes and the sums of outer products: what the results must satisfy, in double precision, and every
// instruction set and number of threads against the scalar kernels on one thread. All on exactly sized heap buffers:
// under the address sanitizer a read or write past an end aborts.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "tulle/dispatch.hpp"
#include "tulle/search.hpp"

namespace {

int failures = 0;

struct Where {
  const char* isa;
  std::size_t rows, columns, groups, threads;
};

void check(bool ok, const char* what, const Where& at) {
  if (ok) return;
  if (++failures > 50) return;
  std::printf("FAILED %s: %s, %zu x %zu, %zu groups, %zu threads\n", what, at.isa, at.rows, at.columns, at.groups,
              at.threads);
}

// Exactly n elements on the heap.
template <typename T>
class Array {
 public:
  explicit Array(std::size_t n, T value = T{}) : size_(n), data_(new T[n]) { std::fill_n(data_.get(), n, value); }
  Array(const Array& other) : size_(other.size_), data_(new T[other.size_]) {
    std::copy_n(other.data_.get(), size_, data_.get());
  }
  Array& operator=(Array other) {
    std::swap(size_, other.size_);
    data_.swap(other.data_);
    return *this;
  }
  T* data() const { return data_.get(); }
  std::size_t size() const { return size_; }
  T& operator[](std::size_t i) const { return data_[i]; }
  bool operator==(const Array& other) const {  // a zero's sign does not matter
    return size_ == other.size_ && std::equal(data(), data() + size_, other.data());
  }

 private:
  std::size_t size_;
  std::unique_ptr<T[]> data_;
};
typedef Array<float> Floats;

const float kPoison = std::numeric_limits<float>::quiet_NaN();

Floats normal(std::size_t n, std::mt19937& rng) {
  std::normal_distribution<float> draw;
  Floats x(n);
  for (std::size_t i = 0; i < n; ++i) x[i] = draw(rng);
  return x;
}

float nearest_bf16(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
  std::memcpy(&x, &bits, sizeof bits);
  return x;
}

double clamp(double x, double low, double high) { return x < low ? low : (x > high ? high : x); }

// A layer: weights, a Hessian, what the sweep feeds back, a mask, grids and codes.
struct Layer {
  Layer(std::size_t r, std::size_t c, std::size_t g, std::mt19937& rng)
      : rows(r), columns(c), groups(g), weight(normal(r * c, rng)), importance(c), hessian(c * c), feedback(c * c),
        step(r * g), zero(r * g), mask(r * c), codes(r * c) {
    const std::size_t tokens = 2 * c + 1;
    const Floats x = normal(tokens * c, rng);
    for (std::size_t i = 0; i < c; ++i) {
      for (std::size_t j = 0; j < c; ++j) {
        double sum = i == j ? 0.1 : 0.0;
        for (std::size_t t = 0; t < tokens; ++t) sum += static_cast<double>(x[t * c + i]) * x[t * c + j] / tokens;
        hessian[i * c + j] = static_cast<float>(sum);
        feedback[i * c + j] = j < i ? static_cast<float>(sum) : kPoison;  // only what is before a column is read
      }
      importance[i] = hessian[i * c + i];
    }
    for (std::size_t i = 0; i < r * g; ++i) {
      step[i] = nearest_bf16(0.2f + static_cast<float>(rng() % 100) / 200.0f);
      zero[i] = static_cast<float>(rng() % 16);
    }
    for (std::size_t i = 0; i < r * c; ++i) {
      mask[i] = rng() % 5 < 3;
      codes[i] = static_cast<std::int16_t>(rng() % 16);
    }
  }
  std::size_t width() const { return columns / groups; }
  Where at(const char* isa, std::size_t threads) const { return {isa, rows, columns, groups, threads}; }

  std::size_t rows, columns, groups;
  Floats weight, importance, hessian, feedback, step, zero;
  Array<bool> mask;
  Array<std::int16_t> codes;
};

// [columns, rows] of [rows, columns].
template <typename T>
Array<T> turned(const Array<T>& from, std::size_t rows, std::size_t columns) {
  Array<T> to(from.size());
  for (std::size_t r = 0; r < rows; ++r) {
    for (std::size_t c = 0; c < columns; ++c) to[c * rows + r] = from[r * columns + c];
  }
  return to;
}

struct Run {
  const tulle::Isa* isa;
  std::size_t threads;
};

std::vector<Run> runs() {
  std::vector<Run> found;
  for (const tulle::Isa& isa : tulle::supported_isas()) {
    for (std::size_t threads : {1u, 2u, 5u}) found.push_back({&isa, threads});
  }
  return found;
}

const Floats kRatios = [] {
  Floats ratios(7);
  for (std::size_t i = 0; i < ratios.size(); ++i) ratios[i] = 1.0f - static_cast<float>(i) / 14.0f;
  return ratios;
}();

// Step and zero of one group by the definition, in double but for the step, which files hold in bfloat16.
void ends_to_grid(double low, double high, const tulle::GridLevels& grid, double* step, double* zero) {
  if (grid.symmetric) {
    *step = nearest_bf16(static_cast<float>(std::max(std::abs(low), std::abs(high))) / grid.high);
    *zero = 0;
    return;
  }
  *step = nearest_bf16(static_cast<float>(std::max(high, 0.0) - std::min(low, 0.0)) / grid.high);
  *zero = clamp(std::nearbyint(static_cast<float>(-std::min(low, 0.0)) / static_cast<float>(*step)), 0, grid.high);
}

void test_clip(const Layer& l, bool symmetric, bool masked, bool ranged) {
  const tulle::GridLevels grid = symmetric ? tulle::GridLevels{-8, 7, true} : tulle::GridLevels{0, 15, false};
  Floats least(l.rows * l.groups, -1.5f), largest(l.rows * l.groups, 1.0f);
  std::vector<Floats> first;
  for (const Run& run : runs()) {
    Floats step(l.rows * l.groups, kPoison), zero(l.rows * l.groups, kPoison);
    tulle::find_steps(*run.isa->search,
                      {l.rows, l.columns, l.width(), l.weight.data(), l.importance.data(),
                       masked ? l.mask.data() : nullptr, grid, kRatios.data(), kRatios.size(),
                       ranged ? least.data() : nullptr, ranged ? largest.data() : nullptr, step.data(), zero.data()},
                      run.threads);
    if (first.empty()) first = {step, zero};
    check(step == first[0] && zero == first[1], "clip search differs", l.at(run.isa->name, run.threads));
  }
  for (std::size_t r = 0; r < l.rows; ++r) {
    for (std::size_t g = 0; g < l.groups; ++g) {
      const std::size_t one = r * l.groups + g, start = r * l.columns + g * l.width();
      const auto weight = [&](std::size_t i) { return !masked || l.mask[start + i] ? l.weight[start + i] : 0.0f; };
      double low = least[one], high = largest[one];
      if (!ranged) {
        low = high = weight(0);
        for (std::size_t i = 0; i < l.width(); ++i) {
          low = std::min<double>(low, weight(i));
          high = std::max<double>(high, weight(i));
        }
      }
      const auto error = [&](double step, double zero) {
        double sum = 0;
        for (std::size_t i = 0; i < l.width(); ++i) {
          const double w = weight(i), level = clamp(std::nearbyint(w / step), grid.low - zero, grid.high - zero);
          sum += l.importance[g * l.width() + i] * (w - level * step) * (w - level * step);
        }
        return sum;
      };
      double best = INFINITY;
      bool one_of_them = false;
      for (std::size_t i = 0; i < kRatios.size(); ++i) {
        double step, zero;
        ends_to_grid(static_cast<float>(low) * kRatios[i], static_cast<float>(high) * kRatios[i], grid, &step, &zero);
        step = std::max(step, 1e-30);
        one_of_them |= std::abs(step - static_cast<double>(first[0][one])) <= 1e-12 + step * 0x1p-8;
        best = std::min(best, error(step, zero));
      }
      check(one_of_them, "step of no ratio", l.at("scalar", 1));
      check(error(first[0][one], first[1][one]) <= best * 1.0001 + 1e-12, "step is not the best", l.at("scalar", 1));
    }
  }
}

struct Swept {
  Floats value, error;
  Array<bool> mask;
  Array<std::int16_t> codes;
  bool operator==(const Swept& o) const {
    return value == o.value && error == o.error && mask == o.mask && codes == o.codes;
  }
};

void test_sweep(const Layer& l, bool by_weight, bool rounds, bool masked, std::size_t n, std::size_t m) {
  const std::size_t rows = l.rows, columns = l.columns;
  const Floats weight = turned(l.weight, rows, columns);
  const Floats step = turned(l.step, rows, l.groups), zero = turned(l.zero, rows, l.groups);
  const Array<bool> allowed = turned(l.mask, rows, columns);
  Array<std::int64_t> group(columns);
  for (std::size_t c = 0; c < columns; ++c) group[c] = static_cast<std::int64_t>(c / l.width());
  std::vector<Swept> first;
  for (const Run& run : runs()) {
    Swept s = {weight, Floats(columns * rows, kPoison), allowed, Array<std::int16_t>(columns * rows, -999)};
    const tulle::SweepBlock block = {
        columns, rows, l.feedback.data(), columns, by_weight ? weight.data() : nullptr, s.value.data(), s.error.data(),
        rounds ? group.data() : nullptr, rounds ? step.data() : nullptr, rounds ? zero.data() : nullptr,
        {0, 15, true}, rounds ? s.codes.data() : nullptr, masked ? s.mask.data() : nullptr, n, m,
        m == 0 ? nullptr : l.importance.data()};
    tulle::sweep_block(*run.isa->search, block, run.threads);
    if (first.empty()) first.push_back(s);
    check(s == first[0], "sweep differs", l.at(run.isa->name, run.threads));
  }
  const Swept& s = first[0];
  const Where at = l.at("scalar", 1);
  for (std::size_t r = 0; r < rows; ++r) {
    for (std::size_t j = 0; j < columns; ++j) {
      const std::size_t i = j * rows + r, g = static_cast<std::size_t>(group[j]) * rows + r;
      double value = weight[i], magnitude = std::abs(value);
      for (std::size_t k = 0; k < j; ++k) {
        const double term = static_cast<double>(l.feedback[j * columns + k]) * s.error[k * rows + r];
        value += term;
        magnitude += std::abs(term);
      }
      check(std::abs(s.value[i] - value) <= static_cast<double>(j + 2) * 0x1p-24 * magnitude, "value of a column", at);
      float kept = s.value[i];
      if (rounds) {
        const double code = clamp(std::nearbyint(kept / step[g]) + zero[g], 0, 15);
        check(s.codes[i] == static_cast<std::int16_t>(code), "code of a column", at);
        kept = (static_cast<float>(s.codes[i]) - zero[g]) * step[g];
      }
      if (masked && !s.mask[i]) kept = 0;
      check(s.error[i] == (by_weight ? weight[i] : s.value[i]) - kept, "error of a column", at);
      check(!masked || !s.mask[i] || allowed[i], "kept what was pruned", at);
    }
    for (std::size_t start = 0; m != 0 && start < columns; start += m) {
      // Scores are of values as fed back by the columns before the stripe.
      std::size_t kept = 0, open = 0;
      double least_kept = INFINITY, most_lost = -INFINITY, rounding = 0;
      for (std::size_t j = start; j < start + m; ++j) {
        const std::size_t i = j * rows + r;
        open += allowed[i];
        kept += s.mask[i];
        double value = weight[i], magnitude = std::abs(value);
        for (std::size_t k = 0; k < start; ++k) {
          const double term = static_cast<double>(l.feedback[j * columns + k]) * s.error[k * rows + r];
          value += term;
          magnitude += std::abs(term);
        }
        const double score = std::abs(value * l.importance[j]);
        rounding = std::max(rounding, static_cast<double>(columns) * 0x1p-23 * magnitude * l.importance[j]);
        if (s.mask[i]) least_kept = std::min(least_kept, score);
        if (!s.mask[i] && allowed[i]) most_lost = std::max(most_lost, score);
      }
      check(kept == std::min(open, n), "number kept of a stripe", at);
      check(least_kept >= most_lost - 2 * rounding, "kept are not the largest", at);
    }
  }
}

struct Descended {
  Floats gradient, product, step;
  Array<std::int16_t> codes;
  bool operator==(const Descended& o) const {
    return gradient == o.gradient && product == o.product && step == o.step && codes == o.codes;
  }
};

void test_descent(const Layer& l, bool masked, bool steps_first) {
  const std::size_t rows = l.rows, columns = l.columns, groups = l.groups;
  const bool* const mask = masked ? l.mask.data() : nullptr;
  // Σ (w − ŵ)·H·(w − ŵ)ᵀ; fills in (w − ŵ)·H and every group's Σ level·H.
  const auto objective = [&](const Array<std::int16_t>& codes, const Floats& step, std::vector<double>& gradient,
                             std::vector<double>& product) {
    gradient.assign(rows * columns, 0);
    product.assign(groups * rows * columns, 0);
    double sum = 0;
    for (std::size_t r = 0; r < rows; ++r) {
      std::vector<double> left(columns);
      for (std::size_t j = 0; j < columns; ++j) {
        const std::size_t g = j / l.width(), at = r * groups + g;
        const bool keep = mask == nullptr || mask[r * columns + j];
        const double level = keep ? codes[r * columns + j] - static_cast<double>(l.zero[at]) : 0.0;
        left[j] = l.weight[r * columns + j] - level * step[at];
        for (std::size_t k = 0; k < columns; ++k) {
          gradient[r * columns + k] += left[j] * l.hessian[j * columns + k];
          product[(g * rows + r) * columns + k] += level * l.hessian[j * columns + k];
        }
      }
      for (std::size_t k = 0; k < columns; ++k) sum += left[k] * gradient[r * columns + k];
    }
    return sum;
  };
  std::vector<double> gradient, product;
  const double before = objective(l.codes, l.step, gradient, product);
  std::vector<Descended> first;
  for (const Run& run : runs()) {
    Descended d = {Floats(rows * columns), Floats(groups * rows * columns), l.step, l.codes};
    std::copy(gradient.begin(), gradient.end(), d.gradient.data());
    std::copy(product.begin(), product.end(), d.product.data());
    const tulle::Coded start = {rows, columns, l.width(), d.codes.data(), d.step.data(), l.zero.data(), mask};
    Floats level(rows * columns, kPoison), residual(rows * columns, kPoison);
    tulle::open_levels(start, l.weight.data(), level.data(), residual.data(), run.threads);
    for (std::size_t i = 0; i < rows * columns; ++i) {
      const std::size_t at = i / columns * groups + i % columns / l.width();
      const bool keep = mask == nullptr || mask[i];
      check(level[i] == (keep ? static_cast<float>(l.codes[i]) - l.zero[at] : 0.0f) &&
                std::abs(residual[i] - (l.weight[i] - level[i] * l.step[at])) <= 0x1p-20,
            "levels", l.at(run.isa->name, run.threads));
    }
    tulle::descend(*run.isa->search,
                   {start, l.hessian.data(), d.gradient.data(), d.product.data(), d.codes.data(), d.step.data(),
                    {0, 15, true}, 3, steps_first},
                   run.threads);
    if (first.empty()) first.push_back(d);
    check(d == first[0], "descent differs", l.at(run.isa->name, run.threads));
  }
  const Descended& d = first[0];
  const Where at = l.at("scalar", 1);
  const double after = objective(d.codes, d.step, gradient, product);
  check(after < before, "descent climbs", at);
  bool held = true, consistent = true;
  for (std::size_t i = 0; i < rows * columns; ++i) {
    if (mask != nullptr && !mask[i]) held &= d.codes[i] == l.codes[i];
    held &= d.codes[i] >= 0 && d.codes[i] <= 15;
    // Some hundred updates of numbers up to some hundreds.
    consistent &= std::abs(d.gradient[i] - gradient[i]) <= 1e-3;
  }
  for (std::size_t i = 0; i < product.size(); ++i) consistent &= std::abs(d.product[i] - product[i]) <= 1e-2;
  check(held, "codes outside mask or grid", at);
  check(consistent, "gradient or products are not kept up to date", at);
}

void test_columns(const Layer& l, std::mt19937& rng) {
  Array<std::int64_t> order(l.columns);
  for (std::size_t i = 0; i < l.columns; ++i) order[i] = static_cast<std::int64_t>(i);
  std::shuffle(order.data(), order.data() + order.size(), rng);
  for (std::size_t threads : {1u, 2u, 5u}) {
    const Where at = l.at("all", threads);
    Floats taken(l.weight.size(), kPoison), back(l.weight.size(), kPoison);
    tulle::take_columns(l.weight.data(), l.rows, l.columns, order.data(), taken.data(), threads);
    for (std::size_t i = 0; i < taken.size(); ++i) {
      const auto c = static_cast<std::size_t>(order[i / l.rows]);
      check(taken[i] == l.weight[i % l.rows * l.columns + c], "columns taken", at);
    }
    tulle::put_columns(taken.data(), l.rows, l.columns, order.data(), back.data(), threads);
    check(back == l.weight, "columns put back", at);
    Array<bool> kept(l.mask.size()), kept_back(l.mask.size());
    tulle::take_columns(l.mask.data(), l.rows, l.columns, order.data(), kept.data(), threads);
    tulle::put_columns(kept.data(), l.rows, l.columns, order.data(), kept_back.data(), threads);
    check(kept_back == l.mask, "mask put back", at);
  }
}

float of_bf16(std::uint16_t x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}

Array<std::uint16_t> bf16(std::size_t n, std::mt19937& rng) {
  const Floats x = normal(n, rng);
  Array<std::uint16_t> found(n);
  for (std::size_t i = 0; i < n; ++i) {
    const float near = nearest_bf16(x[i]);
    std::uint32_t bits;
    std::memcpy(&bits, &near, sizeof bits);
    found[i] = static_cast<std::uint16_t>(bits >> 16);
  }
  return found;
}

void test_outer(std::size_t tokens, std::size_t rows, std::size_t columns, std::mt19937& rng) {
  const Array<std::uint16_t> a = bf16(tokens * rows, rng), b = bf16(tokens * columns, rng);
  const Floats total = normal(rows * columns, rng);
  Floats own(rows * rows, kPoison);  // what is under the diagonal is not read
  for (std::size_t i = 0; i < rows; ++i) {
    for (std::size_t j = i; j < rows; ++j) own[i * rows + j] = total[(i * rows + j) % total.size()];
  }
  std::vector<Floats> first;
  for (const Run& run : runs()) {
    if (run.isa->search->outer == nullptr) continue;
    Floats sums(total), mirrored(own);
    tulle::accumulate_outer(*run.isa->search, {tokens, rows, columns, a.data(), b.data(), sums.data(), 0.3f, 0.7f},
                            run.threads);
    tulle::accumulate_outer(*run.isa->search, {tokens, rows, rows, a.data(), nullptr, mirrored.data(), 0.3f, 0.7f},
                            run.threads);
    if (first.empty()) first = {sums, mirrored};
    check(sums == first[0] && mirrored == first[1], "sums of products differ",
          {run.isa->name, rows, columns, tokens, run.threads});
  }
  if (first.empty()) return;
  const auto compare = [&](const Floats& found, const Floats& before, const Array<std::uint16_t>& right, std::size_t n,
                           bool mirror) {
    for (std::size_t i = 0; i < rows; ++i) {
      for (std::size_t j = 0; j < n; ++j) {
        const double start = 0.7f * static_cast<double>(before[mirror && j < i ? j * n + i : i * n + j]);
        double sum = start, magnitude = std::abs(start);
        for (std::size_t t = 0; t < tokens; ++t) {
          const double term = 0.3f * static_cast<double>(of_bf16(a[t * rows + i])) * of_bf16(right[t * n + j]);
          sum += term;
          magnitude += std::abs(term);
        }
        check(std::abs(found[i * n + j] - sum) <= static_cast<double>(2 * tokens + 4) * 0x1p-24 * magnitude,
              mirror ? "symmetric sum of products" : "sum of products", {"first", rows, n, tokens, 1});
      }
    }
  };
  compare(first[0], total, b, columns, false);
  compare(first[1], own, a, rows, true);
}

}  // namespace

int main() {
  std::mt19937 rng(1);
  // Tails of every kind: rows beside 16 and 64, columns beside 16, groups of 1 to 75 columns.
  const std::size_t layers[][3] = {{1, 7, 1}, {70, 72, 6}, {64, 64, 1}, {17, 75, 5}, {130, 48, 48}, {5, 75, 1}};
  for (const auto& [rows, columns, groups] : layers) {
    const Layer layer(rows, columns, groups, rng);
    for (int i = 0; i < 8; ++i) test_clip(layer, i & 1, i & 2, i & 4);
    std::size_t m = 7;
    for (std::size_t stripe : {5u, 3u, 4u}) m = columns % stripe == 0 ? stripe : m;
    for (int i = 0; i < 8; ++i) test_sweep(layer, i & 1, i & 2, i & 4, 0, 0);
    for (int i = 0; i < 4; ++i) test_sweep(layer, i & 1, i & 2, true, m / 2, m);
    test_sweep(layer, false, true, true, columns / 3 + 1, columns);
    for (int i = 0; i < 4; ++i) test_descent(layer, i & 1, i & 2);
    test_columns(layer, rng);
  }
  // Pairs that are not whole, tails beside 8, 16 and 48 channels, more than one packed block and call; no tokens.
  const std::size_t products[][3] = {{1, 1, 1}, {0, 5, 7}, {3, 50, 17}, {31, 97, 64}, {385, 49, 47}, {1601, 9, 96}};
  for (const auto& [tokens, rows, columns] : products) test_outer(tokens, rows, columns, rng);
  if (failures != 0) return std::printf("%d checks failed\n", failures), 1;
  std::printf("search: all checks passed\n");
  return 0;
}
