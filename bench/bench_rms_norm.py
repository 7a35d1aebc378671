"""rms_norm and add_rms_norm against their peers. Cases: transfuse.promises.cases; the work: conftest.py."""

OPS = ("rms_norm", "add_rms_norm")


def test_rms_norm(run_case, case, dtype, direction):
    run_case(case, dtype, direction)
