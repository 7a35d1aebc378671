"""layer_norm and add_layer_norm against torch on this machine. The cases stand in transfuse.bench.cases, the work in conftest.py."""

OPS = ("layer_norm", "add_layer_norm")


def test_layer_norm(run_case, case, dtype, direction):
    run_case(case, dtype, direction)
