#pragma once

#include <nanobind/nanobind.h>

// Attention over whole sequences.
void define_attention(nanobind::module_& m);
