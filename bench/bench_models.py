"""Whole models on the CPU: stock, ours, and what a user would pick instead, on the same text in one interleaved run.

    python bench/bench_models.py [--quick] [--only WORKLOAD,...] [--peers-python PYTHON] [--json F] [--picture PNG]

Each contender lives in a process of its own (peers/), so that thread pools, memory and crashes do not mix. Per model:
all contenders load; per workload: everyone does all of it once, untimed, and is compared with stock; then they take
turns (transfuse.bench.turns). Timed is what lies between a tokenised batch and its pooled, normalised embeddings
(logits for the cross-encoder). Rows go to a JSON file after every workload; a contender that cannot be had or dies is a
row with the reason.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
import workloads
from peers.contenders import CONTENDERS
from peers.prepare import STEPS
from peers.process import Worker

from transfuse.bench import batches, model_rows, product_peak, text
from transfuse.bench.harness import write_json
from transfuse.bench.machine import environment, installed
from transfuse.bench.turns import ContenderLost, take_turns
from transfuse.cli.output import table

RESULTS = Path(__file__).resolve().parent / "results" / "cpu" / "models.json"
SETTLE_SECONDS = 0.02  # before each turn: the last contender's threads have gone to sleep
LOAD_SECONDS = 300
STREAM_TOKENS = tuple(1 << power for power in range(10, 19))  # 1k ... 256k
QUICK_STREAM_TOKENS = STREAM_TOKENS[:4]
QUICK_SHARE = 0.25  # of the seconds that a workload's rounds may take


class Run:
    """One run: options, the folder for files, the rows so far."""

    def __init__(self, options, folder):
        self.options, self.folder = options, Path(folder)
        self.threads = options.threads or torch.get_num_threads()
        torch.set_num_threads(self.threads)
        self.passages = workloads.fixed_text()[: options.passages]
        self.numbers = itertools.count()
        self.rows, self.facts, self.results = [], {}, {}
        self.started = time.monotonic()

    def say(self, words):
        print(f"[{time.monotonic() - self.started:4.0f} s] {words}", file=sys.stderr, flush=True)

    def worker(self, contender):
        """A new process for a contender; the interpreter of the peers for those that need it."""
        known = CONTENDERS.get(contender)
        python = sys.executable if known and not known.peer else self.options.peers_python
        threads = known.threads if known and known.threads else self.threads
        return Worker(python, threads, self.folder / f"log_{next(self.numbers)}_{contender}.txt")

    def write(self):
        write_json(
            self.options.json,
            self.rows,
            command="bench models",
            environment={**environment(), "threads": self.threads, "quick": self.options.quick},
            peers={name: installed_by(self.options.peers_python, name) for name in PEER_PACKAGES},
            text_sha256=text.fingerprint(self.passages),
            text_passages=len(self.passages),
            **self.facts,
        )


PEER_PACKAGES = ("onnxruntime", "openvino", "ctranslate2", "onnx")


def installed_by(python, name):
    """Version of a package in the peers' environment, read from its folders; None where it is not there."""
    from importlib import metadata

    for folder in Path(python).parent.parent.glob("lib/python*/site-packages"):
        for found in metadata.distributions(name=name, path=[str(folder)]):
            return found.version
    return installed(name)


# Loading


def prepare(run, model):
    """Adds to `model` what the runtimes load, or the reason why a step failed under 'failed'."""
    model["failed"] = {}
    out = run.folder / f"prepared_{next(run.numbers)}"
    out.mkdir()
    worker = run.worker("prepare")
    try:
        for step in STEPS:
            try:
                model.update(worker.ask(LOAD_SECONDS, do="prepare", step=step, model=model, out=str(out)))
            except ContenderLost as reason:
                model["failed"][step] = str(reason)
                if worker.process.poll() is not None:
                    worker = run.worker("prepare")
    finally:
        worker.stop()


def load_all(run, names, model, stack):
    """(name -> loaded worker, name -> reason): all processes load at the same time, since nothing is timed yet."""
    workers, missing, load_s = {}, {}, {}
    for name in names:
        needs = CONTENDERS[name].needs
        if needs in model["failed"]:
            missing[name] = model["failed"][needs]
            continue
        workers[name] = run.worker(name)
        stack.callback(workers[name].stop)
        threads = CONTENDERS[name].threads or run.threads
        try:
            workers[name].send(do="load", name=name, model=model, threads=threads)
        except ContenderLost as reason:
            missing[name] = str(reason)
    for name, worker in workers.items():
        if name not in missing:
            try:
                load_s[name] = worker.answer(LOAD_SECONDS)["seconds"]
            except ContenderLost as reason:
                missing[name] = str(reason)
    return {name: worker for name, worker in workers.items() if name not in missing}, missing, load_s


# One workload


def run_workload(run, workload, model, workers, missing, load_s, tokenizer):
    """Parity, then turns; appends one row per contender."""
    run.say(workload.title)
    texts = workloads.texts_of(workload, run.passages, run.options.quick)
    start = time.perf_counter()
    rows = workloads.tokenised(workload, tokenizer, texts)
    tokenised_s = time.perf_counter() - start
    lengths = [len(ids) for ids, _ in rows]
    if workload.kind != "passages":
        texts = None
    groups, paths = {}, {}
    for order in {CONTENDERS[name].order or workload.order for name in workload.contenders}:
        groups[order] = workloads.arrange(workload, texts, rows, order)
        paths[order] = run.folder / f"batches_{next(run.numbers)}.npz"
        workloads.write_batches(paths[order], groups[order], rows)
    run.facts.setdefault("tokenisation_s", {})[workload.name] = tokenised_s
    lost = {name: ("not available", missing[name]) for name in workload.contenders if name in missing}

    def order_of(name):
        return CONTENDERS[name].order or workload.order

    found, figures = {}, {}
    for name in workload.contenders:
        if name not in lost:
            try:
                order = order_of(name)
                found[name], figures[name] = first_pass(run, workers[name], groups[order], paths[order])
            except ContenderLost as reason:
                lost[name] = ("not available", str(reason))
    for name in figures:
        reference = next((found[peer] for peer in ("stock", "ours") if found.get(peer) is not None), None)
        if found[name] is not None and reference is not None:
            try:
                cosine = model["kind"] == "embed"
                figures[name].update(model_rows.difference(reference, found[name], cosine))
            except ContenderLost as reason:
                lost[name] = ("lost", str(reason))
        else:
            figures[name].update(max_abs_difference=None, min_cosine=None)
    run.results[workload.name] = {name: found[name] for name in ("ours", "ours_bf16") if found.get(name) is not None}

    def turn(name):
        blocks = batches.blocks_of(groups[order_of(name)], workload.blocks)

        def call(block):
            time.sleep(SETTLE_SECONDS)
            return workers[name].ask(do="run", batches=blocks[block])["seconds"]

        return call

    alive = [name for name in workload.contenders if name not in lost]
    block_count = min(workload.blocks, len(groups[workload.order]))
    rounds = take_turns(
        {name: turn(name) for name in alive},
        block_count,
        run.options.rounds or (3 if run.options.quick else workload.rounds),
        seconds=workload.seconds * (QUICK_SHARE if run.options.quick else 1),
    )
    lost.update({name: ("lost", reason) for name, reason in rounds.lost.items()})
    products = products_of(model)
    for name in workload.contenders:
        contender = CONTENDERS[name]
        fill = batches.fill_of(groups[order_of(name)], lengths)
        facts = {
            "title": workload.title,
            "label": contender.label,
            "dtype": contender.dtype,
            "batch_size": workload.batch_size,
            "order": order_of(name),
            "passages": len(rows),
            "tokens": fill.tokens,
            "padded_tokens": fill.padded_tokens,
            "fill": fill.fill,
        }
        if name in lost:
            run.rows.append(model_rows.row(workload.name, name, *lost[name], **facts))
            run.say(f"  {contender.label}: {': '.join(lost[name])}")
            continue
        ours = name.startswith(("ours", "products"))
        timed = model_rows.timed(rounds, name, fill.tokens, alive if ours else ["stock"])
        peak = run.facts["product_peak_gflops"].get(contender.dtype)
        share = peak and products.flops(fill.tokens) / (peak * 1e9) / timed["median_s"]
        memory = workers[name].ask(do="memory")
        run.rows.append(
            model_rows.row(
                workload.name,
                name,
                **facts,
                **timed,
                product_share=share,
                **figures[name],
                **memory,
                load_s=load_s[name],
            )
        )
    run.write()


def first_pass(run, worker, groups, path):
    """(results in the order of the texts or None, parity figures): all the work once, untimed."""
    worker.ask(do="reset")
    worker.ask(do="work", path=str(path))
    worker.ask(do="run", batches=list(range(len(groups))))
    padding = worker.ask(do="padding")["difference"] if len(groups[0]) > 1 else None
    kept = run.folder / f"results_{next(run.numbers)}.npz"
    count = worker.ask(do="results", path=str(kept))["count"]
    if not count:
        return None, {"padding_difference": None}
    with np.load(kept) as results:
        in_order = workloads.in_text_order(groups, [results[f"result_{index}"] for index in range(count)])
    kept.unlink()
    return in_order, {"padding_difference": padding}


def products_of(model):
    config = json.loads(Path(model["folder"], "config.json").read_text())
    return batches.Products(config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"])


# Cost against tokens, invariance


def stream(run, worker, tokenizer, marks):
    """Seconds and peak memory of the first 1k, 2k ... tokens of the text, repeated as often as it takes."""
    run.say(f"ours, cost of 1k to {marks[-1] // 1024}k tokens")
    workload = next(found for found in workloads.WORKLOADS if found.name == "minilm_32")
    rows = workloads.tokenised(workload, tokenizer, run.passages)
    groups = workloads.arrange(workload, run.passages, rows)
    path = run.folder / f"batches_{next(run.numbers)}.npz"
    workloads.write_batches(path, groups, rows)
    tokens_of = [sum(len(rows[row][0]) for row in group) for group in groups]
    worker.ask(do="work", path=str(path))
    worker.ask(do="run", batches=list(range(len(groups))) if not run.options.quick else [0])
    worker.ask(do="reset")
    table_rows, tokens, seconds = [], 0, 0.0
    for number in itertools.cycle(range(len(groups))):
        seconds += worker.ask(do="run", batches=[number])["seconds"]
        tokens += tokens_of[number]
        while len(table_rows) < len(marks) and tokens >= marks[len(table_rows)]:
            peak = worker.ask(do="memory")["peak_rss_bytes"]
            table_rows.append(
                {"mark": marks[len(table_rows)], "tokens": tokens, "seconds": seconds, "peak_rss_bytes": peak}
            )
        if len(table_rows) == len(marks):
            return table_rows


def invariance(results):
    """{contender: (texts compared, texts that differ)}: a text's bits in each other MiniLM workload against batch 32."""
    found = {}
    for name in ("ours", "ours_bf16"):
        base = results.get("minilm_32", {}).get(name)
        if base is None:
            continue
        compared = differing = 0
        for workload in ("minilm_1", "minilm_8", "minilm_128", "minilm_32_encode", "minilm_threads"):
            other = results.get(workload, {}).get(name)
            if other is not None:
                count = min(len(base), len(other))
                compared += count
                differing += int((base[:count] != other[:count]).any(1).sum())
        if compared:
            found[name] = {"compared": compared, "differing": differing}
    return found


# All of it


def measure_peak(run):
    """The best rate of a packed product seen in this run, in both dtypes; rows that are there already are held to it."""
    peaks = run.facts.setdefault("product_peak_gflops", {"float32": 0.0, "bfloat16": 0.0})
    for name, before in peaks.items():
        peaks[name] = max(before, product_peak.peak_gflops(getattr(torch, name)))
        for row in run.rows:
            if row["dtype"] == name and row["product_share"]:
                row["product_share"] *= before / peaks[name]


def run_all(run):
    wanted = [workload for workload in workloads.WORKLOADS if not run.options.only or workload.name in run.options.only]
    if run.options.quick:
        wanted = [workload for workload in wanted if workload.quick_passages is not None]
    run.facts["product_packed"] = product_peak.HAS_PACKED_PRODUCTS
    models = workloads.model_folders(dict.fromkeys(workload.model for workload in wanted), run.folder)
    from transformers import AutoTokenizer

    for name, model in models.items():
        of_model = [workload for workload in wanted if workload.model == name]
        contenders = list(dict.fromkeys(entry for workload in of_model for entry in workload.contenders))
        measure_peak(run)
        run.say(f"{name}: preparing and loading {len(contenders)} contenders")
        prepare(run, model)
        tokenizer = AutoTokenizer.from_pretrained(model["folder"], local_files_only=True)
        with ExitStack() as stack:
            workers, missing, load_s = load_all(run, contenders, model, stack)
            for workload in of_model:
                run_workload(run, workload, model, workers, missing, load_s, tokenizer)
            if name == "minilm" and "ours" in workers and not run.options.only:
                try:
                    marks = QUICK_STREAM_TOKENS if run.options.quick else STREAM_TOKENS
                    run.facts["stream"] = stream(run, workers["ours"], tokenizer, marks)
                except ContenderLost as reason:
                    run.say(f"  lost: {reason}")
    run.facts["invariance"] = invariance(run.results)
    run.facts["seconds"] = time.monotonic() - run.started
    run.write()
    print_tables(run.rows, run.facts)


def print_tables(rows, facts):
    for workload in workloads.WORKLOADS:
        found = [row for row in rows if row["workload"] == workload.name]
        if found:
            first = found[0]
            filled = f"{first['tokens']} tokens, {first['padded_tokens']} when padded, fill {first['fill']:.2f}"
            rounds = statistics.median([row["rounds"] for row in found if row["rounds"]] or [0])
            print(f"\n{workload.title}: {first['passages']} texts, {filled}, {rounds:.0f} rounds")
            print(table(model_rows.HEADERS, list(model_rows.table_rows(found))))
            for row in found:
                if row["status"] != "ok":
                    print(f"{row['label']} is {row['status']}: {row['reason']}")
    if facts.get("stream"):
        print("\nours, cost against tokens")
        lines = [
            (row["tokens"], f"{row['seconds']:.2f}", f"{row['seconds'] / row['tokens'] * 1e6:.0f}",
             f"{(row['peak_rss_bytes'] or 0) / 1e6:.0f}")
            for row in facts["stream"]
        ]  # fmt: skip
        print(table(("tokens", "seconds", "us per token", "peak MB"), lines))


def parse(argv):
    parser = argparse.ArgumentParser(prog="bench_models.py", description=__doc__.splitlines()[0])
    names = ", ".join(workload.name for workload in workloads.WORKLOADS)
    parser.add_argument("--quick", action="store_true", help="part of the text and of the workloads: about two minutes")
    parser.add_argument("--only", metavar="NAMES", help=f"comma-separated: {names}")
    parser.add_argument("--passages", type=int, default=workloads.PASSAGES, help="only the first ones of the fixed text")
    parser.add_argument("--rounds", type=int, help="interleaved rounds of every workload (default: each one's own)")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--peers-python", default=sys.executable, help="the interpreter that has the peers")
    parser.add_argument("--json", type=Path, default=RESULTS, help=f"default {os.path.relpath(RESULTS)}")
    parser.add_argument("--picture", type=Path, help="draw one there")
    options = parser.parse_args(argv)
    if options.only:
        options.only = options.only.split(",")
        unknown = sorted(set(options.only) - {workload.name for workload in workloads.WORKLOADS})
        if unknown:
            parser.error(f"--only names {', '.join(unknown)}, expected names that --help lists")
    for name in ("passages", "rounds", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}, expected at least 1")
    return options


def main(argv=None):
    options = parse(argv)
    with tempfile.TemporaryDirectory(prefix="transfuse-bench-") as folder:
        run_all(Run(options, folder))
    if options.picture:
        from transfuse.cli.models_picture import draw

        draw(options.picture, json.loads(options.json.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
