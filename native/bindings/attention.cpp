// Python's view of attention over whole sequences: checks every shape, releases the GIL, forwards.
#include "attention.hpp"

#include <nanobind/ndarray.h>

#include <stdexcept>
#include <string>

#include "tulle/dispatch.hpp"
#include "tulle/flash_attention.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

// Bits of bfloat16, [batch, heads, tokens, head_dim].
template <typename T>
using Heads = nb::ndarray<T, nb::ndim<4>, nb::device::cpu>;

bool has_flash_attention() { return tulle::active_isa().ops->flash != nullptr; }

template <typename To, typename T>
tulle::Sequences<To> sequences(const char* name, const Heads<T>& from, std::size_t batch, std::size_t heads,
                               std::size_t tokens, std::size_t head_dim) {
  const std::size_t expected[] = {batch, heads, tokens, head_dim};
  for (std::size_t i = 0; i < 4; ++i) {
    if (from.shape(i) != expected[i] || from.stride(i) < 0 || (i == 3 && from.stride(i) != 1)) {
      throw std::invalid_argument(std::string(name) + ": expected [batch, heads, tokens, head_dim] as q and k have " +
                                  "them, channels side by side");
    }
  }
  return {reinterpret_cast<To*>(from.data()), static_cast<std::size_t>(from.stride(0)),
          static_cast<std::size_t>(from.stride(1)), static_cast<std::size_t>(from.stride(2))};
}

void flash_attention(Heads<const std::int16_t> q, Heads<const std::int16_t> k, Heads<const std::int16_t> v,
                     Heads<std::int16_t> out, std::size_t window, float scale, std::size_t threads) {
  const std::size_t batch = q.shape(0), heads = q.shape(1), tokens = q.shape(2), d = q.shape(3), kv = k.shape(1);
  if (!has_flash_attention()) throw std::invalid_argument("expected a CPU with AVX-512 BF16");
  if (kv == 0 || heads % kv != 0 || d == 0 || d % 16 != 0 || d > tulle::kFlashChannels || window == 0 ||
      tokens > (std::size_t{1} << 30) || threads < 1 || threads > 1024) {
    throw std::invalid_argument("expected heads in groups of KV heads, head_dim a multiple of 16 up to 256, a window "
                                "and 1 to 1024 threads");
  }
  const tulle::FlashAttention attention = {
      batch, heads, kv, tokens, d, window < tokens ? window : tokens, scale,
      sequences<const std::uint16_t>("q", q, batch, heads, tokens, d),
      sequences<const std::uint16_t>("k", k, batch, kv, tokens, d),
      sequences<const std::uint16_t>("v", v, batch, kv, tokens, d),
      sequences<std::uint16_t>("out", out, batch, heads, tokens, d)};
  nb::gil_scoped_release release;
  tulle::flash_attention(tulle::active_isa().ops->flash, attention, threads);
}

}  // namespace

void define_attention(nb::module_& m) {
  m.def("has_flash_attention", &has_flash_attention);
  m.def("flash_attention", &flash_attention, "q"_a.noconvert(), "k"_a.noconvert(), "v"_a.noconvert(),
        "out"_a.noconvert(), "window"_a, "scale"_a, "threads"_a);
}
