"""docs/numerics.md: the promises of section 2 with the figures of one run, written by

transfuse verify --backend cpu --section 2 --markdown docs/numerics.md
"""

from transfuse.cli.output import number
from transfuse.dispatch import dtype_name

HEAD = """# Numerics: what is promised, and what was measured

Written by `transfuse verify --backend {backend} --section 2 --markdown docs/numerics.md`; do not edit. A promise is kept
when our worst is at most the bound. Errors are against float64; torch's own figure, measured in the same way on the same
inputs, stands beside ours. `transfuse verify --promise ID --backend {backend}` repeats one line on your machine.

| | |
|---|---|
| machine | {machine}, {cores} cores, {threads} threads |
| instruction set | {cpu_isa} |
| versions | transfuse {transfuse}, torch {torch}, Python {python}, {platform} |
| commit, date | {commit}, {date} |
"""
COLUMNS = ("promise", "bound", "ours", "torch", "unit", "where", "id")


def render(outcomes, environment):
    """The page, one table per op and dtype.

    Args:
        outcomes: of promises.check; those of other sections than 2 are left out.
        environment: of bench.machine.
    """
    outcomes = [outcome for outcome in outcomes if outcome.promise.section == 2]
    backends = ", ".join(dict.fromkeys(outcome.backend for outcome in outcomes))
    parts, groups = [HEAD.format(backend=backends, **environment)], {}
    for outcome in outcomes:
        groups.setdefault((outcome.promise.op, outcome.promise.dtype), []).append(outcome)
    for (op, dtype), members in groups.items():
        parts.append(f"\n## {op}, {dtype_name(dtype)}\n")
        reasons = dict.fromkeys(outcome.reason for outcome in members if outcome.status == "no kernel")
        parts += [f"No kernel: {reason}.\n" for reason in reasons]
        parts += [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
        parts += [_row(outcome) for outcome in members]
    return "\n".join(parts) + "\n"


def _row(outcome):
    promise, figure = outcome.promise, outcome.figure
    ours = number(figure.worst) if figure else "no kernel" if outcome.status == "no kernel" else outcome.reason
    cells = (
        promise.statement,
        number(promise.bound),
        f"**{ours}, FAILED**" if outcome.status == "failed" else ours,
        number(figure and figure.peer_worst),
        promise.unit,
        figure.detail if figure else "",
        f"`{promise.id}`",
    )
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"
