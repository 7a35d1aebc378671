"""`make bench`: pytest-benchmark times ours; the figures that matter, ours against torch in turns, stand in extra_info.

pytest bench/bench_*.py --benchmark-only [-k quick] [--benchmark-json F]
"""

import pytest
import torch

from transfuse.bench.harness import measure
from transfuse.promises.cases import BENCH_CASES, DTYPES, gradients_of

INFO = (
    "shape",
    "backend",
    "peer",
    "speedup",
    "speedup_low",
    "speedup_high",
    "interval",
    "max_error",
    "error_budget",
    "bytes",
    "flops",
    "gbps",
    "gflops",
    "ours_us",
    "peer_us",
    "cpu_isa",
    "threads",
    "commit",
)


def pytest_generate_tests(metafunc):
    """A front names its ops in OPS; their cases run in every dtype and direction they have. Ids of quick cases end in -quick."""
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


@pytest.fixture
def run_case(benchmark):
    """Asserts parity, compares with torch in turns, then lets pytest-benchmark time ours alone."""

    def run(case, dtype, direction):
        row = measure(case, dtype=dtype, direction=direction, peer="torch")
        benchmark.extra_info.update({key: row[key] for key in INFO})
        inputs = case.inputs(dtype)
        if direction == "backward":
            benchmark(gradients_of(case.ours, inputs, case.grad_output(inputs)))
        else:
            with torch.no_grad():
                benchmark(case.ours, *inputs)

    return run


def pytest_terminal_summary(terminalreporter, config):
    """What the table of pytest-benchmark does not show: each case against its peer of the same run."""
    for benchmark in getattr(getattr(config, "_benchmarksession", None), "benchmarks", ()):
        info = benchmark.extra_info
        if "speedup" in info:
            low, high = info["speedup_low"], info["speedup_high"]
            terminalreporter.write_line(f"{info['speedup']:6.2f}x torch ({low:.2f} to {high:.2f})  {benchmark.name}")
