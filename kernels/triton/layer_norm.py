"""LayerNorm in Triton: the raw ops of ops/layer_norm.py. The arithmetic is norm.py."""

from .norm import norm_backward, norm_forward


def layer_norm_forward(input, weight, bias, normalized_ndim, eps):
    return norm_forward(input, None, weight, bias, normalized_ndim, eps, centered=True)[0]


def add_layer_norm_forward(input, residual, weight, bias, normalized_ndim, eps):
    return norm_forward(input, residual, weight, bias, normalized_ndim, eps, centered=True)


def layer_norm_backward(
    grad_output, grad_sum, input, weight, bias, normalized_ndim, eps, need_input, need_weight, need_bias
):
    return norm_backward(
        grad_output, grad_sum, input, weight, bias, normalized_ndim, eps, need_input, need_weight, need_bias,
        centered=True,
    )  # fmt: skip
