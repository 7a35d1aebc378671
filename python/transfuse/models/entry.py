"""accelerate(), restore() and repack(): a model's modules are exchanged in place, and put back."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from transfuse import dispatch, env, extension
from transfuse.models import swap
from transfuse.models.fused_layers import forget
from transfuse.models.verdict import Sample, check_sample, measure_speed

# Device families on which a gain was measured on whole models. Elsewhere accelerate() needs sample= or force=True.
MEASURED_DEVICES = ("cpu",)
# Backends that need no compiled module and are taken only on request.
_UNCOMPILED = ("torch", "reference")
COMPUTE_DTYPES = (torch.float32, torch.bfloat16)


def accelerate(
    model: nn.Module,
    *,
    backend: str = "auto",
    padding_free: bool = True,
    dtype: torch.dtype | None = None,
    sample: Sample | None = None,
    force: bool = False,
) -> nn.Module:
    """Exchanges, in place, every module that has a fused form. Parameters, buffers and state_dict stay as they are.

        model = transfuse.accelerate(SentenceTransformer("all-MiniLM-L6-v2"))
        print(transfuse.report(model))

    Args:
        model: a transformers model, SentenceTransformer, CrossEncoder, or any module that holds nn.LayerNorm or GELU.
        backend: backend of every op inside this model; use_backend() goes before it.
        padding_free: encoders compute real tokens only. Padded positions of their outputs are then 0 (so is what a
            head makes of them, such as ``pooler_output`` of a row whose first position is padding). False keeps
            stock's values everywhere.
        dtype: what inference on the CPU computes in; parameters, state_dict and model.dtype stay. torch.bfloat16 runs
            the products, attention and norms of encoder layers on bfloat16 tensors, with sums and statistics in float32;
            the embeddings, and whatever follows the last layer, stay in the model's dtype. Calls with gradients, hooks
            inside the encoder or autocast compute in the model's dtype; report() counts them. None is the model's own.
        sample: inputs to measure with (see ``verify``), needed where no gain was measured yet on the model's device:
            the model is then kept accelerated only when it is faster on them.
        force: exchange whether or not a gain is known.
    Returns:
        The same object. A second call is harmless, and applies its own options.
    Warns:
        TransfuseWarning: nothing was exchanged, or ``dtype`` changes nothing, with the reason.
    Raises:
        TypeError, ValueError: a bad argument, or a backend that this machine or one of the model's ops has not.
    """
    _check_arguments(model, backend, padding_free, dtype, sample, force)
    if env.get("TRANSFUSE_DISABLE"):
        return model
    steps = swap.plan(model, padding_free)
    wanted = [step for step in steps if step.fused is not None]
    _check_available(wanted, backend)
    for step in steps:
        if step.fused is None:
            swap.put_back(step.module)
    reason = _why_nothing(model, wanted, backend, sample, force)
    if reason:
        _warn(f"accelerate: nothing changed in {type(model).__name__}: {reason}")
        return model
    for step in wanted:
        swap.put(step.module, step.fused, backend, dtype)
    if dtype is not None and not any(step.fused.takes_dtype for step in wanted):
        _warn(f"accelerate: dtype={dtype} changes nothing in {type(model).__name__}: it has no encoder that takes it")
    if sample is not None and not force and _device(model) not in MEASURED_DEVICES:
        speed = measure_speed(model, sample)
        if speed.ratio <= 1:
            restore(model)
            slower = f"on the sample it would run at {speed.ratio:.2f} of stock's speed"
            _warn(f"accelerate: nothing changed in {type(model).__name__}: {slower}")
    return model


def restore(model: nn.Module) -> nn.Module:
    """Gives every module that accelerate() exchanged its own class again; the outputs are stock's, bit for bit.

    A module whose class was changed again since (parametrizations, FSDP2) is left alone; report() names it.

    Raises:
        TypeError: ``model`` is not an nn.Module.
    """
    check_model("restore", model)
    for _, module in list(swap.swapped_modules(model)):
        swap.put_back(module)
    forget(model)
    return model


def repack(model: nn.Module) -> nn.Module:
    """To be called after weights were edited behind autograd's back (``.data``): the next call packs them anew.

    Without it such an edit is noticed when it moves the tensor or changes one of 64 sampled elements of it. Edits that
    autograd sees (an optimizer's step, ``load_state_dict``, ``copy_`` under no_grad) need no call.

    Raises:
        TypeError: ``model`` is not an nn.Module.
    """
    check_model("repack", model)
    forget(model)
    return model


def check_model(op: str, model: object) -> None:
    """TypeError unless ``model`` is an nn.Module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model is a {type(model).__name__}, expected a torch.nn.Module")


def _warn(text: str) -> None:
    warnings.warn(text, dispatch.TransfuseWarning, stacklevel=3)


def _check_arguments(
    model: object, backend: object, padding_free: object, dtype: object, sample: object, force: object
) -> None:
    check_model("accelerate", model)
    dispatch.check_backend("accelerate", "backend", backend)
    for name, value in (("padding_free", padding_free), ("force", force)):
        if not isinstance(value, bool):
            raise TypeError(f"accelerate: {name} is a {type(value).__name__}, expected bool")
    if dtype is not None:
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"accelerate: dtype is a {type(dtype).__name__}, expected torch.dtype or None")
        if dtype not in COMPUTE_DTYPES:
            allowed = " or ".join(map(str, COMPUTE_DTYPES))
            raise ValueError(f"accelerate: dtype is {dtype}, expected {allowed}, or None (the model's own)")
    if sample is not None:
        check_sample("accelerate", sample)


def _check_available(wanted: list[swap.Step], backend: str) -> None:
    """ValueError where every forward under this backend would be refused. A missing cpu backend is only warned of."""
    state = dispatch.backends().get(backend, True)
    if state is not True and backend != "cpu":
        raise ValueError(f"accelerate: backend is {backend!r}, which is not available: {state}")
    for step in wanted:
        if backend not in step.fused.backends:
            allowed = ", ".join(step.fused.backends)
            raise ValueError(f"accelerate: backend is {backend!r}, expected one of {allowed} for {step.stock.__name__}")


def _device(model: nn.Module) -> str:
    return next((p.device.type for p in model.parameters()), "cpu")


def _why_nothing(model: nn.Module, wanted: list[swap.Step], backend: str, sample: object, force: bool) -> str:
    """The reason why accelerate() leaves the model as it is; empty when it goes ahead."""
    if not wanted:
        return "it holds no module that transfuse knows (see transfuse.report(model))"
    if force:
        return ""
    device = _device(model)
    if device == "cpu" and extension.cpu_unavailable and backend not in _UNCOMPILED:
        return extension.cpu_unavailable
    if device not in MEASURED_DEVICES and sample is None:
        return f"no gain was measured on {device} yet; pass sample= to measure it here, or force=True"
    return ""
