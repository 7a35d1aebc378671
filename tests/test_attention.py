"""scaled_dot_product_attention against the float64 oracle and against torch, forward and backward, and what it promises besides."""

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as torch_attention

from transfuse import scaled_dot_product_attention, testing
from transfuse.dispatch import use_backend
from transfuse.testing import ATTENTION_TINY_ROW_ERROR, assert_close, assert_matches_reference, draw

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
in_every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=("float32", "bfloat16", "float16", "float64"))


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors: waking a second thread costs more than the work. Tests about threads set their own count."""
    torch.set_num_threads(1)

# Odd sizes, so that every tile has a ragged end; lengths differ, and so do the head dimensions.
BATCH, HEADS, LEN_Q, LEN_K, HEAD_DIM, VALUE_DIM = 2, 4, 37, 53, 24, 40


def inputs(dtype=torch.float32, seed=0, batch=BATCH, heads=HEADS, kv_heads=None, len_q=LEN_Q, len_k=LEN_K, head_dim=HEAD_DIM,
           value_dim=VALUE_DIM, scale=1.0, requires_grad=True):
    """query, key, value. Scores have a standard deviation near scale**2, so that weights are far from uniform."""
    kv_heads = heads if kv_heads is None else kv_heads
    return (
        draw(batch, heads, len_q, head_dim, dtype=dtype, seed=3 * seed, scale=scale, requires_grad=requires_grad),
        draw(batch, kv_heads, len_k, head_dim, dtype=dtype, seed=3 * seed + 1, scale=scale, requires_grad=requires_grad),
        draw(batch, kv_heads, len_k, value_dim, dtype=dtype, seed=3 * seed + 2, requires_grad=requires_grad),
    )


def keep_mask(*shape, seed=5, probability=0.6):
    """A boolean mask, True = keep."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < probability


def bias(*shape, dtype=torch.float32, seed=11):
    return draw(*(shape or (1,)), dtype=dtype, seed=seed).view(shape).requires_grad_()


def rows_without_keys():
    mask = keep_mask(BATCH, HEADS, LEN_Q, LEN_K)
    mask[0, 1, 3] = mask[1, 2, LEN_Q - 1] = False
    mask[1, 0] = False
    return mask


def half_excluded():
    with torch.no_grad():
        return torch.where(keep_mask(LEN_Q, LEN_K), bias(BATCH, 1, LEN_Q, LEN_K), -torch.inf).requires_grad_()


MASKS = {
    "none": lambda dtype: {},
    "scale": lambda dtype: {"scale": 0.37},
    "negative scale": lambda dtype: {"scale": -0.5},
    "zero scale": lambda dtype: {"scale": 0.0},
    "causal": lambda dtype: {"is_causal": True},
    "causal bottom_right": lambda dtype: {"is_causal": True, "causal_alignment": "bottom_right"},
    "boolean": lambda dtype: {"attn_mask": keep_mask(BATCH, HEADS, LEN_Q, LEN_K)},
    "boolean [Lq, Lk]": lambda dtype: {"attn_mask": keep_mask(LEN_Q, LEN_K)},
    "padding [B, 1, 1, Lk]": lambda dtype: {"attn_mask": torch.arange(LEN_K) < torch.tensor([17, 53]).view(2, 1, 1, 1)},
    "left padding": lambda dtype: {"attn_mask": torch.arange(LEN_K) >= torch.tensor([36, 0]).view(2, 1, 1, 1)},
    "rows without keys": lambda dtype: {"attn_mask": rows_without_keys()},
    "float": lambda dtype: {"attn_mask": bias(BATCH, HEADS, LEN_Q, LEN_K, dtype=dtype)},
    "float with -inf": lambda dtype: {"attn_mask": half_excluded()},
    "finfo.min": lambda dtype: {
        "attn_mask": torch.zeros(BATCH, 1, LEN_Q, LEN_K, dtype=dtype).masked_fill(~keep_mask(BATCH, 1, LEN_Q, LEN_K), torch.finfo(dtype).min)
    },
    "bias [H, Lq, Lk]": lambda dtype: {"attn_bias": bias(1, HEADS, LEN_Q, LEN_K)},
    "bias [B, 1, 1, Lk]": lambda dtype: {"attn_bias": bias(BATCH, 1, 1, LEN_K)},
    "bias [H, Lq, 1]": lambda dtype: {"attn_bias": bias(HEADS, LEN_Q, 1)},
    "bias [Lk]": lambda dtype: {"attn_bias": bias(LEN_K, dtype=dtype)},
    "bias []": lambda dtype: {"attn_bias": bias()},
    "bias, boolean, causal, lengths": lambda dtype: {
        "attn_bias": bias(1, HEADS, LEN_Q, LEN_K), "attn_mask": keep_mask(BATCH, 1, LEN_Q, LEN_K), "is_causal": True,
        "causal_alignment": "bottom_right", "seqlens_k": torch.tensor([41, 53]),
    },
    "float and bias": lambda dtype: {"attn_mask": half_excluded(), "attn_bias": bias(HEADS, 1, LEN_K, dtype=dtype)},
    "lengths": lambda dtype: {"seqlens_k": torch.tensor([0, 31], dtype=torch.int32)},
    "lengths, causal": lambda dtype: {"seqlens_k": torch.tensor([9, 53]), "is_causal": True},
}


@in_every_dtype
@pytest.mark.parametrize("name", MASKS)
def test_masks_match_reference(name, dtype):
    with testing.nan_filled_empty():
        assert_matches_reference(scaled_dot_product_attention, *inputs(dtype), return_lse=True, **MASKS[name](dtype))


@in_every_dtype
@pytest.mark.parametrize("name", ("none", "boolean [Lq, Lk]", "causal bottom_right", "padding [B, 1, 1, Lk]"))
@pytest.mark.parametrize("kv_heads", (1, 2))
def test_grouped_heads_match_reference(kv_heads, name, dtype):
    query, key, value = inputs(dtype, kv_heads=kv_heads)
    assert_matches_reference(
        scaled_dot_product_attention, query, key, value, enable_gqa=True, return_lse=True, **MASKS[name](dtype)
    )


@pytest.mark.parametrize("name", ("float", "bias [B, 1, 1, Lk]", "bias [H, Lq, Lk]", "bias []"))
def test_a_bias_alone_may_require_grad(name):
    options = MASKS[name](torch.float32)
    assert_matches_reference(scaled_dot_product_attention, *inputs(requires_grad=False), return_lse=True, **options)


@pytest.mark.parametrize("wanted", range(3))
def test_one_input_alone_may_require_grad(wanted):
    tensors = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(inputs())]
    assert_matches_reference(scaled_dot_product_attention, *tensors, is_causal=True)


@in_every_dtype
def test_the_gradient_of_lse_alone(dtype):
    def lse_only(*args, **kwargs):
        return scaled_dot_product_attention(*args, return_lse=True, **kwargs)[1]

    query, key, value = inputs(dtype)
    assert_matches_reference(lse_only, query, key, value.detach(), is_causal=True, attn_bias=bias(HEADS, LEN_Q, LEN_K))


HEAD_DIMS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 48, 64, 65, 80, 96, 128, 129, 160, 192, 256, 257, 384, 511, 512)


@in_every_dtype
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dim(head_dim, dtype):
    query, key, value = inputs(dtype, batch=1, heads=2, len_q=19, len_k=21, head_dim=head_dim, value_dim=head_dim)
    assert_matches_reference(scaled_dot_product_attention, query, key, value, return_lse=True)


@pytest.mark.parametrize("head_dim, value_dim", ((64, 1), (1, 64), (48, 512), (512, 33)))
def test_value_head_dim_may_differ(head_dim, value_dim):
    query, key, value = inputs(batch=1, heads=2, len_q=19, len_k=21, head_dim=head_dim, value_dim=value_dim)
    assert_matches_reference(scaled_dot_product_attention, query, key, value, return_lse=True)


LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)


@in_every_dtype
@pytest.mark.parametrize("is_causal", (False, True), ids=("full", "causal"))
@pytest.mark.parametrize("len_k", LENGTHS)
def test_lengths_around_the_tiles(len_k, is_causal, dtype):
    for len_q in (1, 33, len_k):
        query, key, value = inputs(dtype, batch=1, heads=1, len_q=len_q, len_k=len_k, head_dim=16, value_dim=16)
        assert_matches_reference(
            scaled_dot_product_attention, query, key, value, is_causal=is_causal, causal_alignment="bottom_right", return_lse=True
        )


@pytest.mark.parametrize("len_q, len_k", ((300, 700), (1, 1025), (1025, 1)))
def test_many_tiles(len_q, len_k):
    query, key, value = inputs(batch=1, heads=2, len_q=len_q, len_k=len_k, head_dim=16, value_dim=16)
    assert_matches_reference(
        scaled_dot_product_attention, query, key, value, attn_bias=bias(2, len_q, 1), is_causal=True, return_lse=True
    )


SHAPES = (
    ((5, 8), (7, 8), (7, 3)),
    ((3, 5, 8), (3, 7, 8), (3, 7, 3)),
    ((2, 3, 2, 5, 8), (2, 3, 2, 7, 8), (2, 3, 2, 7, 8)),
    ((2, 3, 2, 5, 8), (1, 2, 7, 8), (3, 2, 7, 8)),
    ((1, 5, 8), (2, 7, 8), (2, 7, 8)),
    ((2, 1, 5, 8), (2, 3, 7, 8), (2, 1, 7, 8)),
    ((2, 3, 5, 8), (1, 1, 7, 8), (1, 1, 7, 8)),
    ((0, 3, 5, 8), (0, 3, 7, 8), (0, 3, 7, 8)),
    ((2, 0, 5, 8), (2, 0, 7, 8), (2, 0, 7, 8)),
    ((2, 3, 0, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
    ((2, 3, 5, 8), (2, 3, 0, 8), (2, 3, 0, 8)),
)


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_any_leading_dimensions_as_torch_takes_them(shapes):
    query, key, value = (draw(*shape, seed=i, requires_grad=True) for i, shape in enumerate(shapes))
    assert_matches_reference(scaled_dot_product_attention, query, key, value, return_lse=True)
    ours, theirs = scaled_dot_product_attention(query, key, value), torch_attention(query, key, value)
    assert_close(ours, theirs.double(), 64)
    grad = draw(*ours.shape, seed=9)
    for a, e in zip(torch.autograd.grad(ours, (query, key, value), grad), torch.autograd.grad(theirs, (query, key, value), grad)):
        assert_close(a, e.double(), 64, slack=4.0)


@pytest.mark.parametrize("mask_shape", ((3, 1, 1, 1, 7), (2, 1, 2, 5, 7), (2, 5, 7), (5, 1), (7,), ()), ids=str)
def test_masks_broadcast_over_leading_dimensions(mask_shape):
    query, key, value = (draw(2, 3, 2, length, 8, seed=i, requires_grad=True) for i, length in enumerate((5, 7, 7)))
    if mask_shape == (3, 1, 1, 1, 7):
        mask_shape = (1, 3, 1, 1, 7)
    options = {"attn_bias": bias(*mask_shape), "attn_mask": keep_mask(*mask_shape, probability=0.8)}
    assert_matches_reference(scaled_dot_product_attention, query, key, value, return_lse=True, **options)


def layouts(t):
    """The same values in other memory: name -> tensor. Dimensions of size 1 get strides that mean nothing."""
    batch, heads, length, dim = t.shape
    yield "[B, L, H, D]", t.transpose(1, 2).contiguous().transpose(1, 2)
    yield "[L, B, D, H]", t.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2)
    yield "columns apart", t.mT.contiguous().mT
    yield "rows of a wider tensor", torch.cat((t, ~t if t.dtype == torch.bool else t + 1), dim=-1)[..., :dim]
    yield "every second column", torch.stack((t, ~t if t.dtype == torch.bool else t + 1), dim=-1)[..., 0]
    yield "unaligned", torch.cat((t.new_zeros(3), t.flatten()))[3:].view(t.shape)
    lone = t[:1, :1]
    yield "size 1 with any stride", lone.as_strided(lone.shape, (7, 1234567, lone.stride(2), lone.stride(3)), lone.storage_offset())
    yield "expanded heads", t[:, :1].expand(batch, heads, length, dim)
    yield "expanded batch and rows", t[:1, :, :1].expand(batch, heads, length, dim)


@in_every_dtype
@pytest.mark.parametrize("argument", ("query", "key", "value", "grad_output"))
def test_any_strides_give_the_same_bits(argument, dtype):
    tensors = dict(zip(("query", "key", "value"), inputs(dtype, requires_grad=False, len_q=LEN_K, value_dim=HEAD_DIM)))
    tensors["grad_output"] = draw(BATCH, HEADS, LEN_K, HEAD_DIM, dtype=dtype, seed=50)

    def run(**given):
        query, key, value = (given[name].detach().requires_grad_() for name in ("query", "key", "value"))
        output, lse = scaled_dot_product_attention(query, key, value, is_causal=True, return_lse=True)
        return [output, lse, *torch.autograd.grad(output, (query, key, value), given["grad_output"])]

    for name, laid_out in layouts(tensors[argument]):
        others = tensors
        if laid_out.shape[0] == 1:
            others = {other: t[:1, :1] for other, t in tensors.items()}
        expected = run(**{**others, argument: laid_out.clone(memory_format=torch.contiguous_format)})
        for actual, exact in zip(run(**{**others, argument: laid_out}), expected):
            assert torch.equal(actual, exact), name


def test_masks_of_any_strides_give_the_same_bits():
    query, key, value = inputs(requires_grad=False, len_q=LEN_K)
    for make in (lambda *shape: keep_mask(*shape), lambda *shape: bias(*shape).detach()):
        for name, laid_out in layouts(make(BATCH, HEADS, LEN_K, LEN_K)):
            actual = scaled_dot_product_attention(query, key, value, laid_out)
            assert torch.equal(actual, scaled_dot_product_attention(query, key, value, laid_out.contiguous())), name


def run_all(*tensors, **options):
    """Output, lse and every gradient."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    output, lse = scaled_dot_product_attention(*leaves, return_lse=True, **options)
    grads = (draw(*output.shape, dtype=output.dtype, seed=70), draw(*lse.shape, seed=71))
    return [output.detach(), lse.detach(), *torch.autograd.grad((output, lse), leaves, grads)]


@in_every_dtype
@pytest.mark.parametrize("name", ("none", "causal", "bias [H, Lq, Lk]", "rows without keys"))
def test_repeats_and_thread_counts_give_the_same_bits(name, dtype):
    tensors = inputs(dtype)
    options = {key: t.detach() if isinstance(t, torch.Tensor) else t for key, t in MASKS[name](dtype).items()}
    torch.set_num_threads(1)
    expected = run_all(*tensors, **options)
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        for actual, exact in zip(run_all(*tensors, **options), expected):
            assert torch.equal(actual, exact), f"{threads} threads"


@in_every_dtype
def test_a_bias_gradient_does_not_depend_on_threads(dtype):
    leaves = [t.detach().requires_grad_() for t in (*inputs(dtype), bias(LEN_K), bias(1, HEADS, LEN_Q, LEN_K))]
    grads = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        for attn_bias in leaves[3:]:
            output = scaled_dot_product_attention(*leaves[:3], attn_bias=attn_bias)
            grads.append(torch.autograd.grad(output, attn_bias, torch.ones_like(output))[0])
    assert all(torch.equal(grad, grads[i % 2]) for i, grad in enumerate(grads))


@in_every_dtype
def test_an_entry_does_not_depend_on_its_batch(dtype):
    tensors = inputs(dtype, batch=5, heads=2, len_q=70, len_k=70)
    grad = draw(5, 2, 70, VALUE_DIM, dtype=dtype, seed=70)
    whole = run_with_grad(tensors, grad, is_causal=True)
    for entry in range(5):
        alone = run_with_grad([t[entry : entry + 1] for t in tensors], grad[entry : entry + 1], is_causal=True)
        for one, all_of_them in zip(alone, whole):
            assert torch.equal(one[0], all_of_them[entry])


def run_with_grad(tensors, grad, **options):
    leaves = [t.detach().requires_grad_() for t in tensors]
    output, lse = scaled_dot_product_attention(*leaves, return_lse=True, **options)
    return [output.detach(), lse.detach(), *torch.autograd.grad(output, leaves, grad)]


@in_every_dtype
def test_padding_changes_no_bit(dtype):
    length, padded = 45, 80
    query, key, value = inputs(dtype, batch=1, len_q=padded, len_k=padded, value_dim=HEAD_DIM)
    grad = draw(1, HEADS, padded, HEAD_DIM, dtype=dtype, seed=70)
    short = run_with_grad([t[:, :, :length] for t in (query, key, value)], grad[:, :, :length])
    grad = torch.where(torch.arange(padded).view(-1, 1) < length, grad, 0)
    mask = (torch.arange(padded) < length).view(1, 1, 1, padded)
    for options in ({"seqlens_k": torch.tensor([length])}, {"attn_mask": mask}):
        for one, long in zip(short, run_with_grad((query, key, value), grad, **options)):
            assert torch.equal(one, long[:, :, :length]), options


@in_every_dtype
def test_a_causal_row_does_not_depend_on_the_future(dtype):
    query, key, value = inputs(dtype, len_q=140, len_k=140, requires_grad=False)
    whole = scaled_dot_product_attention(query, key, value, is_causal=True)
    for length in (1, 16, 63, 65, 129):
        prefix = scaled_dot_product_attention(*(t[:, :, :length] for t in (query, key, value)), is_causal=True)
        assert torch.equal(prefix, whole[:, :, :length])


def test_inputs_are_not_written_and_backward_repeats():
    tensors = [*inputs(), bias(HEADS, LEN_Q, LEN_K)]
    before = [t.detach().clone() for t in tensors]
    output = scaled_dot_product_attention(*tensors[:3], attn_bias=tensors[3], attn_mask=keep_mask(LEN_Q, LEN_K))
    grad = draw(*output.shape, seed=70)
    kept = (output.detach().clone(), grad.clone())
    first = torch.autograd.grad(output, tensors, grad, retain_graph=True)
    second = torch.autograd.grad(output, tensors, grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert all(torch.equal(t, b) for t, b in zip(tensors, before))
    assert torch.equal(output, kept[0]) and torch.equal(grad, kept[1])


def test_output_memory_is_what_the_next_projection_wants():
    with use_backend("cpu"):
        output = scaled_dot_product_attention(*inputs())
    assert output.transpose(1, 2).is_contiguous()


def test_causal_and_mask_combine_where_torch_refuses():
    query, key, value = inputs()
    mask = keep_mask(LEN_Q, LEN_K)
    both = scaled_dot_product_attention(query, key, value, mask, is_causal=True)
    anded = scaled_dot_product_attention(query, key, value, mask & torch.ones(LEN_Q, LEN_K, dtype=torch.bool).tril())
    assert torch.equal(both, anded)


# ---- the numerics promise: named families, pooled over seeds, against torch's own kernel ----

SEEDS = 32  # independent draws, one per batch entry; the largest row of 8 draws is too noisy to compare
FEW_SEEDS = 8  # in float64, where numpy's long double takes its time


def family(len_q=64, len_k=96, head_dim=64, heads=2, scale=1.0):
    def make(dtype):
        return inputs(dtype, batch=SEEDS, heads=heads, len_q=len_q, len_k=len_k, head_dim=head_dim, value_dim=head_dim, scale=scale)

    return make


def saturated(logit, len_k=96):
    """Scores of that size, with near ties in every row: elsewhere a saturated softmax has no error to compare.

    Keys come in pairs that differ in the last 16 dimensions only, where queries are so small that scores move by about 1.
    """

    def make(dtype):
        query, key, value = (t.detach() for t in family(len_k=len_k, scale=logit**0.5)(dtype))
        half = key.shape[2] // 2
        key[:, :, half:, :48] = key[:, :, :half, :48]
        query[..., 48:] /= logit
        return query, key, value

    return make


def very_negative(dtype):
    """Scores near -200 with a ragged last tile: the row's lse is far below the smallest float32 exponential."""
    query, key, value = (t.detach() for t in family(40, 67, scale=0.3)(dtype))
    return query + 5, key - 5, value


def subnormal(dtype):
    query, key, value = (t.detach() for t in family(40, 67)(dtype))
    return query, key, value * torch.finfo(dtype).tiny / 16


FAMILIES = {
    "normal": family(), "logits 1e2": saturated(1e2), "logits 1e3": saturated(1e3), "logits 1e4": saturated(1e4),
    "logits 1e3 over three blocks of keys": saturated(1e3, 300),
    "very negative": very_negative, "subnormal": subnormal, "causal": family(96, 96, 32),
    **{f"length {length}": family(16, length) for length in (1, 31, 32, 33, 63, 64, 65, 127, 128, 129)},
}


def evaluate(function, tensors, grad, dtype, **options):
    """Output and gradients of one implementation, widened."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    output = function(*leaves, **options)
    return [t.detach().double() for t in (output, *torch.autograd.grad(output, leaves, grad.to(dtype)))]


def evaluate_in_long_double(tensors, grad, is_causal=False):
    """What evaluate() gives, in the 64-bit significand of x86: numpy arrays, the oracle of float64."""
    query, key, value, grad = (t.detach().numpy().astype(np.longdouble) for t in (*tensors, grad))
    scale = np.longdouble(query.shape[-1] ** -0.5)
    scores = scale * np.einsum("...id,...jd->...ij", query, key)
    if is_causal:
        scores = np.where(np.tri(*scores.shape[-2:], dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    grad_weights = np.einsum("...id,...jd->...ij", grad, value)
    grad_scores = scale * weights * (grad_weights - (weights * grad_weights).sum(-1, keepdims=True))
    return [
        np.einsum("...ij,...jd->...id", weights, value),
        np.einsum("...ij,...jd->...id", grad_scores, key),
        np.einsum("...ij,...id->...jd", grad_scores, query),
        np.einsum("...ij,...id->...jd", weights, grad),
    ]


def family_errors(name, dtype):
    """For output and each gradient: (ours, peer's, rounding's) errors against the oracle, one row per result row."""
    options = {"is_causal": True} if name == "causal" else {}
    tensors = FAMILIES[name](dtype)
    if dtype == torch.float64:
        tensors = [t[:FEW_SEEDS] for t in tensors]
    grad = draw(*tensors[0].shape[:3], tensors[2].shape[3], dtype=dtype, seed=100)
    ours = evaluate(scaled_dot_product_attention, tensors, grad, dtype, **options)
    peer = evaluate(torch_attention, tensors, grad, dtype, **options)
    if dtype == torch.float64:
        exact = evaluate_in_long_double(tensors, grad, **options)
        rounded = [e.astype(np.float64) for e in exact]
        results = zip(ours, peer, rounded, exact)
        differences = [[torch.from_numpy((np.asarray(r) - e).astype(np.float64)) for r in (o, p, c)] for o, p, c, e in results]
    else:
        with use_backend("reference"):
            exact = evaluate(scaled_dot_product_attention, tensors, grad, torch.float64, **options)
        differences = [[r - e for r in (o, p, e.to(dtype).double())] for o, p, e in zip(ours, peer, exact)]
    return [[difference.flatten(0, -2) for difference in result] for result in differences]


def assert_as_exact_as_torch(name, dtype):
    """CONTRACT section 2: pooled rms and largest row."""
    for what, (ours, peer, rounding) in zip(("output", "grad_query", "grad_key", "grad_value"), family_errors(name, dtype)):
        rms, peer_rms, rounding_rms = (float(errors.square().mean().sqrt()) for errors in (ours, peer, rounding))
        allowed = max(testing.ATTENTION_RMS_RATIO * peer_rms, testing.ATTENTION_ROUNDING_RATIO * rounding_rms)
        assert rms <= allowed, f"{name}, {what}: rms error {rms:.3e}, torch's {peer_rms:.3e}, of rounding alone {rounding_rms:.3e}"
        row, peer_row, rounding_row = (float(errors.square().mean(-1).sqrt().max()) for errors in (ours, peer, rounding))
        allowed = testing.ATTENTION_ROW_RATIO * max(peer_row, rounding_row)
        assert row <= allowed, f"{name}, {what}: largest row error {row:.3e}, torch's {peer_row:.3e}"


@in_every_dtype
@pytest.mark.parametrize("name", FAMILIES)
def test_as_exact_as_torch(name, dtype):
    assert_as_exact_as_torch(name, dtype)


@pytest.mark.parametrize("position", range(4), ids=("query", "key", "value", "grad_output"))
def test_rows_of_tiny_numbers_keep_their_gradients(position):
    """An instruction that multiplies pairs of bfloat16 takes subnormal numbers as 0; some rows hold nothing else."""
    dtype = torch.bfloat16
    tensors = [*inputs(dtype), draw(BATCH, HEADS, LEN_Q, VALUE_DIM, dtype=dtype, seed=9)]
    with torch.no_grad():
        tensors[position][:, :, 3:30:2] *= torch.finfo(dtype).tiny / 16
        tensors[position][:, 0] *= torch.finfo(dtype).tiny / 16
    ours = evaluate(scaled_dot_product_attention, tensors[:3], tensors[3], dtype)
    with use_backend("reference"):
        exact = evaluate(scaled_dot_product_attention, tensors[:3], tensors[3], torch.float64)
    for name, a, e in zip(("output", "grad_query", "grad_key", "grad_value"), ours, exact):
        size = e.abs().amax(-1, keepdim=True)  # of each row
        error = (a - e).abs() - torch.finfo(dtype).tiny * 2**-6  # the last bits of the subnormal range are absolute
        assert (error <= ATTENTION_TINY_ROW_ERROR * size).all(), f"{name}: {(error / size).max():.3f} of its row"


def test_huge_equal_scores_are_a_mean():
    """q = k = v = 133120 in bfloat16: scale * score - scale * max is rounding residue unless it is exactly 0."""
    huge = torch.full((1, 1, 65, 64), 133120.0, dtype=torch.bfloat16)
    assert torch.equal(scaled_dot_product_attention(huge, huge, huge), huge)


@in_every_dtype
def test_one_infinite_score_poisons_its_row_only(dtype):
    query, key, value = inputs(dtype, requires_grad=False)
    attn_bias = torch.zeros(LEN_Q, LEN_K)
    attn_bias[3, 50] = torch.inf
    output, lse = scaled_dot_product_attention(query, key, value, attn_bias=attn_bias, return_lse=True)
    clean, clean_lse = scaled_dot_product_attention(query, key, value, attn_bias=torch.zeros(LEN_Q, LEN_K), return_lse=True)
    others = torch.arange(LEN_Q) != 3
    assert output[:, :, 3].isnan().all() and torch.equal(output[:, :, others], clean[:, :, others])
    assert torch.equal(lse[:, :, others], clean_lse[:, :, others])


@in_every_dtype
@pytest.mark.parametrize("poison", (torch.nan, torch.inf, -torch.inf))
def test_excluded_keys_may_hold_anything(poison, dtype):
    """Poisoned key and value rows that no row keeps leave every bit of output and gradients alone."""
    tensors = [t.detach() for t in inputs(dtype)]
    mask = keep_mask(BATCH, HEADS, LEN_Q, LEN_K)
    mask[..., [0, 20, LEN_K - 1]] = False
    clean = run_all(*tensors, attn_mask=mask)
    for tensor in tensors[1:]:
        tensor[:, :, [0, 20, LEN_K - 1]] = poison
    for actual, expected in zip(run_all(*tensors, attn_mask=mask), clean):
        assert torch.equal(actual, expected)
