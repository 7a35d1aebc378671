"""Do two sets of embeddings say the same? Largest difference, nearest neighbours, and the order of all pair scores."""

from dataclasses import asdict, dataclass

import torch

from transfuse.testing import MODEL_TOLERANCE, NEIGHBOUR_MARGIN

# Swapping two adjacent ones of 100 000 pairs moves Spearman's correlation by about 1e-14: this allows noise, no more.
LEAST_SPEARMAN = 0.99999


@dataclass(frozen=True)
class Similarity:
    """What compare_embeddings found.

    Args:
        max_abs_difference: largest difference of any embedding element.
        neighbours_checked: texts whose first two neighbours under stock differ by more than NEIGHBOUR_MARGIN.
        neighbours_changed: how many of those have another nearest neighbour now.
        spearman: rank correlation of the cosine scores of all pairs.
    """

    texts: int
    max_abs_difference: float
    neighbours_checked: int
    neighbours_changed: int
    spearman: float

    @property
    def ok(self):
        """True where every figure keeps its promise; a NaN keeps none."""
        return (
            self.max_abs_difference <= MODEL_TOLERANCE
            and self.neighbours_changed == 0
            and self.spearman >= LEAST_SPEARMAN
        )

    def to_dict(self):
        return {**asdict(self), "ok": self.ok}


def compare_embeddings(stock, other):
    """Compares two float32 tensors [texts, channels] of unit length. Returns: Similarity."""
    if stock.shape != other.shape:
        raise ValueError(
            f"compare_embeddings: other has shape {tuple(other.shape)}, expected {tuple(stock.shape)} (stock's)"
        )
    difference = (stock.double() - other.double()).abs().max().item()
    scores, other_scores = (pair_scores(embeddings) for embeddings in (stock, other))
    off_diagonal = scores.masked_fill(torch.eye(len(scores), dtype=torch.bool), -torch.inf)
    best = off_diagonal.topk(2).values
    checked = best[:, 0] - best[:, 1] > NEIGHBOUR_MARGIN
    other_nearest = other_scores.masked_fill(torch.eye(len(scores), dtype=torch.bool), -torch.inf).argmax(1)
    changed = (off_diagonal.argmax(1) != other_nearest) & checked
    upper = torch.triu_indices(len(scores), len(scores), offset=1)
    return Similarity(
        len(stock),
        difference,
        int(checked.sum()),
        int(changed.sum()),
        spearman(scores[upper[0], upper[1]], other_scores[upper[0], upper[1]]),
    )


def pair_scores(embeddings):
    """Cosine of every pair, in float64."""
    wide = torch.nn.functional.normalize(embeddings.double(), dim=-1)
    return wide @ wide.T


def ranks(values):
    """Ranks 0 .. n-1; equal values share the mean of their ranks."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() + 1) / 2)[inverse]


def spearman(first, second):
    """Spearman's rank correlation of two equally long 1-D tensors."""
    centred = [ranks(values) - (len(values) - 1) / 2 for values in (first, second)]
    return (centred[0] @ centred[1] / (centred[0].norm() * centred[1].norm())).item()
