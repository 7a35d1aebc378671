"""Runs before every test file: offline, two threads, no warning of ours passes unseen."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections import Counter, defaultdict  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

# In a process of its own: Triton reads TRITON_INTERPRET when it is imported.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["triton"]


def pytest_addoption(parser):
    parser.addoption("--table", metavar="F", help="write what passed and how long it took, by file, there (make test FULL=1)")


def pytest_terminal_summary(terminalreporter, config):
    path = config.getoption("--table")
    if not path:
        return
    from transfuse.bench.machine import environment

    outcomes, seconds = defaultdict(Counter), Counter()
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            name = report.nodeid.partition("::")[0].removeprefix("tests/")
            outcomes[name][outcome] += 1
            seconds[name] += getattr(report, "duration", 0.0)
    where = environment()
    lines = [
        "# The full suite",
        "",
        f"Written by `make test FULL=1` on {where['date']}, commit {where['commit'][:12]}, {where['machine']}, {where['threads']} threads, "
        f"{where['cpu_isa']}, torch {where['torch']}, Python {where['python']}.",
        "",
        "| file | passed | failed | skipped | seconds |",
        "|---|---|---|---|---|",
    ]
    total = sum(outcomes.values(), Counter())
    for name in (*sorted(outcomes), "all"):
        counts = total if name == "all" else outcomes[name]
        duration = sum(seconds.values()) if name == "all" else seconds[name]
        lines.append(f"| {name} | {counts['passed']} | {counts['failed'] + counts['error']} | {counts['skipped']} | {duration:.0f} |")
    Path(path).write_text("\n".join(lines) + "\n")


@pytest.fixture(autouse=True)
def _fresh_state():
    """Each test starts from the same seed and thread count and leaves no override behind."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
