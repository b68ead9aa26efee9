// Python's view of training with held masks: checks every shape, releases the GIL, forwards.
#include "sparse_train.hpp"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>

#include "tulle/sparse_train.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Mask = nb::ndarray<const bool, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Vector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using OutVector = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutMatrix = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Indices = nb::ndarray<nb::numpy, std::int64_t, nb::c_contig, nb::device::cpu>;

void require(const char* what, std::size_t expected, std::size_t found) {
  if (found == expected) return;
  throw std::invalid_argument(std::string(what) + ": expected " + std::to_string(expected) + ", found " +
                              std::to_string(found));
}

std::size_t checked(std::size_t threads) {
  if (threads < 1 || threads > 1024) {
    throw std::invalid_argument("threads: expected 1 to 1024, found " + std::to_string(threads));
  }
  return threads;
}

class BoundPattern {
 public:
  explicit BoundPattern(Mask mask) {
    const auto* bytes = reinterpret_cast<const std::uint8_t*>(mask.data());
    const std::size_t rows = mask.shape(0), columns = mask.shape(1);
    nb::gil_scoped_release release;
    pattern_ = std::make_unique<tulle::SparsePattern>(bytes, rows, columns);
  }

  const tulle::SparsePattern& get() const { return *pattern_; }

  Indices entries() const {
    const std::size_t kept = get().kept();
    std::unique_ptr<std::int64_t[]> data(new std::int64_t[kept]);
    get().entries(data.get());
    nb::capsule owner(data.get(), [](void* p) noexcept { delete[] static_cast<std::int64_t*>(p); });
    return Indices(data.release(), {kept}, owner);
  }

  void product(Vector values, Matrix x, std::optional<Vector> bias, OutMatrix y, std::size_t threads) const {
    const std::size_t tokens = x.shape(0);
    require("values", get().kept(), values.shape(0));
    require("columns of x", get().columns(), x.shape(1));
    require("rows of y, as many as of x", tokens, y.shape(0));
    require("columns of y", get().rows(), y.shape(1));
    if (bias) require("entries of bias", get().rows(), bias->shape(0));
    checked(threads);
    const float *from = values.data(), *in = x.data(), *start = bias ? bias->data() : nullptr;
    float* out = y.data();
    nb::gil_scoped_release release;
    get().product(from, in, start, tokens, out, threads);
  }

  void input_gradient(Vector values, Matrix dy, OutMatrix dx, std::size_t threads) const {
    const std::size_t tokens = dy.shape(0);
    require("values", get().kept(), values.shape(0));
    require("columns of dy", get().rows(), dy.shape(1));
    require("rows of dx, as many as of dy", tokens, dx.shape(0));
    require("columns of dx", get().columns(), dx.shape(1));
    checked(threads);
    const float *from = values.data(), *in = dy.data();
    float* out = dx.data();
    nb::gil_scoped_release release;
    get().input_gradient(from, in, tokens, out, threads);
  }

  void weight_gradient(Matrix x, Matrix dy, OutVector dvalues, std::size_t threads) const {
    const std::size_t tokens = x.shape(0);
    require("columns of x", get().columns(), x.shape(1));
    require("rows of dy, as many as of x", tokens, dy.shape(0));
    require("columns of dy", get().rows(), dy.shape(1));
    require("dvalues", get().kept(), dvalues.shape(0));
    checked(threads);
    const float *in = x.data(), *gradients = dy.data();
    float* out = dvalues.data();
    nb::gil_scoped_release release;
    get().weight_gradient(in, gradients, tokens, out, threads);
  }

 private:
  std::unique_ptr<tulle::SparsePattern> pattern_;
};

}  // namespace

void define_sparse_train(nb::module_& m) {
  nb::class_<BoundPattern>(m, "SparsePattern")
      .def(nb::init<Mask>(), "mask"_a.noconvert())
      .def_prop_ro("rows", [](const BoundPattern& p) { return p.get().rows(); })
      .def_prop_ro("columns", [](const BoundPattern& p) { return p.get().columns(); })
      .def_prop_ro("kept", [](const BoundPattern& p) { return p.get().kept(); })
      .def_prop_ro("bytes", [](const BoundPattern& p) { return p.get().bytes(); })
      .def("entries", &BoundPattern::entries)
      .def("product", &BoundPattern::product, "values"_a.noconvert(), "x"_a.noconvert(), "bias"_a.noconvert().none(),
           "y"_a.noconvert(), "threads"_a)
      .def("input_gradient", &BoundPattern::input_gradient, "values"_a.noconvert(), "dy"_a.noconvert(),
           "dx"_a.noconvert(), "threads"_a)
      .def("weight_gradient", &BoundPattern::weight_gradient, "x"_a.noconvert(), "dy"_a.noconvert(),
           "dvalues"_a.noconvert(), "threads"_a);
}
