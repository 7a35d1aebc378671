"""Attention's CUDA kernels: a pairwise cover of features, head dimensions, types and layouts, each against float64.

The promises (emulated_promises.py) judge numerics and invariance; here every two features meet, on every tile.
"""

import itertools
import random

import emulated_ops
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import transfuse
from transfuse import scaled_dot_product_attention, varlen_attention
from transfuse.dispatch import dtype_name
from transfuse.promises.cases import GRADIENT_SLACK
from transfuse.testing import assert_close, draw

# Factor -> its levels; a case has one of each, and every two levels of two factors meet in some case.
FACTORS = {
    "dtype": emulated_ops.DTYPES,
    "head_dims": ((64, 64), (32, 32), (96, 96), (128, 128), (192, 192), (256, 256), (40, 72), (17, 5)),
    "lengths": ((70, 150), (1, 129), (130, 33), (5, 200)),
    "heads": ((2, 2), (4, 2), (3, 1)),
    "causal": (None, "top_left", "bottom_right"),
    "window": (None, (9, None), (20, 3)),
    "mask": (None, "rows", "keys"),
    "bias": (None, "float32", "dtype", "batch", "heads", "keys", "rows"),
    "softcap": (None, 3.0),
    "alibi": (None, "heads", "batch"),
    "sinks": (False, True),
    "dropout": (0.0, 0.3),
    "seqlens_k": (False, True),
    "layout": ("heads", "tokens", "odd"),
}


def pairwise(factors, seed=0):
    """Cases of one level each, such that every pair of levels of two factors is in one of them; greedy."""
    names, draw = list(factors), random.Random(seed)
    left = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x, y in itertools.product(range(len(factors[a])), range(len(factors[b])))
    }

    def gain(case):
        return sum(pair in left for pair in itertools.combinations(case.items(), 2))

    cases = []
    while left:
        pair = min(left)
        candidates = []
        for _ in range(30):
            case = {name: draw.randrange(len(factors[name])) for name in names} | dict(pair)
            candidates.append({name: case[name] for name in names})
        best = max(candidates, key=gain)
        left -= set(itertools.combinations(best.items(), 2))
        cases.append({name: factors[name][level] for name, level in best.items()})
    return cases


CASES = pairwise(FACTORS)
EXTRAS = ("attn_bias", "alibi_slopes", "sinks")  # what may want a gradient beside query, key and value


def laid_out(tensor, layout):
    """The same values with heads apart, tokens apart, or rows that begin on no 16-byte boundary."""
    if layout == "tokens":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "odd":
        wider = tensor.new_zeros(*tensor.shape[:-1], tensor.shape[-1] + 3)[..., 1:-2]
        return wider.copy_(tensor)
    return tensor


def arguments(case, seed=0, batch=2):
    """query, key, value, and the options of the call."""
    generator = torch.Generator().manual_seed(seed)
    dtype, (len_q, len_k), (heads, kv_heads) = case["dtype"], case["lengths"], case["heads"]
    head_dim, value_head_dim = case["head_dims"]

    def drawn(*shape, of=dtype):
        return torch.randn(*shape, generator=generator).to(of)

    tensors = (
        drawn(batch, heads, len_q, head_dim),
        drawn(batch, kv_heads, len_k, head_dim),
        drawn(batch, kv_heads, len_k, value_head_dim),
    )
    options = {"enable_gqa": True, "window": case["window"], "softcap": case["softcap"]}
    if case["causal"]:
        options |= {"is_causal": True, "causal_alignment": case["causal"]}
    if case["mask"]:
        shape = (1, 1, 1, len_k) if case["mask"] == "keys" else (batch, 1, len_q, len_k)
        options["attn_mask"] = torch.rand(shape, generator=generator) < 0.8
    if case["bias"]:
        whole = (batch, heads, len_q, len_k)
        broadcast = {"batch": (0,), "heads": (1,), "keys": (0, 2), "rows": (0, 1, 3)}.get(case["bias"], ())
        shape = [1 if dim in broadcast else size for dim, size in enumerate(whole)]
        options["attn_bias"] = drawn(*shape, of=torch.float32 if case["bias"] == "float32" else dtype)
    if case["alibi"]:
        shape = (batch, heads) if case["alibi"] == "batch" else (heads,)
        options["alibi_slopes"] = drawn(*shape, of=torch.float32).abs() / 8
    if case["sinks"]:
        options["sinks"] = drawn(heads, of=torch.float32)
    if case["seqlens_k"]:
        options["seqlens_k"] = torch.tensor([len_k, len_k // 3])
    options["dropout_p"] = case["dropout"]
    return tuple(laid_out(t, case["layout"]) for t in tensors), options


def widened(options):
    return {
        name: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for name, t in options.items()
    }


def words_of(case):
    return "-".join(str(level) for level in (dtype_name(case["dtype"]), case["head_dims"], case["lengths"]))


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: f"{number}-{words_of(CASES[number])}")
def test_features_meet(number):
    """Output, lse and every gradient."""
    case = CASES[number]
    tensors, options = arguments(case, number)
    batch, heads, len_q, _ = tensors[0].shape
    generator = torch.Generator().manual_seed(number)
    grads = torch.randn(batch, heads, len_q, case["head_dims"][1], generator=generator).to(case["dtype"])
    grads = grads, torch.randn(batch, heads, len_q, generator=generator)

    def results(tensors, options):
        torch.manual_seed(number)
        extras = {name: options[name].detach().requires_grad_() for name in EXTRAS if name in options}
        leaves = [*(t.detach().requires_grad_() for t in tensors), *extras.values()]
        found = scaled_dot_product_attention(*leaves[:3], return_lse=True, **options | extras)
        of_leaves = torch.autograd.grad(found, leaves, [grad.to(t) for grad, t in zip(grads, found, strict=True)])
        return dict(zip(("output", "lse", "query", "key", "value", *extras), (*found, *of_leaves), strict=True))

    with emulated_ops.EmulatedKernels(seed=number + 1) as mode:
        found = results(tensors, options)
    assert mode.calls == 2
    with transfuse.use_backend("reference"):
        exact = results([t.double() for t in tensors], widened(options))
    for name, result in found.items():
        is_grad = name not in ("output", "lse")
        assert result.dtype == (torch.float32 if name == "lse" else options.get(name, tensors[0]).dtype)
        terms = sum(case["lengths"]) if is_grad else case["lengths"][1]
        slack = (GRADIENT_SLACK if is_grad else 1.0) * (2 if case["dropout"] and name != "lse" else 1)
        assert_close(result, exact[name], terms, name, slack=slack)


@pytest.mark.parametrize("dtype", emulated_ops.DTYPES, ids=dtype_name)
def test_sums_of_score_gradients_cancel(dtype):
    """A constant added to a row of scores changes no weight: what output gives such a bias is 0, whatever rounding did
    to output and lse; and at logits of 1e4 lse is rounded by 5e-4."""
    for logit in (1.0, 1e4):
        query, key, value, grad = (draw(1, 2, 70, 64, seed=i) for i in range(4))
        leaves = [(query * logit**0.5).to(dtype), (key * logit**0.5).to(dtype), value.to(dtype)]
        bias = torch.zeros(1, 2, 70, 1, dtype=torch.float32, requires_grad=True)
        with emulated_ops.EmulatedKernels(seed=7):
            output = scaled_dot_product_attention(*leaves, attn_bias=bias)
            (found,) = torch.autograd.grad(output, bias, grad.to(dtype))
        assert found.abs().max() < 1e-5, f"logits {logit}: {found.abs().max()}"


def test_a_row_in_two_parts_has_the_gradients_of_the_whole():
    """Ring attention: each part of the keys is given lse and output of the whole row."""
    generator = torch.Generator().manual_seed(8)
    query, key, value, grad = (torch.randn(1, 2, n, 24, generator=generator) for n in (9, 40, 40, 9))
    options = (24**-0.5, False, False, -1, -1, 0.0, 0.0)
    none = (None,) * 6
    raw = torch.ops.transfuse
    for dtype in emulated_ops.DTYPES:
        q, k, v, g = (t.to(dtype) for t in (query, key, value, grad))

        def gradients(keys, output, lse):
            part = (k[:, :, keys], v[:, :, keys])
            return raw.attention_backward(g, None, q, *part, output, lse, *none, *options, [1] * 4, *[False] * 3)

        with emulated_ops.EmulatedKernels(seed=8):
            saved = raw.attention_forward(q, k, v, *none, *options)
            whole, first, second = (
                gradients(keys, *saved) for keys in (slice(None), slice(0, 16), slice(16, None))
            )  # fmt: skip
        assert_close(first[0] + second[0], whole[0], 64, "query", slack=4.0)
        for index, what in ((1, "key"), (2, "value")):
            assert_close(torch.cat((first[index], second[index]), 2), whole[index], 64, what, slack=4.0)


@pytest.mark.parametrize("dtype", emulated_ops.DTYPES, ids=dtype_name)
def test_logits_beyond_the_precision_of_lse_have_gradients(dtype):
    """Scores of 1e12 (float16: 2e9): exp(score - lse) would overflow; the weights are those of equal scores."""
    size = 133120.0 if dtype != torch.float16 else 32768.0
    query = torch.full((1, 1, 5, 16), size, dtype=dtype).requires_grad_()
    key = torch.full((1, 1, 33, 16), size, dtype=dtype).requires_grad_()
    value = torch.randn(1, 1, 33, 16, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    with emulated_ops.EmulatedKernels(seed=9):
        output = scaled_dot_product_attention(query, key, value)
        grads = torch.autograd.grad(output, (query, key, value), torch.ones_like(output))
    assert all(grad.isfinite().all() for grad in grads)
    assert_close(grads[2], torch.full_like(grads[2], 5 / 33), 33, "value", slack=4.0)


@pytest.mark.parametrize("wanted", [False, True])
def test_results_have_the_form_that_is_declared(wanted):
    """torch.compile goes by it: shapes, dtypes and strides, of gradients that nobody wants too."""
    tensors, _ = arguments({name: of[0] for name, of in FACTORS.items()} | {"dtype": torch.bfloat16, "lengths": (5, 7)})
    bias, slopes, sinks = torch.zeros(1, 2, 5, 7), torch.ones(2), torch.ones(2)  # float32 beside bfloat16
    extras, numbers = (bias.expand(2, 2, 5, 7), None, None, slopes, sinks, None), (0.1, False, False, -1, -1, 0.0, 0.0)

    def results(tensors, extras):
        forward, backward = torch.ops.transfuse.attention_forward, torch.ops.transfuse.attention_backward
        output, lse = forward(*tensors, *extras, *numbers)
        grads = backward(output, None, *tensors, output, lse, *extras, *numbers, list(bias.shape), *(wanted,) * 3)
        return [(t.shape, t.dtype, t.stride()) for t in (output, lse, *grads)]

    with emulated_ops.EmulatedKernels() as mode:
        found = results(tensors, extras)
    assert mode.calls == 2
    with FakeTensorMode() as fake:
        fakes = [[fake.from_tensor(t) if t is not None else None for t in of] for of in (tensors, extras)]
        assert found == results(*fakes)


@pytest.mark.parametrize("dtype", emulated_ops.DTYPES, ids=dtype_name)
def test_padding_by_a_finite_value_refines_no_row(dtype):
    """Keys that a huge negative bias takes out, before, between and behind the others, change no bit of a row's."""
    tensors, _ = arguments({name: of[0] for name, of in FACTORS.items()} | {"dtype": dtype, "lengths": (40, 330)})
    bias = torch.zeros(2, 1, 1, 330, dtype=dtype)
    bias[..., :70] = bias[..., 100:200] = bias[..., 240:] = -torch.inf
    bias[1, ..., :30] = 0
    with emulated_ops.EmulatedKernels(seed=7):
        expected = scaled_dot_product_attention(*tensors, attn_bias=bias, return_lse=True)
        padding = bias.clamp(min=torch.finfo(dtype).min)
        found = scaled_dot_product_attention(*tensors, attn_bias=padding, return_lse=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", emulated_ops.DTYPES, ids=dtype_name)
def test_packed_heads_change_no_bit(dtype):
    """Short queries share tiles with other heads of their key head; the same rows in longer batches do not."""
    plain = {name: levels[0] for name, levels in FACTORS.items()}
    case = plain | {"dtype": dtype, "heads": (4, 2), "lengths": (40, 70)}
    (query, key, value), options = arguments(case)
    with emulated_ops.EmulatedKernels(seed=3):
        whole, lse = scaled_dot_product_attention(query, key, value, enable_gqa=True, return_lse=True)
        for rows in (slice(0, 1), slice(3, 20)):
            part, part_lse = scaled_dot_product_attention(
                query[:, :, rows], key, value, enable_gqa=True, return_lse=True
            )
            assert torch.equal(part, whole[:, :, rows]) and torch.equal(part_lse, lse[:, :, rows])


@pytest.mark.parametrize("dtype", emulated_ops.DTYPES, ids=dtype_name)
def test_dropout_keeps_what_the_cpu_keeps(dtype):
    """Values that tell which keys were kept: unit vectors, so the output is the row's dropped weights."""
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, 3, 37, 32, generator=generator).to(dtype)
    key = torch.randn(2, 3, 64, 32, generator=generator).to(dtype)
    value = torch.eye(64).to(dtype).expand(2, 3, 64, 64)
    found = []
    for mode in (emulated_ops.EmulatedKernels(seed=2), torch.no_grad()):
        torch.manual_seed(5)
        with mode, torch.no_grad():
            found.append(scaled_dot_product_attention(query, key, value, dropout_p=0.4) != 0)
    assert torch.equal(*found) and 0.5 < found[0].float().mean() < 0.7


@pytest.mark.parametrize("dtype", emulated_ops.DTYPES[1:], ids=dtype_name)
@pytest.mark.parametrize("head_dim", [192, 256])
def test_tiles_of_a_gpu_with_less_shared_memory(head_dim, dtype, monkeypatch):
    """sm_86, sm_89 and sm_120 have 99 KB: other tiles, the same rows up to their order of sums."""
    case = {name: levels[0] for name, levels in FACTORS.items()}
    for features in ({"causal": "bottom_right"}, {"mask": "rows", "bias": "dtype"}):
        tensors, options = arguments(case | {"dtype": dtype, "head_dims": (head_dim, head_dim)} | features, batch=1)
        results = []
        for kilobytes in ("163", "99"):
            monkeypatch.setenv("TRANSFUSE_EMULATED_SHARED_KB", kilobytes)
            with emulated_ops.EmulatedKernels(seed=6):
                results.append(scaled_dot_product_attention(*tensors, **options))
        assert not torch.equal(*results)
        with transfuse.use_backend("reference"):
            exact = scaled_dot_product_attention(*(t.double() for t in tensors), **widened(options))
        assert_close(results[1], exact, case["lengths"][1], "output")


@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
def test_tables_are_clamped(integers):
    """Offsets that lie beyond the tensors, fall, or leave sequences longer than promised: no access out of bounds."""
    tokens = torch.randn(40, 2, 32).bfloat16()
    for offsets in ([0, 10, 1000], [-5, 20, 40], [30, 10, 40], [0, 40, 40]):
        table = torch.tensor(offsets, dtype=integers)
        options = (None, None, None, None, 16, 16, 0.2, True, True, -1, -1, 0.0, 0.0)
        with emulated_ops.EmulatedKernels(seed=4) as mode:
            torch.ops.transfuse.varlen_attention_forward(tokens, tokens, tokens, table, table, *options)
        assert mode.calls == 1


@pytest.mark.parametrize("dtype", emulated_ops.DTYPES, ids=dtype_name)
def test_varlen_has_the_bits_of_attention(dtype):
    generator = torch.Generator().manual_seed(2)
    offsets = torch.tensor([0, 70, 70, 75, 140])
    query, key, value = (torch.randn(140, 2, 64, generator=generator).to(dtype) for _ in range(3))
    with emulated_ops.EmulatedKernels(seed=5):
        packed = varlen_attention(query, key, value, offsets, max_seqlen_q=70, is_causal=True, window=(30, None))
        for begin, end in itertools.pairwise(offsets.tolist()):
            alone = scaled_dot_product_attention(
                *(t[begin:end].transpose(0, 1)[None] for t in (query, key, value)),
                is_causal=True, window=(30, None), causal_alignment="bottom_right",
            )  # fmt: skip
            assert torch.equal(alone[0].transpose(0, 1), packed[begin:end])
