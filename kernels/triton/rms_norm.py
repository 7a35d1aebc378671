"""RMSNorm in Triton: the raw ops of ops/rms_norm.py. The arithmetic is norm.py, with neither mean nor bias."""

from .norm import norm_backward, norm_forward


def rms_norm_forward(input, weight, normalized_ndim, eps):
    return norm_forward(input, None, weight, None, normalized_ndim, eps, centered=False)[0]


def add_rms_norm_forward(input, residual, weight, normalized_ndim, eps):
    return norm_forward(input, residual, weight, None, normalized_ndim, eps, centered=False)


def rms_norm_backward(grad_output, grad_sum, input, weight, normalized_ndim, eps, need_input, need_weight):
    return norm_backward(
        grad_output, grad_sum, input, weight, None, normalized_ndim, eps, need_input, need_weight, False, centered=False
    )[:2]
