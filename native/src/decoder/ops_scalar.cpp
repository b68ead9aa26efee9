// The decoder's vector loops (see ops.inl) for the baseline of the architecture.
#include <cstring>

#include "cpu/tables.hpp"

namespace tulle {
namespace {

#include "decoder/ops.inl"

}  // namespace

const OpsKernels scalar_ops = ops::kernels;

}  // namespace tulle
