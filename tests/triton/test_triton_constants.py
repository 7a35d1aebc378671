"""What kernels/triton repeats of kernels/*.h, which Python does not read, is the same to the bit."""

import re
import struct
from pathlib import Path

import pytest

from transfuse.kernels.triton import exp, gelu, gelu_far, gelu_tables

ROOT = Path(__file__).resolve().parents[2]
NUMBER = r"-?0x[0-9a-f.]+p[+-]?\d+"


def _float(text):
    """A literal of C with suffix f: rounded to float32."""
    return struct.unpack("f", struct.pack("f", float.fromhex(text)))[0]


def _header(name):
    return (ROOT / "kernels" / name).read_text()


@pytest.mark.parametrize(
    "ours, theirs",
    [("LOG2E", "exp_log2e"), ("LN2_HI", "exp_ln2_hi"), ("LN2_LO", "exp_ln2_lo"), ("LOWEST", "exp_lowest"),
     ("INTEGER", "exp_integer"), *((f"Q{i}", f"exp_q{i}") for i in range(1, 6))],
)  # fmt: skip
def test_exp_has_the_constants_of_its_header(ours, theirs):
    literal = re.search(rf"constexpr float {theirs} = ({NUMBER})f;", _header("exp_constants.h"))[1]
    assert getattr(exp, ours).value == _float(literal)


def test_the_integer_of_the_rounding_sum_is_its_bits():
    assert struct.unpack("i", struct.pack("f", exp.INTEGER.value))[0] == exp.INTEGER_BITS.value


def _numbers_after(text, *words):
    for word in words:
        text = text[text.index(word) :]
    return [_float(literal) for literal in re.findall(rf"({NUMBER})f", text[: text.index("}};")])]


@pytest.mark.parametrize("form, struct_name", [("erf", "ErfSegments"), ("tanh", "TanhSegments")])
@pytest.mark.parametrize("direction, table", [("forward", "tail"), ("backward", "slope")])
def test_gelu_has_the_segments_of_its_header(form, struct_name, direction, table):
    expected = _numbers_after(_header("gelu_tables.h"), f"struct {struct_name}", f"Segments {table} =")
    assert [x for row in gelu_tables.SEGMENTS[form, direction] for x in row] == expected
    shift = re.search(rf"struct {struct_name}.*?shift = (\d+) \* 0x1p-20f", _header("gelu_tables.h"), re.S)[1]
    assert getattr(gelu, f"_SHIFT_{form.upper()}").value == int(shift) * 2.0**-20


def test_gelu_far_has_the_factors_of_its_header():
    expected = _numbers_after(_header("gelu_tables.h"), "struct ErfFarTable", "FarFactors factors =")
    assert [getattr(gelu_far, f"_{name}{i}").value for name in "TS" for i in range(7)] == expected
    coefficients = re.search(rf"double c0 = ({NUMBER}), c1 = ({NUMBER});", _header("gelu_tables.h"))
    assert [gelu_far._C0, gelu_far._C1] == [float.fromhex(text) for text in coefficients.groups()]
    for form, struct_name in (("ERF", "ErfFarTable"), ("TANH", "TanhFarTable")):
        cut = re.search(rf"struct {struct_name}.*?cut = ([\d.]+)f", _header("gelu_tables.h"), re.S)[1]
        assert getattr(gelu_far, f"CUT_{form}").value == float(cut)
