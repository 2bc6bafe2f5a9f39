"""Batches of samples of like length: lengths, the sampler, and both in training."""

from __future__ import annotations

import logging
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, IterableDataset
from tiny_models import FAMILIES, picture
from training import QUIET, history
from transformers import TrainerCallback

from hf_dualspeed import AutoPruner, DualSpeedTrainer, DualSpeedTrainingArguments, ModeIsolator, prune_inputs
from hf_dualspeed.data.collators import VisionLanguageCollator
from hf_dualspeed.data.lengths import SampleLengths, TokenCounter, given_lengths, measured_lengths
from hf_dualspeed.data.media import image_size, open_image
from hf_dualspeed.models.interface import visual_token_ids
from hf_dualspeed.trainer.length_grouping import ModeLengthSampler, grouped

GROUPED = {"train_sampling_strategy": "group_by_length"}
SIZES = [[(16, 16)], [], [(40, 24)], [(16, 16), (24, 40)], [(32, 32)]]


def talk(index: int, words: int, images: int | None = None) -> dict:
    """A conversation with some images of different sizes; all about as one another if `images` are given."""
    sizes = SIZES[index % len(SIZES)] if images is None else [(16, 16)] * images
    turns = [("user", "<image>" * len(sizes) + "what is it? " + "so " * words), ("assistant", "it is " + "x" * words)]
    messages = [{"role": role, "content": text} for role, text in turns]
    return {"sample": index, "messages": messages, "images": [picture(*size, seed=index) for size in sizes]}


def talks(count: int, images: int | None = None, seed: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(1, 40, (count,), generator=generator).tolist()
    return [talk(index, number, images) for index, number in enumerate(words)]


class Noting(VisionLanguageCollator):
    """Hands on which samples a batch is of."""

    def __call__(self, examples):
        return {**super().__call__(examples), "samples": torch.tensor([example["sample"] for example in examples])}


class Recording(DualSpeedTrainer):
    """Notes samples, modes and padded tokens by optimizer step; with `runs` off, it does not run the model."""

    runs = True

    def training_step(self, model, inputs, num_items_in_batch=None):
        seen = self.__dict__.setdefault("seen", {})
        step, samples = self.state.global_step, inputs.pop("samples").tolist()
        seen.setdefault(step, []).append(samples)
        if not self.runs:
            self.clock.count(self.mode_at(step), 0, 0, 0)
            return torch.zeros(())
        return super().training_step(model, inputs, num_items_in_batch)

    def step_in_mode(self, *args, **kwargs):
        loss, done = super().step_in_mode(*args, **kwargs)
        self.__dict__.setdefault("tokens", []).append(done.tokens)
        return loss, done

    def steps(self) -> list[list[int]]:
        return [[sample for batch in batches for sample in batch] for batches in self.seen.values()]


def make(tmp_path, data, cls=Recording, family="llava", runs=True, callbacks=None, **options) -> DualSpeedTrainer:
    model, processor = FAMILIES[family].build()
    defaults = {"output_dir": str(tmp_path), "per_device_train_batch_size": 2, "num_train_epochs": 1, **QUIET}
    defaults |= {"pruning_ratio": 0.75, "isolator_length": 2, "speedup_rounds": 0, **GROUPED}
    cls.runs = runs
    return cls(
        model=model,
        args=DualSpeedTrainingArguments(**{**defaults, **options}),
        train_dataset=data,
        eval_dataset=data,
        data_collator=(Noting if cls is Recording else VisionLanguageCollator)(processor),
        callbacks=callbacks,
    )


def counter_of(model, processor, **options) -> TokenCounter:
    collator = VisionLanguageCollator(processor, **options)
    return TokenCounter(collator, None, visual_token_ids(model.config))


# --- lengths ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_counted_lengths_are_the_collators_and_those_after_pruning(family):
    model, processor = FAMILIES[family].build()
    counter, data = counter_of(model, processor), talks(7)
    lengths = measured_lengths(data, counter)
    pruner, isolator = AutoPruner.from_name("grid", pruning_ratio=0.75), ModeIsolator.for_model(model, 3)
    pruned = lengths.pruned(0.75, 3)
    for index, example in enumerate(data):
        batch = counter.collator([example])
        assert len(batch["input_ids"][0]) == lengths.full[index]
        visual = torch.isin(batch["input_ids"], torch.tensor(sorted(visual_token_ids(model.config)))).sum()
        assert visual == sum(lengths.visual[index])
        assert len(lengths.visual[index]) == len(example["images"])
        batch.pop("labels")
        short = prune_inputs(model, batch, pruner, isolator)
        assert short["attention_mask"].sum() == pruned[index]
    assert (lengths.full > pruned).any()
    assert (lengths.full == pruned).any()


def test_a_data_set_is_counted_without_decoding_an_image(monkeypatch):
    model, processor = FAMILIES["qwen2_5_vl"].build()
    data, counter = talks(6), counter_of(model, processor)
    expected = measured_lengths(data, counter)
    stored = Dataset.from_list(data)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    lengths = measured_lengths(stored, counter)
    assert torch.equal(lengths.full, expected.full)
    assert lengths.visual == expected.visual


def test_a_stored_data_set_is_counted_once(tmp_path, monkeypatch):
    model, processor = FAMILIES["llava"].build()
    Dataset.from_list(talks(4)).save_to_disk(tmp_path)
    first = measured_lengths(Dataset.load_from_disk(tmp_path), counter_of(model, processor))
    monkeypatch.setattr(TokenCounter, "_text_tokens", lambda *_: pytest.fail("counted again"))
    again = measured_lengths(Dataset.load_from_disk(tmp_path), counter_of(model, processor))
    assert torch.equal(again.full, first.full)
    assert list(again.visual) == list(first.visual)


@pytest.mark.parametrize("orientation", [1, 6])
def test_sizes_are_those_of_upright_images(tmp_path, orientation):
    image = picture(24, 40)
    exif = image.getexif()
    exif[0x0112] = orientation
    for name in ("image.jpg", "image.png"):
        image.save(tmp_path / name, exif=exif)
        assert image_size(tmp_path / name) == open_image(tmp_path / name).size[::-1]
    assert image_size(image, "unused") == (40, 24)


def test_lengths_end_where_the_collator_cuts():
    model, processor = FAMILIES["llava"].build()
    assert counter_of(model, processor, max_length=40)(talk(0, 30))["length"] == 40
    assert counter_of(model, processor)(talk(0, 30))["length"] > 40


def test_the_users_own_collator_counts_whatever_is_wrapped_around_it(tmp_path):
    runs = []
    for cache in (None, str(tmp_path / "features")):
        model, processor = FAMILIES["llava"].build()
        model.get_encoder(modality="image").requires_grad_(False)
        options = {"output_dir": str(tmp_path), "vision_feature_cache": cache, "max_steps": 4, "speedup_rounds": 0}
        trainer = DualSpeedTrainer(
            model,
            DualSpeedTrainingArguments(per_device_train_batch_size=2, **options, **QUIET, **GROUPED),
            train_dataset=[talk(index, 10 * index, images=1) for index in range(6)],
            data_collator=VisionLanguageCollator(processor, max_length=40),
        )
        trainer.train()
        assert max(trainer._lengths[1].full) == 40
        runs.append(history(trainer, "loss"))
    assert runs[0] == runs[1]


def test_where_a_processor_tells_no_sizes_images_count_as_the_first(monkeypatch):
    model, processor = FAMILIES["llava"].build()
    expected = counter_of(model, processor)(talk(3, 5))
    monkeypatch.delattr(type(processor), "_get_num_multimodal_tokens")
    assert counter_of(model, processor)(talk(3, 5)) == expected == {**expected, "visual_length": [16, 16]}


def test_unreadable_images_follow_the_collators_policy(tmp_path):
    model, processor = FAMILIES["llava"].build()
    example = {**talk(0, 5), "images": [str(tmp_path / "missing.png")]}
    assert counter_of(model, processor, unreadable_images="skip")(example)["visual_length"] == []
    trainer = make(tmp_path, [example])
    with pytest.raises(ValueError, match=r"'group_by_length'.*missing.png.*train_sampling_strategy='random'"):
        trainer.get_train_dataloader()


def test_given_columns_are_taken_and_checked(caplog):
    data = Dataset.from_dict({"tokens": [30, 9], "visual_tokens": [[16], []]})
    lengths = given_lengths(data, "tokens")
    assert lengths.pruned(0.75, 2).tolist() == [30 - 16 + 4 + 2, 9]
    assert given_lengths(data.with_format("torch"), "tokens").full.tolist() == [30, 9]
    assert given_lengths(list(data), "tokens").visual == [[16], []]
    assert given_lengths(data, "length") is None
    assert not caplog.text
    alone = given_lengths(data.remove_columns("visual_tokens"), "tokens")
    assert torch.equal(alone.pruned(0.75, 2), alone.full)
    assert "no 'visual_tokens': fast steps, too, are grouped by the full length" in caplog.text


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"length": [30, None]}, "`length` of sample 1 must be a whole number of tokens, got None"),
        ({"length": ["30", "9"]}, "`length` of sample 0 .* got '30'"),
        ({"length": [30, -1]}, "`length` of sample 1 .* got -1"),
        ({"length": [30, 9], "visual_length": [16, 0]}, "`visual_length` of sample 0 must be a list .* got 16"),
        ({"length": [30, 9], "visual_length": [[16], [10]]}, r"`visual_length` of sample 1 is \[10\], more than the 9"),
    ],
)
def test_columns_that_hold_no_lengths_are_refused(columns, message):
    with pytest.raises(ValueError, match=message):
        given_lengths(Dataset.from_dict(columns), "length")


# --- the sampler --------------------------------------------------------------------------------------------------


def lengths_of(count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(5, 200, (count,), generator=generator)
    visual = torch.randint(0, 600, (count,), generator=generator)
    return {"fast": text + visual // 10, "slow": text + visual}


def every(period: int):
    return lambda step: "slow" if step % period == period - 1 else "fast"


@pytest.mark.parametrize(("count", "size", "used"), [(96, 8, 96), (101, 8, 101), (101, 8, 98), (5, 8, 5), (3, 4, 0)])
@pytest.mark.parametrize("first", [0, 13])
def test_every_sample_comes_once(count, size, used, first):
    sampler = ModeLengthSampler(lengths_of(count), size, every(3), used, lambda: first)
    order = list(sampler)
    assert sorted(order) == list(range(count))
    assert len(sampler) == count
    batches, left = sampler.plan(first)
    assert [index for batch in batches for index in batch] == order[:used]
    assert left == order[used:]
    assert [len(batch) for batch in batches] == [len(c) for c in torch.arange(used).split(size) if used]
    assert len(batches) == sampler.steps_per_epoch


def test_the_order_depends_on_seed_and_first_step_alone():
    make = lambda **options: list(ModeLengthSampler(lengths_of(64), 4, every(5), **options))  # noqa: E731
    assert make() == make()
    assert make(seed=1) != make()
    assert make(first_step=lambda: 16) != make()
    state = torch.get_rng_state()
    make()
    assert torch.equal(torch.get_rng_state(), state)


def test_steps_are_cut_from_samples_sorted_by_the_length_of_their_mode():
    lengths, modes = lengths_of(80), [every(4)(step) for step in range(10)]
    chunks = torch.randperm(80, generator=torch.Generator().manual_seed(1)).split(8)
    batches = grouped(chunks, modes, lengths, torch.Generator().manual_seed(0))
    for mode in ("fast", "slow"):
        own = [lengths[mode][batch].tolist() for batch, m in zip(batches, modes, strict=True) if m == mode]
        assert all(batch == sorted(batch, reverse=True) for batch in own)
        ordered = sorted(own, reverse=True)
        assert all(high[-1] >= low[0] for high, low in pairwise(ordered))  # no two overlap
        assert mode == "slow" or own != ordered  # yet lengths do not fall from step to step


def test_the_longest_batches_come_first_where_training_begins():
    lengths = lengths_of(400)
    sampler = ModeLengthSampler(lengths, 4, every(5))
    for first, expected in ((0, True), (100, False)):
        batches, _ = sampler.plan(first)
        for mode, step in (("fast", 0), ("slow", 4)):
            own = [b for s, b in enumerate(batches) if every(5)(first + s) == mode]
            longest = max(lengths[mode][batch].max() for batch in own)
            assert (lengths[mode][batches[step]].max() == longest) == expected


def test_slow_steps_get_samples_of_all_lengths():
    lengths, epochs, period = lengths_of(200), 300, 10
    drawn = torch.zeros(200)
    sampler = ModeLengthSampler(lengths, 4, every(period))
    for epoch in range(epochs):
        first = epoch * sampler.steps_per_epoch
        for step, batch in enumerate(sampler.plan(first)[0]):
            if every(period)(first + step) == "slow":
                drawn[batch] += 1
    share = 1 / period
    assert drawn.sum() == 200 * epochs * share
    # Each sample's count is binomial; five standard deviations of 200 of them.
    assert (drawn - epochs * share).abs().max() < 5 * (epochs * share * (1 - share)) ** 0.5
    by_length = drawn[lengths["slow"].argsort()].view(4, 50).mean(1)
    assert (by_length - epochs * share).abs().max() < 5 * (epochs * share * (1 - share) / 50) ** 0.5


def test_batches_of_a_step_number_are_of_all_lengths():
    # Over epochs, neither early nor late steps get long samples more often: lengths must not drift with the schedule.
    lengths, modes = lengths_of(160), every(4)
    sampler = ModeLengthSampler(lengths, 4, modes)
    means = torch.stack(
        [
            torch.tensor([lengths["fast"][batch].float().mean() for batch in sampler.plan(40 * epoch)[0]])
            for epoch in range(1, 201)
        ]
    )
    deviation = means.std() / 200**0.5
    assert (means.mean(0) - means.mean()).abs().max() < 5 * deviation


# --- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "most"), [(0.0, 0.5), (1.0, 0.6)])
def test_less_padding_in_either_mode(tmp_path, ratio, most):
    data = talks(48, images=1)
    padding = {}
    for strategy in ("random", "group_by_length"):
        options = {"train_sampling_strategy": strategy, "slow_mode_ratio": ratio, "per_device_train_batch_size": 4}
        trainer = make(tmp_path, data, **options)
        trainer.train()
        assert sorted(sample for step in trainer.steps() for sample in step) == list(range(48))
        lengths = measured_lengths(data, counter_of(*FAMILIES["llava"].build()))
        real = (lengths.full if ratio else lengths.pruned(0.75, 2)).sum().item()
        padding[strategy] = sum(trainer.tokens) - real
    assert 0 <= padding["group_by_length"] < most * padding["random"]


@pytest.mark.parametrize(
    "options",
    [
        {"num_train_epochs": 3, "gradient_accumulation_steps": 2},
        {"num_train_epochs": 3, "gradient_accumulation_steps": 2, "dataloader_drop_last": True},
        {"num_train_epochs": 2, "slow_tail_ratio": 0.3, "slow_warmup_steps": 2},
        {"max_steps": 17, "gradient_accumulation_steps": 3, "dataloader_num_workers": 1},
        {"max_steps": 9, "accelerator_config": {"split_batches": True, "dispatch_batches": False}},
    ],
)
def test_each_step_gets_the_batch_that_was_planned_for_its_mode(tmp_path, options):
    trainer = make(tmp_path, talks(31), runs=False, slow_mode_ratio=0.4, data_seed=3, **options)
    trainer.train()
    modes = {trainer.mode_at(step) for step in range(trainer.state.max_steps)}
    assert modes == {"fast", "slow"}
    lengths = measured_lengths(talks(31), counter_of(*FAMILIES["llava"].build()))
    by_mode = {"fast": lengths.pruned(0.75, 2), "slow": lengths.full}
    size = 2 * options.get("gradient_accumulation_steps", 1)
    sampler = ModeLengthSampler(by_mode, size, trainer.mode_at, 30 if "dataloader_drop_last" in options else 31, seed=3)
    planned = []
    while len(planned) < trainer.state.max_steps:
        planned += sampler.plan(len(planned))[0]
    assert trainer.steps() == planned[: trainer.state.max_steps]


class StopAt(TrainerCallback):
    def __init__(self, step: int, what: str):
        self.step, self.what = step, what

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            setattr(control, self.what, True)


@pytest.mark.parametrize("stop", [4, 9, 16])
def test_a_resumed_run_goes_on_with_the_same_samples(tmp_path, stop):
    options = {"num_train_epochs": 3, "gradient_accumulation_steps": 2, "slow_mode_ratio": 0.4, "runs": False}
    whole = make(tmp_path / "whole", talks(30), **options)
    whole.train()
    options |= {"save_strategy": "steps", "save_steps": stop}
    begun = make(tmp_path / "cut", talks(30), callbacks=[StopAt(stop, "should_training_stop")], **options)
    begun.train()
    rest = make(tmp_path / "cut", talks(30), **options)
    rest.train(resume_from_checkpoint=True)
    assert next(iter(rest.seen)) == stop
    assert begun.steps() + rest.steps() == whole.steps()
    assert [m for step in whole.seen.values() for m in step] == [
        m for trainer in (begun, rest) for step in trainer.seen.values() for m in step
    ]


def lengths_are_those_of_modes(trainer) -> bool:
    """Whether the samples of each step lie sorted by the length that counts in its mode, and not by the other."""
    lengths = trainer._lengths_by_mode(trainer._sample_lengths(trainer.train_dataset))
    right = wrong = 0
    for step, samples in zip(trainer.seen, trainer.steps(), strict=True):
        mode = trainer.mode_at(step)
        other = {"fast": "slow", "slow": "fast"}[mode]
        right += lengths[mode][samples].tolist() == sorted(lengths[mode][samples].tolist(), reverse=True)
        wrong += lengths[other][samples].tolist() == sorted(lengths[other][samples].tolist(), reverse=True)
    return right == len(trainer.seen) > wrong


def test_modes_stay_in_line_where_epochs_end_early_or_data_is_not_skipped(tmp_path):
    options = {"num_train_epochs": 3, "per_device_train_batch_size": 6, "slow_mode_ratio": 0.4, "runs": False}
    stopped = make(tmp_path, talks(60), callbacks=[StopAt(4, "should_epoch_stop")], **options)
    stopped.train()
    assert lengths_are_those_of_modes(stopped)
    options |= {"save_strategy": "steps", "save_steps": 4, "ignore_data_skip": True}
    make(tmp_path, talks(60), callbacks=[StopAt(4, "should_training_stop")], **options).train()
    rest = make(tmp_path, talks(60), **options)
    rest.train(resume_from_checkpoint=True)
    assert next(iter(rest.seen)) == 4
    assert lengths_are_those_of_modes(rest)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_a_step_on_all_samples_is_that_of_random_batches(tmp_path, ratio):
    logs = []
    for strategy in ("random", "group_by_length"):
        options = {"gradient_accumulation_steps": 6, "optim": "sgd", "learning_rate": 0.1, "slow_mode_ratio": ratio}
        trainer = make(tmp_path, talks(12), train_sampling_strategy=strategy, **options)
        trainer.train()
        keys = ("loss", "grad_norm", "fast_loss", "slow_loss", "distillation_loss")
        logs.append(torch.tensor([value for value in history(trainer, *keys)[0] if value is not None]))
        logs.append(torch.cat([p.flatten() for p in trainer.model.parameters()]))
    assert trainer.state.global_step == 1
    torch.testing.assert_close(logs[2], logs[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(logs[3], logs[1], rtol=1e-4, atol=1e-6)


def test_what_prunes_inside_the_language_model_is_grouped_by_whole_lengths(tmp_path):
    trainer = make(tmp_path, talks(5), pruner="fastv", pruner_kwargs={"layer": 1})
    lengths = trainer._sample_lengths(trainer.train_dataset)
    images = torch.tensor([len(units) for units in lengths.visual])
    assert torch.equal(trainer._lengths_by_mode(lengths)["fast"], lengths.full + 2 * images)


def test_evaluation_goes_through_its_data_in_order(tmp_path):
    trainer = make(tmp_path, talks(6), cls=DualSpeedTrainer)
    assert list(trainer.get_eval_dataloader().batch_sampler) == [list(range(6))]
    assert trainer.evaluate()["eval_loss"] > 0


def test_strategies_of_transformers_stay_its_own(tmp_path):
    for strategy, name in (("random", "SeedableRandomSampler"), ("sequential", "SequentialSampler")):
        trainer = make(tmp_path, talks(3), train_sampling_strategy=strategy)
        assert type(trainer.get_train_dataloader().batch_sampler.sampler).__name__ == name
        assert trainer._lengths is None  # nothing was counted
    data = [{**example, "length": 40} for example in talks(3)]
    trainer = make(tmp_path, Dataset.from_list(data), train_sampling_strategy="batch_rebalance")
    assert type(trainer.get_train_dataloader().batch_sampler).__name__ == "BatchRebalanceSampler"


def test_a_data_set_without_length_is_consumed_in_order(tmp_path, caplog):
    data = IterableDataset.from_generator(lambda: iter(talks(5)))
    trainer = make(tmp_path, data, runs=False, max_steps=2)
    trainer.train()
    assert trainer.steps() == [[0, 1], [2, 3]]


def test_samples_that_cannot_be_read_are_named_with_the_remedy(tmp_path):
    trainer = make(tmp_path, [{"index": 0}])
    message = r"'group_by_length', but .* no conversation.* a column 'length' .* 'visual_length' .*='random'"
    with pytest.raises(ValueError, match=message):
        trainer.train()
    trainer = make(tmp_path, [{"index": 0, "length": 4}])
    assert len(trainer.get_train_dataloader()) == 1
    trainer = make(tmp_path, talks(1))
    trainer.given_collator, trainer.processing_class = lambda examples: {}, None
    with pytest.raises(ValueError, match=r"`processing_class` is NoneType, which has no tokenizer"):
        trainer.get_train_dataloader()


@pytest.mark.parametrize(("stage", "refused"), [(None, True), (3, True), (2, False)])
def test_samples_without_an_image_are_not_put_together_where_each_batch_needs_one(tmp_path, stage, refused):
    def sharded(samples):
        trainer = make(tmp_path, samples)
        if stage is None:
            trainer.is_fsdp_enabled = True
        else:
            trainer.is_deepspeed_enabled = True
            trainer.accelerator.state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage))
        return trainer

    trainer = sharded(talks(8))
    if refused:
        with pytest.raises(ValueError, match="puts the [0-9]+ samples without an image together.*'random'"):
            trainer._get_train_sampler()
    else:
        assert len(trainer._get_train_sampler()) == 8
    assert len(sharded(talks(8, images=1))._get_train_sampler()) == 8


def test_the_ratio_at_the_end_of_training_counts(tmp_path):
    kwargs = {"pruning_schedule": "linear", "initial_pruning_ratio": 0.0}
    trainer = make(tmp_path, talks(4), pruner_kwargs=kwargs)
    lengths = SampleLengths([40], [[16]])
    assert trainer._lengths_by_mode(lengths)["fast"].tolist() == [40 - 16 + 4 + 2]


def test_a_change_of_data_is_counted_anew(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    trainer = make(tmp_path, talks(4))
    assert len(trainer._sample_lengths(trainer.train_dataset)) == 4
    trainer.train_dataset = talks(6)
    assert len(trainer.get_train_dataloader().batch_sampler.sampler) == 6
