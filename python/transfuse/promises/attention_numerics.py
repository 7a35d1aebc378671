"""CONTRACT section 2, attention: as exact as torch's own kernel on the families that random numbers never show.

Errors are taken against float64 and pooled over SEEDS independent draws, output and every gradient apart. Their rms may
be 1.02 of the peer's (or 1.05 of what rounding the exact result alone would leave), their largest row 1.25 of the
peer's. float64 has no exacter oracle here: it is compared with the reference (agreement.py).
"""

from functools import partial

import torch
import torch.nn.functional as F

import transfuse
from transfuse import scaled_dot_product_attention, testing
from transfuse.dispatch import dtype_name
from transfuse.promises.promise import DTYPES, Figure, Promise, remembered, worst_of
from transfuse.testing import assert_matches_reference, draw

POOLED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEEDS = 32  # one per batch entry; the largest row of 8 draws is too noisy to compare
RESULTS = ("output", "grad_query", "grad_key", "grad_value")
HEAD_DIMS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 48, 64, 65, 80, 96, 128, 129, 160, 192, 256, 257, 384, 511, 512)


def tensors(dtype, len_q=64, len_k=96, head_dim=64, scale=1.0, batch=None, heads=2):
    """query, key, value. Scores have a standard deviation near scale**2."""
    batch = SEEDS if batch is None else batch
    return (
        draw(batch, heads, len_q, head_dim, dtype=dtype, seed=0, scale=scale),
        draw(batch, heads, len_k, head_dim, dtype=dtype, seed=1, scale=scale),
        draw(batch, heads, len_k, head_dim, dtype=dtype, seed=2),
    )


def saturated(dtype, logit, len_k=96):
    """Scores of that size, with near ties in every row: elsewhere a saturated softmax has no error to compare.

    Keys come in pairs that differ in the last 16 dimensions only, where queries are small: scores move by about 1.
    """
    query, key, value = tensors(dtype, len_k=len_k, scale=logit**0.5)
    half = key.shape[2] // 2
    key[:, :, half:, :48] = key[:, :, :half, :48]
    query[..., 48:] /= logit
    return query, key, value


def very_negative(dtype):
    """Scores near -200 with a ragged last tile: the row's lse is far below the smallest float32 exponential."""
    query, key, value = tensors(dtype, 40, 67, scale=0.3)
    return query + 5, key - 5, value


def subnormal(dtype):
    """Values whose products with the weights are subnormal."""
    query, key, value = tensors(dtype, 40, 67)
    return query, key, value * (2.0**-14 if dtype == torch.float16 else 2.0**-130)


def of_lengths(*lengths, len_q=16):
    return [partial(tensors, len_q=len_q, len_k=length) for length in lengths]


# op -> id -> (the family in words, its draws, which are pooled, options of the call)
FAMILIES = {
    "attention": {
        "normal": ("normal scores", [tensors], {}),
        "causal": ("causal", [partial(tensors, len_q=96, len_k=96, head_dim=32)], {"is_causal": True}),
        "logits-1e2": ("logits 1e2", [partial(saturated, logit=1e2)], {}),
        "logits-1e3": ("logits 1e3", [partial(saturated, logit=1e3)], {}),
        "logits-1e3-long": ("logits 1e3 over three blocks of keys", [partial(saturated, logit=1e3, len_k=300)], {}),
        "logits-1e4": ("logits 1e4", [partial(saturated, logit=1e4)], {}),
        "very-negative": ("lse below -88.7, ragged tail", [very_negative], {}),
        "subnormal": ("subnormal values", [subnormal], {}),
        "lengths-32": ("1, 31 to 33 keys", of_lengths(1, 31, 32, 33), {}),
        "lengths-64": ("63 to 65 keys", of_lengths(63, 64, 65), {}),
        "lengths-128": ("127 to 129 keys", of_lengths(127, 128, 129), {}),
    },
    "decode_attention": {
        "lengths": ("1, 33, 127, 257 keys", of_lengths(1, 33, 127, 257, len_q=1), {}),
        "logits-1e3": ("logits 1e3", [lambda dtype: _first_query(saturated(dtype, 1e3))], {}),
    },
}


def _first_query(inputs):
    query, key, value = inputs
    return query[:, :, :1], key, value


def _decode(query, key, value):
    """Every key of the cache is valid, so that torch needs no mask."""
    return transfuse.decode_attention(query, key, value, torch.full((len(query),), key.shape[2], device=query.device))


OURS = {"attention": scaled_dot_product_attention, "decode_attention": _decode}


def _evaluate(function, inputs, grad, dtype, options):
    """Output and, where there is an incoming gradient, the gradients; widened."""
    if grad is None:
        return [function(*(t.to(dtype) for t in inputs), **options).double()]
    leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
    output = function(*leaves, **options)
    return [t.detach().double() for t in (output, *torch.autograd.grad(output, leaves, grad.to(dtype)))]


@remembered
def _errors(op, family, dtype, backend, device):
    """For output and each gradient: (ours, the peer's, rounding's) errors against float64, one line per result row."""
    _, draws, options = FAMILIES[op][family]
    pooled = []
    for make in draws:
        inputs = [t.to(device) for t in make(dtype)]
        grad = draw(*inputs[0].shape, dtype=dtype, seed=100).to(device) if op == "attention" else None
        ours = _evaluate(OURS[op], inputs, grad, dtype, options)
        peer = _evaluate(F.scaled_dot_product_attention, inputs, grad, dtype, options)
        with transfuse.use_backend("reference"):
            exact = _evaluate(OURS[op], inputs, grad, torch.float64, options)
        for index, (o, p, e) in enumerate(zip(ours, peer, exact, strict=True)):
            if index == len(pooled):
                pooled.append(([], [], []))
            for group, result in zip(pooled[index], (o, p, e.to(dtype).double()), strict=True):
                group.append((result - e).flatten(0, -2))
    return [[torch.cat(group) for group in groups] for groups in pooled]


def _rms(errors):
    return float(errors.square().mean().sqrt())


def _largest_row(errors):
    return float(errors.square().mean(-1).sqrt().max())


def _against_peer(op, family, dtype, size, rounding_share, backend, device):
    """Our error over the peer's (or over rounding's share, where that is more), of the worst result."""
    found = []
    for what, errors in zip(RESULTS, _errors(op, family, dtype, backend, device)):
        ours, peer, rounding = map(size, errors)
        base = max(peer, rounding_share * rounding)
        ratio = ours / base if base else 0.0 if ours == 0 else torch.inf
        found.append((ratio, f"{what}: {ours:.2e}, torch {peer:.2e}, rounding alone {rounding:.2e}"))
    worst, where = worst_of(found)
    return Figure(worst, where, 1.0)


def _pooled():
    criteria = (
        (
            "rms",
            "rms error",
            _rms,
            testing.ATTENTION_RMS_RATIO,
            testing.ATTENTION_ROUNDING_RATIO / testing.ATTENTION_RMS_RATIO,
        ),
        ("row", "largest row's error", _largest_row, testing.ATTENTION_ROW_RATIO, 1.0),
    )
    for op, families in FAMILIES.items():
        results = "output and gradients" if op == "attention" else "output"
        for dtype in POOLED_DTYPES:
            for family, (name, _, _) in families.items():
                for what, words, size, bound, share in criteria:
                    measure = partial(_against_peer, op, family, dtype, size, share)
                    statement = f"{name}: {words}, {results}"
                    yield _promise(
                        op, dtype, f"{what}.{family}", statement, bound, "of torch's", measure, "torch, CPU kernel"
                    )


def _promise(op, dtype, what, statement, bound, unit, measure, peer=None):
    return Promise(f"2.{op}.{dtype_name(dtype)}.{what}", 2, op, dtype, statement, bound, unit, measure, peer)


# ---- what must be exact ----


def _huge_equal_scores(dtype, backend, device):
    """q = k = v = 133120: scale * score - scale * max is rounding residue unless it is exactly 0."""
    value = 133120.0 if dtype != torch.float16 else 60000.0
    huge = torch.full((1, 1, 65, 64), value, dtype=dtype, device=device)
    wrong, peer = (
        int(f(huge, huge, huge).ne(huge).sum()) for f in (scaled_dot_product_attention, F.scaled_dot_product_attention)
    )
    return Figure(wrong, f"of {huge.numel()}", peer)


def _infinite_score(dtype, backend, device):
    """One +inf score makes its row NaN, forward and backward, and changes no bit of another."""
    query, key, value = (t.to(device) for t in tensors(dtype, 37, 53, 24, batch=2))
    bias = torch.zeros(37, 53, dtype=torch.promote_types(dtype, torch.float32), device=device)
    poisoned = bias.clone()
    poisoned[3, 50] = torch.inf
    results = []
    for mask in (bias, poisoned):
        leaf = query.detach().requires_grad_()
        output, lse = scaled_dot_product_attention(leaf, key, value, attn_bias=mask, return_lse=True)
        results.append((output.detach(), lse.detach(), *torch.autograd.grad(output, leaf, torch.ones_like(output))))
    others = torch.arange(37, device=device) != 3
    (clean, clean_lse, clean_grad), (output, lse, grad) = results
    expected = {
        "the row is NaN": output[:, :, 3].isnan().all(),
        "its gradient is NaN": grad[:, :, 3].isnan().all(),
        "other rows are untouched": torch.equal(output[:, :, others], clean[:, :, others]),
        "their lse is untouched": torch.equal(lse[:, :, others], clean_lse[:, :, others]),
        "their gradient is untouched": torch.equal(grad[:, :, others], clean_grad[:, :, others]),
    }
    wrong = [words for words, holds in expected.items() if not holds]
    return Figure(len(wrong), "not so: " + ", ".join(wrong) if wrong else "")


def _poisoned_keys(dtype, backend, device):
    """Key and value rows that no query keeps may hold anything: no bit of output or gradients changes."""
    inputs = [t.to(device) for t in tensors(dtype, 37, 53, 24, batch=2)]
    keep = torch.rand(2, 2, 37, 53, generator=torch.Generator().manual_seed(5)) < 0.6
    excluded = [0, 20, 52]
    keep[..., excluded] = False
    keep = keep.to(device)

    def run():
        leaves = [t.detach().requires_grad_() for t in inputs]
        output, lse = scaled_dot_product_attention(*leaves, keep, return_lse=True)
        grads = torch.autograd.grad((output, lse), leaves, (torch.ones_like(output), torch.ones_like(lse)))
        return [output.detach(), lse.detach(), *grads]

    clean, wrong = run(), []
    for poison in (torch.nan, torch.inf, -torch.inf):
        for tensor in inputs[1:]:
            tensor[:, :, excluded] = poison
        names = ("output", "lse", *RESULTS[1:])
        wrong += [
            f"{name} under {poison}" for name, a, e in zip(names, run(), clean, strict=True) if not torch.equal(a, e)
        ]
    return Figure(len(wrong), ", ".join(wrong))


def _head_dims(dtype, backend, device):
    """Head dimensions whose result or gradients miss the float64 reference."""
    wrong = []
    for head_dim in HEAD_DIMS:
        inputs = [t.to(device).requires_grad_() for t in tensors(dtype, 19, 21, head_dim, batch=1)]
        try:
            assert_matches_reference(scaled_dot_product_attention, *inputs, return_lse=True)
        except AssertionError as error:
            wrong.append(f"{head_dim}: {error}")
    return Figure(len(wrong), "".join(wrong[:1]))


EXACT = (
    (
        "huge-equal-scores",
        "q = k = v = 133120 (float16: 60000) is returned exactly",
        "elements wrong",
        _huge_equal_scores,
        "torch, CPU kernel",
    ),
    ("infinite-score", "one +inf score makes its row NaN and no other", "facts wrong", _infinite_score, None),
    ("poisoned-keys", "NaN and inf in excluded keys and values change no bit", "results changed", _poisoned_keys, None),
    (
        "head-dims",
        f"{len(HEAD_DIMS)} head dimensions from 1 to 512 agree with float64",
        "head dimensions wrong",
        _head_dims,
        None,
    ),
)

PROMISES = (
    *_pooled(),
    *(
        _promise("attention", dtype, what, statement, 0, unit, partial(measure, dtype), peer)
        for what, statement, unit, measure, peer in EXACT
        for dtype in DTYPES
    ),
)
