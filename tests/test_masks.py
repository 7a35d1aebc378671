"""CONTRACT section 1, case by case: tests/data/masks.json holds inputs and the results worked out by hand."""

import json
import math
from pathlib import Path

import pytest
import torch

from transfuse import scaled_dot_product_attention, varlen_attention
from transfuse.dispatch import explain, use_backend
from transfuse.testing import assert_close

CASES = json.loads((Path(__file__).parent / "data" / "masks.json").read_text())
BACKENDS = ("cpu", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
in_every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=("float32", "bfloat16", "float16", "float64"))


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors: waking a second thread costs more than the work. Tests about threads set their own count."""
    torch.set_num_threads(1)


def number(text):
    """A JSON number or one of the words the data file allows."""
    if not isinstance(text, str):
        return float(text)
    if text == "finfo.min":
        return torch.finfo(torch.float32).min
    if text.startswith("log("):
        return math.log(float(text[4:-1]))
    return float(text)


def tensor(nested, dtype):
    """Nested lists of numbers or of booleans."""
    if nested is None:
        return None

    def read(node):
        return [read(child) for child in node] if isinstance(node, list) else node if isinstance(node, bool) else number(node)

    values = torch.tensor(read(nested))
    return values if values.dtype == torch.bool else torch.tensor(read(nested), dtype=torch.float64).to(dtype)


def parameter_dtype(dtype):
    """Of masks, biases, slopes and sinks, so that log(2) is as exact as the result has to be."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dense_inputs(case, dtype):
    """query, key, value, grad_output; [L, D] or, if the case has a batch or heads, [B, H, L, D] with one key/value head."""
    if "constant" in case:
        score, len_q, len_k = case["constant"]
        scores = torch.full((len_q, len_k), float(score), dtype=torch.float64)
    elif "zeros" in case:
        scores = torch.zeros(case["zeros"])
    else:
        scores = tensor(case["scores"], torch.float64)
    len_q, len_k = scores.shape
    values = list(range(len_k)) if case["values"] == "range" else case["values"]
    query, key = torch.eye(len_q), scores.mT.contiguous()
    value, grad_output = torch.tensor(values, dtype=torch.float32).view(len_k, 1), torch.ones(len_q, 1)
    poison_with = number(case.get("poison_with", "nan"))
    for name, rows in case.get("poison", {}).items():
        {"query": query, "key": key, "value": value, "grad_output": grad_output}[name][rows] = poison_with
    tensors = [t.to(dtype) for t in (query, key, value, grad_output)]
    if "batch" in case or "heads" in case:
        batch, heads = case.get("batch", 1), case.get("heads", 1)
        kv_heads = min(heads, 1)
        tensors = [t.expand(batch, h, *t.shape) for t, h in zip(tensors, (heads, kv_heads, kv_heads, heads))]
    return tensors


def expected(case, name, like):
    """The case's expected tensor; a flat list of outputs or value gradients is one column."""
    values = tensor(case[name], torch.float64)
    return values.view(like.shape) if values.numel() == like.numel() else values


@on_every_backend
@in_every_dtype
@pytest.mark.parametrize("case", CASES["dense"], ids=lambda case: case["name"])
def test_dense(case, dtype, backend):
    *inputs, grad_output = dense_inputs(case, dtype)
    query, key, value = (t.detach().requires_grad_() for t in inputs)
    options = dict(case.get("options", {}), scale=1.0, enable_gqa="heads" in case, return_lse=True)
    for name in ("attn_mask", "attn_bias", "alibi_slopes", "sinks"):
        options[name] = tensor(case.get(name), parameter_dtype(dtype))
        if options[name] is not None and options[name].is_floating_point():
            options[name].requires_grad_()
    if "seqlens_k" in case:
        options["seqlens_k"] = torch.tensor(case["seqlens_k"])
    if "window" in options:
        options["window"] = tuple(options["window"])
    skip_unless_supported(backend, scaled_dot_product_attention, query, key, value, **options)
    with use_backend(backend):
        output, lse = scaled_dot_product_attention(query, key, value, **options)
    if "output_shape" in case:
        assert list(output.shape) == case["output_shape"]
    else:
        assert_close(output, expected(case, "output", output), key.shape[-2], "output")
    if "lse" in case:
        assert_close(lse, expected(case, "lse", lse), key.shape[-2], "lse")
    leaves = {"query": query, "key": key, "value": value, "mask": options["attn_mask"], "bias": options["attn_bias"]}
    leaves |= {"slopes": options["alibi_slopes"], "sinks": options["sinks"]}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
    grads = dict(zip(leaves, torch.autograd.grad(output, list(leaves.values()), grad_output)))
    for name, grad in grads.items():
        assert grad.shape == leaves[name].shape
        if f"{name}_grad" in case:
            assert_close(grad, expected(case, f"{name}_grad", grad), query.shape[-2], f"gradient of {name}", slack=4.0)


@on_every_backend
@in_every_dtype
@pytest.mark.parametrize("case", CASES["varlen"], ids=lambda case: case["name"])
def test_varlen(case, dtype, backend):
    cu_q = torch.tensor(case["cu_seqlens_q"], dtype=torch.int32)
    cu_k = torch.tensor(case["cu_seqlens_k"], dtype=torch.int32) if "cu_seqlens_k" in case else None
    tokens_q, tokens_k = int(cu_q[-1]), len(case["values"])
    query, key = torch.ones(tokens_q, 1, 1, dtype=dtype), torch.zeros(tokens_k, 1, 1, dtype=dtype)
    value = torch.tensor(case["values"], dtype=dtype).view(tokens_k, 1, 1)
    for name, rows in case.get("poison", {}).items():
        {"query": query, "key": key, "value": value}[name][rows] = torch.nan
    options = dict(case.get("options", {}), return_lse=True, attn_bias=tensor(case.get("attn_bias"), parameter_dtype(dtype)))
    skip_unless_supported(backend, varlen_attention, query, key, value, cu_q, cu_k, **options)
    with use_backend(backend):
        output, lse = varlen_attention(query, key, value, cu_q, cu_k, **options)
    assert_close(output, expected(case, "output", output), max(tokens_k, 1), "output")
    if "lse" in case:
        assert_close(lse, expected(case, "lse", lse), max(tokens_k, 1), "lse")


@on_every_backend
@pytest.mark.parametrize("integers", (torch.int32, torch.int64))
@pytest.mark.parametrize("case", CASES["bad_offsets"], ids=lambda case: str(case["cu_seqlens"]))
def test_bad_offsets(case, integers, backend):
    tokens = torch.ones(case["tokens"], 1, 4)
    cu_seqlens = torch.tensor(case["cu_seqlens"], dtype=integers)
    with use_backend(backend), pytest.raises(ValueError) as raised:
        varlen_attention(tokens, tokens, tokens, cu_seqlens, max_seqlen_q=case.get("max_seqlen"))
    assert str(raised.value) == case["message"]


def test_every_rule_has_cases():
    rules = [case["rule"] for case in CASES["dense"] + CASES["varlen"]]
    assert set(rules) == set(range(1, 10)) and len(rules) >= 40


def skip_unless_supported(backend, function, *args, **kwargs):
    """Skips with the dispatcher's own reason."""
    with use_backend(backend):
        explanation = explain(function, *args, **kwargs)
    for name, reasons, _ in explanation.rows:
        if name == backend and reasons:
            pytest.skip("; ".join(reasons))
