"""A second stage continues from adapters that a first one saved: with its isolator and its learned pruner."""

from __future__ import annotations

import logging
import os

import pytest
import torch
from adapter_cases import lora, run
from loopback_hub import USER, hub  # noqa: F401
from peft import PeftModel, get_peft_model
from peft.config import PeftConfigMixin
from safetensors.torch import load_file
from tiny_models import FAMILIES
from training import make
from transformers import AutoModelForImageTextToText

from hf_dualspeed import AutoPruner
from hf_dualspeed.models.adapters import remember_origins
from hf_dualspeed.trainer.earlier_stage import holds_weights_of
from hf_dualspeed.utils.constants import ISOLATOR_WEIGHTS_NAME, PRUNER_CONFIG_NAME, PRUNER_WEIGHTS_NAME
from hf_dualspeed.utils.writing import write_json

PRUNER = {"pruner": "token_learner", "max_steps": 2}


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """A base model and the adapters of a first stage on it, as folders."""
    folder = tmp_path_factory.mktemp("stages")
    model, _ = FAMILIES["llava"].build()
    model.save_pretrained(folder / "base")
    model = AutoModelForImageTextToText.from_pretrained(folder / "base")
    trainer = run(folder / "first", get_peft_model(model, lora(init_lora_weights=True)), **PRUNER, slow_mode_ratio=0.0)
    trainer.save_model()
    return folder


def loaded(folder, adapters="first", **options):
    base = AutoModelForImageTextToText.from_pretrained(folder / "base")
    return PeftModel.from_pretrained(base, folder / adapters, is_trainable=True, **options)


def by_transformers(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder / "first")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


def by_adapter(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder / "base")
    model.load_adapter(str(folder / "first"), is_trainable=True)
    return model


def beside_another(folder):
    model = get_peft_model(AutoModelForImageTextToText.from_pretrained(folder / "base"), lora(), adapter_name="other")
    model.load_adapter(folder / "first", "default", is_trainable=True)
    return model


def merged(folder):
    return loaded(folder).merge_and_unload()


def merged_below_another(folder):
    return get_peft_model(merged(folder), lora())


def by_a_relative_path(folder):
    before = os.getcwd()
    os.chdir(folder)
    try:
        return PeftModel.from_pretrained(
            AutoModelForImageTextToText.from_pretrained("base"), "first", is_trainable=True
        )
    finally:
        os.chdir(before)


WAYS = {
    "merged": merged,
    "merged below another": merged_below_another,
    "relative path": by_a_relative_path,
    "PeftModel": loaded,
    "AutoModel": by_transformers,
    "load_adapter": by_adapter,
    "beside another": beside_another,
}


def fast_view(folder):
    return load_file(folder / ISOLATOR_WEIGHTS_NAME)["prompt"], load_file(folder / PRUNER_WEIGHTS_NAME)


@pytest.mark.parametrize("way", WAYS)
def test_isolator_and_pruner_are_those_of_the_first_stage(tmp_path, stages, way):
    prompt, weights = fast_view(stages / "first")
    second = make(tmp_path, model=WAYS[way](stages), seed=7, **PRUNER)
    assert torch.equal(second.dual_forward.isolator.prompt, prompt)
    state = second.dual_forward.pruner.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], weights[name]) for name in weights)
    second.train()
    assert not torch.equal(second.dual_forward.isolator.prompt, prompt)


def test_adapters_come_ahead_of_their_base(tmp_path, stages):
    # The base has a fast view of its own, which a first adapter takes and trains on.
    base = run(tmp_path / "base", AutoModelForImageTextToText.from_pretrained(stages / "base"), **PRUNER)
    base.save_model()
    prompt, _ = fast_view(tmp_path / "base")
    model = get_peft_model(AutoModelForImageTextToText.from_pretrained(tmp_path / "base"), lora())
    first = make(tmp_path / "first", model=model, slow_mode_ratio=0.0, **PRUNER)
    assert torch.equal(first.dual_forward.isolator.prompt, prompt)
    first.train()
    first.save_model()
    second = make(tmp_path / "second", model=loaded(tmp_path), **PRUNER)
    assert torch.equal(second.dual_forward.isolator.prompt, first.dual_forward.isolator.prompt)
    assert not torch.equal(second.dual_forward.isolator.prompt, prompt)


def test_an_adapter_in_a_folder_of_its_own_finds_what_lies_above(tmp_path, stages):
    model = get_peft_model(AutoModelForImageTextToText.from_pretrained(stages / "base"), lora(), adapter_name="mine")
    first = run(tmp_path / "first", model, **PRUNER)
    first.save_model()
    for name in ("mine", "default"):
        again = loaded(stages, tmp_path / "first" / "mine", adapter_name=name)
        second = make(tmp_path / "second", model=again, **PRUNER)
        assert torch.equal(second.dual_forward.isolator.prompt, first.dual_forward.isolator.prompt)


def test_an_isolator_of_another_length_is_an_error(tmp_path, stages):
    with pytest.raises(ValueError, match=r"`isolator_length` is 2 .* holds an isolator of length 4"):
        make(tmp_path, model=loaded(stages), isolator_length=2)


def test_adapters_from_the_hub(tmp_path, stages, hub):  # noqa: F811
    from huggingface_hub import HfApi

    HfApi().create_repo(f"{USER}/first")
    HfApi().upload_folder(repo_id=f"{USER}/first", folder_path=stages / "first", ignore_patterns=["checkpoint-*"])
    base = AutoModelForImageTextToText.from_pretrained(stages / "base")
    model = PeftModel.from_pretrained(base, f"{USER}/first", is_trainable=True)
    second = make(tmp_path, model=model, **PRUNER)
    assert torch.equal(second.dual_forward.isolator.prompt, fast_view(stages / "first")[0])


def test_a_model_from_the_hub(tmp_path, hub, caplog):  # noqa: F811
    from huggingface_hub import HfApi

    first = make(tmp_path / "first", slow_mode_ratio=0.0, max_steps=2)
    first.train()
    first.save_model()
    HfApi().create_repo(f"{USER}/whole")
    HfApi().upload_folder(repo_id=f"{USER}/whole", folder_path=tmp_path / "first")
    model = AutoModelForImageTextToText.from_pretrained(f"{USER}/whole")
    second = make(tmp_path / "second", model=model)
    assert torch.equal(second.dual_forward.isolator.prompt, first.dual_forward.isolator.prompt)
    # A plain model starts anew, without a word.
    HfApi().delete_files(f"{USER}/whole", ["mode_isolator.safetensors", "pruner_config.json"])
    model = AutoModelForImageTextToText.from_pretrained(f"{USER}/whole", force_download=True)
    with caplog.at_level(logging.WARNING):
        third = make(tmp_path / "third", model=model)
    assert "anew" not in caplog.text
    assert not torch.equal(third.dual_forward.isolator.prompt, first.dual_forward.isolator.prompt)


def test_a_second_trainer_of_the_same_model_goes_on(tmp_path, stages, caplog):
    model = loaded(stages)
    make(tmp_path, model=model, **PRUNER)  # trains nothing
    first = make(tmp_path, model=model, slow_mode_ratio=0.0, **PRUNER)
    assert torch.equal(first.dual_forward.isolator.prompt, fast_view(stages / "first")[0])
    first.train()
    trained = {name: tensor.clone() for name, tensor in first.dual_forward.state_dict().items()}
    with caplog.at_level(logging.WARNING):
        second = make(tmp_path, model=model, seed=7, **PRUNER)
        assert "starts anew" not in caplog.text
    assert all(torch.equal(second.dual_forward.state_dict()[name], trained[name]) for name in trained)
    with caplog.at_level(logging.WARNING):
        make(tmp_path, model=model, isolator_length=8, **PRUNER)
    assert "ModeIsolator starts anew: what was trained with this model is a ModeIsolator(length=4" in caplog.text


@pytest.mark.parametrize("change", ["merge", "wrap"])
def test_the_same_model_goes_on_merged_or_with_new_adapters(tmp_path, stages, change):
    base = AutoModelForImageTextToText.from_pretrained(stages / "base")
    model = get_peft_model(base, lora()) if change == "merge" else base
    first = run(tmp_path / "first", model, **PRUNER)
    trained = {name: tensor.clone() for name, tensor in first.dual_forward.state_dict().items()}
    model = model.merge_and_unload() if change == "merge" else get_peft_model(model, lora())
    second = make(tmp_path / "second", model=model, seed=7, **PRUNER)
    state = second.dual_forward.state_dict()
    assert all(torch.equal(state[name], trained[name]) for name in trained)
    assert sum("isolator" in name for name, _ in model.named_parameters()) == 1
    second.train()
    assert not torch.equal(second.dual_forward.isolator.prompt, trained["isolator.prompt"])
    with pytest.raises(ValueError, match="another DualSpeedTrainer has been made"):
        first.train()


def test_a_learned_pruner_of_another_kind_starts_anew_by_name(tmp_path, stages, caplog):
    with caplog.at_level(logging.WARNING):
        make(tmp_path, model=loaded(stages), **{**PRUNER, "pruner": "dynamicvit"})
    assert "The pruner 'dynamicvit' starts anew: what was trained and saved in" in caplog.text
    assert "'token_learner'" in caplog.text
    # Nor does it take code of its own, which is not run.
    write_json(tmp_path / PRUNER_CONFIG_NAME, {"pruner_type": "mine", "auto_map": {"AutoPruner": "mine.Mine"}})
    (tmp_path / PRUNER_WEIGHTS_NAME).touch()
    assert not holds_weights_of(tmp_path, AutoPruner.from_name("dynamicvit", hidden_size=8))
    assert "is a 'mine'" in caplog.text


def test_adapters_of_unknown_origin_are_named(tmp_path, stages, monkeypatch, caplog):
    # As if they were loaded before the trainer was imported.
    with monkeypatch.context() as patched:
        patched.setattr(PeftConfigMixin, "from_pretrained", classmethod(PeftConfigMixin.from_pretrained.__wrapped__))
        model = loaded(stages)
    with caplog.at_level(logging.WARNING):
        make(tmp_path, model=model)
    assert "The adapter 'default' was trained before, but it is not known where it was read from" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):  # one that is new, and one that begins elsewhere than at zero
        for begins in (True, False):
            base = AutoModelForImageTextToText.from_pretrained(stages / "base")
            make(tmp_path, model=get_peft_model(base, lora(init_lora_weights=begins)))
    assert "was trained before" not in caplog.text


def test_origins_are_remembered_once():
    once = PeftConfigMixin.from_pretrained.__func__
    remember_origins()
    assert PeftConfigMixin.from_pretrained.__func__ is once
    assert not hasattr(once.__wrapped__, "__wrapped__")
