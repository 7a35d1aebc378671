// RMSNorm on the CPU (norm.h): no mean, rstd = 1 / sqrt(mean(x * x) + eps) of each row.
//
// Policy: the mean of the squares is a sum in double, in the backward too; no float32 leaves its range there.
#pragma once

#include "norm.h"

namespace transfuse::cpu {

TRANSFUSE_DECLARE_KERNELS(NormKernels, rms_norm_kernels)

}  // namespace transfuse::cpu
