"""`python bench/bench_<op>.py --tune`: rows for the launch tables of kernels/triton, measured on this machine's GPU.

For every row that the op's launches read (tune_decisions.py), each candidate runs first: one whose results differ from
the present row's is refused. Bits must be the same where no result is a sum, or where nothing but num_stages differs;
elsewhere the order of a sum follows the row, and results agree within testing.error_budget. Then the row and its
candidates take turns (transfuse.bench.turns), each time the kernels alone that the row launches, behind a flush of L2.
A candidate wins where it is faster with the whole of its 95 % interval. What is printed can be pasted: rows, the rest
comments. Nothing is written, and the tables are what they were.

With --architecture nothing is measured: every candidate is compiled for a GPU that need not be here, and its registers,
spills and shared memory are printed, and no row.
"""

import argparse
import datetime
import sys
import textwrap
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import torch
from tune_decisions import Sizes, Source, decisions

from transfuse.bench.gpu_rows import FLUSH_BYTES
from transfuse.bench.turns import take_turns
from transfuse.kernels.triton import launch, versions
from transfuse.promises.cases import relative_error
from transfuse.testing import error_budget

ROUNDS = 25
WARM_CALLS = 3
SLACK = 4.0  # each side is as far from the exact result as its budget, and gradients go through two sums
NOT_HERE = "not measured: no GPU here"
PRESENT = "present"
_WIDTH = 100


class Refused(Exception):
    """A candidate that may not be used; the words say why."""


# ---- rows as source ----


def launch_of(row):
    return next(value for value in vars(row).values() if isinstance(value, launch.Launch))


def difference(present, candidate):
    """What a candidate changes, "num_warps=8 rows=4"."""
    def numbers(row):
        own = {key: value for key, value in vars(row).items() if not isinstance(value, launch.Launch)}
        return {**own, **{key: getattr(launch_of(row), key) for key in ("num_warps", "num_stages")}}

    before = numbers(present)
    return " ".join(f"{key}={value}" for key, value in numbers(candidate).items() if value != before[key])


def source_of(row, indent=""):
    """The row as Python that makes it, with a comma behind it; words over several lines where they are long."""
    lines = [f"{indent}{type(row).__name__}("]
    for field in fields(row):
        value = getattr(row, field.name)
        if is_dataclass(value):
            lines += source_of(value, indent + "    ").splitlines()
        elif isinstance(value, str) and len(value) > 16:
            pieces = textwrap.wrap(value, _WIDTH, drop_whitespace=False)
            lines += [f"{indent}    {piece!r}" for piece in pieces]
            lines[-1] += ","
        else:
            lines.append(f"{indent}    {value!r},")
    short = f"{indent}{lines[0].strip()}{' '.join(line.strip() for line in lines[1:]).removesuffix(',')}),"
    fits = len(short) <= _WIDTH + 16 and len(lines) == len(fields(row)) + 1
    return short if fits else "\n".join([*lines, indent + "),"])


# ---- parity ----


def results_of(decision, call, candidate):
    """What a prepared work gives with a row in the place of the present one, its tensors in order."""
    with launch.trying(decision.present, candidate):
        found = call()
    return [tensor for tensor in found if tensor is not None and tensor.numel() > 0]


def must_have_its_bits(decision, work, candidate):
    """Whether the launch may not show in a result: no sum's order follows from it."""
    changed = {word.partition("=")[0] for word in difference(decision.present, candidate).split()}
    return work.terms == 0 or changed <= {"num_stages"}


def compare(decision, work, candidate, present, found):
    """Raises Refused where results `found` with a candidate are not those of the present row."""
    exactly = must_have_its_bits(decision, work, candidate)
    for index, (before, after) in enumerate(zip(present, found, strict=True)):
        what = f"result {index} of {work.name} {_dtype(work.dtype)}"
        if exactly:
            bits = [tensor.contiguous().view(torch.uint8) for tensor in (before, after)]
            if not torch.equal(*bits):
                differ = int((before != after).sum())
                where = f"{differ} of {before.numel()} elements of {what}"
                raise Refused(f"its bits differ: {where}, which no launch may change")
        else:
            error, budget = relative_error(after, before.double()), SLACK * error_budget(after.dtype, work.terms)
            if not error <= budget:
                raise Refused(f"{what} differs by {error:.1e} of its largest, allowed {budget:.1e}")


# ---- time ----


class QueueClock:
    """Seconds of the GPU's own clock that a call takes, L2 emptied before it; launches hide behind the emptying."""

    def __init__(self):
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
        self.before, self.after = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, call):
        self.flush.zero_()
        self.before.record()
        call()
        self.after.record()
        self.after.synchronize()
        return self.before.elapsed_time(self.after) / 1e3


def launches_of(decision, call, candidate, architecture):
    """(all recorded launches of a prepared work, those that take the row): with the candidate in its place."""
    with launch.trying(decision.present, candidate), launch.recording(architecture) as recorded:
        call()
    return recorded.calls, [one for one in recorded.calls if one.row is launch_of(candidate)]


def _contender(decision, calls, candidate, device, architecture, clock):
    """A callable for take_turns: the kernels that the row launches, of one work after the other."""
    device, kernels = torch.device(device), []
    for call in calls:
        every, own = launches_of(decision, call, candidate, architecture)
        for one in every * WARM_CALLS:  # what the timed ones read is what others of the op wrote
            launch.run(one, device)
        kernels.append(own)

    def run(block):
        for one in kernels[block]:
            launch.run(one, device)

    return lambda block: clock(lambda: run(block))


def measure(decision, device, architecture, clock, rounds=ROUNDS):
    """(turns.Rounds of the present row and its candidates by name, rows by name, refusals by name)."""
    calls = [work.prepare(Source(device)) for work in decision.works]
    present = [results_of(decision, call, decision.present) for call in calls]
    contenders = {PRESENT: _contender(decision, calls, decision.present, device, architecture, clock)}
    rows, refused = {PRESENT: decision.present}, {}
    for candidate in decision.candidates:
        name = difference(decision.present, candidate)
        try:
            for work, call, before in zip(decision.works, calls, present, strict=True):
                compare(decision, work, candidate, before, results_of(decision, call, candidate))
            contenders[name] = _contender(decision, calls, candidate, device, architecture, clock)
            rows[name] = candidate
        except Refused as reason:
            refused[name] = str(reason)
        except Exception as error:  # the compiler's own, of every kind: registers, shared memory, its passes
            refused[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return take_turns(contenders, len(decision.works), rounds), rows, refused


def choose(found):
    """(winner, neighbour): a candidate wins that is faster with all of its interval; the neighbour is the next best."""
    candidates = [name for name in found.blocks_s if name != PRESENT]
    faster = [name for name in candidates if found.ratio(name, PRESENT)["low"] > 1]
    winner = min(faster, key=found.median_s, default=PRESENT)
    others = [name for name in found.blocks_s if name != winner]
    return winner, min(others, key=found.median_s, default=None)


def figure(decision, seconds):
    """What the works cost over the seconds that all of them took."""
    scale = 1e12 if decision.unit == "TFLOP/s" else 1e9
    value = sum(work.cost for work in decision.works) / seconds / scale
    return f"{value:.{0 if value >= 10 else 2}f} {decision.unit}"


def _dtype(dtype):
    return str(dtype).removeprefix("torch.")


def measured_row(decision, found, rows, name_of_device, date, spills):
    """(the winning row with where its figure is from, its name). `spills`: (row) -> bytes, for one that is new."""
    winner, neighbour = choose(found)
    dtypes = " and ".join(dict.fromkeys(_dtype(work.dtype) for work in decision.works))
    words = f"{name_of_device}, {dtypes}, {date}: {figure(decision, found.median_s(winner))}"
    if neighbour is not None:
        other = difference(rows[winner], rows[neighbour])
        words += f"; {other}: {figure(decision, found.median_s(neighbour))}"
    row = rows[winner]
    spill_bytes = launch_of(row).spill_bytes if winner == PRESENT else spills(row)
    return _with_launch(row, replace(launch_of(row), spill_bytes=spill_bytes, measured=words)), winner


def _with_launch(row, own):
    name = next(key for key, value in vars(row).items() if isinstance(value, launch.Launch))
    return replace(row, **{name: own})


# ---- without a GPU ----


def resources(decision, candidate, architecture, target=None):
    """(registers, spilled bytes, bytes of shared memory), the most that any kernel of the works takes."""
    from triton_compile import compiled

    found = []
    for work in decision.works:
        _, own = launches_of(decision, work.prepare(Source("meta")), candidate, architecture)
        found += [compiled(call, target or architecture) for call in own]
    return tuple(max(getattr(one, key) or 0 for one in found) for key in ("registers", "spills", "shared_bytes"))


def print_offline(decision, architecture, say):
    for candidate in (decision.present, *decision.candidates):
        name = difference(decision.present, candidate) or PRESENT
        try:
            registers, spills, shared = resources(decision, candidate, architecture)
        except Exception as error:  # as in measure
            say(f"#   {name:<28} refused: {type(error).__name__}: {' '.join(str(error).split())[:160]}")
            continue
        words = f"{registers:4d} registers {spills:6d} bytes spilled {shared:8d} bytes of shared memory"
        if shared > architecture.shared_bytes:
            words += f": refused, {architecture.shared_bytes} there are"
        say(f"#   {name:<28} {words}")


# ---- on a GPU ----


def print_measured(decision, device, architecture, clock, name_of_device, date, say, spills=None):
    """One line for each candidate, and the row to paste."""
    found, rows, refused = measure(decision, device, architecture, clock)
    for name in found.blocks_s:
        seconds = found.median_s(name)
        against = found.ratio(name, PRESENT)
        words = f"{seconds * 1e6:9.1f} us {figure(decision, seconds)}"
        if name != PRESENT:
            words += f", {against['ratio']:.3f}x ({against['low']:.3f} to {against['high']:.3f})"
        say(f"#   {name:<28} {words}")
    for name, reason in refused.items():
        say(f"#   {name:<28} refused: {reason}")
    spills = spills or (lambda row: resources(decision, row, architecture, launch.SM90)[1])
    row, winner = measured_row(decision, found, rows, name_of_device, date, spills)
    say(f"#   taken: {winner}")
    say(source_of(row))


def main(ops, argv=None):
    """The front of bench_<op>.py."""
    names = {_name_of(architecture): architecture for architecture in launch.ARCHITECTURES}
    parser = argparse.ArgumentParser(
        prog=f"python {Path(sys.argv[0]).name}",
        description="Rows for the launch tables of kernels/triton, by measurement. (pytest times the op: make bench.)",
    )
    parser.add_argument("--tune", action="store_true", required=True, help="try the candidates of every launch row")
    parser.add_argument(
        "--architecture", choices=names, help="measure nothing: compile the candidates for it, no GPU needed"
    )
    parser.add_argument("--only", default="", metavar="WORDS", help="rows whose name holds these words")
    parser.add_argument("--list", action="store_true", help="print names and candidates of the rows, and do no more")
    options = parser.parse_args(argv)
    if versions.INTERPRETED.value:
        parser.error("TRITON_INTERPRET=1 is set: what is compiled or timed must not be interpreted")
    offline = options.architecture is not None
    if not (offline or options.list or torch.cuda.is_available()):
        print(f"{parser.prog}: {NOT_HERE}; --architecture sm_90 compiles the candidates", file=sys.stderr)
        return 2
    device = torch.device("cpu" if offline or not torch.cuda.is_available() else "cuda")
    architecture = names[options.architecture] if offline else launch.SM90
    if device.type == "cuda":
        architecture = launch.architecture_of(device)
    wanted = [one for one in decisions(ops, architecture, Sizes()) if options.only in one.name]
    if not wanted:
        parser.error(f"no row's name holds {options.only!r}; --list prints them")
    clock = QueueClock() if device.type == "cuda" and not options.list else None
    if offline:
        print(f"# {NOT_HERE}; what Triton {'.'.join(map(str, versions.VERSION))} makes of each candidate for "
              f"{options.architecture}")  # fmt: skip
    for decision in wanted:
        print(f"# kernels/triton/{decision.name} ({', '.join(decision.ops)})")
        if options.list:
            for candidate in decision.candidates:
                print(f"#   {difference(decision.present, candidate)}")
        elif offline:
            print_offline(decision, architecture, _say)
        else:
            date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
            print_measured(decision, device, architecture, clock, torch.cuda.get_device_name(), date, _say)
            torch.cuda.empty_cache()
    return 0


def _name_of(architecture):
    return f"sm_{architecture.name}" if architecture.backend == "cuda" else architecture.name


def _say(words):
    print(words, flush=True)
