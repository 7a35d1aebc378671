"""Interleaved timing of two ways to compute the same thing, and an honest interval around their ratio.

A machine's speed drifts (clocks, other programs), so A is never timed as a whole before B: each round times both, in
alternating order, and yields one ratio. The interval is taken over the rounds' ratios:

- 6 rounds or more: the median, and the exact distribution-free interval of a median from order statistics (binomial
  tails). One disturbed round moves it by one rank at most.
- 2 to 5 rounds: there order statistics cannot reach 95 % (5 rounds reach 93.75 %), so: the geometric mean, and
  Student's t over the logarithms of the ratios.

`Comparison.method` says which one was used. Nothing is timed before its result was compared: see `measure`.
"""

import json
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from transfuse.bench.machine import environment
from transfuse.promises.cases import gradients_of

CONFIDENCE = 0.95
MEDIAN_ROUNDS = 6  # the fewest rounds whose extremes cover the median with 95 %: 1 - 2 * 0.5**6 = 0.969
# Two-sided 95 % points of Student's t for 1 to 4 degrees of freedom (2 to 5 rounds).
STUDENT_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
BLOCK_SECONDS = 0.02  # one timed block lasts at least this long, so that the clock's grain and the call to it vanish


PEERS = ("torch", "compile", "reference")


@dataclass(frozen=True)
class Comparison:
    """How much faster `ours` is than `theirs`: `ratio` > 1 means ours takes less time."""

    ratio: float
    low: float
    high: float
    method: str
    ours_s: tuple[float, ...]
    theirs_s: tuple[float, ...]

    @property
    def ratios(self):
        return tuple(theirs / ours for ours, theirs in zip(self.ours_s, self.theirs_s, strict=True))

    @property
    def ours_median_s(self):
        return statistics.median(self.ours_s)

    @property
    def theirs_median_s(self):
        return statistics.median(self.theirs_s)

    def __str__(self):
        return f"{self.ratio:.2f}x (95 % interval {self.low:.2f} to {self.high:.2f}, {len(self.ours_s)} rounds)"


def median_ranks(count, confidence=CONFIDENCE):
    """The 0-based ranks (low, high) of sorted values between which the median lies with at least `confidence`.

    The number of values below the median is binomial(count, 1/2): ranks move inwards while the tails allow it.
    """
    tail, allowed, rank = 0.0, (1 - confidence) / 2, 0
    while rank < count // 2:
        tail += math.comb(count, rank) * 0.5**count
        if tail > allowed:
            break
        rank += 1
    low = max(rank - 1, 0)
    return low, count - 1 - low


def ratio_interval(ratios):
    """(centre, low, high, method) of a sequence of ratios of paired rounds; the 95 % interval described at the top."""
    count = len(ratios)
    if count == 0:
        raise ValueError("ratio_interval: ratios is empty, expected at least 1 round")
    if count >= MEDIAN_ROUNDS:
        ordered = sorted(ratios)
        low, high = median_ranks(count)
        return statistics.median(ordered), ordered[low], ordered[high], "median, order statistics"
    logs = [math.log(ratio) for ratio in ratios]
    centre = statistics.fmean(logs)
    # One round carries no information about its own spread: its interval is everything.
    half = math.inf if count == 1 else STUDENT_T[count - 1] * statistics.stdev(logs) / math.sqrt(count)
    high = math.inf if half == math.inf else math.exp(centre + half)
    return math.exp(centre), math.exp(centre - half), high, "geometric mean, Student's t on logarithms"


def compare(
    ours,
    theirs,
    *,
    rounds=11,
    warmup=1,
    calls=None,
    fresh=False,
    timer=time.perf_counter,
    synchronize=None,
    on_round=None,
):
    """Times two callables in alternating order, `rounds` times each.

    Args:
        ours, theirs: called with no argument.
        calls: calls per timed block; None finds the number that fills BLOCK_SECONDS with the slower of the two.
        fresh: False lets every call reuse the memory its predecessor gave back (a warm output buffer); True keeps the
            results of a block alive, so that every call writes to memory it has not touched before.
        timer: returns seconds; a test puts a clock of its own here.
        synchronize: called before each reading of the clock (a GPU's queue is drained by it).
        on_round: called with (index, ours_s, theirs_s) after each round, for a progress bar.
    Returns: Comparison, in seconds per call.
    """
    if rounds < 1:
        raise ValueError(f"compare: rounds is {rounds}, expected at least 1")

    def block(call, count):
        kept = []
        if synchronize:
            synchronize()
        start = timer()
        for _ in range(count):
            result = call()
            if fresh:
                kept.append(result)
            del result
        if synchronize:
            synchronize()
        return (timer() - start) / count

    for _ in range(warmup):
        slowest = max(block(ours, 1), block(theirs, 1))
    if calls is None:
        if not warmup:
            slowest = max(block(ours, 1), block(theirs, 1))
        calls = max(1, math.ceil(BLOCK_SECONDS / max(slowest, 1e-9)))
        calls = min(calls, 10_000)

    ours_s, theirs_s = [], []
    for index in range(rounds):
        if index % 2 == 0:
            ours_s.append(block(ours, calls))
            theirs_s.append(block(theirs, calls))
        else:
            theirs_s.append(block(theirs, calls))
            ours_s.append(block(ours, calls))
        if on_round:
            on_round(index, ours_s[-1], theirs_s[-1])
    centre, low, high, method = ratio_interval([b / a for a, b in zip(ours_s, theirs_s, strict=True)])
    return Comparison(centre, low, high, method, tuple(ours_s), tuple(theirs_s))


def compiled(call, dynamic=False):
    """torch.compile, for one shape unless dynamic, whose backward can be walked more than once."""
    import torch._functorch.config

    # With donated buffers the compiled backward reuses the saved tensors, and refuses retain_graph.
    torch._functorch.config.donated_buffer = False
    return torch.compile(call, dynamic=dynamic)


def measure(case, *, peer="torch", **options):
    """One row: `case` against one peer. See measure_all."""
    return measure_all(case, peers=(peer,), **options)[0]


def measure_all(
    case,
    *,
    peers=("torch",),
    dtype=torch.float32,
    device="cpu",
    direction="forward",
    rounds=11,
    fresh=False,
    timer=time.perf_counter,
):
    """Rows of `case` against each peer, in one direction, after its parity was asserted on the very same inputs.

    Args:
        case: a `transfuse.promises.cases.Case`.
        peers: of 'torch', 'compile' (torch.compile of the former) and 'reference'.
        direction: 'forward' or 'backward'.
        fresh: see `compare`; a case that is fresh by itself stays so.
    Returns: a list of flat dicts, ready for JSON.
    Raises: ParityError, naming case, dtype, direction and the two figures, when ours misses the error budget.
    """
    for peer in peers:
        if peer not in PEERS:
            raise ValueError(f"measure: peer is {peer!r}, expected one of {', '.join(PEERS)}")
        if case.torch is None and peer != "reference":
            raise ValueError(f"measure: torch has no counterpart of {case.op} {case.name}, expected peer 'reference'")
    inputs, fresh = case.inputs(dtype, device), fresh or case.fresh
    error = case.parity(inputs, direction)
    timing = {"rounds": rounds, "fresh": fresh, "timer": timer, "synchronize": synchronizer(device)}
    rows = []
    for peer in peers:
        result = _against(case, peer, inputs, direction, timing)
        # The backward of a product is two products; of a row kernel, one more read and one more write than the forward.
        flops, moved = case.flops * (2.5 if direction == "backward" else 1), case.bytes(dtype, direction)
        rows.append(
            {
                "op": case.op,
                "case": case.name,
                "shape": case.shape,
                "dtype": str(dtype).removeprefix("torch."),
                "device": device,
                "direction": direction,
                "peer": peer,
                "backend": backend_of(case, inputs),
                "output": "fresh" if fresh else "reused",
                "unfused": case.unfused,
                "sweep": case.sweep,
                "ours_us": result.ours_median_s * 1e6,
                "peer_us": result.theirs_median_s * 1e6,
                "speedup": result.ratio,
                "speedup_low": result.low,
                "speedup_high": result.high,
                "interval": result.method,
                "rounds": rounds,
                "max_error": error.largest,
                "error_budget": error.budget,
                "bytes": moved,
                "flops": flops,
                "gbps": moved / result.ours_median_s / 1e9,
                "gflops": flops / result.ours_median_s / 1e9,
                **environment(),
            }
        )
    return rows


def _against(case, peer, inputs, direction, timing):
    """Comparison of ours and one peer on inputs whose parity is known."""
    theirs = {"torch": case.torch, "compile": None, "reference": case.reference}[peer]
    if peer == "compile":
        # The cases of one op share a code object: without this the ninth of them would run uncompiled, silently.
        torch._dynamo.reset()
        theirs = compiled(case.torch)
    if direction == "forward":
        with torch.no_grad():
            return compare(lambda: case.ours(*inputs), lambda: theirs(*inputs), **timing)
    grad_output = case.grad_output(inputs)
    return compare(
        gradients_of(case.ours, inputs, grad_output), gradients_of(theirs, inputs, grad_output), **timing
    )


def backend_of(case, inputs):
    """The name of the implementation that the dispatcher takes for these inputs."""
    return case.explain(*inputs).chosen


def synchronizer(device):
    return torch.cuda.synchronize if str(device).startswith("cuda") else None


def write_json(path, rows, **header):
    """Writes {'schema': 1, **header, 'rows': rows} so that a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    lines = [json.dumps({"schema": 1, **header}, indent=1).removesuffix("\n}"), ',\n "rows": [']
    lines.append(",".join(f"\n  {json.dumps(row)}" for row in rows))  # a row is a line
    draft.write_text("".join(lines) + ("\n ]\n}\n" if rows else "]\n}\n"))
    draft.replace(path)
