// Python's view of the search for codes: checks every shape, releases the GIL, forwards.
#include "search.hpp"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "tulle/dispatch.hpp"
#include "tulle/search.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

template <typename T, std::size_t kAxes>
using Array = nb::ndarray<T, nb::ndim<kAxes>, nb::c_contig, nb::device::cpu>;
template <typename T>
using Vector = Array<T, 1>;
template <typename T>
using Matrix = Array<T, 2>;
template <typename T>
using Optional = std::optional<T>;

void require(const char* what, std::size_t expected, std::size_t found) {
  if (found == expected) return;
  throw std::invalid_argument(std::string(what) + ": expected " + std::to_string(expected) + ", found " +
                              std::to_string(found));
}

void require(const char* what, bool holds) {
  if (!holds) throw std::invalid_argument(what);
}

template <typename T>
void require_shape(const char* what, const Matrix<T>& a, std::size_t rows, std::size_t columns) {
  require((std::string("rows of ") + what).c_str(), rows, a.shape(0));
  require((std::string("columns of ") + what).c_str(), columns, a.shape(1));
}

template <typename T>
void require_shape(const char* what, const Optional<Matrix<T>>& a, std::size_t rows, std::size_t columns) {
  if (a) require_shape(what, *a, rows, columns);
}

template <typename T>
T* data(const Optional<Matrix<T>>& a) {
  return a ? a->data() : nullptr;
}

std::size_t checked(std::size_t threads) {
  require("threads: expected 1 to 1024", threads >= 1 && threads <= 1024);
  return threads;
}

// Groups of `columns`, all of one width.
std::size_t width_of(std::size_t columns, std::size_t groups) {
  require("groups: expected a number that divides the columns", groups >= 1 && columns >= 1 && columns % groups == 0);
  return columns / groups;
}

tulle::GridLevels grid_of(float low, float high, bool symmetric) {
  require("grid: expected -128 <= low <= 0 < high <= 255", -128 <= low && low <= 0 && 0 < high && high <= 255);
  return {low, high, symmetric};
}

const tulle::SearchKernels& kernels() { return *tulle::active_isa().search; }

void find_steps(Matrix<const float> weight, Vector<const float> importance, Optional<Matrix<const bool>> mask,
                float low, float high, bool symmetric, Vector<const float> ratios,
                Optional<Matrix<const float>> least, Optional<Matrix<const float>> largest, Matrix<float> step,
                Matrix<float> zero, std::size_t threads) {
  const std::size_t rows = weight.shape(0), columns = weight.shape(1), groups = step.shape(1);
  const std::size_t width = width_of(columns, groups);
  require("importance", columns, importance.shape(0));
  require_shape("mask", mask, rows, columns);
  require_shape("step", step, rows, groups);
  require_shape("zero", zero, rows, groups);
  require_shape("least", least, rows, groups);
  require_shape("largest", largest, rows, groups);
  require("ranges: expected least and largest, or none", least.has_value() == largest.has_value());
  require("ratios: expected at least one", ratios.shape(0) > 0);
  const tulle::ClipSearch search = {rows, columns, width, weight.data(), importance.data(), data(mask),
                                    grid_of(low, high, symmetric), ratios.data(), ratios.shape(0), data(least),
                                    data(largest), step.data(), zero.data()};
  checked(threads);
  nb::gil_scoped_release release;
  tulle::find_steps(kernels(), search, threads);
}

void sweep_block(std::size_t start, Matrix<const float> feedback, Optional<Matrix<const float>> weight,
                 Matrix<float> value, Matrix<float> error, Optional<Vector<const std::int64_t>> group, Optional<Matrix<const float>> step,
                 Optional<Matrix<const float>> zero, float low, float high, Optional<Matrix<std::int16_t>> codes,
                 Optional<Matrix<bool>> mask, std::size_t n, std::size_t m, Optional<Vector<const float>> weighting,
                 std::size_t threads) {
  const std::size_t columns = error.shape(0), rows = error.shape(1), width = value.shape(0);
  require("block: expected columns of the matrix", start <= columns && width <= columns - start);
  require_shape("feedback", feedback, columns, columns);
  require_shape("value", value, width, rows);
  require_shape("weight", weight, columns, rows);
  require_shape("codes", codes, columns, rows);
  require_shape("mask", mask, columns, rows);
  require("grid: expected group, step, zero and codes, or none of them",
          step.has_value() == zero.has_value() && step.has_value() == group.has_value() &&
              step.has_value() == codes.has_value());
  tulle::GridLevels grid = {0, 0, true};
  if (step) {
    require("group", columns, group->shape(0));
    require_shape("zero", zero, step->shape(0), rows);
    require("columns of step", rows, step->shape(1));
    for (std::size_t c = 0; c < columns; ++c) {
      const std::int64_t g = group->data()[c];
      require("group: expected rows of step", g >= 0 && static_cast<std::size_t>(g) < step->shape(0));
    }
    grid = grid_of(low, high, true);
  }
  if (m != 0) {
    require("pattern: expected 1 <= N <= M <= 256, whole stripes, a mask and weighting",
            n >= 1 && n <= m && m <= 256 && width % m == 0 && mask.has_value() && weighting.has_value());
    require("weighting", columns, weighting->shape(0));
  }
  const std::size_t at = start * rows;
  const tulle::SweepBlock block = {
      width, rows, feedback.data() + start * columns + start, columns, weight ? weight->data() + at : nullptr, value.data(),
      error.data() + at, group ? group->data() + start : nullptr, data(step), data(zero), grid,
      codes ? codes->data() + at : nullptr, mask ? mask->data() + at : nullptr, n, m,
      weighting ? weighting->data() + start : nullptr};
  checked(threads);
  nb::gil_scoped_release release;
  tulle::sweep_block(kernels(), block, threads);
}

void require_order(const Vector<const std::int64_t>& order, std::size_t columns) {
  require("order", columns, order.shape(0));
  std::vector<bool> seen(columns);
  for (std::size_t i = 0; i < columns; ++i) {
    const std::int64_t c = order.data()[i];
    require("order: expected every column once",
            c >= 0 && static_cast<std::size_t>(c) < columns && !seen[static_cast<std::size_t>(c)]);
    seen[static_cast<std::size_t>(c)] = true;
  }
}

template <typename T>
void take_columns(Matrix<const T> from, Vector<const std::int64_t> order, Matrix<T> to, std::size_t threads) {
  const std::size_t rows = from.shape(0), columns = from.shape(1);
  require_shape("to", to, columns, rows);
  require_order(order, columns);
  checked(threads);
  nb::gil_scoped_release release;
  tulle::take_columns(from.data(), rows, columns, order.data(), to.data(), threads);
}

template <typename T>
void put_columns(Matrix<const T> from, Vector<const std::int64_t> order, Matrix<T> to, std::size_t threads) {
  const std::size_t rows = from.shape(1), columns = from.shape(0);
  require_shape("to", to, rows, columns);
  require_order(order, columns);
  checked(threads);
  nb::gil_scoped_release release;
  tulle::put_columns(from.data(), rows, columns, order.data(), to.data(), threads);
}

void open_levels(Matrix<const std::int16_t> codes, Matrix<const float> step, Matrix<const float> zero,
                 Optional<Matrix<const bool>> mask, Matrix<const float> weight, Matrix<float> level,
                 Matrix<float> residual, std::size_t threads) {
  const std::size_t rows = codes.shape(0), columns = codes.shape(1), width = width_of(columns, step.shape(1));
  require("rows of step", rows, step.shape(0));
  require_shape("zero", zero, rows, step.shape(1));
  require_shape("mask", mask, rows, columns);
  require_shape("weight", weight, rows, columns);
  require_shape("level", level, rows, columns);
  require_shape("residual", residual, rows, columns);
  checked(threads);
  nb::gil_scoped_release release;
  tulle::open_levels({rows, columns, width, codes.data(), step.data(), zero.data(), data(mask)}, weight.data(),
                     level.data(), residual.data(), threads);
}

void descend(Matrix<const float> hessian, Matrix<float> gradient, Array<float, 3> product, Matrix<std::int16_t> codes,
             Matrix<float> step, Matrix<const float> zero, Optional<Matrix<const bool>> mask, float low, float high,
             std::size_t sweeps, bool steps_first, std::size_t threads, Optional<Vector<const float>> row_scale) {
  const std::size_t rows = codes.shape(0), columns = codes.shape(1), groups = step.shape(1);
  const std::size_t width = width_of(columns, groups);
  require_shape("hessian", hessian, columns, columns);
  require_shape("gradient", gradient, rows, columns);
  require("groups of product", groups, product.shape(0));
  require("rows of product", rows, product.shape(1));
  require("columns of product", columns, product.shape(2));
  require("rows of step", rows, step.shape(0));
  require_shape("zero", zero, rows, groups);
  require_shape("mask", mask, rows, columns);
  if (row_scale) require("row_scale", rows, row_scale->shape(0));
  const tulle::GridLevels grid = grid_of(low, high, true);
  checked(threads);
  nb::gil_scoped_release release;
  tulle::descend(kernels(),
                 {{rows, columns, width, codes.data(), step.data(), zero.data(), data(mask)},
                  hessian.data(), gradient.data(), product.data(), codes.data(), step.data(), grid, sweeps,
                  steps_first, row_scale ? row_scale->data() : nullptr},
                 threads);
}

bool has_outer() { return kernels().outer != nullptr; }

// a and b: bfloat16, by its bits.
void accumulate_outer(Matrix<float> total, Matrix<const std::int16_t> a, Optional<Matrix<const std::int16_t>> b,
                      float alpha, float beta, std::size_t threads) {
  const std::size_t tokens = a.shape(0), rows = a.shape(1), columns = b ? b->shape(1) : rows;
  require("accumulate_outer: expected a CPU with AVX-512 BF16", has_outer());
  require("tokens of b", tokens, b ? b->shape(0) : tokens);
  require_shape("total", total, rows, columns);
  checked(threads);
  const auto bits = [](const std::int16_t* from) { return reinterpret_cast<const std::uint16_t*>(from); };
  nb::gil_scoped_release release;
  tulle::accumulate_outer(kernels(),
                          {tokens, rows, columns, bits(a.data()), b ? bits(b->data()) : nullptr, total.data(), alpha,
                           beta},
                          threads);
}

}  // namespace

void define_search(nb::module_& m) {
  m.def("has_outer", &has_outer);
  m.def("accumulate_outer", &accumulate_outer, "total"_a.noconvert(), "a"_a.noconvert(), "b"_a.noconvert().none(),
        "alpha"_a, "beta"_a, "threads"_a);
  m.def("find_steps", &find_steps, "weight"_a.noconvert(), "importance"_a.noconvert(), "mask"_a.noconvert().none(),
        "low"_a, "high"_a, "symmetric"_a, "ratios"_a.noconvert(), "least"_a.noconvert().none(),
        "largest"_a.noconvert().none(), "step"_a.noconvert(), "zero"_a.noconvert(), "threads"_a);
  m.def("sweep_block", &sweep_block, "start"_a, "feedback"_a.noconvert(), "weight"_a.noconvert().none(),
        "value"_a.noconvert(), "error"_a.noconvert(), "group"_a.noconvert().none(), "step"_a.noconvert().none(),
        "zero"_a.noconvert().none(), "low"_a, "high"_a, "codes"_a.noconvert().none(), "mask"_a.noconvert().none(),
        "n"_a, "m"_a, "weighting"_a.noconvert().none(), "threads"_a);
  m.def("take_columns", &take_columns<float>, "source"_a.noconvert(), "order"_a.noconvert(), "to"_a.noconvert(),
        "threads"_a);
  m.def("take_columns", &take_columns<bool>, "source"_a.noconvert(), "order"_a.noconvert(), "to"_a.noconvert(),
        "threads"_a);
  m.def("put_columns", &put_columns<float>, "source"_a.noconvert(), "order"_a.noconvert(), "to"_a.noconvert(),
        "threads"_a);
  m.def("put_columns", &put_columns<bool>, "source"_a.noconvert(), "order"_a.noconvert(), "to"_a.noconvert(),
        "threads"_a);
  m.def("put_columns", &put_columns<std::int16_t>, "source"_a.noconvert(), "order"_a.noconvert(), "to"_a.noconvert(),
        "threads"_a);
  m.def("open_levels", &open_levels, "codes"_a.noconvert(), "step"_a.noconvert(), "zero"_a.noconvert(),
        "mask"_a.noconvert().none(), "weight"_a.noconvert(), "level"_a.noconvert(), "residual"_a.noconvert(),
        "threads"_a);
  m.def("descend", &descend, "hessian"_a.noconvert(), "gradient"_a.noconvert(), "product"_a.noconvert(),
        "codes"_a.noconvert(), "step"_a.noconvert(), "zero"_a.noconvert(), "mask"_a.noconvert().none(), "low"_a,
        "high"_a, "sweeps"_a, "steps_first"_a, "threads"_a, "row_scale"_a.noconvert().none() = nb::none());
}
