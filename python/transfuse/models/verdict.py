"""Stock against accelerated on a user's own inputs: is it right (``verify``), how much faster (``measure_speed``).

Both sides are copies that share every parameter and buffer with the user's model, one with stock's classes and one
accelerated. So nothing is changed, and no weights are held twice.
"""

from __future__ import annotations

import copy
import inspect
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from transfuse.models import swap
from transfuse.ops.packing import Packing
from transfuse.testing import model_tolerance

# Keyword arguments of a forward; or its positional arguments; or texts (pairs of texts) for sentence-transformers.
Sample: TypeAlias = Mapping[str, Any] | torch.Tensor | tuple[Any, ...] | list[Any]

_ROUNDS = 5
_MAX_SECONDS = 30.0  # of measuring; at least two rounds are run


@dataclass(frozen=True)
class Difference:
    """Largest |stock - accelerated| of one tensor, at kept positions."""

    name: str
    max_abs: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.max_abs <= self.allowed  # a NaN is not


@dataclass(frozen=True)
class Verdict:
    """What verify() found. True where every output is within its tolerance; layers are for information."""

    ok: bool
    outputs: tuple[Difference, ...]
    layers: tuple[Difference, ...]
    tokens: int
    padded_tokens: int

    @property
    def max_abs_error(self) -> float:
        """Largest difference of any output."""
        return max((d.max_abs if d.max_abs == d.max_abs else float("inf") for d in self.outputs), default=0.0)

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        lines = [f"{'same' if self.ok else 'DIFFERENT'}: largest difference to stock {self.max_abs_error:.1e}"]
        if self.padded_tokens:
            lines[0] += f" at {self.tokens} kept of {self.padded_tokens} positions"
        for kind, rows in (("output", self.outputs), ("layer", self.layers)):
            for d in rows:
                mark = "" if d.ok else "  <-- above"
                lines.append(f"  {kind} {d.name}: {d.max_abs:.1e} (allowed {d.allowed:.1e}){mark}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "max_abs_error": self.max_abs_error}


@dataclass(frozen=True)
class Speed:
    """Stock's time over ours, interleaved; the range is that of the rounds."""

    ratio: float
    low: float
    high: float
    stock_ms: float
    accelerated_ms: float
    rounds: int

    def __str__(self) -> str:
        return (f"{self.ratio:.2f}x (rounds {self.low:.2f} to {self.high:.2f}): "
                f"{self.stock_ms:.1f} ms stock, {self.accelerated_ms:.1f} ms accelerated")


def verify(model: nn.Module, batch: Sample) -> Verdict:
    """Runs stock and accelerated on one batch, in eval mode without gradients, and compares per layer and end to end.

    A layer's output is seen by a hook, and a hooked encoder computes module by module in the model's own dtype. The
    model runs a second time without hooks, fused and in accelerate()'s ``dtype``; the worse of its outputs counts.

    Args:
        model: accelerated or not; it is not changed.
        batch: keyword arguments of its forward as a mapping (a tokenizer's output), a tensor or tuple of positional
            arguments, or, for sentence-transformers, a list of texts (pairs of texts for a CrossEncoder).
    Returns:
        A Verdict. Positions that the batch's ``attention_mask`` excludes are not compared, nor what a head makes of a
        first position that is padding (``pooler_output`` and ``logits`` of that row).
    Raises:
        TypeError, ValueError: the model or the batch is not of that form.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"verify: model is a {type(model).__name__}, expected a torch.nn.Module")
    check_sample("verify", batch)
    stock, fused = stock_and_accelerated(model)
    watched = _watched(fused)
    with _recorded(stock, watched) as stock_layers:
        expected = run_model(stock, batch)
    with _recorded(fused, watched) as fused_layers:
        by_module = run_model(fused, batch)
    actual = run_model(fused, batch)
    keep, computed_in = _keep_mask(model, batch), _compute_dtype(fused)
    outputs = tuple(
        _worse(_difference(name, value, run.get(name), keep, computed_in) for run in (actual, by_module))
        for name, value in expected.items()
    )
    called = [name for name in watched if stock_layers[name]]
    layers = tuple(_layer_difference(name, stock_layers[name], fused_layers[name], keep) for name in called)
    total = 0 if keep is None else keep.numel()
    return Verdict(all(d.ok for d in outputs), outputs, layers, 0 if keep is None else int(keep.sum()), total)


def measure_speed(model: nn.Module, sample: Sample, rounds: int = _ROUNDS) -> Speed:
    """Times stock and accelerated in turns, in eval mode without gradients, after one warm-up of each."""
    check_sample("report", sample)
    sides = stock_and_accelerated(model)
    times: tuple[list[float], list[float]] = ([], [])
    for side in sides:
        run_model(side, sample)
    started = time.perf_counter()
    for round_number in range(rounds):
        order = (0, 1) if round_number % 2 == 0 else (1, 0)
        for index in order:
            before = time.perf_counter()
            run_model(sides[index], sample)
            times[index].append(time.perf_counter() - before)
        if round_number and time.perf_counter() - started > _MAX_SECONDS:
            break
    ratios = [stock / fused for stock, fused in zip(*times, strict=True)]
    stock_ms, fused_ms = (1e3 * statistics.median(t) for t in times)
    return Speed(statistics.median(ratios), min(ratios), max(ratios), stock_ms, fused_ms, len(ratios))


def check_sample(op: str, sample: object) -> None:
    """TypeError or ValueError unless ``sample`` has one of the forms of ``Sample``."""
    if not isinstance(sample, (Mapping, torch.Tensor, tuple, list)) and not hasattr(sample, "items"):
        kind = type(sample).__name__
        raise TypeError(f"{op}: the sample is a {kind}, expected a mapping, a tensor, a tuple or a list of texts")
    if not isinstance(sample, torch.Tensor) and len(sample) == 0:
        raise ValueError(f"{op}: the sample is empty")


def stock_and_accelerated(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Two copies in eval mode that share the model's tensors; an accelerated model's copy keeps its options."""
    stock, fused = _sharing_copy(model), _sharing_copy(model)
    for _, module in list(swap.swapped_modules(stock)):
        swap.put_back(module)
    if next(swap.swapped_modules(fused), None) is None:
        for step in swap.plan(fused):
            if step.fused is not None:
                swap.put(step.module, step.fused, "auto")
    return stock.eval(), fused.eval()


def run_model(model: nn.Module, sample: Sample) -> dict[str, torch.Tensor]:
    """The floating-point outputs of one call without gradients, by name."""
    with torch.no_grad():
        if isinstance(sample, list):
            return _float_tensors(_run_texts(model, sample), "output")
        if isinstance(sample, torch.Tensor):
            return _float_tensors(model(sample), "output")
        if isinstance(sample, tuple):
            return _float_tensors(model(*sample), "output")
        if isinstance(model, nn.Sequential):  # sentence-transformers: one dict of features
            return _float_tensors(model(dict(sample)), "output")
        return _float_tensors(model(**sample), "output")


def _run_texts(model: nn.Module, texts: list[Any]) -> torch.Tensor:
    for method in ("encode", "predict"):
        if hasattr(model, method):
            return getattr(model, method)(texts, convert_to_tensor=True, show_progress_bar=False)
    name = type(model).__name__
    needs = f"{name} takes a mapping or tensors"
    raise TypeError(f"verify: a list is texts for a SentenceTransformer or CrossEncoder; {needs}")


def _float_tensors(value: Any, name: str) -> dict[str, torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return {name: value} if value.is_floating_point() else {}
    if isinstance(value, Mapping):
        pairs = value.items()
    elif isinstance(value, Sequence) and not isinstance(value, str):
        pairs = ((f"{name}[{i}]", v) for i, v in enumerate(value))
    else:
        return {}
    return {n: tensor for key, v in pairs for n, tensor in _float_tensors(v, str(key)).items()}


def _sharing_copy(model: nn.Module) -> nn.Module:
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _watched(model: nn.Module) -> list[str]:
    """Names of the layers to compare: the blocks of a ModuleList that hold exchanged modules, else those modules."""
    swapped = [name for name, _ in swap.swapped_modules(model)]
    blocks = [
        f"{name}.{child}".lstrip(".")
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        for child, _ in module.named_children()
    ]
    layers = [block for block in blocks if any(name == block or name.startswith(f"{block}.") for name in swapped)]
    return layers or [name for name in swapped if name]


@contextmanager
def _recorded(model: nn.Module, names: list[str]) -> Iterator[dict[str, list[tuple[torch.Tensor, Packing | None]]]]:
    """Collects the outputs of the named modules while the context lasts, with the Packing each was called with."""
    record: dict[str, list] = {name: [] for name in names}

    def hook(name: str) -> Callable:
        def keep(module: nn.Module, args: tuple, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if isinstance(tensor, torch.Tensor):
                record[name].append((tensor, next((a for a in args if isinstance(a, Packing)), None)))

        return keep

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def _keep_mask(model: nn.Module, batch: Sample) -> torch.Tensor | None:
    """The batch's attention mask, by whatever way it is given; None where there is none to go by."""
    if isinstance(batch, tuple):
        try:
            batch = inspect.signature(model.forward).bind_partial(*batch).arguments
        except (TypeError, ValueError):  # the call itself said what is wrong with it, or forward has no signature
            return None
    mask = batch.get("attention_mask") if hasattr(batch, "get") else None
    return mask.bool() if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None


def _worse(differences: Iterable[Difference]) -> Difference:
    return max(differences, key=lambda d: float("inf") if d.max_abs != d.max_abs else d.max_abs)


def _compute_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype that accelerate() was given, if any."""
    return next((m.compute_dtype for _, m in swap.swapped_modules(model) if m.compute_dtype is not None), None)


def _difference(
    name: str, expected: torch.Tensor, actual: torch.Tensor | None, keep: torch.Tensor | None,
    computed_in: torch.dtype | None = None,
) -> Difference:
    dtype = computed_in or expected.dtype
    if actual is None or actual.shape != expected.shape:
        return Difference(name, float("nan"), model_tolerance(dtype))
    if keep is not None and expected.shape[:2] == keep.shape:
        expected, actual = expected[keep], actual[keep]
    elif keep is not None and expected.shape[:1] == keep.shape[:1] and _is_of_first_position(name):
        expected, actual = expected[keep[:, 0]], actual[keep[:, 0]]
    if expected.numel() == 0:
        return Difference(name, 0.0, model_tolerance(dtype))
    max_abs = float((expected.double() - actual.double()).abs().max())
    return Difference(name, max_abs, model_tolerance(dtype, float(expected.abs().max())))


def _is_of_first_position(name: str) -> bool:
    """Per-row outputs that BERT-like models make of position 0; in a tuple they have no name of their own."""
    return name in ("pooler_output", "logits") or name.startswith("output[")


def _layer_difference(name: str, expected: list, actual: list, keep: torch.Tensor | None) -> Difference:
    if len(expected) != len(actual):
        return Difference(name, float("nan"), 0.0)
    worst = Difference(name, 0.0, 0.0)
    for (stock, _), (fused, packing) in zip(expected, actual, strict=True):
        if packing is not None:
            stock, fused = stock.flatten(0, 1).index_select(0, packing.indices), fused[0]
        found = _difference(name, stock, fused, None if packing is not None else keep)
        worst = found if not found.max_abs <= worst.max_abs or not worst.allowed else worst
    return worst
