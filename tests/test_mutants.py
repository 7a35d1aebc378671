"""A suite is trusted after it has killed mutants: each mistake here must turn a check red that is green without it.

The first part puts mistakes between the Python pages and the compiled ops: one row per mistake, which raw op it
touches, what it does to arguments or results (by their names in the schema), and the checks that must see it. The
checks are those of the house: parity with the float64 reference in the budgets of transfuse.testing, and the golden
masks. The second part (slow) puts mistakes into the sources of a copy of the tree, compiles it and runs the tests of
that file.
"""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import transfuse
from transfuse import _C, use_backend
from transfuse.ops.layer_norm import add_layer_norm_into
from transfuse.promises import masks
from transfuse.promises.promise import NoKernel
from transfuse.testing import assert_close, assert_matches_reference, draw

BATCH, HEADS, KV_HEADS, LENGTH, HEAD_DIM = 2, 4, 2, 21, 24
LN2 = math.log(2.0)


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors: waking a second thread costs more than the work."""
    torch.set_num_threads(1)


# ---- checks: each passes on transfuse as it is ----


def attention(**options):
    """The check of scaled_dot_product_attention with these options, gradients and lse included."""

    def check():
        kv_heads = KV_HEADS if options.get("enable_gqa") else HEADS
        shapes = ((HEADS, LENGTH), (kv_heads, LENGTH), (kv_heads, LENGTH))
        tensors = [draw(BATCH, *shape, HEAD_DIM, seed=i, requires_grad=True) for i, shape in enumerate(shapes)]
        assert_matches_reference(
            transfuse.scaled_dot_product_attention, *tensors, return_lse=True, num_terms=LENGTH, **options
        )

    return check


def ragged_attention():
    """Fewer queries than keys, so that the two causal alignments differ."""
    query = draw(BATCH, HEADS, LENGTH - 8, HEAD_DIM, seed=0, requires_grad=True)
    key, value = (draw(BATCH, HEADS, LENGTH, HEAD_DIM, seed=i, requires_grad=True) for i in (1, 2))
    assert_matches_reference(
        transfuse.scaled_dot_product_attention, query, key, value, is_causal=True, causal_alignment="bottom_right",
        return_lse=True, num_terms=LENGTH,
    )  # fmt: skip


def dropped_attention():
    """Weights dropped by the same seed on both sides."""
    outputs = []
    for backend, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        torch.manual_seed(0)
        tensors = [draw(BATCH, HEADS, LENGTH, HEAD_DIM, seed=i).to(dtype).requires_grad_() for i in range(3)]
        with use_backend(backend):
            output = transfuse.scaled_dot_product_attention(*tensors, dropout_p=0.4)
        outputs.append([output, *torch.autograd.grad(output, tensors, draw(*output.shape, seed=7).to(dtype))])
    for actual, expected in zip(*outputs, strict=True):
        assert_close(actual, expected, LENGTH, slack=4.0)


def varlen(**options):
    def check():
        offsets = torch.tensor([0, 5, 5, 16, LENGTH], dtype=torch.int32)
        longer = torch.tensor([0, 7, 8, 22, LENGTH + 8], dtype=torch.int32)
        query = draw(LENGTH, HEADS, HEAD_DIM, seed=0, requires_grad=True)
        key, value = (draw(LENGTH + 8, HEADS, HEAD_DIM, seed=i, requires_grad=True) for i in (1, 2))
        assert_matches_reference(
            transfuse.varlen_attention, query, key, value, offsets, longer, return_lse=True, num_terms=LENGTH, **options
        )

    return check


def decode(paged=False, **options):
    """Two queries against caches of which one takes two chunks of keys; two keys arrive with the call."""

    def check():
        lengths, longest, block = torch.tensor([270, 13]), 288, 16
        query, table = draw(BATCH, HEADS, 2, HEAD_DIM, seed=0), None
        caches = [draw(BATCH, KV_HEADS, longest, HEAD_DIM, seed=i) for i in (1, 2)]
        if paged:
            pages = torch.randperm(BATCH * longest // block, generator=torch.Generator().manual_seed(1))
            table = pages.view(BATCH, -1).int()
            caches = [draw(pages.numel(), block, KV_HEADS, HEAD_DIM, seed=i) for i in (1, 2)]
        new = [draw(BATCH, KV_HEADS, 2, HEAD_DIM, seed=i) for i in (3, 4)]
        assert_matches_reference(
            transfuse.decode_attention, query, *caches, lengths, new_key=new[0], new_value=new[1], block_table=table,
            return_lse=True, num_terms=longest, backward=False, **options,
        )  # fmt: skip

    return check


def golden_masks():
    """CONTRACT section 1: the cases that the CPU kernels take, worked out by hand."""
    ran = 0
    for cases, run in masks.GROUPS.values():
        for case in cases:
            try:
                with use_backend("cpu"):
                    run(case, torch.float32, "cpu", "cpu")
                ran += 1
            except NoKernel:
                pass
    assert ran >= 60


def softmax(mask=None, **options):
    def check():
        input = draw(BATCH, LENGTH, LENGTH, scale=3.0, requires_grad=True)
        assert_matches_reference(transfuse.masked_softmax, input, mask, num_terms=LENGTH, **options)

    return check


def norm():
    input = draw(9, LENGTH, seed=1, shift=0.5, requires_grad=True)
    weight, bias = (draw(LENGTH, seed=i, shift=1.0, requires_grad=True) for i in (2, 3))
    assert_matches_reference(transfuse.layer_norm, input, (LENGTH,), weight, bias, 0.3, num_terms=LENGTH)


def add_norm():
    input, residual = (draw(9, LENGTH, seed=i, shift=0.5, requires_grad=True) for i in (1, 4))
    weight, bias = (draw(LENGTH, seed=i, shift=1.0, requires_grad=True) for i in (2, 3))
    assert_matches_reference(transfuse.add_layer_norm, input, residual, (LENGTH,), weight, bias, 0.3, num_terms=LENGTH)


def add_norm_into():
    """The same bits as add_layer_norm's first result."""
    input, residual = (draw(9, LENGTH, seed=i, shift=0.5) for i in (1, 4))
    weight, bias = (draw(LENGTH, seed=i, shift=1.0) for i in (2, 3))
    out = torch.full_like(input, math.nan)
    add_layer_norm_into(input, residual, weight, bias, 0.3, out)
    assert torch.equal(out, transfuse.add_layer_norm(input, residual, (LENGTH,), weight, bias, 0.3)[0])


def rms_norm():
    input, weight = draw(9, LENGTH, seed=1, requires_grad=True), draw(LENGTH, seed=2, shift=1.0, requires_grad=True)
    assert_matches_reference(transfuse.rms_norm, input, (LENGTH,), weight, 0.3, num_terms=LENGTH)


def add_rms_norm():
    input, residual = (draw(9, LENGTH, seed=i, requires_grad=True) for i in (1, 4))
    weight = draw(LENGTH, seed=2, shift=1.0, requires_grad=True)
    assert_matches_reference(transfuse.add_rms_norm, input, residual, (LENGTH,), weight, 0.3, num_terms=LENGTH)


def rotary(**options):
    """Two thirds of the columns are rotated."""

    def check():
        input = draw(BATCH, HEADS, LENGTH, HEAD_DIM, seed=0, requires_grad=True)
        cos, sin = (draw(LENGTH, HEAD_DIM // 3, seed=i, requires_grad=True) for i in (1, 2))
        assert_matches_reference(transfuse.rotary, input, cos, sin, num_terms=BATCH * HEADS, **options)

    return check


def gelu(**options):
    def check():
        input, bias = draw(9, LENGTH, seed=1, scale=2.0, requires_grad=True), draw(LENGTH, seed=2, requires_grad=True)
        assert_matches_reference(transfuse.gelu, input, bias=bias, num_terms=9, **options)

    return check


KEEP = torch.rand(BATCH, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(1)) > 0.3
CHECKS = {
    "attention": attention(),
    "attention, scaled": attention(scale=0.3),
    "attention, boolean mask": attention(attn_mask=KEEP),
    "attention, bias": attention(attn_bias=draw(1, HEADS, LENGTH, LENGTH, seed=5, requires_grad=True)),
    "attention, causal": attention(is_causal=True),
    "attention, bottom right": ragged_attention,
    "attention, lengths": attention(seqlens_k=torch.tensor([LENGTH, 13])),
    "attention, grouped heads": attention(enable_gqa=True),
    "attention, window": attention(window=(4, 2)),
    "attention, softcap": attention(softcap=0.7),
    "attention, alibi": attention(alibi_slopes=draw(HEADS, seed=5, requires_grad=True)),
    "attention, sinks": attention(sinks=draw(HEADS, seed=5, requires_grad=True)),
    "attention, dropout": dropped_attention,
    "varlen": varlen(),
    "varlen, causal": varlen(is_causal=True),
    "varlen, top left": varlen(is_causal=True, causal_alignment="top_left"),
    "varlen, bias": varlen(attn_bias=draw(1, HEADS, 11, 14, seed=5, requires_grad=True)),
    "varlen, sinks": varlen(sinks=draw(HEADS, seed=5, requires_grad=True)),
    "decode": decode(scale=0.3),
    "decode, pages": decode(paged=True),
    "decode, bias": decode(attn_bias=draw(1, HEADS, 2, 288, seed=5)),
    "decode, window": decode(window=(9, 0)),
    "decode, softcap": decode(softcap=0.7),
    "decode, alibi": decode(alibi_slopes=draw(HEADS, seed=5)),
    "decode, sinks": decode(sinks=draw(HEADS, seed=5, shift=3.0)),
    "golden masks": golden_masks,
    "softmax": softmax(),
    "softmax, scaled": softmax(scale=0.3),
    "softmax, boolean mask": softmax(KEEP[:, 0]),
    "softmax, float mask": softmax(draw(LENGTH, LENGTH, seed=5, requires_grad=True)),
    "softmax, causal": softmax(is_causal=True),
    "layer_norm": norm,
    "add_layer_norm": add_norm,
    "add_layer_norm_into": add_norm_into,
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "rotary": rotary(),
    "rotary, interleaved": rotary(interleaved=True),
    "gelu": gelu(),
    "gelu, tanh": gelu(approximate="tanh"),
}


# ---- mistakes ----


class Mutation(TorchDispatchMode):
    """Stands in front of one raw op: `arguments` edits a dict of its arguments, `results` a list of its results."""

    def __init__(self, mutant):
        super().__init__()
        self.mutant, self.packet = mutant, getattr(torch.ops.transfuse, mutant.op)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is not self.packet.default:
            return function(*args, **(kwargs or {}))
        names = [argument.name for argument in function._schema.arguments]
        given = dict(zip(names, args, strict=True))
        if self.mutant.arguments is not None:
            before = set(given)
            given.update(self.mutant.arguments(given))
            assert set(given) == before, f"{self.mutant.op} has no argument {set(given) - before}"
        output = function(*given.values())
        if self.mutant.results is None:
            return output
        single = isinstance(output, torch.Tensor)
        changed = self.mutant.results(given, [output] if single else list(output))
        return changed[0] if single else tuple(changed)


class Mutant(NamedTuple):
    """One mistake, and the checks of which each must see it."""

    op: str
    what: str
    seen_by: tuple[str, ...]
    arguments: Callable | None = None
    results: Callable | None = None


def times(index, factor):
    return lambda given, results: [*results[:index], results[index] * factor, *results[index + 1 :]]


def plus(index, amount):
    return lambda given, results: [*results[:index], results[index] + amount, *results[index + 1 :]]


def zero(index):
    return times(index, 0.0)


def scaled(name, factor):
    return lambda given: {name: given[name] * factor}


def dropped(name):
    return lambda given: {name: None}


def flipped(name):
    return lambda given: {name: not given[name]}


def set_to(name, value):
    return lambda given: {name: value}


GROUPED = [0, 2, 1, 3]  # its own inverse: query head h meets key head h % 2 instead of h // 2


def last_key_out(given):
    key = given["key"]
    keep = torch.arange(key.shape[2]) < key.shape[2] - 1
    keep = keep.expand(key.shape[0], given["query"].shape[1], given["query"].shape[2], -1)
    return {"mask": keep if given["mask"] is None else given["mask"] & keep}


def mean_of_empty_rows(given, results):
    """What a softmax over a sentinel gives to a row with no key: the mean of the values."""
    output, lse = results
    mean = given["value"].float().mean(2, keepdim=True).repeat_interleave(output.shape[1] // given["value"].shape[1], 1)
    return [torch.where((lse == -torch.inf)[..., None], mean, output), lse]


def excluded_values_leak(given, results):
    """0 * NaN: all values of a head take part, with weight 0."""
    leak = (0.0 * given["value"]).sum(2, keepdim=True)
    return [results[0] + leak.repeat_interleave(results[0].shape[1] // leak.shape[1], 1), results[1]]


def sentinel(given):
    """A large finite bias taken for an exclusion."""
    bias = given["bias"]
    return {} if bias is None else {"bias": bias.masked_fill(bias <= -1e4, -torch.inf)}


ATTENTION = "attention_forward"
ATTENTION_GRAD = "attention_backward"
VARLEN = "varlen_attention_forward"
VARLEN_GRAD = "varlen_attention_backward"
DECODE = "decode_attention_forward"
SOFTMAX = "masked_softmax_forward"
RMS, ADD_RMS, RMS_GRAD = "rms_norm_forward", "add_rms_norm_forward", "rms_norm_backward"
NORM, ADD_NORM, NORM_GRAD = "layer_norm_forward", "add_layer_norm_forward", "layer_norm_backward"
ADD_NORM_INTO = "add_layer_norm_into"

MUTANTS = (
    Mutant(ATTENTION, "scale * 1.01", ("attention", "attention, scaled"), scaled("scale", 1.01)),
    Mutant(ATTENTION, "default scale always", ("attention, scaled",), set_to("scale", HEAD_DIM**-0.5)),
    Mutant(ATTENTION, "value * 1.001", ("attention",), scaled("value", 1.001)),
    Mutant(ATTENTION, "mask dropped", ("attention, boolean mask", "golden masks"), dropped("mask")),
    Mutant(ATTENTION, "mask inverted", ("attention, boolean mask", "golden masks"),
           lambda given: {"mask": None if given["mask"] is None else ~given["mask"]}),
    Mutant(ATTENTION, "bias dropped", ("attention, bias", "golden masks"), dropped("bias")),
    Mutant(ATTENTION, "bias of another head", ("attention, bias",),
           lambda given: {"bias": given["bias"].roll(1, 1)}),
    Mutant(ATTENTION, "causal ignored", ("attention, causal", "golden masks"), set_to("causal", False)),
    Mutant(ATTENTION, "causal alignment swapped", ("attention, bottom right", "golden masks"), flipped("bottom_right")),
    Mutant(ATTENTION, "lengths ignored", ("attention, lengths", "golden masks"), dropped("seqlens_k")),
    Mutant(ATTENTION, "lengths one short", ("attention, lengths",),
           lambda given: {"seqlens_k": given["seqlens_k"] - 1}),
    Mutant(ATTENTION, "tail key dropped", ("attention", "golden masks"), last_key_out),
    Mutant(ATTENTION, "query heads grouped wrongly", ("attention, grouped heads",),
           lambda given: {"query": given["query"][:, GROUPED]},
           lambda given, results: [result[:, GROUPED] for result in results]),
    Mutant(ATTENTION, "batch entries swapped", ("attention",), None,
           lambda given, results: [result.flip(0) for result in results]),
    Mutant(ATTENTION, "lse off by ln 2", ("attention", "golden masks"), None, plus(1, LN2)),
    Mutant(ATTENTION, "lse in base 2", ("attention", "golden masks"), None, times(1, 1 / LN2)),
    Mutant(ATTENTION, "NaN hidden", ("golden masks",), None,
           lambda given, results: [results[0].nan_to_num(0.0), results[1]]),
    Mutant(ATTENTION, "a row with no key is the mean", ("golden masks",), None, mean_of_empty_rows),
    Mutant(ATTENTION, "excluded values leak", ("golden masks",), None, excluded_values_leak),
    Mutant(ATTENTION, "a large finite bias excludes", ("golden masks",), sentinel),
    Mutant(ATTENTION_GRAD, "grad_query * 1.001", ("attention",), None, times(0, 1.001)),
    Mutant(ATTENTION_GRAD, "grad_key * 1.001", ("attention",), None, times(1, 1.001)),
    Mutant(ATTENTION_GRAD, "grad_value * 1.001", ("attention",), None, times(2, 1.001)),
    Mutant(ATTENTION_GRAD, "grad_query and grad_key swapped", ("attention",), None,
           lambda given, results: [results[1], results[0], *results[2:]]),
    Mutant(ATTENTION_GRAD, "grad_bias missing", ("attention, bias",), None, zero(3)),
    Mutant(ATTENTION_GRAD, "grad_lse ignored", ("attention",), dropped("grad_lse")),
    Mutant(ATTENTION_GRAD, "scale dropped", ("attention",), set_to("scale", 1.0)),
    Mutant(ATTENTION_GRAD, "mask dropped", ("attention, boolean mask",), dropped("mask")),
    Mutant(ATTENTION_GRAD, "causal ignored", ("attention, causal",), set_to("causal", False)),
    Mutant(ATTENTION_GRAD, "causal alignment swapped", ("attention, bottom right",), flipped("bottom_right")),
    Mutant(ATTENTION_GRAD, "lengths ignored", ("attention, lengths",), dropped("seqlens_k")),
    Mutant(ATTENTION, "window one key wider", ("attention, window",),
           lambda given: {"window_left": given["window_left"] + 1}),
    Mutant(ATTENTION, "window one key narrower on the right", ("attention, window",),
           lambda given: {"window_right": given["window_right"] - 1}),
    Mutant(ATTENTION, "softcap * 1.01", ("attention, softcap",), scaled("softcap", 1.01)),
    Mutant(ATTENTION, "ALiBi dropped", ("attention, alibi", "golden masks"), dropped("alibi_slopes")),
    Mutant(ATTENTION, "ALiBi of another head", ("attention, alibi",),
           lambda given: {"alibi_slopes": given["alibi_slopes"].flip(-1)}),
    Mutant(ATTENTION, "sinks dropped", ("attention, sinks", "golden masks"), dropped("sinks")),
    Mutant(ATTENTION, "sinks dropped from the lse", ("attention, sinks",), None,
           lambda given, results: [results[0], results[1] - 0.01]),
    Mutant(ATTENTION, "dropout by another seed", ("attention, dropout",),
           lambda given: {"dropout_seed": given["dropout_seed"] + 1}),
    Mutant(ATTENTION, "dropped weights are not made up for", ("attention, dropout",), None, times(0, 0.6)),
    Mutant(ATTENTION_GRAD, "dropout by another seed", ("attention, dropout",),
           lambda given: {"dropout_seed": given["dropout_seed"] + 1}),
    Mutant(ATTENTION_GRAD, "window ignored", ("attention, window",),
           lambda given: {"window_left": LENGTH, "window_right": LENGTH}),
    Mutant(ATTENTION_GRAD, "softcap ignored", ("attention, softcap",), set_to("softcap", 0.0)),
    Mutant(ATTENTION_GRAD, "gradient of the slopes missing", ("attention, alibi",), None, zero(4)),
    Mutant(ATTENTION_GRAD, "gradient of the sinks missing", ("attention, sinks",), None, zero(5)),
    Mutant(VARLEN, "scale * 1.01", ("varlen",), scaled("scale", 1.01)),
    Mutant(VARLEN, "value * 1.001", ("varlen",), scaled("value", 1.001)),
    Mutant(VARLEN, "causal ignored", ("varlen, causal", "golden masks"), set_to("causal", False)),
    Mutant(VARLEN, "causal alignment swapped", ("varlen, causal", "varlen, top left"), flipped("bottom_right")),
    Mutant(VARLEN, "a key of the next sequence", ("varlen",),
           lambda given: {"cu_seqlens_k": given["cu_seqlens_k"] + torch.tensor([0, 1, 0, 0, 0], dtype=torch.int32)}),
    Mutant(VARLEN, "lse off by ln 2", ("varlen", "golden masks"), None, plus(1, LN2)),
    Mutant(VARLEN, "bias dropped", ("varlen, bias", "golden masks"), dropped("bias")),
    Mutant(VARLEN, "sinks dropped", ("varlen, sinks",), dropped("sinks")),
    Mutant(VARLEN_GRAD, "grad_bias missing", ("varlen, bias",), None, zero(3)),
    Mutant(VARLEN_GRAD, "gradient of the sinks missing", ("varlen, sinks",), None, zero(5)),
    Mutant(VARLEN_GRAD, "grad_key * 1.001", ("varlen",), None, times(1, 1.001)),
    Mutant(VARLEN_GRAD, "grad_lse ignored", ("varlen",), dropped("grad_lse")),
    Mutant(VARLEN_GRAD, "causal ignored", ("varlen, causal",), set_to("causal", False)),
    Mutant(DECODE, "scale * 1.01", ("decode", "decode, pages"), scaled("scale", 1.01)),
    Mutant(DECODE, "lengths one short", ("decode", "decode, pages"),
           lambda given: {"cache_seqlens": given["cache_seqlens"] - 1}),
    Mutant(DECODE, "query heads grouped wrongly", ("decode",), lambda given: {"query": given["query"][:, GROUPED]},
           lambda given, results: [result[:, GROUPED] for result in results]),
    Mutant(DECODE, "pages of another entry", ("decode, pages",),
           lambda given: {"block_table": given["block_table"].flip(0)}),
    Mutant(DECODE, "lse off by ln 2", ("decode",), None, plus(1, LN2)),
    Mutant(DECODE, "output * 1.001", ("decode",), None, times(0, 1.001)),
    Mutant(DECODE, "bias dropped", ("decode, bias",), dropped("bias")),
    Mutant(DECODE, "bias one key off", ("decode, bias",), lambda given: {"bias": given["bias"].roll(1, -1)}),
    Mutant(DECODE, "window one key wider", ("decode, window",),
           lambda given: {"window_left": given["window_left"] + 1}),
    Mutant(DECODE, "softcap * 1.01", ("decode, softcap",), scaled("softcap", 1.01)),
    Mutant(DECODE, "ALiBi dropped", ("decode, alibi",), dropped("alibi_slopes")),
    Mutant(DECODE, "sinks dropped", ("decode, sinks",), dropped("sinks")),
    Mutant("decode_attention_append", "new values not written", ("decode", "decode, pages"), scaled("new_value", 0.0)),
    Mutant("decode_attention_append", "one position late", ("decode", "decode, pages"),
           lambda given: {"cache_seqlens": given["cache_seqlens"] + 1}),
    Mutant(SOFTMAX, "scale * 1.01", ("softmax", "softmax, scaled"), scaled("scale", 1.01)),
    Mutant(SOFTMAX, "weights * 1.001", ("softmax",), None, times(0, 1.001)),
    Mutant(SOFTMAX, "mask dropped", ("softmax, boolean mask", "softmax, float mask"), dropped("mask")),
    Mutant(SOFTMAX, "causal ignored", ("softmax, causal",), set_to("causal", False)),
    Mutant(SOFTMAX, "the other dimension", ("softmax",), lambda given: {"input": given["input"].mT},
           lambda given, results: [results[0].mT]),
    Mutant(SOFTMAX, "tail column dropped", ("softmax",), None,
           lambda given, results: [torch.cat((results[0][..., :-1], 0 * results[0][..., -1:]), -1)]),
    Mutant("masked_softmax_backward", "scale dropped", ("softmax, scaled",), set_to("scale", 1.0)),
    Mutant("masked_softmax_backward", "row sum not subtracted", ("softmax",), None,
           lambda given, results: [given["grad_output"] * given["output"] * given["scale"]]),
    Mutant("masked_softmax_mask_backward", "missing", ("softmax, float mask",), None, zero(0)),
    Mutant("masked_softmax_mask_backward", "mean instead of sum", ("softmax, float mask",), None, times(0, 1 / BATCH)),
    Mutant(NORM, "eps wrong", ("layer_norm",), set_to("eps", 1e-5)),
    Mutant(NORM, "eps outside the root", ("layer_norm",), lambda given: {"eps": given["eps"] ** 2}),
    Mutant(NORM, "weight ignored", ("layer_norm",), dropped("weight")),
    Mutant(NORM, "weight * 1.001", ("layer_norm",), scaled("weight", 1.001)),
    Mutant(NORM, "bias ignored", ("layer_norm",), dropped("bias")),
    Mutant(NORM, "unbiased variance", ("layer_norm",),
           lambda given: {"weight": given["weight"] * math.sqrt(1 - 1 / LENGTH)}),
    Mutant(NORM, "tail column kept", ("layer_norm",), None,
           lambda given, results: [torch.cat((results[0][..., :-1], given["input"][..., -1:]), -1), *results[1:]]),
    Mutant(NORM_GRAD, "eps wrong", ("layer_norm", "add_layer_norm"), set_to("eps", 1e-5)),
    Mutant(NORM_GRAD, "weight ignored", ("layer_norm",), lambda given: {"weight": torch.ones_like(given["weight"])}),
    Mutant(NORM_GRAD, "grad_input * 1.001", ("layer_norm",), None, times(0, 1.001)),
    Mutant(NORM_GRAD, "grad_weight missing", ("layer_norm",), None, zero(1)),
    Mutant(NORM_GRAD, "grad_bias of the first row alone", ("layer_norm",), None,
           lambda given, results: [*results[:2], given["grad_output"][0]]),
    Mutant(NORM_GRAD, "grad_sum ignored", ("add_layer_norm",), dropped("grad_sum")),
    Mutant(ADD_NORM, "residual dropped", ("add_layer_norm",), scaled("residual", 0.0)),
    Mutant(ADD_NORM, "residual dropped from the sum alone", ("add_layer_norm",), None,
           lambda given, results: [results[0], given["input"].clone(), *results[2:]]),
    Mutant(ADD_NORM, "eps wrong", ("add_layer_norm",), set_to("eps", 1e-5)),
    Mutant(ADD_NORM_INTO, "residual dropped", ("add_layer_norm_into",), scaled("residual", 0.0)),
    Mutant(ADD_NORM_INTO, "eps wrong", ("add_layer_norm_into",), set_to("eps", 1e-5)),
    Mutant(ADD_NORM_INTO, "bias dropped", ("add_layer_norm_into",), dropped("bias")),
    Mutant(RMS, "eps wrong", ("rms_norm",), set_to("eps", 1e-5)),
    Mutant(RMS, "weight ignored", ("rms_norm",), dropped("weight")),
    Mutant(RMS, "output * 1.001", ("rms_norm",), None, times(0, 1.001)),
    Mutant(RMS, "mean subtracted", ("rms_norm",),
           lambda given: {"input": given["input"] - given["input"].mean(-1, keepdim=True)}),
    Mutant(ADD_RMS, "eps wrong", ("add_rms_norm",), set_to("eps", 1e-5)),
    Mutant(ADD_RMS, "residual dropped", ("add_rms_norm",), scaled("residual", 0.0)),
    Mutant(ADD_RMS, "residual dropped from the sum alone", ("add_rms_norm",), None,
           lambda given, results: [results[0], given["input"].clone(), *results[2:]]),
    Mutant(RMS_GRAD, "eps wrong", ("rms_norm", "add_rms_norm"), set_to("eps", 1e-5)),
    Mutant(RMS_GRAD, "weight ignored", ("rms_norm",), lambda given: {"weight": torch.ones_like(given["weight"])}),
    Mutant(RMS_GRAD, "grad_weight missing", ("rms_norm",), None, zero(1)),
    Mutant(RMS_GRAD, "grad_sum ignored", ("add_rms_norm",), dropped("grad_sum")),
    Mutant("rotary_forward", "rotated the other way", ("rotary", "rotary, interleaved"), flipped("inverse")),
    Mutant("rotary_forward", "the gradient is not rotated back", ("rotary",), set_to("inverse", False)),
    Mutant("rotary_forward", "pairs taken the other way", ("rotary", "rotary, interleaved"), flipped("interleaved")),
    Mutant("rotary_forward", "cos * 1.001", ("rotary",), scaled("cos", 1.001)),
    Mutant("rotary_forward", "a column too few copied", ("rotary",), None,
           lambda given, results: [torch.cat((results[0][..., :-1], 0 * results[0][..., -1:]), -1)]),
    Mutant("rotary_backward", "pairs taken the other way", ("rotary", "rotary, interleaved"), flipped("interleaved")),
    Mutant("rotary_backward", "grad_cos missing", ("rotary",), None, zero(0)),
    Mutant("rotary_backward", "grad_sin with the wrong sign", ("rotary",), None, times(1, -1.0)),
    Mutant("gelu_forward", "form swapped", ("gelu", "gelu, tanh"), flipped("tanh")),
    Mutant("gelu_forward", "bias dropped", ("gelu",), dropped("bias")),
    Mutant("gelu_forward", "* 1.0001", ("gelu", "gelu, tanh"), None, times(0, 1.0001)),
    Mutant("gelu_forward", "tail column kept", ("gelu",), None,
           lambda given, results: [torch.cat((results[0][..., :-1], given["input"][..., -1:]), -1)]),
    Mutant("gelu_backward", "form swapped", ("gelu", "gelu, tanh"), flipped("tanh")),
    Mutant("gelu_backward", "bias dropped", ("gelu",), lambda given: {"bias": torch.zeros_like(given["bias"])}),
    Mutant("gelu_backward", "grad_bias missing", ("gelu",), None, zero(1)),
    Mutant("gelu_backward", "grad_bias a mean", ("gelu",), None, times(1, 1 / 9)),
    Mutant("gelu_backward", "grad_input * 1.0001", ("gelu", "gelu, tanh"), None, times(0, 1.0001)),
)  # fmt: skip


@pytest.mark.parametrize("name", CHECKS)
def test_every_check_is_green(name):
    CHECKS[name]()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.op}: {mutant.what}")
def test_mutants_of_the_ops_are_seen(mutant):
    for name in mutant.seen_by:
        with pytest.raises(AssertionError), Mutation(mutant):
            CHECKS[name]()


def test_every_op_has_mutants():
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    ops = {name.removeprefix("transfuse::") for name in registered if name.startswith("transfuse::")}
    assert ops <= {mutant.op for mutant in MUTANTS}
    assert {name for mutant in MUTANTS for name in mutant.seen_by} == set(CHECKS), "a check that kills nothing"


# ---- mistakes in the sources: make test FULL=1 ----

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / "build" / "mutants"


class Patch(NamedTuple):
    """One mistake in one file, and the tests (pytest's arguments) of which one must fail."""

    file: str
    what: str
    old: str
    new: str
    tests: str


KERNELS, PAGES = "kernels/cpu", "python/transfuse"
PATCHES = (
    Patch(f"{KERNELS}/gelu_far.h", "tail cut at 6", "constexpr float cut = 18.0f;", "constexpr float cut = 6.0f;",
          "test_gelu.py"),
    Patch(f"{KERNELS}/gelu_segments.h", "polynomial used beyond its interval", "segments_end = 63.0f / 16;",
          "segments_end = 75.0f / 16;", "test_gelu.py"),
    Patch(f"{KERNELS}/gelu.cpp", "a gathered lane is never written", "for (int64_t lane = 0; lane < n; ++lane) results",
          "for (int64_t lane = 1; lane < n; ++lane) results", "test_gelu.py"),
    Patch(f"{KERNELS}/gelu.cpp", "a 16-bit row's end one short", "for (int64_t k = 0; k < n; ++k) results[i + k]",
          "for (int64_t k = 1; k < n; ++k) results[i + k]", "test_gelu.py"),
    Patch(f"{KERNELS}/gelu.cpp", "gradient of the wrong side",
          "return grad_output * select(x < zero(), h, set1(1.0f) - h);",
          "return grad_output * select(zero() < x, h, set1(1.0f) - h);", "test_gelu.py"),
    Patch(f"{KERNELS}/masked_softmax.cpp", "causal row one key short", "i % p.queries + p.causal_offset + 1;",
          "i % p.queries + p.causal_offset;", "test_masked_softmax.py"),
    Patch(f"{KERNELS}/masked_softmax.cpp", "causal tail not written",
          "fill_zero(rows[r].output, rows[r].length, p.keys);",
          "fill_zero(rows[r].output, rows[r].length, rows[r].length);",
          "test_masked_softmax.py"),
    Patch(f"{KERNELS}/masked_softmax.cpp", "0 * inf of an excluded key", "? sum : sum_of_products<true>(row);",
          "? sum : sum;", "test_masked_softmax.py"),
    Patch(f"{KERNELS}/norm_rows.h", "unbiased variance", "variance = mean_square - offset * offset;",
          "variance = (mean_square - offset * offset) * cols / (cols - 1);", "test_layer_norm.py"),
    Patch(f"{KERNELS}/norm_rows.h", "eps outside the root", "1 / __builtin_sqrt(variance + eps)};",
          "1 / (__builtin_sqrt(variance) + eps)};", "test_rms_norm.py"),
    Patch(f"{KERNELS}/norm_rows.h", "grad_bias of the last row of a group", "bias_sum = bias_sum + grad;",
          "bias_sum = grad;", "test_layer_norm.py"),
    Patch(f"{KERNELS}/norm_rows.h", "grad_sum past the norm dropped",
          "grad_sum ? load_as<V>(grad_sum + at, n) : splat<V>(0);", "splat<V>(0);", "test_rms_norm.py"),
    Patch(f"{KERNELS}/attention.cpp", "query heads grouped wrongly", "kv_head = head / group;",
          "kv_head = head % p.num_kv_heads;", "test_attention.py"),
    Patch(f"{KERNELS}/attention.cpp", "no rescaling when the maximum rises",
          "select(same, fill(1), weight(before - maximum));", "fill(1);", "test_attention.py"),
    Patch(f"{KERNELS}/attention.cpp", "0 * NaN of an excluded value", "if (ordinary || !excludes)",
          "if (ordinary || !excludes || excludes)", "test_attention.py"),
    Patch(f"{KERNELS}/attention.cpp", "sink left out of the division", "    sums[i] = static_cast<real>(total);\n", "",
          "test_attention_features.py"),
    Patch(f"{KERNELS}/attention_scores.h", "window and causality one key short",
          "diagonal(p, s) + p.window_right + 1, s.seqlen_k", "diagonal(p, s) + p.window_right, s.seqlen_k",
          "test_attention.py"),
    Patch(f"{KERNELS}/attention_scores.h", "ALiBi of a signed distance", "? fnma(slope, abs(distance), score)",
          "? fnma(slope, distance, score)", "test_attention_features.py"),
    Patch(f"{KERNELS}/attention_backward.cpp", "delta not subtracted",
          "w * (load_row(grad_scores + j * panel) - delta);", "w * load_row(grad_scores + j * panel);",
          "test_attention.py"),
    Patch(f"{KERNELS}/attention_backward.cpp", "grad_lse ignored",
          "delta = delta - load_statistic(t, t.params.grad_lse, r);", "delta = delta - fill(0);", "test_attention.py"),
    Patch(f"{KERNELS}/attention_dropout.h", "half the probability", "__builtin_ceil(dropout.probability * 0x1p32);",
          "__builtin_ceil(dropout.probability * 0x1p31);", "test_attention_dropout.py"),
    Patch(f"{KERNELS}/philox.h", "seven rounds", "constexpr int rounds = 10;", "constexpr int rounds = 7;",
          "test_attention_dropout.py"),
    Patch(f"{KERNELS}/attention_decode.cpp", "every query at the last position",
          "p.lengths[t.batch] - p.seqlen_q + row.query;", "p.lengths[t.batch] - 1;",
          "test_decode_attention.py -k reference"),
    Patch(f"{KERNELS}/attention_decode.cpp", "chunks folded without the new maximum",
          "state.sum[r] * f.first + partial.sum[r] * f.second;", "state.sum[r] + partial.sum[r] * f.second;",
          "test_decode_attention.py -k reference"),
    Patch(f"{KERNELS}/rotary.cpp", "never inverse", "const wide sine = p.inverse ? -s : s;", "const wide sine = s;",
          "test_rotary.py"),
    Patch(f"{KERNELS}/rotary.cpp", "last column not copied", "for (int64_t c = 2 * p.pairs; c < p.head_dim; ++c)",
          "for (int64_t c = 2 * p.pairs; c < p.head_dim - 1; ++c)", "test_rotary.py"),
    Patch(f"{PAGES}/ops/attention.py", "default scale 1", "scale = head_dim**-0.5 if", "scale = 1.0 if",
          "test_attention.py"),
    Patch(f"{PAGES}/nn/transformer.py", "residual of the norm", "return x + self._ff_block(normed)",
          "return normed + self._ff_block(normed)", "test_transformer.py"),
    Patch(f"{PAGES}/nn/transformer.py", "bias of linear1 dropped", "form, bias=first.bias)", "form)",
          "test_transformer.py"),
    Patch(f"{PAGES}/nn/transformer.py", "tanh form taken for erf", "return activation.approximate if",
          'return "none" if', "test_transformer.py"),
    Patch(f"{PAGES}/nn/transformer.py", "padding ignored", '"key_padding_mask": src_key_padding_mask, "is',
          '"key_padding_mask": None, "is', "test_transformer.py"),
    Patch(f"{PAGES}/nn/transformer.py", "a hook is not heard", "torch.nn.LayerNorm) and unhooked(norm)",
          "torch.nn.LayerNorm)", "test_transformer.py"),
    Patch(f"{PAGES}/nn/attention.py", "padding kept instead of ignored", "keep = given.logical_not()",
          "keep = given.clone()", "test_attention_module.py"),
)  # fmt: skip


def copy_sources():
    """Brings TREE's sources to ROOT's, touching only what differs, so that Ninja compiles only that."""
    for name in ("CMakeLists.txt", "setup.py", "csrc", "kernels", "python"):
        files = {}
        for root in (ROOT, TREE):
            found = [root / name] if (root / name).is_file() else (root / name).rglob("*")
            sources = (path for path in found if path.is_file() and path.suffix not in (".so", ".pyc"))
            files[root] = {path.relative_to(root) for path in sources}
        for path in files[TREE] - files[ROOT]:
            (TREE / path).unlink()
        for path in files[ROOT]:
            text = (ROOT / path).read_bytes()
            if path not in files[TREE] or (TREE / path).read_bytes() != text:
                (TREE / path).parent.mkdir(parents=True, exist_ok=True)
                (TREE / path).write_bytes(text)


def environment(**more):
    """Without the settings of whoever runs the tests: these would choose other kernels than those that were built."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRANSFUSE_")}
    return {**kept, "PATH": f"{Path(sys.executable).parent}:{kept['PATH']}", **more}


def build():
    """Compiles TREE for one ISA level, the widest of this machine."""
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=TREE, capture_output=True, text=True,
        env=environment(TRANSFUSE_ISA_LEVELS=_C.cpu_isa_levels()[-1]),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def run_tests(tests):
    """pytest's exit code on TREE's package: 0 all green, 1 some red. Anything else is an error of this test."""
    where = "import transfuse; print(transfuse.__file__)"
    paths = environment(PYTHONPATH=os.pathsep.join([str(TREE / "python"), os.environ.get("PYTHONPATH", "")]))
    found = subprocess.run([sys.executable, "-c", where], cwd=TREE, capture_output=True, text=True, env=paths).stdout
    assert found.startswith(str(TREE)), f"the copy is not what is imported, but {found}"
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", *tests.split()]
    done = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True, env=paths, timeout=900)
    assert done.returncode in (0, 1), done.stdout[-3000:] + done.stderr[-3000:]
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def tree():
    """The copy, built; every test that a mutant must turn red is green on it."""
    copy_sources()
    build()
    for tests in sorted({patch.tests for patch in PATCHES}):
        code, output = run_tests(tests)
        assert code == 0, output[-3000:]


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: f"{patch.file}: {patch.what}")
def test_patches_apply(patch):
    """Each text stands exactly once in its file: a mistake that is put nowhere proves nothing."""
    assert (ROOT / patch.file).read_text().count(patch.old) == 1 and patch.old != patch.new


@pytest.mark.slow
@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: f"{patch.file}: {patch.what}")
def test_mutants_of_the_sources_are_seen(patch, tree):
    path, text = TREE / patch.file, (ROOT / patch.file).read_text()
    try:
        path.write_text(text.replace(patch.old, patch.new))
        build()
        code, _ = run_tests(patch.tests)
        assert code == 1, f"{patch.tests} is green although {patch.what}"
    finally:
        path.write_text(text)
