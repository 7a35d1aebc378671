"""bench_<op>.py --tune on a machine with no GPU: what there is to tune, what is compiled, what is said.

How a winner is chosen is tested in tests/triton/test_triton_tune.py, where kernels run.
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import tune
from tune_decisions import Sizes, Source, decisions

from transfuse.kernels.triton import attention_problem, launch, masked_softmax, norm, rows
from transfuse.promises.cases import OPS

ROOT = Path(__file__).resolve().parent.parent
SMALL = Sizes(elements=1 << 15, heads=8, length=64, cache=512)
NAMES = {"RowTile": rows.RowTile, "Tile": attention_problem.Tile, "Launch": launch.Launch}


def test_every_row_of_every_table_is_tuned():
    found = [decisions(OPS, architecture) for architecture in launch.ARCHITECTURES]
    presents = {id(decision.present) for some in found for decision in some}
    tables = (norm.FORWARD_TILES, norm.GRADIENT_TILES, masked_softmax.FORWARD_TILES, masked_softmax.GRADIENT_TILES)
    for row in (*sum(tables, ()), *attention_problem.TILES, norm.STREAMED_LINES, rows.STREAMED, rows.LINES):
        assert id(row) in presents, row
    for op in OPS:
        assert decisions((op,), launch.SM90), f"{op} has nothing to tune"


@pytest.mark.parametrize("architecture", launch.ARCHITECTURES, ids=lambda architecture: str(architecture.name))
def test_a_candidate_reaches_its_kernel_and_no_table(architecture):
    """Each work launches with the candidate, not with the row in whose place it stands; afterwards with the row."""
    for decision in decisions(OPS, architecture, SMALL):
        seen = [decision.present]
        for work in decision.works:
            call = work.prepare(Source("meta"))
            before, _ = tune.launches_of(decision, call, decision.present, architecture)
            for candidate in decision.candidates:
                recorded, own = tune.launches_of(decision, call, candidate, architecture)
                changed = tune.difference(decision.present, candidate)
                assert own, f"{decision.name}: {changed} does not reach {work.name}"
                assert len(recorded) == len(before)
                assert changed and (candidate in seen) == (work is not decision.works[0])
                seen.append(candidate)
        assert launch.taken(decision.present) is decision.present


def test_what_is_printed_makes_the_row():
    for architecture in launch.ARCHITECTURES:
        for decision in decisions(OPS, architecture):
            row = decision.present
            for words in ("not measured", "NVIDIA H200, float32 and bfloat16, 2026-11-22: 99 GB/s; " + "rows=2 " * 20):
                row = tune._with_launch(row, replace(tune.launch_of(row), measured=words))
                text = tune.source_of(row)
                assert eval(f"({text})", NAMES) == (row,)
                assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("op,only,kernels", [("masked_softmax", "MASK_KEYS", 5), ("rotary", "FORWARD_TILE", 6)])
def test_offline_compiles_every_candidate_and_prints_no_row(op, only, kernels, capsys):
    assert tune.main((op,), ["--tune", "--architecture", "sm_90", "--only", only]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert tune.NOT_HERE in lines[0] and all(line.startswith("#") for line in lines)
    (decision,) = [d for d in decisions((op,), launch.SM90) if only in d.name]
    compiled = [line for line in lines if "registers" in line and "bytes of shared memory" in line]
    assert len(compiled) == 1 + len(decision.candidates) >= kernels
    figures = [line.split("registers")[0].split()[-1] for line in compiled]
    assert all(0 < int(figure) <= 255 for figure in figures) and len(set(figures)) > 1


def test_a_candidate_that_does_not_fit_is_refused(capsys):
    small = replace(launch.SM90, shared_bytes=8)
    (decision,) = [d for d in decisions(("rotary",), launch.SM90, SMALL) if "BACKWARD" in d.name]
    tune.print_offline(replace(decision, candidates=()), small, print)
    assert "refused, 8 there are" in capsys.readouterr().out


def test_without_a_gpu_nothing_is_measured(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert tune.main(("gelu",), ["--tune"]) == 2
    said = capsys.readouterr()
    assert tune.NOT_HERE in said.err and said.out == ""


def test_a_front_is_a_program(capsys):
    run = [sys.executable, str(ROOT / "bench" / "bench_rotary.py")]
    done = subprocess.run([*run, "--help"], capture_output=True, text=True, check=True)
    for word in ("--tune", "--architecture", "sm_90", "--only", "make bench"):
        assert word in done.stdout
    with pytest.raises(SystemExit):
        tune.main(("gelu",), ["--tune", "--architecture", "sm_91"])
    with pytest.raises(SystemExit):
        tune.main(("gelu",), ["--tune", "--architecture", "sm_90", "--only", "nothing"])
    assert "no row's name holds 'nothing'" in capsys.readouterr().err
    for path in (ROOT / "bench").glob("bench_*.py"):
        assert path.stem == "bench_models" or "tune.main(OPS)" in path.read_text()
