"""An encoder layer in one call: the bits of its parts called one by one. Models around it: test_fused_layers.py."""

import pytest
import torch

from transfuse import add_layer_norm, scaled_dot_product_attention, varlen_attention
from transfuse.ops.encoder_layer import Sequences, encoder_layer
from transfuse.ops.packed_linear import pack, packed_linear
from transfuse.testing import draw

HEADS, HEAD_DIM, WIDTH, WIDE = 3, 16, 40, 100
SCALE, EPS, OUTPUT_EPS = 0.3, 1e-5, 1e-3
DTYPES = [torch.float32, torch.bfloat16]


def parameters(dtype, norms=True, biases=True):
    """What follows heads and scale in the call, and the form of the GELU."""
    sizes = ((3 * HEADS * HEAD_DIM, WIDTH), (WIDTH, HEADS * HEAD_DIM), (WIDE, WIDTH), (WIDTH, WIDE))
    products = []
    for seed, (out, columns) in enumerate(sizes):
        weight = (draw(out, columns, seed=seed) * columns**-0.5).to(dtype)
        products += [pack(weight), draw(out, seed=10 + seed) if biases else None]
    of_norms = [draw(WIDTH, seed=20 + i, shift=1.0) if norms else None for i in range(4)]
    return (*products[:4], *of_norms[:2], EPS, *products[4:], *of_norms[2:], OUTPUT_EPS, WIDE)


def by_parts(hidden, sequences, given, form):
    w_qkv, b_qkv, w_context, b_context, n1, m1, eps, w_wide, b_wide, w_narrow, b_narrow, n2, m2, output_eps, _ = given
    width = HEADS * HEAD_DIM
    projected = packed_linear(hidden, w_qkv, b_qkv, 3 * width)
    cu_seqlens, batch, longest, mask = sequences
    if cu_seqlens is not None:
        query, key, value = projected.view(-1, 3, HEADS, HEAD_DIM).unbind(1)
        context = varlen_attention(query, key, value, cu_seqlens, max_seqlen_q=longest, scale=SCALE).flatten(1)
    else:
        query, key, value = projected.view(batch, longest, 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4)
        context = scaled_dot_product_attention(query, key, value, mask, scale=SCALE).transpose(1, 2).reshape(-1, width)
    update = packed_linear(context, w_context, b_context, WIDTH)
    hidden = add_layer_norm(update, hidden, (WIDTH,), n1, m1, eps)[0]
    update = packed_linear(packed_linear(hidden, w_wide, b_wide, WIDE, form), w_narrow, b_narrow, WIDTH)
    return add_layer_norm(update, hidden, (WIDTH,), n2, m2, output_eps)[0]


PADDED = 5, 8
KEEP = (torch.arange(8) < torch.tensor([8, 3, 1, 0, 5])[:, None])[:, None, None]
CASES = {
    "packed": (40, Sequences(torch.tensor([0, 3, 3, 30, 40]), 4, 27)),
    "packed, several pieces": (700, Sequences(torch.tensor([0, 650, 700], dtype=torch.int32), 2, 650)),
    "one token": (1, Sequences(torch.tensor([0, 1]), 1, 1)),
    "padded": (40, Sequences(None, *PADDED)),
    "padded, boolean mask": (40, Sequences(None, *PADDED, KEEP)),
    "padded, float mask": (40, Sequences(None, *PADDED, draw(5, 1, 8, 8, seed=4))),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["none", "tanh"])
@pytest.mark.parametrize("case", CASES)
def test_the_bits_of_its_parts(case, form, dtype):
    tokens, sequences = CASES[case]
    for options in ({}, {"norms": False}, {"biases": False}):
        given, hidden = parameters(dtype, **options), draw(tokens, WIDTH, seed=7, dtype=dtype)
        before = hidden.clone()
        result = encoder_layer(hidden, sequences, HEADS, HEAD_DIM, SCALE, *given, form == "tanh")
        assert torch.equal(result, by_parts(hidden, sequences, given, form))
        assert result.dtype == dtype and result.isfinite().all() and torch.equal(hidden, before)


def test_opcheck():
    hidden, given = draw(4, WIDTH, seed=7), parameters(torch.float32)
    shared = (HEADS, HEAD_DIM, SCALE, *given, False)
    op = torch.ops.transfuse.encoder_layer.default
    torch.library.opcheck(op, (hidden, torch.tensor([0, 4]), None, None, 1, 4, *shared))
    torch.library.opcheck(op, (hidden, None, torch.ones(2, HEADS, 2, 2, dtype=torch.bool), None, 2, 2, *shared))


def test_refusals():
    hidden, given = draw(4, WIDTH, seed=7), (*parameters(torch.float32), False)
    whole = Sequences(torch.tensor([0, 4]), 1, 4)
    calls = {
        "encoder_layer: hidden has shape (4, 40), expected a contiguous (tokens, hidden_size)": (
            hidden.T.contiguous().T, whole, HEADS, HEAD_DIM),
        "encoder_layer: hidden has 4 tokens, expected 3 x 2": (hidden, Sequences(None, 3, 2), HEADS, HEAD_DIM),
        "encoder_layer: mask or bias is given beside cu_seqlens, expected one of them": (
            hidden, whole._replace(mask=torch.ones(1, HEADS, 4, 4, dtype=torch.bool)), HEADS, HEAD_DIM),
        "encoder_layer: num_heads and head_dim are 0 and 16, expected at least 1": (hidden, whole, 0, HEAD_DIM),
        "varlen_attention: cu_seqlens_q[1] is 3, expected 4 (query's tokens)": (
            hidden, Sequences(torch.tensor([0, 3]), 1, 4), HEADS, HEAD_DIM),
    }
    for message, arguments in calls.items():
        with pytest.raises(ValueError) as error:
            encoder_layer(*arguments, SCALE, *given)
        assert str(error.value) == message
