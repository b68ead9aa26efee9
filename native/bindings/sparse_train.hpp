#pragma once

#include <nanobind/nanobind.h>

// The class SparsePattern.
void define_sparse_train(nanobind::module_& m);
