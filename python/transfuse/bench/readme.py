"""Writes the README's measured table from bench/results/**/*.json, so that no figure is typed by hand.

python -m transfuse.bench.readme [--check]
transfuse demo --json bench/results/cpu/demo.json;  transfuse bench --json bench/results/cpu/ops.json
"""

import argparse
import json
import sys
from pathlib import Path

from transfuse.promises.cases import BENCH_CASES

BEGIN = "<!-- measured: begin, written by `python -m transfuse.bench.readme` -->"
END = "<!-- measured: end -->"
# The README is one page: it shows these cases of the many that are measured.
SHOWN_DTYPE = "float32"
NOT_MEASURED = "not measured"


def tables(documents):
    """Markdown from what demo, bench and make gpu wrote. Raises ValueError for a document of another schema."""
    demos, ops, gpus = [], [], []
    for document in documents:
        if document.get("schema") != 1 or "command" not in document:
            raise ValueError(f"readme: schema is {document.get('schema')!r}, expected 1, with a command")
        if document["command"] == "make gpu":
            gpus += [] if document["dry_run"] else document["rows"]
        else:
            {"demo": demos, "bench": ops}.get(document["command"], []).extend(document["rows"])
    ours_on_gpu = [row for row in gpus if row["peer"].startswith("transfuse") and row["median_us"]]
    lines = [
        "| model | text | fill | speed-up | 95 % interval | largest difference | machine, date |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in demos:
        where = f"{row['machine']}, {row['threads']} threads, {row['cpu_isa']}, {row['date']}"
        difference = f"{row['parity']['max_abs_difference']:.0e}"
        lines.append(
            f"| {row['model']}, `encode()` | {row['passages']} passages, {row['tokens']} tokens "
            f"| {row['fill']:.2f} | {row['speedup']:.2f}x | "
            f"{row['speedup_low']:.2f} to {row['speedup_high']:.2f} | {difference} | {where} |"
        )
        unsorted = row["arrival"]
        if unsorted:
            lines.append(
                f"| the same, unsorted batches of 32 | {unsorted['passages']} passages, {unsorted['tokens']} tokens "
                f"| {unsorted['fill']:.2f} | {unsorted['speedup']:.2f}x | "
                f"{unsorted['speedup_low']:.2f} to {unsorted['speedup_high']:.2f} | {difference} | {where} |"
            )
    if not demos:
        lines.append(f"| all-MiniLM-L6-v2 on the CPU | | | {NOT_MEASURED} | | | |")
    if not ours_on_gpu:
        lines.append(f"| any model on a GPU (CUDA, Triton) | | | {NOT_MEASURED} | | | |")
    shown = [
        row for row in ops if row["dtype"] == SHOWN_DTYPE and row["peer"] == "torch" and not row.get("sweep", False)
    ]
    if shown:
        where = f"{SHOWN_DTYPE}, {shown[0]['machine']}, {shown[0]['threads']} threads, {shown[0]['date']}"
        lines += [
            "",
            f"One op against torch ({where}), with 95 % intervals:",
            "",
            "| op | case | shape | forward | backward |",
            "|---|---|---|---|---|",
        ]
        by_case = {}
        for row in shown:
            figure = f"{row['speedup']:.2f}x ({row['speedup_low']:.2f} to {row['speedup_high']:.2f})"
            by_case.setdefault((row["op"], row["case"], row["shape"]), {})[row["direction"]] = figure
        inference_only = {case.op for case in BENCH_CASES if "backward" not in case.directions}
        for (op, case, shape), found in by_case.items():
            missing = "none" if op in inference_only else NOT_MEASURED
            figures = " | ".join(found.get(direction, missing) for direction in ("forward", "backward"))
            lines.append(f"| {op} | {case} | {shape} | {figures} |")
    return "\n".join(lines)


def rewritten(readme, block):
    """The README's text with `block` between the two markers. Raises ValueError when a marker is missing."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"readme: README has no block between {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m transfuse.bench.readme", description="Writes README.md's measured table."
    )
    parser.add_argument("--results", type=Path, default=Path("bench/results"))
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 when the README is not the generated one"
    )
    options = parser.parse_args(argv)
    documents = [json.loads(path.read_text()) for path in sorted(options.results.rglob("*.json"))]
    text = options.readme.read_text()
    wanted = rewritten(text, tables(documents))
    if options.check:
        if wanted != text:
            print(f"{options.readme} is not what the results give: python -m transfuse.bench.readme", file=sys.stderr)
        return int(wanted != text)
    options.readme.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
