"""DualSpeed over TRL: real training of a tiny LLaVA through `trl.SFTTrainer`'s data, collator and evaluation."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from sft_training import DATA, FAST, QUIET, SGD, completions, history, make, messages, moved, weights
from tiny_models import FAMILIES
from transformers import HfArgumentParser, TrainingArguments
from trl import SFTConfig, SFTTrainer
from trl.models.activation_offloading import get_act_offloading_ctx_manager
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from hf_dualspeed import DualSpeedSFTConfig, DualSpeedSFTTrainer, DualSpeedTrainer, DualSpeedTrainingArguments
from hf_dualspeed.models.interface import unwrap
from hf_dualspeed.trainer.checkpoints import UNFINISHED
from hf_dualspeed.trainer.length_grouping import ModeLengthSampler
from hf_dualspeed.trainer.training_args import DualSpeedArguments

LORA = {"target_modules": r".*language_model.*\.(q_proj|v_proj)", "r": 2}
ISOLATOR = "dualspeed.isolator.prompt"


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch):
    monkeypatch.setenv("CI", "true")  # TRL sends none then


# --- training -----------------------------------------------------------------------------------------------------


def test_vision_features_are_cached(tmp_path):
    found = []
    for cache in (None, str(tmp_path / "cache")):
        options = {"peft_config": LoraConfig(**LORA), "slow_mode_ratio": 0.5, "vision_feature_cache": cache, **SGD}
        torch.manual_seed(0)
        trainer = make(tmp_path / str(bool(cache)), messages(), **options)
        trainer.train()
        found.append(history(trainer, "loss", "grad_norm", "mean_token_accuracy"))
    torch.testing.assert_close(*found)
    assert history(trainer, "vision_cache_hit_rate").flatten().tolist() == [0.0] * 4 + [1.0] * 4


@pytest.mark.parametrize("layout", DATA)
def test_trains_in_both_modes(tmp_path, layout):
    trainer = make(tmp_path, DATA[layout](), slow_mode_ratio=0.5)
    assert isinstance(trainer.data_collator.collator, DataCollatorForVisionLanguageModeling)
    assert trainer.args.gradient_checkpointing  # TRL's default
    steps = []
    hook = trainer.training_step

    def step(*args, **kwargs):
        loss = hook(*args, **kwargs)
        steps.append(trainer.model.dualspeed.isolator.prompt.grad is not None)
        return loss

    trainer.training_step = step
    before, first = weights(trainer.model), trainer.evaluate()
    trainer.train()
    modes = [trainer.mode_at(index) for index in range(8)]
    assert set(modes) == {"fast", "slow"}
    assert steps == [mode == "fast" for mode in modes]  # only fast steps teach the isolator
    assert ISOLATOR in moved(trainer.model, before)
    last = trainer.evaluate()
    assert last["eval_loss"] < first["eval_loss"] - 0.5
    losses = history(trainer, "loss", "mean_token_accuracy", "num_tokens")
    assert losses[-1, 0] < losses[0, 0]
    assert losses[-1, 1] > losses[0, 1]
    assert last["eval_num_tokens"] == losses[-1, 2] > 16 * 16  # 16 visual tokens in each of 16 samples


def test_no_visual_token_is_a_label(tmp_path):
    trainer = make(tmp_path, messages())
    batch = next(iter(trainer.get_train_dataloader()))
    visual = batch["input_ids"] == trainer.processing_class.image_token_id
    assert visual.sum() == 2 * 16
    assert (batch["labels"][visual] == -100).all()
    # TRL's own collator asks the model to predict them.
    raw = trainer.data_collator.collator([messages()[0]])
    assert (raw["labels"] == trainer.processing_class.image_token_id).sum() == 16


def same_as_dualspeed_trainer(tmp_path, data, completion_only_loss, **options):
    options |= {**SGD, "slow_mode_ratio": 0.5, "gradient_checkpointing": False}
    sft = make(tmp_path / "sft", data, **options)
    sft.train()
    _, processor = FAMILIES["llava"].build()
    collator = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=completion_only_loss)
    ours = make(
        tmp_path / "ours", data, DualSpeedTrainer, DualSpeedTrainingArguments, data_collator=collator, **options
    )
    ours.train()
    keys = ("loss", "grad_norm", "fast_loss", "slow_loss", "distillation_loss", "fast_steps")
    torch.testing.assert_close(history(sft, *keys), history(ours, *keys))
    assert 0 < history(sft, "fast_steps").sum() < 8
    expected = dict(ours.model.named_parameters())
    assert ISOLATOR in expected
    for name, parameter in sft.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name])


@pytest.mark.parametrize("layout", DATA)
def test_losses_and_weights_are_those_of_dualspeed_trainer(tmp_path, layout):
    same_as_dualspeed_trainer(tmp_path, DATA[layout](), layout == "completions", gradient_accumulation_steps=2)


def test_slow_steps_without_distillation_are_those_of_sft_trainer(tmp_path):
    # Answers alone are supervised, since SFTTrainer takes visual tokens of `messages` for labels.
    plain = make(tmp_path, completions(), SFTTrainer, SFTConfig, **SGD)
    plain.train()
    ours = make(tmp_path, completions(), slow_mode_ratio=1.0, distillation_weight=0.0, **SGD)
    ours.train()
    keys = ("loss", "grad_norm", "num_tokens", "mean_token_accuracy")
    torch.testing.assert_close(history(ours, *keys), history(plain, *keys), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"assistant_only_loss": True},
        {"label_smoothing_factor": 0.1},
        {"gradient_checkpointing_kwargs": {"selective": True}},
        {"bf16": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_trl(tmp_path, options):
    trainer = make(tmp_path, messages(), slow_mode_ratio=0.5, **options)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.5


def test_activations_are_offloaded_in_slow_steps_of_several_parts(tmp_path, monkeypatch):
    """Images are encoded in the first part, and backward comes to them in the last one."""

    def on_cpu(model):
        with monkeypatch.context() as patch:
            patch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
            return get_act_offloading_ctx_manager(model, use_pin_memory=False, use_streams=False)

    monkeypatch.setattr("trl.trainer.sft_trainer.get_act_offloading_ctx_manager", on_cpu)
    monkeypatch.setattr(torch.cpu, "empty_cache", lambda: None, raising=False)
    runs = []
    for offloads in (False, True):
        options = {"slow_mode_ratio": 1.0, "slow_mode_splits": 2, "max_steps": 2, **SGD}
        trainer = make(tmp_path, messages(), activation_offloading=offloads, **options)
        trainer.train()
        runs.append(history(trainer, "loss", "grad_norm"))
    torch.testing.assert_close(*runs)


def test_assistant_only_loss_supervises_answers(tmp_path):
    trainer = make(tmp_path, messages(), assistant_only_loss=True)
    batch = trainer.data_collator([messages()[3]])
    supervised = batch["input_ids"][batch["labels"] != -100]
    assert trainer.processing_class.decode(supervised) == "a thing 3</s>"


@pytest.mark.parametrize("family", FAMILIES)
def test_several_images_and_none(tmp_path, family):
    trainer = make(tmp_path, messages(lambda index: index % 3), family=family, slow_mode_ratio=0.5)
    trainer.train()
    losses = history(trainer, "loss")
    assert losses[-1] < losses[0]


def test_text_alone(tmp_path):
    trainer = make(tmp_path, messages().remove_columns("images"), slow_mode_ratio=0.5)
    trainer.train()
    losses = history(trainer, "loss")
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("layout", DATA)
def test_batches_of_like_length(tmp_path, layout):
    trainer = make(tmp_path, DATA[layout](), train_sampling_strategy="group_by_length", slow_mode_ratio=0.5)
    lengths = trainer._sample_lengths(trainer.train_dataset)
    collated = [trainer.data_collator([trainer.train_dataset[i]])["attention_mask"].sum() for i in range(8)]
    # TRL's collator writes no BOS here, ours would: one token in every sample, which changes no order.
    assert set((lengths.full - torch.stack(collated)).tolist()) == {1}
    assert list(lengths.visual) == [[16]] * 8
    assert isinstance(trainer.get_train_dataloader().batch_sampler.sampler, ModeLengthSampler)
    trainer.train()
    assert trainer.state.global_step == 8


def test_lengths_of_a_tokenized_data_set(tmp_path):
    data = Dataset.from_list([{"text": "word " * (i + 1)} for i in range(8)])
    trainer = make(tmp_path, data, train_sampling_strategy="group_by_length", max_steps=1)
    lengths = trainer._sample_lengths(trainer.train_dataset)
    assert lengths.full.tolist() == [len(ids) for ids in trainer.train_dataset["input_ids"]]
    assert lengths.full.tolist() == sorted(set(lengths.full.tolist()))


# --- what the trainer is given ------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [False, True], ids=["peft_config", "PeftModel"])
def test_lora_moves_adapter_and_isolator_alone(tmp_path, wrapped):
    given = {"peft_config": LoraConfig(**LORA)}
    if wrapped:
        given = {"model": get_peft_model(FAMILIES["llava"].build()[0], LoraConfig(**LORA))}
    trainer = make(tmp_path, messages(), slow_mode_ratio=0.5, **given)
    model = trainer.model
    assert isinstance(model, PeftModel)
    assert model.dualspeed is trainer.dual_forward
    assert not hasattr(unwrap(model), "dualspeed")
    before = weights(model)
    trainer.train()
    changed = moved(model, before)
    assert ISOLATOR in changed
    assert len(changed) > 1
    assert all("lora_" in name for name in changed - {ISOLATOR})
    trainer.save_model()
    saved = PeftModel.from_pretrained(FAMILIES["llava"].build()[0], tmp_path)
    loaded = dict(saved.named_parameters())
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert torch.equal(loaded[name], parameter)


@pytest.mark.parametrize("peft_config", [None, LoraConfig(**LORA)], ids=["weights", "lora"])
def test_model_by_name(tmp_path, peft_config):
    model, processor = FAMILIES["llava"].build()
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    args = DualSpeedSFTConfig(str(tmp_path / "out"), **{**QUIET, **FAST, "max_steps": 2})
    base = str(tmp_path / "base")
    trainer = DualSpeedSFTTrainer(base, args, train_dataset=messages(), peft_config=peft_config)
    trainer.train()
    trainer.save_model()
    # The isolator learned so far goes on with the next stage.
    next_base = tmp_path / "out"
    if peft_config is None:
        again = DualSpeedSFTTrainer(str(next_base), args, train_dataset=messages())
        assert torch.equal(again.dual_forward.isolator.prompt, trainer.dual_forward.isolator.prompt)


def test_a_plain_config_keeps_what_was_set(tmp_path):
    args = SFTConfig(str(tmp_path), **{**QUIET, **FAST, "max_length": 99, "remove_unused_columns": True, "seed": 3})
    model, processor = FAMILIES["llava"].build()
    trainer = DualSpeedSFTTrainer(model, args, train_dataset=messages(), processing_class=processor)
    config = trainer.args
    assert isinstance(config, DualSpeedSFTConfig)
    assert not hasattr(args, "pruner")
    assert (config.max_length, config.remove_unused_columns, config.seed, config.max_steps) == (99, True, 3, 8)
    assert (config.pruner, config.pruning_ratio, config.slow_mode_ratio) == ("divprune", 0.9, 0.05)
    assert config.fast_only_parameters == []
    assert config.to_dict()["pruning_ratio"] == 0.9
    assert pickle.loads(pickle.dumps(config)).max_length == 99
    trainer.train()


def test_no_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finish = DualSpeedSFTConfig.__post_init__

    def on_cpu(self):  # TRL's defaults ask for an accelerator
        self.use_cpu = True
        finish(self)

    monkeypatch.setattr(DualSpeedSFTConfig, "__post_init__", on_cpu)
    model, processor = FAMILIES["llava"].build()
    model.config.name_or_path = "someone/tiny"
    trainer = DualSpeedSFTTrainer(model, train_dataset=messages(), processing_class=processor)
    assert trainer.args.output_dir == "tiny-SFT"
    assert trainer.args.pruning_ratio == 0.9


def test_config_is_read_from_the_command_line(tmp_path):
    words = ["--output_dir", str(tmp_path), "--max_length", "64", "--pruning_ratio", "0.5", "--use_cpu", "True"]
    (config,) = HfArgumentParser(DualSpeedSFTConfig).parse_args_into_dataclasses(words)
    assert (config.max_length, config.pruning_ratio, config.learning_rate) == (64, 0.5, SFTConfig.learning_rate)
    assert isinstance(config, DualSpeedArguments)
    with pytest.raises(ValueError, match=r"`pruning_ratio` must be in \[0, 1\), got 1.5"):
        DualSpeedSFTConfig(str(tmp_path), pruning_ratio=1.5)


# --- evaluation, saving, resuming ---------------------------------------------------------------------------------


def test_evaluation_is_that_of_sft_trainer(tmp_path):
    ours = make(tmp_path, completions(), slow_mode_ratio=0.5, max_steps=4)
    ours.train()
    plain = make(tmp_path, completions(), SFTTrainer, SFTConfig)
    rest = plain.model.load_state_dict(ours.model.state_dict(), strict=False)
    assert rest.unexpected_keys == [ISOLATOR]
    got, expected = ours.evaluate(), plain.evaluate()
    keys = ("eval_loss", "eval_entropy", "eval_mean_token_accuracy")
    assert [got[key] for key in keys] == pytest.approx([expected[key] for key in keys])


def test_resumes_where_it_stopped(tmp_path):
    options = {**SGD, "slow_mode_ratio": 0.5, "save_strategy": "steps", "save_steps": 4}
    whole = make(tmp_path, messages(), **options)
    whole.train()
    assert not (tmp_path / "README.md").exists()  # figures of a checkpoint would pass for those of the whole run
    again = make(tmp_path, messages(), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    keys = ("loss", "grad_norm", "fast_steps")
    torch.testing.assert_close(history(again, *keys), history(whole, *keys))
    expected = dict(whole.model.named_parameters())
    for name, parameter in again.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name])


def test_a_checkpoint_is_marked_while_it_is_written(tmp_path, monkeypatch):
    """As those of DualSpeedTrainer are, so that resuming after a kill skips half of one; and no card lies in it."""
    trainer, seen = make(tmp_path, messages(), save_strategy="steps", save_steps=2, max_steps=2), []
    save = trainer._save_optimizer_and_scheduler
    monkeypatch.setattr(
        trainer, "_save_optimizer_and_scheduler", lambda to: seen.append(Path(to, UNFINISHED).is_file()) or save(to)
    )
    trainer.train()
    assert seen == [True]
    assert not (tmp_path / "checkpoint-2" / UNFINISHED).exists()
    assert not (tmp_path / "README.md").exists()


def test_saved_model_and_card(tmp_path):
    trainer = make(tmp_path, messages(), slow_mode_ratio=0.5)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(model_name="tiny", dataset_name="someone/things", tags=["trl"])  # as a push does
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "someone/things" in card
    assert f"| fast | {trainer.clock.steps['fast']} |" in card
    plain = type(trainer.model).from_pretrained(tmp_path)
    expected = dict(trainer.model.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(parameter, expected[name])
    assert Path(tmp_path / "mode_isolator.safetensors").is_file()


@pytest.mark.parametrize("config", [DualSpeedSFTConfig, SFTConfig])
def test_padding_free_is_that_of_fast_steps(tmp_path, config):
    """TRL's own refuses images and takes no collator."""
    runs = []
    for free in (False, True):
        trainer = make(tmp_path, messages(), config=config, padding_free=free, max_steps=2, **SGD)
        assert trainer.args.padding_free is trainer.dual_forward.padding_free is free
        trainer.train()
        runs.append((history(trainer, "loss", "grad_norm", "num_tokens"), trainer.clock.fast_tokens))
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-3, atol=1e-5)
    assert runs[1][1] < runs[0][1]


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": True}, "`packing`=True is not supported: .* Set padding_free=True"),
        (
            {"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": True}},
            "`liger_kernel_config` has fused_linear_cross_entropy=True, which puts Liger's forward in place",
        ),
        ({"fused_head_loss": "on"}, "`fused_head_loss` is 'on', but this trainer reads more off the logits"),
        ({"loss_type": "dft"}, "`loss_type`='dft' is not supported"),
        ({"compute_loss_func": lambda *args, **kwargs: 0}, "`compute_loss_func` is not supported"),
        (
            {"peft_config": PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")},
            r"`peft_config` \(PromptTuningConfig\) learns virtual tokens",
        ),
        ({"config": TrainingArguments}, "`args` must be DualSpeedSFTConfig or trl.SFTConfig, got TrainingArguments"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, messages(), **options)


def test_ligers_kernels_without_its_loss(tmp_path, monkeypatch):
    applied = []
    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", lambda model, config: applied.append(config))
    monkeypatch.setattr("hf_dualspeed.trainer.fused_loss.without_ligers_layers", lambda interface, device: None)
    trainer = make(tmp_path, messages(), use_liger_kernel=True, liger_kernel_config={"rope": False}, max_steps=2)
    trainer.train()
    assert applied == [{"fused_linear_cross_entropy": False, "rope": False}]


def test_a_loss_of_experts_that_the_model_does_not_compute_is_refused(tmp_path):
    model, _ = FAMILIES["llava"].build()
    model.config.get_text_config().output_router_logits = False
    model.config.get_text_config().router_aux_loss_coef = 0.01
    with pytest.raises(ValueError, match=r"`router_aux_loss_coef` is 0.01 .* Set router_aux_loss_coef=0.0"):
        make(tmp_path, messages(), model=model)
    make(tmp_path, messages(), model=model, router_aux_loss_coef=0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slow_mode_ratio": 0.0}, "raise max_length"),
        ({"slow_mode_ratio": 1.0, "distillation_weight": 0.0}, "`max_length`=12 cuts visual tokens off"),
    ],
    ids=["fast", "slow"],
)
def test_cut_off_visual_tokens(tmp_path, options, message):
    trainer = make(tmp_path, completions(), max_length=12, **options)
    with pytest.raises(ValueError, match=message):
        trainer.train()
