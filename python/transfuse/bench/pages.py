"""Writes README.md's measured block and docs/speed.md from bench/results/**/*.json: no figure is typed by hand.

python -m transfuse.bench.pages [--check]
make bench;  transfuse demo --json bench/results/cpu/demo.json
"""

import argparse
import json
import sys
from pathlib import Path

from transfuse.bench import acceptance, model_rows

BEGIN = "<!-- measured: begin, written by `python -m transfuse.bench.pages` -->"
END = "<!-- measured: end -->"
NOT_MEASURED = "not measured"
DTYPES = ("float32", "bfloat16")
DIRECTIONS = ("forward", "backward")
OUR_NAMES = ("ours", "stock", "products")  # contenders so called are no peers


class Results:
    """What the commands wrote. Raises ValueError for a document of another schema."""

    def __init__(self, documents):
        self.models, self.ops, self.demos, self.gpu_rows = None, None, [], []
        for document in documents:
            if document.get("schema") != 1 or "command" not in document:
                raise ValueError(f"pages: schema is {document.get('schema')!r}, expected 1, with a command")
            match document["command"]:
                case "bench models":
                    self.models = document
                case "bench":
                    self.ops = document
                case "demo":
                    self.demos += document["rows"]
                case "make gpu" if not document["dry_run"]:
                    self.gpu_rows += document["rows"]

    def against_torch(self):
        """Rows of ops against torch, without the cases that only acceptance reads."""
        rows = self.ops["rows"] if self.ops else []
        return [row for row in rows if row["peer"] == "torch" and not row.get("sweep", False)]


# README.md


def readme_block(results):
    lines = [*_demo_table(results), "", *_models_summary(results)]
    if results.against_torch():
        lines += ["", *_ops_summary(results)]
    return "\n".join(lines)


def _demo_table(results):
    yield "| model | text | fill | speed-up | 95 % interval | largest difference | machine, date |"
    yield "|---|---|---|---|---|---|---|"
    for row in results.demos:
        where = f"{row['machine']}, {row['threads']} threads, {row['cpu_isa']}, {row['date']}"
        runs = [(f"{row['model']}, `encode()`", row)]
        if row["arrival"]:
            runs.append(("the same, unsorted batches of 32", row["arrival"]))
        for what, run in runs:
            yield (
                f"| {what} | {run['passages']} passages, {run['tokens']} tokens | {run['fill']:.2f} "
                f"| {run['speedup']:.2f}x | {run['speedup_low']:.2f} to {run['speedup_high']:.2f} "
                f"| {row['parity']['max_abs_difference']:.0e} | {where} |"
            )
    if not results.demos:
        yield f"| all-MiniLM-L6-v2 on the CPU | | | {NOT_MEASURED} | | | |"
    if not any(row["peer"].startswith("transfuse") and row["median_us"] for row in results.gpu_rows):
        yield f"| any model on a GPU (CUDA, Triton) | | | {NOT_MEASURED} | | | |"


def _models_summary(results):
    """Times as fast as stock, and as the fastest peer of the same dtype, of every workload."""
    if not results.models:
        yield f"Whole models against other runtimes: {NOT_MEASURED}."
        return
    yield f"Whole models, all contenders in turns on the same batches ({_where(results.models['environment'])}):"
    yield ""
    yield "| workload | fill | float32 / stock | / fastest float32 peer | bfloat16 / stock | / fastest 16- or 8-bit peer |"
    yield "|---|---|---|---|---|---|"
    for title, by_name in _workloads(results.models):
        if "stock" not in by_name:  # ours against ours
            continue
        ours, half = by_name.get("ours"), by_name.get("ours_bf16")
        cells = [title, f"{ours['fill']:.2f}" if ours else ""]
        for row, exact in ((ours, True), (half, False)):
            peers = [
                peer for name, peer in by_name.items()
                if not name.startswith(OUR_NAMES) and peer["median_s"] and (peer["dtype"] == "float32") == exact
            ]  # fmt: skip
            fastest = min(peers, key=lambda peer: peer["median_s"], default=None)
            cells += [_against(row, "stock"), _against(row, fastest["contender"], fastest["label"]) if fastest else ""]
        yield f"| {' | '.join(cells)} |"


def _ops_summary(results):
    rows = results.against_torch()
    yield "One op against torch, slowest to fastest case (all of them: [docs/speed.md](docs/speed.md)):"
    yield ""
    yield "| op | " + " | ".join(f"{dtype} {direction}" for dtype in DTYPES for direction in DIRECTIONS) + " |"
    yield "|---|" + "---|" * (len(DTYPES) * len(DIRECTIONS))
    for op in dict.fromkeys(row["op"] for row in rows):
        cells = []
        for dtype in DTYPES:
            for direction in DIRECTIONS:
                found = [row["speedup"] for row in rows
                         if (row["op"], row["dtype"], row["direction"]) == (op, dtype, direction)]  # fmt: skip
                cells.append(f"{min(found):.2f}x to {max(found):.2f}x" if found else "")
        yield f"| {op} | {' | '.join(cells)} |"


# docs/speed.md


def speed_page(results):
    lines = [
        "# Speed",
        "",
        "Written by `python -m transfuse.bench.pages` from bench/results/cpu, which `make bench` writes. Every ratio is of",
        "times taken in turns within one run, after parity was checked; in brackets its 95 % interval. Above 1, ours takes",
        "less time.",
    ]
    if results.models or results.ops:
        lines += ["", "## What `make bench` is held to", "", "| line | wanted | | figure |", "|---|---|---|---|"]
        lines += [
            f"| {line.what} | {line.wanted} | {line.verdict} | {line.figure} |"
            for line in acceptance.lines(results.models, results.ops)
        ]
    if results.models:
        lines += ["", "## Whole models", "", _where(results.models["environment"]) + "."]
        lines += _workload_tables(results.models)
        lines += _stream_table(results.models.get("stream"))
    if results.ops:
        lines += ["", "## Ops", "", _where(results.ops["environment"]) + ".", "", *_ops_table(results.ops["rows"])]
    return "\n".join(lines) + "\n"


def _workload_tables(document):
    for title, by_name in _workloads(document):
        any_row = next(iter(by_name.values()))
        yield ""
        yield f"### {title}"
        yield ""
        yield f"{any_row['passages']} texts, {any_row['tokens']} tokens, batches {any_row['fill']:.2f} full."
        yield ""
        yield "| " + " | ".join(model_rows.HEADERS) + " |"
        yield "|" + "---|" * len(model_rows.HEADERS)
        for cells in model_rows.table_rows(list(by_name.values())):
            yield "| " + " | ".join(cells) + " |"
        for row in by_name.values():
            if row["status"] != "ok":
                yield f"\n{row['label']}: {row['status']}, {row['reason']}"


def _stream_table(marks):
    if not marks:
        return
    yield from ("", "### MiniLM, cost against tokens", "", "| tokens | seconds | us per token | peak MB |")
    yield "|---|---|---|---|"
    for row in marks:
        memory = f"{row['peak_rss_bytes'] / 1e6:.0f}" if row["peak_rss_bytes"] else ""
        yield f"| {row['tokens']} | {row['seconds']:.2f} | {row['seconds'] / row['tokens'] * 1e6:.0f} | {memory} |"


def _ops_table(rows):
    """One line per case and dtype, with a column for each peer and direction."""
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    columns = [(direction, peer) for direction in DIRECTIONS for peer in peers]
    yield "| op | case | shape | dtype | " + " | ".join(f"{way}, {peer}" for way, peer in columns) + " |"
    yield "|" + "---|" * (4 + len(columns))
    cases = {}
    for row in rows:
        memory = "" if row["output"] == "reused" else ", fresh memory"
        key = (row["op"], row["case"] + memory, row["shape"], row["dtype"])
        figure = f"{row['speedup']:.2f}x ({row['speedup_low']:.2f} to {row['speedup_high']:.2f})"
        cases.setdefault(key, {})[row["direction"], row["peer"]] = figure
    for key, found in cases.items():
        yield f"| {' | '.join(key)} | " + " | ".join(found.get(column, "") for column in columns) + " |"


def _workloads(document):
    """(title, {contender: row}) of every workload, in the order in which they ran."""
    for name in dict.fromkeys(row["workload"] for row in document["rows"]):
        rows = [row for row in document["rows"] if row["workload"] == name]
        yield rows[0]["title"], {row["contender"]: row for row in rows}


def _against(row, peer, label=""):
    ratio = row and (row["against"] or {}).get(peer)
    if not ratio:
        return ""
    return f"{ratio['ratio']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f}){' ' * bool(label)}{label}"


def _where(environment):
    return (
        f"{environment['machine']}, {environment['threads']} threads, {environment['cpu_isa']}, torch "
        f"{environment['torch']}, {environment['date']}"
    )


def rewritten(readme, block):
    """The README's text with `block` between the two markers. Raises ValueError when a marker is missing."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"pages: README has no block between {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m transfuse.bench.pages", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("bench/results"))
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--speed", type=Path, default=Path("docs/speed.md"))
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a page is another")
    options = parser.parse_args(argv)
    results = Results(json.loads(path.read_text()) for path in sorted(options.results.rglob("*.json")))
    wanted = {
        options.readme: rewritten(options.readme.read_text(), readme_block(results)),
        options.speed: speed_page(results),
    }
    stale = [page for page, text in wanted.items() if not page.is_file() or page.read_text() != text]
    for page in stale:
        if options.check:
            print(f"{page} is not what the results give: python -m transfuse.bench.pages", file=sys.stderr)
        else:
            page.write_text(wanted[page])
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
