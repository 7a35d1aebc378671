"""Two result files of the same command, row by row: what became faster, what slower, as far as the intervals tell."""

import json
from pathlib import Path

OP_KEY = ("op", "case", "dtype", "direction", "peer", "output")
MODEL_KEY = ("workload", "contender")


def load(path):
    """Rows of a result file. Raises ValueError, worded, for anything else."""
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"bench: --compare is {str(path)!r}, which cannot be read: {error}") from None
    if not isinstance(found, dict) or found.get("schema") != 1 or "rows" not in found:
        raise ValueError(f"bench: --compare is {str(path)!r}, expected a file that transfuse bench --json wrote")
    return found["rows"]


def _speedups(rows):
    """{what: (ratio, low, high)} of the rows that have one."""
    found = {}
    for row in rows:
        if "workload" in row:
            ratio = (row.get("against") or {}).get("stock")
            if ratio:
                found[tuple(row[key] for key in MODEL_KEY)] = ratio["ratio"], ratio["low"], ratio["high"]
        else:
            found[tuple(row.get(key) for key in OP_KEY)] = row["speedup"], row["speedup_low"], row["speedup_high"]
    return found


def changes(old, new):
    """(what, was, is, verdict) for every row that both have; 'faster' and 'slower' where the intervals are apart."""
    before, now = _speedups(old), _speedups(new)
    for what, (ratio, low, high) in now.items():
        if what in before:
            was, was_low, was_high = before[what]
            verdict = "faster" if low > was_high else "slower" if high < was_low else "same"
            yield " ".join(map(str, what)), f"{was:.2f}x", f"{ratio:.2f}x", verdict
