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
#include "tulle/pass.hpp"

namespace arrays {

// kModel: what the engine is made of, from the dataclass.
template <class EngineType, auto kModel>
class Bound {
 public:
  Bound(nb::handle settings, std::size_t pages, std::size_t slots, std::size_t context, std::size_t batch,
        const std::string& cache, std::size_t threads, std::size_t snapshots, bool deterministic)
      : engine_(kModel(settings, kept_),
                {pages, slots, context, batch, cache_kind(cache), threads, snapshots, deterministic}) {}

  using Integers = nb::ndarray<const std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
  using Tables = nb::ndarray<const std::int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
  using Floats = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

  void forward(Integers tokens, Integers slots, Integers positions, Tables tables, Integers rows, Floats logits) {
    const auto pass = input(tokens, slots, positions, tables, rows);
    expect(logits, rows, engine_.vocabulary(), "logits [rows][vocabulary]");
    nb::gil_scoped_release release;
    engine_.forward(pass, logits.data());
  }

  void embed(Integers tokens, Integers slots, Integers positions, Tables tables, Integers rows, Floats hidden) {
    const auto pass = input(tokens, slots, positions, tables, rows);
    expect(hidden, rows, engine_.hidden(), "hidden [rows][hidden]");
    nb::gil_scoped_release release;
    engine_.embed(pass, hidden.data());
  }

  void copy_page(std::size_t source, std::size_t target) {
    nb::gil_scoped_release release;
    engine_.copy_page(source, target);
  }
  void save_state(std::size_t slot, std::size_t snapshot) {
    nb::gil_scoped_release release;
    engine_.save_state(slot, snapshot);
  }
  void load_state(std::size_t snapshot, std::size_t slot) {
    nb::gil_scoped_release release;
    engine_.load_state(snapshot, slot);
  }

  // Mean bytes of weights per token of the passes of one token since the last call; 0 without any.
  double take_bytes_per_token() {
    nb::gil_scoped_release release;
    const auto found = engine_.take_reads();
    return found.tokens == 0 ? 0.0 : found.bytes / static_cast<double>(found.tokens);
  }

  const EngineType& engine() const { return engine_; }

 private:
  tulle::PassInput input(const Integers& tokens, const Integers& slots, const Integers& positions,
                         const Tables& tables, const Integers& rows) const {
    const std::size_t n = tokens.shape(0);
    if (slots.shape(0) != n || positions.shape(0) != n) {
      throw std::invalid_argument("expected as many slots and positions as tokens");
    }
    const tulle::EngineSizes& sizes = engine_.sizes();
    const std::size_t blocks = (sizes.context + tulle::kKeyBlock - 1) / tulle::kKeyBlock;
    if (tables.shape(0) != sizes.slots || tables.shape(1) != blocks) {
      throw std::invalid_argument("expected tables [slots][context / 16] of " + std::to_string(sizes.slots) + " x " +
                                  std::to_string(blocks) + ", found " + std::to_string(tables.shape(0)) + " x " +
                                  std::to_string(tables.shape(1)));
    }
    return {tokens.data(), slots.data(), positions.data(), n, tables.data(), rows.data(), rows.shape(0)};
  }

  static void expect(const Floats& outputs, const Integers& rows, std::size_t width, const char* what) {
    if (outputs.shape(0) == rows.shape(0) && outputs.shape(1) == width) return;
    throw std::invalid_argument(std::string("expected ") + what);
  }

  Kept kept_;
  EngineType engine_;
};

// The class of an engine, to which more may be added.
template <class B>
nb::class_<B> define_bound(nb::module_& m, const char* name) {
  using namespace nb::literals;
  nb::class_<B> found(m, name);
  found
      .def(nb::init<nb::handle, std::size_t, std::size_t, std::size_t, std::size_t, const std::string&, std::size_t,
                    std::size_t, bool>(),
           "model"_a, "pages"_a, "slots"_a, "context"_a, "batch"_a, "cache"_a, "threads"_a, "snapshots"_a = 0,
           "deterministic"_a = false)
      .def("forward", &B::forward, "tokens"_a.noconvert(), "slots"_a.noconvert(), "positions"_a.noconvert(),
           "tables"_a.noconvert(), "rows"_a.noconvert(), "logits"_a.noconvert())
      .def("embed", &B::embed, "tokens"_a.noconvert(), "slots"_a.noconvert(), "positions"_a.noconvert(),
           "tables"_a.noconvert(), "rows"_a.noconvert(), "hidden"_a.noconvert())
      .def("copy_page", &B::copy_page, "source"_a, "target"_a)
      .def("save_state", &B::save_state, "slot"_a, "snapshot"_a)
      .def("load_state", &B::load_state, "snapshot"_a, "slot"_a)
      .def("take_bytes_per_token", &B::take_bytes_per_token)
      .def_prop_ro("weight_bytes", [](const B& b) { return b.engine().weight_bytes(); })
      .def_prop_ro("state_bytes", [](const B& b) { return b.engine().state_bytes(); })
      .def_prop_ro("page_bytes", [](const B& b) { return b.engine().page_bytes(); })
      .def_prop_ro("cache_bytes", [](const B& b) { return b.engine().cache_bytes(); })
      .def_prop_ro("work_bytes", [](const B& b) { return b.engine().work_bytes(); });
  return found;
}

}  // namespace arrays
