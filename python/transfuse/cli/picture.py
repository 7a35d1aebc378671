"""The demo's picture: speed per round, what padding costs, and how far the embeddings are apart."""

from contextlib import contextmanager

import torch

from transfuse.bench.similarity import pair_scores
from transfuse.testing import MODEL_TOLERANCE

STOCK, OURS, INK, FAINT = "#b9bec7", "#1f6feb", "#24292f", "#8b949e"
POINTS = 4000  # of the pairs; more would only make the file larger
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


@contextmanager
def panels(path, widths, size, title, footer):
    """Axes side by side under a title; written to `path` as PNG at the end.

    Args:
        widths: of the panels, relative to each other.
        size: (width, height) of the picture, inches.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(1, len(widths), figsize=size, width_ratios=widths, squeeze=False)
        yield list(axes[0])
        figure.suptitle(title, x=0.02, ha="left", fontsize=14, fontweight="bold")
        figure.text(0.02, 0.015, footer, fontsize=8, color=FAINT)
        figure.tight_layout(rect=(0, 0.04, 1, 0.96), w_pad=3)
        figure.savefig(path, dpi=130, facecolor="white")
        pyplot.close(figure)


def draw(path, figures, lengths, stock, ours):
    """Writes the PNG.

    Args:
        figures: the demo's dict (speedup, stock_s, accelerated_s, fill, parity ...).
        lengths: tokens of each passage.
        stock, ours: embeddings [texts, channels].
    """
    faster = "faster" if figures["speedup_low"] > 1 else "stock (not shown to be faster)"
    same = "same embeddings" if figures["parity"]["ok"] else "embeddings DIFFER from stock's"
    title = f"{figures['model']}, {figures['passages']} real passages: {figures['speedup']:.2f}x {faster}, {same}"
    footer = (
        f"{figures['date']}  {figures['machine']}, {figures['threads']} threads, {figures['cpu_isa']}, float32, "
        f"torch {figures['torch']}, transfuse {figures['transfuse']}"
    )
    with panels(path, (1.1, 1, 1), (14, 4.6), title, footer) as (rounds, text, parity):
        _rounds(rounds, figures)
        _lengths(text, figures, lengths)
        _parity(parity, figures, stock, ours)


def _title(axes, title, subtitle):
    axes.set_title(f"{title}\n", pad=8)
    axes.text(0, 1.03, subtitle, transform=axes.transAxes, fontsize=9.5, color=INK)


def _rounds(axes, figures):
    count = len(figures["stock_s"])
    places = range(1, count + 1)
    top = max(figures["stock_s"])
    axes.bar([place - 0.2 for place in places], figures["stock_s"], 0.38, color=STOCK, label="stock")
    axes.bar([place + 0.2 for place in places], figures["accelerated_s"], 0.38, color=OURS, label="accelerated")
    for place, stock_s, ours_s in zip(places, figures["stock_s"], figures["accelerated_s"], strict=True):
        axes.text(
            place + 0.2,
            ours_s + 0.015 * top,
            f"{stock_s / ours_s:.2f}x",
            ha="center",
            fontsize=9,
            color=OURS,
            fontweight="bold",
        )
    _title(
        axes,
        "Time of encode(), both sides in turn",
        f"95 % interval of the ratio {figures['speedup_low']:.2f} to {figures['speedup_high']:.2f}",
    )
    axes.set(xlabel="round", ylabel="seconds", xticks=list(places), ylim=(0, top * 1.22))
    axes.legend(frameon=False, ncols=2, loc="upper right")


def _lengths(axes, figures, lengths):
    padding = figures["padded_tokens"] - figures["tokens"]
    axes.hist(lengths, bins=min(32, max(lengths)), color=OURS, alpha=0.85)
    _title(axes, "Length of the passages", f"{figures['tokens']:,} tokens, and {padding:,} of padding when sorted")
    axes.set(xlabel="tokens", ylabel="passages")
    words = [f"fill {figures['fill']:.2f} sorted"]
    if figures["arrival"]:
        words.append(f"fill {figures['arrival']['fill']:.2f} unsorted: {figures['arrival']['speedup']:.2f}x faster")
    axes.text(0.98, 0.95, "\n".join(words), transform=axes.transAxes, ha="right", va="top")


def _parity(axes, figures, stock, ours):
    upper = torch.triu_indices(len(stock), len(stock), offset=1)
    step = max(1, upper.shape[1] // POINTS)
    first, second = upper[0, ::step], upper[1, ::step]
    scores, other = pair_scores(stock)[first, second], pair_scores(ours)[first, second]
    axes.scatter(scores, (other - scores) * 1e7, s=5, color=OURS, alpha=0.35, linewidths=0)
    axes.axhline(0, color=FAINT, linewidth=0.8)
    found = figures["parity"]
    _title(
        axes,
        "Change of similarity scores",
        f"largest embedding change {found['max_abs_difference']:.1e}, allowed {MODEL_TOLERANCE:.0e}",
    )
    axes.set(xlabel=f"stock's cosine ({len(scores):,} pairs)", ylabel="accelerated minus stock, in 1e-7")
    axes.text(
        0.98,
        0.95,
        f"{found['neighbours_changed']} of {found['neighbours_checked']} nearest neighbours changed\n"
        f"Spearman {found['spearman']:.9f}",
        transform=axes.transAxes,
        ha="right",
        va="top",
    )
    limit = max(abs(value) for value in axes.get_ylim()) * 1.5
    axes.set_ylim(-limit, limit)
