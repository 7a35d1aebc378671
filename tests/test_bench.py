"""The harness tells the truth: intervals cover, drift cancels, nothing is timed before parity, rows keep their form."""

import contextlib
import importlib.util
import itertools
import json
import math
import random
import time
from pathlib import Path

import pytest
import torch

import transfuse
from transfuse.bench import gpu, gpu_peers, gpu_rows, harness, machine, pages, text
from transfuse.bench.harness import compare, measure, median_ranks, ratio_interval
from transfuse.dispatch import setting
from transfuse.promises import cases
from transfuse.promises.cases import ParityError

ROOT = Path(__file__).resolve().parent.parent
LAYER_NORM = next(case for case in cases.PARITY_CASES if case.op == "layer_norm")


class Clock:
    """A clock that only moves when work is done on it; `speed` may drift as a real machine's does."""

    def __init__(self, noise=0.0, drift=0.0, seed=0):
        self.now, self.random, self.noise, self.drift = 0.0, random.Random(seed), noise, drift

    def __call__(self):
        return self.now

    def work(self, seconds):
        def call():
            self.now += seconds * (1 + self.drift * self.now) * math.exp(self.noise * self.random.gauss(0, 1))

        return call


# Tables of the sign test: 1-based ranks 1..6 of 6, 2..10 of 11, 6..15 of 20 cover the median with at least 95 %.
@pytest.mark.parametrize(
    "count, ranks", [(6, (0, 5)), (8, (0, 7)), (9, (1, 7)), (11, (1, 9)), (20, (5, 14)), (25, (7, 17))]
)
def test_median_ranks(count, ranks):
    assert median_ranks(count) == ranks


def test_student_interval_of_five_rounds():
    """By hand: logs 0, .1, .2, .3, .4 have mean .2, deviation sqrt(.025), half width 2.776 * sqrt(.025 / 5)."""
    centre, low, high, method = ratio_interval([math.exp(0.1 * index) for index in range(5)])
    half = 2.776 * math.sqrt(0.025 / 5)
    assert (
        math.isclose(centre, math.exp(0.2))
        and math.isclose(low, math.exp(0.2 - half))
        and math.isclose(high, math.exp(0.2 + half))
    )
    assert "Student" in method


def test_one_round_promises_nothing_and_none_is_refused():
    assert ratio_interval([1.5])[1:3] == (0.0, math.inf)
    with pytest.raises(ValueError, match="^ratio_interval: ratios is empty, expected at least 1 round$"):
        ratio_interval([])


@pytest.mark.parametrize("rounds", [5, 11])
def test_interval_covers_a_known_ratio(rounds):
    """300 noisy comparisons of true ratio 1.7: 285 of their intervals should hold it, 270 is 4 deviations below."""
    covered = 0
    for seed in range(300):
        clock = Clock(noise=0.1, seed=seed)
        found = compare(clock.work(1.0), clock.work(1.7), rounds=rounds, calls=1, timer=clock)
        covered += found.low <= 1.7 <= found.high
    assert covered >= 270


def test_drift_cancels():
    """A machine that slows down by half during the run does not change the ratio: neighbours in time are compared."""
    clock = Clock(drift=0.002)
    found = compare(clock.work(1.0), clock.work(2.0), rounds=20, calls=1, timer=clock)
    assert found.low <= 2.0 <= found.high and abs(found.ratio - 2.0) < 0.02
    assert found.ours_s[-1] > 1.1 * found.ours_s[0]  # it did drift


def test_one_disturbed_round_does_not_move_the_median():
    clock = Clock()
    slow = iter([1.0] * 7 + [50.0] + [1.0] * 30)
    ours = clock.work(1.0)

    def disturbed():
        clock.now += next(slow) - 1.0
        ours()

    found = compare(disturbed, clock.work(1.5), rounds=11, calls=1, warmup=1, timer=clock)
    assert found.ratio == pytest.approx(1.5) and found.low == pytest.approx(1.5)


def test_order_alternates_and_blocks_fill_their_time():
    clock, order = Clock(), []
    fast = clock.work(harness.BLOCK_SECONDS / 4)

    def named(name):
        def call():
            order.append(name)
            fast()

        return call

    compare(named("ours"), named("theirs"), rounds=2, timer=clock)
    assert order[:2] == ["ours", "theirs"]  # the warm-up
    assert order[2:] == ["ours"] * 4 + ["theirs"] * 8 + ["ours"] * 4


@pytest.mark.parametrize("fresh, alive", [(False, 1), (True, 3)])
def test_fresh_keeps_a_blocks_results(fresh, alive):
    """fresh=True: every call of a block gets memory of its own, because the results before it are still held."""
    import weakref

    class Result:
        pass

    living, most = weakref.WeakSet(), [0]

    def call():
        result = Result()
        living.add(result)
        most[0] = max(most[0], len(living))
        return result

    compare(call, lambda: None, rounds=1, warmup=0, calls=3, fresh=fresh)
    assert most[0] == alive


def test_compare_refuses_no_rounds():
    with pytest.raises(ValueError, match="^compare: rounds is 0, expected at least 1$"):
        compare(int, int, rounds=0)


def _broken(function, change):
    """A stand-in for a wrong kernel: right under the reference, changed elsewhere."""

    def wrong(*args, **kwargs):
        result = function(*args, **kwargs)
        return result if setting() == "reference" else change(result)

    return wrong


@pytest.mark.parametrize("direction", cases.DIRECTIONS)
@pytest.mark.parametrize(
    "change", [lambda y: y * 1.001, lambda y: y + 1e-4, lambda y: y * float("nan")], ids=["scaled", "shifted", "nan"]
)
def test_a_wrong_op_is_never_timed(monkeypatch, direction, change):
    if direction == "backward" and change(torch.zeros(1)).item() == pytest.approx(1e-4):
        pytest.skip("a constant has no gradient")
    monkeypatch.setattr(transfuse, "layer_norm", _broken(transfuse.layer_norm, change), raising=False)

    def timer():
        raise AssertionError("the clock was read before parity held")

    with pytest.raises(
        ParityError, match="^layer_norm: ragged .* misses parity: .* repeat with: transfuse verify --op layer_norm$"
    ):
        measure(LAYER_NORM, direction=direction, timer=timer)


@pytest.mark.parametrize("peer", ["torch", "reference"])
@pytest.mark.parametrize("direction", cases.DIRECTIONS)
def test_measure_gives_a_whole_row(peer, direction):
    row = measure(LAYER_NORM, direction=direction, peer=peer, rounds=6)
    assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
    assert (
        row["op"] == "layer_norm"
        and row["peer"] == peer
        and row["direction"] == direction
        and row["dtype"] == "float32"
    )
    assert 0 <= row["max_error"] <= row["error_budget"] and row["interval"].startswith("median")
    assert row["bytes"] == 7 * 129 * 2 * 4 * (2 if direction == "backward" else 1)
    json.dumps(row)


def test_measure_refuses_an_unknown_peer():
    with pytest.raises(ValueError, match="^measure: peer is 'jax', expected one of torch, compile, reference$"):
        measure(LAYER_NORM, peer="jax")


def test_every_op_has_quick_bench_and_parity_cases():
    for op in cases.OPS:
        assert any(case.quick for case in cases.selected(cases.BENCH_CASES, op))
        assert cases.selected(cases.PARITY_CASES, op)
    for group in (cases.BENCH_CASES, cases.PARITY_CASES):
        names = [(case.op, case.name) for case in group]
        assert len(names) == len(set(names))


@pytest.mark.parametrize("path", sorted((ROOT / "bench").glob("bench_*.py")), ids=lambda path: path.stem)
def test_fronts_name_known_ops(path):
    if path.stem == "bench_models":
        pytest.skip("models, not ops")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    front = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(front)
    assert front.OPS and set(front.OPS) <= set(cases.OPS)


def test_passages_are_many_real_and_the_same_every_time():
    everything = text.passages()
    assert len(everything) > 1024 and len(set(everything)) == len(everything)
    lengths = sorted(len(passage.split()) for passage in everything)
    assert (
        lengths[0] >= text.FEWEST_WORDS and lengths[-1] > 20 * lengths[len(lengths) // 10]
    )  # lengths vary as they do in nature
    assert text.passages(512) == text.passages(512) and len(set(text.passages(512))) == 512
    assert text.fingerprint(["a", "b"]) == "7e18f737311b2dc3b2f269dd78396b0351f14fb66efa879f768cb23181883c78"
    with pytest.raises(ValueError, match=f"^text: count is 0, expected 1 to {len(everything)} "):
        text.passages(0)


def test_commit_is_read_from_every_kind_of_checkout(tmp_path):
    sha, other = "a" * 40, "b" * 40
    git = tmp_path / "main" / ".git"
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    (git / "refs" / "heads" / "main").write_text(sha + "\n")
    inside = tmp_path / "main" / "python" / "file.py"
    assert machine.git_commit(inside) == sha
    (git / "refs" / "heads" / "main").unlink()
    assert machine.git_commit(inside) == "unknown"
    (git / "packed-refs").write_text(f"# pack-refs\n{other} refs/heads/main\n")
    assert machine.git_commit(inside) == other
    (git / "HEAD").write_text(sha + "\n")
    assert machine.git_commit(inside) == sha
    # A worktree: .git is a file, and branches live in the common folder.
    private = git / "worktrees" / "side"
    private.mkdir(parents=True)
    (private / "HEAD").write_text("ref: refs/heads/main\n")
    (private / "commondir").write_text("../..\n")
    (tmp_path / "side").mkdir()
    (tmp_path / "side" / ".git").write_text(f"gitdir: {private}\n")
    assert machine.git_commit(tmp_path / "side" / "x.py") == other
    assert machine.git_commit("/proc/none") == "unknown"


def test_rows_are_written_whole(tmp_path):
    path = tmp_path / "new" / "rows.json"
    harness.write_json(path, [{"a": 1}], command="bench")
    assert json.loads(path.read_text()) == {"schema": 1, "command": "bench", "rows": [{"a": 1}]}
    assert [entry.name for entry in path.parent.iterdir()] == ["rows.json"]


# make gpu


def test_gpu_needs_a_gpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("make gpu: needs an NVIDIA GPU, and ")
    assert not list(tmp_path.iterdir())


def test_gpu_dry_run_walks_every_case(tmp_path, capsys):
    torch.set_num_threads(1)
    assert gpu.main(["--out", str(tmp_path), "--dry-run", "--commit", "c" * 40]) == 0
    document = json.loads((tmp_path / "gpu.json").read_text())
    assert document["schema"] == 1 and document["command"] == "make gpu" and document["dry_run"] is True
    rows = document["rows"]
    for row in rows:
        gpu_rows.check_row(row)
        assert row["commit"] == "c" * 40 and len(row["date"]) == 10
    sections = {row["section"] for row in rows}
    assert sections == {"parity", *(name for name, _ in gpu.SECTIONS)}
    # Backends that do not exist yet are rows that say so; peers that refuse give their reason; the others have figures.
    assert {row["peer"]: row["status"] for row in rows if row["section"] == "parity"} == {
        "transfuse cuda": "skipped",
        "transfuse triton": "skipped",
    }
    refused = [row for row in rows if row["peer"] == "sdpa cudnn" and row["section"] == "sdpa"]
    assert refused and all(row["status"] == "refused" for row in refused)
    flash = [row for row in rows if row["peer"] == "sdpa flash" and row["section"] == "sdpa"]
    assert {row["direction"] for row in flash} == {"forward", "backward"} and all(row["median_us"] > 0 for row in flash)
    measured = [row["rms_error"] for row in flash if row["rms_error"] is not None]
    assert (
        measured and max(measured) < 0.01
    )  # bfloat16 against float64: 2**-8, so the shapes and the causal flag are right
    kernels = {row["op"] for row in rows if row["section"] == "row_kernels" and row["status"] == "ok"}
    assert {"layer_norm", "rms_norm", "softmax", "gelu", "add_layer_norm", "bias_gelu", "rotary"} <= kernels
    own = {(row["peer"], row["direction"], row["variant"]) for row in rows if row["section"] == "own_attention"}
    kinds = ("", "causal", "bias [1,H,L,L]", "bias [B,H,L,L]")
    assert own == set(itertools.product(gpu_peers.OWN_BACKENDS, ("forward", "backward"), kinds))
    own = [(row["peer"], row["shape"]["seqlen"]) for row in rows if row["section"] == "own_attention"]
    before_triton = own[: [peer for peer, _ in own].index("transfuse triton")]
    assert len(set(before_triton)) > gpu_peers.LENGTHS_AHEAD  # where its compiler takes the time, CUDA has figures
    packed = {(row["peer"], row["direction"], row["variant"]) for row in rows if row["section"] == "varlen"}
    assert {(peer, way, "") for peer in gpu_peers.OWN_BACKENDS for way in ("forward", "backward")} <= packed
    assert ("sdpa flash", "backward", "padded") in packed
    small = [(row["peer"], row["status"]) for row in rows if row["section"] == "small_rows"]
    assert {peer for peer, _ in small} == {"transfuse cuda", "transfuse triton", "torch eager"}
    assert {status for _, status in small} == {"ok"}
    decode = [row for row in rows if row["section"] == "decode"]
    assert {row["peer"] for row in decode} == {"transfuse cuda", "transfuse triton", "sdpa gqa"}
    assert {row["status"] for row in decode} == {"ok"} and all(row["gbps"] > 0 for row in decode)
    exact = [row["rms_error"] for row in decode]  # contiguous with torch's, and in pages
    assert len(exact) == 5 * len(gpu.gpu_peers.DECODE_SIZES) and max(exact) < 0.01
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"{len(rows)} rows in {tmp_path / 'gpu.json'}; parity failures of transfuse: 0"


def test_gpu_circumstances_are_compared_with_a_plain_call(tmp_path, monkeypatch):
    """Those that need no GPU, on the CPU; a circumstance that changes a bit fails the op, one that raises is an error."""
    run = gpu_rows.Run(tmp_path, budget_s=60, dry=True)
    monkeypatch.setattr(gpu, "use_backend", lambda name: contextlib.nullcontext())
    chosen = {name: gpu.CIRCUMSTANCES[name] for name in ("in a fresh thread", "as a compiled first call")}
    chosen |= {"wrong": lambda call, x: call(x) + 1, "raises": lambda call, x: call(x, x, x, x, x)}
    monkeypatch.setattr(gpu, "CIRCUMSTANCES", chosen)
    with run.within("parity", 60):
        for op in gpu.CALLS_ANYWHERE:
            gpu.check_circumstances(run, op, "cuda")
    run.close()
    assert [row["status"] for row in run.rows] == ["ok", "ok", "failed", "error"] * len(gpu.CALLS_ANYWHERE)
    assert {row["op"] for row in run.rows} >= set(gpu.ATTENTION_OPS)


def test_gpu_budget_is_kept(tmp_path):
    """With no time left every case becomes a row that says so, and nothing runs."""
    run = gpu_rows.Run(tmp_path, budget_s=0, dry=True)

    def never():
        raise AssertionError("ran after the deadline")

    with run.within("late", 10):
        run.measure(never, op="copy", peer="torch")
    run.close()
    assert [(row["status"], row["reason"]) for row in run.rows] == [("skipped", "the section's time was used up")]


def test_gpu_no_section_takes_the_time_of_the_later_ones(tmp_path):
    """Half the time that all ask for: each has half of it; what one leaves over is the next one's."""
    run = gpu_rows.Run(tmp_path, budget_s=100, dry=True)
    with run.within("first", 150, of=200):
        assert 70 < run.section_end - time.monotonic() <= 75
    with run.within("last", 50, of=50):
        assert 45 < run.section_end - time.monotonic() <= 50
    run.close()


def test_gpu_one_failure_does_not_stop_the_rest(tmp_path, monkeypatch):
    run = gpu_rows.Run(tmp_path, budget_s=60, dry=True)
    monkeypatch.setattr(gpu_rows, "ONE_FIGURE_SECONDS", 0.2)

    def breaks():
        raise RuntimeError("CUDA out of memory,\n tried")

    def hangs():
        while True:
            pass

    with run.within("guarded", 60):
        run.measure(breaks, op="copy", peer="one")
        run.measure(hangs, op="copy", peer="two")
        run.measure(lambda: lambda: None, op="copy", peer="three", moved=1)
        raise ValueError("a section breaks")
    with run.within("next", 60):
        run.measure(lambda: lambda: None, op="copy", peer="four", flops=1)
    run.close()
    assert [(row["peer"], row["status"]) for row in run.rows] == [
        ("one", "error"),
        ("two", "skipped"),
        ("three", "ok"),
        ("-", "error"),
        ("four", "ok"),
    ]
    assert run.rows[0]["reason"] == "RuntimeError: CUDA out of memory, tried"
    assert run.rows[1]["reason"].startswith("gave up after") and run.rows[3]["reason"] == "ValueError: a section breaks"


@pytest.mark.parametrize("error", [0.5, math.nan])
def test_gpu_a_wrong_result_has_no_speed(tmp_path, error):
    run = gpu_rows.Run(tmp_path, budget_s=60, dry=True)
    with run.within("decode", 60):
        for peer in ("transfuse cuda", "sdpa gqa"):
            row = run.measure(lambda: (lambda: None, error), op="decode_attention", peer=peer)
            assert row["status"] == "failed" and row["median_us"] is None and "relative rms error" in row["reason"]
            assert gpu.is_failure(row) == (peer in gpu_peers.OWN_BACKENDS)  # what torch gets wrong is not ours
    run.close()


def test_gpu_wrong_rows_are_refused(tmp_path):
    run = gpu_rows.Run(tmp_path, budget_s=60, dry=True)
    run.close()
    with pytest.raises(
        ValueError, match="^gpu: row copy torch has status 'fine', expected one of ok, failed, refused, error, skipped$"
    ):
        run.add(op="copy", peer="torch", status="fine")
    with pytest.raises(ValueError, match="^gpu: row copy torch is error without a reason$"):
        run.add(op="copy", peer="torch", status="error")
    with pytest.raises(ValueError, match="^gpu: row copy torch is ok and has no median_us$"):
        run.add(op="copy", peer="torch")
    with pytest.raises(ValueError, match=r"^gpu: row copy torch has unknown keys \['speed'\]$"):
        run.add(op="copy", peer="torch", median_us=1.0, speed=2)


# Generated pages

DEMO_ROW = {
    "model": "MiniLM",
    "passages": 512,
    "tokens": 100,
    "fill": 0.84,
    "speedup": 1.5,
    "speedup_low": 1.4,
    "speedup_high": 1.6,
    "machine": "CPU",
    "threads": 2,
    "cpu_isa": "avx2",
    "date": "2026-01-01",
    "parity": {"max_abs_difference": 3e-7},
    "arrival": {"passages": 96, "tokens": 20, "fill": 0.3, "speedup": 3.0, "speedup_low": 2.9, "speedup_high": 3.1},
}


def test_readme_table_comes_from_results(tmp_path):
    page, speed, results = tmp_path / "README.md", tmp_path / "speed.md", tmp_path / "results"
    results.mkdir()
    page.write_text(f"before\n{pages.BEGIN}\nold\n{pages.END}\nafter\n")
    (results / "demo.json").write_text(json.dumps({"schema": 1, "command": "demo", "rows": [DEMO_ROW]}))
    options = ["--results", str(results), "--readme", str(page), "--speed", str(speed)]
    assert pages.main([*options, "--check"]) == 1 and not speed.exists()
    assert pages.main(options) == 0 and pages.main([*options, "--check"]) == 0
    lines = page.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
    assert (
        "| MiniLM, `encode()` | 512 passages, 100 tokens | 0.84 | 1.50x | 1.40 to 1.60 | 3e-07 "
        "| CPU, 2 threads, avx2, 2026-01-01 |" in lines
    )
    assert "| any model on a GPU (CUDA, Triton) | | | not measured | | | |" in lines
    assert "Whole models against other runtimes: not measured." in lines
    speed.write_text(speed.read_text() + "typed by hand\n")
    assert pages.main([*options, "--check"]) == 1


def test_readme_without_markers_or_with_strange_results_is_refused():
    with pytest.raises(ValueError, match="^pages: README has no block between"):
        pages.rewritten("nothing", "block")
    with pytest.raises(ValueError, match="^pages: schema is None, expected 1, with a command$"):
        pages.Results([{}])
