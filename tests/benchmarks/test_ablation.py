"""The ablation: tiny real runs of its variants, resumption, and reports."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import write_fashion_mnist
from transformers import Dinov2Config, Dinov2Model, LlamaForCausalLM

from benchmarks.ablation import ablation
from benchmarks.ablation import task as ablation_task
from benchmarks.ablation.fashion_grid import Question
from benchmarks.ablation.language import Size, WrittenGrids, language_model_config, talk, tokenizer, written
from benchmarks.ablation.plan import BASELINE, GROUPS, REFERENCE, TIMED
from benchmarks.ablation.report import group_table, readme_table, write_report
from hf_dualspeed import cli
from hf_dualspeed.trainer.training_args import DualSpeedTrainingArguments

SIZE = Size(hidden_size=16, layers=1, heads=2, pretraining_steps=2, start_steps=2, train_grids=12, test_grids=4)
EXTREMES = (BASELINE, "pruned-only", "paper:dualspeed", REFERENCE)
FLAGS = ["--steps", "3", "--batch_size", "4", "--seeds", "0", "1", "--cpu"]
FLAGS += ["--hidden_size", "16", "--layers", "1", "--heads", "2", "--pretraining_steps", "2", "--start_steps", "2"]
FLAGS += ["--train_grids", "12", "--test_grids", "4"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working directory with a small data set, and a tower in random weights."""
    folder = tmp_path_factory.mktemp("ablation")
    write_fashion_mnist(folder, tiles=40)
    patch = pytest.MonkeyPatch()
    patch.setenv("FASHION_MNIST", str(folder))
    patch.chdir(folder)
    tower = Dinov2Model(Dinov2Config(hidden_size=384, num_hidden_layers=1, num_attention_heads=4, image_size=168))
    patch.setattr(ablation_task, "read_vision_tower", lambda path: tower.eval())
    patch.setattr(ablation_task, "fetch", lambda *given: "tower.onnx")
    yield folder
    patch.undo()


@pytest.fixture(scope="module")
def results(place):
    """Results of the paper's parts, a few slow ratios, and variants with the reference's time."""
    groups = ["parts", "slow ratios", "equal time"]
    few = {
        **GROUPS,
        "slow ratios": GROUPS["slow ratios"][:3],
        "equal time": [w for w in GROUPS["equal time"] if w.key.removeprefix(TIMED) in (*EXTREMES, "7b:2.83")],
    }
    patch = pytest.MonkeyPatch()
    patch.setattr(ablation, "GROUPS", few)
    ablation.main([*FLAGS, "--jobs", "1", "--output", "out.json", "--groups", *groups])
    patch.undo()
    return json.loads(Path("out.json").read_text())


def test_every_variant_has_every_seed(results):
    ran = [(run["way"], run["seed"]) for run in results["runs"]]
    assert len(ran) == len(set(ran))
    keys = {key for group in results["groups"].values() for key, _ in group}
    assert {variant for variant, _ in ran} == keys
    assert all((key, seed) in ran for key in keys for seed in (0, 1))
    assert results["summary"][REFERENCE]["seeds"] == 2


def test_variants_differ_as_they_say(results):
    runs = {(run["way"], run["seed"]): run for run in results["runs"]}
    assert runs[BASELINE, 0]["steps"] == {"fast": 0, "slow": 3}
    assert runs["pruned-only", 0]["steps"] == {"fast": 3, "slow": 0}
    # The seed alone decides which steps are slow.
    assert runs["fast-slow", 1]["steps"] == runs[REFERENCE, 1]["steps"] == runs["isolator", 1]["steps"]
    assert sum(runs["7b:2.83", 0]["steps"].values()) == 1  # of 3 steps
    assert sum(runs["time:full-tokens", 0]["steps"].values()) >= 1
    assert results["command"].startswith("python -m benchmarks.ablation --steps 3")


def test_a_second_start_trains_nothing(results, place, monkeypatch):
    monkeypatch.setattr(ablation, "execute", lambda run: pytest.fail(f"trained {run.variant.key} again"))
    words = [*FLAGS, "--jobs", "1", "--output", "again.json", "--groups", "parts"]
    ablation.main(words)
    again = json.loads((place / "again.json").read_text())
    assert again["summary"]["isolator"] == results["summary"]["isolator"]


def test_other_settings_are_another_run(place, results):
    """Runs with other settings have another fingerprint and folder."""
    variant = GROUPS["parts"][1]
    runs = [
        ablation.Run(variant, seed, steps, settings)
        for seed in (0, 1)
        for steps in (3, 4)
        for settings in (ablation.Settings(), ablation.Settings(learning_rate=2e-3))
    ]
    assert len({run.fingerprint() for run in runs}) == len({run.folder for run in runs}) == 8


def test_processes_of_their_own_find_the_same(place, results):
    """Two processes give exactly the accuracies of one."""
    run = ablation.Run(GROUPS["parts"][1], 7, 3, ablation.Settings(3, 4, size=SIZE, threads=1))
    other = ablation.Run(GROUPS["parts"][2], 7, 3, run.settings)
    apart = dict(ablation._executed([run, other], 2))
    here = ablation.execute(run)
    assert apart[run]["full"] == here["full"]
    assert apart[run]["pruned"] == here["pruned"]


@pytest.mark.parametrize("variant", [*GROUPS["pruners"][3:], GROUPS["schedules"][-1]], ids=lambda one: one.key)
def test_every_pruner_and_schedule_trains(place, variant):
    size = replace(SIZE, layers=3)  # some pruners drop tokens between layers
    result = ablation.execute(ablation.Run(variant, 3, 3, ablation.Settings(3, 4, size=size, threads=1)))
    assert sum(result["steps"].values()) == 3
    assert (result["pruned"] is None) == (variant.key in ("pruner-fastv", "pruner-pyramiddrop"))
    assert bool(result["slow_ratios"]) == variant.key.endswith("adaptive")


def test_accuracy_is_that_of_the_answer(place):
    """A model that repeats the input is always right, and one that answers nothing is never right."""
    task = ablation_task.load_task(SIZE)
    words = {row["labels"][-2] for row in task.test}
    assert words <= set(tokenizer().get_vocab().values())

    class Knows(torch.nn.Linear):
        def forward(self, input_ids, **others):
            following = torch.cat([input_ids[:, 1:], input_ids[:, :1]], 1)
            return type("Output", (), {"logits": torch.nn.functional.one_hot(following, 100).float()})

    assert ablation_task.accuracy(Knows(1, 1), task) == {"all": 1.0, "item": 1.0, "count": 1.0, "same": 1.0}

    class Never(Knows):
        def forward(self, input_ids, **others):
            return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 100)})

    assert ablation_task.accuracy(Never(1, 1), task)["all"] == 0.0


def test_the_collator_gives_the_features_of_the_image(place):
    task = ablation_task.load_task(SIZE)
    assert [row["grid"] for row in task.train] == list(range(6, 12))  # the first half trains the common start
    batch = task.collator("train")([task.train[5], task.train[0]])
    assert torch.equal(batch["pixel_values"][0], torch.from_numpy(np.array(task.features["train"][11], np.float32)))
    assert (batch["input_ids"] == tokenizer().convert_tokens_to_ids("<image>")).sum(1).tolist() == [144, 144]
    assert sum(label != -100 for label in task.train[5]["labels"]) == 2 * 8


def test_only_answers_are_supervised():
    ids, labels = talk([Question("count", "how often is there a bag?", "two")])
    assert tokenizer().decode([label for label in labels if label != -100]) == "two </s>"
    assert len(ids) == len(labels)
    assert tokenizer().unk_token_id not in ids


def test_written_grids_tell_each_place(place):
    """Patches map to their tiles, and rows depend on the number alone."""
    model = WrittenGrids(LlamaForCausalLM(language_model_config(SIZE, 64)))
    tiles = model.tile_of.view(8, 8)
    assert [int(tiles[row, column]) for row, column in ((0, 0), (3, 4), (4, 3), (7, 7))] == [0, 1, 2, 3]
    row = written(3)
    assert row == written(3) != written(4)
    assert len(row["input_ids"]) == len(row["labels"])


def test_the_report_is_made_of_the_file(results, tmp_path):
    path = tmp_path / "out.json"
    write_report(results, path)
    text = readme_table(results)
    assert group_table(results, "parts") in text
    share = results["summary"][REFERENCE]["full"]["mean"]
    line = next(line for line in text.splitlines() if line.startswith("| DualSpeed |"))
    assert f"{share:.1%}" in line
    assert path.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--groups", "part"], "`groups` must be one of .*Did you mean 'parts'"),
        (["--steps", "0"], "`steps` must be in"),
        (["--seeds", "-1"], "`seeds` must be in"),
        (["--render-only", "--output", "none.json"], "`output` is 'none.json', but there is no such file"),
    ],
)
def test_wrong_words(words, message, capsys):
    assert cli.call(lambda: ablation.main(words)) == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


def test_every_variant_is_one_that_can_be_trained(tmp_path):
    variants = [variant for group in GROUPS.values() for variant in group]
    for variant in variants:
        DualSpeedTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **variant.options)
    known = {variant.key: (variant.options, variant.plain) for variant in variants}
    assert all(known[variant.key] == (variant.options, variant.plain) for variant in variants)
