import json
import re
import shlex
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from datasets import Dataset
from PIL import Image
from recipe_cases import ROOT, TINY
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from hf_dualspeed import AutoPruner
from hf_dualspeed.commands.evaluate import parse as parse_evaluation
from hf_dualspeed.evaluation import visualize as kept_tokens
from hf_dualspeed.evaluation.visualize import FRAME
from hf_dualspeed.models.components import freeze_roles, parameter_roles
from hf_dualspeed.publishing.files import published_files
from hf_dualspeed.recipes import run as running
from hf_dualspeed.recipes.arguments import TOPICS, RecipeArguments, parse_recipe
from hf_dualspeed.recipes.run import run_recipe
from hf_dualspeed.recipes.tiny_llava import build_tiny_llava
from hf_dualspeed.trainer.training_args import DualSpeedArguments, DualSpeedTrainingArguments

CONFIGS = sorted(path.relative_to(ROOT) for path in (ROOT / "trainer_configs").rglob("*.yaml"))
ACCELERATE = [path for path in CONFIGS if path.parent.name == "accelerate"]
RECIPES = [path for path in CONFIGS if path not in ACCELERATE]
ROLES = ("vision_tower", "projector", "language_model")
BEST = {"early_stopping_patience": 2, "eval_dataset": "easy-vqa", "load_best_model_at_end": True}
BEST |= {"eval_strategy": "epoch", "save_strategy": "epoch"}


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe of the given keys and returns its path."""

    def write(**keys):
        path = tmp_path / "recipe.yaml"
        base = {"model_name_or_path": "org/model", "dataset": "easy-vqa", "output_dir": str(tmp_path / "run")}
        path.write_text(yaml.safe_dump({**base, "use_cpu": True, **keys}))
        return str(path)

    return write


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_recipes_load(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe_args, training_args = parse_recipe(["--config", str(path), "--use_cpu", "true"])
    assert recipe_args.dataset
    assert training_args.output_dir == f"runs/{path.stem}"
    assert 0 < training_args.warmup_steps < 1


@pytest.mark.parametrize("path", ACCELERATE, ids=str)
def test_accelerate_configs_load(path):
    config = load_config_from_file(str(ROOT / path))
    assert config.num_processes == {"single_gpu": 1, "cpu_ddp": 2}.get(path.stem, 8)


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_first_line_is_the_command_that_uses_the_file(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    first = (ROOT / path).read_text().partition("\n")[0]
    if first.startswith("# python -m benchmarks.compare "):
        _, *words = first.removeprefix("# python -m benchmarks.compare ").split()
        parse_recipe(["--config", *words, "--use_cpu", "true"])
        assert words == [str(path)]
        return
    assert first.startswith("# accelerate launch ")
    launch = launch_command_parser().parse_args(first.removeprefix("# accelerate launch ").split())
    assert launch.training_script == "train.py"
    parse_recipe([*launch.training_script_args, "--use_cpu", "true"])
    assert str(path) in (launch.config_file, launch.training_script_args[1])


def test_hyperparameters_of_the_paper(monkeypatch):
    monkeypatch.chdir(ROOT)
    rows = (("pretrain", 1e-3, 256, 0.0), ("finetune", 2e-5, 128, 0.05), ("finetune_paper", 2e-5, 128, 0.1))
    for stem, rate, batch, slow in rows:
        _, args = parse_recipe(["--config", f"trainer_configs/llava_1_5_{stem}.yaml", "--use_cpu", "true"])
        assert (args.learning_rate, args.slow_mode_ratio, args.pruning_ratio) == (rate, slow, 0.9)
        assert args.per_device_train_batch_size * args.gradient_accumulation_steps * 8 == batch
    assert not args.proportional_attention
    assert args.pruner_kwargs == {"dropped_tokens": "discard"}
    assert (args.isolator_length, args.distillation_weight, args.position_ids) == (4, 1.0, "compact")


def test_command_line_overrides_yaml(recipe):
    path = recipe(learning_rate="1e-3", seed=3)
    _, args = parse_recipe(["--seed", "5", "--config", path])
    assert (args.learning_rate, args.seed) == (1e-3, 5)


def test_yaml_values_are_read_as_on_the_command_line(recipe, tmp_path):
    lora = {"r": 4, "lora_dropout": 0.5}
    path = recipe(fast_only_parameters=["*a*", "*b*"], slow_only_parameters=[], lora=lora)
    with open(path, "a") as file:
        file.write("learning_rate: 2e-5\neval_strategy: no\nbf16: no\nmax_length: null\n")
    recipe_args, args = parse_recipe(["--config", path])
    assert args.learning_rate == 2e-5
    assert args.eval_strategy == "no"
    assert args.bf16 is False
    assert args.fast_only_parameters == ["*a*", "*b*"]
    assert args.slow_only_parameters == []
    assert recipe_args.lora == lora
    assert recipe_args.max_length is None


@pytest.mark.parametrize(("given", "read"), [("img", ["img"]), (["a", "b"], ["a", "b"]), ([], []), (None, None)])
def test_columns_of_pictures(recipe, given, read):
    assert parse_recipe(["--config", recipe(image_column=given)])[0].image_column == read


def test_help_begins_with_our_options_and_fits_into_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        parse_recipe(["--help"], prog="dualspeed train")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "usage: dualspeed train [--config RECIPE.yaml] [--OPTION VALUE ...]"
    places = [n for n, line in enumerate(lines) if re.fullmatch(r"[a-z].*:", line)]
    assert [lines[n] for n in places] == [
        "recipe:",
        *(f"{topic}:" for topic in TOPICS),
        "further options of DualSpeed:",
        "training: transformers' own options:",
    ]
    said = [match[1] for line in lines if (match := re.match(r"  --(\w+)", line))]
    ours, all_of_them = set(), set()
    for kind in (RecipeArguments, DualSpeedArguments, DualSpeedTrainingArguments):
        all_of_them |= {option.name for option in fields(kind) if option.init}
        ours |= all_of_them if kind is not DualSpeedTrainingArguments else set()
    assert sorted(said) == sorted({*all_of_them, "config"})  # each once
    assert set(said[: len(ours) + 1]) == {*ours, "config"}
    assert {name for names in TOPICS.values() for name in names} <= ours


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"eval_strategy": "epoch"}, r"`eval_strategy` is 'epoch', but there is no `eval_dataset`"),
        ({"early_stopping_patience": 0}, r"`early_stopping_patience` must be .*got 0"),
        ({"early_stopping_patience": 2}, r"`early_stopping_patience` is 2, .*`eval_strategy` is 'no'"),
        (
            {"early_stopping_patience": 2, "eval_strategy": "epoch", "eval_dataset": "easy-vqa"},
            r"`early_stopping_patience` is 2, .*`load_best_model_at_end` False",
        ),
        (
            {**BEST, "metric_for_best_model": "accuracy"},
            r"`metric_for_best_model` is 'accuracy', .*measures the loss alone",
        ),
        ({**BEST, "greater_is_better": True}, r"`greater_is_better` is True, .*the loss"),
    ],
)
def test_what_early_stopping_needs_is_asked_for_first(recipe, keys, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(["--config", recipe(**keys)])


@pytest.mark.parametrize("metric", [None, "loss", "eval_loss"])
def test_early_stopping_by_the_loss(recipe, metric):
    recipe_args, args = parse_recipe(["--config", recipe(**BEST, metric_for_best_model=metric)])
    assert (recipe_args.early_stopping_patience, args.metric_for_best_model) == (2, metric or "loss")
    assert not args.greater_is_better


def test_the_recipe_of_small_data_stops_early_and_keeps_the_best_checkpoint(tmp_path):
    """Its own settings, but for the model, its size and a learning rate of 0, by which no evaluation is better."""
    keys = yaml.safe_load((ROOT / "trainer_configs" / "small_data.yaml").read_text())
    for name in ("model_name_or_path", "dtype", "max_pixels", "max_length"):
        keys.pop(name)
    keys["lora"] |= {"exclude_modules": ".*vision_tower.*"}
    for file, count in (("train", 32), ("val", 4)):
        rows = []
        for number in range(count):
            Image.new("RGB", (16, 16), (number * 7, 90, 30)).save(tmp_path / f"{file}{number}.png")
            rows.append(
                {"image": f"{file}{number}.png", "question": "which colour?", "answer": ["red", "blue"][number % 2]}
            )
        (tmp_path / f"{file}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    keys |= {
        "tiny_llava": {**TINY, "patch_size": 8},
        "image_folder": str(tmp_path),
        "learning_rate": 0,
        "use_cpu": True,
    }
    keys |= {"dataset": str(tmp_path / "train.jsonl"), "eval_dataset": str(tmp_path / "val.jsonl")}
    keys |= {
        "output_dir": str(tmp_path / "run"),
        "dataloader_num_workers": 0,
        "report_to": "none",
        "disable_tqdm": True,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(keys))
    results = run_recipe(*parse_recipe(["--config", str(tmp_path / "recipe.yaml")]))
    steps = 32 // results["training"]["global_batch_size"]  # of an epoch
    assert results["progress"] == {"step": 3 * steps, "of": keys["num_train_epochs"] * steps}
    state = json.loads((tmp_path / "run" / f"checkpoint-{3 * steps}" / "trainer_state.json").read_text())
    assert (state["best_global_step"], state["epoch"]) == (steps, 3)
    kept = {path.name for path in (tmp_path / "run").glob("checkpoint-*")}
    assert kept == {f"checkpoint-{steps}", f"checkpoint-{3 * steps}"}  # the best and the last
    assert {"eval_loss"} <= results["evaluation"].keys()
    assert results["n"] == 4
    assert f"after {3 * steps} of at most" in (tmp_path / "run" / "README.md").read_text()
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


def test_mappings_on_the_command_line(recipe):
    recipe_args, _ = parse_recipe(["--config", recipe(lora={"r": 4}), "--lora", '{"r": 8}'])
    assert recipe_args.lora == {"r": 8}
    for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        _, args = parse_recipe(["--config", recipe(), f"--{name}", '{"use_reentrant": "false"}'])
        assert args.activation_checkpointing_kwargs == {"use_reentrant": False}


@pytest.mark.parametrize(
    ("keys", "words", "message"),
    [
        (
            {"learning_rat": 1},
            [],
            r"recipe\.yaml: unknown key `learning_rat`\. Did you mean 'learning_rate'\?",
        ),
        ({}, ["--learning_rat", "1"], r"`--learning_rat`\. Did you mean '--learning_rate'\?"),
        ({}, ["--learning_rat=1"], r"`--learning_rat`\. Did you mean '--learning_rate'\?"),
        ({"seed": "x"}, [], r"recipe\.yaml: `seed` is 'x': .*invalid int value"),
        ({"seed": {"a": 1}}, [], r"recipe\.yaml: `seed` is .*invalid int value"),
        ({"pruning_ratio": 1.5}, [], r"`pruning_ratio` must be in \[0, 1\), got 1\.5"),
        ({}, ["--slow_mode_ratio", "-0.5"], r"`slow_mode_ratio` must be in \[0, 1\], got -0\.5"),
        ({"eval_batch_size": 0}, [], r"`eval_batch_size` must be .*got 0"),
        ({}, ["--max_new_tokens", "-1"], r"`max_new_tokens` must be .*got -1"),
        ({"eval_limit": 0}, [], r"`eval_limit` must be .*got 0"),
        ({"long_samples": "skip"}, [], r"`long_samples` is 'skip', but `max_length` is not set"),
        ({"long_samples": "drop"}, [], r"`long_samples` must be one of 'truncate', 'raise', 'skip', got 'drop'"),
        ({"eval_image_column": ["a"]}, [], r"`eval_image_column` is \['a'\], but there is no `eval_dataset`"),
        ({"dtype": "bfloat"}, [], r"`dtype` must be one of .* Did you mean 'bfloat16'\?"),
        ({"tiny_llava": {"layers": 1}}, [], r"exactly one of `model_name_or_path`"),
        ({"tiny_llava": {}}, ["--dtype", "bfloat16"], r"`dtype` is 'bfloat16', but `tiny_llava` loads no weights"),
        ({"tiny_llava": {}}, ["--attn_implementation", "eager"], r"`attn_implementation` is 'eager', but `tiny_llava`"),
        ({"model_name_or_path": None}, [], r"exactly one of `model_name_or_path`"),
        ({"dataset": None}, [], r"`dataset` is not set"),
        ({"load_in_4bit": True}, [], r"`load_in_4bit` is True, .* `lora` \(got None\)"),
        ({"lora": {"r": 4}, "model_name_or_path": None, "tiny_llava": {}, "load_in_4bit": True}, [], r"load_in_4bit"),
        ({"lora": "r=4"}, [], r"`lora` must be a JSON mapping, got 'r=4'"),
        ({"lora": [4]}, [], r"lora"),
        ({"train_projector": False, "train_language_model": False}, [], r"nothing would be trained"),
    ],
)
def test_errors_name_what_is_wrong(recipe, keys, words, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(["--config", recipe(**keys), *words])


@pytest.mark.parametrize(("text", "message"), [("- a\n", "but holds a list"), ("a: [", "not valid YAML"), ("", "None")])
def test_bad_files(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"bad\.yaml: .*{message}"):
        parse_recipe(["--config", str(tmp_path / "bad.yaml")])


def test_missing_file():
    with pytest.raises(FileNotFoundError, match=r"'no\.yaml', but there is no such file"):
        parse_recipe(["--config", "no.yaml"])


def tiny_llava():
    return build_tiny_llava(["what colour ?", "red"], **TINY)[0]


def tiny_qwen():
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


@pytest.mark.parametrize(
    ("build", "tower", "projector"),
    [(tiny_llava, "vision_tower", "multi_modal_projector"), (tiny_qwen, "visual", "merger")],
)
@pytest.mark.parametrize("trained", ROLES)
def test_only_the_trained_role_learns(build, tower, projector, trained):
    model = build()
    freeze_roles(model, **{f"train_{role}": role == trained for role in ROLES})
    for name, parameter in model.named_parameters():
        role = "projector" if projector in name else "vision_tower" if tower in name else "language_model"
        assert parameter.requires_grad == (role == trained), name
    assert set(parameter_roles(model).values()) == set(ROLES)


def test_roles_that_lora_leaves_frozen_are_named(caplog):
    pytest.importorskip("peft")
    adapters = {"target_modules": r".*language_model.*q_proj"}
    for lora in (adapters, {**adapters, "modules_to_save": ["multi_modal_projector"]}):
        running.prepare_model(tiny_llava(), RecipeArguments(model_name_or_path="x", dataset="y", lora=lora))
    said = [record.getMessage() for record in caplog.records if "nothing of it" in record.getMessage()]
    assert [words.split()[0] for words in said] == ["`train_projector`"]


def test_a_model_without_the_roles_is_an_error():
    model = tiny_llava().model.language_model
    with pytest.raises(ValueError, match="LlamaModel has no module that is known to be its vision_tower"):
        freeze_roles(model, train_vision_tower=False, train_projector=True, train_language_model=True)


@pytest.fixture
def run(recipe, tmp_path):
    """Runs a small recipe on easy-vqa with the given words and returns its results."""
    from hf_dualspeed.recipes.run import run_recipe

    pytest.importorskip("easy_vqa")
    keys = {
        "model_name_or_path": None,
        "tiny_llava": TINY,
        "dataset_split": "train",
        "train_vision_tower": True,
    }
    keys |= {"eval_dataset": "easy-vqa", "eval_limit": 8, "max_steps": 4, "logging_steps": 1, "check_data": False}
    keys |= {"mode_schedule": "periodic", "slow_mode_ratio": 0.5, "per_device_train_batch_size": 4}

    def start(*words, **more):
        return run_recipe(*parse_recipe(["--config", recipe(**keys, **more), *words]))

    return start


def test_a_run_writes_a_folder_that_transformers_alone_loads(run, tmp_path):
    results = run()
    folder = tmp_path / "run"
    text = (folder / "results.json").read_text()
    assert json.loads(text) == json.loads(json.dumps(results))
    assert str(tmp_path) not in text
    assert 0 <= results["accuracy"] <= 1
    assert 0 < results["majority_accuracy"] <= 1
    assert results["n"] == 8
    assert sum(results["steps"].values()) == 4
    assert min(results["steps"].values()) > 0
    assert results["seconds"]["total"] > 0
    assert results["settings"]["pruning_ratio"] == 0.9
    assert results["versions"].keys() == {"torch", "transformers", "accelerate", "hf_dualspeed", "python"}
    assert (folder / "learning_curve.png").is_file()
    assert "this model, all visual tokens" in (folder / "README.md").read_text()
    AutoModelForImageTextToText.from_pretrained(folder)
    AutoProcessor.from_pretrained(folder)


def test_the_card_shows_kept_tokens_only_where_it_is_asked_to(run, tmp_path):
    assert "kept_tokens" not in run()
    results = run("--card_images", "2")
    assert results["kept_tokens"] == "kept_tokens.png"
    folder = tmp_path / "run"
    assert "](kept_tokens.png)" in (folder / "README.md").read_text()
    with Image.open(folder / "kept_tokens.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    # Below, kept tokens are framed; above is the image as it is.
    framed = (abs(pixels - FRAME).max(-1) < 24).any(1)
    assert not framed[: len(framed) // 2].any()
    assert framed[len(framed) // 2 :].any()
    assert "kept_tokens.png" in published_files(folder, (folder / "README.md").read_text())


@pytest.mark.parametrize(
    ("readable", "limit", "part"),
    [(10, None, None), (10, 4, "first 4"), (8, None, "readable 8 of 10"), (8, 4, "first 4 readable")],
)
def test_results_say_which_questions_were_asked(monkeypatch, readable, limit, part):
    monkeypatch.setattr(running, "_whole_model", lambda *given: None)
    asked = {"accuracy": 1.0, "n": limit or readable}
    monkeypatch.setattr(running, "answer_accuracy", lambda *given, **options: asked)
    recipe = RecipeArguments(model_name_or_path="org/model", dataset="data", eval_dataset="test", eval_limit=limit)
    trainer = SimpleNamespace(processing_class=None, args=SimpleNamespace(process_index=1))
    assert running._evaluate(recipe, trainer, None, range(readable), 10).get("eval_part") == part


def test_the_saved_model_of_a_sharded_run_answers_with_the_recipes_options(tmp_path):
    build_tiny_llava(["a word"], **TINY)[0].save_pretrained(tmp_path)
    options = {"model_name_or_path": "org/model", "dataset": "data", "attn_implementation": "eager"}
    args = SimpleNamespace(output_dir=str(tmp_path), device="cpu")
    trainer = SimpleNamespace(is_sharded=True, args=args)
    loaded = running._whole_model(trainer, RecipeArguments(**options, dtype="bfloat16"))
    assert loaded.config.get_text_config()._attn_implementation == "eager"
    assert loaded.dtype is torch.bfloat16


@pytest.mark.parametrize(("sharded", "why"), [(False, "inside the language model"), (True, "is sharded")])
def test_pictures_that_are_not_drawn_are_said(caplog, sharded, why):
    recipe = RecipeArguments(model_name_or_path="org/model", dataset="data", card_images=4)
    view = SimpleNamespace(pruner=SimpleNamespace(in_language_model=not sharded))
    assert running._picture(recipe, SimpleNamespace(dual_forward=view, is_sharded=sharded), None) == {}
    assert "`card_images` is 4, but kept tokens are not drawn" in caplog.text
    assert why in caplog.text


def test_without_a_picture_there_is_none_to_draw(tmp_path, caplog):
    rows = Dataset.from_list([{"messages": [{"role": "user", "content": "What colour?"}]}])
    prepare = SimpleNamespace(model=torch.nn.Linear(1, 1), pruner=AutoPruner.from_name("random"))
    chosen = kept_tokens.first_images(rows, 2)
    assert len(chosen) == 0
    assert kept_tokens.draw_images(prepare, None, chosen, tmp_path / "kept_tokens.png") is None
    assert "No picture of kept tokens: no row has one image alone." in caplog.text


def test_a_picture_that_cannot_be_drawn_ends_no_training(run, monkeypatch, caplog):
    def broken(image):
        raise OSError("broken image")

    monkeypatch.setattr(kept_tokens, "open_image", broken)
    assert "kept_tokens" not in run("--card_images", "1")
    assert "No picture of kept tokens: broken image" in caplog.text


def test_an_evaluation_that_fails_costs_neither_card_nor_results(run, tmp_path, monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("hf_dualspeed.recipes.run.answer_accuracy", broken)
    results = run()
    assert "accuracy" not in results
    assert (tmp_path / "run" / "README.md").is_file()
    folder = tmp_path / "run"
    assert "RuntimeError: out of memory. The model is saved" in caplog.text
    assert f"dualspeed evaluate {folder} --dataset easy-vqa" in caplog.text


def test_a_later_evaluation_asks_what_the_recipe_would_have():
    recipe = RecipeArguments(
        model_name_or_path="org/model",
        dataset="data",
        eval_dataset="my data/test",
        eval_split="validation",
        image_folder="my pictures",
        eval_image_column=["left", "right"],
        eval_limit=7,
    )
    _, command, *words = shlex.split(running._evaluate_later(recipe, "my run"))
    options = parse_evaluation(words)
    assert (command, options.checkpoint, options.dataset) == ("evaluate", "my run", "my data/test")
    assert (options.split, options.image_folder) == ("validation", "my pictures")
    assert (options.image_column, options.limit, options.max_new_tokens) == (["left", "right"], 7, 8)


def test_a_run_resumes_from_its_last_checkpoint(run, tmp_path):
    def logged(step: int) -> list[dict]:
        return json.loads((tmp_path / "run" / f"checkpoint-{step}" / "trainer_state.json").read_text())["log_history"]

    run("--save_steps", "2", "--resume_from_checkpoint", "last")
    before = logged(4)
    results = run("--max_steps", "6", "--resume_from_checkpoint", "last")
    assert [entry["step"] for entry in logged(6)] == [1, 2, 3, 4, 5, 6]
    assert logged(6)[:4] == before  # with their seconds, which steps that are run again would not take
    assert sum(results["steps"].values()) == 6


def test_a_run_with_adapters(run, tmp_path):
    pytest.importorskip("peft")
    run(lora={"r": 2, "target_modules": ["q_proj"]}, train_projector=False)
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


def test_unknown_keys_of_mappings_are_errors(run):
    with pytest.raises(ValueError, match=r"`lora` has an unknown key 'rr'"):
        run(lora={"rr": 2})
    with pytest.raises(ValueError, match=r"`tiny_llava` has an unknown key 'layer'\. .*'layers'\?"):
        run("--tiny_llava", '{"layer": 2}')


@pytest.fixture
def own_data(recipe, tmp_path):
    """Runs a small recipe on samples in a JSON file; three pictures are whole."""
    from hf_dualspeed.recipes.run import run_recipe

    for name in ("a.png", "b.png", "c.png"):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(tmp_path / name)

    def start(pictures, **more):
        rows = [{"id": name, "question": "what colour ?", "answer": "red", "image": name} for name in pictures]
        (tmp_path / "data.json").write_text(json.dumps(rows), encoding="utf-8")
        keys = {"model_name_or_path": None, "tiny_llava": TINY, "dataset": str(tmp_path / "data.json")}
        keys |= {"max_steps": 3, "per_device_train_batch_size": 1, "logging_steps": 1, "seed": 1}
        return run_recipe(*parse_recipe(["--config", recipe(**(keys | more))]))

    return start


def losses(folder) -> list[float]:
    state = json.loads((folder / "checkpoint-3" / "trainer_state.json").read_text())
    return [log["loss"] for log in state["log_history"] if "loss" in log]


@pytest.mark.parametrize("answers", ["answer\nred", 'answers\n"[""red"", ""red"", ""blue""]"'])
def test_a_table_of_questions_trains_and_is_evaluated(own_data, tmp_path, answers):
    name, answer = answers.split("\n")
    (tmp_path / "table.csv").write_text(f"question,image,{name}\nwhat colour ?,a.png,{answer}\n", encoding="utf-8")
    table = str(tmp_path / "table.csv")
    results = own_data(["a.png"], dataset=table, eval_dataset=table, save_steps=3)
    assert results["n"] == 1
    assert min(losses(tmp_path / "run")) > 0
    # A file has no splits, so none was asked.
    assert results["eval_dataset"] == "table.csv"
    assert not {"dataset_split", "eval_split"} & results.keys()
    assert "questions of `table.csv`:" in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")


def test_a_missing_picture_is_found_before_training(own_data, tmp_path, caplog):
    with pytest.raises(
        ValueError, match=r"data.json': 1 of 3 samples cannot be used:\n- .*row 2 of .*'no.png'.*='skip'"
    ):
        own_data(["a.png", "b.png", "no.png"])
    assert not (tmp_path / "run").exists()
    own_data(["a.png", "b.png", "no.png"], unreadable_images="skip")
    assert "1 of 3 samples are left out" in caplog.text


def test_questions_of_the_evaluation_are_looked_at_before_training(own_data, tmp_path):
    rows = [{"question": "what colour ?", "answer": "red", "image": "no.png"}]
    (tmp_path / "test.json").write_text(json.dumps(rows), encoding="utf-8")
    with pytest.raises(ValueError, match=r"test.json': 1 of 1 samples cannot be used"):
        own_data(["a.png"], eval_dataset=str(tmp_path / "test.json"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("slow", [0.0, 1.0])
def test_a_batch_whose_only_sample_is_broken_is_a_step_of_nothing(own_data, tmp_path, caplog, slow):
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])  # its header is whole
    own_data(["a.png", "cut.png", "c.png"], unreadable_images="skip", slow_mode_ratio=slow, save_steps=3)
    seen = losses(tmp_path / "run")
    assert sorted(loss > 0 for loss in seen) == [False, True, True]
    assert 0.0 in seen
    assert "Left out sample 0 of the batch, id 'cut.png' (1 so far)" in caplog.text


def test_data_that_teaches_nothing_is_refused(own_data):
    with pytest.raises(ValueError, match="(?s)3 of 3 samples have no token to learn.*`max_length`=20 cuts off"):
        own_data(["a.png", "b.png", "c.png"], max_length=20)


def test_the_evaluation_has_its_own_column_of_pictures(own_data, tmp_path):
    rows = [{"question": "what colour ?", "answer": "red", "photo": "a.png"}]
    (tmp_path / "test.json").write_text(json.dumps(rows), encoding="utf-8")
    results = own_data(["a.png"] * 3, eval_dataset=str(tmp_path / "test.json"), eval_image_column=["photo"])
    assert results["n"] == 1


def test_questions_that_say_nothing_of_what_is_right_are_found_before_training(own_data, tmp_path):
    rows = [{"question": "what colour ?", "answer": answer, "image": "a.png"} for answer in ("red", None)]
    (tmp_path / "test.json").write_text(json.dumps(rows), encoding="utf-8")
    test = str(tmp_path / "test.json")
    with pytest.raises(ValueError, match="Row 1 of .*test.json' cannot be scored: .* says nothing of what is right"):
        own_data(["a.png"], eval_dataset=test)
    assert not (tmp_path / "run").exists()
    assert own_data(["a.png"], eval_dataset=test, eval_limit=1)["eval_part"] == "first 1"


def test_an_evaluation_without_answers_is_refused_before_training_unless_it_measures_the_loss(
    own_data, tmp_path, caplog
):
    talk = [{"role": "user", "content": "what colour ?"}, {"role": "assistant", "content": "red"}]
    (tmp_path / "test.json").write_text(json.dumps([{"messages": talk, "images": []}]), encoding="utf-8")
    test = str(tmp_path / "test.json")
    with pytest.raises(ValueError, match=r"`eval_dataset` .*test.json' has no column `answer` or `answers`, only \["):
        own_data(["a.png"], eval_dataset=test, check_data=False)
    assert not (tmp_path / "run").exists()
    results = own_data(["a.png"] * 3, eval_dataset=test, eval_strategy="steps", eval_steps=3)
    assert results["evaluation"]["eval_loss"] > 0
    assert "The accuracy is not measured" in caplog.text


def test_an_accuracy_without_the_questions_left_out_is_one_of_a_part(own_data, tmp_path):
    rows = [{"question": "what colour ?", "answer": "red", "image": name} for name in ("a.png", "no.png")]
    (tmp_path / "test.json").write_text(json.dumps(rows), encoding="utf-8")
    results = own_data(["a.png"], eval_dataset=str(tmp_path / "test.json"), unreadable_images="skip")
    assert (results["n"], results["eval_part"]) == (1, "readable 1 of 2")


def test_options_of_the_processor(recipe, tmp_path):
    from hf_dualspeed.recipes.run import load_processor

    _, processor = build_tiny_llava(["one two"], **TINY)
    processor.save_pretrained(tmp_path / "model")
    options = {"model_name_or_path": str(tmp_path / "model"), "processor_options": {"size": {"shortest_edge": 8}}}
    loaded = load_processor(parse_recipe(["--config", recipe(**options)])[0])
    assert loaded.image_processor.size.shortest_edge == 8
    loaded.save_pretrained(tmp_path / "saved")
    assert AutoProcessor.from_pretrained(tmp_path / "saved").image_processor.size.shortest_edge == 8
    for wrong, message in (
        ({"sise": 8}, "unknown key 'sise'. Did you mean 'size'"),
        ({"max_pixels": 99}, "'max_pixels'"),
    ):
        options["processor_options"] = wrong
        with pytest.raises(ValueError, match=message):
            load_processor(parse_recipe(["--config", recipe(**options)])[0])
    known = parse_recipe(["--config", recipe(), "--max_pixels", "100352"])[0]
    assert known.processor_options == {"max_pixels": 100352}
    with pytest.raises(ValueError, match="set twice"):
        parse_recipe(["--config", recipe(processor_options={"max_pixels": 9}), "--max_pixels", "100352"])
    with pytest.raises(ValueError, match="`max_pixels` must be"):
        parse_recipe(["--config", recipe(), "--max_pixels", "0"])
