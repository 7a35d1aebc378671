"""masked_softmax against torch on this machine. The cases stand in transfuse.bench.cases, the work in conftest.py."""

OPS = ("masked_softmax",)


def test_masked_softmax(run_case, case, dtype, direction):
    run_case(case, dtype, direction)
