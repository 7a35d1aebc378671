"""TransformerEncoderLayer and TransformerEncoder: torch's modules, their blocks on transfuse's ops."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import gelu as torch_gelu
from torch.nn.functional import linear, relu

from transfuse.dispatch import dtype_name
from transfuse.nn.attention import MultiheadAttention
from transfuse.nn.gelu import GELU
from transfuse.nn.hooks import unhooked
from transfuse.nn.layer_norm import LayerNorm
from transfuse.ops.gelu import gelu
from transfuse.ops.layer_norm import add_layer_norm, layer_norm


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer: the same constructor, parameters, initial values and state_dict.

        x = norm1(x + dropout1(self_attn(x)));  x = norm2(x + dropout2(linear2(dropout(activation(linear1(x))))))

    and with norm_first the norms stand before the blocks. A residual addition and the norm behind it are one pass, so
    are linear1's bias and a GELU.

    Args (of forward): as torch's; in both masks True = ignore. is_causal is a hint that src_mask is the causal mask:
        the mask itself is what is applied.
    Returns: a tensor of src's shape. Padded positions (True in src_key_padding_mask) hold values, in training and in
        eval; torch's inference path puts 0 there when the layer stands in a torch.nn.TransformerEncoder.

    Numerics: those of the ops. A query whose keys are all ignored attends to nothing (the output projection of 0),
        where torch gives NaN. Eval computes what training does without dropout; torch's inference path takes the erf
        form for every GELU, and any value but 0 of a float src_mask for "ignore". Dropout draws other random numbers
        than torch's.

    Runs torch's own forward: nested tensors. A submodule that was replaced, subclassed or has hooks is called as it is.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias, device,
            dtype,
        )
        _take_over(self)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """src: [S, E], or [B, S, E] in the module's order of batch and sequence."""
        if isinstance(src, Tensor) and src.is_nested:
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        self._check(src, src_mask, src_key_padding_mask, is_causal)
        masks = {"attn_mask": src_mask, "key_padding_mask": src_key_padding_mask, "is_causal": is_causal}
        if self.norm_first:
            attended = self._sa_block(_norm(self.norm1, src), **masks)
            normed, x = _add_norm(self.norm2, attended, src)
            return x + self._ff_block(normed)
        x = _add_norm(self.norm1, self._sa_block(src, **masks), src)[0]
        return _add_norm(self.norm2, self._ff_block(x), x)[0]

    def _ff_block(self, x: Tensor) -> Tensor:
        form, first = _gelu_form(self.activation), self.linear1
        if form and type(first) is torch.nn.Linear and first.bias is not None and unhooked(first):
            x = gelu(linear(x, first.weight), form, bias=first.bias)
        else:
            x = first(x)
            x = gelu(x, form) if form else self.activation(x)
        return self.dropout2(self.linear2(self.dropout(x)))

    def _check(self, src, src_mask, src_key_padding_mask, is_causal) -> None:
        """What self_attn would refuse as query, attn_mask and key_padding_mask, by the names the caller used."""
        op = "TransformerEncoderLayer"
        if not isinstance(src, Tensor):
            raise TypeError(f"{op}: src is a {type(src).__name__}, expected a Tensor")
        features, batch_first = self.linear1.in_features, self.self_attn.batch_first
        if src.dim() not in (2, 3) or src.shape[-1] != features:
            expected = f"({'batch, length' if batch_first else 'length, batch'}, {features}) or (length, {features})"
            raise ValueError(f"{op}: src has shape {tuple(src.shape)}, expected {expected}")
        if is_causal and src_mask is None:
            raise RuntimeError(f"{op}: src_mask is None, expected one with is_causal=True (a hint about it)")
        if src.dim() == 2:
            batch, length = 1, src.shape[0]
        else:
            batch, length = src.shape[:2] if batch_first else (src.shape[1], src.shape[0])
        square, lengths = (length, length), (length,) if src.dim() == 2 else (batch, length)
        shapes = {"src_mask": (square, (batch * self.self_attn.num_heads, *square)), "src_key_padding_mask": (lengths,)}
        for name, mask in (("src_mask", src_mask), ("src_key_padding_mask", src_key_padding_mask)):
            if mask is None:
                continue
            if not isinstance(mask, Tensor):
                raise TypeError(f"{op}: {name} is a {type(mask).__name__}, expected a Tensor or None")
            if mask.dtype != torch.bool and not mask.is_floating_point():
                raise TypeError(f"{op}: {name} has dtype {dtype_name(mask.dtype)}, expected bool or a float dtype")
            if tuple(mask.shape) not in shapes[name]:
                expected = " or ".join(map(str, shapes[name]))
                raise ValueError(f"{op}: {name} has shape {tuple(mask.shape)}, expected {expected}")


class TransformerEncoder(torch.nn.TransformerEncoder):
    """torch.nn.TransformerEncoder: the same constructor, parameters and state_dict.

    Args (of the constructor): as torch's. The copies of a torch.nn.TransformerEncoderLayer become ours, the layer that
        was handed in stays what it is; layers of any other class run as they are. enable_nested_tensor and mask_check
        are kept as attributes and have no effect.
    Args (of forward): as torch's. is_causal is a hint about mask, as in TransformerEncoderLayer.
    Returns: a tensor of src's shape. Kept positions are torch's. Padded positions hold values whatever the mode; torch
        gives 0 there (or what ``norm`` makes of 0) where it takes its nested fast path: in eval, without gradients, the
        padding on the right.

    Runs torch's own forward: nested tensors, and stacks with a layer that is not ours.
    """

    def __init__(
        self,
        encoder_layer: torch.nn.TransformerEncoderLayer,
        num_layers: int,
        norm: torch.nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ):
        # False: torch warns of what keeps a layer off its nested path, which is not taken here.
        super().__init__(encoder_layer, num_layers, norm, False, mask_check)
        self.enable_nested_tensor = enable_nested_tensor
        for layer in self.layers:
            if type(layer) is torch.nn.TransformerEncoderLayer:
                layer.__class__ = TransformerEncoderLayer
                _take_over(layer)

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        ours = all(isinstance(layer, TransformerEncoderLayer) for layer in self.layers)
        if not ours or isinstance(src, Tensor) and src.is_nested:
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        output = src
        for layer in self.layers:
            output = layer(output, mask, src_key_padding_mask, bool(is_causal))
        return output if self.norm is None else _norm(self.norm, output)


def _take_over(layer: torch.nn.TransformerEncoderLayer) -> None:
    """Gives the layer's parts our classes where they have torch's; nothing is drawn or copied anew."""
    for part, ours in ((layer.self_attn, MultiheadAttention), (layer.norm1, LayerNorm), (layer.norm2, LayerNorm)):
        if type(part) is ours.__base__:
            part.__class__ = ours


def _is_layer_norm(norm: torch.nn.Module) -> bool:
    """Its call may be left out: nobody listens, and a subclass has a forward of its own."""
    return type(norm) in (LayerNorm, torch.nn.LayerNorm) and unhooked(norm)


def _norm(norm: torch.nn.Module, x: Tensor) -> Tensor:
    return layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps) if _is_layer_norm(norm) else norm(x)


def _add_norm(norm: torch.nn.Module, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """(norm(residual + x), residual + x)."""
    if _is_layer_norm(norm):
        return add_layer_norm(x, residual, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    total = residual + x
    return norm(total), total


def _gelu_form(activation: Callable[[Tensor], Tensor]) -> str:
    """"none" or "tanh" for a GELU whose call may be left out, else empty."""
    if activation is torch_gelu or activation is gelu:
        return "none"
    return activation.approximate if type(activation) in (torch.nn.GELU, GELU) and unhooked(activation) else ""
