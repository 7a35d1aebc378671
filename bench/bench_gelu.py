"""gelu against torch on this machine. The cases stand in transfuse.bench.cases, the work in conftest.py."""

OPS = ("gelu",)


def test_gelu(run_case, case, dtype, direction):
    run_case(case, dtype, direction)
