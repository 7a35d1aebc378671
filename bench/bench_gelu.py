"""gelu against its peers. Cases: transfuse.promises.cases; the work: conftest.py. Launch rows: --tune, tune.py."""

OPS = ("gelu",)


def test_gelu(run_case, case, dtype, direction):
    run_case(case, dtype, direction)


if __name__ == "__main__":
    import tune

    raise SystemExit(tune.main(OPS))
