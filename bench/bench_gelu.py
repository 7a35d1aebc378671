"""gelu against its peers. Cases: transfuse.promises.cases; the work: conftest.py."""

OPS = ("gelu",)


def test_gelu(run_case, case, dtype, direction):
    run_case(case, dtype, direction)
