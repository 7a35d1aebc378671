"""`transfuse explain OP`: the ordered list of backends for one op, each with every reason against it."""

import torch

from transfuse import env
from transfuse.bench.cases import OPS, PARITY_CASES, selected
from transfuse.dispatch import use_backend

DTYPES = ("float32", "bfloat16", "float16", "float64")


def add_arguments(parser):
    parser.add_argument("op", metavar="OP", choices=OPS, help=", ".join(OPS))
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--case", metavar="NAME", help="a case of `transfuse verify --op OP` (default: the first), or all")
    parser.add_argument("--backend", choices=env.BACKENDS, help="as under use_backend(): what it refuses shows its reasons")


def run(arguments):
    cases = selected(PARITY_CASES, arguments.op)
    names = [case.name for case in cases]
    if arguments.case not in (None, "all", *names):
        raise ValueError(f"explain: --case is {arguments.case!r}, expected all or one of {', '.join(names)}")
    if arguments.case is None:
        cases = cases[:1]
    elif arguments.case != "all":
        cases = [case for case in cases if case.name == arguments.case]
    for case in cases:
        print(f"{case.name}: {case.shape}")
        inputs = case.inputs(getattr(torch, arguments.dtype))
        if arguments.backend is None:
            print(case.explain(*inputs))
            continue
        with use_backend(arguments.backend):
            print(case.explain(*inputs))
    return 0
