"""accelerate(), restore(), report(), verify(): what they change, what they leave, what they say."""

import copy
import io
import os
import pickle
import re
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from torch import nn
from transformers import AutoModel, BertConfig, BertForSequenceClassification, BertModel
from transformers.activations import GELUActivation
from transformers.models.bert import modeling_bert

import transfuse
import transfuse.nn
from transfuse import TransfuseWarning, extension
from transfuse.models import swap
from transfuse.testing import MODEL_TOLERANCE, assert_model_matches


def make_bert(cls=BertForSequenceClassification):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                        max_position_embeddings=20, initializer_range=0.5)
    return cls(config).eval()


def batch():
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    return {"input_ids": torch.arange(1, 11).reshape(2, 5) * mask, "attention_mask": mask}


class Block(nn.Module):
    """A model of somebody's own, with the two modules that are known anywhere."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8, eps=0.3)
        self.first = nn.Linear(8, 8)
        self.act = nn.GELU(approximate="tanh")
        self.plain = nn.LayerNorm((2, 8), elementwise_affine=False)

    def forward(self, x):
        return self.plain(self.act(self.first(self.norm(x))))


def outputs(model, **inputs):
    with torch.no_grad():
        return model(**(inputs or batch())).logits


# --- what is changed, and how it is undone ---


def test_in_place_and_nothing_but_classes():
    model = make_bert()
    before = copy.deepcopy(model)
    state = {name: (value.data_ptr(), value._version) for name, value in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    assert transfuse.accelerate(model) is model
    assert {name: (value.data_ptr(), value._version) for name, value in model.state_dict().items()} == state
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    for (name, stock), (other, ours) in zip(before.named_modules(), model.named_modules(), strict=True):
        assert name == other and isinstance(ours, type(stock)) and type(ours).__name__ == type(stock).__name__
    assert type(model.bert.embeddings.LayerNorm) is not nn.LayerNorm
    assert isinstance(model.bert.embeddings.LayerNorm, transfuse.nn.LayerNorm)


def test_restore_is_exact():
    model = make_bert()
    classes = [type(module) for module in model.modules()]
    expected, dictionaries = outputs(model), [dict(vars(module)) for module in model.modules()]
    for options in ({}, {"padding_free": False}, {"backend": "reference"}):
        transfuse.accelerate(model, **options)
        assert [type(module) for module in model.modules()] != classes
        assert transfuse.restore(model) is model
        assert [type(module) for module in model.modules()] == classes
        assert [dict(vars(module)) for module in model.modules()] == dictionaries
        assert torch.equal(outputs(model), expected)
    transfuse.restore(model)


def test_twice_is_harmless_and_takes_the_new_options():
    model = transfuse.accelerate(make_bert())
    classes, expected = [type(module) for module in model.modules()], outputs(model)
    transfuse.accelerate(model)
    assert [type(module) for module in model.modules()] == classes and torch.equal(outputs(model), expected)
    transfuse.accelerate(model, padding_free=False)
    assert type(model.bert) is BertModel and "BertModel: padding_free=False" in transfuse.report(model).not_replaced
    transfuse.accelerate(model)
    assert [type(module) for module in model.modules()] == classes


def test_layer_norm_and_gelu_anywhere():
    stock = Block()
    ours = transfuse.accelerate(copy.deepcopy(stock))
    x = torch.randn(3, 2, 8)
    with torch.no_grad():
        assert (stock(x) - ours(x)).abs().max() <= MODEL_TOLERANCE
    assert transfuse.report(ours).replaced == {"LayerNorm": 2, "GELU": 1}
    root = transfuse.accelerate(nn.LayerNorm(4))
    assert isinstance(root, transfuse.nn.LayerNorm) and type(transfuse.restore(root)) is nn.LayerNorm


def test_subclasses_and_unknown_modules_are_left_and_named():
    class OwnNorm(nn.LayerNorm):
        def forward(self, x):
            return x + 1

    model = nn.ModuleDict({"own": OwnNorm(4), "norm": nn.LayerNorm(4), "attention": nn.MultiheadAttention(4, 2),
                           "gelu": GELUActivation(use_gelu_python=True)})
    transfuse.accelerate(model)
    assert type(model["own"]) is OwnNorm and type(model["attention"]) is nn.MultiheadAttention
    skipped = transfuse.report(model).not_replaced
    assert skipped["OwnNorm: it is a subclass of LayerNorm, whose forward may differ"] == 1
    assert skipped["MultiheadAttention: nn.MultiheadAttention is not exchanged yet"] == 1
    assert skipped["GELUActivation: use_gelu_python=True asks for the formula in Python"] == 1


def test_other_families_say_so():
    from transformers import GPT2Config, GPT2Model

    stock = GPT2Model(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16)).eval()
    model = transfuse.accelerate(copy.deepcopy(stock))
    report = transfuse.report(model, batch())
    assert report.replaced == {"LayerNorm": 3, "NewGELUActivation": 1} and report.verdict
    assert "GPT2Model: the attention of the family 'gpt2' is not accelerated yet" in report.not_replaced


def test_torch_transformer_layers_keep_working():
    layer = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation="gelu"), 2).eval()
    ours = transfuse.accelerate(copy.deepcopy(layer))
    x = torch.randn(2, 5, 16)
    for mode in (torch.no_grad(), torch.enable_grad()):
        with mode:
            assert (layer(x) - ours(x)).abs().max() <= MODEL_TOLERANCE


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_torchs(layout):
    stock = nn.Sequential(nn.LayerNorm(8), nn.GELU("tanh"), GELUActivation())
    ours = transfuse.accelerate(copy.deepcopy(stock))
    batch = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)], layout=layout)
    for expected, actual in zip(stock(batch).unbind(), ours(batch).unbind(), strict=True):
        assert torch.equal(expected, actual)


# --- it survives what people do to models ---


def test_a_class_changed_after_accelerate_is_left_alone():
    parametrize = nn.utils.parametrize
    model = transfuse.accelerate(Block())
    parametrize.register_parametrization(model.norm, "weight", nn.Identity())
    changed, x = type(model.norm), torch.randn(3, 2, 8)
    expected = model(x)
    reason = "ParametrizedLayerNorm: its class was changed after accelerate(): undo that, then restore() reaches it"
    for change in (transfuse.accelerate, lambda model: transfuse.accelerate(model, backend="reference"),
                   transfuse.restore):
        change(model)
        assert type(model.norm) is changed and transfuse.report(model).not_replaced[reason] == 1
        assert (model(x) - expected).abs().max() <= MODEL_TOLERANCE
    assert type(model.act) is nn.GELU and transfuse.verify(model, x)
    parametrize.remove_parametrizations(model.norm, "weight")
    assert type(transfuse.restore(model).norm) is nn.LayerNorm


def test_a_layer_wrapped_as_fsdp2_does_it():
    """fully_shard() gives a module a subclass of its class and FSDPModule."""
    model = transfuse.accelerate(make_bert())
    for layer in model.bert.encoder.layer:
        layer.__class__ = type("FSDPBertLayer", (type("FSDPModule", (), {}), type(layer)), {})
    expected = outputs(make_bert())
    for change in (lambda model: model, transfuse.accelerate, transfuse.restore):
        change(model)
        assert (outputs(model) - expected).abs().max() <= MODEL_TOLERANCE * 10
        assert any(reason.startswith("FSDPBertLayer: its class") for reason in transfuse.report(model).not_replaced)


def test_deepcopy_pickle_and_torch_save():
    model = transfuse.accelerate(make_bert())
    expected = outputs(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False))
    for other in copies:
        assert torch.equal(outputs(other), expected)
        assert transfuse.report(other).accelerated
        assert torch.equal(outputs(transfuse.restore(other)), outputs(make_bert()))


def test_pickle_into_a_fresh_process(tmp_path):
    model = transfuse.accelerate(make_bert())
    torch.save({"model": model, "batch": batch(), "expected": outputs(model)}, tmp_path / "model.pt")
    program = textwrap.dedent("""
        import sys, torch
        saved = torch.load(sys.argv[1], weights_only=False)
        with torch.no_grad():
            assert torch.equal(saved["model"](**saved["batch"]).logits, saved["expected"])
        hidden = saved["model"](**saved["batch"], output_hidden_states=True, output_attentions=True)
        assert len(hidden.hidden_states) == 3
        assert type(saved["model"].bert).__module__ == "transfuse.models.bert"
    """)
    command = [sys.executable, "-c", program, str(tmp_path / "model.pt")]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert run.returncode == 0, run.stderr


def test_save_pretrained_needs_no_transfuse(tmp_path):
    model = transfuse.accelerate(make_bert(BertModel))
    model.save_pretrained(tmp_path / "ours")
    transfuse.restore(model).save_pretrained(tmp_path / "stock")
    names = sorted(path.name for path in (tmp_path / "stock").iterdir())
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == names
    for name in names:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "stock" / name).read_bytes()
    assert b"transfuse" not in (tmp_path / "ours" / "config.json").read_bytes()
    assert type(AutoModel.from_pretrained(tmp_path / "ours")) is BertModel
    ours = transfuse.models.bert.BertModel.from_pretrained(tmp_path / "stock")
    assert_model_matches(model, ours, batch())


def test_moves_modes_and_state_dict():
    stock, ours = make_bert(), transfuse.accelerate(make_bert())
    other = make_bert()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.25)
    for model in (stock, ours):
        model.load_state_dict(other.state_dict())
        model.to(torch.float64).to(torch.float32).train().eval()
    assert (outputs(stock) - outputs(ours)).abs().max() <= MODEL_TOLERANCE * 10
    for model in (stock, ours):
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        model(**batch(), labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
    for (name, e), (_, a) in zip(stock.named_parameters(), ours.named_parameters(), strict=True):
        assert (e - a).detach().abs().max() <= MODEL_TOLERANCE * max(1.0, float(e.detach().abs().max())), name


def test_hooks_on_the_model_stay():
    model, calls = make_bert(), []
    model.bert.register_forward_hook(lambda module, args, output: calls.append("model"))
    model.bert.encoder.layer[0].register_forward_pre_hook(lambda module, args: calls.append("layer"))
    transfuse.accelerate(model)
    outputs(model)
    assert calls == ["layer", "model"]


def test_threads_share_a_model():
    from concurrent.futures import ThreadPoolExecutor

    model = transfuse.accelerate(make_bert())
    expected = outputs(model)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(result, expected) for result in pool.map(lambda _: outputs(model), range(16)))


# --- when nothing is changed ---


def test_nothing_matches():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.warns(TransfuseWarning, match="changed in Sequential: it holds no module that transfuse knows"):
        assert transfuse.accelerate(model) is model
    assert "nothing" in str(transfuse.report(model))


def test_without_the_compiled_module(monkeypatch):
    monkeypatch.setattr(extension, "cpu_unavailable", "the compiled module transfuse._C is not there: gone")
    model = make_bert()
    with pytest.warns(TransfuseWarning, match="_C is not there: gone"):
        transfuse.accelerate(model)
    assert type(model.bert) is BertModel and not transfuse.report(model).accelerated
    transfuse.accelerate(model, backend="reference")
    assert (outputs(model) - outputs(make_bert())).abs().max() <= MODEL_TOLERANCE


def test_disabled_by_the_environment(monkeypatch):
    monkeypatch.setenv("TRANSFUSE_DISABLE", "1")
    model = make_bert()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert transfuse.accelerate(model) is model
    assert type(model.bert) is BertModel


def test_a_device_without_a_measured_gain():
    model = nn.LayerNorm(4, device="meta")
    with pytest.warns(TransfuseWarning, match="no gain was measured on meta yet; pass sample= .* or force=True"):
        transfuse.accelerate(model)
    assert type(model) is nn.LayerNorm
    assert isinstance(transfuse.accelerate(model, force=True), transfuse.nn.LayerNorm)


def test_sample_decides_where_no_gain_is_known(monkeypatch):
    from transfuse.models import entry
    from transfuse.models.verdict import Speed

    monkeypatch.setattr(entry, "MEASURED_DEVICES", ())
    model = make_bert()
    monkeypatch.setattr(entry, "measure_speed", lambda model, sample: Speed(0.9, 0.8, 1.0, 1.0, 1.1, 5))
    with pytest.warns(TransfuseWarning, match="on the sample it would run at 0.90 of stock's speed"):
        transfuse.accelerate(model, sample=batch())
    assert type(model.bert) is BertModel
    monkeypatch.setattr(entry, "measure_speed", lambda model, sample: Speed(1.2, 1.1, 1.3, 1.2, 1.0, 5))
    assert transfuse.report(transfuse.accelerate(model, sample=batch())).accelerated


def test_float64_on_the_cpu_is_left_alone():
    model = make_bert().double()
    with pytest.warns(TransfuseWarning):
        transfuse.accelerate(model)
    assert any("dtype is float64" in reason for reason in transfuse.report(model).not_replaced)


@pytest.mark.parametrize(
    ("error", "text", "arguments"),
    [
        (TypeError, "accelerate: model is a int, expected a torch.nn.Module", {"model": 3}),
        (TypeError, "accelerate: backend is a NoneType, expected str", {"backend": None}),
        (ValueError, "accelerate: backend is 'gpu', expected one of auto, cuda, triton", {"backend": "gpu"}),
        (TypeError, "accelerate: padding_free is a int, expected bool", {"padding_free": 1}),
        (TypeError, "accelerate: force is a str, expected bool", {"force": "yes"}),
        (TypeError, "accelerate: dtype is a str, expected torch.dtype or None", {"dtype": "bfloat16"}),
        (ValueError, "accelerate: dtype is torch.float16, expected torch.float32 or torch.bfloat16", {"dtype": torch.float16}),
        (TypeError, "accelerate: the sample is a str, expected a mapping, a tensor, a tuple or", {"sample": "text"}),
        (ValueError, "accelerate: the sample is empty", {"sample": {}}),
    ],
)
def test_bad_arguments(error, text, arguments):
    with pytest.raises(error, match=re.escape(text)):
        transfuse.accelerate(**{"model": Block(), **arguments})


def test_bad_arguments_of_the_others():
    for function in (transfuse.restore, transfuse.repack, transfuse.report):
        with pytest.raises(TypeError, match=f"{function.__name__}: model is a dict, expected a torch.nn.Module"):
            function({})
    with pytest.raises(TypeError, match="verify: model is a dict, expected a torch.nn.Module"):
        transfuse.verify({}, batch())
    with pytest.raises(TypeError, match="verify: the sample is a NoneType, expected a mapping"):
        transfuse.verify(Block(), None)
    with pytest.raises(TypeError, match="a list is texts for a SentenceTransformer or CrossEncoder; Block takes"):
        transfuse.verify(Block(), ["text"])
    model = make_bert()
    assert transfuse.repack(model) is model


# --- backend, report, verify ---


def test_backend_of_the_model():
    model = transfuse.accelerate(make_bert(), backend="reference")
    assert model.bert.pinned_backend == "reference"
    expected = outputs(model)
    with transfuse.use_backend("reference"):
        assert torch.equal(outputs(transfuse.accelerate(make_bert())), expected)
    assert torch.equal(outputs(pickle.loads(pickle.dumps(model))), expected)
    with transfuse.use_backend("triton"), pytest.raises(RuntimeError, match="no backend can run this"):
        outputs(model)
    transfuse.accelerate(model)
    assert "pinned_backend" not in vars(model.bert)


def test_a_backend_that_could_never_run_is_refused(monkeypatch):
    model = make_bert()
    with pytest.raises(ValueError, match="backend is 'torch', expected one of auto, cuda, triton, cpu, reference for BertSelf"):
        transfuse.accelerate(model, backend="torch")
    monkeypatch.setattr(transfuse.dispatch, "backends", lambda: {"triton": "no GPU here"})
    with pytest.raises(ValueError, match="accelerate: backend is 'triton', which is not available: no GPU here"):
        transfuse.accelerate(Block(), backend="triton")
    assert not transfuse.report(model).accelerated
    block, x = Block(), torch.randn(3, 2, 8)
    assert (transfuse.accelerate(copy.deepcopy(block), backend="torch")(x) - block(x)).abs().max() <= MODEL_TOLERANCE


def test_report_answers_five_questions():
    model = make_bert()
    preview = transfuse.report(model)
    assert not preview.accelerated and "(preview: not accelerated yet)" in str(preview)
    transfuse.accelerate(model)
    outputs(model)
    model(inputs_embeds=torch.zeros(1, 3, 32), attention_mask=torch.ones(1, 3))
    report = transfuse.report(model, batch())
    assert report.replaced == preview.replaced == {
        "BertModel": 1, "LayerNorm": 5, "BertEncoder": 1, "BertLayer": 2, "BertSelfAttention": 2, "BertSelfOutput": 2,
        "BertIntermediate": 2, "GELUActivation": 2, "BertOutput": 2,
    }
    assert report.calls == {"packed": 1, "the attention mask is a float mask": 1}
    assert report.verdict and report.verdict.tokens == 8 and report.verdict.padded_tokens == 10
    assert report.speed.ratio > 0 and report.speed.low <= report.speed.ratio <= report.speed.high
    text = str(report)
    for words in ("1. Replaced", "2. Not replaced, and why", "3. Is it right?", "4. How much faster?", "5. Undo",
                  "transfuse.restore(model)", "padded positions of the outputs are 0", "8 kept of 10 positions"):
        assert words in text
    assert "not measured" in str(transfuse.report(model))
    import json

    assert json.loads(json.dumps(report.to_dict()))["verdict"]["ok"] is True
    assert swap.calls(model)["packed"] == 1  # the report's own runs are not counted


def test_verify_changes_nothing_and_sees_a_wrong_layer(monkeypatch):
    model = transfuse.accelerate(make_bert()).train()
    classes = [type(module) for module in model.modules()]
    verdict = transfuse.verify(model, batch())
    assert verdict and verdict.max_abs_error <= MODEL_TOLERANCE * 10
    assert [d.name for d in verdict.layers] == ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    assert [type(module) for module in model.modules()] == classes and model.training
    assert all(not module._forward_hooks for module in model.modules())
    assert "largest difference to stock" in str(verdict) and verdict.to_dict()["ok"]

    right = transfuse.models.bert.ResidualNorm.fused
    monkeypatch.setattr(transfuse.models.bert.ResidualNorm, "fused", lambda self, x, y: right(self, x, y) * 1.01)
    verdict = transfuse.verify(model, batch())
    assert not verdict and "DIFFERENT" in str(verdict) and not verdict.layers[0].ok
    nan = float("nan")
    monkeypatch.setattr(transfuse.models.bert.ResidualNorm, "fused", lambda self, x, y: right(self, x, y) * nan)
    assert not transfuse.verify(model, batch())
    monkeypatch.undo()
    run = transfuse.models.fused_layers.FusedStack.run  # what runs where nobody listens
    monkeypatch.setattr(transfuse.models.fused_layers.FusedStack, "run", lambda *arguments: run(*arguments) * 1.01)
    verdict = transfuse.verify(model, batch())
    assert not verdict and verdict.layers[0].ok


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("cls", [BertModel, BertForSequenceClassification])
def test_verify_finds_the_mask_of_a_positional_batch(cls, padding, monkeypatch):
    ids, mask = batch()["input_ids"], batch()["attention_mask"]
    if padding == "left":
        ids, mask = ids.flip(1), mask.flip(1)
    model = transfuse.accelerate(make_bert(cls))
    for sample in ((ids, mask), {"input_ids": ids, "attention_mask": mask},
                   {"input_ids": ids, "attention_mask": mask, "return_dict": False}):
        verdict = transfuse.verify(model, sample)
        assert verdict, str(verdict)
        assert verdict.tokens == 8 and verdict.padded_tokens == 10
    right = transfuse.models.bert.ResidualNorm.fused
    monkeypatch.setattr(transfuse.models.bert.ResidualNorm, "fused", lambda self, x, y: right(self, x, y) * 1.01)
    assert not transfuse.verify(model, (ids, mask))


def test_verify_takes_tensors_and_tuples():
    model = Block()
    for sample in (torch.randn(3, 2, 8), (torch.randn(3, 2, 8),), {"x": torch.randn(3, 2, 8)}):
        assert transfuse.verify(model, sample)
    assert type(model.norm) is nn.LayerNorm


def test_importing_transfuse_imports_no_transformers():
    program = (
        "import sys, transfuse, torch; transfuse.accelerate(torch.nn.LayerNorm(4), force=True); "
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], env=os.environ, check=False).returncode == 0
    assert modeling_bert.BertModel is BertModel
