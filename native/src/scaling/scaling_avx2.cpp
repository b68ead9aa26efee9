// The Scaling Transformer's kernels (see scaling_vector.inl) with 8 floats in a register.
#include <immintrin.h>

#include <cstring>

#include "cpu/tables.hpp"

namespace tulle {
namespace {

#include "scaling/scaling_vector.inl"

}  // namespace

const ScalingKernels avx2_scaling = scaling::kernels;

}  // namespace tulle
