"""masked_softmax against its peers. Cases: transfuse.promises.cases; the work: conftest.py."""

OPS = ("masked_softmax",)


def test_masked_softmax(run_case, case, dtype, direction):
    run_case(case, dtype, direction)
