#pragma once

#include <nanobind/nanobind.h>

// The class ScalingEngine.
void define_scaling(nanobind::module_& m);
