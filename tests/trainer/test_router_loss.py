"""The loss that balances a mixture of experts: part of training as of evaluation."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from families import FAMILIES, MIXED, batch
from tiny_models import FAMILIES as TINY
from training import QUIET, history
from transformers import Trainer, TrainingArguments

from hf_dualspeed import DualSpeedTrainer, DualSpeedTrainingArguments
from hf_dualspeed.models.interface import ModelInterface

WEIGHT = 0.5


def trainer_of(tmp_path, name, cls=DualSpeedTrainer, asks=True, rows=MIXED, **options):
    family = FAMILIES[name]
    model = family.model()
    text = model.config.get_text_config()
    text.output_router_logits, text.router_aux_loss_coef = asks, WEIGHT
    if hasattr(model, "router_aux_loss_coef"):  # some read it once
        model.router_aux_loss_coef = WEIGHT
    options = {
        "max_steps": 3,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "per_device_train_batch_size": len(rows),
    } | options
    if cls is DualSpeedTrainer:
        options = {"position_ids": family.position_ids, "pruning_ratio": 0.5, **options}
    arguments = TrainingArguments if cls is Trainer else DualSpeedTrainingArguments
    data = [{"row": row} for row in range(len(rows))]
    return cls(
        model,
        arguments(str(tmp_path), remove_unused_columns=False, train_sampling_strategy="sequential", **QUIET, **options),
        train_dataset=data,
        eval_dataset=data,
        data_collator=lambda examples: batch(
            family, model, [rows[e["row"]] for e in examples], seeds=[e["row"] for e in examples]
        ),
    )


ROUTED = ["qwen3_vl_moe", "ernie4_5_vl_moe", "glm4v_moe", "qwen3_5_moe", "qwen3_omni_moe", "minimax_m3_vl"]


@pytest.mark.parametrize("name", ROUTED)
def test_slow_steps_without_distillation_are_the_plain_trainer(tmp_path, name):
    plain = trainer_of(tmp_path, name, Trainer)
    plain.train()
    ours = trainer_of(tmp_path, name, slow_mode_ratio=1.0, distillation_weight=0.0)
    assert ModelInterface(ours.model).takes_router_logits
    ours.train()
    logs = torch.tensor(history(ours, "loss", "grad_norm", "slow_loss", "router_loss"))
    torch.testing.assert_close(logs[:, :2], torch.tensor(history(plain, "loss", "grad_norm")), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logs[:, 0], logs[:, 2:].sum(1))
    assert (logs[:, 3] > 0.1).all()
    assert ours.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-4)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_it_counts_in_fast_steps_and_beside_a_teacher(tmp_path, ratio):
    routed = trainer_of(tmp_path, "qwen3_vl_moe", slow_mode_ratio=ratio, max_steps=1)
    without = trainer_of(tmp_path, "qwen3_vl_moe", asks=False, slow_mode_ratio=ratio, max_steps=1)
    for trainer in (routed, without):
        trainer.train()
    (loss, router, norm), (bare, nothing, other) = (
        history(t, "loss", "router_loss", "grad_norm")[0] for t in (routed, without)
    )
    assert nothing is None
    assert router > 0.1
    assert norm != other
    assert loss == pytest.approx(bare + router, rel=1e-4)


def test_accumulation_and_parts_take_its_mean(tmp_path):
    # A row to a micro-batch, or to a part of a slow batch: the same mean over the rows.
    rows = [[3, "image", 5, "image", 4]] * 2
    options = {"rows": rows, "slow_mode_ratio": 1.0, "max_steps": 1}
    accumulated = trainer_of(
        tmp_path, "qwen3_vl_moe", **options, per_device_train_batch_size=1, gradient_accumulation_steps=2
    )
    split = trainer_of(tmp_path, "qwen3_vl_moe", **options, slow_mode_splits=2)
    logs = []
    for trainer in (accumulated, split):
        trainer.train()
        logs.append(history(trainer, "loss", "router_loss", "grad_norm")[0])
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)


@pytest.mark.parametrize("coefficient", [0.5, 0.25, 0.0])
def test_over_trl_it_is_that_of_its_own_trainer(tmp_path, coefficient):
    pytest.importorskip("trl")
    from sft_training import QUIET as SFT_QUIET
    from trl import SFTConfig, SFTTrainer

    from hf_dualspeed import DualSpeedSFTConfig, DualSpeedSFTTrainer

    family, logs = FAMILIES["ernie4_5_vl_moe"], []  # it reads its config's coefficient once, before TRL sets it
    ours = {"slow_mode_ratio": 1.0, "distillation_weight": 0.0}
    for cls, config, own in ((SFTTrainer, SFTConfig, {}), (DualSpeedSFTTrainer, DualSpeedSFTConfig, ours)):
        model = family.model()
        options = {"max_steps": 2, "per_device_train_batch_size": 3, "optim": "sgd"}
        options |= {"logging_steps": 1, "max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
        trainer = cls(
            model,
            config(
                str(tmp_path),
                router_aux_loss_coef=coefficient,
                remove_unused_columns=False,
                **SFT_QUIET,
                **options,
                **own,
            ),
            train_dataset=Dataset.from_list([{"row": row} for row in range(len(MIXED))]),
            data_collator=lambda examples, model=model: batch(
                family, model, [MIXED[e["row"]] for e in examples], seeds=[e["row"] for e in examples]
            ),
            processing_class=TINY["qwen2_5_vl"].build()[1],
        )
        trainer.train()
        logs.append(torch.tensor(history(trainer, "loss", "grad_norm")))
        assert ("router_loss" in trainer.state.log_history[0]) == (coefficient > 0 and bool(own))
    torch.testing.assert_close(logs[1], logs[0], rtol=1e-4, atol=1e-5)


def test_layers_of_other_lengths_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"The pruner 'pyramiddrop' drops tokens between layers.*Set it to False"):
        trainer_of(tmp_path, "qwen3_vl_moe", pruner="pyramiddrop")
    trainer_of(tmp_path, "qwen3_vl_moe", pruner="pyramiddrop", asks=False)
