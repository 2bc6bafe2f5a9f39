"""Fast steps whose samples lie in one row train as padded ones do, and what cannot be kept apart is refused."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, batch
from families.cases import batch_of
from launching import DDP, assert_same_training, run
from peft import LoraConfig, get_peft_model
from tiny_models import FAMILIES as TINY
from training import history, make

from hf_dualspeed import AutoPruner, ModeIsolator
from hf_dualspeed.conformance import padding_free_is_padded
from hf_dualspeed.trainer.dual_forward import DualForward
from hf_dualspeed.trainer.schedule import FAST, SLOW

OPTIONS = {
    "mode_schedule": "periodic",
    "slow_mode_ratio": 0.5,
    "pruning_ratio": 0.5,
    "optim": "sgd",
    "per_device_train_batch_size": 4,
}
CLOSE = {"rtol": 1e-3, "atol": 1e-5}
REFUSED = {
    "lfm2_vl": "layers of kind 'conv'",
    "lfm3_vl": "layers of kind 'conv'",
    "qwen3_5": "layers of kind 'linear_attention'",
    "qwen3_5_moe": "layers of kind 'linear_attention'",
    "minicpmv4_6": "layers of kind 'linear_attention'",
    "minicpmv4_7": "layers of kind 'linear_attention'",
    "llama4": "layers of kind 'chunked_attention'",
    "minimax_m3_vl": "takes position ids for places in the sequence",
    "mistral_large4": "layers of kind",
    "inkling": "layers of kind 'hybrid', 'hybrid_sliding'",
    "inkling2": "layers of kind 'hybrid', 'hybrid_sliding'",
    "dots3_note": "layers of kind",
    "glm5_next": "layers of kind 'indexed_attention'",
    "nemotron_h_omni": "layers of kind",
    "qwen4_exp": "layers of kind 'indexed_attention', 'linear_attention'",
}


def forward_of(model, padding_free=True, **options):
    torch.manual_seed(0)
    isolator = ModeIsolator.for_model(model, 2)
    forward = DualForward(
        AutoPruner.from_name("divprune", pruning_ratio=0.5), isolator, "compact", padding_free=padding_free, **options
    )
    forward.attach(model)
    return forward


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "gemma3", "aya_vision"])
def test_losses_and_gradients_under_eager_attention(name):
    """Those under SDPA, of all families, are a check of conformance."""
    model = FAMILIES[name].model()
    model.set_attn_implementation("eager")
    for side in ("right", "left"):
        assert padding_free_is_padded(model, batch_of(FAMILIES[name], model, "image", side)) is None


def test_families_are_taken_or_refused_by_name():
    for name, family in FAMILIES.items():
        model = family.model()
        if name not in REFUSED:
            forward_of(model)
            continue
        with pytest.raises(ValueError, match=f"`padding_free` is True, but .*{REFUSED[name]}.*Set padding_free=False"):
            forward_of(model)
        assert "dualspeed" not in dict(model.named_children())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation_checkpointing": True, "fast_mode_checkpointing": True},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"slow_mode_splits": 2},
        {"proportional_attention": False, "supervised_logits_only": False},
        {"pruner_kwargs": {"dropped_tokens": "discard"}, "position_ids": "original", "isolator_length": 0},
    ],
)
@pytest.mark.parametrize("family", TINY)
def test_the_same_training(tmp_path, family, options):
    padded, row = (make(tmp_path, family, padding_free=free, **OPTIONS | options) for free in (False, True))
    padded.train()
    row.train()
    keys = ("loss", "grad_norm", "fast_loss", "slow_loss", "distillation_loss")
    for ours, theirs in zip(history(row, *keys), history(padded, *keys), strict=True):
        assert [x is None for x in ours] == [x is None for x in theirs]
        pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None]
        torch.testing.assert_close(*torch.tensor(pairs).T, rtol=1e-3, atol=1e-5)
    expected = dict(padded.model.named_parameters())
    for name, parameter in row.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=2e-3, atol=2e-5)
    assert row.clock.fast_tokens < padded.clock.fast_tokens


def test_the_same_training_of_adapters_and_compiled_layers(tmp_path):
    histories = []
    for free in (False, True):
        model, _ = TINY["llava"].build()
        torch.manual_seed(0)
        config = LoraConfig(target_modules=r".*language_model.*\.(q_proj|v_proj)", r=2, init_lora_weights=False)
        model = get_peft_model(model, config)
        trainer = make(tmp_path, model=model, padding_free=free, **OPTIONS)
        if free:
            torch._dynamo.reset()
            for layer in model.get_base_model().model.language_model.layers:
                layer.compile(backend="eager", dynamic=True)
        trainer.train()
        histories.append(torch.tensor(history(trainer, "loss", "grad_norm")))
    torch._dynamo.reset()  # what was compiled counts against a limit in later tests
    torch.testing.assert_close(*histories, rtol=1e-3, atol=1e-5)


def test_attention_sees_samples_and_all_else_one_row(monkeypatch):
    """No mask over the whole row: its cost would be that of the square of all samples together."""
    family = FAMILIES["llava"]
    model = family.model()
    inputs = batch(family, model, [[4, "image"], [9], ["image", 2]])  # two images in three samples
    forward = forward_of(model)
    seen, rows = [], []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, value, attn_mask=None, **options):
        seen.append((query.shape[0], query.shape[2], None if attn_mask is None else tuple(attn_mask.shape)))
        return attend(query, key, value, attn_mask=attn_mask, **options)

    layer = model.model.language_model.layers[0]
    layer.mlp.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[:2]))
    with forward.in_mode(FAST) as done:
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
        model(**inputs)
    longest = max(length for count, length, _ in seen if count == 3)
    assert rows == [(1, done.tokens)]
    assert {shape for shape in seen if shape[0] == 3} == {(3, longest, (3, 1, longest, longest))}
    assert longest < done.tokens < 3 * longest


@pytest.mark.parametrize("padding_free", [True, False])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_sample_of_ones_own_first_token_is_no_target(side, padding_free):
    family = FAMILIES["llava"]
    model = family.model()
    inputs = batch(family, model, [[4, "image"], [9], ["image", 2]], side)
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)  # the first ones, too
    inputs["labels"] = inputs["labels"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
    forward = forward_of(model, padding_free)
    with forward.in_mode(SLOW, distil=True):
        assert len(model(**inputs).targets) == 15
    with forward.in_mode(FAST):
        out = model(**inputs)
    # 4, 9 and 2 text tokens, each predicted by the one before it within its sample.
    assert len(out.targets) == 15
    assert (out.targets != inputs["input_ids"][inputs["attention_mask"].bool()][0]).all()


@pytest.mark.parametrize("padding_free", [True, False])
def test_labels_of_first_tokens_count_in_no_mode(tmp_path, padding_free):
    """Left padding would predict them: then teacher, student and the number of items would differ."""
    trainer = make(tmp_path, padding_free=padding_free, **OPTIONS | {"slow_mode_ratio": 1.0, "max_steps": 1})
    model, items = trainer.model, []

    def everything(examples):
        made = batch(FAMILIES["llava"], model, [[4], [9], [2], [6]], "left")
        return made | {"labels": made["input_ids"].masked_fill(made["attention_mask"] == 0, -100)}

    trainer.given_collator = everything
    trainer._follow_arguments()
    made = trainer.data_collator([])
    assert (made["labels"] != -100).sum(1).tolist() == [4, 9, 2, 6]
    step = trainer.training_step
    trainer.training_step = lambda *args, **kwargs: (items.append(int(args[2])), step(*args, **kwargs))[1]
    trainer.train()
    assert items == [21]
    assert history(trainer, "distillation_loss")[0][0] is not None


def test_a_batch_of_text_and_one_of_a_single_sample(tmp_path):
    family = FAMILIES["llava"]
    model = family.model()
    texts = batch(family, model, [[4], [9], [2]])
    logits = []
    for free in (False, True):
        with forward_of(model, free).in_mode(FAST) as done:
            logits.append(model(**texts).logits)
        assert done.tokens == (3 + 4 + 9 + 2 if free else 3 * 10)
    torch.testing.assert_close(*logits, **CLOSE)
    single = batch(family, model, [[4, "image", 3]])
    pair = []
    for free in (False, True):
        with forward_of(model, free).in_mode(FAST):
            pair.append(model(**single).logits)
    assert torch.equal(*pair)


def test_the_teacher_of_one_row_is_the_padded_one():
    family = FAMILIES["qwen2_5_vl"]
    model = family.model()
    inputs = batch(family, model, [[4, "image", 3], [9], ["image", 5]], "left")
    passes, rows = [], []
    model.model.language_model.layers[0].mlp.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    for free in (False, True):
        with forward_of(model, free).in_mode(SLOW, distil=True):
            passes.append(model(**inputs))
    assert rows == [3, 3, 1, 3]  # the student is not shortened
    torch.testing.assert_close(passes[1].teacher_logits, passes[0].teacher_logits, **CLOSE)
    torch.testing.assert_close(passes[1].logits, passes[0].logits, **CLOSE)


def test_a_pruner_between_layers_is_refused(tmp_path):
    message = "`padding_free` is True, but the pruner 'pyramiddrop' drops tokens between layers, row by row"
    with pytest.raises(ValueError, match=f"{message}. Set padding_free=False"):
        make(tmp_path, padding_free=True, pruner="pyramiddrop")


def test_the_option_is_followed_from_the_start_or_never(tmp_path):
    trainer = make(tmp_path, **OPTIONS)
    trainer.args.padding_free = True
    with pytest.raises(ValueError, match="`padding_free` was False when the trainer was made"):
        trainer.train()
    assert not make(tmp_path, padding_free=True, plain_path=True, **OPTIONS).dual_forward.padding_free


@pytest.mark.slow
@pytest.mark.distributed
def test_ddp_equals_one_process_that_pads(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    (alone,) = run(one, "--batch", "4", "--max-steps", "4")
    ranks = run(two, "--batch", "2", "--max-steps", "4", "--padding-free", config=DDP)
    assert_same_training(one, two, alone, ranks)


def test_rounded_lengths_are_refused_beside_it(tmp_path):
    with pytest.raises(ValueError, match="`padding_free` is True, and `fast_length_multiple` is 8, which pads"):
        make(tmp_path, padding_free=True, fast_length_multiple=8, **OPTIONS)
