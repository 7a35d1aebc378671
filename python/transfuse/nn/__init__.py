"""Drop-in modules: torch's constructor and state_dict where torch has the class, our forward."""

import importlib

_HOMES = {
    "LayerNorm": "layer_norm",
    "AddLayerNorm": "layer_norm",
    "RMSNorm": "rms_norm",
    "GELU": "gelu",
    "BiasGELU": "gelu",
    "MaskedSoftmax": "masked_softmax",
    "MultiheadAttention": "attention",
    "RotaryEmbedding": "rotary",
    "TransformerEncoderLayer": "transformer",
    "TransformerEncoder": "transformer",
}

__all__ = list(_HOMES)


def __getattr__(name):
    if name in _HOMES:
        value = getattr(importlib.import_module(f"transfuse.nn.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'transfuse.nn' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_HOMES])
