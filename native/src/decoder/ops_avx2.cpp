#include <cstring>

#include "cpu/tables.hpp"

namespace tulle {
namespace {

#include "decoder/ops.inl"

}  // namespace

const OpsKernels avx2_ops = ops::kernels;

}  // namespace tulle
