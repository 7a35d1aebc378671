"""The lectures' worked examples, number by number, on every dtype and backend that has the op."""

import math

import pytest
import torch

from transfuse import add_layer_norm, masked_softmax, scaled_dot_product_attention, use_backend, varlen_attention
from transfuse.testing import assert_close, draw

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
ON = [(backend, name) for backend, names in (("cpu", ("float32", "bfloat16")), ("reference", DTYPES)) for name in names]


@pytest.fixture
def dtype(request):
    return DTYPES[request.param]


@pytest.fixture(autouse=True)
def _on_backend(request):
    with use_backend(request.getfixturevalue("backend")):
        yield


everywhere = pytest.mark.parametrize("backend, dtype", ON, indirect=["dtype"])

# ICE 3: two tokens of four features, d_k = 3.
X = [[1, 2, 3, -1], [3, -4, -7, 5]]
W_Q = [[-1, 2, 0], [2, 3, -5], [1, 0, 0], [-3, 1, 2]]
W_K = [[1, 2, 3], [2, 4, 3], [3, 0, 3], [-1, 5, 2]]
W_V = [[-1, -2, 3], [2, -4, 0], [0, 0, 1], [1, 0, -7]]


def project(weight, dtype):
    return torch.tensor(X, dtype=dtype) @ torch.tensor(weight, dtype=dtype)


@everywhere
def test_ice1_token_plus_position(backend, dtype):
    token, position = torch.tensor([[1, 2], [-1, 3]], dtype=dtype), torch.tensor([[2, 3], [1, 5]], dtype=dtype)
    _, total = add_layer_norm(token, position, (2,))
    assert total.tolist() == [[3, 5], [0, 8]]


ALPHA = [[0.7, 0.3], [0.4, 0.6]]


@everywhere
def test_ice2_weighted_values(backend, dtype):
    """alpha @ v, through attention: queries of 0 leave the scores to the additive mask log(alpha)."""
    value = torch.tensor([[1, 2], [-2, 3]], dtype=dtype)
    mask = torch.tensor(ALPHA, dtype=torch.float64).log().to(dtype if dtype == torch.float64 else torch.float32)
    output, lse = scaled_dot_product_attention(torch.zeros(2, 2, dtype=dtype), value, value, mask, return_lse=True)
    assert_close(output, torch.tensor([[0.1, 2.3], [-0.8, 2.6]], dtype=torch.float64), 2)
    assert float(lse.abs().max()) < 1e-6


@everywhere
def test_ice2_softmax_of_the_logarithm(backend, dtype):
    alpha = torch.tensor(ALPHA, dtype=torch.float64)
    logits = alpha.log().to(dtype)
    assert_close(masked_softmax(logits), logits.double().softmax(-1), 2)


@everywhere
def test_ice3_projections_are_exact(backend, dtype):
    assert project(W_Q, dtype).tolist() == [[9, 7, -12], [-33, -1, 30]]
    assert project(W_K, dtype).tolist() == [[15, 5, 16], [-31, 15, -14]]
    assert project(W_V, dtype).tolist() == [[2, -10, 13], [-6, 10, -33]]
    assert (project(W_Q, torch.float64) @ project(W_K, torch.float64).mT).tolist() == [[-22, -6], [-20, 588]]


@everywhere
def test_ice3_weights(backend, dtype):
    """Row 1 is where a missing 1 / sqrt(d_k) shows: unscaled its second weight is 0.99999989."""
    query, key = project(W_Q, dtype), project(W_K, dtype)
    weights, lse = scaled_dot_product_attention(query, key, torch.eye(2, dtype=dtype), return_lse=True)
    small = 1 / (1 + math.exp(16 / math.sqrt(3)))
    assert f"{small:.6e} {1 - small:.9f}" == "9.730097e-05 0.999902699"
    assert_close(weights, torch.tensor([[small, 1 - small], [0.0, 1.0]], dtype=torch.float64), 3, slack=2.0)
    assert_close(weights[0, :1], torch.tensor([small], dtype=torch.float64), 3, slack=4.0)
    assert float(weights[1, 1]) == 1.0
    if dtype == torch.float64:
        assert math.isclose(float(weights[1, 0]), 3.5486e-153, rel_tol=1e-4)
    else:
        assert float(weights[1, 0]) == 0.0
    assert f"{588 / math.sqrt(3):.10f}" == "339.4819582835"
    assert_close(lse[1:], torch.tensor([588 / math.sqrt(3)], dtype=torch.float64), 3)


@everywhere
def test_ice3_output(backend, dtype):
    query, key, value = project(W_Q, dtype), project(W_K, dtype), project(W_V, dtype)
    expected = torch.tensor([[-5.99922159, 9.99805398, -32.99552416], [-6, 10, -33]], dtype=torch.float64)
    output = scaled_dot_product_attention(query, key, value)
    if dtype == torch.float64:
        assert torch.equal(output.mul(1e8).round(), expected.mul(1e8).round())
    else:
        assert_close(output, expected, 3)
    assert output[1].tolist() == [-6, 10, -33]


@everywhere
def test_ice3_as_one_packed_sequence_among_others(backend, dtype):
    query, key, value = (project(weight, dtype) for weight in (W_Q, W_K, W_V))
    three = [torch.cat((t, t, t + 1)).unsqueeze(1) for t in (query, key, value)]
    output = varlen_attention(*three, torch.tensor([0, 2, 4, 6]))
    expected = scaled_dot_product_attention(query, key, value)
    assert torch.equal(output[:2, 0], expected) and torch.equal(output[2:4, 0], expected)


TEACHER = "<sos> Ich have einen apfel gegessen <eos>".split()


@everywhere
def test_teacher_forcing_sees_nothing_of_the_future(backend, dtype):
    """The 7 x 7 table of weights: above the diagonal exactly +0, rows sum to 1."""
    length = len(TEACHER)
    assert length == 7
    query, key = draw(length, 16, dtype=dtype, seed=1), draw(length, 16, dtype=dtype, seed=2)
    scores = (query.double() @ key.double().mT).to(dtype)
    tables = {
        "attention": scaled_dot_product_attention(query, key, torch.eye(length, dtype=dtype), is_causal=True),
        "masked_softmax": masked_softmax(scores, scale=0.25, is_causal=True),
    }
    future = torch.ones(length, length).triu(1).bool()
    for weights in tables.values():
        assert not weights[future].any() and not weights[future].signbit().any()
        assert_close(weights.double().sum(-1).to(dtype), torch.ones(length, dtype=torch.float64), length)
        assert float(weights[0, 0]) == 1.0
    exact = (query.double() @ key.double().mT * 0.25).masked_fill(future, -torch.inf).softmax(-1)
    assert_close(tables["attention"], exact, 16)


@everywhere
def test_teacher_forcing_gives_a_token_no_gradient_from_before_it(backend, dtype):
    tensors = [draw(7, 16, dtype=dtype, seed=i, requires_grad=True) for i in range(3)]
    output = scaled_dot_product_attention(*tensors, is_causal=True)
    for grad in torch.autograd.grad(output[:3].sum(), tensors):
        assert not grad[3:].any()


@everywhere
def test_cross_attention_with_the_scale_of_the_model(backend, dtype):
    """7 target tokens look at 5 source tokens; the lecture divides by sqrt(d_model), not sqrt(d_k)."""
    d_model, heads = 32, 4
    query, key, value = (draw(heads, length, d_model // heads, dtype=dtype, seed=i) for i, length in enumerate((7, 5, 5)))
    output = scaled_dot_product_attention(query, key, value, scale=d_model**-0.5)
    weights = (query.double() @ key.double().mT / math.sqrt(d_model)).softmax(-1)
    assert output.shape == (heads, 7, d_model // heads) and weights.shape == (heads, 7, 5)
    assert_close(output, weights @ value.double(), 5)
    unscaled = scaled_dot_product_attention(query, key, value)
    assert not torch.equal(output, unscaled)
