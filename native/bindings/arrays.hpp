// Fields of a Python dataclass (tulle.engine.native_model) as the engines take them, checked.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "tulle/linear.hpp"
#include "tulle/ops.hpp"

namespace arrays {

namespace nb = nanobind;

template <typename T>
using Vector = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// Arrays that the engine reads from.
using Kept = std::vector<nb::object>;

constexpr std::size_t kLargest = std::size_t{1} << 24;  // of a size, so that products of two stay whole numbers

inline nb::object field(nb::handle from, const char* name) {
  if (!nb::hasattr(from, name)) throw std::invalid_argument(std::string("expected ") + name + ", found none");
  return nb::getattr(from, name);
}

template <typename T>
T get(nb::handle from, const char* name) {
  try {
    return nb::cast<T>(field(from, name));
  } catch (const nb::cast_error&) {
    throw std::invalid_argument(std::string(name) + ": expected another type or dtype");
  }
}

// At most 2^24.
inline std::size_t size(nb::handle from, const char* name) {
  const auto found = get<std::size_t>(from, name);
  if (found > kLargest) throw std::invalid_argument(std::string(name) + ": expected at most 2^24, found more");
  return found;
}

// Null where the field is None.
template <typename T>
const T* array(nb::handle from, const char* name, Kept& kept, std::uint64_t* count = nullptr) {
  if (count != nullptr) *count = 0;
  nb::object object = field(from, name);
  if (object.is_none()) return nullptr;
  auto found = get<Vector<T>>(from, name);
  if (count != nullptr) *count = found.shape(0);
  kept.push_back(object);
  return found.data();
}

// As `array`, of so many elements.
template <typename T>
const T* array_of(nb::handle from, const char* name, std::size_t expected, Kept& kept) {
  std::uint64_t count = 0;
  const T* data = array<T>(from, name, kept, &count);
  if (data != nullptr && count != expected) {
    throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(expected) + " elements, found " +
                                std::to_string(count));
  }
  return data;
}

// One of `names`, whose order is that of the enum.
template <typename Enum, std::size_t kCount>
Enum one_of(const char* (&names)[kCount], const char* what, const std::string& found) {
  std::string all;
  for (std::size_t i = 0; i < kCount; ++i) {
    if (found == names[i]) return static_cast<Enum>(i);
    all += (i == 0 ? "" : i + 1 == kCount ? " or " : ", ") + std::string(names[i]);
  }
  throw std::invalid_argument(std::string(what) + ": expected " + all + ", found '" + found + "'");
}

inline tulle::WeightKind weight_kind(nb::handle from) {
  static const char* names[] = {"codes2", "codes3", "codes4", "codes5", "codes6", "codes8", "bf16", "f32"};
  return one_of<tulle::WeightKind>(names, "kind", get<std::string>(from, "kind"));
}

inline tulle::Layout layout(nb::handle from) {
  static const char* names[] = {"tiles",       "sparse_tiles",       "input_major", "sparse_input_major",
                                "input_major_blocks4", "sparse_input_major_blocks4"};
  return one_of<tulle::Layout>(names, "layout", get<std::string>(from, "layout"));
}

inline tulle::ScaleKind scale_kind(nb::handle from) {
  static const char* names[] = {"bf16", "f16", "f32", "u8"};
  return one_of<tulle::ScaleKind>(names, "scale_kind", get<std::string>(from, "scale_kind"));
}

inline tulle::CacheKind cache_kind(const std::string& name) {
  static const char* names[] = {"f32", "bf16", "int8", "int4"};
  return one_of<tulle::CacheKind>(names, "cache", name);
}

}  // namespace arrays
