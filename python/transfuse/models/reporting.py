"""report(): what was replaced, what was not and why, whether it is right, how much faster it is, how to undo it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from transfuse import dispatch, extension
from transfuse.models import swap
from transfuse.models.fused_layers import packed_bytes
from transfuse.models.verdict import Sample, Speed, Verdict, check_sample, measure_speed, verify

_NOT_MEASURED = "not measured: pass sample= (a tokenizer's output, or texts for sentence-transformers)"


@dataclass(frozen=True)
class Report:
    """The five answers. ``str()`` prints them, ``to_dict()`` gives plain data."""

    model: str
    accelerated: bool
    replaced: dict[str, int]  # "BertSelfAttention" -> how many (or, in a preview, how many would be)
    not_replaced: dict[str, int]  # "name: reason" -> how many modules
    calls: dict[str, int]  # "packed" or the reason for the padded path -> calls in this process
    fallbacks: dict[str, int]  # "op: reasons" -> calls of the slow reference in this process
    notes: tuple[str, ...]
    verdict: Verdict | None
    speed: Speed | None

    def __str__(self) -> str:
        lines = [f"transfuse report on {self.model}{'' if self.accelerated else ' (preview: not accelerated yet)'}"]
        first = "1. Replaced" if self.accelerated else "1. Would be replaced"
        lines += _section(first, _counted(self.replaced) or ["nothing"])
        lines += _section("2. Not replaced, and why", [*_counted(self.not_replaced), *self.notes])
        if self.calls:
            lines += _section("   Calls so far", _counted(self.calls))
        if self.fallbacks:
            lines += _section("   Calls that ran the slow reference (whole process)", _counted(self.fallbacks))
        verdict = _NOT_MEASURED if self.verdict is None else str(self.verdict)
        lines += _section("3. Is it right?", verdict.splitlines())
        lines += _section("4. How much faster?", [_NOT_MEASURED if self.speed is None else str(self.speed)])
        undo = "transfuse.restore(model)" if self.accelerated else "nothing to undo; apply: transfuse.accelerate(model)"
        lines += _section("5. Undo", [undo])
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "accelerated": self.accelerated,
            "replaced": self.replaced,
            "not_replaced": self.not_replaced,
            "calls": self.calls,
            "fallbacks": self.fallbacks,
            "notes": list(self.notes),
            "verdict": self.verdict.to_dict() if self.verdict is not None else None,
            "speed": vars(self.speed) if self.speed else None,
            "undo": "transfuse.restore(model)",
        }


def report(model: nn.Module, sample: Sample | None = None) -> Report:
    """Five answers about a model; the preview where it is not accelerated yet.

    Args:
        model: any nn.Module; it is not changed.
        sample: inputs as for ``verify``. With them the report also says whether the outputs are stock's and how much
            faster they come, both sides in turns.
    Raises:
        TypeError, ValueError: the model or the sample is of another form.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"report: model is a {type(model).__name__}, expected a torch.nn.Module")
    if sample is not None:
        check_sample("report", sample)
    steps = swap.plan(model)
    swapped = [module for _, module in swap.swapped_modules(model)]
    accelerated = bool(swapped)
    stock = [module.stock for module in swapped] if accelerated else [step.stock for step in steps if step.fused]
    not_replaced: Counter[str] = Counter()
    for step in steps:
        if step.fused is None:
            not_replaced[f"{step.stock.__name__}: {step.reason}"] += 1
        elif accelerated and not swap.is_exchanged(step.module):
            reason = "padding_free=False" if step.fused.needs_packing else "added after accelerate()"
            not_replaced[f"{step.stock.__name__}: {reason}"] += 1
    return Report(
        model=type(model).__name__,
        accelerated=accelerated,
        replaced=dict(Counter(cls.__name__ for cls in stock)),
        not_replaced=dict(not_replaced),
        calls=dict(swap.calls(model)),
        fallbacks={f"{op}: {' '.join(why.split())}": count for (op, why), count in dispatch.fallback_counts().items()},
        notes=tuple(_notes(model, steps, accelerated)),
        verdict=verify(model, sample) if sample is not None else None,
        speed=measure_speed(model, sample) if sample is not None else None,
    )


def _notes(model: nn.Module, steps: list[swap.Step], accelerated: bool) -> list[str]:
    """What holds for every call of this model and cannot be read from its calls so far."""
    notes = ["Embedding layers, and Linear layers outside an encoder: torch's own look-ups and products stay"]
    packs = [step for step in steps if step.fused is not None and step.fused.needs_packing]
    if any(not accelerated or isinstance(step.module, step.fused) for step in packs):
        notes.append(
            "padded path, by design: 4-D or float masks, output_attentions, tracing (torch.compile, export), "
            "decoder use"
        )
        notes.append("padding-free: padded positions of the outputs are 0, in every hidden_states entry too")
    held = packed_bytes(model)
    if held:
        notes.append(f"packed weights: {held / 2**20:.1f} MiB beside the parameters, freed by train() and restore()")
    if extension.cpu_unavailable:
        notes.append(extension.cpu_unavailable)
    return notes


def _section(title: str, rows: list[str]) -> list[str]:
    return [title, *(f"     {row}" for row in rows)]


def _counted(counts: dict[str, int]) -> list[str]:
    return [f"{count:>4} x {name}" for name, count in counts.items()]
