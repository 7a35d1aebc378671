"""The end of `make bench`: every line of acceptance, met or not met, with its figure.

    python bench/print_acceptance.py [MODELS.json OPS.json]
"""

import json
import sys
from pathlib import Path

from transfuse.bench import acceptance
from transfuse.cli.output import table

RESULTS = Path(__file__).resolve().parent / "results" / "cpu"


def report(models, ops):
    """The table, and the count under it. Either document may be None."""
    found = acceptance.lines(models, ops)
    printed = table(
        ("line", "wanted", "", "figure (ratios: median and 95 % interval)"),
        [(line.what, line.wanted, line.verdict, line.figure) for line in found],
    )
    met, missing = (sum(line.met is state for line in found) for state in (True, None))
    return f"{printed}\n\n{met} of {len(found)} lines met, {len(found) - met - missing} not met, {missing} not measured"


def main(argv):
    paths = [Path(name) for name in argv] or [RESULTS / "models.json", RESULTS / "ops.json"]
    print(report(*(json.loads(path.read_text()) if path.is_file() else None for path in paths)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
