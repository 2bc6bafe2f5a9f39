"""`dualspeed evaluate` after something has changed: no stale or mixed answers, and no score of a part for the whole."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from evaluation_cases import COLOURS, ISOLATOR, SIZES, evaluate, kept, rows, texts, write_rows
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES
from tokenizers.normalizers import Replace
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from hf_dualspeed import AutoPruner, ModeIsolator
from hf_dualspeed.evaluation.fingerprint import differences, processor_parts
from hf_dualspeed.publishing.results import merged_evaluations, read_results

PRUNED = ("--pruner", "random", "--pruning_ratio", "0.5")
PLACE = "run/evaluations/data.json"


def change_json(path: str, **values) -> None:
    found = json.loads(Path(path).read_text())
    Path(path).write_text(json.dumps(found | values))


def change_weights():
    tensors = load_file("run/model.safetensors")
    name = sorted(tensors)[0]
    stat = os.stat("run/model.safetensors")
    save_file({**tensors, name: tensors[name] * 2}, "run/model.safetensors", metadata={"format": "pt"})
    # As a restored backup or `cp --preserve` leaves it: of the same size and date.
    os.utime("run/model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))


def change_template():
    path = Path("run/chat_template.jinja")
    path.write_text("{{ 'Look: ' }}" + path.read_text())


def change_generation():
    GenerationConfig.from_pretrained("run").save_pretrained("run")
    change_json("run/generation_config.json", repetition_penalty=1.5)


def change_processor():
    processor = AutoProcessor.from_pretrained("run")
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    processor.save_pretrained("run")


def change_tokenizer():
    processor = AutoProcessor.from_pretrained("run")
    processor.tokenizer.backend_tokenizer.normalizer = Replace("colour", "red")
    processor.save_pretrained("run")


def change_model_config():
    found = json.loads(Path("run/config.json").read_text())
    found["text_config"]["rms_norm_eps"] = 0.1
    Path("run/config.json").write_text(json.dumps(found))


def change_pixels():
    """Of a file of the same name, length and size in pixels, whose header stays."""
    before = Path("red.png").stat()
    for level in range(10):
        Image.new("RGB", (20, 16), "maroon").save("red.png", compress_level=level)
        if Path("red.png").stat().st_size == before.st_size:
            break
    os.utime("red.png", ns=(before.st_atime_ns, before.st_mtime_ns))


def change_prompt():
    table = rows()
    table[3]["conversations"][0]["value"] += "now ?"
    write_rows(Path("data.json"), table)


def change_tools():
    write_rows(Path("data.json"), rows(tools=[{"type": "function", "function": {"name": "look"}}]))


def change_order():
    write_rows(Path("data.json"), rows()[::-1])


def change_isolator():
    ModeIsolator(ISOLATOR, SIZES["hidden_size"], std=3.0).save_pretrained("run")


def change_pruner():
    AutoPruner.from_name("random", pruning_ratio=0.75, dropped_tokens="discard").save_pretrained("run")


def change_settings():
    found = json.loads(Path("run/results.json").read_text())
    found["settings"]["proportional_attention"] = False
    Path("run/results.json").write_text(json.dumps(found))


CHANGES = [
    (change_weights, r"checkpoint model\.safetensors changed", 8),
    (change_template, "processor chat template changed", 8),
    (change_generation, r"checkpoint generation_config\.json changed", 8),
    (change_processor, "processor settings changed", 8),
    (change_tokenizer, r"processor tokenizer/tokenizer\.json changed", 8),
    (change_model_config, r"checkpoint config\.json changed", 8),
    (change_pixels, "pictures changed", 8),
    (change_prompt, "questions changed", 8),
    (change_tools, "questions changed", 8),
    (change_order, "pictures changed", 8),
    (change_isolator, "isolator changed", 4),
    (change_pruner, "pruner dropped_tokens was 'merge', is 'discard'", 4),
    (change_settings, "proportional_attention was None, is False", 4),
]


@pytest.mark.parametrize(("change", "said", "batches"), CHANGES, ids=[change.__name__ for change, *_ in CHANGES])
def test_a_change_of_what_answers_depend_on_starts_anew_and_says_why(folder, asked, caplog, change, said, batches):
    evaluate(*PRUNED)
    asked.clear()
    assert evaluate(*PRUNED) == 0
    assert not asked
    assert "anew" not in caplog.text
    change()
    assert evaluate(*PRUNED) == 0
    assert len(asked) == batches  # both views, or the pruned one alone where the change concerns no other
    assert re.search(f"starts anew, because what its answers depend on has changed: .*{said}", caplog.text)
    asked.clear()
    assert evaluate(*PRUNED) == 0
    assert not asked


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max_new_tokens", "4"], "max_new_tokens was 3, is 4"),
        (["--batch_size", "3"], "batch_size was 2, is 3"),
        (["--dtype", "bfloat16"], "dtype was 'auto', is 'bfloat16'"),
        ([*PRUNED, "--seed", "1"], "seed was 0, is 1"),
        ([*PRUNED, "--no_isolator"], "no_isolator was False, is True"),
    ],
)
def test_half_a_run_of_other_settings_is_not_gone_on_with(folder, asked, caplog, words, said):
    evaluate(*PRUNED, *words, "--output", "whole")
    asked.clear()
    asked.stop_at = 6
    evaluate(*PRUNED)
    asked.clear()
    asked.stop_at = None
    assert evaluate(*PRUNED, *words) == 0
    assert said in caplog.text
    for view in ("full", "random-0.5"):
        assert texts(view) == texts(view, "whole/data.json")


def test_answers_set_aside_are_taken_up_again(folder, asked, caplog):
    asked.stop_at = 3
    evaluate()
    asked.stop_at = None
    evaluate("--max_new_tokens", "2")
    short = texts("full")
    asked.clear()
    assert evaluate() == 0
    assert len(asked) == 1  # three batches were there
    assert "taken up again" in caplog.text
    asked.clear()
    evaluate("--max_new_tokens", "2")
    assert not asked
    assert texts("full") == short


def test_a_copy_of_model_and_data_is_the_same(folder, asked):
    evaluate(*PRUNED)
    asked.clear()
    Path("elsewhere").mkdir()
    for path in folder.glob("*.*"):
        shutil.copyfile(path, Path("elsewhere", path.name))  # without its date
    shutil.copytree("run", "copy", copy_function=shutil.copyfile)
    words = ("--output", "run/evaluations")
    assert evaluate(*PRUNED, *words, checkpoint="copy", data="elsewhere/data.json") == 0
    assert not asked


def test_what_no_answer_depends_on_changes_nothing(folder, asked):
    evaluate("--pruning_ratio", "0.5")
    asked.clear()
    Path("run/README.md").write_text("## Mine\n\nOther words.\n")
    Path("run/training_args.bin").write_bytes(b"1")
    change_json("run/results.json", name="another")
    change_json("run/config.json", transformers_version="5.0.0", _name_or_path="/somewhere/else")
    assert evaluate("--pruning_ratio", "0.5") == 0
    assert not asked
    change_isolator()
    assert evaluate() == 0  # from all tokens, without isolator
    assert not asked


def test_answers_that_were_searched_with_beams_start_anew(folder, asked, caplog):
    evaluate()
    path = Path(PLACE) / "full.json"
    assert "num_beams" not in json.loads(path.read_text())  # answers of other checkpoints stay
    GenerationConfig.from_pretrained("run").save_pretrained("run")
    change_json("run/generation_config.json", num_beams=2)
    evaluate()
    earlier = json.loads(path.read_text())
    del earlier["num_beams"]  # as it was while beams were followed
    path.write_text(json.dumps(earlier))
    asked.clear()
    evaluate()
    assert len(asked) == 4
    assert "what its answers depend on has changed: num_beams was None, is 1" in caplog.text


def test_two_checkpoints_in_one_folder_are_not_mixed(folder, asked, caplog):
    shutil.copytree("run", "other")
    change_weights()  # of "run"
    words = ("--output", "answers")
    evaluate(*PRUNED, *words, checkpoint="other")
    evaluate(*words)
    assert sorted(path.name for path in Path("answers/data.json").glob("*.parquet")) == ["full.parquet"]
    assert "random-0.5 starts anew" in caplog.text
    entries = json.loads(Path("answers/data.json/evaluation.json").read_text())["evaluations"]
    assert [(one["view"], one["n"]) for one in entries] == [("full", 7)]
    assert "random-0.5, exact_match" in caplog.text
    asked.clear()
    evaluate(*PRUNED, *words, checkpoint="other")
    assert not asked


def test_scores_of_another_state_of_the_model_leave_results_and_card(folder, caplog):
    evaluate(*PRUNED)
    change_template()
    evaluate()
    assert [one["view"] for one in read_results("run")["evaluations"]] == ["full"]
    assert len(ModelCard.load("run/README.md").data.eval_results) == 1
    assert "results.json: the score of data.json, random-0.5, exact_match" in caplog.text


def test_adapters_on_another_base_are_asked_anew(folder, asked, caplog):
    adapter_of(str(folder / "run"))
    evaluate(checkpoint="adapter")
    shutil.copytree("run", "base")
    change_json("adapter/adapter_config.json", base_model_name_or_path=str(folder / "base"))
    asked.clear()
    evaluate(checkpoint="adapter")
    assert not asked  # another place of the same
    change_weights()
    Path("run/model.safetensors").replace("base/model.safetensors")
    evaluate(checkpoint="adapter")
    assert len(asked) == 4
    assert "base model model.safetensors changed" in caplog.text


def adapter_of(base: str, place: str = "adapter") -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=r".*language_model.*q_proj", init_lora_weights=False, r=4)
    adapted = peft.get_peft_model(AutoModelForImageTextToText.from_pretrained("run"), config)
    adapted.peft_config["default"].base_model_name_or_path = base
    adapted.save_pretrained(place)


def test_adapters_of_a_base_on_the_hub(folder, hub, asked, caplog):
    files = {path.name: path.read_bytes() for path in Path("run").iterdir()}
    hub.put("tester/base", files)
    adapter_of("tester/base")
    evaluate(checkpoint="adapter")
    asked.clear()
    evaluate(checkpoint="adapter")
    assert not asked
    hub.put("tester/base", {"config.json": files["config.json"] + b"\n"})
    evaluate(checkpoint="adapter")
    assert len(asked) == 4
    assert "base model commit was 'tester/base@" in caplog.text


def test_a_folder_with_the_configs_of_base_and_adapter_is_an_adapter(folder, asked, caplog):
    adapter_of(str(folder / "run"))
    evaluate(checkpoint="adapter")
    shutil.copy("run/config.json", "adapter/config.json")
    evaluate("--output", "both", checkpoint="adapter")
    assert texts("full", "both/data.json") == texts("full", "adapter/evaluations/data.json")
    change_weights()
    asked.clear()
    evaluate("--output", "both", checkpoint="adapter")
    assert len(asked) == 4
    assert "base model model.safetensors changed" in caplog.text


def test_learned_weights_of_a_pruner(folder, asked, caplog, learned_pruner):
    for _ in range(2):
        AutoPruner.from_name("scored", pruning_ratio=0.5, hidden_size=SIZES["hidden_size"]).save_pretrained("run")
        evaluate("--pruning_ratio", "0.5")
    assert len(asked) == 3 * 4
    assert "pruner's weights changed" in caplog.text


def test_an_adapter_of_nothing(folder):
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text('{"base_model_name_or_path": null}')
    with pytest.raises(ValueError, match="'adapter' is an adapter of 'None', which is neither a folder nor a Hub repo"):
        evaluate(checkpoint="adapter")


def test_scores_of_longer_answers_leave_results(folder, caplog):
    evaluate("--metric", "anls", "exact_match")
    evaluate("--max_new_tokens", "2")
    assert [one["metric"] for one in read_results("run")["evaluations"]] == ["exact_match"]
    assert "the score of data.json, full, anls" in caplog.text
    evaluate("--max_new_tokens", "2", "--limit", "2", "--metric", "anls")
    evaluate("--max_new_tokens", "2", *PRUNED)
    found = [(one["view"], one.get("part"), one["metric"]) for one in read_results("run")["evaluations"]]
    whole = [("full", None, "exact_match"), ("random-0.5", None, "exact_match")]
    assert sorted(found, key=str) == sorted([*whole, ("full", "first 2", "anls")], key=str)


def test_other_references_are_scored_without_asking_anew(folder, asked):
    evaluate("--metric", "anls")
    table, said = rows(), texts("full")
    number = next(number for number, text in enumerate(said) if text.strip())
    table[number]["answer"] = said[number]
    write_rows(Path("data.json"), table)
    asked.clear()
    evaluate("--metric", "anls")
    assert not asked
    assert kept("full")[number]["references"] == [said[number]]
    assert read_results("run")["evaluations"][0]["value"] >= 1 / 7


@pytest.mark.parametrize("text", [None, "", "[1]", '{"n": '])
def test_answers_of_nobody_knows_what_are_not_gone_on_with(folder, asked, caplog, text):
    evaluate()
    if text is None:
        Path(PLACE, "full.json").unlink()
    else:
        Path(PLACE, "full.json").write_text(text)
    asked.clear()
    evaluate()
    assert len(asked) == 4
    assert "full.json is missing or damaged, so nobody knows what answered" in caplog.text


@pytest.mark.parametrize("line", ["3", "[1]", "NaN", '{"index": NaN}', "[" * 5000])
def test_lines_that_are_no_answers_are_named(folder, line):
    evaluate()
    table = Path(PLACE, "full.parquet")
    table.unlink()
    Path(PLACE, "full.jsonl").write_text(f"{line}\n" * 2)
    with pytest.raises(ValueError, match=r"full\.jsonl' is damaged"):
        evaluate()


def test_a_config_that_is_no_json_is_named(folder):
    Path("run/generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config\.json"):
        evaluate()


def test_equal_ids_are_questions_of_their_own(folder):
    table = rows()
    for row in table:
        row["id"] = "same"
    write_rows(Path("data.json"), table)
    evaluate()
    assert [row["id"] for row in kept("full")] == ["same"] * 7
    assert [row["references"] for row in kept("full")] == [[colour] for colour in COLOURS]


# --- a part is not the whole --------------------------------------------------------------------------------------


def test_a_part_never_passes_for_the_whole(folder, asked, capsys):
    evaluate()
    whole = read_results("run")["evaluations"]
    asked.clear()
    assert evaluate("--limit", "3") == 0
    assert len(asked) == 2
    assert "first 3" in capsys.readouterr().out
    entries = read_results("run")["evaluations"]
    assert entries[0] == whole[0]
    assert {key: entries[1][key] for key in ("n", "part", "view")} == {"n": 3, "part": "first 3", "view": "full"}
    assert "part" not in whole[0]
    assert (len(kept("full")), len(kept("full-first-3"))) == (7, 3)
    card = ModelCard.load("run/README.md")
    assert [one.metric_value for one in card.data.eval_results] == [whole[0]["value"]]
    assert "| all visual tokens | " in card.text
    assert card.text.count("| first 3 |") == 1
    asked.clear()
    evaluate()
    evaluate("--limit", "3")
    assert not asked
    assert len(read_results("run")["evaluations"]) == 2


def test_a_part_alone_stays_out_of_the_model_index(folder):
    evaluate("--limit", "2")
    card = ModelCard.load("run/README.md")
    assert card.data.eval_results is None
    assert "| first 2 |" in card.text


@pytest.mark.parametrize("limit", ["7", "200"])
def test_a_limit_that_leaves_nothing_out_is_the_whole(folder, limit):
    evaluate("--limit", limit)
    (entry,) = read_results("run")["evaluations"]
    assert (entry["n"], "part" in entry) == (7, False)
    assert ModelCard.load("run/README.md").data.eval_results


def test_parts_of_different_size_stand_side_by_side(folder):
    for limit in ("2", "3", "2"):
        evaluate("--limit", limit)
    assert [one["part"] for one in read_results("run")["evaluations"]] == ["first 3", "first 2"]


def entry(**more):
    kind = {"dataset": "vqa", "split": "test", "metric": "anls", "view": "full", "value": 0.5, "n": 9}
    return {**kind, "model_hash": "m", "questions_hash": "q", **more}


@pytest.mark.parametrize(
    ("earlier", "new", "kept", "stale"),
    [
        ({}, {}, 0, 0),
        ({"metric": "exact_match"}, {}, 1, 0),
        ({"view": "grid-0.5"}, {}, 1, 0),
        ({"split": "val", "questions_hash": "p"}, {}, 1, 0),
        ({}, {"part": "first 3", "questions_hash": "p"}, 1, 0),
        ({"part": "first 3", "questions_hash": "p"}, {}, 1, 0),
        ({"view": "grid-0.5", "questions_hash": "p"}, {}, 0, 1),
        ({"view": "grid-0.5", "model_hash": "o"}, {}, 0, 1),
        ({"dataset": "other", "model_hash": "o"}, {}, 0, 1),
        ({"view": "grid-0.5", "model_hash": None}, {}, 0, 1),
        ({"model_hash": "o"}, {}, 0, 0),  # replaced
    ],
)
def test_which_scores_stay(earlier, new, kept, stale):
    merged, left = merged_evaluations([entry(**earlier)], [entry(**new)])
    assert (len(merged) - 1, len(left)) == (kept, stale)
    assert merged[-1] == entry(**new)


# --- hashes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_processor_has_the_same_parts_wherever_it_lies(name, tmp_path):
    _, processor = FAMILIES[name].build()
    before = processor_parts(processor)
    assert {"settings", "chat template", "tokenizer/tokenizer.json"} <= before.keys()
    assert processor_parts(processor) == before
    processor.chat_template += " "
    changed = processor_parts(processor)
    assert [key for key in before if before[key] != changed[key]] == ["chat template"]


@pytest.mark.parametrize(
    ("earlier", "now", "said"),
    [
        ({"n": 3}, {"n": 3}, []),
        ({"n": 3}, {"n": 4}, ["n was 3, is 4"]),
        ({}, {"seed": 0}, ["seed was None, is 0"]),
        ({"a": "sha256:1"}, {"a": "sha256:2"}, ["a changed"]),
        ({"a": {"x.py": "sha256:1"}}, {"a": {"y.py": "sha256:1"}}, ["a x.py is gone", "a y.py is new"]),
        ({"base": {"x": "sha256:1"}}, {}, ["base x is gone"]),
        ({"isolator": None}, {"isolator": "sha256:1"}, ["isolator is new"]),
    ],
)
def test_differences_are_named(earlier, now, said):
    assert differences(earlier, now) == said
