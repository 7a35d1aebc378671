"""`make bench`, the ops: pytest-benchmark times ours; what matters, ours against its peers in turns, becomes rows.

    pytest bench/bench_gelu.py ... --benchmark-only [-k quick] [--rows F.json] [--benchmark-json F]

The peers are torch as it is called without transfuse and, for what torch.compile can fuse, that under torch.compile.
"""

import pytest
import torch

from transfuse.bench import product_peak
from transfuse.bench.harness import measure_all, write_json
from transfuse.bench.machine import environment
from transfuse.promises.cases import BENCH_CASES, DTYPES, gradients_of

COMPILED = ("layer_norm", "add_layer_norm", "masked_softmax", "gelu")
ROUNDS, LARGE_ROUNDS = 11, 6
OURS_ALONE = {"rounds": 3, "iterations": 1, "warmup_rounds": 1}  # pytest-benchmark's own figure, without a peer
INFO = ("shape", "backend", "output", "speedup", "speedup_low", "speedup_high", "interval", "max_error", "error_budget",
        "bytes", "flops", "gbps", "gflops", "ours_us", "peer_us", "cpu_isa", "threads", "commit")  # fmt: skip


def pytest_addoption(parser):
    parser.addoption("--rows", metavar="F", help="write the rows there")


def pytest_configure(config):
    config.transfuse_rows = []


def pytest_generate_tests(metafunc):
    """A front names its ops in OPS: their cases run in every dtype and direction. Ids of quick cases end in -quick."""
    if "case" not in metafunc.fixturenames:
        return
    parameters = [
        pytest.param(
            case,
            dtype,
            direction,
            id=f"{case.op}-{case.name}-{str(dtype).removeprefix('torch.')}-{direction}"
            + ("-quick" if case.quick else ""),
        )
        for case in BENCH_CASES
        if case.op in metafunc.module.OPS
        for dtype in DTYPES
        for direction in case.directions
    ]
    metafunc.parametrize(("case", "dtype", "direction"), parameters)


@pytest.fixture(scope="session")
def product_peaks():
    """GFLOP/s of this machine's packed products now, by dtype: what attention is held against."""
    return {dtype: product_peak.peak_gflops(dtype) for dtype in DTYPES}


@pytest.fixture
def run_case(benchmark, request, product_peaks):
    """Asserts parity, compares with the peers in turns, then lets pytest-benchmark time ours alone."""

    def run(case, dtype, direction):
        rows = measure_all(
            case,
            peers=("torch", "compile") if case.op in COMPILED else ("torch",),
            dtype=dtype,
            direction=direction,
            rounds=LARGE_ROUNDS if case.fresh else ROUNDS,
        )
        for row in rows:
            row["product_share"] = row["gflops"] / product_peaks[dtype] if "attention" in case.op else None
        request.config.transfuse_rows += rows
        benchmark.extra_info.update({key: rows[0][key] for key in INFO})
        inputs = case.inputs(dtype)
        if direction == "backward":
            benchmark.pedantic(gradients_of(case.ours, inputs, case.grad_output(inputs)), **OURS_ALONE)
        else:
            with torch.no_grad():
                benchmark.pedantic(case.ours, inputs, **OURS_ALONE)

    return run


def pytest_sessionfinish(session):
    rows, path = session.config.transfuse_rows, session.config.getoption("--rows")
    if path and rows:
        write_json(path, rows, command="bench", environment=environment(), failed=[])


def pytest_terminal_summary(terminalreporter, config):
    """What the table of pytest-benchmark does not show: each case against its peers of the same run."""
    for row in config.transfuse_rows:
        what = f"{row['op']} {row['case']} {row['dtype']} {row['direction']}, {row['output']} memory"
        interval = f"({row['speedup_low']:.2f} to {row['speedup_high']:.2f})"
        terminalreporter.write_line(f"{row['speedup']:6.2f}x {row['peer']:<8} {interval:<18} {what}")
