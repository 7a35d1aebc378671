"""masked_softmax against its peers. Cases: transfuse.promises.cases; the work: conftest.py.

Run as a program with --tune: rows for its launch tables (tune.py).
"""

OPS = ("masked_softmax",)


def test_masked_softmax(run_case, case, dtype, direction):
    run_case(case, dtype, direction)


if __name__ == "__main__":
    import tune

    raise SystemExit(tune.main(OPS))
