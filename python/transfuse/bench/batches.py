"""Texts as padded batches: in which order, how many tokens are real, and what the model's products cost for them."""

from dataclasses import dataclass

ORDERS = ("arrival", "encode", "tokens")


def order_of(order, texts, lengths):
    """Indices of the texts in the order in which they are put into batches.

    Args:
        order: 'arrival' (as they come), 'encode' (what SentenceTransformer.encode does: longest first by characters)
            or 'tokens' (longest first by tokens, the best that sorting can do).
    """
    indices = range(len(lengths))
    if order == "arrival":
        return list(indices)
    if order == "encode":
        return sorted(indices, key=lambda index: -len(texts[index]))
    if order == "tokens":
        return sorted(indices, key=lambda index: -lengths[index])
    raise ValueError(f"batches: order is {order!r}, expected one of {', '.join(ORDERS)}")


def split(indices, size):
    """The indices in groups of `size`; the last one may be smaller."""
    if size < 1:
        raise ValueError(f"batches: size is {size}, expected at least 1")
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def blocks_of(batches, wanted):
    """The batches' numbers cut into at most `wanted` runs of neighbours, as even as they come."""
    count = min(wanted, len(batches))
    edges = [len(batches) * block // count for block in range(count + 1)]
    return [list(range(first, last)) for first, last in zip(edges, edges[1:])]


@dataclass(frozen=True)
class Fill:
    """What padding makes of a text: real tokens, and tokens that padded batches compute."""

    tokens: int
    padded_tokens: int

    @property
    def fill(self):
        return self.tokens / self.padded_tokens


def fill_of(batches, lengths):
    """Fill of batches (lists of indices into `lengths`), each as long as its longest text."""
    padded = sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)
    return Fill(sum(lengths[index] for batch in batches for index in batch), padded)


@dataclass(frozen=True)
class Products:
    """The matrix products that one token costs in an encoder: (rows of the weight, columns of the weight), layers."""

    hidden: int
    intermediate: int
    layers: int

    @property
    def shapes(self):
        """(output channels, input channels) of one layer: queries, keys, values at once, output, and the FFN's two."""
        hidden, wide = self.hidden, self.intermediate
        return ((3 * hidden, hidden), (hidden, hidden), (wide, hidden), (hidden, wide))

    def flops(self, tokens):
        return 2 * tokens * self.layers * sum(rows * columns for rows, columns in self.shapes)
