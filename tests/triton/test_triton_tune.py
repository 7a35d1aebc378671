"""How bench_<op>.py --tune chooses a row: by kernels that run interpreted or are made up, and a clock of the test's."""

from dataclasses import replace

import pytest
import torch
import tune
from tune_decisions import Decision, Sizes, Work, decisions

from transfuse.kernels.triton import attention_problem, launch
from transfuse.kernels.triton.launch import Launch
from transfuse.kernels.triton.rows import RowTile

PRESENT = RowTile(64, 2, Launch(4))
WIDER, NARROWER = RowTile(64, 2, Launch(8)), RowTile(64, 2, Launch(2))
DEEPER = RowTile(64, 2, Launch(4, 2))
NAMES = {"RowTile": RowTile, "Tile": attention_problem.Tile, "Launch": Launch}


class Machine:
    """A kernel that takes as long, and is as wrong, as its launch row says; and the clock that it moves."""

    def __init__(self, seconds, wrong=None, fails=(), noise=None):
        self.seconds, self.wrong, self.fails = seconds, wrong or {}, fails
        self.noise = noise or (lambda turn: 1.0)
        self.now, self.order = 0.0, []

    def __getitem__(self, grid):
        return self.run

    def run(self, x, factor, num_warps, num_stages, enable_fp_fusion):
        key = (num_warps, num_stages)
        if key in self.fails:
            raise RuntimeError("out of resource: shared memory")
        self.now += factor * self.seconds[key] * self.noise(len(self.order))
        self.order.append((key, factor))
        x[0] += self.wrong.get(key, 0.0)

    def clock(self, call):
        before = self.now
        self.order.append("timed")
        call()
        return self.now - before

    def decision(self, *candidates, terms=0, works=1):
        def prepare(factor):
            def with_source(source):
                x = source(64, dtype=torch.float32)

                def call():
                    output = x.clone()
                    row = launch.taken(PRESENT).launch
                    launch.launch(self, (1,), row, torch.device("cpu"), x=output, factor=factor)
                    return (output,)

                return call

            return with_source

        made = [Work(f"work {i}", torch.float32, prepare(i + 1), 10**9, terms) for i in range(works)]
        return Decision("made_up.py: TILES", PRESENT, candidates, tuple(made), ("gelu",))

    def timed(self):
        """What ran under the clock."""
        return [entry for before, entry in zip(self.order, self.order[1:]) if before == "timed"]


def _measure(machine, decision, rounds=9):
    return tune.measure(decision, "cpu", launch.INTERPRETER, machine.clock, rounds)


def _printed(machine, decision):
    said = []
    tune.print_measured(
        decision, "cpu", launch.INTERPRETER, machine.clock, "NVIDIA H200", "2026-11-22", said.append, lambda row: 24
    )
    assert all(line.startswith("#") for line in said[:-1])
    (row,) = eval(f"({said[-1]})", NAMES)
    return row, "\n".join(said[:-1])


def test_the_fastest_wins_and_its_row_says_how_fast():
    machine = Machine({(4, 1): 0.010, (8, 1): 0.005, (2, 1): 0.008})
    row, said = _printed(machine, machine.decision(NARROWER, WIDER))
    measured = "NVIDIA H200, float32, 2026-11-22: 200 GB/s; num_warps=2: 125 GB/s"
    assert row == RowTile(64, 2, Launch(8, 1, 24, measured))
    assert "taken: num_warps=8" in said and "2.000x" in said and "1.250x" in said


def test_the_present_row_stays_where_none_is_faster():
    machine = Machine({(4, 1): 0.010, (8, 1): 0.011, (2, 1): 0.020})
    row, said = _printed(machine, machine.decision(WIDER, NARROWER))
    assert row == RowTile(64, 2, Launch(4, 1, 0, "NVIDIA H200, float32, 2026-11-22: 100 GB/s; num_warps=8: 91 GB/s"))
    assert "taken: present" in said


def test_a_gain_within_the_noise_is_none():
    """A tenth faster in the median; but a third of its rounds are slower."""
    machine = Machine({(4, 1): 0.010, (8, 1): 0.010}, noise=lambda turn: (0.8, 1.3, 1.0, 0.7, 1.2)[turn // 3 % 5])
    found, _, _ = _measure(machine, machine.decision(WIDER))
    assert tune.choose(found)[0] == tune.PRESENT
    found.blocks_s = {tune.PRESENT: [[1.0]] * 9, "num_warps=8": [[0.9]] * 6 + [[1.1]] * 3}
    assert found.ratio("num_warps=8", tune.PRESENT)["ratio"] > 1.1 and tune.choose(found)[0] == tune.PRESENT
    found.blocks_s["num_warps=8"] = [[0.9]] * 9
    assert tune.choose(found) == ("num_warps=8", tune.PRESENT)


def test_a_candidate_with_other_bits_is_refused_untimed():
    machine = Machine({(4, 1): 0.010, (8, 1): 0.001}, wrong={(8, 1): 2.0**-20})
    found, rows, refused = _measure(machine, machine.decision(WIDER))
    assert list(rows) == [tune.PRESENT] and list(found.blocks_s) == [tune.PRESENT]
    assert refused["num_warps=8"].startswith("its bits differ: 1 of 64 elements of result 0 of work 0 float32")
    assert {key for key, _ in machine.timed()} == {(4, 1)}
    _, said = _printed(machine, machine.decision(WIDER))
    assert "num_warps=8                  refused: its bits differ" in said


def test_a_sum_may_be_taken_in_another_order_but_not_be_another():
    machine = Machine({(4, 1): 0.010, (8, 1): 0.001, (2, 1): 0.001}, wrong={(8, 1): 2.0**-22, (2, 1): 0.01})
    found, rows, refused = _measure(machine, machine.decision(WIDER, NARROWER, terms=64))
    assert tune.choose(found)[0] == "num_warps=8" and list(refused) == ["num_warps=2"]
    assert "of its largest, allowed" in refused["num_warps=2"]


def test_stages_change_no_bit_of_a_sum_either():
    machine = Machine({(4, 1): 0.010, (4, 2): 0.001}, wrong={(4, 2): 2.0**-22})
    _, _, refused = _measure(machine, machine.decision(DEEPER, terms=64))
    assert "its bits differ" in refused["num_stages=2"]


def test_a_nan_that_came_or_went_is_refused():
    machine = Machine({(4, 1): 0.010, (8, 1): 0.001}, wrong={(8, 1): float("nan")})
    _, _, refused = _measure(machine, machine.decision(WIDER, terms=64))
    assert "differs by inf" in refused["num_warps=8"]


def test_a_candidate_that_does_not_compile_is_refused_and_the_rest_goes_on():
    machine = Machine({(4, 1): 0.010, (2, 1): 0.001}, fails={(8, 1)})
    found, _, refused = _measure(machine, machine.decision(WIDER, NARROWER))
    assert refused == {"num_warps=8": "RuntimeError: out of resource: shared memory"}
    assert tune.choose(found)[0] == "num_warps=2"


def test_candidates_take_turns():
    """Every block is done by all before the next one is, and each begins in its turn."""
    machine = Machine({(4, 1): 0.010, (8, 1): 0.005, (2, 1): 0.020})
    _measure(machine, machine.decision(WIDER, NARROWER, works=2), rounds=6)
    timed = machine.timed()
    assert len(timed) == 3 * 2 * 6
    turns = [timed[i : i + 3] for i in range(0, len(timed), 3)]
    for index, turn in enumerate(turns):
        assert {key for key, _ in turn} == {(4, 1), (8, 1), (2, 1)}
        assert {factor for _, factor in turn} == {1 + index % 2}
    assert {turn[0][0] for turn in turns} == {(4, 1), (8, 1), (2, 1)}


def test_what_is_tried_is_forgotten():
    with pytest.raises(ZeroDivisionError), launch.trying(PRESENT, WIDER):
        assert launch.taken(PRESENT) is WIDER and launch.taken(RowTile(64, 2, Launch(4))) is not WIDER
        raise ZeroDivisionError
    assert launch.taken(PRESENT) is PRESENT and launch._trial is None


@pytest.mark.parametrize(
    "op,place",
    [
        ("gelu", "FORWARD_TILE"), ("rotary", "BACKWARD_TILE"), ("rms_norm", "norm.py: FORWARD_TILES, 64 columns"),
        ("attention", "TILES, forward"),
    ],
)  # fmt: skip
def test_candidates_of_the_ops_agree_with_their_row(op, place, monkeypatch):
    """Run as a GPU would run them, tile by tile; the clock alone is made up."""
    monkeypatch.setattr(launch, "INTERPRETER", launch.SM90)
    monkeypatch.setattr(tune, "WARM_CALLS", 1)
    sizes = Sizes(elements=1 << 12, heads=1, length=32)
    decision = next(one for one in decisions((op,), launch.SM90, sizes) if place in one.name)
    decision = replace(decision, candidates=decision.candidates[::2], works=decision.works[:1])
    ticks = []

    def clock(call):
        ticks.append(call)
        if len(ticks) == 1:
            call()
        return 1.0

    found, rows, refused = tune.measure(decision, "cpu", launch.SM90, clock, rounds=2)
    assert not refused and len(rows) == len(found.blocks_s) == 1 + len(decision.candidates)
    assert len(ticks) == 2 * len(rows) * len(decision.works)
