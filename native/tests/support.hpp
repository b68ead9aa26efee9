// What the native tests share.
#pragma once

#include <algorithm>
#include <cstdio>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "tulle/check.hpp"

inline int failures = 0;

// Heap memory of exactly its size, so that a sanitizer sees what reads beyond.
template <typename T>
std::unique_ptr<T[]> exact(const std::vector<T>& from) {
  std::unique_ptr<T[]> copy(new T[from.size()]);
  std::copy(from.begin(), from.end(), copy.get());
  return copy;
}

// check() must refuse the weights once they are changed, in a line that holds `line`.
template <class Weights, typename Change>
void refused_of(Weights weights, const char* what, Change change, const char* line = "") {
  change(weights);
  try {
    tulle::check(weights.view, weights.sizes);
  } catch (const std::invalid_argument& error) {
    if (std::string(error.what()).find(line) != std::string::npos) return;
    std::printf("FAILED check() on %s says: %s\n", what, error.what());
    ++failures;
    return;
  }
  std::printf("FAILED check() let through: %s\n", what);
  ++failures;
}
