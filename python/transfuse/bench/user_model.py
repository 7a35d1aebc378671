"""`transfuse bench --model`: one model of a user's own, stock against ours on the user's text, in this process."""

import copy
import math
import time
import warnings

import torch

import transfuse
from transfuse.bench import batches, model_rows, product_peak
from transfuse.bench.harness import compiled
from transfuse.bench.turns import ContenderLost, take_turns
from transfuse.testing import MODEL_COSINE_BFLOAT16, MODEL_TOLERANCE

LONGEST = 512  # tokens of a text where neither model nor tokenizer says how many it takes
BLOCKS = 8
TURN_SECONDS = 0.05  # a turn lasts at least this long: a short text is done over and over
LABELS = {"stock": "stock", "ours": "ours", "ours_bf16": "ours bf16", "compile": "torch.compile"}
WORKLOAD = "model"


def longest_text(model, tokenizer):
    """Tokens at which a text is cut: the model's own limit, or the tokenizer's, or LONGEST."""
    config = getattr(model, "config", None)
    limits = (
        getattr(model, "max_seq_length", None),
        tokenizer.model_max_length,
        getattr(config, "max_position_embeddings", None),
    )
    return min([limit for limit in limits if isinstance(limit, int) and 0 < limit < 1 << 20], default=LONGEST)


def embedding(model, features):
    """A SentenceTransformer's own embedding; of other models the mean of the real tokens, at unit length."""
    if hasattr(model, "max_seq_length"):
        return model(dict(features))["sentence_embedding"]
    hidden = model(**features).last_hidden_state
    weights = features["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1).clamp(min=1), dim=-1)


def contender(name, model):
    """(module to call, or ContenderLost with the reason): 'stock', 'ours', 'ours_bf16' or 'compile'."""
    if name == "stock":
        return model
    if name == "compile":
        return compiled(model, dynamic=True)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", transfuse.TransfuseWarning)
            dtype = torch.bfloat16 if name == "ours_bf16" else None
            ours = transfuse.accelerate(copy.deepcopy(model), dtype=dtype)
    except (NotImplementedError, ValueError, RuntimeError) as error:
        raise ContenderLost(str(error)) from None
    nothing = [str(entry.message) for entry in said if "nothing changed" in str(entry.message)]
    if nothing:
        raise ContenderLost(nothing[0])
    return ours


def measure(model, tokenizer, texts, *, names, batch_size=32, rounds=6, timer=time.perf_counter, on_step=None):
    """Rows (model_rows) of stock and each contender on `texts`, in batches as they come, and facts beside them.

    Args:
        model: a SentenceTransformer, or a transformers model whose output has last_hidden_state; on the CPU, in eval.
        names: contenders beside stock: 'ours', 'ours_bf16', 'compile'.
        on_step: called with words about what runs.
    Returns: (rows, facts): facts are tokenisation_s, product_peak_gflops (empty where the products are unknown).
    """
    say = on_step or (lambda words: None)
    say("tokenising")
    limits = {"truncation": True, "max_length": longest_text(model, tokenizer)}
    start = timer()
    lengths = [len(ids) for ids in tokenizer(texts, **limits)["input_ids"]]
    facts = {"tokenisation_s": timer() - start, "product_peak_gflops": {}}
    groups = batches.split(batches.order_of("arrival", texts, lengths), batch_size)
    features = [
        dict(tokenizer([texts[index] for index in group], padding=True, return_tensors="pt", **limits))
        for group in groups
    ]
    fill, products = batches.fill_of(groups, lengths), _products(model)
    work = {"batch_size": batch_size, "order": "arrival", "passages": len(texts)}
    work.update(tokens=fill.tokens, padded_tokens=fill.padded_tokens, fill=fill.fill)
    if products:
        say("the rate of matrix products")
        facts["product_peak_gflops"] = {
            name: product_peak.peak_gflops(getattr(torch, name)) for name in ("float32", "bfloat16")
        }

    names = ["stock", *(name for name in names if name != "stock")]
    modules, lost, parity, stock, fastest_s = {}, {}, {}, None, float("inf")
    for name in names:
        say(f"{LABELS[name]}: first pass")
        try:
            modules[name] = contender(name, model)
            with torch.no_grad():
                start = timer()
                found = torch.cat([embedding(modules[name], batch) for batch in features]).float().numpy()
                fastest_s = min(fastest_s, timer() - start)
            stock = found if stock is None else stock
            parity[name] = model_rows.difference(stock, found)
        except ContenderLost as reason:
            lost[name] = str(reason)
            modules.pop(name, None)

    blocks = batches.blocks_of(groups, BLOCKS)
    times = max(1, math.ceil(TURN_SECONDS * len(blocks) / max(fastest_s, 1e-6)))

    def turn(module):
        def call(block):
            with torch.no_grad():
                start = timer()
                for _ in range(times):
                    for index in blocks[block]:
                        embedding(module, features[index])
                return (timer() - start) / times

        return call

    found = take_turns(
        {name: turn(module) for name, module in modules.items()},
        len(blocks),
        rounds,
        on_round=lambda done, _: say(f"round {done} of {rounds}"),
    )
    rows = []
    for name in names:
        dtype = "bfloat16" if name == "ours_bf16" else "float32"
        which = {"title": WORKLOAD, "label": LABELS[name], "dtype": dtype, **work}
        if name in lost:
            rows.append(model_rows.row(WORKLOAD, name, "not available", lost[name], **which))
            continue
        timed = model_rows.timed(found, name, fill.tokens, modules)
        peak = facts["product_peak_gflops"].get(dtype)
        share = products.flops(fill.tokens) / (peak * 1e9) / timed["median_s"] if products and peak else None
        rows.append(model_rows.row(WORKLOAD, name, **which, **timed, **parity[name], product_share=share))
    return rows, facts


def _products(model):
    """batches.Products of a BERT-like encoder, or None where the config does not say."""
    inner = model[0].auto_model if hasattr(model, "max_seq_length") else model
    config = getattr(inner, "config", None)
    sizes = [getattr(config, name, None) for name in ("hidden_size", "intermediate_size", "num_hidden_layers")]
    encoder = not getattr(config, "is_decoder", False) and hasattr(inner, "encoder")
    return batches.Products(*sizes) if encoder and all(isinstance(size, int) for size in sizes) else None


def wrong(rows):
    """Words for every row of ours whose results are not stock's; empty where all are."""
    said = []
    for row in rows:
        if row["status"] != "ok":
            continue
        if row["contender"] == "ours" and not row["max_abs_difference"] <= MODEL_TOLERANCE:
            said.append(f"ours differs from stock by {row['max_abs_difference']:.1e}, allowed {MODEL_TOLERANCE:.0e}")
        if row["contender"] == "ours_bf16" and not row["min_cosine"] >= MODEL_COSINE_BFLOAT16:
            said.append(f"ours bf16 has cosine {row['min_cosine']:.5f} to stock, allowed {MODEL_COSINE_BFLOAT16}")
    return said
