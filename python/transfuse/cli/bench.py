"""`transfuse bench`: every op against torch on this machine, interleaved, parity first."""

import torch

from transfuse.bench.harness import PEERS, measure, write_json
from transfuse.bench.machine import environment
from transfuse.cli.output import Progress, table
from transfuse.cli.verify import DTYPE_NAMES, check_device
from transfuse.promises.cases import BENCH_CASES, DIRECTIONS, DTYPES, ParityError, check_op, selected


def add_arguments(parser):
    parser.add_argument("--op", help="only this op")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--vs", default="torch", metavar="PEERS", help="comma-separated: " + ", ".join(PEERS))
    parser.add_argument("--dtype", choices=DTYPE_NAMES, help="only this dtype")
    parser.add_argument("--direction", choices=DIRECTIONS, help="only this direction")
    parser.add_argument("--rounds", type=int, default=11, help="interleaved rounds per figure (default 11)")
    parser.add_argument("--fresh", action="store_true", help="every call writes to memory not touched before")
    parser.add_argument("--quick", action="store_true", help="one case per op")
    parser.add_argument("--json", metavar="F", help="write the rows there")
    parser.add_argument("--model", metavar="NAME", help="time a whole model (not implemented yet)")


def run(arguments):
    if arguments.model:
        raise NotImplementedError("bench: --model is not implemented yet; transfuse demo times a whole model")
    check_op("bench", arguments.op)
    check_device("bench", arguments.device)
    peers = [peer.strip() for peer in arguments.vs.split(",")]
    for peer in peers:
        if peer not in PEERS:
            raise ValueError(f"bench: --vs is {peer!r}, expected one of {', '.join(PEERS)}")
    if arguments.rounds < 2:  # one ratio has no interval
        raise ValueError(f"bench: --rounds is {arguments.rounds}, expected at least 2")
    dtypes = [getattr(torch, arguments.dtype)] if arguments.dtype else DTYPES
    directions = [arguments.direction] if arguments.direction else DIRECTIONS
    cases = [case for case in selected(BENCH_CASES, arguments.op) if case.quick or not arguments.quick]
    work = [
        (case, dtype, direction, peer)
        for case in cases
        for dtype in dtypes
        for direction in directions
        if direction in case.directions
        for peer in peers
        if case.torch is not None or peer == "reference"
    ]

    rows, failures = [], []
    with Progress(len(work), arguments.quiet) as progress:
        for case, dtype, direction, peer in work:
            progress.step(f"{case.op} {case.name} {direction} against {peer}")
            try:
                rows.append(
                    measure(
                        case,
                        dtype=dtype,
                        device=arguments.device,
                        direction=direction,
                        peer=peer,
                        rounds=arguments.rounds,
                        fresh=arguments.fresh,
                    )
                )
            except ParityError as error:
                failures.append(str(error))
    print(
        table(
            [
                "op",
                "case",
                "shape",
                "dtype",
                "direction",
                "backend",
                "against",
                "us",
                "peer us",
                "speedup",
                "95 % interval",
                "GB/s",
                "error",
            ],
            [
                (
                    row["op"],
                    row["case"],
                    row["shape"],
                    row["dtype"],
                    row["direction"],
                    row["backend"],
                    row["peer"],
                    f"{row['ours_us']:.1f}",
                    f"{row['peer_us']:.1f}",
                    f"{row['speedup']:.2f}",
                    f"{row['speedup_low']:.2f} to {row['speedup_high']:.2f}",
                    f"{row['gbps']:.1f}",
                    f"{row['max_error']:.1e}",
                )
                for row in rows
            ],
        )
    )
    for failure in failures:
        print(f"\nFAILED, so not timed: {failure}")
    if arguments.json:
        write_json(arguments.json, rows, command="bench", environment=environment(), failed=failures)
    return 1 if failures else 0
