"""transfuse: existing PyTorch transformers faster in one line, and proof that they still compute the same thing.

    model = transfuse.accelerate(model)

Importing it starts no thread, no process and no CUDA context, and imports neither triton nor transformers.
"""

import importlib

__version__ = "0.1.0"

# Public name -> the module it lives in. Read on first use, so that importing the package stays light.
_HOMES = {
    "scaled_dot_product_attention": "ops.attention",
    "varlen_attention": "ops.varlen_attention",
    "decode_attention": "ops.decode_attention",
    "masked_softmax": "ops.masked_softmax",
    "layer_norm": "ops.layer_norm",
    "add_layer_norm": "ops.layer_norm",
    "rms_norm": "ops.rms_norm",
    "add_rms_norm": "ops.rms_norm",
    "gelu": "ops.gelu",
    "rotary": "ops.rotary",
    "pack": "ops.packing",
    "unpack": "ops.packing",
    "Packing": "ops.packing",
    "accelerate": "models",
    "report": "models",
    "restore": "models",
    "repack": "models",
    "verify": "models",
    "Verdict": "models",
    "backends": "dispatch",
    "use_backend": "dispatch",
    "explain": "dispatch",
    "TransfuseWarning": "dispatch",
}
_MODULES = ("nn", "ops", "reference", "models", "testing", "dispatch", "env", "promises", "bench", "cli")

__all__ = [*_HOMES, "nn", "testing"]


def __getattr__(name):
    if name in _HOMES:
        value = getattr(importlib.import_module(f"transfuse.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"transfuse.{name}")
    raise AttributeError(f"module 'transfuse' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_HOMES, *_MODULES])
