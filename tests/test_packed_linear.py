"""Linear layers on packed weights: torch's values, every row on its own, GELU with the op's own bits."""

import pytest
import torch
import torch.nn.functional as F

import transfuse
from transfuse.ops.packed_linear import PANEL_COLUMNS, pack, packed_linear
from transfuse.testing import assert_close, draw

DTYPES = [torch.float32, torch.bfloat16]
ROWS = (0, 1, 2, 13, 14, 15, 29, 253, 600)
SIZES = ((1, 1), (7, 31), (8, 32), (33, 33), (384, 100), (1536, 65), (2048, 40), (2049, 33))  # (in, out)


def operands(rows, columns, out, dtype):
    x, weight, bias = draw(rows, columns, dtype=dtype, seed=1), draw(out, columns, seed=2), draw(out, seed=3)
    return x, (weight * columns**-0.5).to(dtype), bias


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", [None, "none", "tanh"])
@pytest.mark.parametrize("size", SIZES)
def test_values(size, approximate, dtype):
    columns, out = size
    for rows in ROWS:
        x, weight, bias = operands(rows, columns, out, dtype)
        expected = F.linear(x.double(), weight.double(), bias.double())
        if approximate:
            expected = F.gelu(expected, approximate=approximate)
        actual = packed_linear(x, pack(weight), bias, out, approximate)
        assert actual.dtype == dtype and actual.shape == (rows, out)
        assert_close(actual, expected, num_terms=columns)
    without = packed_linear(x, pack(weight), None, out)
    assert_close(without, F.linear(x.double(), weight.double()), num_terms=columns)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_has_the_bits_of_the_op(approximate):
    x, weight, bias = operands(70, 48, 96, torch.float32)
    plain = packed_linear(6 * x, pack(weight), bias, 96)  # far enough out for both branches of the op
    assert plain.abs().max() > 8
    fused = packed_linear(6 * x, pack(weight), bias, 96, approximate)
    assert torch.equal(fused, transfuse.gelu(plain, approximate))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_any_batch_and_on_any_number_of_threads(dtype):
    x, weight, bias = operands(700, 384, 416, dtype)
    packed, threads = pack(weight), torch.get_num_threads()
    together = packed_linear(x, packed, bias, 416)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for begin, rows in ((0, 1), (5, 2), (17, 14), (100, 300), (0, 700)):
                part = packed_linear(x[begin : begin + rows], packed, bias, 416)
                assert torch.equal(part, together[begin : begin + rows]), (count, begin, rows)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_in_its_row_and_column(dtype):
    x, weight, bias = operands(20, 33, 40, dtype)
    clean = packed_linear(x, pack(weight), bias, 40)
    x[3, 32], weight[7, 5] = torch.nan, torch.inf
    result = packed_linear(x, pack(weight), bias, 40)
    assert result[3].isnan().all() and not result[:, 7].isfinite().any()
    rows, columns = torch.arange(20) != 3, torch.arange(40) != 7
    assert torch.equal(result[rows][:, columns], clean[rows][:, columns])


def test_packing_keeps_every_element_and_leaves_the_weight_alone():
    weight = draw(70, 9, seed=1)
    before = weight.clone()
    packed = pack(weight)
    assert packed.shape == (3, 9, PANEL_COLUMNS) and torch.equal(weight, before)
    assert torch.equal(packed.transpose(1, 2).reshape(96, 9)[:70], weight) and (packed[2, :, 6:] == 0).all()
    assert pack(weight.bfloat16()).shape == (3, 5, 2 * PANEL_COLUMNS)
    assert torch.equal(pack(weight.T.contiguous().T), packed)


def test_input_with_strides():
    x, weight, bias = operands(20, 33, 40, torch.float32)
    assert torch.equal(packed_linear(x.T.contiguous().T, pack(weight), bias, 40), packed_linear(x, pack(weight), bias, 40))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    x, weight, bias = operands(3, 5, 7, dtype)
    torch.library.opcheck(torch.ops.transfuse.packed_linear.default, (x, pack(weight), bias, 7))
    torch.library.opcheck(torch.ops.transfuse.packed_linear_gelu.default, (x, pack(weight), None, 7, True))


def test_refusals():
    x, weight, bias = operands(3, 6, 7, torch.float32)
    packed = pack(weight)
    calls = {
        "input has shape (3, 6, 1), expected (rows, in)": (x[..., None], packed, bias, 7),
        "input has dtype float64, expected float32 or bfloat16": (x.double(), packed, bias, 7),
        "weight has dtype float32, expected bfloat16": (x.bfloat16(), packed, bias, 7),
        "weight has shape (1, 6, 32), expected a contiguous (1, 5, 32)": (x[:, :5], packed, bias, 7),
        "weight has shape (1, 6, 32), expected a contiguous (2, 6, 32)": (x, packed, bias, 33),
        "bias has dtype bfloat16, expected float32": (x, packed, bias.bfloat16(), 7),
        "bias has shape (7,), expected a contiguous (8,)": (x, packed, bias, 8),
    }
    for message, arguments in calls.items():
        with pytest.raises(ValueError) as error:
            packed_linear(*arguments)
        assert str(error.value) == f"packed_linear: {message}"
