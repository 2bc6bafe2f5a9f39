"""Pruners inside the language model: against references that hide or remove tokens, in training, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES, MIXED, batch
from families.cases import CASES, batch_of
from layer_reference import ISOLATOR, deep, hidden_logits, removed_logits, sharpened
from pruner_cases import tokens
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from hf_dualspeed import (
    AutoPruner,
    DualSpeedTrainer,
    DualSpeedTrainingArguments,
    ModeIsolator,
    prune_inputs,
    prune_visual_tokens,
)
from hf_dualspeed.bench.counters import count_syncs
from hf_dualspeed.pruners.fastv import FastV
from hf_dualspeed.trainer.dual_forward import DualForward
from hf_dualspeed.trainer.schedule import FAST, SLOW

REFUSED = {
    "layers of kind": "lfm2_vl qwen3_5 qwen3_5_moe minicpmv4_7 minicpmv4_6 lfm3_vl minimax_m3_vl mistral_large4 inkling"
    " inkling2 dots3_note glm5_next nemotron_h_omni qwen4_exp",
    "hidden states of its first": "qwen3_vl qwen3_vl_moe cohere_compass qwen3_omni_moe cosmos3_omni granite_docling",
    "hidden states of several layers": "granite4_vision",
    "moe_mm_token_type_ids": "ernie4_5_vl_moe",
    "per_layer_input": "gemma4",
}
ALLOWED = {("qwen3_omni_moe", "audio")}  # only its images are added to hidden states
WHY = {name: reason for reason, names in REFUSED.items() for name in names.split()}
CLOSE = {"rtol": 1e-3, "atol": 1e-4}
DEEP = ["llava", "llava_next", "smolvlm", "qwen2_5_vl", "gemma3", "paligemma"]


# Most tests are of the papers' rules: dropped tokens are gone. Those of merged ones say so.
def fastv(ratio=0.75, layer=1, **settings):
    return AutoPruner.from_name("fastv", pruning_ratio=ratio, layer=layer, **{"dropped_tokens": "discard"} | settings)


def pyramid(ratio=0.875, **settings):
    return AutoPruner.from_name("pyramiddrop", pruning_ratio=ratio, **{"dropped_tokens": "discard"} | settings)


@pytest.fixture
def drawn(monkeypatch):
    """`fastv` as a baseline of a user's own, that keeps a random subset."""

    def rank(self, tokens, k):
        return torch.rand(tokens.attention.shape, generator=tokens.generator).argsort(1)[:, :k]

    monkeypatch.setattr(FastV, "rank", rank)


def test_a_choice_is_drawn_from_the_generator_that_is_given(drawn):
    model = deep("llava")
    inputs = batch(FAMILIES["llava"], model)

    def draw(seed):
        with prune_visual_tokens(model, fastv(), generator=torch.Generator().manual_seed(seed)):
            return model(**inputs).logits

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def layers_of(model) -> list:
    """All modules in the decoder, which itself has a hook for good: a call on whose sizes nobody decides is plain."""
    return list(model.get_decoder().modules())[1:]


def isolator_of(model, length=ISOLATOR):
    torch.manual_seed(1)
    return ModeIsolator.for_model(model, length)


def stages(pruner, layers: int) -> dict[int, float]:
    return pruner.stages(layers, pruner.pruning_ratio)


def attached(model, pruner, isolator=None, scheme="original", proportional=False) -> DualForward:
    forward = DualForward(pruner, isolator, scheme, proportional_attention=proportional)
    forward.attach(model)
    return forward


def fast(model, inputs, pruner, isolator=None, scheme="original", proportional=False, progress=1.0):
    """Logits `(M, V)` of a fast pass and their targets."""
    forward = attached(model, pruner, isolator, scheme, proportional)
    try:
        with forward.in_mode(FAST, progress=progress):
            out = model(**inputs)
        return out.logits, out.targets
    finally:
        forward.detach()
        del model.dualspeed


# --- the rules ------------------------------------------------------------------------------------------------------


def test_stages_are_the_papers():
    assert stages(pyramid(), 32) == {8: 0.5, 16: 0.75, 24: 0.875}
    assert stages(pyramid(), 28) == {7: 0.5, 14: 0.75, 21: 0.875}
    assert stages(pyramid(), 2) == {1: 0.875}
    assert stages(pyramid(0.9, stages=[0.29]), 100) == {29: 0.9}
    assert list(stages(pyramid(0.0), 32).values()) == [0, 0, 0]
    assert stages(fastv(0.5, 2), 32) == {2: 0.5}
    assert AutoPruner.from_name("fastv").config.layer == 2


def test_settings_are_named_and_saved(tmp_path):
    with pytest.raises(ValueError, match="`layer` must be in .*got 0"):
        fastv(layer=0)
    with pytest.raises(ValueError, match=r"`layer` must be a whole number, got 1\.5"):
        fastv(layer=1.5)
    with pytest.raises(ValueError, match="`stages` must ascend"):
        pyramid(stages=[0.5, 0.25])
    with pytest.raises(ValueError, match=r"`stages` must be in \(0, 1\), got 1"):
        pyramid(stages=[0.5, 1])
    with pytest.raises(ValueError, match="`stages` must be a list"):
        pyramid(stages=[])
    pyramid(stages=[0.5]).save_pretrained(tmp_path)
    loaded = AutoPruner.from_pretrained(tmp_path)
    assert loaded.config == pyramid(stages=(0.5,)).config
    bare = tokens((4, 4))
    bare.attention = None
    with pytest.raises(ValueError, match=r"'pyramiddrop' needs `VisualTokens\.attention`"):
        loaded(bare)


# --- parity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "modality"), CASES, ids=lambda value: value)
def test_every_family_is_right_or_refused(name, modality):
    """Dropping tokens is hiding them from all later layers, in padded batches of rows that lose different numbers."""
    family = FAMILIES[name]
    model = sharpened(family.model())
    inputs = batch_of(family, model, modality, "left").inputs
    isolator = isolator_of(model)
    if name in WHY and (name, modality) not in ALLOWED:
        with pytest.raises(ValueError, match=f"'fastv' cannot drop tokens inside .*{WHY[name]}.*Choose a pruner"):
            fast(model, inputs, fastv(), isolator)
        assert not any(m._forward_pre_hooks for m in layers_of(model))
        return
    with torch.no_grad():
        logits, targets = fast(model, inputs, fastv(), isolator, family.position_ids)
    expected, dropped = hidden_logits(model, inputs, {1: 0.75}, isolator, family.position_ids)
    assert any(dropped)
    torch.testing.assert_close(logits, expected, **CLOSE)
    assert len(targets) == len(logits)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", DEEP)
def test_pyramid_in_a_padded_batch(name, side):
    model = deep(name)
    inputs, isolator, pruner = batch(FAMILIES[name], model, MIXED, side), isolator_of(model), pyramid()
    assert stages(pruner, 4) == {1: 0.5, 2: 0.75, 3: 0.875}
    for scheme in ("original", "compact"):
        with torch.no_grad():
            logits, targets = fast(model, inputs, pruner, isolator, scheme)
        expected, _ = hidden_logits(model, inputs, stages(pruner, 4), isolator, scheme)
        torch.testing.assert_close(logits, expected, **CLOSE)
    assert targets.tolist() == inputs["labels"][inputs["labels"] != -100].tolist()
    plain, _ = fast(model, inputs, pyramid(0.0), isolator)
    assert not torch.allclose(plain, logits, atol=1e-2)  # what is dropped matters


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", DEEP)
def test_a_sample_is_pruned_alone_as_in_a_batch(name, side):
    model = deep(name)
    isolator = isolator_of(model)
    alone = [batch(FAMILIES[name], model, [row], side, seeds=[seed]) for seed, row in enumerate(MIXED)]
    for dropped in ("discard", "merge"):
        view = {"pruner": pyramid(dropped_tokens=dropped), "isolator": isolator, "proportional": dropped == "merge"}
        together, _ = fast(model, batch(FAMILIES[name], model, MIXED, side), **view)
        parts = [fast(model, inputs, **view)[0] for inputs in alone]
        torch.testing.assert_close(together, torch.cat(parts), **CLOSE)


def test_rows_of_one_length_that_lose_different_numbers_need_no_mask():
    model, masks = deep("llava"), []
    rows = [["image", 4, "image", 5], ["image", 25]]
    for layer in model.get_decoder().layers:
        layer.self_attn.register_forward_pre_hook(lambda m, a, k: masks.append(k["attention_mask"]), with_kwargs=True)
    together, _ = fast(model, batch(FAMILIES["llava"], model, rows), pyramid())
    assert masks == [None] * 4  # causality hides what fills the shorter row up
    parts = [fast(model, batch(FAMILIES["llava"], model, [row], seeds=[i]), pyramid())[0] for i, row in enumerate(rows)]
    torch.testing.assert_close(together, torch.cat(parts), **CLOSE)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_answers_choose_nothing(name):
    model = deep(name)
    inputs = batch(FAMILIES[name], model, [MIXED[2]], seeds=[2])
    first = (inputs["labels"][0] != -100).nonzero()[0]
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][0, first:] = other["input_ids"][0, first:].flip(0)
    assert not torch.equal(other["input_ids"], inputs["input_ids"])
    places = []
    for given in (inputs, other):
        forward = attached(model, pyramid())
        with forward.in_mode(FAST) as state:
            model(**given)
            places.append([cut.places.tolist() for cut in state.layers._cuts.values()])
    assert places[0] == places[1]
    assert [len(rows[0]) for rows in places[0]] == sorted((len(rows[0]) for rows in places[0]), reverse=True)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("row", [0, 2])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize("dropped", ["discard", "merge"])
@pytest.mark.parametrize("pruner", [pyramid, fastv], ids=["pyramiddrop", "fastv"])
def test_one_sample_layer_by_layer(name, pruner, dropped, row, attention):
    model, merged = deep(name), dropped == "merge"
    pruner = pruner(0.5 if pruner is fastv else 0.875, dropped_tokens=dropped)
    inputs, isolator = batch(FAMILIES[name], model, [MIXED[row]], seeds=[row]), isolator_of(model)
    expected = removed_logits(model, inputs, stages(pruner, 4), isolator, name == "gemma3", merged)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        logits, _ = fast(model, inputs, pruner, isolator, proportional=merged)
    torch.testing.assert_close(logits, expected, **CLOSE)
    if merged:
        assert not torch.allclose(logits, fast(model, inputs, pruner, isolator)[0], atol=1e-2)  # sizes matter


def flash_attention(module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, **options):
    """FlashAttention's contract, on a CPU: causal, and a mask `(B, S)` of padding or boundaries in one row."""
    length = query.shape[2]
    seen = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    if attention_mask is not None:
        assert attention_mask.shape == (len(query), length)
        seen = seen & attention_mask[:, None, None].bool()
    if len(query) == 1:
        assert cu_seq_lens_q.tolist() == [0, length]
        assert options["max_length_q"] == length
    key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], 1) for states in (key, value))
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, seen, scale=scaling)
    return out.nan_to_num().transpose(1, 2), None  # padding on the left sees nothing


AttentionInterface.register("flash_for_layers", flash_attention)
AttentionMaskInterface.register("flash_for_layers", flash_attention_mask)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize(("rows", "side"), [(MIXED, "right"), (MIXED, "left"), (MIXED[:1], "right")])
def test_under_flash_attention(name, rows, side):
    model = deep(name)
    inputs, isolator = batch(FAMILIES[name], model, rows, side), isolator_of(model)
    views = [{"pruner": pyramid(dropped_tokens=kind), "proportional": kind == "merge"} for kind in ("discard", "merge")]
    expected = [fast(model, inputs, isolator=isolator, **view)[0] for view in views]
    model.get_decoder().config._attn_implementation = "flash_for_layers"
    for view, logits in zip(views, expected, strict=True):
        torch.testing.assert_close(fast(model, inputs, isolator=isolator, **view)[0], logits, **CLOSE)


@pytest.mark.parametrize("name", DEEP)
def test_ratio_zero_is_the_plain_forward(name):
    model = deep(name)
    inputs = batch(FAMILIES[name], model, MIXED, "left")
    with torch.no_grad():
        plain = model(**inputs)
        with prune_visual_tokens(model, pyramid(0.0)):
            inside = model(**inputs)
        with prune_visual_tokens(model, pyramid()):
            pruned = model(**inputs)
        after = model(**inputs)
    mask = inputs["attention_mask"].bool()
    torch.testing.assert_close(inside.logits[mask], plain.logits[mask], **CLOSE)
    torch.testing.assert_close(after.logits, plain.logits)
    torch.testing.assert_close(inside.loss, plain.loss)
    assert pruned.logits.shape == plain.logits.shape
    assert abs(pruned.loss - plain.loss) > 1e-4


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_the_loss_inside_the_context_is_that_of_a_fast_pass(name):
    model = deep(name)
    inputs = batch(FAMILIES[name], model, MIXED, "left")
    with torch.no_grad(), prune_visual_tokens(model, pyramid(), isolator_of(model), "original"):
        out = model(**inputs)
    logits, targets = fast(model, inputs, pyramid(), isolator_of(model), proportional=True)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(logits, targets))
    assert getattr(out, "past_key_values", None) is None


# --- the sequence really gets shorter -------------------------------------------------------------------------------


def watch(model) -> list[int]:
    seen = []
    for layer in model.get_decoder().layers:
        layer.self_attn.register_forward_hook(lambda m, a, out: seen.append(out[0].shape[1]))
    return seen


def test_later_layers_see_fewer_tokens():
    model = deep("llava")
    inputs, seen = batch(FAMILIES["llava"], model), watch(model)
    fast(model, inputs, pyramid(), isolator_of(model))
    # Rows: two images of 16 tokens and 13 of text; 7 of text; one image and 10 of text. Isolators stay.
    assert seen == [13 + 2 * (16 + 3), 13 + 2 * (8 + 3), 13 + 2 * (4 + 3), 13 + 2 * (2 + 3)]


def test_nothing_waits_for_the_device_but_once():
    model = deep("llava")
    inputs = batch(FAMILIES["llava"], model)
    waits = {}
    for name, pruner in (("divprune", AutoPruner.from_name("divprune")), ("pyramiddrop", pyramid())):
        with count_syncs() as waits[name]:
            fast(model, inputs, pruner, isolator_of(model))
    assert len(waits["pyramiddrop"]) <= len(waits["divprune"]) + 1, waits


def test_hooks_are_gone_after_a_pass_and_after_an_error():
    model = deep("llava")
    inputs, layers = batch(FAMILIES["llava"], model), model.get_decoder().layers
    forward = attached(model, pyramid())
    for error in (False, True):
        with forward.in_mode(FAST):
            if error:
                handle = layers[2].register_forward_hook(lambda *call: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    model(**inputs)
                handle.remove()
            else:
                model(**inputs)
        assert not any(layer._forward_pre_hooks for layer in layers)
    with torch.no_grad():
        assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]


# --- gradients ------------------------------------------------------------------------------------------------------


def test_dropped_tokens_get_gradients_through_the_first_layers_alone():
    model = deep("llava")
    inputs, isolator = batch(FAMILIES["llava"], model), isolator_of(model)
    fast(model, inputs, pyramid(), isolator)[0].square().mean().backward()
    assert isolator.prompt.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in model.model.multi_modal_projector.parameters() if p.dim() > 1)
    assert all(p.grad.abs().sum() > 0 for n, p in model.get_decoder().named_parameters() if "proj" in n)
    # Behind the only stage nothing of a dropped token is left: cut the first layers' attention, and it has no gradient.
    states, model = [], deep("llava")

    def enter(module, args, kwargs):
        states.append(args[0].detach().requires_grad_())
        return (states[0], *args[1:]), kwargs

    layers = model.get_decoder().layers
    layers[1].register_forward_pre_hook(enter, with_kwargs=True)
    fast(model, inputs, fastv(0.75, 2), isolator)[0].sum().backward()
    (first,) = states
    assert (first.grad.abs().sum(-1) > 0)[0, :-1].all()  # through layer 1, where kept tokens still see dropped ones
    torch.nn.init.zeros_(layers[1].self_attn.o_proj.weight)
    states.clear()
    fast(model, inputs, fastv(0.75, 2), isolator)[0].sum().backward()
    touched = (states[0].grad.abs().sum(-1) > 0).sum(1).tolist()
    assert touched[0] <= 13 + 2 * (4 + 3)
    assert touched[2] <= 10 + 4 + 3


@pytest.mark.parametrize("dropped", ["discard", "merge"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_gradient_checkpointing_changes_nothing(name, reentrant, dropped):
    grads, losses = {}, {}
    for checkpointing in (False, True):
        model = deep(name).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        isolator = isolator_of(model)
        forward = attached(model, pyramid(dropped_tokens=dropped), isolator, proportional=dropped == "merge")
        with forward.in_mode(FAST):
            out = model(**batch(FAMILIES[name], model))
            loss = torch.nn.functional.cross_entropy(out.logits, out.targets)
            loss.backward()
        losses[checkpointing] = loss.detach()
        grads[checkpointing] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(losses[True], losses[False])
    assert grads[True].keys() == grads[False].keys()
    for key, grad in grads[True].items():
        torch.testing.assert_close(grad, grads[False][key], msg=lambda text, key=key: f"{key}: {text}")


def test_layers_wrapped_for_checkpointing_run_their_hooks_again():
    """As FSDP's activation checkpointing does: the hooks of the layers lie inside what is computed again."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    grads = []
    for wrap in (False, True):
        model = deep("llava").train()
        forward = attached(model, pyramid())
        inputs = batch(FAMILIES["llava"], model)
        decoder = model.get_decoder()
        inner = decoder.layers
        with forward.in_mode(FAST):
            if wrap:
                decoder.layers = torch.nn.ModuleList(checkpoint_wrapper(layer) for layer in inner)
            model(**inputs).logits.square().mean().backward()
        grads.append(inner[0].mlp.up_proj.weight.grad)
    torch.testing.assert_close(*grads)


# --- training -------------------------------------------------------------------------------------------------------


def arguments(folder, **options) -> DualSpeedTrainingArguments:
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1, "save_strategy": "no"}
    fixed = {"max_steps": 8, "learning_rate": 1e-2, "slow_mode_ratio": 0.3, "seed": 1, "pruning_ratio": 0.75}
    return DualSpeedTrainingArguments(str(folder), **{**quiet, **fixed, "per_device_train_batch_size": 3, **options})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llava", {"pruner": "pyramiddrop"}),
        ("llava", {"pruner": "fastv", "pruner_kwargs": {"layer": 1}, "activation_checkpointing": True}),
        ("qwen2_5_vl", {"pruner": "pyramiddrop", "pruner_kwargs": '{"stages": [0.25, 0.5]}'}),
        ("gemma3", {"pruner": "fastv", "pruner_kwargs": {"layer": 1}, "position_ids": "compact"}),
    ],
)
@pytest.mark.parametrize("lora", [False, True])
def test_training_in_both_modes(tmp_path, name, options, lora):
    from peft import LoraConfig, get_peft_model

    model, family = deep(name, sharp=False), FAMILIES[name]
    trained = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=4)) if lora else model
    trainer = DualSpeedTrainer(
        trained,
        arguments(tmp_path, **options),
        train_dataset=[{"row": row} for row in range(3)],
        data_collator=lambda examples: batch(family, model, [MIXED[e["row"]] for e in examples]),
    )
    before = trainer.dual_forward.isolator.prompt.detach().clone()
    trainer.train()
    assert {trainer.mode_at(step) for step in range(8)} == {FAST, SLOW}
    losses = {k: [e[k] for e in trainer.state.log_history if k in e] for k in ("fast_loss", "distillation_loss")}
    assert losses["fast_loss"][-1] < losses["fast_loss"][0]
    assert min(losses["distillation_loss"]) > 0
    assert not torch.equal(trainer.dual_forward.isolator.prompt, before)
    assert not any(m._forward_pre_hooks for m in layers_of(model))
    trainer.save_model()
    assert AutoPruner.from_pretrained(tmp_path).config == trainer._pruner.config


def test_the_teacher_drops_tokens_and_the_student_none():
    model = deep("llava")
    inputs, isolator = batch(FAMILIES["llava"], model, MIXED, "left"), isolator_of(model)
    expected, targets = fast(model, inputs, pyramid(), isolator)
    whole = model(**inputs).logits[:, :-1][inputs["labels"][:, 1:] != -100]
    forward, seen = attached(model, pyramid(), isolator), watch(model)
    with forward.in_mode(SLOW, distil=True):
        out = model(**inputs)
    torch.testing.assert_close(out.teacher_logits, expected)
    torch.testing.assert_close(out.logits, whole)
    assert torch.equal(out.targets, targets)
    assert len(set(seen[:4])) == 4
    assert set(seen[4:]) == {inputs["input_ids"].shape[1]}


def test_text_only_batches_and_repeated_passes():
    model = deep("llava")
    text = batch(FAMILIES["llava"], model, [[5], [7]])
    forward = attached(model, pyramid())
    seen = watch(model)
    for inputs in (text, batch(FAMILIES["llava"], model), text):
        with forward.in_mode(FAST):
            model(**inputs)
    assert seen[:4] == seen[8:] == [8] * 4


def test_the_ratio_follows_its_schedule():
    model = deep("llava")
    pruner = fastv(0.75, 2)
    pruner.config.pruning_schedule, pruner.config.initial_pruning_ratio = "linear", 0.0
    lengths = {}
    for progress in (0.0, 2 / 3, 1.0):
        seen = watch(copied := copy.deepcopy(model))
        fast(copied, batch(FAMILIES["llava"], model), pruner, progress=progress)
        lengths[progress] = seen[-1]
    assert lengths == {0.0: 13 + 32, 2 / 3: 13 + 16, 1.0: 13 + 8}


# --- refusals -------------------------------------------------------------------------------------------------------


def test_what_cannot_be_done_is_named():
    model = deep("llava")
    inputs = batch(FAMILIES["llava"], model)
    with pytest.raises(ValueError, match=r"'fastv' drops tokens inside the language model.*prune_visual_tokens"):
        prune_inputs(model, inputs, fastv())
    with (
        pytest.raises(ValueError, match=r"'fastv' cannot drop tokens inside Llava.* 4 layers .* \[4\]"),
        prune_visual_tokens(model, fastv(layer=4)),
    ):
        pass
    with pytest.raises(ValueError, match=r"4 layers .* \[9\]"):
        attached(model, fastv(layer=9))
    single = deep("llava", 1)
    with pytest.raises(ValueError, match="cannot drop tokens inside"):
        attached(single, pyramid())
    shared = FAMILIES["gemma4_unified"].model()
    shared.config.get_text_config().num_kv_shared_layers = 1
    with pytest.raises(ValueError, match="layers share keys and values"):
        attached(shared, fastv())
    packed = {**inputs, "position_ids": torch.arange(inputs["input_ids"].shape[1]).repeat(3, 1)}
    packed.pop("attention_mask")
    with pytest.raises(ValueError, match=r"rows of the batch hold several samples. Pad the batch instead"):
        fast(model, packed, fastv())
    with prune_visual_tokens(model, fastv()), pytest.raises(ValueError, match="covers forward"):
        model(**inputs, past_key_values=object())
    broken = {**inputs, "pixel_values": inputs["pixel_values"] * float("nan")}
    with pytest.raises(ValueError, match="`features` holds NaN"):
        fast(model, broken, fastv())


def test_deepstack_is_no_obstacle_to_stages_behind_it():
    model = deep("qwen3_vl")
    inputs, isolator, pruner = batch(FAMILIES["qwen3_vl"], model), isolator_of(model), pyramid(0.75, stages=(0.5, 0.75))
    with torch.no_grad():
        logits, _ = fast(model, inputs, pruner, isolator)
    expected, _ = hidden_logits(model, inputs, stages(pruner, 4), isolator, "original")
    torch.testing.assert_close(logits, expected, **CLOSE)
