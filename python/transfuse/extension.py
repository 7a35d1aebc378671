"""Loads the compiled modules once and keeps the reason where one cannot be loaded or used."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch

from transfuse import env

cpu_unavailable: str = ""  # why the compiled CPU kernels cannot run here; empty when they can
cuda_unavailable: str = ""  # the same of the CUDA kernels; whether there is a GPU is asked later, by whoever needs one
cuda_architectures: tuple[str, ...] = ()  # what the CUDA kernels were built for: "8.0", "9.0a", "12.0+PTX"
_C = None
_C_cuda = None

try:
    from transfuse import _C
except ImportError as error:
    cpu_unavailable = f"the compiled module transfuse._C is not there: {error}"
else:
    if env.get("TRANSFUSE_CPU_ISA") != "best":
        _C.set_cpu_isa(env.get("TRANSFUSE_CPU_ISA"))


def _load_cuda() -> str:
    """Loads _C_cuda where torch has CUDA; returns the reason why its kernels cannot run, or nothing."""
    global _C_cuda, cuda_architectures
    if _C is None:
        return cpu_unavailable  # the schemas of the raw ops are its
    built = _C.build_info()["cuda"]
    if built.startswith("not built"):
        return f"transfuse._C_cuda was {built}"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    try:
        from transfuse import _C_cuda
    except ImportError as error:
        return f"the compiled module transfuse._C_cuda cannot be loaded: {error}"
    cuda_architectures = _C_cuda.build_info()["architectures"]
    return _C_cuda.driver_unusable()


cuda_unavailable = _load_cuda()


def triton_missing() -> str:
    """Why there is no Triton here, or nothing; finds it without importing it."""
    spec = find_spec("triton")
    return "" if spec is not None and spec.origin is not None else "triton is not installed (pip install triton)"


@cache
def triton_unavailable() -> str:
    """Why the Triton kernels cannot be loaded here, or nothing. Imports triton, half a second: ask only to run them."""
    if triton_missing():
        return triton_missing()
    try:
        from transfuse.kernels.triton import versions  # noqa: F401
    except ImportError as error:
        return f"the Triton kernels cannot be loaded: {error}"
    return ""
