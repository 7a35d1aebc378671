"""The picture of whole-model figures: seconds per contender, speed-ups per workload, and cost against tokens."""

from transfuse.cli.picture import INK, OURS, STOCK, panels

PEER, FLOOR, BF16 = "#6e7f96", "#e3e6ea", "#0b3d91"
SHOWN = {  # workload -> words under its bars; the first one has a panel of its own
    "minilm_1": "MiniLM,\none at a time",
    "minilm_8": "MiniLM,\nbatch 8",
    "minilm_128": "MiniLM,\nbatch 128",
    "minilm_32_encode": "MiniLM,\nsorted",
    "minilm_query": "MiniLM,\n12-token query",
    "cross_encoder_32": "cross-\nencoder",
    "bert_base_32": "BERT-base,\nbatch 32",
    "bert_base_full": "BERT-base,\nno padding",
}
BARS = (("ours", OURS, "ours float32"), ("ours_bf16", BF16, "ours bfloat16"))


def draw(path, document):
    """Writes the PNG of what bench_models.py or `transfuse bench --model` wrote."""
    rows = [row for row in document["rows"] if row["status"] == "ok"]
    first = [row for row in rows if row["workload"] == document["rows"][0]["workload"]]
    others = [name for name in SHOWN if any(row["workload"] == name for row in rows)]
    stream = document.get("stream")
    widths = [1.1] + [1.4] * bool(others) + [0.7] * bool(stream)
    where = document["environment"]
    footer = (
        f"{where['date']}  {where['machine']}, {where['threads']} threads, {where['cpu_isa']}, "
        f"torch {where['torch']}, commit {where['commit'][:12]}, text {document['text_sha256'][:12]}"
    )
    title = document.get("model", "Encoders on a CPU")
    with panels(path, widths, (1 + 5.2 * sum(widths), 5.2), title, footer) as axes:
        _seconds(axes.pop(0), first)
        if others:
            _speedups(axes.pop(0), rows, others)
        if stream:
            _stream(axes.pop(0), stream)


def _colour(name):
    if name.startswith("products"):
        return FLOOR
    if name.startswith("ours"):
        return BF16 if "bf16" in name else OURS
    return STOCK if name.startswith("stock") else PEER


def _seconds(axes, rows):
    ordered = sorted(rows, key=lambda row: -row["median_s"])
    longest = ordered[0]["median_s"]
    axes.barh([row["label"] for row in ordered], [row["median_s"] for row in ordered],
              color=[_colour(row["contender"]) for row in ordered])  # fmt: skip
    for place, row in enumerate(ordered):
        ratio = row["against"].get("stock")
        words = f"{row['median_s']:.2f} s" + (f"  {ratio['ratio']:.2f}x" if ratio else "")
        axes.text(row["median_s"] + 0.01 * longest, place, words, va="center", fontsize=8.5)
    first = rows[0]
    axes.set_title(f"{first['passages']} texts in batches of {first['batch_size']}, fill {first['fill']:.2f}")
    axes.set(xlabel="seconds for the text, and times as fast as stock", xlim=(0, longest * 1.28))


def _speedups(axes, rows, workloads):
    by_name = {(row["workload"], row["contender"]): row for row in rows}
    for place, workload in enumerate(workloads):
        bars = [(by_name.get((workload, name)), colour) for name, colour, _ in BARS]
        peers = [
            row for (of, name), row in by_name.items() if of == workload and not name.startswith(("stock", "ours"))
        ]
        exact = [row for row in peers if row["dtype"] == "float32"]
        bars.append((min(exact, key=lambda row: row["median_s"], default=None), PEER))
        for offset, (row, colour) in zip((-0.27, 0, 0.27), bars, strict=True):
            ratio = row and row["against"].get("stock")
            if ratio:
                axes.bar(place + offset, ratio["ratio"], 0.25, color=colour)
                words = f"{ratio['ratio']:.1f}"
                axes.text(place + offset, ratio["ratio"], words, ha="center", va="bottom", fontsize=7.5)
    for _, colour, words in (*BARS, (None, PEER, "fastest float32 peer")):
        axes.bar(0, 0, color=colour, label=words)
    axes.axhline(1, color=INK, linewidth=0.8)
    axes.set_xticks(range(len(workloads)), [SHOWN[name] for name in workloads], fontsize=7.5)
    axes.set_title("Times as fast as stock")
    axes.legend(frameon=False, fontsize=8.5, loc="upper right")


def _stream(axes, marks):
    tokens = [row["tokens"] for row in marks]
    axes.plot(tokens, [row["seconds"] for row in marks], "o-", color=OURS)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="seconds")
    peaks = [row["peak_rss_bytes"] for row in marks if row["peak_rss_bytes"]]
    axes.set_title("Cost against tokens")
    if peaks:
        axes.text(0.04, 0.95, f"peak memory {min(peaks) / 1e6:.0f} to {max(peaks) / 1e6:.0f} MB",
                  transform=axes.transAxes, va="top", fontsize=8.5)  # fmt: skip
