"""A pairwise cover of attention's features: every two settings of two features meet in some case.

A case is drawn by greedy search with a fixed seed; compare() runs it forward and backward against the float64 oracle.
"""

import itertools
import random

import torch

import transfuse
from transfuse.testing import assert_close, draw

# Feature -> its settings; None, False and 0 are "not in use".
SETTINGS = {
    "layout": ("dense", "packed"),
    "heads": ((2, 2), (4, 2), (3, 1)),
    "head_dims": ((16, 16), (24, 40), (80, 33)),
    "lengths": ((33, 65), (70, 37), (1, 40)),
    "causal": (False, "top_left", "bottom_right"),
    "window": (None, (9, 4), (None, 0), (20, None)),
    "softcap": (None, 1.5),
    "alibi": (None, "heads", "batch"),
    "sinks": (False, True),
    "bias": (None, "full", "heads", "keys", "rows"),
    "mask": (None, "keys", "pairs"),
    "lengths_k": (False, True),
    "dropout": (0.0, 0.3),
    "scale": (None, -0.4),
    "lse": (False, True),
}  # fmt: skip
_ONLY_DENSE = ("mask", "lengths_k")
GRADIENT_SLACK = 4.0


def _allowed(case):
    return case["layout"] == "dense" or not any(case[name] for name in _ONLY_DENSE)


def _pairs(case):
    return {frozenset(((a, str(case[a])), (b, str(case[b])))) for a, b in itertools.combinations(SETTINGS, 2)}


def _cover():
    """Cases until every pair that some allowed case has is met."""
    generator = random.Random(0)
    wanted = set()
    for a, b in itertools.combinations(SETTINGS, 2):
        for first, second in itertools.product(SETTINGS[a], SETTINGS[b]):
            names = {a: first, b: second}
            if names.get("layout") == "packed" and any(names.get(name) for name in _ONLY_DENSE):
                continue
            wanted.add(frozenset(((a, str(first)), (b, str(second)))))
    cases = []
    while wanted:
        best = None
        for _ in range(300):
            case = {name: generator.choice(settings) for name, settings in SETTINGS.items()}
            if not _allowed(case):
                continue
            new = len(_pairs(case) & wanted)
            if best is None or new > best[0]:
                best = (new, case)
        if best[0]:
            cases.append(best[1])
            wanted -= _pairs(best[1])
    return cases


CASES = _cover()


def _tensors(case, dtype):
    """(arguments, options) of the call; all that is float wants a gradient."""
    heads, kv_heads = case["heads"]
    dim, value_dim = case["head_dims"]
    len_q, len_k = case["lengths"]
    batch = 2
    options = {name: case[name] for name in ("window", "softcap", "scale")}
    options |= {"dropout_p": case["dropout"], "return_lse": True}
    if case["causal"]:
        options |= {"is_causal": True, "causal_alignment": case["causal"]}
    generator = torch.Generator().manual_seed(11)
    if case["alibi"]:
        shape = (heads,) if case["alibi"] == "heads" else (batch, heads)
        options["alibi_slopes"] = torch.rand(shape, generator=generator) * 0.3
    if case["sinks"]:
        options["sinks"] = draw(heads, seed=6)
    if case["bias"]:
        shape = {"full": (batch, heads, len_q, len_k), "heads": (1, heads, len_q, len_k), "keys": (batch, 1, 1, len_k),
                 "rows": (1, heads, len_q, 1)}[case["bias"]]
        bias = draw(*shape, seed=7)
        if case["bias"] in ("full", "heads"):
            bias[..., ::5] = -torch.inf
        options["attn_bias"] = bias
    if case["layout"] == "dense":
        shapes = ((batch, heads, len_q, dim), (batch, kv_heads, len_k, dim), (batch, kv_heads, len_k, value_dim))
        options["enable_gqa"] = True
        if case["mask"]:
            shape = (batch, 1, 1, len_k) if case["mask"] == "keys" else (batch, heads, len_q, len_k)
            options["attn_mask"] = torch.rand(shape, generator=generator) < 0.7
        if case["lengths_k"]:
            options["seqlens_k"] = torch.tensor([len_k - 3, len_k // 2])
        arguments = [draw(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    else:
        cu_q, cu_k = (torch.tensor([0, n // 3, n // 3 + n], dtype=torch.int32) for n in (len_q, len_k))
        shapes = ((int(cu_q[-1]), heads, dim), (int(cu_k[-1]), kv_heads, dim), (int(cu_k[-1]), kv_heads, value_dim))
        options |= {"max_seqlen_q": len_q, "max_seqlen_k": len_k}
        options.setdefault("causal_alignment", "top_left")
        arguments = [*(draw(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)), cu_q, cu_k]
    return arguments, options


def _run(case, dtype, backend, arguments, options):
    wide = backend == "reference"
    leaves = []

    def prepare(value):
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        leaves.append((value.double() if wide else value).clone().requires_grad_())
        return leaves[-1]

    arguments = [prepare(value) for value in arguments]
    options = {name: prepare(value) for name, value in options.items()}
    function = transfuse.scaled_dot_product_attention if case["layout"] == "dense" else transfuse.varlen_attention
    torch.manual_seed(3)
    with transfuse.use_backend(backend):
        output, lse = function(*arguments, **options)
        grads = [draw(*output.shape, dtype=torch.bfloat16, seed=8).to(output.dtype)]
        outputs = [output]
        if case["lse"]:
            outputs.append(lse)
            grads.append(torch.where(lse.isfinite(), draw(*lse.shape, dtype=torch.bfloat16, seed=9).to(lse.dtype), 0.0))
        gradients = torch.autograd.grad(outputs, leaves, grads)
    return [output.detach(), lse.detach(), *gradients]


def compare(case, dtype):
    """Asserts that output, lse and every gradient agree with the oracle."""
    arguments, options = _tensors(case, dtype)
    results = [_run(case, dtype, backend, arguments, options) for backend in ("triton", "reference")]
    names = ["output", "lse", "grad_query", "grad_key", "grad_value"]
    for index, (ours, exact) in enumerate(zip(*results, strict=True)):
        what = names[index] if index < len(names) else f"gradient {index - 2}"
        terms = 4096 if index >= 5 else 1024
        slack = 1.0 if index < 2 else GRADIENT_SLACK
        assert_close(ours, exact, terms, what, slack=slack, entering=_entering(index, results))


def _entering(index, results):
    """Gradients of shared arguments cancel: what enters their sums is as large as the gradients of the query."""
    return float(results[1][2].abs().max()) if index >= 5 else 0.0
