"""CONTRACT section 1: masks.json holds inputs and the results worked out by hand; every backend must give them.

A promise is one rule of the contract for one op and dtype: how many of its golden cases come out wrong, forward,
backward or in shape. The same cases serve attention, varlen_attention and, where they use nothing but scores and a
mask, masked_softmax, whose weights are then multiplied with the values.
"""

import json
import math
from functools import partial
from pathlib import Path

import torch

from transfuse import masked_softmax, scaled_dot_product_attention, varlen_attention
from transfuse.dispatch import dtype_name, explain
from transfuse.promises.cases import GRADIENT_SLACK
from transfuse.promises.promise import DTYPES, Figure, NoKernel, Promise, counted, reasons_of
from transfuse.testing import assert_close

CASES = json.loads(Path(__file__).with_name("masks.json").read_text())
RULES = {
    1: "exclusion is a predicate: mask, -inf, causal, window, lengths",
    2: "a row with no valid key: output 0, lse -inf, gradients 0",
    3: "a finite mask value is a number",
    4: "a real NaN and a +inf score are not hidden",
    5: "what an excluded key or value holds never matters",
    6: "causal alignment is explicit",
    7: "masks and biases broadcast and get gradients",
    8: "empty dimensions give empty or zero results",
    9: "sequence offsets and zero-length sequences",
}
# As the data calls the gradient of an argument.
SHORT = {"mask": "attn_mask", "bias": "attn_bias", "slopes": "alibi_slopes", "sinks": "sinks"}
# What masked_softmax has of a dense case.
SOFTMAX_KEYS = {
    "name",
    "rule",
    "zeros",
    "scores",
    "constant",
    "values",
    "attn_mask",
    "attn_bias",
    "options",
    "output",
    "lse",
    "value_grad",
    "mask_grad",
    "bias_grad",
    "output_shape",
}


def number(text):
    """A JSON number or one of the words the data file allows."""
    if not isinstance(text, str):
        return float(text)
    if text == "finfo.min":
        return torch.finfo(torch.float32).min
    if text.startswith("log("):
        return math.log(float(text[4:-1]))
    return float(text)


def tensor(nested, dtype, device="cpu"):
    """Nested lists of numbers or of booleans; None stays None."""
    if nested is None:
        return None

    def read(node):
        return (
            [read(child) for child in node]
            if isinstance(node, list)
            else node
            if isinstance(node, bool)
            else number(node)
        )

    values = read(nested)
    boolean = torch.tensor(values).dtype == torch.bool
    return torch.tensor(values, dtype=torch.bool if boolean else torch.float64).to(device, None if boolean else dtype)


def _scores(case):
    if "constant" in case:
        score, len_q, len_k = case["constant"]
        return torch.full((len_q, len_k), float(score), dtype=torch.float64)
    return torch.zeros(case["zeros"]) if "zeros" in case else tensor(case["scores"], torch.float64)


def _values(case, len_k):
    values = list(range(len_k)) if case["values"] == "range" else case["values"]
    return torch.tensor(values, dtype=torch.float32).view(len_k, 1)


def _options(case, dtype, device):
    """Keyword arguments of the call; float masks (never narrower than float32) want a gradient."""
    options = dict(case.get("options", {}))
    for name in ("attn_mask", "attn_bias", "alibi_slopes", "sinks"):
        if name in case:
            options[name] = tensor(case[name], torch.promote_types(dtype, torch.float32), device)
            if options[name].is_floating_point():
                options[name].requires_grad_()
    if "seqlens_k" in case:
        options["seqlens_k"] = torch.tensor(case["seqlens_k"], device=device)
    if "window" in options:
        options["window"] = tuple(options["window"])
    return options


def _compare(case, results):
    """Asserts that every result the case names is right; results: (name, tensor, longest sum behind it)."""
    for name, actual, terms in results:
        if name in case:
            values = tensor(case[name], torch.float64, actual.device)
            # A flat list of outputs or value gradients is one column.
            values = values.view(actual.shape) if values.numel() == actual.numel() else values
            assert_close(actual, values, terms, name, slack=GRADIENT_SLACK if name.endswith("_grad") else 1.0)


def run_attention(case, dtype, backend, device, wrap=lambda function: function):
    """One dense case. query is the identity, key the scores' transpose: [L, D], or [B, H, L, D] with one key head."""
    scores = _scores(case)
    len_q, len_k = scores.shape
    tensors = {"query": torch.eye(len_q), "key": scores.mT.contiguous(), "value": _values(case, len_k)}
    tensors["grad_output"] = torch.ones(len_q, 1)
    for name, rows in case.get("poison", {}).items():
        tensors[name][rows] = number(case.get("poison_with", "nan"))
    query, key, value, grad_output = (t.to(device, dtype) for t in tensors.values())
    if "batch" in case or "heads" in case:
        batch, heads = case.get("batch", 1), case.get("heads", 1)
        query, grad_output = (t.expand(batch, heads, *t.shape) for t in (query, grad_output))
        key, value = (t.expand(batch, min(heads, 1), *t.shape) for t in (key, value))
    leaves = {"query": query, "key": key, "value": value}
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    options = {**_options(case, dtype, device), "scale": 1.0, "enable_gqa": "heads" in case, "return_lse": True}
    _require(backend, scaled_dot_product_attention, *leaves.values(), **options)
    output, lse = wrap(scaled_dot_product_attention)(*leaves.values(), **options)
    if "output_shape" in case:
        assert list(output.shape) == case["output_shape"], f"output has shape {tuple(output.shape)}"
    leaves |= {short: options.get(name) for short, name in SHORT.items()}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
    grads = dict(zip(leaves, torch.autograd.grad(output, list(leaves.values()), grad_output), strict=True))
    for name, grad in grads.items():
        assert grad.shape == leaves[name].shape, f"gradient of {name} has shape {tuple(grad.shape)}"
    results = [(f"{name}_grad", grad, len_q) for name, grad in grads.items()]
    _compare(case, [("output", output, len_k), ("lse", lse, len_k), *results])


def run_softmax(case, dtype, backend, device, wrap=lambda function: function):
    """One dense case: the weights of its scores, times its values."""
    scores = _scores(case).to(device, dtype)
    value = _values(case, scores.shape[-1]).to(device, dtype).requires_grad_()
    options = _options(case, dtype, device)
    mask = options.pop("attn_mask", options.pop("attn_bias", None))
    _require(backend, masked_softmax, scores, mask, **options)
    output = wrap(masked_softmax)(scores, mask, **options) @ value
    leaves = {
        "value": value,
        **({"mask" if "attn_mask" in case else "bias": mask} if mask is not None and mask.requires_grad else {}),
    }
    grads = torch.autograd.grad(output, list(leaves.values()), torch.ones_like(output))
    results = [(f"{name}_grad", grad, scores.shape[0]) for name, grad in zip(leaves, grads, strict=True)]
    _compare(case, [("output", output, scores.shape[1]), *results])


def run_varlen(case, dtype, backend, device, wrap=lambda function: function):
    """One varlen case: every score is 0, so a row is the mean of the values it keeps."""
    cu_q = torch.tensor(case["cu_seqlens_q"], dtype=torch.int32, device=device)
    cu_k = torch.tensor(case["cu_seqlens_k"], dtype=torch.int32, device=device) if "cu_seqlens_k" in case else None
    tokens_q, tokens_k = int(cu_q[-1]), len(case["values"])
    tensors = {"query": torch.ones(tokens_q, 1, 1), "key": torch.zeros(tokens_k, 1, 1)}
    tensors["value"] = torch.tensor(case["values"], dtype=torch.float32).view(tokens_k, 1, 1)
    for name, rows in case.get("poison", {}).items():
        tensors[name][rows] = torch.nan
    tensors = [t.to(device, dtype) for t in tensors.values()]
    wide = torch.promote_types(dtype, torch.float32)
    options = dict(case.get("options", {}), return_lse=True, attn_bias=tensor(case.get("attn_bias"), wide, device))
    longest = [max(cu.diff().tolist(), default=0) for cu in (cu_q, cu_q if cu_k is None else cu_k)]
    options.update(max_seqlen_q=longest[0], max_seqlen_k=longest[1])  # a graph cannot read them from the offsets
    _require(backend, varlen_attention, *tensors, cu_q, cu_k, **options)
    output, lse = wrap(varlen_attention)(*tensors, cu_q, cu_k, **options)
    _compare(case, [("output", output, max(tokens_k, 1)), ("lse", lse, max(tokens_k, 1))])


def _require(backend, function, *args, **kwargs):
    if reasons := reasons_of(explain(function, *args, **kwargs), backend):
        raise NoKernel("; ".join(reasons))


def _count_wrong(cases, run, dtype, backend, device):
    """How many cases come out wrong, and the first of them; cases without a kernel are counted in words."""
    wrong, without, ran = [], {}, 0
    for case in cases:
        try:
            run(case, dtype, backend, device)
            ran += 1
        except NoKernel as error:
            without.setdefault(str(error), []).append(case["name"])
        except AssertionError as error:
            wrong.append(f"{case['name']}: {error}")
    if not ran and not wrong:
        raise NoKernel("; ".join(without))
    words = [f"{len(names)} without a kernel: {reason}" for reason, names in without.items()]
    return Figure(len(wrong), "; ".join(wrong[:1] + words), without=sum(map(len, without.values())))


def _compiled(run):
    """The same case through torch.compile(fullgraph=True), without the compiler's own kernels."""

    def run_compiled(case, dtype, backend, device):
        torch._dynamo.reset()
        run(case, dtype, backend, device, wrap=partial(torch.compile, fullgraph=True, backend="aot_eager"))

    return run_compiled


def signature(case):
    """What a compiled call specialises on: which arguments there are and of which kind, and the flags."""
    kinds = [
        (name, str(tensor(case[name], torch.float32).dtype)) for name in ("attn_mask", "attn_bias") if name in case
    ]
    present = [name for name in ("alibi_slopes", "sinks", "seqlens_k", "batch", "heads") if name in case]
    return str((kinds, present, sorted(case.get("options", {}).items())))


def one_per_signature(cases):
    return list({signature(case): case for case in reversed(cases)}.values())


SOFTMAX_CASES = [
    case
    for case in CASES["dense"]
    if set(case) <= SOFTMAX_KEYS
    and not ("attn_mask" in case and "attn_bias" in case)
    and set(case.get("options", {})) <= {"is_causal", "causal_alignment"}
    and (case.get("options") or "attn_mask" in case or "attn_bias" in case)
]
GROUPS = {  # op -> (its cases, how one of them is run)
    "attention": (CASES["dense"], run_attention),
    "varlen_attention": (CASES["varlen"], run_varlen),
    "masked_softmax": (SOFTMAX_CASES, run_softmax),
}


def _promises():
    for op, (cases, run) in GROUPS.items():
        for dtype in DTYPES:
            for rule, words in RULES.items():
                of_rule = [case for case in cases if case["rule"] == rule]
                if of_rule:
                    yield _promise(
                        op,
                        dtype,
                        f"rule-{rule}",
                        f"{words} ({counted(of_rule, 'case')})",
                        partial(_count_wrong, of_rule, run, dtype),
                    )
        compiled = one_per_signature(cases)
        words = f"the same under torch.compile(fullgraph=True) ({counted(compiled, 'signature')})"
        measure = partial(_count_wrong, compiled, _compiled(run), torch.float32)
        yield _promise(op, torch.float32, "compiled", words, measure)
    words = f"bad offsets are a ValueError that names the first bad entry ({counted(CASES['bad_offsets'], 'table')})"
    yield _promise("varlen_attention", None, "bad-offsets", words, _bad_offsets)


def _promise(op, dtype, what, statement, measure):
    name = "any" if dtype is None else dtype_name(dtype)
    return Promise(f"1.{op}.{name}.{what}", 1, op, dtype, statement, 0, "cases wrong", measure)


def _bad_offsets(backend, device):
    if device != "cpu":
        raise NoKernel("offsets on a GPU are clamped, not read")
    wrong = []
    for case in CASES["bad_offsets"]:
        for integers in (torch.int32, torch.int64):
            tokens, cu_seqlens = torch.ones(case["tokens"], 1, 4), torch.tensor(case["cu_seqlens"], dtype=integers)
            try:
                varlen_attention(tokens, tokens, tokens, cu_seqlens, max_seqlen_q=case.get("max_seqlen"))
                said = "nothing"
            except ValueError as error:
                said = str(error)
            if said != case["message"]:
                wrong.append(f"{case['cu_seqlens']}: said {said!r}, expected {case['message']!r}")
    return Figure(len(wrong), "".join(wrong[:1]))


PROMISES = tuple(_promises())
