"""Random calls of attention against the oracle: shapes, strides, dtypes, masks, lengths, features, poison. The test's id is the seed that repeats it.

    pytest "tests/test_attention_fuzz.py::test_random_call[17]"
"""

import random

import pytest
import torch

from transfuse import extension, scaled_dot_product_attention
from transfuse.testing import assert_matches_reference, draw, nan_filled_empty

LENGTHS = (0, 1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 33, 47, 64, 65, 100, 129, 200)
HEAD_DIMS = (1, 3, 8, 16, 20, 32, 64, 65)
QUICK, FULL = 60, 500
NUM_TERMS = 16384  # not the longest sum: scores up to 1e2 carry their own rounding into the weights


def laid_out(tensor, choice):
    """The same values in one of four layouts."""
    if choice == 0:
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if choice == 1:
        return tensor.mT.contiguous().mT
    if choice == 2:
        return torch.cat((tensor, tensor), dim=-1)[..., : tensor.shape[-1]]
    return tensor


def random_call(seed):
    """(query, key, value), options."""
    choose = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    dtype = choose.choice((torch.float32, torch.bfloat16, torch.float16, torch.float64))
    batch, kv_heads = choose.choice((1, 1, 2, 3)), choose.choice((1, 2, 3))
    heads = kv_heads * choose.choice((1, 1, 2, 4))
    len_q, len_k, head_dim = choose.choice(LENGTHS), choose.choice(LENGTHS), choose.choice(HEAD_DIMS)
    value_dim = choose.choice((head_dim, 1, 17, 64))
    shapes = ((batch, heads, len_q, head_dim), (batch, kv_heads, len_k, head_dim), (batch, kv_heads, len_k, value_dim))
    query, key, value = (
        laid_out(draw(*shape, dtype=dtype, seed=3 * seed + i, scale=choose.choice((0.1, 1, 1, 3))), choose.randrange(5))
        for i, shape in enumerate(shapes)
    )

    def broadcast_shape():
        return [size if choose.random() < 0.6 else 1 for size in (batch, heads, len_q, len_k)]

    options = {"is_causal": choose.random() < 0.4, "causal_alignment": choose.choice(("top_left", "bottom_right"))}
    if choose.random() < 0.3:
        options["scale"] = choose.choice((-0.3, 0.0, 0.05, 1.0))
    if choose.random() < 0.4:
        options["attn_mask"] = torch.rand(broadcast_shape(), generator=generator) < choose.choice((0.1, 0.5, 0.9))
    if choose.random() < 0.4:
        bias = draw(*broadcast_shape(), dtype=choose.choice((dtype, torch.float32)), seed=seed)
        excluded = torch.rand(bias.shape, generator=generator) < choose.choice((0.0, 0.3))
        options["attn_bias"] = bias.masked_fill(excluded, -torch.inf).requires_grad_()
    if choose.random() < 0.3:
        options["seqlens_k"] = torch.tensor([choose.randint(0, len_k) for _ in range(batch)])
    if choose.random() < 0.3:
        options["window"] = tuple(choose.choice((None, 0, 1, 7, 40, 150)) for _ in range(2))
    if choose.random() < 0.2:
        options["softcap"] = choose.choice((0.5, 5.0, 200.0))
    if choose.random() < 0.2:
        slopes = draw(*choose.choice(((heads,), (batch, heads))), seed=seed, scale=choose.choice((0.1, 1.0)))
        options["alibi_slopes"] = slopes.requires_grad_()
    if choose.random() < 0.2:
        options["sinks"] = draw(heads, seed=seed, shift=choose.choice((-3.0, 0.0, 3.0)), requires_grad=True)
    if choose.random() < 0.2 and len_k:
        poisoned = choose.randrange(len_k)
        keep = options.get("attn_mask", torch.tensor(True))
        options["attn_mask"] = keep & (torch.arange(len_k) != poisoned)
        key, value = key.clone(), value.clone()
        key[:, :, poisoned], value[:, :, poisoned] = torch.nan, choose.choice((torch.inf, torch.nan))
    if choose.random() < 0.1 and len_q:
        query = query.clone()
        query[0, 0, choose.randrange(len_q)] = torch.nan
    return [t.detach().requires_grad_() for t in (query, key, value)], options


@pytest.mark.skipif(bool(extension.cpu_unavailable), reason=extension.cpu_unavailable)
@pytest.mark.parametrize("seed", [*range(QUICK), *(pytest.param(i, marks=pytest.mark.slow) for i in range(QUICK, FULL))])
def test_random_call(seed):
    torch.set_num_threads(1)
    tensors, options = random_call(seed)
    with nan_filled_empty():
        assert_matches_reference(
            scaled_dot_product_attention, *tensors, num_terms=NUM_TERMS, enable_gqa=True, return_lse=True, **options
        )
