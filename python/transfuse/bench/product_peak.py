"""The floor to stand on: how fast oneDNN multiplies matrices on this machine when weights are packed for it.

Its packed product is private to torch; where a torch has none, F.linear is measured instead.
"""

import statistics
import time

import torch
import torch.nn.functional as F

ROWS = 1024  # of one product: enough that the rate has levelled off, few enough that operands stay in cache
COLUMNS = ((384, 1536), (1536, 384), (768, 3072), (3072, 768))  # (input, output) channels: MiniLM's and BERT-base's FFN
REPEATS = 9
_ROWS_HINT = 1024  # the number of rows that oneDNN chooses its layout for


def pack(weight):
    """A copy of a weight [out, in] in oneDNN's own layout, for `multiply` alone."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_HINT)


def multiply(rows, weight, bias):
    """F.linear(rows, w, bias) with weight = pack(w)."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


def _has_packed_products():
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        rows, weight = torch.eye(3, 5), torch.arange(20.0).view(4, 5)
        return torch.equal(multiply(rows, pack(weight), None), F.linear(rows, weight))
    except (AttributeError, RuntimeError, TypeError):
        return False


HAS_PACKED_PRODUCTS = _has_packed_products()


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
