#pragma once

#include <nanobind/nanobind.h>

// Clip search, sweep and coordinate descent.
void define_search(nanobind::module_& m);
