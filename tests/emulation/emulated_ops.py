"""The raw ops of transfuse on the emulated CUDA kernels: what csrc/cuda_<op>.cpp does on a GPU, here in Python.

    with EmulatedKernels(seed=1):
        transfuse.layer_norm(x, (768,), weight, bias)      # runs kernels/cuda/layer_norm.cu on the CPU

Tensors stay on the CPU, so the whole of transfuse's checks and promises runs on the CUDA kernels unchanged: under
this mode a raw op that has an emulated kernel goes there, every other op runs as it always does.
"""

import ctypes
from functools import lru_cache

import emulator
import torch
from torch.utils._python_dispatch import TorchDispatchMode

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # kernels/dtype.h
NOTHING = ctypes.c_void_p(None)


def i64(value):
    return ctypes.c_int64(value)


class EmulatedKernels(TorchDispatchMode):
    """Sends raw ops to emulated kernels.

    Args:
        seed: of the order of blocks and threads; 0 is the ascending one.
        libraries: name -> emulator.Library, in place of those built from kernels/cuda; mutants use it.
    """

    def __init__(self, seed=0, libraries=None):
        super().__init__()
        self.seed, self.libraries, self.calls = seed, libraries or {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        run = RAW_OPS.get(name.removeprefix("transfuse::")) if name.startswith("transfuse::") else None
        if run is None:
            return function(*args, **(kwargs or {}))
        self.calls += 1
        with emulator.Memory() as memory:
            return run(self, memory, *args)

    def library(self, name):
        return self.libraries.get(name) or library(name)

    def run(self, name, function, *arguments):
        self.library(name).run(function, *(NOTHING if a is None else a for a in arguments), seed=self.seed)


SOURCES = {"norms": ("kernels/cuda/layer_norm.cu", "kernels/cuda/rms_norm.cu", "tests/emulation/launchers/norms.cpp")}


@lru_cache(maxsize=None)
def library(name):
    return emulator.library(name, SOURCES[name])


def rows_of(memory, name, tensor, ndim, cols):
    """The operand as rows of its last ndim dimensions, with one stride; a copy of what has none. (tensor, stride)."""
    if tensor is None:
        return None, i64(0)
    shape = tensor.shape[: tensor.dim() - ndim]
    try:
        rows = tensor.view(*shape, cols)
        leading = [(size, stride) for size, stride in zip(shape, rows.stride(), strict=False) if size != 1]
        one_stride = all(outer == size * stride for (_, outer), (size, stride) in zip(leading, leading[1:], strict=False))
        if cols > 1 and rows.stride(-1) != 1 or not one_stride:
            raise RuntimeError
        stride = leading[-1][1] if leading else cols
    except RuntimeError:
        tensor, stride = tensor.contiguous(), cols
    if tensor.is_contiguous():
        stride = cols
    return memory.place(name, tensor, "read-only"), i64(stride)


def dense(tensor):
    return None if tensor is None else tensor.contiguous()


def norm_sizes(input, ndim, *parameters):
    cols = input.shape[input.dim() - ndim :].numel()
    parameter = next((p for p in parameters if p is not None), None)
    dtype = torch.float32 if parameter is None else parameter.dtype
    return input.numel() // cols if cols else 0, cols, dtype


def norm_forward(mode, memory, centered, input, residual, weight, bias, ndim, eps):
    rows, cols, parameter_dtype = norm_sizes(input, ndim, weight, bias)
    x, x_stride = rows_of(memory, "input", input, ndim, cols)
    other, other_stride = rows_of(memory, "residual", residual, ndim, cols)
    output = memory.place("output", torch.empty(input.shape, dtype=input.dtype), "uninitialised")
    total = None if residual is None else memory.place("sum", torch.empty(input.shape, dtype=input.dtype), "uninitialised")
    mode.run(
        "norms", "norm_forward", ctypes.c_bool(centered), DTYPES[input.dtype], x, x_stride, other, other_stride,
        memory.place("weight", dense(weight), "read-only"), memory.place("bias", dense(bias), "read-only"), total, output,
        i64(rows), i64(cols), ctypes.c_double(eps), ctypes.c_bool(parameter_dtype == torch.float32),
    )  # fmt: skip
    return output.clone(), None if total is None else total.clone()


def norm_backward(mode, memory, centered, grad_output, grad_sum, input, weight, bias, ndim, eps, needs):
    rows, cols, parameter_dtype = norm_sizes(input, ndim, weight, bias)
    functions = mode.library("norms").loaded
    functions.norm_chunks.restype = functions.norm_row_values.restype = ctypes.c_int64
    functions.norm_gradient_is_wide.restype = ctypes.c_bool
    chunks, wide = functions.norm_chunks(i64(rows)), functions.norm_gradient_is_wide(i64(cols))
    shape = input.shape[input.dim() - ndim :]

    def result(name, needed, sizes, dtype):
        return memory.place(name, torch.empty(sizes if needed else (0,), dtype=dtype), "uninitialised")

    def lines(name, needed):
        return result(name, True, (chunks, cols), torch.float32) if needed else None

    x, x_stride = rows_of(memory, "input", input, ndim, cols)
    grad, grad_stride = rows_of(memory, "grad_output", grad_output, ndim, cols)
    past, past_stride = rows_of(memory, "grad_sum", grad_sum, ndim, cols)
    row_values = result("row_values", wide, (rows, functions.norm_row_values()), torch.float32)
    need_input, need_weight, need_bias = needs
    grad_input = result("grad_input", need_input, input.shape, input.dtype)
    grad_weight, grad_bias = (result(n, need, shape, parameter_dtype) for n, need in (("grad_weight", need_weight), ("grad_bias", need_bias)))
    mode.run(
        "norms", "norm_backward", ctypes.c_bool(centered), DTYPES[input.dtype], grad, grad_stride, past, past_stride, x, x_stride,
        memory.place("weight", dense(weight), "read-only"), grad_input if need_input else None,
        lines("weight_lines", need_weight), lines("bias_lines", need_bias), row_values, grad_weight, grad_bias,
        i64(rows), i64(cols), i64(chunks), ctypes.c_double(eps), ctypes.c_bool(parameter_dtype == torch.float32),
    )  # fmt: skip
    return grad_input.clone(), grad_weight.clone(), grad_bias.clone()


def layer_norm_forward(mode, memory, input, weight, bias, ndim, eps):
    return norm_forward(mode, memory, True, input, None, weight, bias, ndim, eps)[0]


def add_layer_norm_forward(mode, memory, input, residual, weight, bias, ndim, eps):
    return norm_forward(mode, memory, True, input, residual, weight, bias, ndim, eps)


def layer_norm_backward(mode, memory, grad_output, grad_sum, input, weight, bias, ndim, eps, *needs):
    return norm_backward(mode, memory, True, grad_output, grad_sum, input, weight, bias, ndim, eps, needs)


def rms_norm_forward(mode, memory, input, weight, ndim, eps):
    return norm_forward(mode, memory, False, input, None, weight, None, ndim, eps)[0]


def add_rms_norm_forward(mode, memory, input, residual, weight, ndim, eps):
    return norm_forward(mode, memory, False, input, residual, weight, None, ndim, eps)


def rms_norm_backward(mode, memory, grad_output, grad_sum, input, weight, ndim, eps, *needs):
    return norm_backward(mode, memory, False, grad_output, grad_sum, input, weight, None, ndim, eps, (*needs, False))[:2]


RAW_OPS = {
    function.__name__: function
    for function in (layer_norm_forward, add_layer_norm_forward, layer_norm_backward,
                     rms_norm_forward, add_rms_norm_forward, rms_norm_backward)
}  # fmt: skip
