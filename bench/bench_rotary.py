"""rotary against its peers. Cases: transfuse.promises.cases; the work: conftest.py."""

OPS = ("rotary",)


def test_rotary(run_case, case, dtype, direction):
    run_case(case, dtype, direction)
