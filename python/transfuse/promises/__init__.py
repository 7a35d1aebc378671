"""The contract as data: one page per section, each a tuple PROMISES. `transfuse verify` runs them and prints figures.

    from transfuse import promises

    outcome = promises.check(promises.find("2.gelu.float32.forward-ulp.none"), backend="cpu")
    print(outcome.status, outcome.figure.worst, outcome.promise.bound, outcome.promise.unit)

Read promise.py first: what a promise is, and the one function that judges it.
"""

import difflib
from functools import cache
from importlib import import_module

from transfuse.promises.promise import Figure, NoKernel, Outcome, Promise, check, forget

# Section of the contract -> its title. A section may have several pages.
SECTIONS = {
    1: "Masks",
    2: "Numerics",
    3: "Determinism and invariance",
    4: "Layout, dtype, size",
    5: "Errors",
    6: "Security",
}
PAGES = ("masks", "agreement", "numerics", "attention_numerics", "determinism", "layout", "errors", "security")

__all__ = ["Figure", "NoKernel", "Outcome", "Promise", "SECTIONS", "check", "every", "find", "forget", "selected"]


@cache
def every():
    """All promises, by section, in the order of the pages."""
    found = [promise for page in PAGES for promise in import_module(f"transfuse.promises.{page}").PROMISES]
    return tuple(sorted(found, key=lambda promise: promise.section))


def find(id):
    """The promise of that id. Raises ValueError, naming the nearest ones."""
    by_id = {promise.id: promise for promise in every()}
    if id not in by_id:
        near = difflib.get_close_matches(id, by_id, n=3, cutoff=0.0)
        raise ValueError(f"--promise is {id!r}, expected an id such as {', '.join(near)}")
    return by_id[id]


def selected(op=None, dtype=None, section=None, slow=False):
    """The promises about one op, one dtype, one section; slow ones too only if asked for."""
    return [
        promise
        for promise in every()
        if op in (None, promise.op)
        and dtype in (None, promise.dtype)
        and section in (None, promise.section)
        and (slow or not promise.slow)
    ]
