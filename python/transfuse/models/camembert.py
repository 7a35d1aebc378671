"""CamemBERT: BERT's code (see bert.py) with positions counted from the ids."""

from transformers.models.camembert import modeling_camembert as modeling

from transfuse.models.bert import (
    Encoder,
    Intermediate,
    Layer,
    PositionsFromIds,
    ResidualNorm,
    SelfAttention,
    replacements,
)


class CamembertModel(PositionsFromIds, modeling.CamembertModel):
    stock = modeling.CamembertModel


class CamembertEncoder(Encoder, modeling.CamembertEncoder):
    stock = modeling.CamembertEncoder


class CamembertLayer(Layer, modeling.CamembertLayer):
    stock = modeling.CamembertLayer


class CamembertSelfAttention(SelfAttention, modeling.CamembertSelfAttention):
    stock = modeling.CamembertSelfAttention


class CamembertSelfOutput(ResidualNorm, modeling.CamembertSelfOutput):
    stock = modeling.CamembertSelfOutput


class CamembertIntermediate(Intermediate, modeling.CamembertIntermediate):
    stock = modeling.CamembertIntermediate


class CamembertOutput(ResidualNorm, modeling.CamembertOutput):
    stock = modeling.CamembertOutput


REPLACEMENTS = replacements(
    CamembertModel,
    CamembertEncoder,
    CamembertLayer,
    CamembertSelfAttention,
    CamembertSelfOutput,
    CamembertIntermediate,
    CamembertOutput,
)
