// Python's view of the engine: arrays and settings in, checked, and kept alive as long as the engine.
#include "engine.hpp"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
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

tulle::Grid grid(nb::handle from) {
  return {get<int>(from, "bits"), get<bool>(from, "symmetric"), get<float>(from, "clip")};
}

// The facts of a linear (LinearFacts) and its arrays.
tulle::LinearView linear_view(nb::handle from, Kept& kept) {
  tulle::LinearView w{};
  tulle::LinearSizes sizes{};
  const nb::object facts = field(from, "facts");
  w.kind = weight_kind(facts);
  w.layout = layout(facts);
  w.rows = get<std::size_t>(facts, "rows");
  w.columns = get<std::size_t>(facts, "columns");
  w.segment = get<std::size_t>(facts, "segment");
  w.segments = get<std::size_t>(facts, "segments");
  w.segments_per_scale = get<std::size_t>(facts, "segments_per_scale");
  w.zero = get<std::uint8_t>(facts, "zero");
  w.values = array<std::uint8_t>(from, "values", kept, &sizes.values);
  w.masks = array<std::uint8_t>(from, "masks", kept, &sizes.masks);
  w.offsets = array<std::uint64_t>(from, "offsets", kept, &sizes.offsets);
  w.starts = array<std::uint32_t>(from, "starts", kept, &sizes.starts);
  w.scale_kind = scale_kind(facts);
  const auto numbers = [&](const char* name, std::uint64_t* count) -> const void* {
    if (w.scale_kind == tulle::ScaleKind::u8) return array<std::uint8_t>(from, name, kept, count);
    if (w.scale_kind == tulle::ScaleKind::f32) return array<float>(from, name, kept, count);
    return array<std::uint16_t>(from, name, kept, count);
  };
  w.scales = numbers("scales", &sizes.scales);
  w.minima = numbers("minima", &sizes.minima);
  w.zeros = array<std::uint8_t>(from, "zeros", kept, &sizes.zeros);
  w.row_scales = array<float>(from, "row_scales", kept, &sizes.row_scales);
  tulle::check(w, sizes);
  return w;
}

tulle::Selection selection(nb::handle from, std::size_t columns, Kept& kept) {
  tulle::Selection s;
  if (from.is_none()) return s;
  static const char* kinds[] = {"none", "top_k", "threshold", "relu"};
  s.kind = one_of<tulle::Selection::Kind>(kinds, "selection of inputs", get<std::string>(from, "kind"));
  s.keep = get<std::size_t>(from, "keep");
  s.block = get<std::size_t>(from, "block");
  s.unit = get<std::size_t>(from, "unit");
  s.norm = get<bool>(from, "norm");
  s.threshold = get<float>(from, "threshold");
  s.rescale = get<bool>(from, "rescale");
  s.score = array_of<float>(from, "score", columns, kept);
  return s;
}

tulle::Linear linear(nb::handle from, Kept& kept) {
  tulle::Linear l;
  l.weight = linear_view(from, kept);
  l.bias = array_of<float>(from, "bias", l.weight.rows, kept);
  l.input = grid(field(from, "input"));
  l.engine_grid = get<bool>(from, "engine_grid");
  l.selection = selection(field(from, "selection"), l.weight.columns, kept);
  return l;
}

// A transform, its numbers copied.
tulle::Transform transform(nb::handle from) {
  using Kind = tulle::Transform::Kind;
  tulle::Transform t;
  static const char* kinds[] = {"diagonal", "permutation", "hadamard", "block_matrix", "kronecker"};
  t.kind = one_of<Kind>(kinds, "transform", get<std::string>(from, "kind"));
  t.channels = size(from, "channels");
  t.block = get<std::size_t>(from, "block");
  t.base = get<std::size_t>(from, "base");
  t.shared = get<bool>(from, "shared");
  t.left = size(from, "left");
  t.right = size(from, "right");
  const auto copy = [&](const char* name, auto& to) {
    using T = typename std::decay_t<decltype(to)>::value_type;
    if (field(from, name).is_none()) return;
    const auto found = get<Vector<T>>(from, name);
    to.assign(found.data(), found.data() + found.shape(0));
  };
  copy("numbers", t.numbers);
  copy("index", t.index);
  tulle::check(t);
  return t;
}

tulle::Group group(nb::handle from, Kept& kept) {
  tulle::Group g;
  for (nb::handle t : get<nb::list>(from, "transforms")) g.transforms.push_back(transform(t));
  for (nb::handle l : get<nb::list>(from, "linears")) g.linears.push_back(linear(l, kept));
  return g;
}

// A table of `count` numbers in bf16 or f32 (Table), or a linear's codes (Linear).
tulle::Table table(nb::handle from, std::size_t count, Kept& kept) {
  tulle::Table t;
  if (nb::hasattr(from, "facts")) {
    t.codes = linear_view(from, kept);
    return t;
  }
  t.kind = weight_kind(from);
  if (t.kind == tulle::WeightKind::bf16) t.numbers = array_of<std::uint16_t>(from, "values", count, kept);
  else if (t.kind == tulle::WeightKind::f32) t.numbers = array_of<float>(from, "values", count, kept);
  else throw std::invalid_argument("kind of a table: expected bf16 or f32, or the codes of a linear");
  return t;
}

// A Norm of n channels, or None.
tulle::Norm norm(nb::handle from, std::size_t n, Kept& kept) {
  tulle::Norm found;
  if (from.is_none()) return found;
  found.gain = array_of<float>(from, "gain", n, kept);
  found.bias = array_of<float>(from, "bias", n, kept);
  found.eps = get<float>(from, "eps");
  found.centred = get<bool>(from, "centred");
  return found;
}

tulle::CausalConvolution convolution(nb::handle from, Kept& kept) {
  tulle::CausalConvolution found;
  found.channels = size(from, "channels");
  found.kernel = size(from, "kernel");
  found.taps = array_of<float>(from, "taps", found.kernel * found.channels, kept);
  found.bias = array_of<float>(from, "bias", found.channels, kept);
  found.silu = get<bool>(from, "silu");
  return found;
}

tulle::Mamba2 mamba(nb::handle from, Kept& kept) {
  tulle::Mamba2 found;
  found.heads = size(from, "heads");
  found.head_dim = size(from, "head_dim");
  found.groups = size(from, "groups");
  found.state = size(from, "state");
  found.convolution = convolution(field(from, "convolution"), kept);
  found.decay = array_of<float>(from, "decay", found.heads, kept);
  found.step_bias = array_of<float>(from, "step_bias", found.heads, kept);
  found.skip = array_of<float>(from, "skip", found.heads, kept);
  found.least = get<float>(from, "least");
  found.most = get<float>(from, "most");
  found.norm = norm(field(from, "norm"), found.width(), kept);
  return found;
}

tulle::DeltaNet delta_net(nb::handle from, Kept& kept) {
  tulle::DeltaNet net;
  net.key_heads = size(from, "key_heads");
  net.value_heads = size(from, "value_heads");
  net.key_dim = size(from, "key_dim");
  net.value_dim = size(from, "value_dim");
  net.convolution = convolution(field(from, "convolution"), kept);
  net.decay = array_of<float>(from, "decay", net.value_heads, kept);
  net.step_bias = array_of<float>(from, "step_bias", net.value_heads, kept);
  net.norm = norm(field(from, "norm"), net.value_dim, kept);
  return net;
}

tulle::LatentAttention latent_attention(nb::handle from, std::size_t heads, Kept& kept) {
  tulle::LatentAttention found;
  found.query_rank = size(from, "query_rank");
  found.rank = size(from, "rank");
  found.plain = size(from, "plain");
  found.rotary = size(from, "rotary");
  found.value = size(from, "value");
  found.query_norm = norm(field(from, "query_norm"), found.query_rank, kept);
  found.norm = norm(field(from, "norm"), found.rank, kept);
  const nb::object query_up = field(from, "query_up"), kv_up = field(from, "kv_up"), absorbed = field(from, "absorbed");
  if (!query_up.is_none()) found.query_up = group(query_up, kept);
  if (kv_up.is_none() == absorbed.is_none()) throw std::invalid_argument("latent attention: expected kv_up or absorbed");
  if (!kv_up.is_none()) {
    found.kv_up = group(kv_up, kept);
    return found;
  }
  for (nb::handle t : get<nb::list>(absorbed, "transforms")) found.transforms.push_back(transform(t));
  found.grid = grid(field(absorbed, "input"));
  found.selection = selection(field(absorbed, "selection"), found.rank, kept);
  found.keys = linear(field(absorbed, "keys"), kept);
  found.values = linear(field(absorbed, "values"), kept);
  found.parts = size(absorbed, "parts");
  if (found.parts > found.rank) throw std::invalid_argument("parts of a latent: expected at most its channels");
  found.factors = array_of<float>(absorbed, "factors", heads * found.parts * found.plain, kept);
  return found;
}

tulle::FeedForward feed_forward(nb::handle from, Kept& kept) {
  return {size(from, "intermediate"), group(field(from, "gate_up"), kept), group(field(from, "down"), kept)};
}

tulle::Mixture mixture(nb::handle from, std::size_t hidden, Kept& kept) {
  tulle::Mixture m;
  for (nb::handle e : get<nb::list>(from, "experts")) m.experts.push_back(feed_forward(e, kept));
  const nb::object shared = field(from, "shared"), router = field(from, "router");
  tulle::Router& r = m.router;
  r.correction = array_of<float>(router, "correction", m.experts.size(), kept);
  r.expert_scales = array_of<float>(router, "expert_scales", m.experts.size(), kept);
  r.norm = norm(field(router, "norm"), hidden, kept);
  m.expert_norm = norm(field(from, "expert_norm"), hidden, kept);
  m.shared_after = norm(field(from, "shared_after"), hidden, kept);
  m.experts_after = norm(field(from, "experts_after"), hidden, kept);
  r.group = group(field(router, "group"), kept);
  static const char* scores[] = {"softmax", "sigmoid"};
  r.score = one_of<tulle::Router::Score>(scores, "score of a router", get<std::string>(router, "score"));
  r.chosen = size(router, "chosen");
  r.normalise = get<bool>(router, "normalise");
  r.scale = get<float>(router, "scale");
  r.groups = size(router, "groups");
  r.chosen_groups = size(router, "chosen_groups");
  r.group_best = size(router, "group_best");
  m.shared = !shared.is_none();
  m.shared_gate = get<bool>(from, "shared_gate");
  if (m.experts.empty() || (m.shared_gate && !m.shared)) {
    throw std::invalid_argument("mixture: expected experts, and a shared one where it has a gate");
  }
  if (m.shared) m.experts.push_back(feed_forward(shared, kept));
  return m;
}

tulle::Layer layer(nb::handle from, const tulle::Model& m, Kept& kept) {
  tulle::Layer l;
  l.kv_heads = size(from, "kv_heads");
  l.head_dim = size(from, "head_dim");
  const std::size_t q = m.heads * l.head_dim, kv = l.kv_heads * l.head_dim;
  l.kv_from = get<int>(from, "kv_from");
  l.value_is_key = get<bool>(from, "value_is_key");
  l.output_scale = get<float>(from, "output_scale");
  l.input_norm = norm(field(from, "input_norm"), m.hidden, kept);
  l.post_norm = norm(field(from, "post_norm"), m.hidden, kept);
  l.attention_after = norm(field(from, "attention_after"), m.hidden, kept);
  l.feed_forward_after = norm(field(from, "feed_forward_after"), m.hidden, kept);
  l.query_norm = norm(field(from, "query_norm"), m.norm_all_heads ? q : l.head_dim, kept);
  l.key_norm = norm(field(from, "key_norm"), m.norm_all_heads ? kv : l.head_dim, kept);
  l.value_norm = norm(field(from, "value_norm"), l.head_dim, kept);
  l.output_norm = norm(field(from, "output_norm"), q, kept);
  l.sinks = array_of<float>(from, "sinks", m.heads, kept);
  const nb::object recurrent = field(from, "recurrent");
  if (!recurrent.is_none()) {
    static const char* kinds[] = {"attention", "delta_net", "short_convolution", "mamba2", "none"};
    l.mixer = one_of<tulle::Mixer>(kinds, "kind of a mixer", get<std::string>(recurrent, "kind"));
    if (l.mixer == tulle::Mixer::delta_net) l.delta = delta_net(recurrent, kept);
    if (l.mixer == tulle::Mixer::mamba2) l.mamba = mamba(recurrent, kept);
    if (l.mixer == tulle::Mixer::short_convolution) {
      l.short_convolution.convolution = convolution(field(recurrent, "convolution"), kept);
    }
  }
  const nb::object latent = field(from, "latent");
  if (!latent.is_none()) {
    if (!recurrent.is_none()) throw std::invalid_argument("layer: expected latent attention or another mixer");
    l.mixer = tulle::Mixer::latent;
    l.latent = latent_attention(latent, m.heads, kept);
  }
  l.window = get<std::size_t>(from, "window");
  l.rotary = get<int>(from, "rotary");
  const auto numbers = get<std::vector<float>>(from, "activation");
  if (numbers.size() > 4) throw std::invalid_argument("numbers of an activation: expected at most 4");
  std::copy(numbers.begin(), numbers.end(), l.activation);
  if (l.mixer != tulle::Mixer::none) {
    l.qkv = group(field(from, "qkv"), kept);
    l.o = group(field(from, "o"), kept);
  }
  const nb::object input_gate = field(from, "input_gate");
  if (!input_gate.is_none()) {
    l.input_gate = {group(field(input_gate, "gate"), kept), group(field(input_gate, "down"), kept),
                    norm(field(input_gate, "norm"), m.hidden, kept)};
  }
  const nb::object experts = field(from, "mixture"), dense = field(from, "feed_forward");
  const bool mixed = l.mixer != tulle::Mixer::none;
  if (!experts.is_none() && !dense.is_none()) throw std::invalid_argument("layer: expected a feed_forward or a mixture");
  if (!mixed && experts.is_none() && dense.is_none()) throw std::invalid_argument("layer: expected a part, found none");
  if (!experts.is_none()) l.mixture = mixture(experts, m.hidden, kept);
  else if (!dense.is_none()) l.feed_forward = feed_forward(dense, kept);
  l.inner_norm = norm(field(from, "inner_norm"), l.feed_forward.intermediate, kept);
  return l;
}

tulle::Model model(nb::handle from, Kept& kept) {
  tulle::Model m;
  m.hidden = size(from, "hidden");
  m.heads = size(from, "heads");
  m.kv_heads = size(from, "kv_heads");
  m.head_dim = size(from, "head_dim");
  m.value_dim = size(from, "value_dim");
  m.vocabulary = size(from, "vocabulary");
  static const char* gates[] = {"silu", "relu", "relu2", "gelu_tanh", "xielu", "quick_gelu"};
  m.gate = one_of<tulle::Gate>(gates, "gate", get<std::string>(from, "gate"));
  m.gated = get<bool>(from, "gated");
  m.gate_limit = get<float>(from, "gate_limit");
  m.up_offset = get<float>(from, "up_offset");
  m.parallel = get<bool>(from, "parallel");
  m.residual_scale = get<float>(from, "residual_scale");
  m.embedding_scale = get<float>(from, "embedding_scale");
  m.logit_scale = get<float>(from, "logit_scale");
  m.logit_cap = get<float>(from, "logit_cap");
  m.attention_scale = get<float>(from, "attention_scale");
  m.attention_cap = get<float>(from, "attention_cap");
  m.output_gate = get<bool>(from, "output_gate");
  m.norm_all_heads = get<bool>(from, "norm_all_heads");
  m.norm_after_rotary = get<bool>(from, "norm_after_rotary");
  m.position_beta = get<float>(from, "position_beta");
  m.position_length = get<std::int32_t>(from, "position_length");
  for (nb::handle t : get<nb::list>(from, "rotary")) {
    m.rotary.push_back({get<std::vector<float>>(t, "frequencies"), get<float>(t, "scale"), get<bool>(t, "interleaved")});
  }
  m.query = grid(field(from, "query"));
  m.key = grid(field(from, "key"));
  m.value = grid(field(from, "value"));
  for (nb::handle t : get<nb::list>(from, "head_rotations")) m.head_rotations.push_back(transform(t));
  const std::size_t elements = m.vocabulary * m.hidden;
  m.embedding = table(field(from, "embedding"), elements, kept);
  const nb::object exact = field(from, "exact_head");
  if (!exact.is_none()) m.exact_head = table(exact, elements, kept);
  m.norm = norm(field(from, "norm"), m.hidden, kept);
  m.head = group(field(from, "head"), kept);
  const nb::list layers = get<nb::list>(from, "layers");
  const nb::object inputs = field(from, "layer_inputs");
  if (!inputs.is_none()) {
    m.layer_inputs.width = size(inputs, "width");
    m.layer_inputs.projection = group(field(inputs, "projection"), kept);
    m.layer_inputs.norm = norm(field(inputs, "norm"), m.layer_inputs.width, kept);
    m.layer_inputs.table = table(field(inputs, "table"), m.vocabulary * nb::len(layers) * m.layer_inputs.width, kept);
  }
  for (nb::handle l : layers) m.layers.push_back(layer(l, m, kept));
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
