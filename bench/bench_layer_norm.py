"""layer_norm and add_layer_norm against their peers. Cases: transfuse.promises.cases; the work: conftest.py.

Run as a program with --tune: rows for its launch tables (tune.py).
"""

OPS = ("layer_norm", "add_layer_norm")


def test_layer_norm(run_case, case, dtype, direction):
    run_case(case, dtype, direction)


if __name__ == "__main__":
    import tune

    raise SystemExit(tune.main(OPS))
