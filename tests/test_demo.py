"""The demo's claims: what it compares, what it counts, when it fails; it runs on the real model without a network."""

import json
import socket

import pytest
import torch

from transfuse.bench import similarity
from transfuse.bench.similarity import Similarity, compare_embeddings
from transfuse.cli import demo, main
from transfuse.testing import MODEL_TOLERANCE, NEIGHBOUR_MARGIN

SAME = Similarity(texts=4, max_abs_difference=1e-7, neighbours_checked=4, neighbours_changed=0, spearman=1.0)


def _unit(*rows):
    return torch.nn.functional.normalize(torch.tensor(rows, dtype=torch.float32), dim=-1)


def test_equal_embeddings_are_the_same():
    vectors = _unit((1, 0, 0), (1, 1, 0), (0, 1, 1), (0, 1, 2))
    found = compare_embeddings(vectors, vectors.clone())
    assert found == Similarity(4, 0.0, 4, 0, pytest.approx(1.0)) and found.ok


def test_a_changed_neighbour_is_seen_unless_it_was_a_tie():
    stock = _unit((1, 0), (1, 0.1), (1, -0.2))
    changed = _unit((1, 0), (1, 0.2), (1, -0.1))
    found = compare_embeddings(stock, changed)
    assert found.neighbours_checked == 3 and found.neighbours_changed == 1 and not found.ok
    # Now the first text's two neighbours are equally far, within the margin: which one wins is noise.
    tie = _unit((1, 0), (1, 0.1), (1, -0.1))
    nudged = _unit((1, 0), (1, 0.10001), (1, -0.1))
    assert NEIGHBOUR_MARGIN > 1e-6 and compare_embeddings(tie, nudged).neighbours_changed == 0


@pytest.mark.parametrize(
    "wrong",
    [
        SAME.__class__(4, 2 * MODEL_TOLERANCE, 4, 0, 1.0),
        SAME.__class__(4, 0.0, 4, 1, 1.0),
        SAME.__class__(4, 0.0, 4, 0, 0.9),
        SAME.__class__(4, float("nan"), 4, 0, 1.0),
    ],
)
def test_each_figure_can_fail_alone(wrong):
    assert SAME.ok and not wrong.ok


def test_spearman_by_hand():
    """Ranks 1 2 3 4 5 against 2 1 4 3 5: 1 - 6 * 4 / (5 * 24) = 0.8. With a tie, ranks are shared: 0 0.5 -> 1.5 1.5."""
    assert similarity.spearman(torch.tensor([1.0, 2, 3, 4, 5]), torch.tensor([20.0, 10, 40, 30, 50])) == pytest.approx(
        0.8
    )
    assert similarity.ranks(torch.tensor([7.0, 3, 7, 9])).tolist() == [1.5, 0, 1.5, 3]


def test_padded_tokens_by_hand():
    lengths = [3] * 31 + [10] + [2, 5]
    assert demo.padded_tokens(lengths) == 32 * 10 + 2 * 5


@pytest.mark.parametrize(
    "figures, same, restored, words",
    [
        ({"speedup_low": 1.4}, SAME, True, None),
        (
            {"speedup_low": 1.3},
            SAME,
            True,
            "FAILED: not shown to be 1.30 times as fast: the 95 % interval begins at 1.30, expected above 1.30",
        ),
        ({"speedup_low": float("nan")}, SAME, True, "FAILED: not shown to be 1.30 times as fast"),
        ({"speedup_low": 1.4}, Similarity(4, 1e-3, 4, 0, 1.0), True, "FAILED: the embeddings are not stock's"),
        ({"speedup_low": 1.4}, SAME, False, "FAILED: restore() did not give stock's embeddings back"),
    ],
)
def test_exit_code_says_whether_the_claims_hold(figures, same, restored, words, capsys):
    assert demo._verdict(figures, same, restored) == (0 if words is None else 1)
    printed = capsys.readouterr().out
    assert printed == "" if words is None else printed.startswith(words)


def test_demo_runs_on_the_real_model_without_a_network(tmp_path, capsys, monkeypatch):
    """A small run of the whole thing. Speed is not judged here (8 passages, a busy machine): parity and form are."""

    def refuse(*_):
        raise AssertionError("the demo asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    torch.set_num_threads(1)  # two threads that spin wait for each other on a busy machine
    monkeypatch.setattr(demo, "ARRIVAL_PASSAGES", 4)
    monkeypatch.setattr(demo, "REPORT_PASSAGES", 2)
    picture, rows = tmp_path / "demo.png", tmp_path / "demo.json"
    code = main(["demo", "--passages", "8", "--rounds", "2", "--out", str(picture), "--json", str(rows), "--quiet"])
    printed = capsys.readouterr()
    document = json.loads(rows.read_text())
    figures = document["rows"][0]
    assert document["command"] == "demo" and figures["passages"] == 8 and figures["model"] == "all-MiniLM-L6-v2"
    assert (
        figures["parity"]["ok"]
        and figures["parity"]["max_abs_difference"] <= MODEL_TOLERANCE
        and figures["restored_exactly"]
    )
    assert (
        figures["tokens"] < figures["padded_tokens"] and figures["fill"] == figures["tokens"] / figures["padded_tokens"]
    )
    assert figures["speedup_low"] <= figures["speedup"] <= figures["speedup_high"] and len(figures["stock_s"]) == 2
    assert code == (0 if figures["speedup_low"] > demo.BAR else 1)
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000
    for words in (
        "Same?",
        "nearest neighbours changed: 0 of",
        "Spearman",
        "95 % interval",
        "Replaced",
        "? Is the order of dictionary keys kept?",
        "bit for bit",
    ):
        assert words in printed.out
    assert printed.err == ""


def test_search_finds_the_passage_that_answers():
    model = demo.load_stock()
    texts = [
        "Dictionaries preserve insertion order.",
        "Bananas are yellow.",
        "The finally clause runs whether or not an exception occurred.",
    ]
    found = demo.search(model, texts, demo.encode(model, texts))
    assert found[0][1][0][1] == texts[0] and found[2][1][0][1] == texts[2]


def test_report_asks_no_network_for_a_name(monkeypatch, capsys, tmp_path):
    """With the offline switch off, so that only the command itself can keep it from asking."""
    from huggingface_hub import constants, file_download
    from transformers import BertConfig, BertModel

    asked = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: asked.append(address))
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: asked.append(address))
    assert main(["report", "nobody/no-such-model"]) == 2 and not asked
    message = "model is 'nobody/no-such-model', expected a folder or a model in Hugging Face's cache"
    assert capsys.readouterr().err == f"transfuse report: {message}\n"
    config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    commit = "0" * 40
    (tmp_path / "models--some--bert" / "refs").mkdir(parents=True)
    (tmp_path / "models--some--bert" / "refs" / "main").write_text(commit)
    BertModel(config).save_pretrained(tmp_path / "models--some--bert" / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(file_download, "HF_HUB_CACHE", str(tmp_path), raising=False)
    for name in ("some/bert", "all-MiniLM-L6-v2"):
        assert main(["report", name]) == 0 and not asked
        assert "preview: not accelerated yet" in capsys.readouterr().out


def test_report_of_the_bundled_model_changes_nothing(capsys):
    assert main(["report", "all-MiniLM-L6-v2"]) == 0
    assert "transfuse report on SentenceTransformer (preview: not accelerated yet)" in capsys.readouterr().out
