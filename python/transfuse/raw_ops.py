"""The raw ops of every page: one schema and one fake kernel, in a namespace per kind of kernel.

    torch.ops.transfuse.layer_norm_forward           compiled: registered by _C for the CPU and by _C_cuda for GPUs
    torch.ops.transfuse_triton.layer_norm_forward    kernels/triton/layer_norm.py: on GPUs, and on the CPU where
                                                     TRITON_INTERPRET=1 makes Triton interpret its kernels

A page declares its raw ops with ``raw_op`` and looks them up in ``RAW_OPS`` under the kind of kernel and the name; its
autograd Functions take that kind as an argument, so that they are written once.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from transfuse import env, extension

NAMESPACES = {"compiled": "transfuse", "triton": "transfuse_triton"}

# kind -> name of a raw op -> the op. Without the compiled module "compiled" has none.
RAW_OPS: dict[str, dict[str, torch._ops.OpOverload]] = {kind: {} for kind in NAMESPACES}

_triton = torch.library.Library(NAMESPACES["triton"], "DEF")  # lives as long as the process


def raw_op(stem: str, schema: str) -> Callable[[Callable], Callable]:
    """Declares the raw op ``schema`` for every kind of kernel; what it decorates is its fake kernel.

    Args:
        stem: kernels/triton/<stem>.py has a function of the raw op's name and arguments.
        schema: as csrc writes it, "name(arguments) -> results".
    """
    name = schema.partition("(")[0]

    def declare(fake: Callable) -> Callable:
        _triton.define(schema)
        for device in ("CUDA", "CPU") if env.triton_is_interpreted() else ("CUDA",):
            _triton.impl(name, _loaded_at_first_call(stem, name), device)
        torch.library.register_fake(f"{NAMESPACES['triton']}::{name}", fake, lib=_triton)
        RAW_OPS["triton"][name] = getattr(torch.ops.transfuse_triton, name).default
        if extension._C is not None:
            torch.library.register_fake(f"{NAMESPACES['compiled']}::{name}", fake)
            RAW_OPS["compiled"][name] = getattr(torch.ops.transfuse, name).default
        return fake

    return declare


def _loaded_at_first_call(stem: str, name: str) -> Callable[..., Any]:
    """The function of kernels/triton; triton is imported when it is called first, half a second later than the page."""
    kernel = None

    def run(*arguments: Any) -> Any:
        nonlocal kernel
        if kernel is None:
            kernel = getattr(import_module(f"transfuse.kernels.triton.{stem}"), name)
        return kernel(*arguments)

    return run
