"""Loads the compiled module once and keeps the reason where it cannot be loaded."""

from __future__ import annotations

import torch  # noqa: F401  the module finds torch's libraries by name in this process

from transfuse import env

cpu_unavailable: str = ""  # why the compiled CPU kernels cannot run here; empty when they can
_C = None

try:
    from transfuse import _C
except ImportError as error:
    cpu_unavailable = f"the compiled module transfuse._C is not there: {error}"
else:
    if env.get("TRANSFUSE_CPU_ISA") != "best":
        _C.set_cpu_isa(env.get("TRANSFUSE_CPU_ISA"))
