"""What attention and varlen_attention share: what they refuse, in which words, their options, and their gradients.

Each message names op, argument, what came and what was expected.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from transfuse import dispatch, env, extension
from transfuse.autograd import first_derivative
from transfuse.checks import check_dropout, check_tensor, is_dense
from transfuse.dispatch import dtype_name

MAX_HEAD_DIM = 512
NO_FEATURES: dict = {}  # shared by every call without such options; never written
_INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
_FLOAT32_MAX = torch.finfo(torch.float32).max
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast, what torch casts for its sdpa: float tensors to the autocast dtype. float64 stays."""
    if not isinstance(query, Tensor) or query.is_meta or not torch.is_autocast_enabled(query.device.type):
        return query, key, value
    dtype = torch.get_autocast_dtype(query.device.type)
    cast = []
    for tensor in (query, key, value):
        casts = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
        cast.append(tensor.to(dtype) if casts else tensor)
    return tuple(cast)


def autocast_additive(query: Tensor, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast, masks and biases in a dtype that is neither query's nor float32, in query's (already cast)."""
    if not isinstance(query, Tensor) or query.is_meta or not torch.is_autocast_enabled(query.device.type):
        return tensors
    kept = (torch.bool, torch.float32, query.dtype)
    return tuple(
        t.to(query.dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype not in kept else t
        for t in tensors
    )


CUDA_FLOAT32_HEAD_DIM = 256  # the widest of the float32 kernel; of the others the build says it
CUDA_DECODE_HEAD_DIM = 256  # of every dtype


def cuda_reasons(problem, head_dims: tuple[tuple[str, int], ...], widest: int | None = None) -> tuple[str, ...]:
    """Why the CUDA kernels cannot run a problem of attention; head_dims: (name, size). widest: where it is always one."""
    reasons = dispatch.cuda_reasons(problem)
    if widest is None:
        widest = CUDA_FLOAT32_HEAD_DIM if problem.dtype == torch.float32 else extension.cuda_attention_head_dim
    for name, size in head_dims:
        if size > widest and not extension.cuda_unavailable:
            reasons += (f"{name} is {size}, the kernel takes up to {widest}",)
    return reasons


def choice_key(query: Tensor, value: Tensor, features: dict) -> tuple:
    """What the choice of an implementation depends on: one table serves all sizes that are treated alike."""
    widest = max(query.shape[-1], value.shape[-1])
    if query.device.type == "cpu":
        return "cpu", query.dtype, widest > MAX_HEAD_DIM, *features
    sizes = (extension.cuda_attention_head_dim, CUDA_FLOAT32_HEAD_DIM, MAX_HEAD_DIM)
    return str(query.device), query.dtype, *(widest > size for size in sizes), *features


def features_in_use(
    op: str,
    query: Tensor,
    batch: int,
    heads: int,
    dropout_p: float,
    window: tuple | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
) -> dict:
    """Option name -> checked value, of those in use."""
    features = {}
    if check_dropout(op, dropout_p) > 0:
        features["dropout_p"] = float(dropout_p)
    if window is not None:
        features["window"] = check_window(op, window)
    if softcap is not None:
        features["softcap"] = check_softcap(op, softcap)
    if alibi_slopes is not None:
        check_per_head(op, "alibi_slopes", alibi_slopes, query, ((heads,), (batch, heads)))
        features["alibi_slopes"] = alibi_slopes
    if sinks is not None:
        check_per_head(op, "sinks", sinks, query, ((heads,),))
        features["sinks"] = sinks
    return features


def reference_options(features: dict, device: torch.device) -> dict:
    """The same as keyword arguments of the reference, with a seed for dropout_p: drawn when it runs, not by explain()."""
    options = dict(features)
    if "dropout_p" in options:
        options["dropout_seed"] = dropout_seed(device)
    return options


# alibi_slopes, sinks, dropout_seed, window_left, window_right, softcap, dropout_p
_NO_KERNEL_OPTIONS = (None, None, None, -1, -1, 0.0, 0.0)


def kernel_options(features: dict, device: torch.device) -> tuple:
    """The same as the raw ops take it, in the order of _NO_KERNEL_OPTIONS."""
    if not features:
        return _NO_KERNEL_OPTIONS
    left, right = (-1 if side is None else side for side in features.get("window", (None, None)))
    softcap, dropout_p = features.get("softcap", 0.0), features.get("dropout_p", 0.0)
    seed = dropout_seed(device) if dropout_p else None
    return features.get("alibi_slopes"), features.get("sinks"), seed, left, right, softcap, dropout_p


# The same numbers, and what a backward takes beside them, as csrc/attention.cpp declares them.
SCHEMA_OPTIONS = (
    "float scale, bool causal, bool bottom_right, int window_left, int window_right, float softcap, float dropout_p"
)
SCHEMA_NEEDS = "int[] bias_shape, bool need_bias_grad, bool need_alibi_grad, bool need_sinks_grad"


def head_dim_reasons(head_dim: int, value_head_dim: int) -> tuple[str, ...]:
    """Why no kernel takes heads of these sizes."""
    sizes = (("head_dim", head_dim), ("value's head_dim", value_head_dim))
    wide = ((name, size) for name, size in sizes if size > MAX_HEAD_DIM)
    return tuple(f"{name} is {size}, the kernel takes up to {MAX_HEAD_DIM}" for name, size in wide)


NUM_TENSORS = 9  # of both Functions: query, key, value, three of the layout and masks, alibi_slopes, sinks, dropout_seed


def save_for_backward(ctx, inputs: tuple, output: tuple) -> None:
    """A Function's tensors and results; its numbers as ctx.options."""
    ctx.options = inputs[NUM_TENSORS:]
    ctx.save_for_backward(*inputs[:NUM_TENSORS], *output)
    ctx.set_materialize_grads(False)


def input_gradients(ctx, op: str, backward: Callable, extras: tuple[int, ...], grad_output, grad_lse) -> tuple:
    """What a Function's backward returns: gradients of query, key, value and of the wanted ones of `extras`."""
    *tensors, output, lse = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    wanted = [ctx.needs_input_grad[i] for i in extras]
    *_, kind = ctx.options
    grads = first_derivative(
        op, kind, backward, grad_output, grad_lse, *tensors[:3], output, lse, *tensors[3:], *ctx.options, *wanted
    )
    result = [*grads[:3], *(None,) * (NUM_TENSORS - 3 + len(ctx.options))]
    for i, grad, want in zip(extras, grads[3:], wanted):
        result[i] = grad if want else None
    return tuple(result)


def statistics_dtype(query: Tensor) -> torch.dtype:
    """Of lse: float32, float64 for float64."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def fake_extra_grads(query, bias, alibi_slopes, sinks, bias_shape, need_bias, need_alibi_slopes, need_sinks) -> tuple:
    """Gradients of bias, alibi_slopes and sinks without values; empty where none is wanted."""
    bias_shape = bias_shape if need_bias else (0,)
    result = [query.new_empty(bias_shape, dtype=query.dtype if bias is None else bias.dtype)]
    for tensor, need in ((alibi_slopes, need_alibi_slopes), (sinks, need_sinks)):
        like = query if tensor is None else tensor
        result.append(like.new_empty(like.shape if need else (0,)))
    return tuple(result)


def dropout_seed(device: torch.device) -> Tensor:
    """Drawn on the device by torch's generator: checkpointing, graphs and compile replay it."""
    return torch.randint(_INT64_MIN, INT64_MAX, (2,), dtype=torch.int64, device=device)


def check_tensors(op: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Three float tensors of one dtype on one device, at least [L, D], with head dimensions that can be multiplied."""
    if (
        isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)
        and is_dense(query) and is_dense(key) and is_dense(value)
        and query.dtype is key.dtype is value.dtype and query.dtype in _FLOATS
        and query.device == key.device == value.device
        and query.dim() >= 2 and key.dim() >= 2 and value.dim() >= 2
        and query.shape[-1] == key.shape[-1] > 0 and value.shape[-1] > 0
    ):  # fmt: skip
        return  # the common case, in one microsecond; the rest finds the words
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(op, name, tensor)
    if query.dtype not in _FLOATS:
        raise TypeError(f"{op}: query has dtype {dtype_name(query.dtype)}, expected {', '.join(map(dtype_name, _FLOATS))}")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise TypeError(f"{op}: {name} has dtype {dtype_name(tensor.dtype)}, expected {dtype_name(query.dtype)} (query's)")
        if tensor.device != query.device:
            raise RuntimeError(f"{op}: {name} is on {tensor.device}, expected {query.device} (query's)")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() < 2:
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected (..., heads, length, head_dim)")
        if tensor.shape[-1] == 0:
            raise ValueError(f"{op}: {name} has head_dim 0, expected at least 1")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"{op}: key has head_dim {key.shape[-1]}, expected {query.shape[-1]} (query's)")


def check_device(op: str, name: str, tensor: Tensor, query: Tensor) -> None:
    """Another argument lies on the query's device."""
    if tensor.device != query.device:
        raise RuntimeError(f"{op}: {name} is on {tensor.device}, expected {query.device} (query's)")


def check_window(op: str, window: tuple) -> tuple[int | None, int | None]:
    """(left, right), each None or a count of keys."""
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"{op}: window is {window!r}, expected (left, right), each int or None")
    for side in window:
        if side is not None and (isinstance(side, bool) or not isinstance(side, int)):
            raise TypeError(f"{op}: window is {window!r}, expected (left, right), each int or None")
        if side is not None and side < 0:
            raise ValueError(f"{op}: window is {window!r}, expected (left, right) of at least 0")
    return tuple(None if side is None else min(side, INT64_MAX) for side in window)


def check_softcap(op: str, softcap: float) -> float:
    """A positive finite number. A comparison, since it may be symbolic."""
    if isinstance(softcap, bool) or not isinstance(softcap, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{op}: softcap is a {type(softcap).__name__}, expected float or None")
    if not 0.0 < softcap <= _FLOAT32_MAX:
        raise ValueError(f"{op}: softcap is {softcap}, expected a positive finite number")
    return float(softcap)


def check_per_head(op: str, name: str, tensor: Tensor, query: Tensor, shapes: tuple[tuple[int, ...], ...]) -> None:
    """alibi_slopes or sinks: floats, one of the given shapes, query's device."""
    check_tensor(op, name, tensor, "a Tensor or None")
    if tensor.dtype not in _FLOATS:
        raise TypeError(f"{op}: {name} has dtype {dtype_name(tensor.dtype)}, expected a float dtype")
    if tuple(tensor.shape) not in shapes:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {' or '.join(map(str, shapes))}")
    check_device(op, name, tensor, query)


def check_additive(op: str, name: str, tensor: Tensor, query: Tensor, allow_bool: bool) -> None:
    """A mask or bias: query's dtype or float32 (or bool), query's device."""
    check_tensor(op, name, tensor, "a Tensor or None")
    dtype = tensor.dtype
    if not (dtype == query.dtype or dtype == torch.float32 or allow_bool and dtype == torch.bool):
        expected = ("bool, " if allow_bool else "") + " or ".join(dict.fromkeys((dtype_name(query.dtype), "float32")))
        raise TypeError(f"{op}: {name} has dtype {dtype_name(dtype)}, expected {expected}")
    check_device(op, name, tensor, query)


def check_broadcast(op: str, name: str, shape: tuple[int, ...], target: tuple[int, ...]) -> None:
    """`shape` can be expanded to `target`."""
    ahead = len(target) - len(shape)
    if ahead < 0 or any(shape[i] != 1 and shape[i] != target[ahead + i] for i in range(len(shape))):
        raise ValueError(f"{op}: {name} has shape {tuple(shape)}, expected one that broadcasts to {tuple(target)}")


def check_lengths(op: str, name: str, lengths: Tensor, query: Tensor, count: int) -> None:
    """[B] whole numbers on query's device. Values are looked at by check_length_values."""
    check_tensor(op, name, lengths, "a Tensor or None")
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: {name} has dtype {dtype_name(lengths.dtype)}, expected int32 or int64")
    if tuple(lengths.shape) != (count,):
        raise ValueError(f"{op}: {name} has shape {tuple(lengths.shape)}, expected ({count},) (the batch)")
    check_device(op, name, lengths, query)


def check_offsets(op: str, name: str, offsets: Tensor, query: Tensor) -> None:
    """[N + 1] whole numbers on query's device."""
    check_tensor(op, name, offsets)
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: {name} has dtype {dtype_name(offsets.dtype)}, expected int32 or int64")
    if offsets.dim() != 1 or offsets.shape[0] == 0:
        raise ValueError(f"{op}: {name} has shape {tuple(offsets.shape)}, expected (num_sequences + 1,)")
    check_device(op, name, offsets, query)


def may_read_values(tensor: Tensor) -> bool:
    """On the CPU always, on a GPU where TRANSFUSE_CHECK=1 asks for the wait; never in a graph that is being made."""
    if type(tensor) is not Tensor or torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" or _may_wait_for(tensor.device.type)


def _may_wait_for(device_type: str) -> bool:
    return device_type == "cuda" and env.get("TRANSFUSE_CHECK") and not torch.cuda.is_current_stream_capturing()


def page_reads_values(kind: str, query: Tensor) -> bool:
    """Whether an op's page looks at values itself: the compiled kernels of the CPU do so alone."""
    return kind == "triton" or query.device.type != "cpu"


def check_length_values(op: str, name: str, lengths: Tensor, longest: int) -> None:
    """0 <= length <= longest, where values can be read. (The compiled kernels check for themselves.)"""
    if not may_read_values(lengths):
        return
    for entry, length in enumerate(lengths.tolist()):
        if not 0 <= length <= longest:
            raise ValueError(f"{op}: {name}[{entry}] is {length}, expected 0 to {longest} (key's length)")


def check_offset_values(op: str, name: str, offsets: Tensor, tokens: int, owner: str, longest: int) -> None:
    """From 0 to tokens, never falling, no sequence above `longest`, where values can be read; names the first bad."""
    if not may_read_values(offsets):
        return
    before = 0
    for entry, value in enumerate(offsets.tolist()):
        here = f"{op}: {name}[{entry}] is {value}"
        if entry == 0 and value != 0:
            raise ValueError(f"{here}, expected 0")
        if value < before:
            raise ValueError(f"{here}, expected at least {before} (the entry before)")
        if value > tokens:
            raise ValueError(f"{here}, expected at most {tokens} ({owner}'s tokens)")
        if value - before > longest:
            limit = f"max_seqlen_{name[-1]}"
            raise ValueError(f"{here}, a sequence of length {value - before}, expected at most {longest} ({limit})")
        before = value
    if before != tokens:
        raise ValueError(f"{op}: {name}[{offsets.shape[0] - 1}] is {before}, expected {tokens} ({owner}'s tokens)")
