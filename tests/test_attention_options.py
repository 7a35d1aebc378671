"""What attention refuses and in which words, which backend runs it, and the suite against mutants."""

import re
import warnings

import pytest
import test_attention as suite
import torch

from transfuse import explain, extension, scaled_dot_product_attention, use_backend
from transfuse.dispatch import TransfuseWarning, fallback_counts
from transfuse.ops import attention as page
from transfuse.reference.attention import attention_reference
from transfuse.testing import assert_matches_reference, draw

Q, K, V = torch.zeros(2, 4, 3, 8), torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 5, 8)


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors: waking a second thread costs more than the work. Tests about threads set their own count."""
    torch.set_num_threads(1)


def refused(error, message, *args, **kwargs):
    return pytest.param(error, message, args, kwargs, id=message)


REFUSALS = (
    refused(TypeError, "attention: query is a list, expected a Tensor", [1], K, V),
    refused(TypeError, "attention: value is a NoneType, expected a Tensor", Q, K, None),
    refused(TypeError, "attention: query has dtype int64, expected float32, bfloat16, float16, float64", Q.long(), K, V),
    refused(TypeError, "attention: key has dtype bfloat16, expected float32 (query's)", Q, K.bfloat16(), V),
    refused(TypeError, "attention: value has dtype float64, expected float32 (query's)", Q, K, V.double()),
    refused(RuntimeError, "attention: key is on meta, expected cpu (query's)", Q, K.to("meta"), V),
    refused(ValueError, "attention: query has shape (8,), expected (..., heads, length, head_dim)", Q[0, 0, 0], K, V),
    refused(ValueError, "attention: key has head_dim 7, expected 8 (query's)", Q, K[..., :7], V),
    refused(ValueError, "attention: query has head_dim 0, expected at least 1", Q[..., :0], K[..., :0], V),
    refused(ValueError, "attention: value has head_dim 0, expected at least 1", Q, K, V[..., :0]),
    refused(ValueError, "attention: value has 4 keys, expected 5 (key's)", Q, K, V[:, :, :4]),
    refused(ValueError, "attention: key has leading shape (3,), expected (2,)", Q, K[:1].expand(3, 4, 5, 8), V),
    refused(ValueError, "attention: key has 2 heads, expected 4 (query's); enable_gqa=True groups query heads", Q, K[:, :2], V[:, :2]),
    refused(ValueError, "attention: key has 3 heads, expected a divisor of 4 (query's)", Q, K[:, :3], V[:, :3], enable_gqa=True),
    refused(ValueError, "attention: value has 3 heads, expected a divisor of 4 (query's)", Q, K, V[:, :3], enable_gqa=True),
    refused(TypeError, "attention: enable_gqa is a int, expected bool", Q, K, V, enable_gqa=1),
    refused(TypeError, "attention: attn_mask is a list, expected a Tensor or None", Q, K, V, [[True]]),
    refused(TypeError, "attention: attn_mask has dtype int64, expected bool, float32", Q, K, V, torch.ones(3, 5).long()),
    refused(TypeError, "attention: attn_mask has dtype float64, expected bool, float32", Q, K, V, torch.ones(3, 5).double()),
    refused(TypeError, "attention: attn_mask has dtype float16, expected bool, bfloat16 or float32",
            Q.bfloat16(), K.bfloat16(), V.bfloat16(), torch.ones(3, 5).half()),
    refused(TypeError, "attention: attn_bias has dtype bool, expected float32", Q, K, V, attn_bias=torch.ones(3, 5) > 0),
    refused(RuntimeError, "attention: attn_mask is on meta, expected cpu (query's)", Q, K, V, torch.ones(3, 5, device="meta")),
    refused(ValueError, "attention: attn_mask has shape (5, 3), expected one that broadcasts to (2, 4, 3, 5)", Q, K, V, torch.ones(5, 3)),
    refused(ValueError, "attention: attn_mask has shape (1, 2, 4, 3, 5), expected one that broadcasts to (2, 4, 3, 5)",
            Q, K, V, torch.ones(1, 2, 4, 3, 5)),
    refused(ValueError, "attention: attn_bias has shape (2, 1, 1), expected one that broadcasts to (3, 5)",
            Q[0, 0], K[0, 0], V[0, 0], attn_bias=torch.ones(2, 1, 1)),
    refused(TypeError, "attention: dropout_p is a str, expected float", Q, K, V, dropout_p="0.1"),
    refused(ValueError, "attention: dropout_p is 1.5, expected 0 <= dropout_p <= 1", Q, K, V, dropout_p=1.5),
    refused(ValueError, "attention: dropout_p is -0.1, expected 0 <= dropout_p <= 1", Q, K, V, dropout_p=-0.1),
    refused(TypeError, "attention: is_causal is a Tensor, expected bool", Q, K, V, is_causal=torch.tensor(True)),
    refused(TypeError, "attention: scale is a Tensor, expected float", Q, K, V, scale=torch.tensor(1.0)),
    refused(ValueError, "attention: scale is nan, expected a finite float32", Q, K, V, scale=float("nan")),
    refused(ValueError, "attention: causal_alignment is 'left', expected 'top_left' or 'bottom_right'", Q, K, V, causal_alignment="left"),
    refused(TypeError, "attention: seqlens_k is a list, expected a Tensor or None", Q, K, V, seqlens_k=[1, 2]),
    refused(TypeError, "attention: seqlens_k has dtype float32, expected int32 or int64", Q, K, V, seqlens_k=torch.ones(2)),
    refused(ValueError, "attention: seqlens_k has shape (3,), expected (2,) (the batch)", Q, K, V, seqlens_k=torch.tensor([1, 2, 3])),
    refused(ValueError, "attention: seqlens_k[1] is 6, expected 0 to 5 (key's length)", Q, K, V, seqlens_k=torch.tensor([5, 6])),
    refused(ValueError, "attention: seqlens_k[0] is -1, expected 0 to 5 (key's length)", Q, K, V, seqlens_k=torch.tensor([-1, 6])),
    refused(TypeError, "attention: window is 3, expected (left, right), each int or None", Q, K, V, window=3),
    refused(TypeError, "attention: window is (1.5, 0), expected (left, right), each int or None", Q, K, V, window=(1.5, 0)),
    refused(ValueError, "attention: window is (-1, 0), expected (left, right) of at least 0", Q, K, V, window=(-1, 0)),
    refused(ValueError, "attention: softcap is 0.0, expected a positive finite number", Q, K, V, softcap=0.0),
    refused(TypeError, "attention: softcap is a str, expected float or None", Q, K, V, softcap="x"),
    refused(ValueError, "attention: alibi_slopes has shape (2,), expected (4,) or (2, 4)", Q, K, V, alibi_slopes=torch.ones(2)),
    refused(TypeError, "attention: sinks is a float, expected a Tensor or None", Q, K, V, sinks=1.0),
    refused(ValueError, "attention: sinks has shape (2, 4), expected (4,)", Q, K, V, sinks=torch.ones(2, 4)),
)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("error, message, args, kwargs", REFUSALS)
def test_refusals_say_what_was_expected(error, message, args, kwargs, backend):
    with use_backend(backend), pytest.raises(error) as raised:
        scaled_dot_product_attention(*args, **kwargs)
    assert str(raised.value) == message


RAW_REFUSALS = (
    ("attention: query has shape (3, 8), expected 4 dimensions", (Q[0, 0], K, V)),
    ("attention: key has dtype bfloat16, expected float32", (Q, K.bfloat16(), V)),
    ("attention: key has head_dim 7, expected 8 (query's)", (Q, K[..., :7], V)),
    ("attention: value has length 4, expected 5 (key's)", (Q, K, V[:, :, :4])),
    ("attention: key has batch 1, expected 2 (query's)", (Q, K[:1], V[:1])),
    ("attention: query has 4 heads, expected a multiple of 3 (key's)", (Q, K[:, :3], V[:, :3])),
    ("attention: bias has shape (3, 5), expected (2, 4, 3, 5)", (Q, K, V, torch.zeros(3, 5))),
    ("attention: mask has dtype float32, expected bool", (Q, K, V, None, torch.zeros(2, 4, 3, 5))),
    ("attention: seqlens_k has shape (3,), expected (2,)", (Q, K, V, None, None, torch.tensor([1, 2, 3]))),
)


@pytest.mark.parametrize("message, args", RAW_REFUSALS, ids=[message for message, _ in RAW_REFUSALS])
def test_the_raw_op_checks_before_it_touches_memory(message, args):
    if not extension.cpu_unavailable:
        arguments = (*args, *[None] * (9 - len(args)), 1.0, False, False, -1, -1, 0.0, 0.0)
        with pytest.raises(ValueError, match=re.escape(message)):
            torch.ops.transfuse.attention_forward(*arguments)


# ---- which backend ----


EVERY_OPTION = {
    "dropout_p": 0.5, "window": (4, 0), "softcap": 5.0, "alibi_slopes": torch.ones(suite.HEADS), "sinks": torch.ones(suite.HEADS),
}


@suite.in_every_dtype
@pytest.mark.parametrize("option", ("none", *EVERY_OPTION))
def test_every_option_in_every_dtype_takes_the_kernel_without_a_warning(option, dtype):
    options = {} if option == "none" else {option: EVERY_OPTION[option]}
    tensors = suite.inputs(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error", TransfuseWarning)
        explanation = explain(scaled_dot_product_attention, *tensors, **options)
        assert explanation.chosen == "cpu" and explanation.problem.features == tuple(options)
        output, lse = scaled_dot_product_attention(*tensors, is_causal=True, return_lse=True, **options)
    assert output.dtype == dtype and lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_a_fallback_is_seen_once_counted_and_refused_on_demand(monkeypatch):
    from transfuse import dispatch

    monkeypatch.setattr(dispatch, "_warned", set())
    reason = "head_dim is 513, the kernel takes up to 512"
    tensors = suite.inputs(batch=1, heads=1, len_q=2, len_k=2, head_dim=513, value_dim=513)
    before = sum(fallback_counts().values())
    with pytest.warns(TransfuseWarning, match=re.escape(reason)):
        scaled_dot_product_attention(*tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("error", TransfuseWarning)
        scaled_dot_product_attention(*tensors)
    assert sum(fallback_counts().values()) == before + 2
    with use_backend("cpu"), pytest.raises(RuntimeError, match=re.escape(reason)):
        scaled_dot_product_attention(*tensors)
    assert reason in str(explain(scaled_dot_product_attention, *tensors))


# ---- the reference ----


def test_reference_gradients_of_every_option():
    """First and second derivatives by finite differences, all options at once."""
    query, key, value = (t.detach().requires_grad_() for t in suite.inputs(
        torch.float64, batch=2, heads=2, len_q=3, len_k=4, head_dim=2, value_dim=3))
    extra = [draw(2, 1, 4, dtype=torch.float64, seed=20, requires_grad=True), draw(2, dtype=torch.float64, seed=21, requires_grad=True),
             draw(2, dtype=torch.float64, seed=22, requires_grad=True)]
    options = dict(
        is_causal=True, causal_alignment="bottom_right", seqlens_k=torch.tensor([4, 3]), window=(2, None), softcap=2.0, return_lse=True,
        dropout_p=0.3, dropout_seed=torch.tensor([5, 6]), attn_mask=torch.tensor([True, True, False, True]), scale=0.7,
    )

    def run(query, key, value, attn_bias, alibi_slopes, sinks):
        return attention_reference(query, key, value, attn_bias=attn_bias, alibi_slopes=alibi_slopes, sinks=sinks, **options)

    assert torch.autograd.gradcheck(run, (query, key, value, *extra))
    assert torch.autograd.gradgradcheck(run, (query, key, value, *extra))


def test_public_gradcheck_on_the_reference_backend():
    tensors = suite.inputs(torch.float64, batch=1, heads=2, len_q=3, len_k=4, head_dim=2, value_dim=3)
    attn_bias = draw(4, dtype=torch.float64, seed=20, requires_grad=True)
    with use_backend("reference"):
        assert torch.autograd.gradcheck(
            lambda q, k, v, b: scaled_dot_product_attention(q, k, v, attn_bias=b, is_causal=True, return_lse=True), (*tensors, attn_bias)
        )


# ---- mutants: the assertions of this suite must fail on every one of them ----


def mutate(monkeypatch, change):
    """Replaces the raw forward's arguments: change(arguments) -> arguments, (query, key, value, bias, mask, seqlens_k, ...)."""
    original = page._forward
    monkeypatch.setattr(page, "_forward", lambda *arguments: original(*change(list(arguments))))


def replaced(index, value):
    def change(arguments):
        arguments[index] = value(arguments[index]) if callable(value) else value
        return arguments

    return change


MUTANTS = {
    "scale * 1.01": ("none", replaced(9, lambda scale: scale * 1.01)),
    "value * 1.001": ("none", replaced(2, lambda value: value * 1.001)),
    "boolean mask dropped": ("boolean", replaced(4, None)),
    "boolean mask inverted": ("boolean", replaced(4, torch.logical_not)),
    "float mask dropped": ("float", replaced(3, None)),
    "causal ignored": ("causal", replaced(10, False)),
    "alignment ignored": ("causal bottom_right", replaced(11, False)),
    "lengths ignored": ("lengths", replaced(5, None)),
    "lengths one too long": ("lengths", replaced(5, lambda seqlens: seqlens + 1)),
    "one key too many masked": ("none", replaced(4, torch.arange(suite.LEN_K).ne(suite.LEN_K - 1).expand(2, 4, 37, 53))),
}


@pytest.mark.parametrize("mutant", MUTANTS)
@suite.in_every_dtype
def test_assert_matches_reference_kills(mutant, dtype, monkeypatch):
    if mutant == "value * 1.001" and dtype == torch.bfloat16:
        pytest.skip("value * 1.001 rounds back to value in bfloat16")
    name, change = MUTANTS[mutant]
    options = suite.MASKS[name](dtype)
    assert_matches_reference(scaled_dot_product_attention, *suite.inputs(dtype), return_lse=True, **options)
    mutate(monkeypatch, change)
    with pytest.raises(AssertionError):
        assert_matches_reference(scaled_dot_product_attention, *suite.inputs(dtype), return_lse=True, **options)


@pytest.mark.parametrize(
    "mutant, dtype",
    (("scale * 1.01", torch.float32), ("scale * 1.01", torch.bfloat16), ("value * 1.001", torch.float32)),
)
def test_the_pooled_criterion_kills(mutant, dtype, monkeypatch):
    mutate(monkeypatch, MUTANTS[mutant][1])
    with pytest.raises(AssertionError):
        suite.assert_as_exact_as_torch("normal", dtype)


GRADIENT_MUTANTS = {
    "grad_query * 1.001": lambda grads: (grads[0] * 1.001, *grads[1:]),
    "grad_key * 1.001": lambda grads: (grads[0], grads[1] * 1.001, *grads[2:]),
    "grad_value * 1.001": lambda grads: (*grads[:2], grads[2] * 1.001, *grads[3:]),
    "grad_bias transposed": lambda grads: (*grads[:3], grads[3].flip(-1)),
    "grad_query and grad_key swapped": lambda grads: (grads[1], grads[0], *grads[2:]),
}


@pytest.mark.parametrize("mutant", GRADIENT_MUTANTS)
def test_assert_matches_reference_kills_gradients(mutant, monkeypatch):
    original = page._backward
    monkeypatch.setattr(page, "_backward", lambda *arguments: GRADIENT_MUTANTS[mutant](original(*arguments)))
    query, key, value = suite.inputs(len_q=suite.LEN_K)
    with pytest.raises(AssertionError):
        assert_matches_reference(scaled_dot_product_attention, query, key, value, attn_bias=suite.bias(suite.LEN_K))


def test_a_dropped_grad_lse_is_seen(monkeypatch):
    original = page._backward
    monkeypatch.setattr(page, "_backward", lambda grad_output, grad_lse, *rest: original(grad_output, None, *rest))
    with pytest.raises(AssertionError):
        assert_matches_reference(scaled_dot_product_attention, *suite.inputs(), return_lse=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_scores_that_are_all_minus_infinity_weigh_nothing(dtype):
    """As torch: a valid key whose score is -inf has weight 0, and a row of them gives 0. No key is excluded here."""
    query, key, value = (torch.ones(1, 1, 3, 8, dtype=dtype, requires_grad=True) for _ in range(3))
    with torch.no_grad():
        key[:] = -torch.inf
        key[0, 0, 0] = 1.0
        query[0, 0, 0] = 2.0
    for keys in (slice(None), slice(1, None)):
        q, k, v = query, key[:, :, keys], value[:, :, keys]
        output, lse = scaled_dot_product_attention(q, k, v, return_lse=True)
        with use_backend("reference"):
            exact, exact_lse = scaled_dot_product_attention(q, k, v, return_lse=True)
        assert torch.equal(output, exact) and torch.allclose(lse, exact_lse)
        assert torch.equal(output, torch.nn.functional.scaled_dot_product_attention(q, k, v))
    assert not output.any() and (lse == -torch.inf).all()


def test_autocast_takes_a_mask_of_another_dtype():
    query, mask = torch.randn(1, 2, 5, 8), torch.randn(5, 5).half()
    with torch.autocast("cpu", torch.bfloat16):
        ours = scaled_dot_product_attention(query, query, query, attn_mask=mask)
        stock = torch.nn.functional.scaled_dot_product_attention(query, query, query, attn_mask=mask)
    assert ours.dtype == stock.dtype == torch.bfloat16
    assert (ours.float() - stock.float()).abs().max() < 0.05
