"""The floor to stand on: how fast this machine multiplies matrices when weights are packed for it, and nothing else.

Where torch has no packed product (models/packed_linear.py), F.linear is measured instead.
"""

import statistics
import time

import torch
import torch.nn.functional as F

from transfuse.models.packed_linear import HAS_PACKED_PRODUCTS, multiply, pack

ROWS = 1024  # of one product: enough that the rate has levelled off, few enough that operands stay in cache
COLUMNS = ((384, 1536), (1536, 384), (768, 3072), (3072, 768))  # (input, output) channels: MiniLM's and BERT-base's FFN
REPEATS = 9


def product(weight, bias):
    """x -> x @ weight.T + bias with the weight packed once, or F.linear where torch cannot pack."""
    if not HAS_PACKED_PRODUCTS:
        return lambda x: F.linear(x, weight, bias)
    packed = pack(weight)
    return lambda x: multiply(x, packed, bias)


class LayerProducts:
    """Every linear layer of an encoder and nothing between them, on random weights of its shapes.

    Args:
        products: batches.Products.
        dtype: torch.float32 or torch.bfloat16.
    """

    def __init__(self, products, dtype=torch.float32):
        self.dtype, self.inputs = dtype, {}
        self.columns = sorted({columns for _, columns in products.shapes})
        generator = torch.Generator().manual_seed(0)
        self.layers = []
        for _ in range(products.layers):
            for rows, columns in products.shapes:
                weight = torch.randn(rows, columns, generator=generator).to(dtype)
                self.layers.append((columns, product(weight, torch.zeros(rows, dtype=dtype))))

    def __call__(self, tokens):
        """Runs them all on `tokens` rows."""
        if tokens not in self.inputs:  # drawn once per size; a caller warms up first
            self.inputs[tokens] = {columns: torch.randn(tokens, columns).to(self.dtype) for columns in self.columns}
        inputs = self.inputs[tokens]
        with torch.no_grad():
            for columns, call in self.layers:
                call(inputs[columns])


def peak_gflops(dtype=torch.float32, *, rows=ROWS, timer=time.perf_counter):
    """The best rate of a packed product over COLUMNS, each the median of REPEATS, in GFLOP/s."""
    best = 0.0
    with torch.no_grad():
        for columns, outputs in COLUMNS:
            x = torch.randn(rows, columns).to(dtype)
            call = product(torch.randn(outputs, columns).to(dtype), torch.zeros(outputs, dtype=dtype))
            seconds = []
            call(x)
            for _ in range(REPEATS):
                start = timer()
                call(x)
                seconds.append(timer() - start)
            best = max(best, 2 * rows * columns * outputs / statistics.median(seconds) / 1e9)
    return best
