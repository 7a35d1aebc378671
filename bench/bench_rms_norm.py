"""rms_norm and add_rms_norm against their peers. Cases: transfuse.promises.cases; the work: conftest.py.

Run as a program with --tune: rows for its launch tables (tune.py).
"""

OPS = ("rms_norm", "add_rms_norm")


def test_rms_norm(run_case, case, dtype, direction):
    run_case(case, dtype, direction)


if __name__ == "__main__":
    import tune

    raise SystemExit(tune.main(OPS))
