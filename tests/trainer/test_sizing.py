"""The size of a micro-batch: chosen, told, kept on resuming, and nothing that is trained changes by it."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import random
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from launching import DDP, run
from torch import nn
from torch.utils.data import IterableDataset
from training import Collator, history, make
from transformers import Adafactor, trainer_optimizer

from hf_dualspeed import DualSpeedTrainer, DualSpeedTrainingArguments
from hf_dualspeed.publishing import display
from hf_dualspeed.recipes.arguments import parse_recipe
from hf_dualspeed.trainer.sizing import mixin, probe
from hf_dualspeed.trainer.sizing.choice import Limits, choose, largest
from hf_dualspeed.trainer.training_args import Chosen
from hf_dualspeed.utils.memory import GIB, bytes_of, peak_memory

ROOM = 2_000_000  # bytes, for a few samples of the tiny models
DATA = [{"index": index} for index in range(8)]
HALF_SLOW = {"slow_mode_ratio": 0.5, "mode_schedule": "periodic", "max_steps": 2, "data": DATA}


def auto(tmp_path, room=ROOM, **options):
    given = {"per_device_train_batch_size": "auto", "memory_gib": room / GIB}
    return make(tmp_path, **{**given, **HALF_SLOW, **options})


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def same(one, other) -> bool:
    """Whether two trainings are equal to the bit."""
    pairs = zip(weights(one).items(), weights(other).items(), strict=True)
    equal = all(a == b and torch.equal(v, w) for (a, v), (b, w) in pairs)
    return equal and history(one, "loss", "grad_norm") == history(other, "loss", "grad_norm")


# --- the choice -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 2, 7, 64, 1000])
def test_the_largest_that_fits_is_found_where_memory_bends_or_runs_out(most):
    draw = random.Random(most)
    for _ in range(300):
        fixed, slope, more, bend, budget = (draw.randint(low, 50) for low in (0, 1, 0, 0, 0))
        budget, lost, tried = 40 * budget, 40 * budget + draw.choice([10**9, draw.randint(1, 300)]), []

        def held(rows, fixed=fixed, slope=slope, more=more, bend=bend, lost=lost, tried=tried):
            tried.append(rows)
            value = fixed + slope * rows + more * max(0, rows - bend)
            return None if value > lost else value

        fits = [rows for rows in range(1, most + 1) if (held(rows) or lost + 1) <= budget]
        tried.clear()
        assert largest(held, budget, most) == max(fits, default=0)
        assert len(tried) == len(set(tried)) <= 20


def test_along_a_line_a_few_tries_are_enough():
    tried = []
    assert largest(lambda rows: tried.append(rows) or 100 + 13 * rows, 900, 10**6) == 61
    assert tried == [1, 2, 16, 61, 62]


def held(mode, rows, splits=1):
    """Three bytes for each sample, and seven for each of a part of a slow step."""
    return 3 * rows if mode == "fast" else rows + 7 * -(-rows // (1 if splits == "auto" else splits))


@pytest.mark.parametrize(
    ("limits", "chosen"),
    [
        ({}, (33, 4)),  # 33 samples of 3; parts of 9: 33 + 63 = 96
        ({"splits": 6}, (33, 6)),
        ({"splits": "auto"}, (33, 4)),  # those of its own do not fit
        ({"most": 12}, (12, 1)),
        ({"most": 12, "splits": "auto"}, (12, "auto")),
        ({"share": 96}, (32, 4)),
        ({"share": 31}, (31, 4)),
        ({"share": 37}, (1, 1)),  # a prime number of samples
        ({"modes": ("fast",)}, (33, 1)),
        ({"modes": ("slow",)}, (93, 93)),  # 93 + 7
        ({"whole": True}, (12, 1)),
        ({"budget": 2}, (0, 1)),
    ],
)
def test_the_choice_keeps_to_its_limits(limits, chosen):
    found = choose(held, Limits(**{"budget": 100, "most": 100, **limits}))
    assert found == chosen


# --- chosen -----------------------------------------------------------------------------------------------------------


def counted(trainer, rows: int, mode: str) -> int:
    """Bytes of a step of the longest sample so often, counted apart: weights, gradients, AdamW, batch, peak."""
    longest = max(
        range(8), key=lambda index: Collator.__call__(trainer.given_collator, [DATA[index]])["input_ids"].numel()
    )
    batch = trainer.data_collator([DATA[longest]] * rows)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    known = [*trainer.model.parameters(), *trainer.model.buffers(), *batch.values(), *(p.grad for p in trained)]
    trainer.current_gradient_accumulation_steps = 1
    items = (batch["labels"] != -100).sum()
    peak = peak_memory(lambda: trainer.step_in_mode(mode, trainer.model, batch, items), [*known, items])
    trainer.model.zero_grad()
    moments = 2 * sum(p.nbytes for p in trained) + 4 * len(trained)  # and each one's count of steps
    return bytes_of(known) + moments + peak


def test_the_largest_that_fits_is_chosen_exactly(tmp_path):
    trainer = auto(tmp_path, slow_mode_ratio=0.0)
    trainer.train()
    size = trainer.size
    rows = size["micro_batch"]
    assert rows == trainer.args.per_device_train_batch_size == trainer.state.train_batch_size > 1
    assert trainer.state.max_steps == 2
    again = make(tmp_path, per_device_train_batch_size=rows, **{**HALF_SLOW, "slow_mode_ratio": 0.0})
    counts = [counted(again, number, "fast") for number in (rows, rows + 1)]
    assert counts[0] == pytest.approx(size["fast_bytes"], abs=64)  # of the count of items
    assert counts[0] <= ROOM < counts[1]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llava", {"pruner": "random", "activation_checkpointing": True, "slow_mode_splits": "auto"}),
        ("llava_next", {"padding_free": True, "bf16": True, "optim": "sgd"}),
    ],
)
def test_nothing_trained_changes(tmp_path, family, options):
    class Drawing(Collator):
        def __call__(self, examples):  # as one that augments
            random.random(), np.random.rand(), torch.rand(1)
            return super().__call__(examples)

    chosen = auto(tmp_path / "auto", 1.3 * ROOM, family=family, **options)
    chosen.data_collator.collator.__class__ = Drawing
    chosen.train()
    rows, splits = chosen.args.per_device_train_batch_size, chosen.args.slow_mode_splits
    options = {**HALF_SLOW, **options, "slow_mode_splits": splits if splits == "auto" else int(splits)}
    fixed = make(tmp_path / "fixed", family=family, per_device_train_batch_size=int(rows), **options)
    fixed.data_collator.collator.__class__ = Drawing
    fixed.train()
    assert rows > 1
    assert chosen.size["slow_bytes"] <= 1.3 * ROOM
    assert same(chosen, fixed)


def test_the_global_batch_is_kept_by_accumulation(tmp_path):
    trainer = auto(tmp_path, slow_mode_ratio=0.0)
    trainer._choose_size(None)
    rows = trainer.size["micro_batch"]
    assert trainer.size["global_batch_size"] == trainer.get_total_train_batch_size(trainer.args) == rows
    trainer.args.gradient_accumulation_steps = 2  # is kept
    trainer._choose_size(None)
    assert (trainer.size["micro_batch"], trainer.size["global_batch_size"]) == (rows, 2 * rows)
    trainer.args.gradient_accumulation_steps, trainer.args.global_batch_size = 1, 28
    for _ in range(2):  # again from what the user has set, not from what was chosen
        trainer._choose_size(None)
        size = trainer.size
        assert size["micro_batch"] == max(n for n in range(1, rows + 1) if 28 % n == 0) < rows
        assert size["micro_batch"] * size["gradient_accumulation_steps"] == 28
    assert trainer.args.gradient_accumulation_steps == size["gradient_accumulation_steps"]
    training = trainer.record()["training"]
    assert (training["global_batch_size"], training["per_device_train_batch_size"]) == (28, size["micro_batch"])


def test_an_optimizer_that_exists_is_counted_as_it_is(tmp_path):
    trainer = make(tmp_path, memory_gib=1.0, **{**HALF_SLOW, "max_steps": 1})
    on_paper = probe.optimizer_bytes(trainer)
    trainer.train()
    made = [v for state in trainer.optimizer.state.values() for v in state.values()]
    assert (
        probe.optimizer_bytes(trainer) == sum(value.nbytes for value in made) < on_paper
    )  # the tower has unused layers


def test_a_resumed_run_has_the_size_of_the_interrupted_one(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "global_batch_size": 8}
    options |= {"seed": 3, "slow_mode_splits": 2}
    whole = auto(tmp_path, **options)
    whole.train()
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["ModeClock"]["attributes"]["size"]
    assert saved == {"micro_batch": whole.size["micro_batch"], "slow_mode_splits": whole.size["slow_mode_splits"]}
    resumed = auto(tmp_path / "resumed", 50 * ROOM, **options)  # there is more room now
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.size["resumed"]
    assert resumed.size["micro_batch"] == whole.size["micro_batch"]
    assert resumed.args.slow_mode_splits == whole.args.slow_mode_splits
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(resumed).items())


def test_a_resumed_run_takes_more_parts_where_they_are_asked_for(tmp_path):
    """As after slow steps that ran out of memory."""
    trainer = auto(tmp_path)
    for saved, asked, taken in ((2, 4, 4), (2, 1, 2), (2, "auto", 2), ("auto", 1, "auto"), ("auto", 3, 3)):
        size = {"micro_batch": 4, "slow_mode_splits": saved}
        state = {"stateful_callbacks": {"ModeClock": {"attributes": {"size": size}}}}
        (tmp_path / "trainer_state.json").write_text(json.dumps(state))
        trainer._forget_size()
        trainer.args.slow_mode_splits = asked
        trainer._choose_size(str(tmp_path))
        assert trainer.args.slow_mode_splits == trainer.size["slow_mode_splits"] == taken


def test_a_run_with_a_number_goes_on_with_it(tmp_path):
    options = {**HALF_SLOW, "save_strategy": "steps", "save_steps": 1}
    make(tmp_path, per_device_train_batch_size=3, **options).train()
    resumed = auto(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.size["micro_batch"] == resumed.args.per_device_train_batch_size == 3


def test_the_longest_samples_are_measured(tmp_path):
    lengths = [len(Collator.__call__(make(tmp_path).given_collator, [DATA[n]])["input_ids"][0]) for n in range(8)]
    column = [{**sample, "length": lengths[sample["index"]], "visual_length": []} for sample in DATA]
    for data, strategy in ((DATA, "random"), (column, "group_by_length")):
        trainer = auto(tmp_path, data=data, train_sampling_strategy=strategy)
        samples, _ = probe.samples_of(trainer)
        assert lengths[samples["slow"]["index"]] == max(lengths)
    fast, slow = (lengths[samples[mode]["index"]] for mode in ("fast", "slow"))
    assert fast == slow == max(lengths)  # the column knows of no visual tokens


@pytest.mark.parametrize(
    ("kernel", "device", "stance"),
    [
        ("flex_attention", "cuda", "default"),
        ("flex_attention", "cpu", "force_eager"),
        ("sdpa", "cuda", "force_eager"),
        (None, "cuda", "force_eager"),
    ],
)
def test_flex_attention_is_measured_as_it_trains(tmp_path, monkeypatch, kernel, device, stance):
    """Without being compiled it holds the scores of all pairs of tokens, and next to nothing would seem to fit."""
    model, stances = nn.Sequential(nn.Linear(1, 1)), []
    model[0].config = SimpleNamespace(_attn_implementation=kernel)
    found = probe.stance_of(model, torch.device(device))
    assert found == stance
    monkeypatch.setattr(probe, "stance_of", lambda *given: found)
    monkeypatch.setattr(torch.compiler, "set_stance", lambda given: nullcontext(stances.append(given)))
    with probe.probing(auto(tmp_path)):
        assert stances == [stance]


@pytest.mark.distributed
def test_ranks_agree_on_the_smallest(tmp_path):
    options = ("--batch", "1", "--max-steps", "2", "--rooms", str(ROOM), str(2 * ROOM))
    ranks = run(tmp_path, *options, config=DDP)
    sizes = [rank["size"] for rank in ranks]
    assert sizes[0]["micro_batch"] == sizes[1]["micro_batch"] > 1
    assert sizes[0]["slow_mode_splits"] == sizes[1]["slow_mode_splits"]
    assert sizes[0]["budget_bytes"] < sizes[1]["budget_bytes"]
    assert [size["global_batch_size"] for size in sizes] == [4 * sizes[0]["micro_batch"]] * 2


def test_a_rank_without_room_for_a_sample_tells_the_others(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(mixin, "gather_object", lambda own: (sent.extend(own), own)[1])
    with pytest.raises(ValueError, match="not even one sample"):
        auto(tmp_path, 1000, slow_mode_ratio=0.0)._choose_size(None)
    assert "not even one sample" in sent[-1][1]


ADAMW = {"lr": 1e-3}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.AdamW, {**ADAMW, "fused": True}),
        (torch.optim.AdamW, {**ADAMW, "amsgrad": True}),
        (torch.optim.SGD, ADAMW),
        (torch.optim.SGD, {**ADAMW, "momentum": 0.9}),
        (Adafactor, {"scale_parameter": False, "relative_step": False, "lr": 1e-3}),
    ],
)
def test_the_optimizers_state_is_counted_on_paper(kind, options):
    parameters = [nn.Parameter(torch.randn(30, 40)), nn.Parameter(torch.randn(7))]
    expected = probe.state_bytes(kind, options, parameters)
    optimizer = kind(parameters, **options)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    values = [value for state in optimizer.state.values() for value in state.values()]
    assert expected == bytes_of(value for value in values if isinstance(value, torch.Tensor))


def test_one_that_has_no_paper_counts_as_adamw(tmp_path):
    class Odd(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("needs a device")

    model = nn.Linear(3, 4)
    trainer = SimpleNamespace(
        model=model, args=SimpleNamespace(device=torch.device("cpu")), optimizer=Odd(model.parameters(), lr=1.0)
    )
    assert probe.optimizer_bytes(trainer) == 2 * 4 * 16


# --- refused ----------------------------------------------------------------------------------------------------------


class Streamed(IterableDataset):
    def __iter__(self):
        return iter(DATA)


class OwnLoader(DualSpeedTrainer):
    def get_train_dataloader(self):
        return super().get_train_dataloader()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_gib": None}, r"'auto', but there is no GPU.*Set `memory_gib`, the GiB .*, or a number"),
        ({"memory_gib": 0.0}, r"`memory_gib` must be in \(0"),
        ({"accelerator_config": {"dispatch_batches": True}, "max_steps": 2}, r"`dispatch_batches` a batch is made for"),
        ({"accelerator_config": {"split_batches": True}}, r"`split_batches`"),
        ({"data": Streamed()}, r"'auto', but the data set is streamed.*Set a number"),
        ({"cls": OwnLoader}, r"OwnLoader.get_train_dataloader makes batches of its own"),
        ({"auto_find_batch_size": True}, r"does not go with auto_find_batch_size=True, which tries too"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, r"does not go with deepspeed"),
        ({"fsdp": "full_shard"}, r"does not go with fsdp"),
        ({"global_batch_size": 8, "gradient_accumulation_steps": 4}, r"`gradient_accumulation_steps` is 4, but it"),
        ({"global_batch_size": 0}, r"`global_batch_size` must be in \[1"),
        ({"global_batch_size": 8, "per_device_train_batch_size": 2}, r"`global_batch_size` is 8, but with per_device"),
        ({"per_device_train_batch_size": "most"}, r"`per_device_train_batch_size` must be .* got 'most'"),
        ({"per_device_train_batch_size": 2.5}, r"`per_device_train_batch_size` must be .* got 2.5"),
        ({"per_device_train_batch_size": 0}, r"`per_device_train_batch_size` must be in \[1"),
    ],
)
def test_what_cannot_be_honoured_is_refused_before_training(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        auto(tmp_path, **options)


@pytest.mark.parametrize("name", ["DEEPSPEED", "FSDP"])
def test_sharding_by_the_launcher_is_refused(name, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(ValueError, match=f"does not go with {name.lower()}"):
        DualSpeedTrainingArguments("out", per_device_train_batch_size="auto", use_cpu=True)


def test_a_share_that_is_not_whole_is_refused(tmp_path, monkeypatch):
    trainer = auto(tmp_path, global_batch_size=7)
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    with pytest.raises(ValueError, match=r"`global_batch_size` is 7, which 2 processes cannot share evenly\. Use 8"):
        trainer._choose_size(None)


def test_too_little_memory_is_named_with_what_takes_it(tmp_path):
    with pytest.raises(
        ValueError, match=r"not even one sample of \d+ tokens fits into .* MiB, of which.*optimizer 0\.409 MiB"
    ):
        auto(tmp_path, 1000).train()


@pytest.mark.parametrize("most", [0, 2])
def test_a_device_that_runs_out_of_memory_says_what_fits(tmp_path, most):
    def check(module, args, kwargs):
        if len(kwargs["input_ids"]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    trainer = auto(tmp_path, GIB, slow_mode_ratio=0.0, activation_checkpointing=True)
    trainer.model.register_forward_pre_hook(check, with_kwargs=True)
    if not most:
        with pytest.raises(ValueError, match="not even one sample"):
            trainer._choose_size(None)
        return
    trainer._choose_size(None)
    assert trainer.size["micro_batch"] == most
    assert not trainer.selective_checkpointing.always  # a training that runs out falls back; this was none


def test_the_size_is_not_known_before_training(tmp_path):
    with pytest.raises(ValueError, match="'auto', which is chosen when training begins"):
        auto(tmp_path).get_train_dataloader()


# --- told -------------------------------------------------------------------------------------------------------------

TOLD = {**HALF_SLOW, "per_device_train_batch_size": 3, "disable_tqdm": False}


def lines(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_number_is_told_what_it_takes_and_what_would_fit(tmp_path, capsys):
    trainer = make(tmp_path / "told", memory_gib=ROOM / GIB, **TOLD)
    trainer.train()
    first, start, *_ = lines(capsys)
    size = first["batch"]
    assert start["start"]["batch"] == size == trainer.size
    assert (size["micro_batch"], size["slow_mode_splits"]) == (3, 1)
    chosen = auto(tmp_path / "auto")
    chosen._choose_size(None)
    assert abs(size["fits"] - chosen.size["micro_batch"]) <= 1  # by a line through one and two
    assert size["fits_slow_mode_splits"] == chosen.size["slow_mode_splits"]
    silent = make(tmp_path / "not", tell_size=False, memory_gib=ROOM / GIB, **TOLD)
    silent.train()
    assert silent.size is None
    assert same(trainer, silent)
    assert "start" in lines(capsys)[0]


def test_steps_that_do_not_fit_are_told(tmp_path, capsys):
    make(tmp_path, memory_gib=1e6 / GIB, **TOLD).train()
    size = lines(capsys)[0]["batch"]
    assert size["fast_bytes"] > size["budget_bytes"]
    assert "a slow one takes" in display.size_words(size)
    assert "more than there is" in display.size_words(size)


@pytest.mark.parametrize("options", [{}, {"memory_gib": 1.0, "disable_tqdm": True}])
def test_nothing_is_measured_that_nobody_asked_for(tmp_path, monkeypatch, options):
    monkeypatch.setattr(mixin, "probing", lambda trainer: pytest.fail("it was measured"))
    trainer = make(tmp_path, **{**TOLD, "max_steps": 1, **options})
    trainer.train()
    assert trainer.size is None


def test_what_cannot_be_measured_is_named(tmp_path, capsys):
    class Own(DualSpeedTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    make(tmp_path, cls=Own, memory_gib=1.0, **TOLD).train()
    assert lines(capsys)[0] == {"batch": {"why": "Own.compute_loss would be called more often than there are steps"}}


def test_an_optimizer_that_steps_inside_backward_is_made_once(tmp_path, capsys, monkeypatch):
    """To ask the Trainer for its options sets hooks on the parameters, which step in every backward."""
    monkeypatch.setattr(trainer_optimizer, "is_galore_torch_available", lambda: True)
    kinds = ("GaLoreAdamW", "GaLoreAdamW8bit", "GaLoreAdafactor")
    monkeypatch.setitem(sys.modules, "galore_torch", SimpleNamespace(**dict.fromkeys(kinds, torch.optim.AdamW)))
    options = {"optim": "galore_adamw_layerwise", "optim_target_modules": ["q_proj"], "isolator_length": 0}
    told, silent = (
        make(tmp_path, tell_size=tell, memory_gib=1.0, **{**TOLD, "slow_mode_ratio": 0.0, **options})
        for tell in (True, False)
    )
    told.train()
    assert "hooks on the parameters, such as those of optim=" in lines(capsys)[0]["batch"]["why"]
    silent.train()
    assert all(len(p._post_accumulate_grad_hooks) == 1 for p in told.model.parameters() if p.requires_grad)
    assert all(torch.equal(weights(told)[name], weight) for name, weight in weights(silent).items())


def test_a_failed_measurement_does_not_end_the_training(tmp_path, capsys, monkeypatch):
    def fails(trainer):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(mixin, "probing", fails)
    trainer = make(tmp_path, memory_gib=1.0, **{**TOLD, "max_steps": 1})
    trainer.train()
    assert lines(capsys)[0] == {"batch": {"why": "RuntimeError: no such kernel"}}
    assert trainer.state.global_step == 1


def test_the_size_in_words():
    size = {"micro_batch": 24, "slow_mode_splits": 6, "tokens": 733, "budget_bytes": 20 * GIB}
    held = {"fast_bytes": 19 * GIB, "slow_bytes": 18.5 * GIB}
    chosen = {"chosen": True, "gradient_accumulation_steps": 2, "processes": 2, "global_batch_size": 96}
    assert display.size_words({**size, **held, **chosen}) == (
        "24 samples of up to 733 tokens, the largest micro-batch that fits: a fast step takes 19 GiB, a slow one, with "
        "slow_mode_splits=6, takes 18.5 GiB, of 20 GiB; 96 samples of an optimizer step: 24 x 2 micro-batches x 2 "
        "processes"
    )
    assert display.size_words({**size, **held, **chosen, "processes": 1}).endswith("step: 24 x 2 micro-batches")
    told = {**size, **held, "slow_mode_splits": 1, "slow_bytes": None, "fits": 25, "fits_slow_mode_splits": 7}
    assert display.size_words(told) == (
        "24 samples of up to 733 tokens: a fast step takes 19 GiB, a slow one takes more than there is, of 20 GiB; "
        "about 25 would fit, with slow_mode_splits=7"
    )
    assert display.size_words({**chosen, "resumed": True, "micro_batch": 24, "slow_mode_splits": 6}) == (
        "24 samples, with slow_mode_splits=6, as in the run that is resumed; 96 samples of an optimizer step: 24 x 2 "
        "micro-batches x 2 processes"
    )
    assert display.size_words({"why": "it is streamed"}) == "not measured: it is streamed"


# --- from elsewhere ---------------------------------------------------------------------------------------------------


RECIPE = "model_name_or_path: m\ndataset: d.json\noutput_dir: out\nuse_cpu: true\nmemory_gib: 20\n"


def test_recipes_and_the_command_line_take_it(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{RECIPE}per_device_train_batch_size: auto\nglobal_batch_size: 128\n")
    _, args = parse_recipe(["--config", str(path)])
    assert isinstance(args.per_device_train_batch_size, Chosen)
    assert (args.global_batch_size, args.memory_gib) == (128, 20.0)
    path.write_text(f"{RECIPE}per_device_train_batch_size: 2\n")
    _, args = parse_recipe(["--config", str(path)])
    assert (args.per_device_train_batch_size, type(args.per_device_train_batch_size)) == (2, int)
    _, args = parse_recipe(["--config", str(path), "--per_device_train_batch_size", "auto"])
    assert isinstance(args.per_device_train_batch_size, Chosen)


def test_arguments_stay_what_they_are_in_copies():
    args = DualSpeedTrainingArguments("out", per_device_train_batch_size="auto", use_cpu=True, memory_gib=1.0)
    args.slow_mode_splits = Chosen(6, asked="auto")
    for copied in (copy.deepcopy(args), pickle.loads(pickle.dumps(args)), dataclasses.replace(args)):
        assert isinstance(copied.per_device_train_batch_size, Chosen)
        assert (copied.slow_mode_splits, copied.slow_mode_splits.asked) == (6, "auto")
    assert json.loads(args.to_json_string())["per_device_train_batch_size"] == 0


def test_sft_trainers_choose_too(tmp_path):
    pytest.importorskip("trl")
    from sft_training import DATA as SFT
    from sft_training import make as make_sft

    options = {"per_device_train_batch_size": "auto", "memory_gib": 1.5 * ROOM / GIB, "max_steps": 2}
    chosen = make_sft(tmp_path / "auto", SFT["messages"](), **options)
    chosen.train()
    rows = chosen.size["micro_batch"]
    fixed = make_sft(tmp_path / "fixed", SFT["messages"](), **{**options, "per_device_train_batch_size": int(rows)})
    fixed.train()
    assert rows > 1
    assert same(chosen, fixed)
    assert history(chosen, "num_tokens", "mean_token_accuracy") == history(fixed, "num_tokens", "mean_token_accuracy")
