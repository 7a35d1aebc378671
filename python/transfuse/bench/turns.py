"""Many contenders on the same work, taking turns: the arithmetic of an interleaved run, whoever does the work.

The work is cut into blocks. Inside a block every contender has its turn before the next block begins, and who begins
changes from block to block, so that a machine that drifts, heats up or is disturbed does so for all of them. A round
is the whole work once: its time is the sum of its blocks. Ratios are taken round by round, and their interval is that
of harness.ratio_interval.
"""

import statistics
import time
from dataclasses import dataclass, field

from transfuse.bench.harness import ratio_interval

FEWEST_ROUNDS = 2  # one ratio has no interval


class ContenderLost(Exception):
    """A contender cannot go on; the others do. Its text is the reason that stands in its row."""


@dataclass
class Rounds:
    """What take_turns measured.

    Args:
        blocks_s: for each contender that came through, one list of block times per round.
        lost: for each that did not, the reason.
    """

    blocks_s: dict[str, list[list[float]]]
    lost: dict[str, str] = field(default_factory=dict)

    def rounds_s(self, name):
        """Seconds for the whole work, round by round."""
        return tuple(sum(blocks) for blocks in self.blocks_s[name])

    def median_s(self, name):
        return statistics.median(self.rounds_s(name))

    def ratio(self, name, peer):
        """How much faster `name` is than `peer` (> 1: it takes less time), with its 95 % interval, as a dict."""
        pairs = zip(self.rounds_s(name), self.rounds_s(peer), strict=True)
        centre, low, high, method = ratio_interval([theirs / ours for ours, theirs in pairs])
        return {"ratio": centre, "low": low, "high": high, "interval": method}


def turn_order(names, turn):
    """The names with another one first each turn; every second time around backwards, so that neighbours change too."""
    names = list(names)
    if not names:
        return names
    start = turn % len(names)
    rotated = names[start:] + names[:start]
    return rotated[::-1] if turn // len(names) % 2 else rotated


def take_turns(contenders, blocks, rounds, *, seconds=None, timer=time.monotonic, on_round=None):
    """Lets every contender do `blocks` blocks, `rounds` times.

    Args:
        contenders: name -> callable(block index) that does that block and returns the seconds it took. Raising
            ContenderLost takes the contender out.
        blocks, rounds: how many.
        seconds: no further round is begun that would end later than this; at least FEWEST_ROUNDS are done.
        timer: the clock for `seconds`.
        on_round: called with (rounds done so far, Rounds so far) after each round.
    Returns: Rounds.
    """
    if blocks < 1 or rounds < 1:
        raise ValueError(f"take_turns: blocks is {blocks} and rounds is {rounds}, expected at least 1 of each")
    found = Rounds({name: [] for name in contenders})
    started = timer()
    for index in range(rounds):
        round_started = timer()
        for name in found.blocks_s:
            found.blocks_s[name].append([])
        for block in range(blocks):
            for name in turn_order(found.blocks_s, index * blocks + block):
                try:
                    found.blocks_s[name][-1].append(contenders[name](block))
                except ContenderLost as reason:
                    found.lost[name] = str(reason)
                    del found.blocks_s[name]
        if on_round:
            on_round(index + 1, found)
        now = timer()
        late = seconds is not None and now - started + (now - round_started) > seconds
        if not found.blocks_s or (late and index + 1 >= FEWEST_ROUNDS):
            break
    return found
