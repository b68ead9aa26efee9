// The kernel tables, one per file of this folder.
//
// A kernel file other than scalar.cpp is compiled for instructions that the CPU may lack, so it must not
// instantiate anything with external linkage (standard templates, inline functions of shared headers): the
// linker keeps one copy of those and could keep this one for the whole library.
#pragma once

#include "tulle/linear.hpp"
#include "tulle/ops.hpp"
#include "tulle/packing.hpp"
#include "tulle/permutation.hpp"
#include "tulle/scaling.hpp"
#include "tulle/sparse_train.hpp"

namespace tulle {

extern const PackingKernels scalar_packing;
extern const PackingKernels avx2_packing;
extern const PackingKernels avx512_packing;

extern const PermutationKernels scalar_permutation;
extern const PermutationKernels avx2_permutation;
extern const PermutationKernels avx512_permutation;

extern const LinearKernels scalar_linear;
extern const LinearKernels avx2_linear;
extern const LinearKernels avx512_linear;

// Input-major weights; part of the tables above.
using RunInputMajor = void(const LinearView& w, const Inputs& x, std::size_t panel, std::size_t first, std::size_t last,
                        float* sums, std::size_t stride, std::uint8_t* scratch);
RunInputMajor scalar_run_input_major, avx2_run_input_major, avx512_run_input_major;

extern const OpsKernels scalar_ops;
extern const OpsKernels avx2_ops;
extern const OpsKernels avx512_ops;
extern const FlashKernel avx512bf16_flash;

extern const ScalingKernels scalar_scaling;
extern const ScalingKernels avx2_scaling;
extern const ScalingKernels avx512_scaling;

extern const SparseTrainKernels scalar_sparse_train;
extern const SparseTrainKernels avx2_sparse_train;
extern const SparseTrainKernels avx512_sparse_train;

}  // namespace tulle
