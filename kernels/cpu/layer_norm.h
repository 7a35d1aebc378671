// LayerNorm on the CPU (norm.h): mean and rstd = 1 / sqrt(variance + eps) of each row.
//
// Policy: statistics are sums in double, in the backward too, so that a row keeps its precision for mean/std up to 1e6
// and |x| up to 1e37; those of float64 are sums of two doubles over the row scaled to 1, good for |x| up to 1e300.
#pragma once

#include "norm.h"

namespace transfuse::cpu {

TRANSFUSE_DECLARE_KERNELS(NormKernels, layer_norm_kernels)

}  // namespace transfuse::cpu
