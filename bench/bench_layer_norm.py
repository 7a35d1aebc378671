"""layer_norm and add_layer_norm against their peers. Cases: transfuse.promises.cases; the work: conftest.py."""

OPS = ("layer_norm", "add_layer_norm")


def test_layer_norm(run_case, case, dtype, direction):
    run_case(case, dtype, direction)
