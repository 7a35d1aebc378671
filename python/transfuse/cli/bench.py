"""`transfuse bench`: every op, or a model of one's own, against torch on this machine, interleaved, parity first."""

import random
from pathlib import Path

import torch

from transfuse.bench import history, model_rows, text, user_model
from transfuse.bench.harness import PEERS, measure, write_json
from transfuse.bench.machine import environment
from transfuse.cli import need
from transfuse.cli.output import Progress, table
from transfuse.cli.verify import DTYPE_NAMES, check_device
from transfuse.promises.cases import BENCH_CASES, DIRECTIONS, DTYPES, ParityError, check_op, selected

MODEL_PEERS = {"torch": "stock", "compile": "compile"}
MODEL_DTYPES = ("float32", "bfloat16")
OP_ROUNDS, MODEL_ROUNDS = 11, 6
MODEL_PASSAGES = 96  # of the documentation's, where no --text is given
OP_HEADERS = (
    "op", "case", "shape", "dtype", "direction", "backend", "against", "us", "peer us", "speedup", "95 % interval",
    "GB/s", "error",
)  # fmt: skip


def add_arguments(parser):
    parser.add_argument("--op", help="only this op")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda; models: cpu")
    parser.add_argument("--vs", default="torch", metavar="PEERS", help="comma-separated: " + ", ".join(PEERS))
    parser.add_argument("--dtype", choices=DTYPE_NAMES, help="ops: only this dtype; models: bfloat16 times it too")
    parser.add_argument("--direction", choices=DIRECTIONS, help="only this direction")
    parser.add_argument(
        "--rounds", type=int, help=f"interleaved rounds per figure (default {OP_ROUNDS}; models {MODEL_ROUNDS})"
    )
    parser.add_argument("--fresh", action="store_true", help="every call writes to memory not touched before")
    parser.add_argument("--quick", action="store_true", help="one case per op")
    parser.add_argument("--json", metavar="F", help="write the rows there (of a model: see transfuse.bench.model_rows)")
    parser.add_argument("--compare", metavar="OLD.json", help="say what became faster or slower since that file")
    parser.add_argument("--model", metavar="MODEL", help="time this model: a folder, or a name in Hugging Face's cache")
    parser.add_argument(
        "--text", metavar="FILE", help="with --model: a text per line (default: passages of Python's documentation)"
    )
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="with --model: texts a batch (default 32)")
    parser.add_argument("--plot", metavar="F.png", help="with --model: draw the figures")


def run(arguments):
    peers = [peer.strip() for peer in arguments.vs.split(",")]
    for peer in peers:
        if peer not in PEERS:
            raise ValueError(f"bench: --vs is {peer!r}, expected one of {', '.join(PEERS)}")
    if arguments.rounds is None:
        arguments.rounds = MODEL_ROUNDS if arguments.model else OP_ROUNDS
    if arguments.rounds < 2:  # one ratio has no interval
        raise ValueError(f"bench: --rounds is {arguments.rounds}, expected at least 2")
    old = history.load(arguments.compare) if arguments.compare else None
    rows, code = (_run_model if arguments.model else _run_ops)(arguments, peers)
    if old is not None:
        print("\n" + table(["row", "was", "is", "speed-up"], list(history.changes(old, rows))))
    return code


def _run_ops(arguments, peers):
    """(rows, exit code) of the ops."""
    for option in ("text", "plot"):
        if getattr(arguments, option):
            raise ValueError(f"bench: --{option} is given without --model")
    check_op("bench", arguments.op)
    check_device("bench", arguments.device)
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
            OP_HEADERS,
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
    return rows, 1 if failures else 0


# A model


def _check_model_options(arguments, peers):
    for peer in peers:
        if peer not in MODEL_PEERS:
            raise ValueError(f"bench: --vs is {peer!r}, expected one of {', '.join(MODEL_PEERS)} with --model")
    if arguments.dtype not in (None, *MODEL_DTYPES):
        known = ", ".join(MODEL_DTYPES)
        raise ValueError(f"bench: --dtype is {arguments.dtype!r}, expected one of {known} with --model")
    if arguments.device != "cpu":
        raise ValueError(f"bench: --device is {arguments.device!r}, expected cpu with --model")
    if arguments.batch_size < 1:
        raise ValueError(f"bench: --batch-size is {arguments.batch_size}, expected at least 1")
    for option in ("json", "plot"):  # looked at now: it is written after minutes of work
        path = getattr(arguments, option)
        if path and not Path(path).resolve().parent.is_dir():
            raise ValueError(f"bench: --{option} is {path!r}, expected a file in a folder that exists")
    if arguments.plot:
        need("matplotlib", "bench")


def texts_of(path):
    """The lines of a file that hold anything; without a file, passages of Python's documentation.

    Raises: ValueError where the file cannot be read or holds no text.
    """
    if path is None:
        everything = text.passages()
        random.Random(0).shuffle(everything)
        return everything[:MODEL_PASSAGES]
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ValueError(f"bench: --text is {path!r}, which cannot be read: {reason}") from None
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise ValueError(f"bench: --text is {path!r}, which holds no text: expected one per line")
    return found


def _load(name):
    """(model, tokenizer). Raises ValueError in words for whatever is no such model."""
    from transfuse.cli.report import load_model

    try:
        model = load_model(name)
        tokenizer = getattr(model, "tokenizer", None)
        if tokenizer is None:
            library = need("transformers", "bench")
            tokenizer = library.AutoTokenizer.from_pretrained(
                model.name_or_path, local_files_only=True, trust_remote_code=False
            )
    except ValueError as error:
        words = " ".join(str(error).removeprefix("report: model is").split())[:300]
        known = str(error).startswith("report: ")
        words = words if known else f"{name!r}, which cannot be loaded: {words}"
        raise ValueError(f"bench: --model is {words}") from None
    except OSError as error:
        raise ValueError(f"bench: --model is {name!r}, which has no tokenizer: {str(error).splitlines()[0]}") from None
    if tokenizer.pad_token is None:
        raise ValueError(f"bench: --model is {name!r}, whose tokenizer has no padding token, so it takes no batches")
    return model, tokenizer


def _run_model(arguments, peers):
    """(rows, exit code) of one model."""
    _check_model_options(arguments, peers)
    texts = texts_of(arguments.text)
    from transformers.utils import logging

    logging.disable_progress_bar()
    model, tokenizer = _load(arguments.model)
    names = ["ours"] + ["ours_bf16"] * (arguments.dtype == "bfloat16") + [MODEL_PEERS[p] for p in peers if p != "torch"]
    with Progress(4 + len(names) + arguments.rounds, arguments.quiet) as progress:
        rows, facts = user_model.measure(
            model,
            tokenizer,
            texts,
            names=names,
            batch_size=arguments.batch_size,
            rounds=arguments.rounds,
            on_step=progress.step,
        )
    where, first = environment(), rows[0]
    print(f"{arguments.model} on {first['passages']} texts, {arguments.rounds} rounds in turns")
    print(f"{where['machine']}, {where['threads']} threads, torch {where['torch']}; batches of {first['batch_size']}")
    print(f"{first['tokens']} tokens, {first['padded_tokens']} when padded: fill {first['fill']:.2f}; ", end="")
    print(f"tokenising took {facts['tokenisation_s']:.2f} s and is not timed\n")
    print(table(model_rows.HEADERS, list(model_rows.table_rows(rows))))
    lost = [row for row in rows if row["status"] != "ok"]
    for row in lost:
        print(f"{row['label']} is {row['status']}: {row['reason']}")
    failures = user_model.wrong(rows)
    for failure in failures:
        print(f"FAILED: {failure}")
    document = {"command": "bench --model", "model": arguments.model, "environment": where, "failed": failures}
    document.update(text_sha256=text.fingerprint(texts), text_passages=len(texts), **facts)
    if arguments.json:
        write_json(arguments.json, rows, **document)
    if arguments.plot:
        from transfuse.cli.models_picture import draw

        draw(arguments.plot, {**document, "rows": rows})
    return rows, 1 if failures or any(row["contender"] == "ours" for row in lost) else 0
