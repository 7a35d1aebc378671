"""`transfuse explain OP`: the ordered list of backends for one op, each with every reason against it."""

import torch

from transfuse.promises.cases import OPS, PARITY_CASES

DTYPES = ("float32", "bfloat16", "float16", "float64")


def add_arguments(parser):
    parser.add_argument("op", metavar="OP", choices=OPS, help=", ".join(OPS))
    parser.add_argument("--dtype", default="float32", choices=DTYPES)


def run(arguments):
    case = next(case for case in PARITY_CASES if case.op == arguments.op)
    print(case.explain(*case.inputs(getattr(torch, arguments.dtype))))
    return 0
