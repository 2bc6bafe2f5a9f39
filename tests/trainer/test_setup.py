"""What a trainer refuses at construction, and what it takes in that was changed between construction and training."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny_models import FAMILIES
from training import ADAPTIVE, DATA, QUIET, Collator, history, make
from transformers import Trainer
from transformers.utils.quantization_config import QuantizationMethod

from hf_dualspeed import DualSpeedTrainer, DualSpeedTrainingArguments
from hf_dualspeed.trainer import setup
from hf_dualspeed.trainer.callbacks import ModeClock
from hf_dualspeed.trainer.setup import check_fsdp, check_loading, check_shards


def llava():
    return FAMILIES["llava"].build()[0]


def trainer_of(tmp_path, model) -> DualSpeedTrainer:
    return DualSpeedTrainer(model, DualSpeedTrainingArguments(str(tmp_path), **QUIET), train_dataset=DATA)


def compiled_in_place():
    model = llava()
    model.compile(backend="eager")
    return model


REFUSED = {
    "data_parallel": (lambda: torch.nn.DataParallel(llava()), "nn.DataParallel.*accelerate launch"),
    "mixed_adapters": (
        lambda: get_peft_model(llava(), LoraConfig(target_modules=["q_proj"]), mixed=True),
        "PeftMixedModel.*mixed=False",
    ),
    "compiled": (lambda: torch.compile(llava(), backend="eager"), "has been compiled as a whole.*before torch.compile"),
    "compiled_in_place": (compiled_in_place, "has been compiled as a whole.*before torch.compile"),
    "without_head": (lambda: llava().model, "LlavaModel computes no loss.*AutoModelForImageTextToText"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_be_trained_are_refused_by_name(tmp_path, name):
    build, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, build())


def test_a_learned_pruner_lies_where_the_model_does(tmp_path):
    """The Trainer leaves a quantized model where it is, and with it what it has got: on a GPU, a pruner on the host."""
    model = llava().to("meta")
    model.quantization_method = QuantizationMethod.BITS_AND_BYTES
    trainer = make(tmp_path, model=model, pruner="dynamicvit", isolator_length=0)
    assert {parameter.device.type for parameter in trainer.dual_forward.pruner.parameters()} == {"meta"}


def test_several_gpus_in_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr(DualSpeedTrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match="2 devices in one process .*accelerate launch.* or .*CUDA_VISIBLE_DEVICES=0"):
        make(tmp_path)


def test_two_trainers_of_one_model(tmp_path):
    model = llava()
    first = make(tmp_path, model=model, max_steps=1)
    second = make(tmp_path, model=model, max_steps=1)
    for use in (first.train, first.evaluate):
        with pytest.raises(ValueError, match="another DualSpeedTrainer has been made"):
            use()
    second.train()
    assert len(history(second, "loss")) == 1


def test_another_model_put_in_place(tmp_path):
    trainer = make(tmp_path, max_steps=1)
    trainer.model = llava()
    with pytest.raises(ValueError, match="`trainer.model` is no longer the model.*Make a new trainer"):
        trainer.train()


def test_a_model_that_got_adapters_since(tmp_path):
    trainer = make(tmp_path, max_steps=1)
    trainer.model = get_peft_model(trainer.model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="`trainer.model` .* has adapters since.*Make a new trainer"):
        trainer.train()


def test_a_copied_trainer_trains_the_same(tmp_path):
    trainer = make(tmp_path, slow_mode_ratio=0.5)
    copied = copy.deepcopy(trainer)
    for each in (copied, trainer):
        assert each.evaluate()["eval_loss"] > 5
        each.train()
    assert history(copied, "loss", "fast_loss", "slow_loss") == history(trainer, "loss", "fast_loss", "slow_loss")
    assert torch.equal(copied.model.lm_head.weight, trainer.model.lm_head.weight)


@pytest.mark.parametrize("removed", [None, ModeClock])
def test_an_emptied_list_of_callbacks_trains_the_same(tmp_path, removed):
    saving = {"save_strategy": "steps", "save_steps": 4}
    plain, trainer = (make(tmp_path / name, slow_mode_ratio=0.5, **saving) for name in ("plain", "emptied"))
    if removed is None:
        trainer.callback_handler.callbacks.clear()
    else:
        trainer.remove_callback(removed)
    for each in (plain, trainer):
        each.train()
    assert trainer.clock.steps == plain.clock.steps
    assert sum(trainer.clock.steps.values()) == 4
    assert torch.equal(trainer.model.lm_head.weight, plain.model.lm_head.weight)


def test_an_optimizer_without_the_isolator(tmp_path):
    class Own(DualSpeedTrainer):
        def create_optimizer(self, model=None):
            self.optimizer = torch.optim.SGD([self.model.lm_head.weight], lr=1e-2)
            return self.optimizer

    with pytest.raises(ValueError, match=r"The optimizer lacks isolator.prompt.*trainer.model.parameters\(\)"):
        make(tmp_path, cls=Own).train()
    make(tmp_path, cls=Own, isolator_length=0).train()


def test_a_create_optimizer_without_arguments_in_the_trainers_place(tmp_path, monkeypatch):
    """As Qwen's own scripts put it there."""

    def create_optimizer(self):
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-2)
        return self.optimizer

    monkeypatch.setattr(Trainer, "create_optimizer", create_optimizer)
    trainer = make(tmp_path, max_steps=1)
    trainer.train()
    assert len(history(trainer, "loss")) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optim": "lomo"}, "dualspeed.isolator.prompt, would move in steps of the other"),
        ({"optim": "galore_adamw_layerwise"}, "`optim` is 'galore_adamw_layerwise', which updates .* inside backward"),
        ({"optim": "adalomo", "isolator_length": 0, "slow_mode_splits": 2}, "each part of a slow batch .* of its own"),
        ({"optim": "adalomo", "isolator_length": 0}, None),
    ],
)
def test_an_optimizer_that_steps_inside_backward(tmp_path, options, message):
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        make(tmp_path, **options)


def test_freezing_the_language_model_after_construction(tmp_path):
    trainer, given = make(tmp_path), make(tmp_path, slow_mode_ratio=0.5)
    for each in (trainer, given):
        each.model.get_decoder().requires_grad_(False)
        each.model.get_output_embeddings().requires_grad_(False)
        each.train()
    assert trainer.slow_mode_ratio == 0
    assert given.slow_mode_ratio == 0.5  # the user's own


@pytest.mark.parametrize("restore", [True, False])
def test_an_adaptive_schedule_goes_on_with_restored_callbacks(tmp_path, restore):
    whole = make(tmp_path, max_steps=8, save_strategy="steps", save_steps=4, **ADAPTIVE)
    whole.train()
    resumed = make(tmp_path, max_steps=8, restore_callback_states_from_checkpoint=restore, **ADAPTIVE)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert history(resumed, "loss", "slow_mode_ratio") == history(whole, "loss", "slow_mode_ratio")
    assert resumed.clock.steps == whole.clock.steps


@pytest.mark.parametrize("given", [None, {"split_batches": False}, {"even_batches": True, "dispatch_batches": None}])
def test_streamed_data_with_any_accelerator_config(tmp_path, given):
    options = {} if given is None else {"accelerator_config": given}
    trainer = make(tmp_path, data=Dataset.from_list(DATA).to_iterable_dataset(), max_steps=2, **options)
    trainer.train()
    assert len(history(trainer, "loss")) == 2


def test_the_collators_own_attributes_stay_visible(tmp_path):
    """The Trainer saves a collator's tokenizer where it has no processor."""
    family = FAMILIES["llava"]
    _, processor = family.build()
    collator = Collator(family, processor)
    collator.tokenizer = processor.tokenizer
    files = {}
    for kind in (Trainer, DualSpeedTrainer):
        folder = tmp_path / kind.__name__
        trainer = make(folder, cls=kind, max_steps=1)
        trainer = kind(llava(), trainer.args, train_dataset=DATA, data_collator=collator)
        trainer.save_model(str(folder / "saved"))
        files[kind] = {path.name for path in (folder / "saved").iterdir()}
    assert "tokenizer.json" in files[Trainer]
    assert files[Trainer] <= files[DualSpeedTrainer]
    with pytest.raises(AttributeError):
        _ = trainer.data_collator.no_such_thing


CHANGES = {
    "pruner": "random",
    "pruning_ratio": 0.25,
    "pruner_kwargs": {"dropped_tokens": "discard"},
    "isolator_length": 2,
    "position_ids": "original",
    "proportional_attention": False,
    "plain_path": True,
    "fast_mode_checkpointing": True,
    "fused_head_loss": "off",
    "vision_feature_cache": "features",
    "fast_only_parameters": ["*lm_head*"],
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_option_that_a_trainer_can_no_longer_follow(tmp_path, name):
    trainer = make(tmp_path, max_steps=1)
    setattr(trainer.args, name, CHANGES[name])
    with pytest.raises(ValueError, match=rf"`{name}` was .* when the trainer was made, and is .* make a new trainer"):
        trainer.train()


def test_options_that_a_trainer_follows_later(tmp_path):
    late = make(tmp_path / "late", pruning_ratio=0.5)
    early = make(tmp_path / "early", pruning_ratio=0.5, slow_mode_ratio=1.0, per_device_train_batch_size=3)
    late.args.slow_mode_ratio, late.args.per_device_train_batch_size = 1.0, 3
    late.args.lr_scheduler_type = "constant"
    for trainer in (late, early):
        trainer.train()
    assert late.clock.steps == {"fast": 0, "slow": 4}
    assert torch.equal(late.model.lm_head.weight, early.model.lm_head.weight)
    assert late.record()["training"] == early.record()["training"]


HALF = {"slow_mode_ratio": 0.5}


@pytest.mark.parametrize(
    ("begun", "later"),
    [
        (HALF, {"slow_warmup_steps": 2, "seed": 1}),
        (HALF, {"mode_schedule": "periodic"}),
        (ADAPTIVE, {"min_slow_mode_ratio": 0.4}),
        (ADAPTIVE, {"slow_mode_ratio": 0.9}),
        (ADAPTIVE, {"mode_schedule": "random"}),
    ],
)
def test_a_schedule_follows_options_that_are_set_later(tmp_path, begun, later):
    trainer, early = make(tmp_path, max_steps=8, **begun), make(tmp_path, max_steps=8, **{**begun, **later})
    trainer.mode_at(0)  # makes the schedule
    for name, value in later.items():
        setattr(trainer.args, name, value)
    trainer._hp_search_setup(None)  # as training begins
    assert [trainer.mode_at(step) for step in range(8)] == [early.mode_at(step) for step in range(8)]
    ours, theirs = trainer.adaptive_schedule, early.adaptive_schedule
    assert (ours and (ours.start, ours.bounds)) == (theirs and (theirs.start, theirs.bounds))
    assert ours is None or ours in trainer.callback_handler.callbacks


def test_a_second_training_counts_micro_batches_anew(tmp_path):
    trainer, seen = make(tmp_path, max_steps=1, gradient_accumulation_steps=2, pruner="random"), []
    own = trainer._step_generator
    trainer._step_generator = lambda: (seen.append(trainer._micro), own())[1]
    for _ in range(2):
        trainer.train()
    assert seen == 2 * [(0, 0), (0, 1)]


def test_a_loss_function_that_is_set_later(tmp_path):
    trainer = make(tmp_path, max_steps=1)
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: outputs.logits.mean()
    with pytest.raises(ValueError, match="`compute_loss_func` is not supported"):
        trainer.train()


@pytest.mark.parametrize("version", [1, 2])
def test_fsdp_of_version_1_is_refused(version):
    """accelerate takes it where its configuration names none."""
    with nullcontext() if version == 2 else pytest.raises(ValueError, match="of version 1.*Set `fsdp_version: 2`"):
        check_fsdp(FullyShardedDataParallelPlugin(fsdp_version=version))


@pytest.mark.parametrize("keeps_all", [True, False])
@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_shards_that_would_hold_adapters_alone_are_refused(tmp_path, kind, keeps_all, monkeypatch):
    monkeypatch.setattr(setup, "is_accelerate_available", lambda version: keeps_all)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=kind)
    adapted = get_peft_model(llava(), LoraConfig(target_modules=["q_proj"]))
    for model, options in ((llava(), {}), (adapted, {"isolator_length": 0}), (adapted, {})):
        trainer = make(tmp_path, model=model, **options)
        refused = model is adapted and not options and (kind.startswith("SHARDED") or not keeps_all)
        with pytest.raises(ValueError, match="fsdp_state_dict_type: FULL.*or newer") if refused else nullcontext():
            check_shards(plugin, trainer.model, trainer.dual_forward)


@pytest.mark.parametrize(("sharded", "tensor_parallel"), [(True, 1), (True, 2), (True, 4), (False, 1)])
def test_a_model_that_was_sharded_as_it_was_loaded_is_refused(sharded, tensor_parallel):
    """Its ranks would wait for each other's shards for ever. Tensor parallel ones have the same batches."""
    refused = sharded and tensor_parallel < 4
    with pytest.raises(ValueError, match="of 4 processes. Load it whole") if refused else nullcontext():
        check_loading(sharded, tensor_parallel, 4)


def test_samples_that_processes_share_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "get_cp_size", lambda self: 2)
    with pytest.raises(ValueError, match="`parallelism_config`, 2 processes share each sample"):
        make(tmp_path)


def test_a_model_that_is_compiled_as_a_whole(tmp_path, monkeypatch):
    assert not make(tmp_path).is_compiled
    fastv = {"pruner": "fastv", "pruner_kwargs": {"layer": 1}}
    for options in (fastv, {"pruner": "visionzip"}):
        said = f"as a whole by `torch_compile`, but the pruner '{options['pruner']}' reads.*'divprune'"
        with pytest.raises(ValueError, match=said):
            make(tmp_path, torch_compile=True, **options)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")  # as accelerate's launcher sets it
    trainer = make(tmp_path)
    assert trainer.is_compiled
    assert not trainer.encodes_once
    with pytest.raises(ValueError, match="by accelerate's configuration.*but the pruner 'fastv'"):
        make(tmp_path, **fastv)
    with pytest.raises(ValueError, match="by accelerate's configuration.*but `compile_regions` is 'eager'"):
        make(tmp_path, compile_regions="eager")
