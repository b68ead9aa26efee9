// Python's view of the Scaling Transformer: arrays and settings in, checked, and kept alive as long as the engine.
#include "scaling.hpp"

#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "arrays.hpp"
#include "bound.hpp"
#include "tulle/scaling.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using namespace arrays;

const void* values(nb::handle from, tulle::WeightKind kind, std::size_t count, Kept& kept) {
  switch (kind) {
    case tulle::WeightKind::f32: return array_of<float>(from, "values", count, kept);
    case tulle::WeightKind::bf16: return array_of<std::uint16_t>(from, "values", count, kept);
    case tulle::WeightKind::codes8: return array_of<std::uint8_t>(from, "values", count, kept);
    default: throw std::invalid_argument("kind: expected f32, bf16 or codes8");
  }
}

tulle::Matrix matrix(nb::handle from, Kept& kept) {
  tulle::Matrix w;
  w.kind = weight_kind(from);
  w.rows = size(from, "rows");
  w.columns = size(from, "columns");
  w.values = values(from, w.kind, w.rows * w.columns, kept);
  w.scales = array_of<float>(from, "scales", w.rows, kept);
  if ((w.kind == tulle::WeightKind::codes8) != (w.scales != nullptr)) {
    throw std::invalid_argument("scales: expected them for codes alone");
  }
  return w;
}

tulle::Panels panels(nb::handle from, Kept& kept) {
  tulle::Panels b;
  b.kind = weight_kind(from);
  b.inputs = size(from, "inputs");
  b.outputs = size(from, "outputs");
  b.values = values(from, b.kind, b.panels() * b.inputs * tulle::kPanel, kept);
  return b;
}

tulle::Projection projection(nb::handle from, Kept& kept) {
  tulle::Projection p;
  p.weight = matrix(field(from, "weight"), kept);
  p.bias = array_of<float>(from, "bias", p.weight.rows, kept);
  return p;
}

// `w2` of a sparse feed-forward: a row per unit, a bias per channel.
tulle::Projection transposed_projection(nb::handle from, Kept& kept) {
  tulle::Projection p;
  p.weight = matrix(field(from, "weight"), kept);
  p.bias = array_of<float>(from, "bias", p.weight.columns, kept);
  return p;
}

tulle::Multiplicative multiplicative(nb::handle from, Kept& kept) {
  tulle::Multiplicative w;
  w.d = matrix(field(from, "d"), kept);
  w.e = panels(field(from, "e"), kept);
  w.bias = array_of<float>(from, "bias", w.d.rows * w.e.outputs, kept);
  return w;
}

tulle::Convolution convolution(nb::handle from, Kept& kept) {
  tulle::Convolution c;
  c.weight = panels(field(from, "weight"), kept);
  c.bias = array_of<float>(from, "bias", c.weight.outputs, kept);
  return c;
}

tulle::ScalingModel model(nb::handle from, Kept& kept) {
  tulle::ScalingModel m;
  m.hidden = size(from, "hidden");
  m.intermediate = size(from, "intermediate");
  m.heads = size(from, "heads");
  m.vocabulary = size(from, "vocabulary");
  m.modules = size(from, "modules");
  m.block = size(from, "block");
  m.loss_modules = size(from, "loss_modules");
  m.eps = get<float>(from, "eps");
  m.inverse_frequencies = get<std::vector<float>>(from, "inverse_frequencies");
  const tulle::Matrix embedding = matrix(field(from, "embedding"), kept);
  if (embedding.rows != m.vocabulary || embedding.columns != m.hidden) {
    throw std::invalid_argument("embedding: expected [vocabulary][hidden], found another shape");
  }
  m.embedding_kind = embedding.kind;
  m.embedding = embedding.values;
  m.norm = array_of<float>(from, "norm", m.hidden, kept);
  if (m.loss_modules > 0) m.loss = multiplicative(field(from, "head"), kept);
  else m.head = matrix(field(from, "head"), kept);
  if (!field(from, "exact_head").is_none()) m.exact_head = matrix(field(from, "exact_head"), kept);
  for (nb::handle d : get<nb::list>(from, "layers")) {
    tulle::ScalingLayer l;
    l.input_norm = array_of<float>(d, "input_norm", m.hidden, kept);
    l.post_norm = array_of<float>(d, "post_norm", m.hidden, kept);
    if (m.modules == 0) {
      l.q = projection(field(d, "q"), kept);
      l.k = projection(field(d, "k"), kept);
      l.v = projection(field(d, "v"), kept);
      l.o = projection(field(d, "o"), kept);
    } else {
      l.multiplicative = multiplicative(field(d, "multiplicative"), kept);
      l.q_conv = convolution(field(d, "q_conv"), kept);
      l.k_conv = convolution(field(d, "k_conv"), kept);
      l.v_conv = convolution(field(d, "v_conv"), kept);
    }
    l.w1 = projection(field(d, "w1"), kept);
    if (m.block == 0) {
      l.w2 = projection(field(d, "w2"), kept);
    } else {
      l.w2 = transposed_projection(field(d, "w2"), kept);
      l.c1 = matrix(field(d, "c1"), kept);
      l.c2 = panels(field(d, "c2"), kept);
      l.c2_bias = array_of<float>(d, "c2_bias", l.c2.outputs, kept);
    }
    m.layers.push_back(std::move(l));
  }
  return m;
}

}  // namespace

void define_scaling(nb::module_& m) {
  using Scaling = Bound<tulle::ScalingEngine, model>;
  define_bound<Scaling>(m, "ScalingEngine")
      .def_prop_ro("units_read", [](const Scaling& b) {
        nb::gil_scoped_release release;
        return b.engine().units_read();
      })
      .def_prop_ro("units_skipped", [](const Scaling& b) {
        nb::gil_scoped_release release;
        return b.engine().units_skipped();
      });
}
