#include <immintrin.h>

#include <cstring>

#include "tables.hpp"

namespace tulle {
namespace {

#include "scaling_vector.inl"

}  // namespace

const ScalingKernels avx512_scaling = scaling::kernels;

}  // namespace tulle
