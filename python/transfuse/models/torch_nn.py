"""nn.LayerNorm and nn.GELU, wherever they stand in a model."""

from torch import nn

import transfuse.nn.gelu
import transfuse.nn.layer_norm
from transfuse.models.swap import Swapped


class LayerNorm(Swapped, transfuse.nn.layer_norm.LayerNorm):
    """nn.LayerNorm on the fused kernel."""

    stock = nn.LayerNorm
    fused = transfuse.nn.layer_norm.LayerNorm.forward


class GELU(Swapped, transfuse.nn.gelu.GELU):
    """nn.GELU, erf or tanh, on the fused kernel."""

    stock = nn.GELU
    fused = transfuse.nn.gelu.GELU.forward


REPLACEMENTS = {fused.stock: fused for fused in (LayerNorm, GELU)}
