"""A suite is trusted after it has killed mutants: each mistake here must turn a check red that is green without it.

Mistakes are put between the Python pages and the compiled ops: one row per mistake, which raw op it touches, what it
does to arguments or results (by their names in the schema), and the checks that must see it. The checks are those of
the house: parity with the float64 reference in the budgets of transfuse.testing, and the golden masks. Mistakes within the sources: test_mutants_of_sources.py.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import transfuse
from transfuse import use_backend
from transfuse.ops.encoder_layer import Sequences, encoder_layer
from transfuse.ops.packed_linear import pack, packed_linear
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


def linear(approximate=None):
    def check():
        x, weight, bias = draw(9, LENGTH, seed=1), draw(40, LENGTH, seed=2), draw(40, seed=3)
        expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
        if approximate:
            expected = torch.nn.functional.gelu(expected, approximate=approximate)
        assert_close(packed_linear(x, pack(weight), bias, 40, approximate), expected, num_terms=LENGTH)

    return check


def layer(sequences):
    """An encoder layer of two heads, written out in float64."""

    def check():
        hidden = draw(LENGTH, 16, seed=1)
        weights = [draw(*shape, seed=i, scale=0.4) for i, shape in enumerate(((48, 16), (16, 16), (40, 16), (16, 40)))]
        biases = [draw(len(weight), seed=10 + i) for i, weight in enumerate(weights)]
        norms = [draw(16, seed=20 + i, shift=1.0) for i in range(4)]
        packed = [pack(weight) for weight in weights]
        actual = encoder_layer(
            hidden, sequences, 2, 8, 0.3, packed[0], biases[0], packed[1], biases[1], *norms[:2], 0.3, packed[2],
            biases[2], packed[3], biases[3], *norms[2:], 0.2, 40, False,
        )
        functional, (x, *rest) = torch.nn.functional, (t.double() for t in (hidden, *weights, *biases, *norms))
        w, b, n = rest[:4], rest[4:8], rest[8:]
        query, key, value = functional.linear(x, w[0], b[0]).view(LENGTH, 3, 2, 8).permute(1, 2, 0, 3)
        scores = 0.3 * query @ key.mT
        if sequences.mask is not None:
            mask = sequences.mask[0]
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
        else:
            of_token = torch.bucketize(torch.arange(LENGTH), sequences.cu_seqlens[1:], right=True)
            scores = scores.masked_fill(of_token[:, None] != of_token, -torch.inf)
        context = (scores.softmax(-1) @ value).transpose(0, 1).reshape(LENGTH, 16)
        x = functional.layer_norm(functional.linear(context, w[1], b[1]) + x, (16,), n[0], n[1], 0.3)
        wide = functional.gelu(functional.linear(x, w[2], b[2]))
        x = functional.layer_norm(functional.linear(wide, w[3], b[3]) + x, (16,), n[2], n[3], 0.2)
        assert_close(actual, x, num_terms=4 * LENGTH)

    return check


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
    "packed_linear": linear(),
    "packed_linear, gelu": linear("none"),
    "packed_linear, tanh": linear("tanh"),
    "encoder_layer, packed": layer(Sequences(torch.tensor([0, 5, 6, LENGTH]), 3, 15)),
    "encoder_layer, boolean mask": layer(Sequences(None, 1, LENGTH, KEEP[:1])),
    "encoder_layer, float mask": layer(Sequences(None, 1, LENGTH, draw(1, 1, LENGTH, LENGTH, seed=5))),
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
LINEAR, LINEAR_GELU, LAYER = "packed_linear", "packed_linear_gelu", "encoder_layer"
LAYERS = tuple(f"encoder_layer, {kind}" for kind in ("packed", "boolean mask", "float mask"))

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
    Mutant(LINEAR, "bias dropped", ("packed_linear",), dropped("bias")),
    Mutant(LINEAR, "output * 1.001", ("packed_linear",), None, times(0, 1.001)),
    Mutant(LINEAR, "last input channel dropped", ("packed_linear",),
           lambda given: {"input": torch.cat((given["input"][:, :-1], 0 * given["input"][:, -1:]), 1)}),
    Mutant(LINEAR_GELU, "the other form", ("packed_linear, gelu", "packed_linear, tanh"), flipped("tanh")),
    Mutant(LINEAR_GELU, "bias dropped", ("packed_linear, gelu",), dropped("bias")),
    Mutant(LAYER, "scale * 1.01", LAYERS, scaled("scale", 1.01)),
    Mutant(LAYER, "values * 1.001", LAYERS, scaled("context_weight", 1.001)),
    Mutant(LAYER, "boolean mask dropped", LAYERS[1:2], dropped("mask")),
    Mutant(LAYER, "float mask dropped", LAYERS[2:], dropped("bias")),
    Mutant(LAYER, "sequences run together", LAYERS[:1],
           lambda given: {"cu_seqlens": given["cu_seqlens"][[0, -1]], "max_seqlen": LENGTH}),
    Mutant(LAYER, "bias of the context dropped", LAYERS, dropped("context_bias")),
    Mutant(LAYER, "bias of the last product dropped", LAYERS, dropped("narrow_bias")),
    Mutant(LAYER, "norms share an eps", LAYERS, lambda given: {"output_norm_eps": given["attention_norm_eps"]}),
    Mutant(LAYER, "norms share a weight", LAYERS, lambda given: {"output_norm_weight": given["attention_norm_weight"]}),
    Mutant(LAYER, "tanh form taken for erf", LAYERS, flipped("tanh")),
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
