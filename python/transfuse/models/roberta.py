"""RoBERTa: BERT's code (see bert.py) with positions counted from the ids."""

from transformers.models.roberta import modeling_roberta as modeling

from transfuse.models.bert import (
    Encoder,
    Intermediate,
    Layer,
    PositionsFromIds,
    ResidualNorm,
    SelfAttention,
    replacements,
)


class RobertaModel(PositionsFromIds, modeling.RobertaModel):
    stock = modeling.RobertaModel


class RobertaEncoder(Encoder, modeling.RobertaEncoder):
    stock = modeling.RobertaEncoder


class RobertaLayer(Layer, modeling.RobertaLayer):
    stock = modeling.RobertaLayer


class RobertaSelfAttention(SelfAttention, modeling.RobertaSelfAttention):
    stock = modeling.RobertaSelfAttention


class RobertaSelfOutput(ResidualNorm, modeling.RobertaSelfOutput):
    stock = modeling.RobertaSelfOutput


class RobertaIntermediate(Intermediate, modeling.RobertaIntermediate):
    stock = modeling.RobertaIntermediate


class RobertaOutput(ResidualNorm, modeling.RobertaOutput):
    stock = modeling.RobertaOutput


REPLACEMENTS = replacements(
    RobertaModel,
    RobertaEncoder,
    RobertaLayer,
    RobertaSelfAttention,
    RobertaSelfOutput,
    RobertaIntermediate,
    RobertaOutput,
)
