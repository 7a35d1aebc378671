"""XLM-RoBERTa: BERT's code (see bert.py) with positions counted from the ids."""

from transformers.models.xlm_roberta import modeling_xlm_roberta as modeling

from transfuse.models.bert import (
    Encoder,
    Intermediate,
    Layer,
    PositionsFromIds,
    ResidualNorm,
    SelfAttention,
    replacements,
)


class XLMRobertaModel(PositionsFromIds, modeling.XLMRobertaModel):
    stock = modeling.XLMRobertaModel


class XLMRobertaEncoder(Encoder, modeling.XLMRobertaEncoder):
    stock = modeling.XLMRobertaEncoder


class XLMRobertaLayer(Layer, modeling.XLMRobertaLayer):
    stock = modeling.XLMRobertaLayer


class XLMRobertaSelfAttention(SelfAttention, modeling.XLMRobertaSelfAttention):
    stock = modeling.XLMRobertaSelfAttention


class XLMRobertaSelfOutput(ResidualNorm, modeling.XLMRobertaSelfOutput):
    stock = modeling.XLMRobertaSelfOutput


class XLMRobertaIntermediate(Intermediate, modeling.XLMRobertaIntermediate):
    stock = modeling.XLMRobertaIntermediate


class XLMRobertaOutput(ResidualNorm, modeling.XLMRobertaOutput):
    stock = modeling.XLMRobertaOutput


REPLACEMENTS = replacements(
    XLMRobertaModel,
    XLMRobertaEncoder,
    XLMRobertaLayer,
    XLMRobertaSelfAttention,
    XLMRobertaSelfOutput,
    XLMRobertaIntermediate,
    XLMRobertaOutput,
)
