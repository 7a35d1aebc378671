"""BERT and the families that share its code: padding-free from the embeddings to the last layer.

    input_ids [B, S] --pack--> [1, T] --embeddings, layers--> [1, T, H] --unpack--> [B, S, H]

T is the number of real tokens. ``BertModel`` packs the ids by the attention mask and hands a ``Packing`` down in the
place of the mask; every module between sees a batch of one long row, so that linear layers, norms and activations need
no word of it. Only ``BertSelfAttention`` looks: it runs varlen attention on views of its three projections. Padded
positions come back as 0, in ``last_hidden_state`` and in every ``hidden_states`` entry.

A call that cannot be packed takes the padded path, where the same modules run on [B, S, H] with the mask of
transformers; ``report()`` counts such calls with their reasons.

Inference on the CPU leaves the modules out: ``Encoder`` hands their parameters to fused_layers.py, packed or padded.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.models.bert import modeling_bert as modeling
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from transfuse import dispatch
from transfuse.models.fused_layers import (
    PART_TOKENS,
    EncoderLayer,
    FusedStack,
    forget,
    fused_stack,
    gelu_form,
)
from transfuse.models.packed_linear import inference_on_cpu
from transfuse.models.swap import (
    FAMILIES,
    PACKED,
    Swapped,
    count_call,
    is_exchanged,
    replacement_of,
    stock_class,
)
from transfuse.nn.hooks import unhooked
from transfuse.ops.attention import IMPLEMENTATIONS, scaled_dot_product_attention
from transfuse.ops.encoder_layer import Sequences
from transfuse.ops.gelu import gelu
from transfuse.ops.layer_norm import add_layer_norm
from transfuse.ops.packing import Packing, pack, unpack
from transfuse.ops.varlen_attention import varlen_attention

# Implementations whose mask format is known: "sdpa" gives a boolean keep-mask, "eager" a float mask of finfo.min.
_KNOWN_ATTENTION = ("sdpa", "eager")
_Maybe: TypeAlias = torch.Tensor | None
# Keyword arguments of a call that do not change what the encoder computes.
_HARMLESS = frozenset({"return_dict", "num_items_in_batch"})
# Arguments of an encoder's call that fused layers know nothing of, where they are given or set.
_STOCK_ARGUMENTS = ("encoder_hidden_states", "encoder_attention_mask", "past_key_values")
_STOCK_FLAGS = ("use_cache", "output_attentions", "output_hidden_states")


class PackedModel(Swapped):
    """The model: packs before the embeddings, unpacks after the last layer."""

    needs_packing = True
    output_class = BaseModelOutputWithPoolingAndCrossAttentions

    @classmethod
    def why_not(cls, module: nn.Module) -> str:
        if module.config.is_decoder:
            return "it is a decoder"
        if module.config._attn_implementation not in _KNOWN_ATTENTION:
            return f"its attention implementation is {module.config._attn_implementation!r}"
        return ""

    @classmethod
    def is_custom_code(cls) -> bool:
        return cls.is_remote_code()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The stock forward; the signature stays because trainers and sentence-transformers read it."""
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )

    def fused(self, **arguments: Any) -> Any:
        reason = self._why_padded(**arguments)
        if reason:
            count_call(self, reason)
            return self.stock_forward(**arguments)
        count_call(self, PACKED)
        return self._packed_forward(**arguments)

    def _packed_forward(
        self, *, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds,
        output_hidden_states=None, return_dict=None, **ignored: Any,
    ) -> Any:
        shape = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        position_ids = self.default_positions(input_ids, inputs_embeds, shape) if position_ids is None else position_ids
        position_ids, packing = _pack(position_ids.expand(shape), attention_mask)
        hidden_states = self.embeddings(
            input_ids=None if input_ids is None else _take(input_ids, packing),
            token_type_ids=None if token_type_ids is None else _take(token_type_ids.expand(shape), packing),
            position_ids=position_ids,
            inputs_embeds=None if inputs_embeds is None else _take(inputs_embeds, packing),
        )  # [1, T, E]
        if hasattr(self, "embeddings_project"):
            hidden_states = self.embeddings_project(hidden_states)

        want_all = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        encoded = self.encoder(hidden_states, packing, output_hidden_states=want_all)
        last = _unpack(encoded.last_hidden_state, packing)
        fields: dict[str, Any] = {"last_hidden_state": last}
        pooler = getattr(self, "pooler", None)
        if pooler is not None:
            fields["pooler_output"] = pooler(last)
        if want_all:
            fields["hidden_states"] = (*(_unpack(h, packing) for h in encoded.hidden_states[:-1]), last)
        output = self.output_class(**fields)
        return_dict = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def default_positions(self, input_ids: _Maybe, inputs_embeds: _Maybe, shape: torch.Size) -> torch.Tensor:
        """The positions stock gives to every place of the padded batch, [1 or B, S]."""
        return self.embeddings.position_ids[:, : shape[1]]

    def _why_padded(
        self, *, input_ids, attention_mask, inputs_embeds, token_type_ids, position_ids,
        output_hidden_states=None, output_attentions=None, use_cache=None, **others: Any,
    ) -> str:
        """The reason why this call takes the padded path; empty when it can be packed."""
        given = input_ids if inputs_embeds is None else inputs_embeds
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return "the call is traced: the number of real tokens is not known"
        if (input_ids is None) == (inputs_embeds is None) or given.ndim != (2 if inputs_embeds is None else 3):
            return "the input is not of the usual shape"
        if not isinstance(given, torch.Tensor) or type(given) not in _PLAIN_TENSORS:
            return f"the input is a {type(given).__name__}"
        if attention_mask is not None:
            if attention_mask.ndim != 2:
                return f"the attention mask has {attention_mask.ndim} dimensions"
            if attention_mask.is_floating_point():
                return "the attention mask is a float mask"
            if attention_mask.shape != given.shape[:2]:
                return "the attention mask has another shape than the input"
        if self.config.is_decoder:
            return "the model is a decoder"
        if self.config.output_attentions if output_attentions is None else output_attentions:
            return "output_attentions=True"
        if not isinstance(output_hidden_states, (bool, type(None))):
            return "output_hidden_states selects layers"
        for name, value in others.items():
            if value is not None and name not in _HARMLESS:
                return f"the argument {name} is given"
        if self.config._attn_implementation not in _KNOWN_ATTENTION:
            return f"the attention implementation is {self.config._attn_implementation!r}"
        if given.shape[1] > self.embeddings.position_ids.shape[-1]:
            return "the input is longer than the position table"
        # Whatever a Packing passes through on its way to the attention must take it for a mask.
        if not isinstance(self.encoder, Encoder) or "forward" in self.encoder.__dict__:
            return "the encoder is not accelerated"
        for layer in self.encoder.layer:
            if not isinstance(layer, Layer) or "forward" in layer.__dict__:
                return "a layer is not accelerated"
            attention = getattr(layer.attention, "self", None)
            if not isinstance(attention, SelfAttention) or type(layer.attention).__module__ not in FAMILIES:
                return "a layer's attention is not accelerated"
            if any("forward" in part.__dict__ for part in (layer.attention, attention)):
                return "a layer's attention is not accelerated"
            if layer.chunk_size_feed_forward:
                return "chunk_size_feed_forward is set"
        return ""


class PositionsFromIds(PackedModel):
    """The RoBERTa families: positions count the ids that are not padding, whatever the mask says."""

    def default_positions(self, input_ids: _Maybe, inputs_embeds: _Maybe, shape: torch.Size) -> torch.Tensor:
        embeddings = self.embeddings
        if input_ids is not None:
            return embeddings.create_position_ids_from_input_ids(input_ids, embeddings.padding_idx)
        return embeddings.create_position_ids_from_inputs_embeds(inputs_embeds, embeddings.padding_idx)


class Encoder(Swapped):
    """The stack of layers. On packed input it keeps the hidden states itself, where stock has hooks do it."""

    takes_dtype = True

    def train(self, mode: bool = True) -> nn.Module:
        if mode:
            forget(self)
        return super().train(mode)

    def fused(self, hidden_states: torch.Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        packed = isinstance(attention_mask, Packing)
        states = [hidden_states] if packed and kwargs["output_hidden_states"] else None
        stack = None
        reason = self._why_by_module(hidden_states, attention_mask, args, kwargs)
        if not reason:
            stack = fused_stack(self, self.layer, self.compute_dtype or hidden_states.dtype, self._encoder_layers)
            reason = "" if stack else "a module of the encoder is hooked, in training mode, or not the family's own"
        if reason and self.compute_dtype is not None:
            count_call(self, f"computed in the model's own dtype: {reason}")
        if stack:
            hidden_states = _run_stack(stack, hidden_states, attention_mask, states)
        elif packed:
            for layer in self.layer:
                hidden_states = layer(hidden_states, attention_mask)
                if states is not None:
                    states.append(hidden_states)
        else:
            return self.stock_forward(hidden_states, attention_mask, *args, **kwargs)
        return modeling.BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden_states, hidden_states=states)

    def _why_by_module(self, hidden_states: torch.Tensor, attention_mask: Any, args: tuple, kwargs: dict) -> str:
        """The reason why a call runs module by module; empty when fused_layers.py may do it."""
        if not inference_on_cpu(hidden_states):
            return "training, autocast, tracing, or a CPU or device without packed products"
        if hidden_states.numel() == 0 or len(self.layer) == 0:
            return "the input or the encoder is empty"
        if dispatch.setting() not in ("auto", "cpu"):
            return f"backend {dispatch.setting()!r}"
        if isinstance(attention_mask, Packing):
            return ""
        if args or any(kwargs.get(name) is not None for name in _STOCK_ARGUMENTS) or any(map(kwargs.get, _STOCK_FLAGS)):
            return "an argument that only stock knows"
        if self.config._attn_implementation not in _KNOWN_ATTENTION:
            return f"attention implementation {self.config._attn_implementation!r}"
        if attention_mask is not None and attention_mask.is_floating_point() and self.compute_dtype is not None:
            return "a float mask"
        return ""

    def _encoder_layers(self) -> list[EncoderLayer] | None:
        """The modules of every layer; None where one is not exchanged or not of the family."""
        return [_encoder_layer(layer) for layer in self.layer] if all(map(_is_known, self.layer)) else None


def _is_known(layer: nn.Module) -> bool:
    attention = layer.attention
    return (
        (is_exchanged(layer) or type(layer).__module__ in FAMILIES)
        and type(attention).__module__ in FAMILIES
        and all(map(is_exchanged, (attention.self, attention.output, layer.intermediate, layer.output)))
    )


def _encoder_layer(layer: nn.Module) -> EncoderLayer:
    attention, output, intermediate = layer.attention.self, layer.attention.output, layer.intermediate
    return EncoderLayer(
        attention, attention.query, attention.key, attention.value, output.dense, output.LayerNorm,
        intermediate.dense, intermediate.intermediate_act_fn, layer.output.dense, layer.output.LayerNorm,
    )


def _run_stack(
    stack: FusedStack, hidden_states: torch.Tensor, mask: Any, states: list[torch.Tensor] | None
) -> torch.Tensor:
    """[1, T, H] of a Packing or [B, S, H] with the mask of transformers; ``states`` receives every layer's output."""
    shape, own_dtype = hidden_states.shape, hidden_states.dtype
    hidden = hidden_states.reshape(-1, shape[-1]).to(stack.dtype).contiguous()
    if states is not None:
        of_layers: list[torch.Tensor] = []
        hidden = stack.run(hidden, _packed_sequences(mask), of_layers)
        states.extend(x.view(shape).to(own_dtype) for x in of_layers)
    elif isinstance(mask, Packing):
        parts = [stack.run(hidden[rows], _packed_sequences(part)) for rows, part in mask.parts(PART_TOKENS)]
        hidden = torch.cat(parts) if len(parts) > 1 else parts[0]
    else:
        hidden = stack.run(hidden, Sequences(None, *shape[:2], mask))
    return hidden.view(shape).to(own_dtype)


def _packed_sequences(packing: Packing) -> Sequences:
    return Sequences(packing.cu_seqlens, packing.cu_seqlens.shape[0] - 1, packing.max_seqlen)


class Layer(Swapped):
    """One layer. On packed input it calls its parts directly: stock inspects a signature on every call to chunk."""

    needs_packing = True

    def fused(self, hidden_states: torch.Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not isinstance(attention_mask, Packing):
            return self.stock_forward(hidden_states, attention_mask, *args, **kwargs)
        return self.feed_forward_chunk(self.attention(hidden_states, attention_mask)[0])


class SelfAttention(Swapped):
    """Fused attention: varlen on packed tokens, else with the mask of transformers."""

    backends = ("auto", *(implementation.name for implementation in IMPLEMENTATIONS))

    @classmethod
    def why_not(cls, module: nn.Module) -> str:
        if module.is_decoder:
            return "it belongs to a decoder"
        if module.config._attn_implementation not in _KNOWN_ATTENTION:
            return f"its attention implementation is {module.config._attn_implementation!r}"
        return ""

    def fused(
        self, hidden_states: torch.Tensor, attention_mask: Any = None, past_key_values: Any = None, **kwargs: Any
    ) -> Any:
        packed = isinstance(attention_mask, Packing)
        if not packed:
            reason = self._why_stock(past_key_values, kwargs)
            if reason:
                count_call(self, f"stock attention: {reason}")
                return self.stock_forward(hidden_states, attention_mask, past_key_values=past_key_values, **kwargs)
        heads = (*hidden_states.shape[:-1], self.num_attention_heads, self.attention_head_size)
        query = self.query(hidden_states).view(heads)  # [B, S, heads, D], views: the kernels take strides
        key = self.key(hidden_states).view(heads)
        value = self.value(hidden_states).view(heads)
        dropout_p = self.dropout.p if self.training else 0.0
        if packed:
            packing = attention_mask
            output = varlen_attention(
                query[0], key[0], value[0], packing.cu_seqlens, max_seqlen_q=packing.max_seqlen, dropout_p=dropout_p,
                scale=self.scaling,
            ).unsqueeze(0)
        else:
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))
            output = scaled_dot_product_attention(
                query, key, value, attention_mask, dropout_p, scale=self.scaling
            ).transpose(1, 2)
        return output.flatten(-2), None  # a view of the kernel's [.., S, heads, D]

    def _why_stock(self, past_key_values: Any, kwargs: dict[str, Any]) -> str:
        """The reason why a call on padded input runs stock's attention; empty when ours can do it."""
        if past_key_values is not None or self.is_decoder or kwargs.get("is_causal"):
            return "decoder"
        if self.config._attn_implementation not in _KNOWN_ATTENTION:
            return f"attention implementation {self.config._attn_implementation!r}"
        if kwargs.get("output_attentions", self.config.output_attentions):
            return "output_attentions=True"
        return ""


class ResidualNorm(Swapped):
    """dense -> dropout -> LayerNorm(x + residual), the last two in one pass."""

    def fused(self, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
        norm = self.LayerNorm
        if stock_class(norm) is not nn.LayerNorm or not unhooked(norm):  # a subclass has a forward of its own
            return self.stock_forward(hidden_states, input_tensor)
        hidden_states = self.dropout(self.dense(hidden_states))
        return add_layer_norm(hidden_states, input_tensor, norm.normalized_shape, norm.weight, norm.bias, norm.eps)[0]


class Intermediate(Swapped):
    """dense -> GELU, the bias added inside the GELU."""

    @classmethod
    def why_not(cls, module: nn.Module) -> str:
        act = module.intermediate_act_fn
        fused = replacement_of(stock_class(act)) if isinstance(act, nn.Module) else None
        if fused is not None and (hasattr(fused, "approximate") or fused.stock is nn.GELU) and not fused.why_not(act):
            return ""
        return f"its activation {type(act).__name__} is not a GELU that transfuse knows"

    def fused(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dense, act = self.dense, self.intermediate_act_fn
        form = gelu_form(act)
        if not form or type(dense) is not nn.Linear or dense.bias is None or not (unhooked(dense) and unhooked(act)):
            return self.stock_forward(hidden_states)
        return gelu(F.linear(hidden_states, dense.weight), form, bias=dense.bias)


def _pack(padded: torch.Tensor, attention_mask: torch.Tensor | None) -> tuple[torch.Tensor, Packing]:
    """pack() with the leading 1 that transformers expects; no mask keeps everything."""
    if attention_mask is None:
        attention_mask = torch.ones((), dtype=torch.bool, device=padded.device).expand(padded.shape)
    packed, packing = pack(padded, attention_mask)
    return packed.unsqueeze(0), packing


def _take(padded: torch.Tensor, packing: Packing) -> torch.Tensor:
    """The kept places of another padded tensor, [1, T, ...]."""
    return pack(padded, packing)[0].unsqueeze(0)


def _unpack(packed: torch.Tensor, packing: Packing) -> torch.Tensor:
    return unpack(packed[0], packing)


_PLAIN_TENSORS = (torch.Tensor, nn.Parameter)


def replacements(*fused: type[Swapped]) -> dict[type, type[Swapped]]:
    """Stock class -> fused class, and lets transformers record the hidden states of the fused model's padded path."""
    for cls in fused:
        if issubclass(cls, PackedModel):
            # transformers looks this up by the class's printed name, and fills it only in __init__.
            dict.__setitem__(_CAN_RECORD_REGISTRY, str(cls), cls._can_record_outputs)
    return {cls.stock: cls for cls in fused}


class BertModel(PackedModel, modeling.BertModel):
    stock = modeling.BertModel


class BertEncoder(Encoder, modeling.BertEncoder):
    stock = modeling.BertEncoder


class BertLayer(Layer, modeling.BertLayer):
    stock = modeling.BertLayer


class BertSelfAttention(SelfAttention, modeling.BertSelfAttention):
    stock = modeling.BertSelfAttention


class BertSelfOutput(ResidualNorm, modeling.BertSelfOutput):
    stock = modeling.BertSelfOutput


class BertIntermediate(Intermediate, modeling.BertIntermediate):
    stock = modeling.BertIntermediate


class BertOutput(ResidualNorm, modeling.BertOutput):
    stock = modeling.BertOutput


REPLACEMENTS = replacements(
    BertModel,
    BertEncoder,
    BertLayer,
    BertSelfAttention,
    BertSelfOutput,
    BertIntermediate,
    BertOutput,
)
