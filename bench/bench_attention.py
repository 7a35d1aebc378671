"""attention and varlen_attention against their peers. Cases: transfuse.promises.cases; the work: conftest.py.

Run as a program with --tune: rows for its launch tables (tune.py).
"""

OPS = ("attention", "varlen_attention", "decode_attention")


def test_attention(run_case, case, dtype, direction):
    run_case(case, dtype, direction)


if __name__ == "__main__":
    import tune

    raise SystemExit(tune.main(OPS))
