"""Adapters through the trainer: what moves, what is saved, resumed and merged, and one for the fast view alone."""

from __future__ import annotations

import pytest
import torch
from adapter_cases import PROMPT, TARGETS, adapted, changed, lora, run, snapshot
from families import FAMILIES as ALL
from families import MIXED, MIXED_AUDIO, MIXED_VIDEO
from families import batch as written
from huggingface_hub import ModelCard
from peft import AdaLoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import FAMILIES, batch
from training import DATA, QUIET, Collator, history, learned_pruner, make  # noqa: F401
from transformers import AutoProcessor, TrainerCallback

from hf_dualspeed import DualSpeedTrainer, DualSpeedTrainingArguments
from hf_dualspeed.models.components import parameter_roles
from hf_dualspeed.trainer import dual_forward
from hf_dualspeed.trainer.dual_forward import PassState


@torch.no_grad()
def logits(model, inputs):
    return model.eval()(**inputs).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_only_adapters_and_isolator_move(tmp_path, family):
    model, processor, _ = adapted(family)
    trainer = make(tmp_path, family, model=model, slow_mode_ratio=0.5, max_steps=6)
    assert trainer.slow_mode_ratio == 0.5
    before = snapshot(model)
    trainer.train()
    moved = changed(model, before)
    assert PROMPT in moved
    assert all("lora_" in name for name in moved - {PROMPT})
    assert len(moved) > 1
    trainer.processing_class = None  # Qwen's tiny processor lacks a video part, which saving asks for
    trainer.save_model()
    base, _ = FAMILIES[family].build()
    loaded = PeftModel.from_pretrained(base, tmp_path)
    inputs = batch(FAMILIES[family], processor)
    expected = logits(model, inputs)
    torch.testing.assert_close(logits(loaded, inputs), expected)
    torch.testing.assert_close(logits(loaded.merge_and_unload(), inputs), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["multi_modal_projector"]}], ids=["lora", "projector"])
@pytest.mark.parametrize("reloaded", [False, True])
def test_merged_weights_are_a_plain_checkpoint(tmp_path, reloaded, options):
    model, processor, _ = adapted(**options)
    trainer = run(tmp_path, model)
    inputs = batch(FAMILIES["llava"], processor)
    expected = logits(model, inputs)
    if reloaded:
        trainer.save_model()
        base, _ = FAMILIES["llava"].build()
        merged = PeftModel.from_pretrained(base, tmp_path).merge_and_unload()
    else:
        merged = trainer.model.merge_and_unload()
    assert not [name for name, _ in merged.named_modules() if "lora" in name or "dualspeed" in name]
    assert not merged._forward_hooks
    assert not merged._forward_pre_hooks
    folder = tmp_path / "merged"
    merged.save_pretrained(folder)
    assert not [path.name for path in folder.iterdir() if "adapter" in path.name or "isolator" in path.name]
    loaded, info = type(merged).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(logits(loaded, inputs), logits(merged, inputs), rtol=0, atol=0)
    torch.testing.assert_close(logits(loaded, inputs), expected, rtol=1e-4, atol=1e-5)


def with_two_adapters():
    model, _, config = adapted()
    model.add_adapter("fast", config)
    model.base_model.set_adapter(["default", "fast"])
    return model


def with_transformers_own():
    model, _ = FAMILIES["llava"].build()
    model.add_adapter(lora())
    return model


BUILDS = {
    "lora": lambda: adapted()[0],
    "with the projector": lambda: adapted(modules_to_save=["multi_modal_projector"])[0],
    "an adapter for the fast view": with_two_adapters,
    "transformers' add_adapter": with_transformers_own,
}


@pytest.mark.parametrize("name", BUILDS)
def test_a_resumed_run_continues_exactly(tmp_path, name):
    def build():
        torch.manual_seed(1)
        return BUILDS[name]()

    fast_only = {"fast_only_parameters": ["*.fast.*"]} if "fast" in name else {}
    whole = run(tmp_path, build(), save_strategy="steps", save_steps=3, **fast_only)
    rest = run(tmp_path / "rest", build(), resume=str(tmp_path / "checkpoint-3"), **fast_only)
    assert history(rest, "loss", "grad_norm")[-3:] == history(whole, "loss", "grad_norm")[-3:]
    assert not changed(rest.model, snapshot(whole.model))


def test_shards_of_an_adapter_for_the_fast_view_are_left_alone(tmp_path, monkeypatch):
    """FSDP2 gathers those of a layer in that layer, and not where a slow pass begins."""
    trainer = make(tmp_path, model=with_two_adapters(), fast_only_parameters=["*.fast.*"])

    def touched():
        return sum(1 for _ in trainer.dual_forward._touched(trainer.model, PassState("slow")))

    assert touched() > 1
    monkeypatch.setattr(dual_forward, "is_shard", lambda parameter: True)
    assert touched() == 1  # the isolator, which is gathered with the whole model


def test_a_checkpoint_without_one_of_the_adapters_is_an_error(tmp_path):
    run(tmp_path, adapted()[0], max_steps=1, save_strategy="steps", save_steps=1)
    with pytest.raises(ValueError, match=r"checkpoint-1' holds no adapter 'fast'"):
        run(tmp_path, with_two_adapters(), resume=str(tmp_path / "checkpoint-1"))


def test_the_best_adapters_come_back(tmp_path):
    model, _, _ = adapted(modules_to_save=["multi_modal_projector"])
    every = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    worst = {"load_best_model_at_end": True, "greater_is_better": True}  # for the last weights are the best
    trainer = run(tmp_path, model, learning_rate=0.03, max_steps=8, **every, **worst)
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert max(losses) > losses[-1]
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{2 * losses.index(max(losses)) + 2}")
    assert trainer.evaluate()["eval_loss"] == max(losses)
    saved = load_file(f"{trainer.state.best_model_checkpoint}/mode_isolator.safetensors")
    assert torch.equal(trainer.dual_forward.isolator.prompt, saved["prompt"])


def test_a_learned_pruner_beside_adapters(tmp_path, learned_pruner):  # noqa: F811
    # With biases in the adapter, PEFT would pick those of the pruner, too.
    model, _, _ = adapted("qwen2_5_vl", bias="all")
    trainer = make(tmp_path, "qwen2_5_vl", model=model, pruner="scored", slow_mode_ratio=0.5)
    trainer.processing_class = None
    before = snapshot(model)
    trainer.train()
    moved = changed(model, before)
    assert moved >= {PROMPT, "dualspeed.pruner.score.weight"}
    assert all(n.startswith("dualspeed.") or "lora_" in n or n.endswith(".bias") for n in moved)
    trainer.save_model()
    assert not [key for key in load_file(tmp_path / "adapter_model.safetensors") if "dualspeed" in key]


def test_a_run_of_adapters_with_biases_beside_a_learned_pruner_is_resumed(tmp_path, learned_pruner):  # noqa: F811
    options = {"pruner": "scored", "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = run(tmp_path, adapted(bias="all")[0], **options)
    rest = run(tmp_path / "rest", adapted(bias="all")[0], resume=str(tmp_path / "checkpoint-2"), **options)
    assert not changed(rest.model, snapshot(whole.model))


def test_what_is_trained_beside_adapters_and_not_saved_is_named(tmp_path, caplog):
    said = "save_model() and ordinary checkpoints lack 4 parameters that are trained beside them, such as base_model."
    model = adapted()[0]
    model.get_base_model().model.multi_modal_projector.requires_grad_(True)
    run(tmp_path, model, max_steps=1)
    assert said in caplog.text
    caplog.clear()
    for options in ({"modules_to_save": ["multi_modal_projector"]}, {"bias": "all"}, {"trainable_token_indices": [1]}):
        run(tmp_path, adapted(**options)[0], max_steps=1)
    run(tmp_path, with_transformers_own(), max_steps=1)
    assert "lack" not in caplog.text


def test_adapters_that_were_read_frozen_are_refused(tmp_path):
    adapted()[0].save_pretrained(tmp_path / "adapters")
    model = PeftModel.from_pretrained(FAMILIES["llava"].build()[0], tmp_path / "adapters")
    trainer = make(tmp_path, model=model, max_steps=1)
    with pytest.raises(ValueError, match=r"All parameters of the model are frozen.*need is_trainable=True"):
        trainer.train()


def test_a_learned_pruner_is_trained_with_a_frozen_model(tmp_path, learned_pruner):  # noqa: F811
    model = FAMILIES["llava"].build()[0].requires_grad_(False)
    trainer = make(tmp_path, model=model, pruner="scored", max_steps=2)
    before = snapshot(model)
    trainer.train()
    assert changed(model, before) >= {PROMPT, "dualspeed.pruner.score.weight"}


# --- other families, adapters on every linear layer -----------------------------------------------------------------

CASES = {
    "qwen3_vl": MIXED_VIDEO,
    "smolvlm": MIXED,
    "gemma3": MIXED,
    "llama4": MIXED,
    "voxtral": MIXED_AUDIO,
}


@pytest.mark.parametrize("name", CASES)
def test_adapters_on_all_linear_layers(tmp_path, name):
    family, rows = ALL[name], CASES[name]
    base = family.model()
    # Llama4's router is a linear layer that returns a pair, which PEFT cannot adapt.
    but = r".*\.router" if name == "llama4" else None
    model = get_peft_model(base, lora(target_modules="all-linear", exclude_modules=but))
    trainer = DualSpeedTrainer(
        model,
        DualSpeedTrainingArguments(
            str(tmp_path),
            max_steps=4,
            per_device_train_batch_size=len(rows),
            learning_rate=1e-2,
            slow_mode_ratio=0.5,
            position_ids=family.position_ids,
            remove_unused_columns=False,
            **QUIET,
        ),
        train_dataset=[{"row": row} for row in range(len(rows))],
        data_collator=lambda examples: written(
            family, base, [rows[e["row"]] for e in examples], seeds=[e["row"] for e in examples]
        ),
    )
    assert {trainer.mode_at(step) for step in range(4)} == {"fast", "slow"}
    before = snapshot(model)
    trainer.train()
    moved = changed(model, before)
    assert PROMPT in moved
    assert all("lora_" in n for n in moved - {PROMPT})
    roles = parameter_roles(base)
    reached = {roles[n.removeprefix("base_model.model.")] for n in moved - {PROMPT}}
    assert reached == {role for n, role in roles.items() if "lora_" in n}
    assert reached > {"language_model"}
    expected = logits(model, inputs := written(family, base, rows))
    trainer.model.merge_and_unload().save_pretrained(tmp_path / "merged")
    loaded, info = type(base).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(logits(loaded, inputs), expected, rtol=1e-3, atol=1e-4)


# --- the rest -------------------------------------------------------------------------------------------------------


def test_an_adapter_for_the_fast_view_alone(tmp_path):
    model = with_two_adapters()
    inputs = batch(FAMILIES["llava"], FAMILIES["llava"].build()[1])
    seen = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.before = snapshot(model)

        def on_step_end(self, args, state, control, **kwargs):
            moved = changed(model, self.before)
            seen.append((any(".fast." in n for n in moved), any(".default." in n for n in moved)))

    trainer = make(
        tmp_path,
        model=model,
        slow_mode_ratio=0.5,
        max_steps=8,
        fast_only_parameters=["*.fast.*"],
        callbacks=[Watch()],
    )
    trainer.train()
    modes = [trainer.mode_at(step) for step in range(8)]
    assert {"fast", "slow"} == set(modes)
    assert seen == [(mode == "fast", True) for mode in modes]
    # Outside of training the fast adapter is off: the plain forward is that of the default adapter alone.
    with torch.no_grad():
        trained = model.eval()(**inputs).logits
        model.base_model.set_adapter("default")
        torch.testing.assert_close(model(**inputs).logits, trained)
        model.base_model.set_adapter(["default", "fast"])
        assert not torch.allclose(model(**inputs).logits, trained)


def test_an_adapter_that_the_fast_view_alone_cannot_use(tmp_path):
    fast_only = {"fast_only_parameters": ["*.fast.*"]}
    model = adapted()[0]
    model.add_adapter("fast", lora(target_modules=r".*(language_model.*q_proj|multi_modal_projector.linear_1)"))
    model.base_model.set_adapter(["default", "fast"])
    with pytest.raises(ValueError, match=r"'fast' .* holds .*multi_modal_projector.*images are encoded without it"):
        make(tmp_path, model=model, **fast_only)
    model, _ = FAMILIES["llava"].build()
    for name in ("default", "fast"):
        model.add_adapter(lora(), name)
    model.set_adapter(["default", "fast"])
    with pytest.raises(ValueError, match=r"'fast' .* transformers' `add_adapter`.*checkpoints would lack"):
        make(tmp_path, model=model, **fast_only)


def test_a_head_of_the_fast_view_alone(tmp_path):
    model = adapted()[0]
    model.add_adapter("fast", lora(modules_to_save=["lm_head"]))
    model.base_model.set_adapter(["default", "fast"])
    head = model.get_base_model().lm_head
    assert head.active_adapters == ["fast"]
    options = {"slow_mode_ratio": 0.5, "distillation_weight": 0.0, "fast_only_parameters": ["*.fast.*"]}
    trainer, seen = make(tmp_path, model=model, **options), []
    assert head.active_adapters == []
    head.register_forward_pre_hook(lambda head, args: seen.append([*head.active_adapters]))
    trainer.train()
    assert [["fast"] if trainer.mode_at(step) == "fast" else [] for step in range(4)] == seen
    trainer.evaluate()
    assert seen[4:] == [[]] * len(seen[4:])


def test_a_later_trainer_without_a_fast_only_adapter_uses_it(tmp_path):
    model = with_two_adapters()
    inputs = batch(FAMILIES["llava"], FAMILIES["llava"].build()[1])
    expected = logits(model, inputs)
    make(tmp_path, model=model, fast_only_parameters=["*.fast.*"])
    assert not torch.allclose(logits(model, inputs), expected)
    make(tmp_path, model=model)
    assert torch.equal(logits(model, inputs), expected)


def test_the_isolator_is_trained_as_precisely_as_the_adapters(tmp_path):
    model, _ = FAMILIES["llava"].build()
    trainer = run(tmp_path, get_peft_model(model.bfloat16(), lora()), max_steps=2)
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    assert trainer.dual_forward.isolator.prompt.requires_grad
    model, _ = FAMILIES["llava"].build()
    assert make(tmp_path, model=model.bfloat16()).dual_forward.isolator.prompt.dtype == torch.bfloat16


def test_virtual_tokens_are_refused(tmp_path):
    model, _ = FAMILIES["llava"].build()
    model = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match=r"\(PromptTuningConfig\) learns virtual tokens"):
        make(tmp_path, model=model)


def test_adapters_with_a_loss_of_their_own_are_refused(tmp_path):
    options = {"target_modules": TARGETS, "init_r": 2, "target_r": 1, "total_step": 8, "tinit": 1, "tfinal": 1}
    model, _ = FAMILIES["llava"].build()
    model = get_peft_model(model, AdaLoraConfig(**options))
    assert model.active_peft_config.orth_reg_weight
    with pytest.raises(ValueError, match=r"\(AdaLoraConfig\) adds a term.*Set its orth_reg_weight=0"):
        make(tmp_path, model=model)
    model, _ = FAMILIES["llava"].build()
    model = get_peft_model(model, AdaLoraConfig(**options, orth_reg_weight=0.0))
    trainer = make(tmp_path, model=model, slow_mode_ratio=0.5, max_steps=2)
    before = snapshot(model)
    trainer.train()
    assert any("lora_E" in name for name in changed(model, before))


def test_adapters_are_saved_with_processor_and_card(tmp_path):
    base, processor = FAMILIES["llava"].build()
    trainer = DualSpeedTrainer(
        get_peft_model(base, lora()),
        DualSpeedTrainingArguments(tmp_path, **{**QUIET, "save_strategy": "steps"}, save_steps=2, max_steps=2),
        train_dataset=DATA,
        data_collator=Collator(FAMILIES["llava"], processor),  # which alone is given the processor
    )
    trainer.save_model(tmp_path / "untrained")
    assert not (tmp_path / "untrained" / "README.md").exists()
    trainer.train()
    trainer.save_model(tmp_path / "adapters")
    card = ModelCard.load(tmp_path / "adapters" / "README.md")
    assert (card.data.library_name, card.data.tags) == ("peft", ["dualspeed"])
    assert not (tmp_path / "checkpoint-2" / "README.md").exists()  # its figures would be those of half a run
    for folder in ("adapters", "checkpoint-2", "untrained"):
        AutoProcessor.from_pretrained(tmp_path / folder)


def test_the_card_is_that_of_an_adapter(tmp_path, monkeypatch):
    base, _ = FAMILIES["llava"].build()
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    trainer = run(tmp_path / "out", get_peft_model(base, lora()), max_steps=2)
    path = tmp_path / "out" / "README.md"
    path.parent.mkdir(exist_ok=True)
    trainer.model.create_or_update_model_card(path.parent)
    assert "[More Information Needed]" in path.read_text()  # PEFT's empty form, of an earlier version
    trainer.save_model()
    path.write_text(path.read_text() + "\n## Mine\n\nwords\n")
    trainer.save_model()  # as pushing does
    text = path.read_text()
    assert text.endswith("\n## Mine\n\nwords\n")
    assert "[More Information Needed]" not in text
    card = ModelCard.load(path)
    assert (card.data.library_name, card.data.tags, card.data.base_model) == ("peft", ["dualspeed"], None)
    assert str(tmp_path) not in text
    assert "An adapter for `base`, trained with DualSpeed" in text
    (code,) = [part.partition("```")[0] for part in text.split("```python\n")[1:]]
    assert 'AutoModelForImageTextToText.from_pretrained("base")' in code
    scope = {}
    monkeypatch.chdir(tmp_path)
    exec(code.replace("path/to/this/folder", "out"), scope)
    inputs = batch(FAMILIES["llava"], scope["processor"])
    torch.testing.assert_close(logits(scope["model"], inputs), logits(trainer.model, inputs), rtol=1e-4, atol=1e-5)
