// Memory of the engines, and their checks of sizes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

namespace tulle {

constexpr std::size_t kAlignment = 64;

inline std::size_t round_up(std::size_t n, std::size_t step) { return (n + step - 1) / step * step; }

// Zeroed, aligned, and only as resident as it is used.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::size_t count) : bytes_(round_up(count * sizeof(T) + 1, kAlignment)) {
    raw_ = static_cast<std::uint8_t*>(std::calloc(bytes_ + kAlignment, 1));
    if (raw_ == nullptr) throw std::bad_alloc();
    const auto address = reinterpret_cast<std::uintptr_t>(raw_);
    data_ = reinterpret_cast<T*>(round_up(address, kAlignment));
  }
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Buffer() { std::free(raw_); }
  T* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }

 private:
  void swap(Buffer& other) {
    std::swap(raw_, other.raw_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }
  std::uint8_t* raw_ = nullptr;
  T* data_ = nullptr;
  std::size_t bytes_ = 0;
};

inline void require(bool ok, const char* what, std::size_t expected, std::size_t found) {
  if (ok) return;
  throw std::invalid_argument(std::string(what) + ": expected " + std::to_string(expected) + ", found " +
                              std::to_string(found));
}

inline void require_equal(const char* what, std::size_t expected, std::size_t found) {
  require(expected == found, what, expected, found);
}

}  // namespace tulle
