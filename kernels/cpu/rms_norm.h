// RMSNorm on the CPU (norm.h): no mean, rstd = 1 / sqrt(mean(x * x) + eps) of each row.
//
// Policy: the mean of the squares is a sum in double, in the backward too, where no float32 leaves its range; that of
// float64 is taken over the row scaled to 1, good for |x| up to 1e300.
#pragma once

#include "norm.h"

namespace transfuse::cpu {

TRANSFUSE_DECLARE_KERNELS(NormKernels, rms_norm_kernels)

}  // namespace transfuse::cpu
