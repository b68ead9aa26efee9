#pragma once

#include <nanobind/nanobind.h>

// The class Engine.
void define_engine(nanobind::module_& m);
