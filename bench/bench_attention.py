"""attention and varlen_attention against their peers. Cases: transfuse.promises.cases; the work: conftest.py."""

OPS = ("attention", "varlen_attention", "decode_attention")


def test_attention(run_case, case, dtype, direction):
    run_case(case, dtype, direction)
