"""window, softcap, ALiBi and sinks in attention: alone, in pairs with all else, at the edges, and bit for bit."""

import itertools
import random

import pytest
import test_attention as suite
import torch

from transfuse import scaled_dot_product_attention, testing, use_backend
from transfuse.testing import assert_close, assert_matches_reference, draw, nan_filled_empty, ulp_distance

in_every_dtype = suite.in_every_dtype
BATCH, HEADS, LEN_Q, LEN_K = 2, 4, 37, 300  # keys of three blocks, so that a window has blocks to skip


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors: waking a second thread costs more than the work. Tests about threads set their own count."""
    torch.set_num_threads(1)


def inputs(dtype, **sizes):
    return suite.inputs(dtype, **{"len_q": LEN_Q, "len_k": LEN_K, **sizes})


def per_head(*shape, seed=30, scale=1.0, shift=0.0):
    """Slopes or sinks that require grad."""
    return draw(*shape, seed=seed, scale=scale, shift=shift, requires_grad=True)


BOTTOM_RIGHT = {"causal_alignment": "bottom_right"}
FEATURES = {
    "window": lambda: {"window": (5, 3)},
    "window of one key": lambda: {"window": (0, 0)},
    "window to the left": lambda: {"window": (2, None), **BOTTOM_RIGHT},
    "window to the right": lambda: {"window": (None, 4)},
    "window over everything": lambda: {"window": (1000, 10**30)},
    "window, causal": lambda: {"window": (150, 2), "is_causal": True, **BOTTOM_RIGHT},
    "window of no key for the last rows": lambda: {"window": (3, 3), "seqlens_k": torch.tensor([9, 300])},
    "window, boolean": lambda: {
        "window": (40, 20),
        "attn_mask": suite.keep_mask(BATCH, 1, LEN_Q, LEN_K),
        **BOTTOM_RIGHT,
    },
    "softcap": lambda: {"softcap": 2.0},
    "softcap, small": lambda: {"softcap": 0.1},
    "softcap, large": lambda: {"softcap": 1e4},
    "softcap, negative scale": lambda: {"softcap": 3.0, "scale": -0.4},
    "softcap, bias": lambda: {"softcap": 1.5, "attn_bias": suite.bias(HEADS, LEN_Q, LEN_K)},
    "slopes": lambda: {"alibi_slopes": per_head(HEADS)},
    "slopes of every entry": lambda: {"alibi_slopes": per_head(BATCH, HEADS), **BOTTOM_RIGHT},
    "slopes, lengths": lambda: {"alibi_slopes": per_head(HEADS), "seqlens_k": torch.tensor([40, 300]), **BOTTOM_RIGHT},
    "sinks": lambda: {"sinks": per_head(HEADS)},
    "large sinks": lambda: {"sinks": per_head(HEADS, shift=6.0)},
    "sinks that weigh nothing": lambda: {"sinks": per_head(HEADS, shift=-60.0)},
    "sinks, rows without keys": lambda: {
        "sinks": per_head(HEADS),
        "seqlens_k": torch.tensor([0, 20]),
        "is_causal": True,
        **BOTTOM_RIGHT,
    },
    "all of them": lambda: {
        "window": (200, 1),
        "softcap": 3.0,
        "alibi_slopes": per_head(BATCH, HEADS),
        "sinks": per_head(HEADS),
        "attn_bias": suite.bias(1, HEADS, 1, LEN_K),
        "attn_mask": suite.keep_mask(BATCH, 1, LEN_Q, LEN_K),
        **BOTTOM_RIGHT,
    },
}


@in_every_dtype
@pytest.mark.parametrize("name", FEATURES)
def test_features_match_reference(name, dtype):
    with nan_filled_empty():
        assert_matches_reference(scaled_dot_product_attention, *inputs(dtype), return_lse=True, **FEATURES[name]())


@pytest.mark.parametrize("name", ("slopes", "slopes of every entry", "sinks", "all of them"))
def test_slopes_and_sinks_alone_may_require_grad(name):
    assert_matches_reference(
        scaled_dot_product_attention, *inputs(torch.float32, requires_grad=False), return_lse=True, **FEATURES[name]()
    )


@in_every_dtype
@pytest.mark.parametrize("storage", (torch.float64, torch.bfloat16, torch.float16))
def test_slopes_and_sinks_come_in_any_dtype(storage, dtype):
    options = {
        "alibi_slopes": draw(HEADS, dtype=storage, scale=0.05, requires_grad=True),
        "sinks": draw(HEADS, dtype=storage, seed=1, requires_grad=True),
    }
    output = scaled_dot_product_attention(*inputs(dtype), **options)
    grads = torch.autograd.grad(output.sum(), list(options.values()))
    assert all(grad.dtype == storage and grad.shape == (HEADS,) for grad in grads)
    if storage != torch.float64 or dtype == torch.float64:  # else a float64 gradient of what was computed in float32
        assert_matches_reference(scaled_dot_product_attention, *inputs(dtype), return_lse=True, **options)


# ---- everything with everything ----

AXES = {
    "dtype": suite.DTYPES,
    "lengths": ((33, 150), (150, 33), (1, 260), (17, 17)),
    "head_dims": ((16, 16), (24, 40), (65, 8)),
    "kv_heads": (4, 2, 1),
    "causal": (None, "top_left", "bottom_right"),
    "window": (None, (3, 0), (None, 5), (40, 7)),
    "softcap": (None, 2.0, 50.0),
    "slopes": (None, "head", "batch"),
    "sinks": (None, 0.0, 8.0),
    "mask": (None, "boolean", "padding", "float"),
    "bias": (None, "full", "row", "column"),
    "seqlens_k": (False, True),
    "scale": (None, -0.3),
}


def pairwise(axes, seed=0, tries=60):
    """Cases that hold every pair of values of two axes at least once: greedily the best of some random ones."""
    choose = random.Random(seed)
    names = list(axes)
    pairs = {
        (a, i, b, j)
        for a, b in itertools.combinations(names, 2)
        for i in range(len(axes[a]))
        for j in range(len(axes[b]))
    }
    cases = []
    while pairs:
        first = choose.choice(sorted(pairs))
        best, best_covers = None, set()
        for _ in range(tries):
            case = {name: choose.randrange(len(values)) for name, values in axes.items()}
            case[first[0]], case[first[2]] = first[1], first[3]
            covers = {(a, case[a], b, case[b]) for a, b in itertools.combinations(names, 2)} & pairs
            if len(covers) > len(best_covers):
                best, best_covers = case, covers
        pairs -= best_covers
        cases.append({name: axes[name][i] for name, i in best.items()})
    return cases


PAIRS = pairwise(AXES)


@pytest.mark.parametrize("index", range(len(PAIRS)))
def test_every_pair_of_options(index):
    case = PAIRS[index]
    dtype, (len_q, len_k), (head_dim, value_dim) = case["dtype"], case["lengths"], case["head_dims"]
    tensors = suite.inputs(
        dtype, seed=index, kv_heads=case["kv_heads"], len_q=len_q, len_k=len_k, head_dim=head_dim, value_dim=value_dim
    )
    masks = {
        None: None,
        "boolean": suite.keep_mask(BATCH, HEADS, len_q, len_k, seed=index),
        "padding": torch.arange(len_k) < torch.tensor([len_k // 2, len_k]).view(2, 1, 1, 1),
        "float": torch.where(
            suite.keep_mask(len_q, len_k), draw(BATCH, 1, len_q, len_k, dtype=dtype, seed=index), -torch.inf
        ),
    }
    biases = {None: None, "full": (BATCH, HEADS, len_q, len_k), "row": (HEADS, len_q, 1), "column": (len_k,)}
    bias_shape = biases[case["bias"]]
    slopes = {None: None, "head": (HEADS,), "batch": (BATCH, HEADS)}[case["slopes"]]
    options = {
        "attn_mask": masks[case["mask"]],
        "attn_bias": None if bias_shape is None else draw(*bias_shape, dtype=dtype, seed=index, requires_grad=True),
        "is_causal": case["causal"] is not None,
        "causal_alignment": case["causal"] or ("bottom_right" if index % 2 else "top_left"),
        "window": case["window"],
        "softcap": case["softcap"],
        "alibi_slopes": None if slopes is None else per_head(*slopes, seed=index),
        "sinks": None if case["sinks"] is None else per_head(HEADS, seed=index, shift=case["sinks"]),
        "seqlens_k": torch.tensor([len_k // 3, len_k]) if case["seqlens_k"] else None,
        "scale": case["scale"],
    }
    if case["mask"] == "float":
        options["attn_mask"].requires_grad_()
    with nan_filled_empty(), use_backend("auto"):
        assert_matches_reference(scaled_dot_product_attention, *tensors, enable_gqa=True, return_lse=True, **options)


def test_gradcheck_of_every_argument():
    """The compiled kernels in float64 against finite differences, all options at once."""
    tensors = suite.inputs(torch.float64, batch=2, heads=2, kv_heads=1, len_q=3, len_k=5, head_dim=2, value_dim=3)
    extra = [
        draw(*shape, dtype=torch.float64, seed=20 + i, requires_grad=True)
        for i, shape in enumerate(((2, 1, 3, 5), (2, 1, 5), (2, 2), (2,)))
    ]

    def run(query, key, value, attn_mask, attn_bias, alibi_slopes, sinks):
        return scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask,
            attn_bias=attn_bias,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            window=(3, 1),
            softcap=1.5,
            seqlens_k=torch.tensor([5, 4]),
            enable_gqa=True,
            return_lse=True,
            scale=0.7,
            **BOTTOM_RIGHT,
        )

    with use_backend("cpu"):
        assert torch.autograd.gradcheck(run, (*tensors, *extra))
        assert torch.autograd.gradcheck(
            lambda *t: scaled_dot_product_attention(*t, is_causal=True, enable_gqa=True), tensors
        )


# ---- window ----


@in_every_dtype
@pytest.mark.parametrize("scale", (1.0, 40.0), ids=("", "saturated"))
@pytest.mark.parametrize("window", ((0, 0), (7, 0), (None, 3), (140, 2), (0, 260)))
def test_a_window_gives_the_bits_of_the_same_mask(window, scale, dtype):
    """The window skips blocks of keys, the mask reads them all; nothing else may differ, forward or backward."""
    tensors = inputs(dtype, len_q=290, scale=scale**0.5)
    left, right = window
    distance = torch.arange(LEN_K) - torch.arange(290).view(-1, 1) - 10  # bottom_right
    band = (distance <= right) & (distance >= (-1000 if left is None else -left))
    windowed = suite.run_all(*tensors, window=window, **BOTTOM_RIGHT)
    for actual, expected in zip(windowed, suite.run_all(*tensors, attn_mask=band)):
        assert torch.equal(actual, expected)


def test_causal_is_a_window():
    tensors = inputs(torch.float32)
    for actual, expected in zip(suite.run_all(*tensors, window=(None, 0)), suite.run_all(*tensors, is_causal=True)):
        assert torch.equal(actual, expected)


@in_every_dtype
@pytest.mark.parametrize("poison", (torch.nan, torch.inf))
def test_keys_outside_every_window_may_hold_anything(poison, dtype):
    tensors = [t.detach() for t in inputs(dtype)]
    options = {"window": (30, 9), "softcap": 5.0, "alibi_slopes": draw(HEADS), "sinks": draw(HEADS, seed=1)}
    clean = suite.run_all(*tensors, **options)
    for tensor in tensors[1:]:
        tensor[:, :, LEN_Q + 9 :] = poison
    for actual, expected in zip(suite.run_all(*tensors, **options), clean):
        assert torch.equal(actual, expected)


@in_every_dtype
def test_a_poisoned_key_reaches_only_the_rows_whose_window_holds_it(dtype):
    tensors = [t.detach() for t in inputs(dtype)]
    clean = scaled_dot_product_attention(*tensors, window=(2, 2), softcap=3.0)
    tensors[1][:, :, 20] = torch.nan
    tensors[2][:, :, 20] = torch.nan
    output = scaled_dot_product_attention(*tensors, window=(2, 2), softcap=3.0)
    reached = (torch.arange(LEN_Q) - 20).abs() <= 2
    assert output[:, :, reached].isnan().all() and torch.equal(output[:, :, ~reached], clean[:, :, ~reached])


# ---- softcap ----


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_softcap_has_no_cancellation(dtype):
    """With one key lse is the score itself: c tanh(s / c) and its slope, each within a few units of the last place."""
    size = torch.logspace(-30, 2.3, 4001, dtype=torch.float64).to(dtype)
    query = torch.cat((size, -size)).view(1, 1, -1, 1).requires_grad_()
    one = torch.ones(1, 1, 1, 1, dtype=dtype)
    for cap in (0.3, 1.0, 30.0):
        _, lse = scaled_dot_product_attention(query, one, one, softcap=cap, scale=1.0, return_lse=True)
        (slope,) = torch.autograd.grad(lse.sum(), query)
        exact = query.detach()[..., 0].double() / cap
        assert float(ulp_distance(lse.detach(), cap * exact.tanh()).max()) <= testing.MAX_ULP["attention_softcap"]
        exact_slope = exact.cosh().square().reciprocal()
        steepness = 1 + 2 * exact.abs()  # what the slope, near 4 exp(-2x), makes of the rounding of x
        near = exact.abs() < 40  # beyond, the slope is below 1e-34
        assert (
            float((ulp_distance(slope[..., 0], exact_slope) / steepness)[near].max())
            <= testing.MAX_ULP["attention_softcap_slope"]
        )
        assert bool((slope[..., 0][~near] <= 1e-30).all())


@in_every_dtype
def test_a_softcap_bounds_infinite_scores(dtype):
    """tanh maps a +inf score to the cap, where without it the row would be NaN."""
    query, key, value = (t.detach() for t in inputs(dtype, head_dim=1))
    query[:, :, 3] = torch.inf
    with use_backend("reference"):
        exact = scaled_dot_product_attention(query.double(), key.double(), value.double(), softcap=4.0)
    assert_close(scaled_dot_product_attention(query, key, value, softcap=4.0), exact, LEN_K)


@in_every_dtype
def test_a_tiny_softcap_is_a_mean(dtype):
    """scale / cap overflows a float: a score of 0 must not become 0 * inf."""
    query, key, value = inputs(dtype)
    query = torch.where(torch.arange(LEN_Q).view(-1, 1) % 2 == 0, 0, query.detach()).requires_grad_()
    results = scaled_dot_product_attention(query, key, value, softcap=1e-40)
    assert_close(results, value.detach().double().mean(2, keepdim=True).expand_as(results), LEN_K)
    grads = torch.autograd.grad(results.sum(), (query, key, value))
    assert all(bool(grad.isfinite().all()) for grad in grads)


# ---- saturated rows ----

SATURATED = {
    "bias": lambda: {"attn_bias": suite.bias(HEADS, LEN_Q, LEN_K)},
    "slopes": lambda: {"alibi_slopes": draw(HEADS, scale=20.0)},
    "softcap": lambda: {"softcap": 3e3},
    "sinks": lambda: {"sinks": draw(HEADS, scale=100.0, shift=900.0)},
    "window": lambda: {"window": (30, 100), **BOTTOM_RIGHT},
    "all": lambda: {**SATURATED["slopes"](), **SATURATED["softcap"](), **SATURATED["sinks"](), **SATURATED["window"]()},
}


@in_every_dtype
@pytest.mark.parametrize("name", SATURATED)
def test_scores_of_a_thousand_keep_their_precision(name, dtype):
    """Near ties at scores of 1e3: rounding a score to float32 would cost 1e-4, a hundred times what is allowed."""
    query, key, value = (t.detach() for t in inputs(dtype, head_dim=64, scale=1e3**0.5))
    key[:, :, LEN_K // 2 :, :48] = key[:, :, : LEN_K // 2, :48]
    query[..., 48:] /= 1e3
    options = SATURATED[name]()
    output, lse = scaled_dot_product_attention(query, key, value, return_lse=True, **options)
    with use_backend("reference"):
        exact, exact_lse = scaled_dot_product_attention(
            *(t.double() for t in (query, key, value)), return_lse=True, **options
        )
    if dtype == torch.float64:  # whose scores carry 1e3 * 2^-53, as do the oracle's
        assert_close(output, exact, LEN_K**2, slack=1e3)
    else:
        assert_close(output, exact, LEN_K)
    assert_close(lse, exact_lse, LEN_K)


# ---- sinks ----


@in_every_dtype
def test_a_row_with_no_key_has_its_sink_alone(dtype):
    tensors = inputs(dtype)
    sinks = per_head(HEADS)
    output, lse = scaled_dot_product_attention(*tensors, sinks=sinks, seqlens_k=torch.tensor([0, 0]), return_lse=True)
    assert not output.any() and torch.equal(lse, sinks.to(lse.dtype).view(-1, 1).expand(BATCH, HEADS, LEN_Q))
    grads = torch.autograd.grad(lse.sum() + output.sum(), (*tensors, sinks))
    assert not any(grad.any() for grad in grads[:3])
    assert torch.equal(grads[3], torch.full((HEADS,), float(BATCH * LEN_Q)))


@in_every_dtype
def test_a_sink_may_take_all_the_weight(dtype):
    """Scores so far below the sink that its weight overflows when it is counted in theirs."""
    for bias in (-80.0, -95.0, -300.0, -800.0):
        assert_matches_reference(
            scaled_dot_product_attention,
            *inputs(dtype),
            return_lse=True,
            sinks=per_head(HEADS),
            attn_bias=torch.where(torch.arange(LEN_Q) % 2 == 0, bias, 0.0).view(-1, 1),
        )


@in_every_dtype
@pytest.mark.parametrize("sink", (torch.nan, torch.inf, -torch.inf))
def test_sinks_that_are_no_numbers(sink, dtype):
    """NaN and +inf poison the rows of their head alone; -inf is no sink at all."""
    tensors = inputs(dtype, requires_grad=False)
    sinks = draw(HEADS)
    clean = scaled_dot_product_attention(*tensors, sinks=sinks, return_lse=True)
    sinks[2] = sink
    results = scaled_dot_product_attention(*tensors, sinks=sinks, return_lse=True)
    without = scaled_dot_product_attention(*tensors, return_lse=True)
    for actual, other, none in zip(results, clean, without):
        assert torch.equal(actual[:, [0, 1, 3]], other[:, [0, 1, 3]])
        assert torch.equal(actual[:, 2], none[:, 2]) if sink == -torch.inf else actual[:, 2].isnan().all()


@in_every_dtype
def test_a_sink_in_the_sum_is_one_more_key(dtype):
    """A key whose score is the sink and whose value is 0 gives the same result."""
    query, key, value = inputs(dtype, requires_grad=False)
    bias = torch.zeros(1, HEADS, 1, LEN_K + 1)
    bias[0, :, 0, LEN_K] = draw(HEADS, seed=5)
    longer = [torch.cat((t, t.new_zeros(BATCH, HEADS, 1, t.shape[-1])), dim=2) for t in (key, value)]
    with_key = scaled_dot_product_attention(query, *longer, attn_bias=bias, return_lse=True)
    with_sink = scaled_dot_product_attention(query, key, value, sinks=bias[0, :, 0, LEN_K], return_lse=True)
    for actual, expected in zip(with_sink, with_key):
        assert_close(actual, expected, LEN_K)


# ---- one reduction order ----


def everything():
    return {
        "window": (90, 5),
        "softcap": 4.0,
        "alibi_slopes": draw(HEADS, seed=1).abs(),
        "sinks": draw(HEADS, seed=2),
        "attn_bias": draw(HEADS, LEN_Q, LEN_K, seed=3),
        **BOTTOM_RIGHT,
    }


def run_everything(tensors, grad, grad_lse, options):
    """Output, lse and the gradients of all tensors, options included."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    extra = {name: t.detach().requires_grad_() for name, t in options.items() if isinstance(t, torch.Tensor)}
    output, lse = scaled_dot_product_attention(*leaves, return_lse=True, **{**options, **extra})
    grads = torch.autograd.grad((output, lse), (*leaves, *extra.values()), (grad, grad_lse))
    return [output.detach(), lse.detach(), *grads]


@in_every_dtype
def test_threads_and_repeats_change_no_bit(dtype):
    tensors = inputs(dtype, batch=3)
    grads = (
        draw(3, HEADS, LEN_Q, suite.VALUE_DIM, dtype=dtype, seed=8),
        draw(3, HEADS, LEN_Q, seed=9).to(suite_lse(dtype)),
    )
    expected = run_everything(tensors, *grads, everything())
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        for actual, exact in zip(run_everything(tensors, *grads, everything()), expected):
            assert torch.equal(actual, exact), f"{threads} threads"


def suite_lse(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@in_every_dtype
def test_an_entry_does_not_depend_on_its_batch(dtype):
    tensors = inputs(dtype, batch=5)
    grads = (
        draw(5, HEADS, LEN_Q, suite.VALUE_DIM, dtype=dtype, seed=8),
        draw(5, HEADS, LEN_Q, seed=9).to(suite_lse(dtype)),
    )
    whole = run_everything(tensors, *grads, everything())[:5]
    for entry in range(5):
        alone = run_everything(
            [t[entry : entry + 1] for t in tensors], *(g[entry : entry + 1] for g in grads), everything()
        )[:5]
        for one, all_of_them in zip(alone, whole):
            assert torch.equal(one[0], all_of_them[entry])


@in_every_dtype
def test_a_windowed_row_does_not_depend_on_what_lies_outside(dtype):
    """The same window of keys at the same places, with and without a future and a past."""
    query, key, value = inputs(dtype, len_q=LEN_K, requires_grad=False)
    options = {"window": (20, 0), "softcap": 4.0, "sinks": draw(HEADS)}
    whole = scaled_dot_product_attention(query, key, value, **options)
    for length in (1, 64, 150, 257):
        prefix = scaled_dot_product_attention(*(t[:, :, :length] for t in (query, key, value)), **options)
        assert torch.equal(prefix, whole[:, :, :length])
    suffix = scaled_dot_product_attention(*(t[:, :, 128:] for t in (query, key, value)), **options)
    assert torch.equal(suffix[:, :, 20:], whole[:, :, 148:])
