"""MultiheadAttention: torch's module with transfuse's attention in the middle."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from transfuse.dispatch import dtype_name
from transfuse.ops.attention import scaled_dot_product_attention


class MultiheadAttention(torch.nn.MultiheadAttention):
    """torch.nn.MultiheadAttention: the same constructor, parameters and state_dict; only forward is overridden.

    Args (of forward): as torch's. key_padding_mask and a boolean attn_mask keep torch's meaning here, True = ignore.

    Numerics: those of scaled_dot_product_attention. A query whose keys are all ignored gives the output projection of
        0, where torch gives NaN. Dropout draws other random numbers than torch's.

    Runs torch's own forward: need_weights=True (torch's default: the weights are the result of another formula), and
    nested tensors.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(output, None); with need_weights (output, weights), by torch."""
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"MultiheadAttention: {name} is a {type(tensor).__name__}, expected a Tensor")
        if need_weights or query.is_nested or key.is_nested or value.is_nested:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "MultiheadAttention: attn_mask is None, expected one with is_causal=True (a hint about it)"
            )
        batched = query.dim() == 3
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if tensor.dim() not in (2, 3) or (tensor.dim() == 3) != batched:
                expected = "(batch, length, embed_dim) in the module's order" if batched else "(length, embed_dim)"
                raise ValueError(f"MultiheadAttention: {name} has shape {tuple(tensor.shape)}, expected {expected}")
        self._check_sizes(query, key, value)
        same = query is key, key is value
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        q, k, v = self._project(query, key, value, all(same))
        added = k.shape[1]
        if self.bias_k is not None:
            k = torch.cat((k, self.bias_k.expand(k.shape[0], 1, -1)), dim=1)
            v = torch.cat((v, self.bias_v.expand(v.shape[0], 1, -1)), dim=1)
        q, k, v = (tensor.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for tensor in (q, k, v))
        if self.add_zero_attn:
            k = torch.cat((k, k.new_zeros(*k.shape[:2], 1, k.shape[3])), dim=2)
            v = torch.cat((v, v.new_zeros(*v.shape[:2], 1, v.shape[3])), dim=2)
        added = k.shape[2] - added

        mask, bias = _masks(q, k.shape[2], added, key_padding_mask, attn_mask)
        output = scaled_dot_product_attention(
            q, k, v, mask, self.dropout if self.training else 0.0, attn_bias=bias
        )
        output = linear(output.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        if not batched:
            return output.squeeze(0), None
        return (output if self.batch_first else output.transpose(0, 1)), None

    def _check_sizes(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """As torch: features are the module's, and key and value have query's batch; 1 does not broadcast."""
        batch_dim = 0 if self.batch_first else 1
        sizes = (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim))
        for name, tensor, features in sizes:
            if tensor.shape[-1] != features:
                raise ValueError(f"MultiheadAttention: {name} has {tensor.shape[-1]} features, expected {features}")
            if tensor.dim() == 3 and tensor.shape[batch_dim] != query.shape[batch_dim]:
                found, expected = tensor.shape[batch_dim], query.shape[batch_dim]
                raise ValueError(f"MultiheadAttention: {name} has batch size {found}, expected {expected} (query's)")
        if key.shape[:-1] != value.shape[:-1]:
            found, expected = (t.shape[-2 if self.batch_first or t.dim() == 2 else 0] for t in (value, key))
            raise ValueError(f"MultiheadAttention: value has {found} positions, expected {expected} (key's)")

    def _project(self, query: Tensor, key: Tensor, value: Tensor, is_self: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The three input projections, [B, L, embed_dim] each."""
        if self._qkv_same_embed_dim:
            if is_self:
                return linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(linear(tensor, weight, bias) for tensor, weight, bias in zip((query, key, value), weights, biases))


def _masks(q: Tensor, len_k: int, added: int, key_padding_mask: Tensor | None, attn_mask: Tensor | None):
    """torch's two masks as (boolean keep mask, additive bias), each [B or 1, H or 1, Lq or 1, Lk] or None.

    The last `added` keys are not the caller's (bias_k, add_zero_attn): no mask reaches them.
    """
    batch, heads, len_q, _ = q.shape
    mask = bias = None
    shapes = {
        "key_padding_mask": ((batch, len_k - added), (len_k - added,) if batch == 1 else None),
        "attn_mask": ((len_q, len_k - added), (batch * heads, len_q, len_k - added)),
    }
    for name, given in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        if given is None:
            continue
        if not isinstance(given, Tensor):
            raise TypeError(f"MultiheadAttention: {name} is a {type(given).__name__}, expected a Tensor or None")
        allowed = [shape for shape in shapes[name] if shape is not None]
        if tuple(given.shape) not in allowed:
            expected = " or ".join(map(str, allowed))
            raise ValueError(f"MultiheadAttention: {name} has shape {tuple(given.shape)}, expected {expected}")
        if given.dtype != torch.bool and not given.is_floating_point():
            dtype = dtype_name(given.dtype)
            raise TypeError(f"MultiheadAttention: {name} has dtype {dtype}, expected bool or a float dtype")
        if name == "key_padding_mask":
            given = given.view(batch, 1, 1, len_k - added)
        else:
            given = given.view(*((1, 1) if given.dim() == 2 else (batch, heads)), len_q, len_k - added)
        if given.dtype == torch.bool:
            keep = given.logical_not()
            keep = torch.nn.functional.pad(keep, (0, added), value=True) if added else keep
            mask = keep if mask is None else mask & keep
        else:
            given = torch.nn.functional.pad(given, (0, added)) if added else given
            given = given if given.dtype == q.dtype else given.float()
            bias = given if bias is None else bias + given
    return mask, bias
