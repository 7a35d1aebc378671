"""The GELU activations of transformers: erf, torch's tanh form, and the tanh form written in eight elementwise ops."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from transformers import activations as transformers_activations

from transfuse.models.swap import Swapped
from transfuse.ops.gelu import gelu


class _FusedActivation(Swapped):
    approximate: str

    def fused(self, input: torch.Tensor) -> torch.Tensor:
        return self.stock_forward(input) if input.is_nested else gelu(input, self.approximate)


class GELUActivation(_FusedActivation, transformers_activations.GELUActivation):
    """gelu, erf form."""

    stock = transformers_activations.GELUActivation
    approximate = "none"

    @classmethod
    def why_not(cls, module: nn.Module) -> str:
        return "" if module.act is nn.functional.gelu else "use_gelu_python=True asks for the formula in Python"


class GELUTanh(_FusedActivation, transformers_activations.GELUTanh):
    """gelu_pytorch_tanh."""

    stock = transformers_activations.GELUTanh
    approximate = "tanh"

    @classmethod
    def why_not(cls, module: nn.Module) -> str:
        return "" if isinstance(module.act, partial) else "use_gelu_tanh_python=True asks for the formula in Python"


class NewGELUActivation(_FusedActivation, transformers_activations.NewGELUActivation):
    """gelu_new: the tanh form, one pass instead of eight."""

    stock = transformers_activations.NewGELUActivation
    approximate = "tanh"


REPLACEMENTS = {fused.stock: fused for fused in (GELUActivation, GELUTanh, NewGELUActivation)}
