// What Python sees of an engine: built from a dataclass (tulle.engine.native_model), checked, with everything that it
// reads from kept alive.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "arrays.hpp"

namespace arrays {

// kModel: what the engine is made of, from the dataclass.
template <class EngineType, auto kModel>
class Bound {
 public:
  Bound(nb::handle settings, std::size_t slots, std::size_t context, std::size_t batch, const std::string& cache,
        std::size_t threads)
      : engine_(kModel(settings, kept_), slots, context, batch, cache_kind(cache), threads) {}

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

  // Mean bytes of weights per token of the passes of one token since the last call; 0 without any.
  double take_bytes_per_token() {
    const auto found = engine_.take_reads();
    return found.tokens == 0 ? 0.0 : found.bytes / static_cast<double>(found.tokens);
  }

  const EngineType& engine() const { return engine_; }

 private:
  Kept kept_;
  EngineType engine_;
};

// The class of an engine, to which more may be added.
template <class B>
nb::class_<B> define_bound(nb::module_& m, const char* name) {
  using namespace nb::literals;
  nb::class_<B> found(m, name);
  found
      .def(nb::init<nb::handle, std::size_t, std::size_t, std::size_t, const std::string&, std::size_t>(), "model"_a,
           "slots"_a, "context"_a, "batch"_a, "cache"_a, "threads"_a)
      .def("forward", &B::forward, "tokens"_a.noconvert(), "slots"_a.noconvert(), "positions"_a.noconvert(),
           "rows"_a.noconvert(), "logits"_a.noconvert())
      .def("take_bytes_per_token", &B::take_bytes_per_token)
      .def_prop_ro("weight_bytes", [](const B& b) { return b.engine().weight_bytes(); })
      .def_prop_ro("cache_bytes", [](const B& b) { return b.engine().cache_bytes(); })
      .def_prop_ro("work_bytes", [](const B& b) { return b.engine().work_bytes(); });
  return found;
}

}  // namespace arrays
