"""The rule by which a model is accelerated: a module's class is exchanged for a subclass that computes the same thing.

``module.__class__ = FusedClass`` adds no parameter, no buffer and no bound method. So state_dict, isinstance, hooks,
deepcopy, pickle, train/eval and .to() go on as before, and a pickled model finds its classes again by import.

A family page (``bert.py``, ``torch_nn.py``, ...) declares ``REPLACEMENTS``: stock class -> fused class. It is imported
only when a model holds a module of that family, so transfuse never imports transformers by itself.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from transfuse import dispatch, env

# Module that defines the stock classes -> page that declares their replacements.
FAMILIES = {
    "torch.nn.modules.normalization": "transfuse.models.torch_nn",
    "torch.nn.modules.activation": "transfuse.models.torch_nn",
    "transformers.activations": "transfuse.models.activations",
    "transformers.models.bert.modeling_bert": "transfuse.models.bert",
    "transformers.models.roberta.modeling_roberta": "transfuse.models.roberta",
    "transformers.models.xlm_roberta.modeling_xlm_roberta": "transfuse.models.xlm_roberta",
    "transformers.models.camembert.modeling_camembert": "transfuse.models.camembert",
    "transformers.models.electra.modeling_electra": "transfuse.models.electra",
}

# dtypes in which a gain was measured on whole models. The kernels take float16 and float64 too.
FAST_DTYPES = (torch.float32, torch.bfloat16)


class Swapped:
    """Base of every class that accelerate() puts in place of a stock one. Stands before the stock class in the bases.

    A subclass defines ``fused``, which takes and returns what the stock ``forward`` does, and calls ``stock_forward``
    for a call it cannot do.
    """

    stock: type[nn.Module]  # the class that restore() puts back
    needs_packing = False  # only used where padding_free=True
    takes_dtype = False  # whether compute_dtype changes what it does
    backends = env.BACKENDS  # those that its ops have
    pinned_backend: str | None = None  # accelerate(backend=...): an instance attribute where it is not "auto"
    compute_dtype: torch.dtype | None = None  # accelerate(dtype=...): an instance attribute where it is not None

    @classmethod
    def why_not(cls, module: nn.Module) -> str:
        """The reason why this stock module is better left alone; empty when it can be exchanged."""
        return ""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """``fused``, on the backend this model was given."""
        if self.pinned_backend is None:
            return self.fused(*args, **kwargs)
        with dispatch.prefer_backend(self.pinned_backend):
            return self.fused(*args, **kwargs)

    def stock_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the class that was exchanged."""
        return self.stock.forward(self, *args, **kwargs)


@dataclass(frozen=True)
class Step:
    """One module of a plan: what would take its place, or why nothing does."""

    name: str
    module: nn.Module
    stock: type[nn.Module]
    fused: type[Swapped] | None
    reason: str


def plan(model: nn.Module, padding_free: bool = True) -> list[Step]:
    """What accelerate() does to every module it knows, without doing it; accelerated ones are planned as stock."""
    steps = []
    default_dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    for name, module in model.named_modules():
        stock = stock_class(module)
        fused = replacement_of(stock)
        if fused is None:
            reason = _known_but_not_done(stock)
        elif fused.needs_packing and not padding_free:
            reason = "padding_free=False"
        else:
            reason = fused.why_not(module) or _slow_dtype(module, default_dtype)
        if fused is not None or reason:
            steps.append(Step(name, module, stock, None if reason else fused, reason))
    return steps


def stock_class(module: nn.Module) -> type[nn.Module]:
    """The module's own class, or the one that accelerate() exchanged."""
    return type(module).stock if is_exchanged(module) else type(module)


def is_exchanged(module: object) -> bool:
    """True where accelerate() gave the module its class, and nobody (parametrizations, FSDP) subclassed it since."""
    return isinstance(module, Swapped) and "stock" in type(module).__dict__


def replacement_of(stock: type[nn.Module]) -> type[Swapped] | None:
    """The fused class for exactly this class. A subclass may compute something else, so it gets none."""
    family = FAMILIES.get(stock.__module__)
    return importlib.import_module(family).REPLACEMENTS.get(stock) if family else None


def put(module: nn.Module, fused: type[Swapped], backend: str = "auto", dtype: torch.dtype | None = None) -> None:
    """Exchanges one module's class and gives it the options of accelerate()."""
    module.__class__ = fused
    for option, value, default in (("pinned_backend", backend, "auto"), ("compute_dtype", dtype, None)):
        module.__dict__.pop(option, None)
        if value != default:
            setattr(module, option, value)


def put_back(module: nn.Module) -> None:
    """Gives one module its stock class again; a class that was changed since is not ours to take away."""
    if is_exchanged(module):
        for option in ("pinned_backend", "compute_dtype"):
            module.__dict__.pop(option, None)
        module.__class__ = type(module).stock


def swapped_modules(model: nn.Module) -> Iterator[tuple[str, Swapped]]:
    """The modules of ``model`` that accelerate() exchanged."""
    return ((name, module) for name, module in model.named_modules() if is_exchanged(module))


def _slow_dtype(module: nn.Module, default: torch.dtype) -> str:
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), default)
    if dtype in FAST_DTYPES:
        return ""
    return f"its dtype is {dispatch.dtype_name(dtype)}, a gain was measured in float32 and bfloat16"


def _known_but_not_done(stock: type[nn.Module]) -> str:
    """A reason for modules a person would expect to be accelerated; empty for all others."""
    if issubclass(stock, Swapped):
        return "its class was changed after accelerate(): undo that, then restore() reaches it"
    if stock.__module__.startswith("transfuse."):
        return ""
    for parent in stock.__mro__[1:]:
        if replacement_of(parent) is not None:
            return f"it is a subclass of {parent.__name__}, whose forward may differ"
    if stock.__module__.startswith("torch.nn.modules.") and stock.__name__ in _TORCH_NOT_DONE:
        return _TORCH_NOT_DONE[stock.__name__]
    parents = {(parent.__module__, parent.__name__) for parent in stock.__mro__}
    if ("transformers.modeling_utils", "PreTrainedModel") in parents and stock.__module__ not in FAMILIES:
        home = stock.__module__.split(".")
        family = home[-2] if home[:2] == ["transformers", "models"] else stock.__module__
        return f"the attention of the family {family!r} is not accelerated yet"
    return ""


_TORCH_NOT_DONE = {
    "MultiheadAttention": "nn.MultiheadAttention is not exchanged yet",
    "TransformerEncoderLayer": "torch's own inference fast path stays; only its LayerNorms are exchanged",
    "TransformerDecoderLayer": "its attention is not accelerated yet; its LayerNorms are exchanged",
    "RMSNorm": "nn.RMSNorm is not exchanged yet",
    "Softmax": "a bare nn.Softmax gains nothing",
}

# Per accelerated model: how its calls ran. Outside the model, so that a copy or a pickle carries nothing of it.
PACKED = "packed"
_calls: WeakKeyDictionary[nn.Module, Counter[str]] = WeakKeyDictionary()


def count_call(module: nn.Module, how: str) -> None:
    """Counts one forward of ``module``: PACKED, or the reason why it took the padded path."""
    if torch.compiler.is_compiling():
        return
    _calls.setdefault(module, Counter())[how] += 1


def calls(model: nn.Module) -> Counter[str]:
    """How the calls of all accelerated modules of ``model`` ran in this process."""
    total: Counter[str] = Counter()
    for module in model.modules():
        total.update(_calls.get(module, ()))
    return total
