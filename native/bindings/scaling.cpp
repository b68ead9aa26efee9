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
#include "tulle/scaling.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using namespace arrays;

constexpr std::size_t kLargest = std::size_t{1} << 24;  // of a size, so that products of two stay whole numbers

std::size_t size(const nb::dict& from, const char* key) {
  const auto found = get<std::size_t>(from, key);
  if (found > kLargest) throw std::invalid_argument(std::string(key) + ": expected at most 2^24, found more");
  return found;
}

const void* values(const nb::dict& from, tulle::WeightKind kind, std::size_t count, Kept& kept) {
  switch (kind) {
    case tulle::WeightKind::f32: return array_of<float>(from, "values", count, kept);
    case tulle::WeightKind::bf16: return array_of<std::uint16_t>(from, "values", count, kept);
    case tulle::WeightKind::codes8: return array_of<std::uint8_t>(from, "values", count, kept);
    default: throw std::invalid_argument("kind: expected f32, bf16 or codes8");
  }
}

tulle::Matrix matrix(const nb::dict& from, Kept& kept) {
  tulle::Matrix w;
  w.kind = weight_kind(get<std::string>(from, "kind"));
  w.rows = size(from, "rows");
  w.columns = size(from, "columns");
  w.values = values(from, w.kind, w.rows * w.columns, kept);
  w.scales = array_of<float>(from, "scales", w.rows, kept);
  if ((w.kind == tulle::WeightKind::codes8) != (w.scales != nullptr)) {
    throw std::invalid_argument("scales: expected them for codes alone");
  }
  return w;
}

tulle::Panels panels(const nb::dict& from, Kept& kept) {
  tulle::Panels b;
  b.kind = weight_kind(get<std::string>(from, "kind"));
  b.inputs = size(from, "inputs");
  b.outputs = size(from, "outputs");
  b.values = values(from, b.kind, b.panels() * b.inputs * tulle::kPanel, kept);
  return b;
}

nb::dict part(const nb::dict& from, const char* key) { return get<nb::dict>(from, key); }

tulle::Projection projection(const nb::dict& from, Kept& kept) {
  tulle::Projection p;
  p.weight = matrix(part(from, "weight"), kept);
  p.bias = array_of<float>(from, "bias", p.weight.rows, kept);
  return p;
}

// `w2` of a sparse feed-forward: a row per unit, a bias per channel.
tulle::Projection turned(const nb::dict& from, Kept& kept) {
  tulle::Projection p;
  p.weight = matrix(part(from, "weight"), kept);
  p.bias = array_of<float>(from, "bias", p.weight.columns, kept);
  return p;
}

tulle::Multiplicative multiplicative(const nb::dict& from, Kept& kept) {
  tulle::Multiplicative w;
  w.d = matrix(part(from, "d"), kept);
  w.e = panels(part(from, "e"), kept);
  w.bias = array_of<float>(from, "bias", w.d.rows * w.e.outputs, kept);
  return w;
}

tulle::Convolution convolution(const nb::dict& from, Kept& kept) {
  tulle::Convolution c;
  c.weight = panels(part(from, "weight"), kept);
  c.bias = array_of<float>(from, "bias", c.weight.outputs, kept);
  return c;
}

tulle::ScalingModel model(const nb::dict& from, Kept& kept) {
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
  const tulle::Matrix embedding = matrix(part(from, "embedding"), kept);
  if (embedding.rows != m.vocabulary || embedding.columns != m.hidden) {
    throw std::invalid_argument("embedding: expected [vocabulary][hidden], found another shape");
  }
  m.embedding_kind = embedding.kind;
  m.embedding = embedding.values;
  m.norm = array_of<float>(from, "norm", m.hidden, kept);
  if (m.loss_modules > 0) m.loss = multiplicative(part(from, "head"), kept);
  else m.head = matrix(part(from, "head"), kept);
  if (!item(from, "exact_head").is_none()) m.exact_head = matrix(part(from, "exact_head"), kept);
  for (nb::handle h : get<nb::list>(from, "layers")) {
    const auto d = nb::cast<nb::dict>(h);
    tulle::ScalingLayer l;
    l.input_norm = array_of<float>(d, "input_norm", m.hidden, kept);
    l.post_norm = array_of<float>(d, "post_norm", m.hidden, kept);
    if (m.modules == 0) {
      l.q = projection(part(d, "q"), kept);
      l.k = projection(part(d, "k"), kept);
      l.v = projection(part(d, "v"), kept);
      l.o = projection(part(d, "o"), kept);
    } else {
      l.multiplicative = multiplicative(part(d, "multiplicative"), kept);
      l.q_conv = convolution(part(d, "q_conv"), kept);
      l.k_conv = convolution(part(d, "k_conv"), kept);
      l.v_conv = convolution(part(d, "v_conv"), kept);
    }
    l.w1 = projection(part(d, "w1"), kept);
    if (m.block == 0) {
      l.w2 = projection(part(d, "w2"), kept);
    } else {
      l.w2 = turned(part(d, "w2"), kept);
      l.c1 = matrix(part(d, "c1"), kept);
      l.c2 = panels(part(d, "c2"), kept);
      l.c2_bias = array_of<float>(d, "c2_bias", l.c2.outputs, kept);
    }
    m.layers.push_back(std::move(l));
  }
  return m;
}

class BoundScaling {
 public:
  BoundScaling(nb::dict settings, std::size_t slots, std::size_t context, std::size_t batch, const std::string& cache,
               std::size_t threads)
      : engine_(model(settings, kept_), slots, context, batch, cache_kind(cache), threads) {}

  using Integers = nb::ndarray<const std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
  using Floats = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

  void forward(Integers tokens, Integers slots, Integers positions, Integers rows, Floats logits) {
    const std::size_t n = tokens.shape(0);
    if (slots.shape(0) != n || positions.shape(0) != n) {
      throw std::invalid_argument("expected as many slots and positions as tokens");
    }
    if (logits.shape(0) != rows.shape(0) || logits.shape(1) != engine_.vocabulary()) {
      throw std::invalid_argument("expected logits [rows][vocabulary]");
    }
    nb::gil_scoped_release release;
    engine_.forward(tokens.data(), slots.data(), positions.data(), n, rows.data(), rows.shape(0), logits.data());
  }

  double take_bytes_per_token() {
    const auto found = engine_.take_reads();
    return found.tokens == 0 ? 0.0 : found.bytes / static_cast<double>(found.tokens);
  }

  const tulle::ScalingEngine& engine() const { return engine_; }

 private:
  Kept kept_;
  tulle::ScalingEngine engine_;
};

}  // namespace

void define_scaling(nb::module_& m) {
  nb::class_<BoundScaling>(m, "ScalingEngine")
      .def(nb::init<nb::dict, std::size_t, std::size_t, std::size_t, const std::string&, std::size_t>(), "model"_a,
           "slots"_a, "context"_a, "batch"_a, "cache"_a, "threads"_a)
      .def("forward", &BoundScaling::forward, "tokens"_a.noconvert(), "slots"_a.noconvert(), "positions"_a.noconvert(),
           "rows"_a.noconvert(), "logits"_a.noconvert())
      .def("take_bytes_per_token", &BoundScaling::take_bytes_per_token)
      .def_prop_ro("weight_bytes", [](const BoundScaling& b) { return b.engine().weight_bytes(); })
      .def_prop_ro("cache_bytes", [](const BoundScaling& b) { return b.engine().cache_bytes(); })
      .def_prop_ro("work_bytes", [](const BoundScaling& b) { return b.engine().work_bytes(); })
      .def_prop_ro("units_read", [](const BoundScaling& b) { return b.engine().units_read(); })
      .def_prop_ro("units_skipped", [](const BoundScaling& b) { return b.engine().units_skipped(); });
}
