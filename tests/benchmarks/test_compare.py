"""The comparison: tiny real runs of all four variants with two seeds."""

import json
from pathlib import Path

import pytest
import yaml
from transformers import LlavaForConditionalGeneration, Trainer

from benchmarks.compare import compare
from benchmarks.compare import report as compare_report
from hf_dualspeed.recipes.arguments import parse_recipe
from hf_dualspeed.trainer.trainer import DualSpeedTrainer

ROOT = Path(__file__).parents[2]
TINY = {"image_size": 64, "patch_size": 16, "vision_hidden_size": 8, "vision_layers": 1}
TINY |= {"hidden_size": 16, "layers": 1, "heads": 2}
RECIPE = {"tiny_llava": TINY, "dataset": "easy-vqa", "eval_dataset": "easy-vqa", "eval_limit": 8}
RECIPE |= {"train_vision_tower": True, "use_cpu": True, "max_steps": 4, "per_device_train_batch_size": 4}
RECIPE |= {"logging_steps": 1, "mode_schedule": "periodic", "slow_mode_ratio": 0.5, "pruning_ratio": 0.5}
RECIPE |= {"disable_tqdm": True, "report_to": "none"}
VARIANTS = ("full-tokens", "pruned-only", "fast-slow", "dualspeed")


def write_recipe(folder, **keys):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "output_dir": str(folder / "runs"), **keys}))
    return ["--config", str(path)]


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """A comparison by the command, with initial weights, batches and prompts of its runs."""
    pytest.importorskip("easy_vqa")
    folder, seen = tmp_path_factory.mktemp("compare"), []
    build, generate = compare.build_trainer, LlavaForConditionalGeneration.generate

    def spy_on_build(run):
        trainer = build(run)
        weights = {name: value.clone() for name, value in trainer.model.named_parameters()}
        record = {
            "way": run.variant.key,
            "seed": run.args.seed,
            "steps": run.args.max_steps,
            "kind": type(trainer),
        }
        record |= {"weights": weights, "batches": [], "prompts": []}
        seen.append(record)
        collate = trainer.data_collator

        def spy_on_collator(examples):
            record["batches"].append([example["images"][0]["path"] for example in examples])
            return collate(examples)

        trainer.data_collator = spy_on_collator
        return trainer

    def spy_on_generate(model, **inputs):
        seen[-1]["prompts"].append(inputs["input_ids"].shape[1])
        return generate(model, **inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "build_trainer", spy_on_build)
        patch.setattr(LlavaForConditionalGeneration, "generate", spy_on_generate)
        words = write_recipe(folder)
        path = folder / "results" / "compare.json"
        compare.main([*words, "--seeds", "0", "1", "--results", str(path)])
    runs = [record for record in seen if record["steps"] == 4]
    return {"folder": folder, "words": words, "path": path, "seen": runs, "warm_ups": len(seen) - len(runs)}


@pytest.fixture
def results(session):
    return json.loads(session["path"].read_text())


def test_every_variant_is_run_with_every_seed_in_rotated_order(session, results):
    order = [(run["way"], run["seed"]) for run in results["runs"]]
    assert order == [(variant, 0) for variant in VARIANTS] + [(variant, 1) for variant in (*VARIANTS[1:], VARIANTS[0])]
    assert order == [(record["way"], record["seed"]) for record in session["seen"]]
    assert session["warm_ups"] == 1


def test_the_variants_are_what_they_are_called(session, results):
    kinds = {record["way"]: record["kind"] for record in session["seen"]}
    assert kinds.pop("full-tokens") is Trainer
    assert set(kinds.values()) == {DualSpeedTrainer}
    steps = {run["way"]: run["steps"] for run in results["runs"]}
    half = {"fast": 2, "slow": 2}
    assert steps == {
        "full-tokens": {"fast": 0, "slow": 4},
        "pruned-only": {"fast": 4, "slow": 0},
        "fast-slow": half,
        "dualspeed": half,
    }
    settings = {run["way"]: run["settings"] for run in results["runs"]}
    chosen = ("slow_mode_ratio", "isolator_length", "distillation_weight")
    assert settings["full-tokens"] == {}
    assert [settings["pruned-only"][key] for key in chosen] == [0, 0, 0]
    assert [settings["fast-slow"][key] for key in chosen] == [0.5, 0, 0]
    assert [settings["dualspeed"][key] for key in chosen] == [0.5, 4, 1]
    distilled = {run["way"] for run in results["runs"] if "distillation_loss" in run["losses"]}
    assert distilled == {"dualspeed"}


@pytest.mark.parametrize("seed", [0, 1])
def test_all_variants_of_a_seed_begin_with_the_same_weights_and_see_the_same_data(session, seed):
    first, *others = (record for record in session["seen"] if record["seed"] == seed)
    plain = next(record for record in (first, *others) if record["way"] == "full-tokens")
    for record in (first, *others):
        assert all(record["weights"][name].equal(value) for name, value in plain["weights"].items())
        # DualSpeed collates one example before training, to fail early.
        batches = [batch for batch in record["batches"] if len(batch) > 1]
        assert batches[:4] == plain["batches"][:4]
    isolators = [record["way"] for record in (first, *others) if len(record["weights"]) > len(plain["weights"])]
    assert isolators == ["dualspeed"]


def test_seeds_differ(session):
    one, other = (record for record in session["seen"] if record["way"] == "full-tokens")
    assert one["batches"][:4] != other["batches"][:4]
    assert any(not other["weights"][name].equal(value) for name, value in one["weights"].items())


def test_the_pruned_evaluation_asks_with_fewer_tokens(session):
    visual, kept, isolator = 16, 8, 4
    for record in session["seen"]:
        full, pruned = record["prompts"]
        in_front = isolator if record["way"] == "dualspeed" else 0
        assert full - pruned == visual - kept - in_front, record["way"]


def test_only_training_is_timed(results):
    for run in results["runs"]:
        # Seconds are kept to the millisecond, and four steps of a tiny model take a few dozen.
        seconds = run["seconds"]
        assert 0 < seconds["fast"] + seconds["slow"] <= seconds["total"] + 0.002
        assert 4 / run["steps_per_second"] == pytest.approx(seconds["total"], abs=0.001)
        assert run["losses"]["train_loss"] > 0


def test_nothing_names_the_machines_folders(session):
    for suffix in (".json", ".md"):
        assert str(session["folder"].parent) not in session["path"].with_suffix(suffix).read_text()


def test_the_table_has_the_numbers_of_the_json(session, results):
    table = compare_report.readme_table(results)
    text = session["path"].with_suffix(".md").read_text()
    assert table in text
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert len(lines) == 2 + 4 + 1
    for variant, line in zip(VARIANTS, lines[2:6], strict=True):
        own = results["summary"][variant]
        runs = [run for run in results["runs"] if run["way"] == variant]
        seconds = [run["seconds"]["total"] for run in runs]
        accuracy = [run["accuracy_full"] for run in runs]
        assert line[0] == own["name"]
        assert line[1].split()[0] == f"{sum(accuracy) / 2:.1%}"
        assert line[4].split()[0] == f"{own['speed_up']['mean']:.2f}x"
        assert line[5].split()[0] == f"{sum(seconds) / 2:.1f}"
    assert lines[6][1] == f"{results['majority_accuracy']:.1%}"
    for said in (
        "4 optimizer steps",
        "8 questions of easy-vqa",
        "2 seed(s)",
        "Machine: ",
        "python -m benchmarks.compare",
    ):
        assert said in text


def test_a_finished_comparison_trains_nothing(session, results, monkeypatch, capsys):
    monkeypatch.setattr(compare, "build_trainer", lambda run: pytest.fail(f"{run.variant.key} is run again"))
    made = {path: path.stat().st_mtime_ns for path in session["folder"].rglob("result.json")}
    assert len(made) == 8
    again = compare.compare(session["words"], [0, 1], results["command"])
    assert again == results
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert "run 4 of 8: DualSpeed, seed 0 (finished before)" in capsys.readouterr().out


def test_an_interrupted_comparison_goes_on(session, monkeypatch):
    (session["folder"] / "runs" / "dualspeed-seed1" / "result.json").unlink()
    executed, execute = [], compare.execute

    def spy(run):
        executed.append((run.variant.key, run.args.seed))
        return execute(run)

    monkeypatch.setattr(compare, "execute", spy)
    compare.compare(session["words"], [0, 1])
    assert executed == [("dualspeed", 1)]


@pytest.mark.parametrize("change", [["--learning_rate", "1e-4"], ["--eval_limit", "4"], ["--seed", "7"]])
def test_fingerprints_differ_where_results_would(session, change):
    def mark(*words, variant=compare.BASELINE):
        return compare.Run(variant, *parse_recipe([*session["words"], *words]), None, None).fingerprint()

    assert mark() == mark("--output_dir", "elsewhere")
    assert mark() != mark(*change)
    assert mark() != mark(variant=compare.VARIANTS[-1])


def test_a_changed_recipe_is_run_again(session):
    words = ["--seed", "0", "--output_dir", str(session["folder"] / "runs" / "full-tokens-seed0")]
    run = compare.Run(compare.BASELINE, *parse_recipe([*session["words"], *words, *compare.TRAIN_ONLY]), None, None)
    assert run.finished() is not None
    run.args.learning_rate = 1.0
    assert run.finished() is None


def test_render_only(session, results, monkeypatch):
    monkeypatch.setattr(compare, "compare", lambda *args: pytest.fail("trains"))
    path = session["folder"] / "again.json"
    path.write_text(session["path"].read_text())
    compare.main(["--render-only", "--results", str(path)])
    assert path.with_suffix(".md").read_text() == session["path"].with_suffix(".md").read_text()
    assert path.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


def test_ratios_are_taken_seed_by_seed():
    def run(variant, seed, accuracy, seconds):
        steps = {"fast": 1, "slow": 1}
        shares = {"accuracy_full": accuracy, "accuracy_pruned": accuracy / 2}
        return {
            "way": variant, "seed": seed, "seconds": {"total": seconds}, "steps_per_second": 1, "steps": steps
        } | shares  # fmt: skip

    runs = [run(variant, seed, (seed + 1) / 4, 10.0 * (seed + 1)) for variant in VARIANTS[:3] for seed in (0, 1)]
    runs += [run("dualspeed", 0, 0.2, 5.0), run("dualspeed", 1, 0.6, 5.0)]
    found = compare.summarise(runs)["dualspeed"]
    assert found["retention"]["mean"] == pytest.approx((0.2 / 0.25 + 0.6 / 0.5) / 2)
    speed_up = found["speed_up"]
    assert (speed_up["mean"], speed_up["min"], speed_up["max"]) == (3.0, 2.0, 4.0)
    assert found["accuracy_pruned"]["mean"] == pytest.approx(0.2)
    runs[0]["accuracy_full"] = 0.0
    assert compare.summarise(runs)["dualspeed"]["retention"] is None


@pytest.mark.parametrize(
    ("keys", "words", "message"),
    [
        ({}, ["--seeds", "0", "0"], r"`seeds` must differ from each other, got \[0, 0\]"),
        ({}, ["--seeds", "-1"], r"`seeds` must be in \[0, inf\), got -1"),
        ({}, ["--seeds", "x"], r"--seeds: invalid int value: 'x'"),
        ({}, ["--learning_rat", "1"], r"`--learning_rat`\. Did you mean '--learning_rate'\?"),
        ({"eval_dataset": None}, [], r"`eval_dataset` is None"),
        ({}, ["--pruner", "fastv"], "`pruner` is 'fastv', which drops tokens inside the language model"),
    ],
)
def test_errors_name_what_is_wrong(tmp_path, keys, words, message):
    with pytest.raises(ValueError, match=message):
        compare.main([*write_recipe(tmp_path, **keys), "--results", str(tmp_path / "c.json"), *words])


@pytest.mark.parametrize(("columns", "read"), [([], ["a"]), (["--eval_image_column", "b"], ["b"])])
def test_pictures_are_read_from_the_columns_of_the_recipe(tmp_path, monkeypatch, columns, read):
    calls = []

    def load(*given):
        calls.append(given)
        if len(calls) == 2:
            raise StopIteration

    monkeypatch.setattr(compare, "load_examples", load)
    words = write_recipe(tmp_path, dataset="one", eval_dataset="two")
    with pytest.raises(StopIteration):
        compare.compare([*words, "--image_column", "a", *columns], [0])
    assert calls == [("one", "train", None, ["a"]), ("two", "test", None, read)]


def test_nothing_to_render_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file to render"):
        compare.main(["--render-only", "--results", str(tmp_path / "none.json")])
