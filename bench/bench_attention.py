"""attention and varlen_attention against torch on this machine. The cases stand in transfuse.bench.cases, the work in conftest.py."""

OPS = ("attention", "varlen_attention")


def test_attention(run_case, case, dtype, direction):
    run_case(case, dtype, direction)
