"""BERT and the families that share its code: the accelerated model is stock's at kept positions, however it is called.

Models are small, with every parameter drawn large (biases and norms too), so that a wrong scale, a dropped mask or a
forgotten bias shows: test_wrong_attention_shows proves that it does.
"""

import copy

import pytest
import torch
import transformers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertLMHeadModel,
    BertModel,
)

import transfuse
import transfuse.models.bert
from transfuse.dispatch import use_backend
from transfuse.models import swap
from transfuse.testing import assert_close, model_tolerance

BATCH, LENGTH, VOCAB, PAD = 5, 11, 60, 1
FAMILIES = ("Bert", "Roberta", "XLMRoberta", "Camembert", "Electra")


def make(family="Bert", head="Model", seed=0, **options):
    """A stock model in eval mode, two layers, with parameters large enough that every one of them shows."""
    torch.manual_seed(seed)
    settings = dict(vocab_size=VOCAB, hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=80,
                    max_position_embeddings=40, type_vocab_size=2, pad_token_id=PAD, layer_norm_eps=0.3,
                    attn_implementation="sdpa")
    if family == "Electra":
        settings["embedding_size"] = 32
    config = getattr(transformers, f"{family}Config")(**{**settings, **options})
    model = getattr(transformers, f"{family}{head}")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3)
            if "LayerNorm.weight" in name:
                parameter.add_(1)
    return model.eval()


def pair(*args, padding_free=True, **options):
    """(stock, accelerated) with the same weights."""
    stock = make(*args, **options)
    return stock, transfuse.accelerate(copy.deepcopy(stock), padding_free=padding_free)


def mask_of(kind):
    mask = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    for row, length in enumerate((11, 7, 1, 4, 9)):
        mask[row, :length] = 1
    if kind == "left":
        mask = mask.flip(1)
    if kind == "holes":
        mask = (torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % 3 != 1).long()
    if kind == "empty row":
        mask[1] = 0
    if kind == "nothing":
        mask[:] = 0
    if kind == "ones":
        mask[:] = 1
    return None if kind == "none" else mask


def batch_of(mask, seed=1):
    """Ids with the padding id where the mask says so (RoBERTa counts positions by it)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCAB, (BATCH, LENGTH), generator=generator)
    if mask is None:
        return {"input_ids": ids}
    return {"input_ids": torch.where(mask.bool(), ids, PAD), "attention_mask": mask}


def assert_same(stock, ours, keep=None, what="output"):
    """Equal within the model tolerance, at kept positions where a mask is given."""
    if keep is not None:
        stock, ours = stock[keep.bool()], ours[keep.bool()]
    assert stock.shape == ours.shape
    if stock.numel() == 0:
        return
    difference = float((stock.double() - ours.double()).detach().abs().max())
    allowed = model_tolerance(stock.dtype, float(stock.detach().abs().max()))
    assert difference <= allowed, f"{what}: {difference:.2e}, allowed {allowed:.2e}"


def how(model):
    """The reasons of all calls so far."""
    return set(swap.calls(model))


@pytest.mark.parametrize("kind", ["right", "left", "holes", "empty row", "nothing", "ones", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_kept_positions_equal_stock_and_padded_are_zero(family, kind):
    stock, ours = pair(family)
    mask = mask_of(kind)
    batch = batch_of(mask)
    with torch.no_grad():
        expected, actual = stock(**batch, output_hidden_states=True), ours(**batch, output_hidden_states=True)
    assert how(ours) == {swap.PACKED}
    assert type(expected) is type(actual) and list(expected.keys()) == list(actual.keys())
    keep = torch.ones(BATCH, LENGTH) if mask is None else mask
    assert_same(expected.last_hidden_state, actual.last_hidden_state, keep)
    assert len(expected.hidden_states) == len(actual.hidden_states)
    for index, (e, a) in enumerate(zip(expected.hidden_states, actual.hidden_states, strict=True)):
        assert_same(e, a, keep, f"hidden state {index}")
        assert not a[keep == 0].any()
    if "pooler_output" in expected:
        first_kept = keep[:, 0].bool()
        assert_same(expected.pooler_output[first_kept], actual.pooler_output[first_kept])


@pytest.mark.parametrize("kind", ["right", "holes", "empty row", "none"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_free_off_gives_stock_values_everywhere(implementation, kind):
    stock, ours = pair(padding_free=False, attn_implementation=implementation)
    batch = batch_of(mask_of(kind))
    with torch.no_grad():
        expected, actual = stock(**batch, output_hidden_states=True), ours(**batch, output_hidden_states=True)
    for e, a in zip(expected.hidden_states, actual.hidden_states, strict=True):
        assert_same(e, a)
    assert_same(expected.pooler_output, actual.pooler_output)
    assert type(ours) is BertModel and not how(ours)


@pytest.mark.parametrize("variant", ["tokens", "positions", "embeds", "tuple", "config", "bool mask"])
def test_every_way_of_calling(variant):
    stock, ours = pair()
    mask = mask_of("right")
    batch = batch_of(mask)
    if variant == "tokens":
        batch["token_type_ids"] = torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % 2
    if variant == "positions":
        batch["position_ids"] = torch.arange(LENGTH).flip(0)[None]
    if variant == "embeds":
        batch["inputs_embeds"] = torch.randn(BATCH, LENGTH, 48)
        del batch["input_ids"]
    if variant == "tuple":
        batch["return_dict"] = False
    if variant == "config":
        for model in (stock, ours):
            model.config.output_hidden_states = True
    if variant == "bool mask":
        batch["attention_mask"] = mask.bool()
    with torch.no_grad():
        expected, actual = stock(**batch), ours(**batch)
    assert how(ours) == {swap.PACKED}
    assert type(expected) is type(actual) and len(expected) == len(actual)
    assert_same(expected[0], actual[0], mask)
    assert_same(expected[1], actual[1])


@pytest.mark.parametrize(
    ("variant", "reason"),
    [
        ("4-D mask", "the attention mask has 4 dimensions"),
        ("float mask", "the attention mask is a float mask"),
        ("attentions", "output_attentions=True"),
        ("selected states", "output_hidden_states selects layers"),
        ("causal", "the argument is_causal is given"),
        ("chunked", "chunk_size_feed_forward is set"),
        ("flex", "the attention implementation is 'flex_attention'"),
    ],
)
def test_padded_path_equals_stock_and_is_named(variant, reason):
    stock, ours = pair(attn_implementation="eager" if variant == "attentions" else "sdpa")
    mask = mask_of("right")
    batch = batch_of(mask)
    if variant == "4-D mask":
        batch["attention_mask"] = mask.bool()[:, None, None, :].expand(BATCH, 1, LENGTH, LENGTH)
    if variant == "float mask":
        batch["attention_mask"] = mask.float()
    if variant == "attentions":
        batch["output_attentions"] = True
    if variant == "selected states":
        batch["output_hidden_states"] = [0, -1]
    if variant == "causal":
        batch["is_causal"] = True
    for model in (stock, ours):
        if variant == "chunked":
            for layer in model.encoder.layer:
                layer.chunk_size_feed_forward = LENGTH
        if variant == "flex":
            model.config._attn_implementation = "flex_attention"
    if variant == "flex":
        assert reason in ours._why_padded(**dict.fromkeys(("token_type_ids", "position_ids", "inputs_embeds")), **batch)
        return
    with torch.no_grad():
        expected, actual = stock(**batch), ours(**batch)
    assert reason in how(ours) and swap.PACKED not in how(ours)
    assert_same(expected.last_hidden_state, actual.last_hidden_state)
    for key in ("attentions", "hidden_states"):
        for e, a in zip(expected.get(key) or (), actual.get(key) or (), strict=True):
            assert (e is None) == (a is None)
            if e is not None:
                assert_same(e, a, what=key)
    assert reason in str(transfuse.report(ours))


def test_decoder_is_left_alone():
    batch = batch_of(mask_of("right"))
    for cross in (True, False):
        stock = make(head="LMHeadModel", is_decoder=True, add_cross_attention=cross)
        ours = transfuse.accelerate(copy.deepcopy(stock))
        assert type(ours.bert) is BertModel and isinstance(ours, BertLMHeadModel)
        extra = {"encoder_hidden_states": torch.randn(BATCH, 4, 48), "use_cache": False} if cross else {}
        with torch.no_grad():
            assert_same(stock(**batch, **extra).logits, ours(**batch, **extra).logits)
        assert "it is a decoder" in str(transfuse.report(ours))
    prompt = batch["input_ids"][:1, :4]
    assert torch.equal(*(m.generate(prompt, max_new_tokens=6, do_sample=False) for m in (stock, ours)))


@pytest.mark.parametrize("head", [BertForSequenceClassification, BertForTokenClassification, BertForMaskedLM])
def test_heads_and_their_losses(head):
    stock, ours = pair(head=head.__name__.removeprefix("Bert"))
    mask = mask_of("right")
    batch = batch_of(mask)
    per_token = head is not BertForSequenceClassification
    labels = torch.where(mask.bool(), batch["input_ids"] % 2, -100) if per_token else torch.arange(BATCH) % 2
    with torch.no_grad():
        expected, actual = stock(**batch, labels=labels), ours(**batch, labels=labels)
    assert_same(expected.logits, actual.logits, mask if per_token else None)
    assert_same(expected.loss, actual.loss)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["right", "holes", "none"])
def test_gradients_of_every_parameter(kind, checkpointing):
    stock, ours = pair(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    mask = mask_of(kind)
    batch = batch_of(mask)
    keep = torch.ones(BATCH, LENGTH) if mask is None else mask.float()
    weights = torch.randn(BATCH, LENGTH, 48) * keep[..., None]
    for model in (stock, ours):
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        output = model(**batch)
        ((output.last_hidden_state * weights).sum() + output.pooler_output[keep[:, 0].bool()].sum()).backward()
    assert how(ours) == {swap.PACKED}
    for (name, e), (_, a) in zip(stock.named_parameters(), ours.named_parameters(), strict=True):
        assert (e.grad is None) == (a.grad is None), name
        if e.grad is not None:
            # The key bias has gradient 0 in exact arithmetic: its size is that of its neighbour, the query bias.
            scale = dict(stock.named_parameters())[name.replace("key.bias", "query.bias")].grad
            assert_close(a.grad + scale, e.grad + scale, BATCH * LENGTH * 48, name, slack=4)


def test_dropout_while_training():
    _, ours = pair(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.0)
    batch = batch_of(mask_of("right"))
    ours.train()
    first, second = (ours(**batch).last_hidden_state for _ in range(2))
    assert how(ours) == {swap.PACKED} and not torch.equal(first, second)
    first.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in ours.parameters())


@pytest.mark.parametrize("padding_free", [True, False])
def test_attention_dropout_while_training(padding_free):
    """Stock's stream of random numbers cannot be reproduced; ours is one for all backends, and a seed replays it."""
    _, ours = pair(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5, padding_free=padding_free)
    batch, ours = batch_of(mask_of("right")), ours.train()
    keep = batch["attention_mask"].bool()

    def run(seed, backend="auto"):
        torch.manual_seed(seed)
        with use_backend(backend):
            return ours(**batch).last_hidden_state

    first = run(3)
    assert torch.equal(run(3), first) and not torch.equal(run(4), first)
    assert_same(run(3, "reference")[keep], first[keep])
    assert how(ours) == ({swap.PACKED} if padding_free else set())
    without = ours.eval()(**batch).last_hidden_state
    assert (without - first)[keep].abs().max() > 1e-2  # dropout took place
    ours.train()
    first.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in ours.parameters())


@pytest.mark.parametrize("mutant", ["scale", "value", "mask"])
@pytest.mark.parametrize("by_module", [True, False])
@pytest.mark.parametrize("padding_free", [True, False])
def test_wrong_attention_shows(monkeypatch, padding_free, by_module, mutant):
    """The suite is worth something: a scale of 1.01, values times 1.001 or a dropped mask are each seen."""
    stock, ours = pair(padding_free=padding_free)
    if by_module:
        ours.encoder.layer[0].register_forward_hook(lambda *_: None)
    mask = mask_of("right")
    batch = batch_of(mask)
    varlen, padded = transfuse.models.bert.varlen_attention, transfuse.models.bert.scaled_dot_product_attention

    def wrong_varlen(query, key, value, cu_seqlens, *, max_seqlen_q, scale, **options):
        if mutant == "mask":
            cu_seqlens, max_seqlen_q = cu_seqlens[[0, -1]], query.shape[0]
        return varlen(query, key, value * (1.001 if mutant == "value" else 1), cu_seqlens, max_seqlen_q=max_seqlen_q,
                      scale=scale * (1.01 if mutant == "scale" else 1), **options)

    def wrong_padded(query, key, value, attn_mask, *dropout_p, scale):
        return padded(query, key, value * (1.001 if mutant == "value" else 1), None if mutant == "mask" else attn_mask,
                      *dropout_p, scale=scale * (1.01 if mutant == "scale" else 1))

    def wrong_layer(hidden, sequences, heads, head_dim, scale, *parameters):
        parameters = list(parameters)
        if mutant == "mask":
            tokens, cu_seqlens = len(hidden), sequences.cu_seqlens
            together = None if cu_seqlens is None else cu_seqlens[[0, -1]]
            sequences = sequences._replace(cu_seqlens=together, mask=None,
                                           max_seqlen=sequences.max_seqlen if together is None else tokens)
        if mutant == "value":
            parameters[2] = parameters[2] * 1.001  # the product that takes the context
        return layer(hidden, sequences, heads, head_dim, scale * (1.01 if mutant == "scale" else 1), *parameters)

    layer = transfuse.models.fused_layers.encoder_layer
    monkeypatch.setattr(transfuse.models.fused_layers, "encoder_layer", wrong_layer)
    monkeypatch.setattr(transfuse.models.bert, "varlen_attention", wrong_varlen)
    monkeypatch.setattr(transfuse.models.bert, "scaled_dot_product_attention", wrong_padded)
    with torch.no_grad(), pytest.raises(AssertionError, match="allowed"):
        assert_same(stock(**batch).last_hidden_state, ours(**batch).last_hidden_state, mask)


def test_bfloat16_and_autocast():
    mask = mask_of("right")
    batch = batch_of(mask)
    stock = make().to(torch.bfloat16)
    ours = transfuse.accelerate(copy.deepcopy(stock))
    with torch.no_grad():
        expected, actual = stock(**batch).last_hidden_state, ours(**batch).last_hidden_state
    assert actual.dtype == torch.bfloat16
    assert_same(expected, actual, mask)

    stock, ours = pair()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, actual = stock(**batch).last_hidden_state, ours(**batch).last_hidden_state
    assert actual.dtype == expected.dtype
    assert_same(expected.bfloat16(), actual.bfloat16(), mask)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_traced_models_take_the_padded_path():
    """torch.compile without a graph break, torch.export and torch.jit.trace."""
    stock, ours = pair()
    batch = batch_of(mask_of("right"))
    with torch.no_grad():
        expected = stock(**batch).last_hidden_state
        compiled = torch.compile(ours, backend="eager", fullgraph=True)
        assert_same(expected, compiled(**batch).last_hidden_state)
        exported = torch.export.export(ours, (), batch).module()
        assert_same(expected, exported(**batch).last_hidden_state)
        traced = torch.jit.trace(ours, example_kwarg_inputs={**batch}, strict=False, check_trace=False)
        assert_same(expected, traced(**batch)["last_hidden_state"])
    assert swap.PACKED not in how(ours)


@pytest.mark.filterwarnings("ignore::transfuse.TransfuseWarning")
def test_float64_after_accelerate_is_right():
    stock, ours = pair()
    mask = mask_of("holes")
    batch = batch_of(mask)
    with torch.no_grad():
        expected, actual = stock.double()(**batch).last_hidden_state, ours.double()(**batch).last_hidden_state
    assert actual.dtype == torch.float64
    assert_close(actual[mask.bool()], expected[mask.bool()], VOCAB)


def test_hooks_on_inner_modules_still_fire():
    stock, ours = pair()
    batch = {"input_ids": torch.randint(2, VOCAB, (1, LENGTH))}  # one full row: packed and padded have one shape
    names = [n for n, m in stock.named_modules() if n and not isinstance(m, torch.nn.ModuleList)]
    seen = {}
    for model in (stock, ours):
        for name in names:
            def hook(module, args, output, name=name, model=model):
                seen[(model is ours, name)] = output[0] if isinstance(output, tuple) else output

            model.get_submodule(name).register_forward_hook(hook)
        with torch.no_grad():
            model(**batch)
    for name in names:
        assert ((False, name) in seen) == ((True, name) in seen), name
        if isinstance(seen.get((False, name)), torch.Tensor):
            assert_same(seen[(False, name)], seen[(True, name)], what=name)


def test_a_layer_changed_after_accelerate_is_respected():
    stock, ours = pair()
    mask = mask_of("right")
    batch = batch_of(mask)
    transfuse.restore(ours.encoder.layer[1].attention)
    with torch.no_grad():
        assert_same(stock(**batch).last_hidden_state, ours(**batch).last_hidden_state, mask)
    assert how(ours) == {"a layer's attention is not accelerated"}


class DoublingNorm(torch.nn.LayerNorm):
    def forward(self, input):
        return 2 * super().forward(input)


class HalvingGELU(torch.nn.GELU):
    def forward(self, input):
        return super().forward(input) / 2


class Cube(torch.nn.Module):
    approximate = "none"  # as nn.GELU has; says nothing about what forward computes

    def forward(self, input):
        return input**3


def doubled(module):
    """The forward of one instance replaced, as offloading hooks do it."""
    before = module.forward
    module.forward = lambda *args, **kwargs: 2 * before(*args, **kwargs)


def own_norm(model):
    model.encoder.layer[0].output.LayerNorm = DoublingNorm(48, eps=0.3)


def own_act(model, act=HalvingGELU):
    model.encoder.layer[0].intermediate.intermediate_act_fn = act()


def own_attention(model):
    attention = model.encoder.layer[1].attention.self
    before = attention.forward
    attention.forward = lambda *args, **kwargs: (2 * before(*args, **kwargs)[0], None)


OVERRIDES = {
    "subclass of LayerNorm": own_norm,
    "subclass of GELU": own_act,
    "another activation": lambda model: own_act(model, Cube),
    "norm": lambda model: doubled(model.encoder.layer[0].attention.output.LayerNorm),
    "dense": lambda model: doubled(model.encoder.layer[0].intermediate.dense),
    "act": lambda model: doubled(model.encoder.layer[0].intermediate.intermediate_act_fn),
    "attention": own_attention,
    "layer": lambda model: doubled(model.encoder.layer[1]),
    "embeddings": lambda model: doubled(model.embeddings),
}


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("override", OVERRIDES)
def test_what_a_child_computes_of_its_own_is_kept(override, before):
    stock, ours = make(), make()
    OVERRIDES[override](stock)
    if before:
        OVERRIDES[override](ours)
    transfuse.accelerate(ours)
    if not before:
        OVERRIDES[override](ours)
    mask = mask_of("right")
    with torch.no_grad():
        expected, actual = stock(**batch_of(mask)), ours(**batch_of(mask))
        assert_same(expected.last_hidden_state, actual.last_hidden_state, mask)
        assert (make()(**batch_of(mask)).last_hidden_state - expected.last_hidden_state).abs().max() > 0.1
    transfuse.report(ours)


def test_errors_are_those_of_stock():
    stock, ours = pair()
    for arguments in ({}, {"input_ids": torch.zeros(2, 3, dtype=torch.long), "inputs_embeds": torch.zeros(2, 3, 48)},
                      {"input_ids": torch.zeros(1, 41, dtype=torch.long)}):
        messages = []
        for model in (stock, ours):
            with pytest.raises((ValueError, RuntimeError, IndexError)) as caught:
                model(**arguments)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


def test_relu_model_is_accelerated_but_for_the_activation():
    stock, ours = pair(hidden_act="relu")
    mask = mask_of("right")
    with torch.no_grad():
        assert_same(stock(**batch_of(mask)).last_hidden_state, ours(**batch_of(mask)).last_hidden_state, mask)
    assert "its activation ReLU is not a GELU" in str(transfuse.report(ours))


@pytest.mark.parametrize("act", ["gelu_new", "gelu_pytorch_tanh", "gelu_python"])
def test_other_gelus(act):
    stock, ours = pair(hidden_act=act)
    mask = mask_of("right")
    with torch.no_grad():
        assert_same(stock(**batch_of(mask)).last_hidden_state, ours(**batch_of(mask)).last_hidden_state, mask)
    assert ("BertIntermediate" in transfuse.report(ours).replaced) == (act != "gelu_python")


def test_batch_composition_does_not_change_a_row():
    """Row 1 alone, and inside a batch: the same sequence, to rounding of torch's matrix products."""
    _, ours = pair()
    batch = batch_of(mask_of("right"))
    with torch.no_grad():
        inside = ours(**batch).last_hidden_state[1, :7]
        alone = ours(input_ids=batch["input_ids"][1:2, :7]).last_hidden_state[0]
    assert_same(inside, alone)
    assert BertConfig().hidden_act == "gelu"
