// Python's view of the engine: arrays and settings in, checked, and kept alive as long as the engine.
#include "engine.hpp"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "arrays.hpp"
#include "bound.hpp"
#include "tulle/bandwidth.hpp"
#include "tulle/check.hpp"
#include "tulle/dispatch.hpp"
#include "tulle/engine.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using namespace arrays;

tulle::Grid grid(const nb::dict& from) {
  return {get<int>(from, "bits"), get<bool>(from, "symmetric"), get<float>(from, "clip")};
}

tulle::LinearView linear_view(const nb::dict& from, Kept& kept) {
  tulle::LinearView w{};
  tulle::LinearSizes sizes{};
  w.kind = weight_kind(get<std::string>(from, "kind"));
  const bool sparse = get<bool>(from, "sparse"), major = get<bool>(from, "by_columns"), four = get<bool>(from, "fours");
  using tulle::Layout;
  w.layout = four     ? (sparse ? Layout::sparse_input_major_blocks4 : Layout::input_major_blocks4)
             : major  ? (sparse ? Layout::sparse_input_major : Layout::input_major)
             : sparse ? Layout::sparse_tiles
                      : Layout::tiles;
  w.rows = get<std::size_t>(from, "rows");
  w.columns = get<std::size_t>(from, "columns");
  w.segment = get<std::size_t>(from, "segment");
  w.segments = get<std::size_t>(from, "segments");
  w.segments_per_scale = get<std::size_t>(from, "segments_per_scale");
  w.values = array<std::uint8_t>(from, "values", kept, &sizes.values);
  w.masks = array<std::uint8_t>(from, "masks", kept, &sizes.masks);
  w.offsets = array<std::uint64_t>(from, "offsets", kept, &sizes.offsets);
  w.starts = array<std::uint32_t>(from, "starts", kept, &sizes.starts);
  w.scales = array<std::uint16_t>(from, "scales", kept, &sizes.scales);
  w.zeros = array<std::uint8_t>(from, "zeros", kept, &sizes.zeros);
  w.zero = get<std::uint8_t>(from, "zero");
  tulle::check(w, sizes);
  return w;
}

tulle::Selection selection(const nb::object& found, std::size_t columns, Kept& kept) {
  tulle::Selection s;
  if (found.is_none()) return s;
  const auto from = nb::cast<nb::dict>(found);
  const auto kind = get<std::string>(from, "kind");
  if (kind == "top_k") s.kind = tulle::Selection::Kind::top_k;
  else if (kind == "threshold") s.kind = tulle::Selection::Kind::threshold;
  else if (kind == "relu") s.kind = tulle::Selection::Kind::relu;
  else throw std::invalid_argument("selection of inputs: expected top_k, threshold or relu, found '" + kind + "'");
  s.keep = get<std::size_t>(from, "keep");
  s.block = get<std::size_t>(from, "block");
  s.unit = get<std::size_t>(from, "unit");
  s.norm = get<bool>(from, "norm");
  s.threshold = get<float>(from, "threshold");
  s.rescale = get<bool>(from, "rescale");
  s.score = array_of<float>(from, "score", columns, kept);
  return s;
}

tulle::Linear linear(const nb::dict& from, Kept& kept) {
  tulle::Linear l;
  l.weight = linear_view(from, kept);
  l.bias = array_of<float>(from, "bias", l.weight.rows, kept);
  const auto input = get<nb::dict>(from, "input");
  l.input = grid(input);
  l.engine_grid = get<bool>(input, "own");
  l.selection = selection(item(from, "selection"), l.weight.columns, kept);
  return l;
}

tulle::Transform transform(const nb::dict& from) {
  tulle::Transform t;
  const auto kind = get<std::string>(from, "kind");
  t.channels = get<std::size_t>(from, "channels");
  const auto copy = [&](const char* key, std::size_t expected) {
    const auto found = get<Vector<float>>(from, key);
    if (found.shape(0) != expected) {
      throw std::invalid_argument(std::string(key) + " of a transform: expected " + std::to_string(expected) +
                                  " elements, found " + std::to_string(found.shape(0)));
    }
    t.numbers.insert(t.numbers.end(), found.data(), found.data() + expected);
  };
  const auto divides = [&](std::size_t part) {
    if (part == 0 || t.channels % part != 0) {
      throw std::invalid_argument("block of a transform: expected a divisor of " + std::to_string(t.channels) +
                                  ", found " + std::to_string(part));
    }
  };
  if (t.channels == 0 || t.channels > (std::size_t{1} << 24))
    throw std::invalid_argument("channels: expected 1 to 2^24");
  if (kind == "diagonal") {
    t.kind = tulle::Transform::Kind::diagonal;
    copy("scale", t.channels);
  } else if (kind == "permutation") {
    t.kind = tulle::Transform::Kind::permutation;
    const auto found = get<Vector<std::int32_t>>(from, "index");
    if (found.shape(0) != t.channels) throw std::invalid_argument("index of a permutation: wrong length");
    for (std::size_t i = 0; i < t.channels; ++i) {
      const std::int32_t value = found.data()[i];
      if (value < 0 || static_cast<std::size_t>(value) >= t.channels) {
        throw std::invalid_argument("index of a permutation: expected channels, found " + std::to_string(value));
      }
      t.index.push_back(value);
    }
  } else if (kind == "hadamard") {
    t.kind = tulle::Transform::Kind::hadamard;
    t.block = get<std::size_t>(from, "block");
    t.base = get<std::size_t>(from, "base");
    divides(t.block);
    if (t.base == 0 || t.block % t.base != 0 || ((t.block / t.base) & (t.block / t.base - 1)) != 0) {
      throw std::invalid_argument("block of a Hadamard transform: expected base times a power of two");
    }
    if (t.base > 1) copy("matrix", t.base * t.base);
  } else if (kind == "block_matrix") {
    t.kind = tulle::Transform::Kind::block_matrix;
    t.block = get<std::size_t>(from, "block");
    t.shared = get<bool>(from, "shared");
    divides(t.block);
    copy("matrix", t.block * (t.shared ? t.block : t.channels));
  } else if (kind == "kronecker") {
    t.kind = tulle::Transform::Kind::kronecker;
    t.left = get<std::size_t>(from, "left_size");
    t.right = get<std::size_t>(from, "right_size");
    divides(t.left);
    if (t.left * t.right != t.channels) throw std::invalid_argument("Kronecker factors do not fit the channels");
    copy("left", t.left * t.left);
    copy("right", t.right * t.right);
  } else {
    throw std::invalid_argument("transform: unknown kind '" + kind + "'");
  }
  return t;
}

tulle::Group group(const nb::dict& from, Kept& kept) {
  tulle::Group g;
  for (nb::handle t : get<nb::list>(from, "transforms")) g.transforms.push_back(transform(nb::cast<nb::dict>(t)));
  for (nb::handle l : get<nb::list>(from, "linears")) g.linears.push_back(linear(nb::cast<nb::dict>(l), kept));
  return g;
}

tulle::Model model(const nb::dict& from, Kept& kept) {
  tulle::Model m;
  m.hidden = get<std::size_t>(from, "hidden");
  m.intermediate = get<std::size_t>(from, "intermediate");
  m.heads = get<std::size_t>(from, "heads");
  m.kv_heads = get<std::size_t>(from, "kv_heads");
  m.head_dim = get<std::size_t>(from, "head_dim");
  m.vocabulary = get<std::size_t>(from, "vocabulary");
  for (std::size_t size : {m.hidden, m.intermediate, m.heads, m.kv_heads, m.head_dim, m.vocabulary}) {
    if (size > (std::size_t{1} << 24)) throw std::invalid_argument("sizes of the model: expected at most 2^24");
  }
  m.eps = get<float>(from, "eps");
  const auto gate = get<std::string>(from, "gate");
  if (gate == "silu") m.gate = tulle::Gate::silu;
  else if (gate == "relu") m.gate = tulle::Gate::relu;
  else if (gate == "relu2") m.gate = tulle::Gate::relu2;
  else if (gate == "gelu_tanh") m.gate = tulle::Gate::gelu_tanh;
  else throw std::invalid_argument("gate: expected silu, relu, relu2 or gelu_tanh, found '" + gate + "'");
  m.inverse_frequencies = get<std::vector<float>>(from, "inverse_frequencies");
  m.rope_scale = get<float>(from, "rope_scale");
  m.query = grid(get<nb::dict>(from, "query"));
  m.key = grid(get<nb::dict>(from, "key"));
  m.value = grid(get<nb::dict>(from, "value"));
  const nb::object rotation = item(from, "head_rotation");
  if (!rotation.is_none()) m.head_rotation = transform(nb::cast<nb::dict>(rotation));
  m.embedding_kind = weight_kind(get<std::string>(from, "embedding_kind"));
  const std::size_t elements = m.vocabulary * m.hidden;
  if (m.embedding_kind == tulle::WeightKind::bf16) {
    m.embedding = array_of<std::uint16_t>(from, "embedding", elements, kept);
  } else if (m.embedding_kind == tulle::WeightKind::f32) {
    m.embedding = array_of<float>(from, "embedding", elements, kept);
  } else {
    throw std::invalid_argument("embedding_kind: expected bf16 or f32");
  }
  const auto exact = get<std::string>(from, "exact_kind");
  if (exact == "bf16") {
    m.exact_kind = tulle::WeightKind::bf16;
    m.exact_head = array_of<std::uint16_t>(from, "exact_head", elements, kept);
  } else {
    m.exact_head = array_of<float>(from, "exact_head", elements, kept);
  }
  m.norm = array_of<float>(from, "norm", m.hidden, kept);
  m.head = group(get<nb::dict>(from, "head"), kept);
  for (nb::handle h : get<nb::list>(from, "layers")) {
    const auto d = nb::cast<nb::dict>(h);
    tulle::Layer layer;
    layer.input_norm = array_of<float>(d, "input_norm", m.hidden, kept);
    layer.post_norm = array_of<float>(d, "post_norm", m.hidden, kept);
    layer.query_norm = array_of<float>(d, "query_norm", m.head_dim, kept);
    layer.key_norm = array_of<float>(d, "key_norm", m.head_dim, kept);
    layer.window = get<std::size_t>(d, "window");
    layer.qkv = group(get<nb::dict>(d, "qkv"), kept);
    layer.o = group(get<nb::dict>(d, "o"), kept);
    layer.gate_up = group(get<nb::dict>(d, "gate_up"), kept);
    layer.down = group(get<nb::dict>(d, "down"), kept);
    m.layers.push_back(std::move(layer));
  }
  return m;
}

}  // namespace

void define_engine(nb::module_& m) {
  m.def(
      "read_bandwidth",
      [](std::size_t bytes, std::size_t threads, std::size_t passes) {
        nb::gil_scoped_release release;
        return tulle::read_bandwidth(bytes, threads, passes);
      },
      "bytes"_a, "threads"_a, "passes"_a);
  m.def(
      "top_k",
      [](nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu> x, std::size_t keep, std::size_t block,
         std::size_t unit) {
        const std::size_t n = x.shape(0);
        tulle::Selection selection;
        selection.kind = tulle::Selection::Kind::top_k;
        selection.keep = keep;
        selection.block = block == 0 ? n : block;
        selection.unit = unit;
        tulle::check(selection, n);
        thread_local std::vector<float> spare;
        spare.resize(3 * (n + 16));
        selection.run(*tulle::active_isa().ops, x.data(), n, spare.data());
      },
      "x"_a.noconvert(), "keep"_a, "block"_a = 0, "unit"_a = 1);
  m.def(
      "keep_largest",
      [](nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu> scores, std::size_t keep,
         nb::ndarray<bool, nb::ndim<2>, nb::c_contig, nb::device::cpu> mask, std::size_t threads) {
        const std::size_t rows = scores.shape(0), n = scores.shape(1);
        if (mask.shape(0) != rows || mask.shape(1) != n || keep < 1 || threads < 1 || threads > 1024) {
          throw std::invalid_argument("keep_largest: expected a mask in the shape of the scores, at least 1 kept and 1 "
                                      "to 1024 threads");
        }
        nb::gil_scoped_release release;
        tulle::keep_largest_mask(*tulle::active_isa().ops, scores.data(), rows, n, keep, threads, mask.data());
      },
      "scores"_a.noconvert(), "keep"_a, "mask"_a.noconvert(), "threads"_a);
  define_bound<Bound<tulle::Engine, model>>(m, "Engine");
}
