"""Rows of whole-model figures: what bench/bench_models.py and `transfuse bench --model` write, and the table of them.

A row is one contender in one workload:

    workload, title, contender, label, dtype   which
    status, reason                      'ok', or 'not available' / 'lost' with the reason; then the figures are null
    batch_size, order, passages         the work
    tokens, padded_tokens, fill         real tokens, tokens that padded batches hold, their ratio
    rounds, round_s, median_s           interleaved rounds and seconds per round
    tokens_per_s                        real tokens by median_s
    product_share                       time of the model's unpadded products at the measured peak rate / median_s
    against                             {contender: {ratio, low, high, interval}}: > 1, this one takes less time
    max_abs_difference, min_cosine      its results against stock's in float32 (cosine: embeddings only)
    padding_difference                  how far padding moves one of its results
    peak_rss_bytes, load_s              of its process
"""

import numpy as np

from transfuse.bench.turns import ContenderLost

KEYS = (
    "workload", "title", "contender", "label", "dtype", "status", "reason", "batch_size", "order", "passages", "tokens",
    "padded_tokens", "fill", "rounds", "round_s", "median_s", "tokens_per_s", "product_share", "against",
    "max_abs_difference", "min_cosine", "padding_difference", "peak_rss_bytes", "load_s",
)  # fmt: skip
STATUSES = ("ok", "not available", "lost")


def row(workload, contender, status="ok", reason="", **figures):
    """A row with every key of KEYS. Raises ValueError for an unknown key, or a status that is not explained."""
    unknown = sorted(set(figures) - set(KEYS))
    if unknown:
        raise ValueError(f"model_rows: row {workload} {contender} has unknown keys {unknown}")
    if status not in STATUSES or (status != "ok") != bool(reason):
        raise ValueError(f"model_rows: row {workload} {contender} has status {status!r} and reason {reason!r}")
    if status == "ok" and not figures.get("median_s"):
        raise ValueError(f"model_rows: row {workload} {contender} is ok and has no median_s")
    given = {"workload": workload, "contender": contender, "status": status, "reason": reason, **figures}
    return {key: given.get(key) for key in KEYS}


def timed(rounds, name, tokens, peers):
    """The figures of a row that come from turns.Rounds: `peers` are the contenders it is compared with."""
    return {
        "rounds": len(rounds.rounds_s(name)),
        "round_s": list(rounds.rounds_s(name)),
        "median_s": rounds.median_s(name),
        "tokens_per_s": tokens / rounds.median_s(name),
        "against": {peer: rounds.ratio(name, peer) for peer in peers if peer != name and peer in rounds.blocks_s},
    }


def difference(stock, other, cosine=True):
    """Parity of two arrays [texts, channels]: {max_abs_difference, min_cosine}.

    Raises: ContenderLost where one of `other` is not finite; ValueError for other shapes.
    """
    if other.shape != stock.shape:
        raise ValueError(f"model_rows: results have shape {other.shape}, expected {stock.shape} (stock's)")
    stock, other = stock.astype(np.float64), other.astype(np.float64)
    largest = float(np.abs(stock - other).max())
    if not np.isfinite(largest):
        raise ContenderLost("its results hold NaN or infinity")
    if not cosine:
        return {"max_abs_difference": largest, "min_cosine": None}
    lengths = np.linalg.norm(stock, axis=1) * np.linalg.norm(other, axis=1)
    return {"max_abs_difference": largest, "min_cosine": float(((stock * other).sum(1) / lengths).min())}


HEADERS = ("contender", "seconds", "tokens/s", "against stock", "ours against it", "ours bf16 against it",
           "of peak", "difference", "cosine", "MB")  # fmt: skip


def _ratio(found):
    return f"{found['ratio']:.2f} ({found['low']:.2f} to {found['high']:.2f})" if found else "-"


def table_rows(rows):
    """Cells under HEADERS for the rows of one workload that have figures; 'a against b' is b's time over a's."""
    by_name = {entry["contender"]: entry for entry in rows if entry["status"] == "ok"}

    def against(name, peer):
        return _ratio((by_name.get(name) or {"against": {}})["against"].get(peer))

    for name, entry in by_name.items():
        yield (
            entry["label"],
            f"{entry['median_s']:.3f}",
            f"{entry['tokens_per_s']:.0f}",
            against(name, "stock"),
            against("ours", name),
            against("ours_bf16", name),
            "-" if entry["product_share"] is None else f"{entry['product_share']:.2f}",
            "-" if entry["max_abs_difference"] is None else f"{entry['max_abs_difference']:.1e}",
            "-" if entry["min_cosine"] is None else f"{entry['min_cosine']:.5f}",
            "-" if entry["peak_rss_bytes"] is None else f"{entry['peak_rss_bytes'] / 1e6:.0f}",
        )
