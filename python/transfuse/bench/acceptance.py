"""The lines that `make bench` is held to, each with its figure and whether it is met: nothing is timed.

A ratio is met by its median; the interval stands beside it. A line without a row is not measured, which is not met.
"""

from dataclasses import dataclass

from transfuse.testing import MODEL_COSINE_BFLOAT16, MODEL_TOLERANCE

SHORT = 128  # attention: sequences up to here are short
MEMORY_TOKENS = 1 << 15  # from here on one pass over the text has been seen: the longest batch too
LINEAR_TOKENS = 1 << 13  # below, a few batches decide


@dataclass(frozen=True)
class Line:
    """One line of acceptance.

    Args:
        what, wanted, figure: words.
        met: True, False, or None where it was not measured.
    """

    what: str
    wanted: str
    figure: str
    met: bool | None

    @property
    def verdict(self):
        return {True: "met", False: "NOT MET", None: "not measured"}[self.met]


# (workload, contender, peer, least ratio)
RATIOS = (
    ("minilm_32", "ours", "stock", 2.5),
    ("minilm_32", "ours", "ctranslate2", 1.5),
    ("minilm_32", "ours", "onnxruntime", 2.0),
    ("minilm_32", "ours", "openvino", 2.0),
    ("minilm_32", "ours", "compile", 2.0),
    ("minilm_32", "ours", "stock_sorted", 1.5),
    ("minilm_32", "ours_bf16", "stock", 4.5),
    ("minilm_32", "ours_bf16", "openvino_bf16", 1.8),
    ("minilm_32", "ours_bf16", "ctranslate2_int8", 1.2),
    ("minilm_1", "ours", "stock", 3.0),
    ("minilm_query", "ours", "stock", 2.0),
    ("bert_base_full", "ours", "stock", 1.25),
    ("minilm_threads", "ours", "ours_1_thread", 1.8),
)
FILL, FILL_SLACK = 0.55, 0.03
PRODUCTS = {"ours": 1.2, "ours_bf16": 1.35}
LINEAR_SLACK, MEMORY_SLACK = 0.1, 0.1


def lines(models, ops):
    """All lines, from what bench_models.py and the ops' benchmarks wrote; either may be None."""
    return [*model_lines(models or {"rows": []}), *op_lines(ops["rows"] if ops else [])]


def model_lines(document):
    rows = {(row["workload"], row["contender"]): row for row in document["rows"]}

    def found(workload, contender):
        row = rows.get((workload, contender))
        return row if row and row["status"] == "ok" else None

    main = found("minilm_32", "stock")
    fill = main and main["fill"]
    yield _line(
        "minilm_32: fill of the fixed text", f"{FILL} +- {FILL_SLACK}", fill, lambda f: abs(f - FILL) <= FILL_SLACK
    )
    for workload, contender, peer, least in RATIOS:
        row = found(workload, contender)
        ratio = row and row["against"].get(peer)
        yield _line(f"{workload}: {contender} against {peer}", f">= {least}x", ratio, lambda f: f["ratio"] >= least)
    row = found("minilm_32", "ours")
    yield _line(
        "minilm_32: ours, largest difference of an embedding element",
        f"<= {MODEL_TOLERANCE}",
        row and row["max_abs_difference"],
        lambda f: f <= MODEL_TOLERANCE,
    )
    row = found("minilm_32", "ours_bf16")
    yield _line(
        "minilm_32: ours_bf16, minimum cosine to stock in float32",
        f">= {MODEL_COSINE_BFLOAT16}",
        row and row["min_cosine"],
        lambda f: f >= MODEL_COSINE_BFLOAT16,
    )
    for contender, most in PRODUCTS.items():
        row = found("minilm_32", contender)
        share = row and row["product_share"]
        yield _line(
            f"minilm_32: {contender}, its time over that of its unpadded products at the peak rate",
            f"<= {most}x",
            share and 1 / share,
            lambda f: f <= most,
        )
    yield from _stream_lines(document.get("stream"))
    for contender in PRODUCTS:
        counts = document.get("invariance", {}).get(contender)
        yield Line(
            f"encode([s]) of {contender} equals s in any batch, bitwise",
            "every text",
            f"{counts['differing']} of {counts['compared']} differ" if counts else "-",
            counts and counts["differing"] == 0,
        )


def _stream_lines(marks):
    per_token = {row["mark"]: row["seconds"] / row["tokens"] for row in marks or ()}
    late = [cost for mark, cost in per_token.items() if mark >= LINEAR_TOKENS]
    spread = max(abs(cost / late[-1] - 1) for cost in late) if len(late) > 1 else None
    yield _line(
        f"cost per token from {LINEAR_TOKENS // 1024}k to 256k tokens, largest deviation from the last",
        f"<= {LINEAR_SLACK}",
        spread,
        lambda f: f <= LINEAR_SLACK,
    )
    memory = [row["peak_rss_bytes"] for row in marks or () if row["mark"] >= MEMORY_TOKENS and row["peak_rss_bytes"]]
    growth = memory[-1] / memory[0] - 1 if len(memory) > 1 else None
    yield _line(
        f"peak memory from {MEMORY_TOKENS // 1024}k to 256k tokens, growth",
        f"<= {MEMORY_SLACK}",
        growth,
        lambda f: f <= MEMORY_SLACK,
    )


def _line(what, wanted, value, keeps):
    if value is None:
        return Line(what, wanted, "-", None)
    return Line(what, wanted, _words(value), bool(keeps(value)))


def _words(value):
    if isinstance(value, dict):
        return f"{value['ratio']:.2f}x ({value['low']:.2f} to {value['high']:.2f})"
    return f"{value:.5f}" if 0.99 < abs(value) < 1 else f"{value:.3g}"


# Ops: one line per kind of case, decided by its worst case, which it names.


def op_lines(rows):
    against_torch = [row for row in rows if row["peer"] == "torch"]
    attention = [row for row in against_torch if row["op"] == "attention" and row["sweep"]]
    forward = [row for row in attention if row["direction"] == "forward"]
    for short in (True, False):
        of_length = [row for row in forward if (_seqlen(row) <= SHORT) == short]
        where = f"S {'<=' if short else '>'} {SHORT}"
        yield _worst(
            f"attention forward float32, {where}",
            ">= 1.5x" if short else ">= 1.15x where torch is under 140 GFLOP/s, else >= 0.8 of the product peak",
            [(row, _attention_kept(row, short)) for row in of_length if row["dtype"] == "float32"],
        )
        yield _worst(
            f"attention forward bfloat16, {where}",
            ">= 2x or >= 0.7 of the product peak",
            [
                (row, row["speedup"] >= 2 or row["product_share"] >= 0.7)
                for row in of_length
                if row["dtype"] == "bfloat16"
            ],
        )
    for dtype in ("float32", "bfloat16"):
        both = [_both_directions(attention, row) for row in forward if row["dtype"] == dtype]
        yield _worst(
            f"attention forward + backward {dtype}", ">= 1.5x", [(row, row["speedup"] >= 1.5) for row in both if row]
        )
    for op in ("gelu", "layer_norm", "masked_softmax"):
        single = [row for row in against_torch if row["op"] == op and not row["unfused"] and row["output"] == "reused"]
        yield _worst(
            f"{op} float32 in cache",
            "never slower than torch",
            [
                (row, row["speedup_high"] >= 1.0 and row["speedup"] >= 0.97)
                for row in single
                if row["dtype"] == "float32"
            ],
        )
        yield _worst(
            f"{op} bfloat16 in cache",
            ">= 2x",
            [(row, row["speedup"] >= 2) for row in single if row["dtype"] == "bfloat16"],
        )
    unfused = {"add_layer_norm": "add + layer_norm", "gelu": "bias + gelu", "masked_softmax": "scale + mask + softmax"}
    for op, words in unfused.items():
        of_op = [row for row in against_torch if row["op"] == op and row["unfused"]]
        yield _worst(f"{words}, against torch's unfused form", ">= 2x", [(row, row["speedup"] >= 2) for row in of_op])


def _seqlen(row):
    return int(row["case"].removeprefix("s").partition("_")[0])


def _attention_kept(row, short):
    if short:
        return row["speedup"] >= 1.5
    torch_gflops = row["flops"] / (row["peer_us"] * 1e-6) / 1e9
    return row["speedup"] >= 1.15 if torch_gflops < 140 else row["product_share"] >= 0.8


def _both_directions(rows, forward):
    """A row for forward + backward: the medians' sums, without an interval."""
    same = [
        row
        for row in rows
        if row["direction"] == "backward" and (row["case"], row["dtype"]) == (forward["case"], forward["dtype"])
    ]
    if not same:
        return None
    theirs = forward["peer_us"] + same[0]["peer_us"]
    ratio = theirs / (forward["ours_us"] + same[0]["ours_us"])
    whole = {"direction": "both", "speedup": ratio, "speedup_low": None, "product_share": None}
    return {**forward, **whole}


def _worst(what, wanted, judged):
    """A line from (row, kept) pairs: how many are kept, and the slowest of those that are not (or of all)."""
    if not judged:
        return Line(what, wanted, "-", None)
    missed = [row for row, kept in judged if not kept]
    row = min(missed or [row for row, _ in judged], key=lambda row: row["speedup"])
    figure = f"{len(judged) - len(missed)} of {len(judged)}; worst {row['case']} {row['dtype']} {row['direction']} "
    figure += f"{row['speedup']:.2f}x"
    if row["speedup_low"] is not None:
        figure += f" ({row['speedup_low']:.2f} to {row['speedup_high']:.2f})"
    if row.get("product_share"):
        figure += f", {row['product_share']:.2f} of peak"
    return Line(what, wanted, figure, not missed)
