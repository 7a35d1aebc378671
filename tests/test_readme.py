"""The README's code runs as it is printed, and its tables are the generated ones."""

import json
import re
from pathlib import Path

import torch

from transfuse.bench import pages

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_five_lines_run(capsys):
    code = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    embeddings = torch.from_numpy(names["embeddings"])
    assert embeddings.shape == (2, 384) and embeddings.norm(dim=1).allclose(torch.ones(2))
    assert "restore" in capsys.readouterr().out  # the report says how to undo
    assert not [m for m in names["model"].modules() if type(m).__module__.startswith("transfuse")]


def test_readme_is_short_and_names_both_commands():
    assert len(README.splitlines()) < 100
    assert "make demo" in README and "make test" in README and "pip install ." in README


def test_gpu_rows_are_not_claimed():
    """No GPU kernel has run on a device: every row about GPUs says so."""
    rows = [line for line in README.splitlines() if line.startswith("|") and re.search(r"H200|CUDA|Triton", line)]
    assert len(rows) >= 2
    for row in rows:
        assert "not measured" in row, row


def test_the_pages_are_generated_and_leave_no_case_out(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert pages.main(["--check"]) == 0
    speed = (ROOT / "docs/speed.md").read_text()
    for row in json.loads((ROOT / "bench/results/cpu/ops.json").read_text())["rows"]:
        assert f"| {row['op']} | {row['case']}" in speed
        assert f"{row['speedup']:.2f}x ({row['speedup_low']:.2f} to" in speed
    for row in json.loads((ROOT / "bench/results/cpu/models.json").read_text())["rows"]:
        assert row["label"] in speed
