"""The checks of Triton's attention are trusted after they have killed mutants: one mistake each in the kernels' source.

A mutant is one replacement in one file of kernels/triton; the mutated copy of the folder is imported beside the
original, and its functions are put where the pages look for raw ops.
"""

import importlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from feature_cases import compare

import transfuse
from transfuse.raw_ops import RAW_OPS
from transfuse.testing import assert_close, draw

KERNELS = Path(__file__).parents[2] / "kernels" / "triton"
FILES_OF_OPS = {
    "attention": ("attention_forward", "varlen_attention_forward"),
    "attention_backward": ("attention_backward", "varlen_attention_backward"),
    "attention_decode": ("decode_attention_append", "decode_attention_forward"),
}

# ---- checks: each passes on the kernels as they are ----


def features(**settings):
    """One case of feature_cases, with nothing in use but these."""
    plain = {
        "layout": "dense", "heads": (4, 2), "head_dims": (16, 16), "lengths": (20, 70), "causal": False, "window": None,
        "softcap": None, "alibi": None, "sinks": False, "bias": None, "mask": None, "lengths_k": False, "dropout": 0.0,
        "scale": None, "lse": False,
    }  # fmt: skip
    return lambda: compare(plain | settings, torch.float32)


def poisoned():
    """NaN in keys and values that no query keeps."""
    tensors = [draw(1, 2, length, 16, seed=i) for i, length in enumerate((20, 70, 70))]
    keep = torch.ones(20, 70, dtype=torch.bool)
    keep[:, [0, 33, 69]] = False
    for tensor in tensors[1:]:
        tensor[:, :, [0, 33, 69]] = torch.nan
    leaves = [tensor.requires_grad_() for tensor in tensors]
    with transfuse.use_backend("triton"):
        output = transfuse.scaled_dot_product_attention(*leaves, keep)
        grads = torch.autograd.grad(output, leaves, torch.ones_like(output))
    assert all(tensor.isfinite().all() for tensor in (output, *grads))


def poisoned_by_a_query():
    """A query of NaN: keys that it does not see have gradients as ever, those that it sees have none."""
    leaves = [draw(1, 2, 70, 16, seed=i) for i in range(3)]
    leaves[0][:, :, 3] = torch.nan
    leaves = [tensor.requires_grad_() for tensor in leaves]
    with transfuse.use_backend("triton"):
        output = transfuse.scaled_dot_product_attention(*leaves, is_causal=True)
        of_query, *of_keys = torch.autograd.grad(output, leaves, torch.ones_like(output))
    rows = torch.arange(70) == 3
    assert of_query.isfinite().all(-1).eq(~rows).all()
    assert all(grad[:, :, 4:].isfinite().all() and grad[:, :, :4].isnan().all() for grad in of_keys)


def poisoned_by_a_bias():
    """NaN in the one key that a bias excludes, one query to a program: dropout leaves some of them no weight at all."""
    query, key, value = (draw(8, 1, length, 16, seed=i) for i, length in enumerate((1, 64, 64)))
    key[:, :, 33] = torch.nan
    bias = torch.zeros(1, 64)
    bias[:, 33] = -torch.inf
    torch.manual_seed(3)
    with transfuse.use_backend("triton"):
        output = transfuse.scaled_dot_product_attention(query, key, value, bias, dropout_p=0.99)
    assert output.isfinite().all()


def padded():
    """NaN in keys and values beyond the sequence's length."""
    query, key, value = (draw(1, 1, length, 16, seed=i) for i, length in enumerate((20, 70, 70)))
    key[:, :, 40:] = value[:, :, 40:] = torch.nan
    with transfuse.use_backend("triton"):
        output = transfuse.scaled_dot_product_attention(query, key, value, seqlens_k=torch.tensor([40]))
    assert output.isfinite().all()


def saturated():
    """Scores of 1e12, all equal in a row: weights of 1 / 33."""
    query = (133120.0 + 1000 * torch.arange(20.0)).view(1, 1, 20, 1).expand(1, 1, 20, 24).clone().requires_grad_()
    key = torch.full((1, 1, 33, 24), 133120.0)
    value = draw(1, 1, 33, 16, seed=2).requires_grad_()
    with transfuse.use_backend("triton"):
        output = transfuse.scaled_dot_product_attention(query, key, value)
        (grad_value,) = torch.autograd.grad(output, value, torch.ones_like(output))
    assert_close(output, value.mean(2, keepdim=True).expand_as(output), 33, "output")
    assert_close(grad_value, torch.full_like(grad_value, 20 / 33), 33, "value", slack=4.0)


def decoding():
    batch, heads, kv_heads, dim, block_size, pages = 2, 4, 2, 16, 16, 20
    query, *new = (draw(batch, h, 2, dim, seed=i) for i, h in enumerate((heads, kv_heads, kv_heads)))
    table = torch.arange(2 * pages).flip(0).view(2, pages)
    lengths = torch.tensor([300, 40])
    results = []
    for backend in ("triton", "reference"):
        caches = [draw(2 * pages, block_size, kv_heads, dim, seed=5 + i) for i in range(2)]
        with transfuse.use_backend(backend):
            output, lse = transfuse.decode_attention(
                query, *caches, lengths, new_key=new[0], new_value=new[1], block_table=table, window=(290, None),
                return_lse=True,
            )
        results.append((output, lse, *caches))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, 512)


CHECKS: dict[str, Callable] = {
    "plain": features(lse=True),
    "causal": features(causal="bottom_right"),
    "causal, many rows": features(causal="top_left", lengths=(70, 70)),
    "window": features(window=(9, 4)),
    "softcap": features(softcap=1.0),
    "alibi": features(alibi="batch"),
    "sinks": features(sinks=True),
    "bias": features(bias="heads"),
    "whole bias": features(bias="full"),
    "rows of bias": features(bias="rows"),
    "mask": features(mask="pairs"),
    "lengths": features(lengths_k=True),
    "packed": features(layout="packed", causal="bottom_right"),
    "packed, whole blocks": features(layout="packed", lengths=(20, 140)),
    "dropout": features(dropout=0.5),
    "poisoned": poisoned,
    "poisoned by a query": poisoned_by_a_query,
    "poisoned by a bias": poisoned_by_a_bias,
    "padded": padded,
    "saturated": saturated,
    "decoding": decoding,
}


class Mutant(NamedTuple):
    what: str
    file: str
    old: str
    new: str
    seen_by: str


MUTANTS = (
    Mutant("scale * 1.01", "attention_problem", "else abs(scale)", "else abs(scale) * 1.01", "plain"),
    Mutant("output * 1.001", "attention_scores",
           "return result / divisor",
           "return 1.001 * result / divisor", "plain"),
    Mutant("output not brought to the new maximum", "attention",
           "output = output * factor[:, None]",
           "pass", "plain"),
    Mutant("sum not brought to the new maximum", "attention", "total = total * factor", "total = total", "plain"),
    Mutant("tail column kept", "attention_scores",
           "keep = (columns < s.len_k)",
           "keep = (columns <= s.len_k)", "plain"),
    Mutant("head of another group", "attention",
           "Matrix(p.key, entry, head // p.group",
           "Matrix(p.key, entry, head % 2", "plain"),
    Mutant("gradient of lse forgotten", "attention_backward",
           "of_lse = load_statistic(grad_lse",
           "of_lse = 0.0 * load_statistic(grad_lse", "plain"),
    Mutant("dK without the scale", "attention_backward", "key_result * scale", "key_result", "plain"),
    Mutant("one head of the group", "attention_backward",
           "for head in range(kv_head * p.group, (kv_head + 1) * p.group):\n            matrices",
           "for head in range(kv_head * p.group, kv_head * p.group + 1):\n            matrices", "plain"),
    Mutant("diagonal excluded", "attention_scores",
           "columns <= rows + (s.diagonal",
           "columns < rows + (s.diagonal", "causal"),
    Mutant("alignment ignored", "attention_scores", "diagonal = len_k - len_q", "diagonal = len_k - len_k", "causal"),
    Mutant("rows begin a block late", "attention_scores",
           "start = clamp(key - s.diagonal - p.window_right, 0, s.len_q) //",
           "start = clamp(key + BLOCK_M - s.diagonal - p.window_right, 0, s.len_q) //", "causal, many rows"),
    Mutant("window a key short", "attention_scores",
           "columns >= rows + (s.diagonal",
           "columns > rows + (s.diagonal", "window"),
    Mutant("softcap's slope forgotten in dQ", "attention_backward",
           "grad_scores = grad_scores * cap_slope\n            weights",
           "grad_scores = grad_scores\n            weights", "softcap"),
    Mutant("softcap's slope forgotten in dK", "attention_backward",
           "grad_scores = grad_scores * cap_slope\n            if",
           "grad_scores = grad_scores\n            if", "softcap"),
    Mutant("slope's sign", "attention_scores", "score - alibi_slope", "score + alibi_slope", "alibi"),
    Mutant("gradient of the slope unsummed", "attention_backward",
           "for i in range(count):",
           "for i in range(1):", "sinks"),
    Mutant("sink left out of the sum", "attention_scores",
           "total = total * factor + tl.exp(sink - reference)",
           "total = total * factor", "sinks"),
    Mutant("sink's gradient without delta's sign", "attention_backward",
           "tl.store(sink_parts + part, -tl.sum",
           "tl.store(sink_parts + part, tl.sum", "sinks"),
    Mutant("bias's gradient of one sequence", "attention_backward",
           "for i in range(batches_each):",
           "for i in range(1):", "bias"),
    Mutant("bias's gradient of P * dP", "attention_backward",
           "tl.where(keep, weights * (grad_weights - delta[:, None]), 0.0)",
           "tl.where(keep, weights * grad_weights, 0.0)", "bias"),
    Mutant("whole bias's gradient transposed", "attention_backward",
           "rows.to(tl.int64)[None, :] * grad_bias.row",
           "rows.to(tl.int64)[None, :] * grad_bias.col", "whole bias"),
    Mutant("columns of the bias not summed", "attention_backward",
           "total = tl.sum(total, 1)[:, None]",
           "total = tl.max(total, 1)[:, None]", "rows of bias"),
    Mutant("mask ignored", "attention_scores", "mask=inside, other=0) != 0)", "mask=inside, other=0) >= 0)", "mask"),
    Mutant("lengths ignored", "attention_scores",
           "len_k = clamp(tl.load(p.seqlens_k + index).to(tl.int64), 0,",
           "len_k = tl.maximum(tl.load(p.seqlens_k + index).to(tl.int64), 0 +", "lengths"),
    Mutant("first row of a sequence", "attention_scores", "+ first_row * t.row", "+ 0 * first_row", "packed"),
    Mutant("words of a draw in another order", "attention_scores",
           "tl.join(tl.join(w0, w2), tl.join(w1, w3))",
           "tl.join(tl.join(w0, w1), tl.join(w2, w3))", "dropout"),
    Mutant("kept weights not scaled", "attention_scores",
           "result = result * p.dropout_scale",
           "result = result", "dropout"),
    Mutant("excluded values leak", "attention", "if not (all_finite(result) &", "if False & (all_finite(result) &",
           "poisoned"),
    Mutant("excluded keys leak where dropout hides them", "attention",
           "& all_finite(total[:, None])",
           "", "poisoned by a bias"),
    Mutant("a bias of -inf forgotten by every walk", "attention_scores",
           "keep = keep & (bias != float(\"-inf\"))",
           "pass", "poisoned by a bias"),
    Mutant("a mask that no walk over whole blocks selects by", "attention_scores",
           "SELECTS: tl.constexpr = EDGES or (p.mask is not None)",
           "SELECTS: tl.constexpr = EDGES", "mask"),
    Mutant("a descriptor's head", "attention_scores", "at = [m.batch, m.head,", "at = [m.batch, 0,", "plain"),
    Mutant("a descriptor's first row", "attention_scores",
           "(m.first_row + row).to(tl.int32)",
           "(0 * m.first_row + row).to(tl.int32)", "packed, whole blocks"),
    Mutant("a descriptor of what does not exist", "attention_scores",
           "if WHOLE and m.tiles is not None:",
           "if m.tiles is not None:", "padded"),
    Mutant("the bias not added where a product is scaled", "attention_scores",
           "score = fma(product, p.scale, bias)",
           "score = product * p.scale", "bias"),
    Mutant("excluded keys leak into dQ", "attention_backward", "if not all_finite(result):", "if False:", "poisoned"),
    Mutant("no key marked for the walk over kept pairs", "attention_backward", "tl.where(finite, 0, 1)",
           "tl.where(finite, 0, 0)", "poisoned by a query"),
    Mutant("weights not divided by their sum", "attention_backward",
           "- reference[None, :], EXACT) * normaliser[None, :]",
           "- reference[None, :], EXACT)", "saturated"),
    Mutant("lse's rounding in the exponent", "attention_backward",
           "reference = tl.where(huge, maximum, reference)",
           "pass", "saturated"),
    Mutant("a page's rows", "attention_decode", "(keys - page * cache.block_size) * t.row", "keys * 0", "decoding"),
    Mutant("new keys not counted", "attention_decode", "before + cache.num_new", "before", "decoding"),
    Mutant("the first chunk alone", "attention_decode", "(length + CHUNK - 1) // CHUNK):", "1):", "decoding"),
    Mutant("partial sums not brought to one maximum", "attention_decode",
           "tl.load(sums + at) * gained",
           "tl.load(sums + at)", "decoding"),
)  # fmt: skip


@pytest.fixture
def mutated(tmp_path, monkeypatch):
    """Puts a mutant's functions where the pages look for raw ops; everything is as before afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    for page in ("attention", "varlen_attention", "decode_attention"):
        importlib.import_module(f"transfuse.ops.{page}")  # declares its raw ops, once

    def put(mutant):
        name = "mutated_kernels"
        shutil.copytree(KERNELS, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        source = tmp_path / name / f"{mutant.file}.py"
        text = source.read_text()
        assert text.count(mutant.old) == 1, f"{mutant.old!r} stands {text.count(mutant.old)} times"
        source.write_text(text.replace(mutant.old, mutant.new))
        for module in [module for module in sys.modules if module.partition(".")[0] == name]:
            del sys.modules[module]
        importlib.invalidate_caches()
        for file, ops in FILES_OF_OPS.items():
            module = importlib.import_module(f"{name}.{file}")
            for op in ops:
                monkeypatch.setitem(RAW_OPS["triton"], op, getattr(module, op))

    return put


@pytest.mark.parametrize("name", CHECKS)
def test_every_check_is_green(name):
    CHECKS[name]()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.what)
def test_mutants_are_seen(mutant, mutated):
    mutated(mutant)
    with pytest.raises(AssertionError):
        CHECKS[mutant.seen_by]()


def test_every_check_kills():
    assert {mutant.seen_by for mutant in MUTANTS} == set(CHECKS)
