"""Contenders that run in torch: stock, ours, torch.compile, and the model's matrix products with nothing between."""

import torch
from torch import nn


class Whole(nn.Module):
    """A transformers model up to what is compared: the mean of the real tokens at unit length, or the head's logits."""

    def __init__(self, folder, kind, **options):
        super().__init__()
        from transformers import AutoModel, AutoModelForSequenceClassification

        self.kind = kind
        library = {"embed": AutoModel, "classify": AutoModelForSequenceClassification}[kind]
        self.model = library.from_pretrained(folder, local_files_only=True, use_safetensors=True, **options).eval()

    def forward(self, input_ids, attention_mask, token_type_ids):
        found = self.model(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        if self.kind == "classify":
            return found.logits
        weights = attention_mask.unsqueeze(-1).to(found.last_hidden_state.dtype)
        mean = (found.last_hidden_state * weights).sum(1) / weights.sum(1)
        return nn.functional.normalize(mean, dim=-1)


def _sentence_transformer(folder):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(folder, device="cpu", local_files_only=True, trust_remote_code=False).eval()


def _products(model, dtype):
    from transformers import AutoConfig

    from transfuse.bench.batches import Products
    from transfuse.bench.product_peak import LayerProducts

    config = AutoConfig.from_pretrained(model["folder"], local_files_only=True)
    run = LayerProducts(Products(config.hidden_size, config.intermediate_size, config.num_hidden_layers), dtype)
    return lambda ids, mask, types: run(int(mask.sum()))


def load(model, threads, how):
    """A callable (ids, mask, types: numpy int64 [batch, length]) -> numpy float32, or None for bare products."""
    torch.set_num_threads(threads)
    if how.startswith("products"):
        return _products(model, torch.bfloat16 if how == "products_bf16" else torch.float32)
    if how == "compile":
        from torch._inductor import config

        config.freezing = True
        call = torch.compile(Whole(model["folder"], model["kind"]), dynamic=True)
    elif model["kind"] == "embed":
        module = _accelerated(_sentence_transformer(model["folder"]), how)
        names = ("input_ids", "attention_mask", "token_type_ids")

        def call(*tensors):
            return module(dict(zip(names, tensors, strict=True)))["sentence_embedding"]
    else:
        call = Whole(model["folder"], model["kind"])
        _accelerated(call.model, how)

    def embed(ids, mask, types):
        with torch.no_grad():
            return call(*map(torch.from_numpy, (ids, mask, types))).float().numpy()

    return embed


def _accelerated(module, how):
    import transfuse

    if how == "stock":
        return module
    options = {"padded": {"padding_free": False}, "ours": {}, "bfloat16": {"dtype": torch.bfloat16}}[how]
    return transfuse.accelerate(module, **options)
