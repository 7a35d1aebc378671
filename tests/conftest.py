"""Runs before every test file: offline, two threads, no warning of ours passes unseen."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import sys  # noqa: E402
from collections import Counter, defaultdict  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))  # its tools: triton_compile, tune
# In a process of its own: Triton reads TRITON_INTERPRET when it is imported.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["triton"]


def pytest_addoption(parser):
    parser.addoption("--table", metavar="F", help="write what passed and how long it took, by file, there (make test FULL=1)")


def pytest_terminal_summary(terminalreporter, config):
    path = config.getoption("--table")
    if path:
        write_table(Path(path), terminalreporter.stats)


def write_table(path, stats):
    """One row for each test file that was run; rows of other files stay, with the day and commit that they are of."""
    from transfuse.bench.machine import environment

    outcomes, seconds = defaultdict(Counter), Counter()
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in stats.get(outcome, []):
            name = report.nodeid.partition("::")[0].removeprefix("tests/")
            outcomes[name][outcome] += 1
            seconds[name] += getattr(report, "duration", 0.0)
    where = environment()
    run = f"{where['date']}, {where['commit'][:12]}, {where['cpu_isa']}, torch {where['torch']}"
    rows = {cells[0]: cells for cells in _rows_of(path)}
    for name, counts in outcomes.items():
        failed = counts["failed"] + counts["error"]
        rows[name] = [name, counts["passed"], failed, counts["skipped"], f"{seconds[name]:.0f}", run]
    sums = ["all", *(sum(int(cells[i]) for cells in rows.values()) for i in range(1, 5)), ""]
    lines = [
        "# The full suite",
        "",
        f"Written by `make test FULL=1`, file by file, on {where['machine']}, {where['threads']} threads, Python {where['python']}.",
        "",
        "| file | passed | failed | skipped | seconds | date, commit, machine |",
        "|---|---|---|---|---|---|",
        *("| " + " | ".join(map(str, cells)) + " |" for cells in (*(rows[name] for name in sorted(rows)), sums)),
    ]
    path.write_text("\n".join(lines) + "\n")


def _rows_of(path):
    """The rows of a table as it is, without its head and its sums."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return [cells for cells in rows[1:] if cells[0] != "all"]


@pytest.fixture(autouse=True)
def _fresh_state():
    """Each test starts from the same seed and thread count and leaves no override behind."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
