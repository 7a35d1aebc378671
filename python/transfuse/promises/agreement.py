"""CONTRACT section 2: every op agrees with the float64 reference, in every dtype, forward and backward."""

from functools import partial

from transfuse.dispatch import dtype_name
from transfuse.promises.cases import DIRECTIONS, OPS, PARITY_CASES, selected
from transfuse.promises.promise import DTYPES, Figure, Promise, counted, worst_of


def _worst_case(op, dtype, direction, backend, device):
    """Error over what is allowed, of the case that comes nearest to its limit."""
    found = []
    for case in selected(PARITY_CASES, op):
        parity = case.compare(case.inputs(dtype, device), direction)
        where = f"{case.name}: {parity.what} has relative error {parity.largest:.1e}, allowed {parity.budget:.1e}"
        found.append((parity.largest / parity.budget, where))
    return Figure(*worst_of(found))


PROMISES = tuple(
    Promise(
        id=f"2.{op}.{dtype_name(dtype)}.agrees-{direction}",
        section=2,
        op=op,
        dtype=dtype,
        statement=f"{direction} agrees with the float64 reference, {counted(selected(PARITY_CASES, op), 'case')}",
        bound=1.0,
        unit="of testing.error_budget",
        measure=partial(_worst_case, op, dtype, direction),
    )
    for op in OPS
    for dtype in DTYPES
    for direction in DIRECTIONS
    if any(direction in case.directions for case in selected(PARITY_CASES, op))
)
