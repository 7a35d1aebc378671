"""ELECTRA: BERT's code (see bert.py), a projection after the embeddings, no pooler."""

from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.electra import modeling_electra as modeling

from transfuse.models.bert import Encoder, Intermediate, Layer, PackedModel, ResidualNorm, SelfAttention, replacements


class ElectraModel(PackedModel, modeling.ElectraModel):
    stock = modeling.ElectraModel
    output_class = BaseModelOutputWithPastAndCrossAttentions


class ElectraEncoder(Encoder, modeling.ElectraEncoder):
    stock = modeling.ElectraEncoder


class ElectraLayer(Layer, modeling.ElectraLayer):
    stock = modeling.ElectraLayer


class ElectraSelfAttention(SelfAttention, modeling.ElectraSelfAttention):
    stock = modeling.ElectraSelfAttention


class ElectraSelfOutput(ResidualNorm, modeling.ElectraSelfOutput):
    stock = modeling.ElectraSelfOutput


class ElectraIntermediate(Intermediate, modeling.ElectraIntermediate):
    stock = modeling.ElectraIntermediate


class ElectraOutput(ResidualNorm, modeling.ElectraOutput):
    stock = modeling.ElectraOutput


REPLACEMENTS = replacements(
    ElectraModel,
    ElectraEncoder,
    ElectraLayer,
    ElectraSelfAttention,
    ElectraSelfOutput,
    ElectraIntermediate,
    ElectraOutput,
)
