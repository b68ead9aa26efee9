// Entries of a dictionary as the engines take them, checked.
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

inline nb::object item(const nb::dict& from, const char* key) {
  if (!from.contains(key)) throw std::invalid_argument(std::string("expected ") + key + ", found none");
  return from[key];
}

template <typename T>
T get(const nb::dict& from, const char* key) {
  try {
    return nb::cast<T>(item(from, key));
  } catch (const nb::cast_error&) {
    throw std::invalid_argument(std::string(key) + ": expected another type or dtype");
  }
}

// Null where the entry is None.
template <typename T>
const T* array(const nb::dict& from, const char* key, Kept& kept, std::uint64_t* count = nullptr) {
  if (count != nullptr) *count = 0;
  nb::object object = item(from, key);
  if (object.is_none()) return nullptr;
  auto found = get<Vector<T>>(from, key);
  if (count != nullptr) *count = found.shape(0);
  kept.push_back(object);
  return found.data();
}

// As `array`, of so many elements.
template <typename T>
const T* array_of(const nb::dict& from, const char* key, std::size_t expected, Kept& kept) {
  std::uint64_t count = 0;
  const T* data = array<T>(from, key, kept, &count);
  if (data != nullptr && count != expected) {
    throw std::invalid_argument(std::string(key) + ": expected " + std::to_string(expected) + " elements, found " +
                                std::to_string(count));
  }
  return data;
}

inline tulle::WeightKind weight_kind(const std::string& name) {
  if (name == "codes2") return tulle::WeightKind::codes2;
  if (name == "codes4") return tulle::WeightKind::codes4;
  if (name == "codes8") return tulle::WeightKind::codes8;
  if (name == "bf16") return tulle::WeightKind::bf16;
  if (name == "f32") return tulle::WeightKind::f32;
  throw std::invalid_argument("kind: expected codes2, codes4, codes8, bf16 or f32, found '" + name + "'");
}

inline tulle::CacheKind cache_kind(const std::string& name) {
  if (name == "f32") return tulle::CacheKind::f32;
  if (name == "bf16") return tulle::CacheKind::bf16;
  if (name == "int8") return tulle::CacheKind::u8;
  throw std::invalid_argument("cache: expected f32, bf16 or int8, found '" + name + "'");
}

}  // namespace arrays
