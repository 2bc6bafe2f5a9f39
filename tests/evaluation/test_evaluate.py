"""`dualspeed evaluate` on tiny checkpoints: what is answered, kept, gone on with, scored and refused."""

from __future__ import annotations

import json
import os
import re
import shlex
from contextlib import suppress
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, load_dataset
from evaluation_cases import (
    ISOLATOR,
    SIZES,
    VISUAL,
    evaluate,
    kept,
    rows,
    texts,
    write_rows,
)
from huggingface_hub import ModelCard
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
)

from hf_dualspeed import AutoPruner, ModeIsolator, cli, prune_inputs
from hf_dualspeed.commands.evaluate import parse
from hf_dualspeed.data.loading import load_examples
from hf_dualspeed.evaluation import evaluate as evaluate_command
from hf_dualspeed.evaluation.generation import answers, prompts
from hf_dualspeed.evaluation.predictions import FEATURES, Predictions
from hf_dualspeed.publishing.results import read_results
from hf_dualspeed.utils.writing import write_json


@pytest.fixture
def unloaded(monkeypatch):
    """Loading a model fails the test: what can be known before is said before."""
    monkeypatch.setattr(evaluate_command.Checkpoint, "model", lambda self: pytest.fail("loaded"))


@pytest.fixture
def unloaded_after_answers(folder, monkeypatch):
    """The same, where all questions were answered before."""
    evaluate()
    monkeypatch.setattr(evaluate_command.Checkpoint, "model", lambda self: pytest.fail("loaded"))


# --- what is answered ---------------------------------------------------------------------------------------------


def test_all_tokens_and_each_pruner_with_each_ratio_in_one_go(folder, asked, monkeypatch, capsys):
    loads, load = [], evaluate_command.Checkpoint.model
    monkeypatch.setattr(evaluate_command.Checkpoint, "model", lambda self: loads.append(1) or load(self))
    assert evaluate("--pruner", "divprune", "grid", "--pruning_ratio", "0.5", "0.75") == 0
    assert len(loads) == 1
    batches = 4
    full, views = asked[:batches], [asked[n * batches : (n + 1) * batches] for n in range(1, 5)]
    for view, keeps in zip(views, (8, 4, 8, 4), strict=True):
        assert [length - VISUAL + keeps + ISOLATOR for _, length in full] == [length for _, length in view]
    out = capsys.readouterr().out
    for name in ("full", "divprune-0.5", "divprune-0.75", "grid-0.5", "grid-0.75"):
        assert len(kept(name)) == 7
        assert name in out


@pytest.mark.parametrize("proportional", [True, False])
def test_the_answers_are_those_of_generate(folder, proportional):
    """In the view that the run was trained with."""
    results = json.loads(Path("run/results.json").read_text())
    results["settings"]["proportional_attention"] = proportional
    Path("run/results.json").write_text(json.dumps(results))
    evaluate("--pruner", "divprune", "--pruning_ratio", "0.5")
    model = AutoModelForImageTextToText.from_pretrained("run").eval()
    processor = AutoProcessor.from_pretrained("run")
    isolator, pruner = ModeIsolator(ISOLATOR, SIZES["hidden_size"]), AutoPruner.from_name("divprune", pruning_ratio=0.5)
    isolator.load_pretrained("run")

    def prune(inputs):
        options = {"position_ids": "compact", "proportional_attention": proportional}
        return prune_inputs(model, inputs, pruner, isolator, **options)

    for row, full, pruned in zip(load_examples("data.json"), kept("full"), kept("divprune-0.5"), strict=True):
        assert answers(model, processor, [row], 3) == [full["prediction"]]
        assert answers(model, processor, [row], 3, prune) == [pruned["prediction"]]
    assert texts("full") != texts("divprune-0.5")
    inputs = prompts(model, processor, [row])
    bare = prune_inputs(model, inputs, pruner, position_ids="compact")
    assert prune(inputs)["input_ids"].shape[1] == bare["input_ids"].shape[1] + ISOLATOR


def test_answers_are_greedy_whatever_the_checkpoint_says(folder, monkeypatch):
    path = Path("run/generation_config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_beams": 2}))
    monkeypatch.setattr(LlavaForConditionalGeneration, "_beam_search", lambda *args, **options: pytest.fail("beams"))
    assert evaluate() == 0


def test_the_runs_own_pruner_is_taken_where_none_is_named(folder, asked):
    evaluate("--pruning_ratio", "0.5", "--no_isolator")
    assert len(kept("random-0.5")) == 7
    assert [length - VISUAL + 8 for _, length in asked[:4]] == [length for _, length in asked[4:]]
    assert "isolator_length" not in read_results("run")["evaluations"][1]
    evaluate("--pruner", "random")  # and its own ratio
    assert len(kept("random-0.75")) == 7


def test_what_is_kept_is_a_data_set(folder):
    evaluate()
    first = kept("full")[0]
    assert first.pop("seconds") > 0
    assert isinstance(first.pop("prediction"), str)
    question = "which colour is it ? "
    assert first == {"index": 0, "id": "0", "question": question, "references": ["red"], "options": None}
    assert len(kept("full")) == 7
    assert sorted(path.name for path in Path("run/evaluations/data.json").iterdir()) == [
        "evaluation.json",
        "full.json",
        "full.parquet",
    ]


def test_questions_in_a_column_and_answers_of_several_people(folder):
    people = [{"answer": "red", "answer_id": 1}, {"answer": "Red.", "answer_id": 2}, {"answer": "dark red"}]
    data = load_dataset("json", data_files="data.json", split="train").remove_columns("conversations")
    data = data.add_column("question", ["which colour is it ?"] * 7).add_column("answers", [people] * 7)
    data.to_parquet("people.parquet")
    assert evaluate("--metric", "vqa_accuracy", "exact_match", data="people.parquet") == 0
    first = kept("full", "run/evaluations/people.parquet")[0]
    assert first["references"] == ["red", "Red.", "dark red"]
    assert first["question"] == "which colour is it ?"


def test_multiple_choice_reads_options(folder):
    table = rows(options=["red", "green", "no colour"])
    for row in table:
        row["answer"] = "A"
    write_rows(folder / "choices.json", table)
    assert evaluate("--metric", "multiple_choice", data="choices.json") == 0
    assert kept("full", "run/evaluations/choices.json")[0]["options"] == ["red", "green", "no colour"]


# --- interruptions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calls", [1, 3, 6])
def test_an_interrupted_evaluation_goes_on_and_loses_one_batch_at_most(folder, asked, calls, capsys):
    words = ("--pruner", "random", "--pruning_ratio", "0.5")
    evaluate(*words, "--output", "whole")
    assert len(asked) == 8
    before = read_results("run")
    asked.clear()
    asked.stop_at = calls
    assert evaluate(*words) == 130
    assert "Rerun the same command to resume" in " ".join(capsys.readouterr().err.split())
    assert read_results("run") == before
    asked.clear()
    asked.stop_at = None
    assert evaluate(*words) == 0
    assert len(asked) == 8 - calls
    for view in ("full", "random-0.5"):
        assert texts(view) == texts(view, "whole/data.json")
    asked.clear()
    assert evaluate(*words, "--metric", "exact_match", "anls") == 0  # another metric asks nothing anew
    assert not asked
    assert len(read_results("run")["evaluations"]) == 4


def test_an_interrupted_evaluation_does_not_advise_to_overwrite_its_answers(folder, asked, capsys):
    asked.stop_at = 1
    assert evaluate("--overwrite") == 130
    assert "Rerun the command without --overwrite to resume" in " ".join(capsys.readouterr().err.split())
    asked.stop_at = None
    assert evaluate() == 0
    assert len(asked) == 4


def test_half_a_batch_is_answered_again(folder, asked):
    evaluate("--output", "whole")
    asked.clear()
    asked.stop_at = 3
    evaluate()
    lines = Path("run/evaluations/data.json/full.jsonl")
    written = lines.read_bytes()
    assert written.count(b"\n") == 6
    lines.write_bytes(written[: written.rindex(b'"prediction"')])  # in the middle of the sixth row
    asked.clear()
    asked.stop_at = None
    assert evaluate() == 0
    assert len(asked) == 2
    assert texts("full") == texts("full", "whole/data.json")


def test_damaged_answers_are_named(tmp_path):
    store = Predictions(tmp_path, "full", {"a": 1}, batch_size=1)
    store.append([{"index": 0}])
    store.append([{"index": 1}])
    lines = tmp_path / "full.jsonl"
    assert [row["index"] for row in Predictions(tmp_path, "full", {"a": 1}, batch_size=1).rows] == [0, 1]
    lines.write_bytes(b"nonsense\n" + lines.read_bytes())
    with pytest.raises(ValueError, match=r"full\.jsonl' is damaged: .* Begin anew with --overwrite"):
        Predictions(tmp_path, "full", {"a": 1}, batch_size=1)
    assert Predictions(tmp_path, "full", {"a": 1}, batch_size=1, overwrite=True).rows == []


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("kill", [0, 1, 2, 3])
def test_a_kill_while_answers_move_away_or_back_takes_none(tmp_path, monkeypatch, kill, finished):
    first, second, replace, moves = {"a": 1}, {"a": 2}, Path.replace, []
    monkeypatch.setattr("hf_dualspeed.evaluation.predictions.FEATURES", None)

    def killed(path, target):
        moves.append(path)
        if len(moves) - 1 == kill:
            raise KeyboardInterrupt
        return replace(path, target)

    def opened(identity):
        """Opens the answers, is killed once on the way, and opens them again."""
        moves.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", killed)
            with suppress(KeyboardInterrupt):
                Predictions(tmp_path, "full", identity, batch_size=1)
        return Predictions(tmp_path, "full", identity, batch_size=1)

    store = Predictions(tmp_path, "full", first, batch_size=1)
    for index in (0, 1):
        store.append([{"index": index, "prediction": "red"}])
    if finished:
        store.finish()
    other = opened(second)
    assert other.rows == []
    other.append([{"index": 0, "prediction": "blue"}])
    for identity, predictions in ((first, ["red", "red"]), (second, ["blue"]), (first, ["red", "red"])):
        assert [row["prediction"] for row in opened(identity).rows] == predictions


def test_answers_that_two_evaluations_wrote_at_once_are_damaged(tmp_path):
    first, second = (Predictions(tmp_path, "full", {"a": 1}, batch_size=1) for _ in range(2))
    first.append([{"index": 0}])
    second.append([{"index": 0}])
    with pytest.raises(ValueError, match=r"full\.jsonl' is damaged: its rows are not those of the first 2 questions"):
        Predictions(tmp_path, "full", {"a": 1}, batch_size=1)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"evaluations": 3}', '{"evaluations": [3]}'])
def test_broken_scores_are_named_before_a_model_is_loaded(folder, unloaded, text):
    Path("run/evaluations/data.json").mkdir(parents=True)
    Path("run/evaluations/data.json/evaluation.json").write_text(text)
    with pytest.raises(ValueError, match=r"evaluation\.json' holds no scores: .* Remove it"):
        evaluate()


def test_a_data_set_of_answers_that_was_changed_is_damaged(folder, unloaded_after_answers):
    table = Path("run/evaluations/data.json/full.parquet")
    Dataset.from_list(kept("full")[:5], features=FEATURES).to_parquet(table)
    with pytest.raises(ValueError, match=r"full\.parquet' is damaged: it holds 5 answers to 7 questions"):
        evaluate()
    table.write_bytes(table.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"full\.parquet' is damaged: "):
        evaluate()


# --- scores -------------------------------------------------------------------------------------------------------


def test_scores_go_into_results_and_card(folder):
    evaluate("--output", "before")
    Path("run/results.json").write_text(json.dumps({"name": "run", "steps": {"fast": 3, "slow": 1}}))
    table, said = rows(), list(enumerate(texts("full", "before/data.json")))
    for number, text in [pair for pair in said if pair[1].strip()][:3]:
        table[number]["answer"] = text.upper()
    write_rows(folder / "data.json", table)
    evaluate("--pruner", "divprune", "--pruning_ratio", "0.5", "--metric", "exact_match", "anls")
    results = read_results("run")
    assert results["steps"] == {"fast": 3, "slow": 1}
    entries = results["evaluations"]
    assert [(one["view"], one["metric"]) for one in entries] == [
        ("full", "exact_match"),
        ("full", "anls"),
        ("divprune-0.5", "exact_match"),
        ("divprune-0.5", "anls"),
    ]
    assert entries[0]["value"] == 3 / 7
    assert entries[0]["n"] == 7
    assert entries[0]["seconds"] == pytest.approx(sum(row["seconds"] for row in kept("full")), abs=1e-3)
    assert {key: entries[2][key] for key in ("pruner", "pruning_ratio", "isolator_length")} == {
        "pruner": "divprune",
        "pruning_ratio": 0.5,
        "isolator_length": ISOLATOR,
    }
    card = ModelCard.load("run/README.md")
    shown = card.data.eval_results
    assert [one.metric_value for one in shown] == [one["value"] for one in entries]
    assert shown[2].metric_name == "exact_match with 0.5 of the visual tokens removed by divprune, behind the isolator"
    assert (shown[0].dataset_name, shown[0].metric_type) == ("data.json", "exact_match")
    assert "My words." in card.text
    assert "| data.json |  | anls | all visual tokens |" in card.text
    summary = json.loads(Path("run/evaluations/data.json/evaluation.json").read_text())
    assert summary["evaluations"] == entries


@pytest.mark.skipif(os.name != "posix", reason="locks of folders")
def test_evaluations_that_end_at_once_lose_no_score(tmp_path, monkeypatch):
    """One has read the results and not written them yet while another ends."""

    def entry(metric: str) -> dict:
        return {"dataset": "d", "metric": metric, "view": "full", "value": 0.5, "n": 2, "model_hash": "m"}

    write_json(tmp_path / "results.json", {"name": "run"})
    (tmp_path / "answers").mkdir()
    ended = SimpleNamespace(folder=tmp_path / "answers", checkpoint=SimpleNamespace(run=tmp_path))
    other = Thread(target=evaluate_command.record, args=(ended, [entry("anls")]))

    def read_slowly(run):
        found = read_results(run)
        if not other.ident:
            other.start()
            other.join(timeout=0.3)
        return found

    monkeypatch.setattr(evaluate_command, "read_results", read_slowly)
    monkeypatch.setattr(evaluate_command, "render", lambda run: None)
    evaluate_command.record(ended, [entry("exact_match")])
    other.join()
    for path in (tmp_path / "results.json", tmp_path / "answers" / "evaluation.json"):
        found = json.loads(path.read_text())["evaluations"]
        assert [one["metric"] for one in found] == ["exact_match", "anls"]


def test_later_scores_join_earlier_ones_and_replace_their_likes(folder):
    evaluate()
    evaluate("--pruner", "grid", "--pruning_ratio", "0.5")
    table = rows()
    for row, text in zip(table, texts("full"), strict=True):
        row["answer"] = text if text.strip() else "empty"
    write_rows(folder / "data.json", table)
    evaluate("--pruner", "grid", "--pruning_ratio", "0.5")
    entries = read_results("run")["evaluations"]
    assert sorted((one["view"], one["n"]) for one in entries) == [("full", 7), ("grid-0.5", 7)]
    assert next(one for one in entries if one["view"] == "full")["value"] > 0


def test_a_plain_checkpoint_keeps_its_folder_but_for_the_answers(folder, capsys):
    for name in ("results.json", "mode_isolator.safetensors", "pruner_config.json"):
        Path("run", name).unlink()
    before = sorted(path.name for path in Path("run").iterdir())
    assert evaluate("--pruner", "divprune", "--output", "elsewhere") == 0
    assert sorted(path.name for path in Path("run").iterdir()) == before
    assert len(kept("divprune-0.9", "elsewhere/data.json")) == 7
    assert "Results and card" not in capsys.readouterr().out


def test_the_view_of_a_checkpoint_is_that_of_its_state_or_warned_of(folder, caplog):
    Path("run/results.json").unlink()
    evaluate("--pruning_ratio", "0.5")
    assert "Nothing beside run says with which positions and attention its fast steps ran" in caplog.text
    caplog.clear()
    view = {"position_ids": "original", "proportional_attention": False}
    write_json("run/trainer_state.json", {"stateful_callbacks": {"ModeClock": {"attributes": {"view": view}}}})
    evaluate("--pruning_ratio", "0.5")
    assert "Nothing beside run" not in caplog.text
    assert "position_ids was None, is 'original'; proportional_attention was None, is False" in caplog.text


def test_a_checkpoint_on_the_hub(folder, hub, asked, caplog):
    hub.put("tester/run", {path.name: path.read_bytes() for path in Path("run").iterdir()})
    assert evaluate("--pruning_ratio", "0.5", checkpoint="tester/run", data="data.json") == 0
    place = "runs/evaluations/tester--run/data.json"
    assert [length - VISUAL + 8 + ISOLATOR for _, length in asked[:4]] == [length for _, length in asked[4:]]
    assert not any(line.startswith(("POST", "PUT")) for line in hub.log)
    evaluate("--pruning_ratio", "0.5")
    assert texts("random-0.5", place) == texts("random-0.5")
    hub.put("tester/run", {"config.json": Path("run/config.json").read_text() + "\n"})
    asked.clear()
    caplog.clear()
    evaluate("--pruning_ratio", "0.5", checkpoint="tester/run")
    assert len(asked) == 8
    assert "checkpoint commit was 'tester/run@" in caplog.text


def test_a_cached_checkpoint_needs_no_hub(folder, hub, asked, monkeypatch):
    hub.put("tester/run", {path.name: path.read_bytes() for path in Path("run").iterdir()})
    evaluate(checkpoint="tester/run")
    asked.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert evaluate("--max_new_tokens", "2", checkpoint="tester/run") == 0
    assert len(asked) == 4


def test_adapters_answer_on_top_of_their_base(folder):
    peft = pytest.importorskip("peft")
    model = AutoModelForImageTextToText.from_pretrained("run")
    config = peft.LoraConfig(target_modules=r".*language_model.*q_proj", init_lora_weights=False, r=4)
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "run")
    adapted.save_pretrained("adapter")
    assert evaluate("--pruner", "divprune", checkpoint="adapter") == 0
    merged = adapted.merge_and_unload().eval()
    processor = AutoProcessor.from_pretrained("run")
    expected = [answers(merged, processor, [row], 3)[0] for row in load_examples("data.json")]
    assert texts("full", "adapter/evaluations/data.json") == expected


# --- what is refused ----------------------------------------------------------------------------------------------


def other_columns(table):
    return [{"picture": row["image"], "text": "what?"} for row in table]


def missing_image(table):
    return [*table[:4], {**table[4], "image": "nowhere.png"}, *table[5:]]


def no_image(table):
    Path("broken.png").write_text("no image")
    return [*table[:4], {**table[4], "image": "broken.png"}, *table[5:]]


def no_answers(table):
    return [{**row, "answers": [] if number == 2 else ["red"]} for number, row in enumerate(table)]


def without_answer(table):
    return [{**row, "conversations": row["conversations"][:1]} for row in table]


@pytest.mark.parametrize(
    ("change", "words", "said"),
    [
        (other_columns, [], r"has no conversation\. Its columns are \['picture', 'text'\]"),
        (missing_image, [], r"Row 4 of 'data\.jsonl?' .*cannot be evaluated: .*No such file.*nowhere\.png"),
        (no_image, [], r"Row 4 of .*cannot be evaluated: .*broken\.png"),
        (no_answers, [], r"Row 2 of .*\(id '2'\) says nothing of what is right"),
        (without_answer, [], r"Row 0 of .*says nothing of what is right.* have a column `answer` or `answers`"),
        (lambda table: [], [], "has no rows"),
        (
            list,
            ["--metric", "multiple_choice"],
            r"`metric` 'multiple_choice' needs the options .*row 0 of 'data\.json'",
        ),
    ],
)
def test_bad_data_is_named_before_a_model_is_loaded(folder, unloaded, change, words, said):
    write_rows(folder / "data.json", change(rows()))
    with pytest.raises(ValueError, match=said):
        evaluate(*words)


def test_a_right_answer_that_is_no_option_is_named_before_a_model_is_loaded(folder, unloaded):
    write_rows(folder / "data.json", rows(options=["red", "green"]))
    with pytest.raises(ValueError, match=r"reference 'blue' is neither a letter of 'AB' nor one of the options"):
        evaluate("--metric", "multiple_choice")


def test_parquet_with_other_columns(folder, unloaded):
    load_dataset("json", data_files="data.json", split="train").rename_column("conversations", "talk").to_parquet(
        "other.parquet"
    )
    with pytest.raises(ValueError, match=r"Row 0 of 'other.parquet' \(columns: id, image, talk\) cannot be evaluated"):
        evaluate(data="other.parquet")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--pruner", "fastv"], "`pruner` is 'fastv', which drops tokens inside the language model"),
        (["--pruner", "dynamicvit"], "`pruner` is 'dynamicvit', which is learned, but the checkpoint holds no weights"),
        (["--pruner", "grid", "grid"], "must differ from each other, got grid-0.9, grid-0.9"),
        (["--pruner", "grid", "--pruning_ratio", "1"], r"`pruning_ratio` must be in \[0, 1\), got 1.0"),
        (["--batch_size", "0"], "`batch_size` must be in"),
        (["--limit", "0"], "`limit` must be in"),
    ],
)
def test_bad_options_are_named_before_a_model_is_loaded(folder, unloaded, words, said):
    with pytest.raises(ValueError, match=said):
        evaluate(*words)


def test_a_ratio_without_any_pruner(folder, unloaded):
    Path("run/pruner_config.json").unlink()
    with pytest.raises(ValueError, match="`pruner` is not set, and the checkpoint brings none along"):
        evaluate("--pruning_ratio", "0.5")


def test_a_model_without_eyes(folder, unloaded):
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    LlamaForCausalLM(config).save_pretrained("blind")
    with pytest.raises(ValueError, match="`checkpoint` 'blind' is no vision-language model: .* its type, 'llama'"):
        evaluate(checkpoint="blind")


def test_no_checkpoint_at_all(folder, unloaded, capsys):
    Path("empty").mkdir()
    with pytest.raises(ValueError, match="'empty' holds no checkpoint: neither config.json nor adapter_config.json"):
        evaluate(checkpoint="empty")
    with pytest.raises(FileNotFoundError, match="`checkpoint` is 'runs/nowhere/run', which is neither a folder nor"):
        evaluate(checkpoint="runs/nowhere/run")
    assert cli.main(["evaluate", "empty", "--dataset", "data.json"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_processor_without_a_template(folder, unloaded):
    Path("run/chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="processor of 'run' has no chat template"):
        evaluate()


def test_broken_results_are_named_before_a_model_is_loaded(folder, unloaded):
    Path("run/results.json").write_text('{"evaluations": [{"dataset": "x", "metric": "anls", "view": "full", "n": 3}]}')
    with pytest.raises(ValueError, match=r"`evaluations\[0\]\.value` is missing"):
        evaluate()
    Path("run/results.json").write_text('{"evaluations": [3]}')
    with pytest.raises(ValueError, match=r"`evaluations\[0\]` must be a mapping, got '3'"):
        evaluate()
    Path("run/results.json").write_text('{"name": "run"}')
    Path("run/README.md").write_text("---\n- no mapping\n---\n")
    with pytest.raises(
        ValueError, match=r"front matter of README\.md, between the lines `---`, must be a YAML mapping"
    ):
        evaluate()


def test_a_pruner_that_fails_is_known_before_the_first_answer(folder, asked, monkeypatch):
    def fail(*args):
        raise ValueError("it needs what this model has not")

    monkeypatch.setattr("hf_dualspeed.evaluation.pruned_prompts.prune_inputs", fail)
    with pytest.raises(ValueError, match="it needs what this model has not"):
        evaluate("--pruner", "divprune")
    assert not asked


def test_an_image_that_breaks_off_is_named_before_a_model_is_loaded(folder, unloaded):
    Image.effect_noise((64, 64), 50).save("white.png")
    Path("white.png").write_bytes(Path("white.png").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"Row 3 of 'data\.json' .*cannot be evaluated: .*truncated"):
        evaluate()


def test_an_image_that_breaks_during_the_run_is_named_and_what_was_answered_stays(folder, monkeypatch):
    generate, batches = LlavaForConditionalGeneration.generate, []

    def spoil(model, **inputs):
        batches.append(1)
        Path("white.png").write_bytes(b"none")
        return generate(model, **inputs)

    monkeypatch.setattr(LlavaForConditionalGeneration, "generate", spoil)
    with pytest.raises(ValueError, match=r"An image or a video cannot be read \(id '3'\)"):
        evaluate()
    assert Path("run/evaluations/data.json/full.jsonl").read_bytes().count(b"\n") == 2


@pytest.mark.parametrize("page", ["docs/evaluation.md"])
def test_the_commands_of_the_documents_are_understood(page):
    text = (Path(__file__).parents[2] / page).read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"^dualspeed evaluate (.*)$", text, re.MULTILINE)
    assert commands
    for command in commands:
        assert parse(shlex.split(command)).dataset
