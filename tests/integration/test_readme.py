"""README and docs: Python blocks run as written on a tiny model; tables, commands, links and lists are up to date."""

from __future__ import annotations

import ast
import json
import re
import shlex
import tarfile
from importlib import import_module
from pathlib import Path
from statistics import mean

import datasets
import pytest
import torch
from tiny_models import FAMILIES, batch, picture
from transformers import AutoModelForImageTextToText, AutoProcessor

import hf_dualspeed
from benchmarks.ablation import estimate as ablation_estimate
from benchmarks.ablation import expected
from benchmarks.ablation import report as ablation_report
from benchmarks.ablation import selection_cost as ablation_selection_cost
from benchmarks.compare import report as compare_report
from hf_dualspeed import cli
from hf_dualspeed.bench import estimate as bench_estimate
from hf_dualspeed.bench import growth as bench_growth
from hf_dualspeed.bench import lengths as bench_lengths
from hf_dualspeed.bench import loader as bench_loader
from hf_dualspeed.bench import profile as bench_profile
from hf_dualspeed.bench import report as bench_report
from hf_dualspeed.bench import same_memory as bench_same_memory
from hf_dualspeed.bench import selection as bench_selection
from hf_dualspeed.data import load_examples
from hf_dualspeed.pruners import pruner_class
from hf_dualspeed.pruners.registry import _REGISTRY
from hf_dualspeed.recipes.arguments import parse_recipe
from hf_dualspeed.utils.validation import Parser

ROOT = Path(__file__).parents[2]
DOCS = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md", *DOCS]
# What examples leave to the machine, and tests have to keep small.
SMALL = {
    'Arguments("out",': 'Arguments("out", use_cpu=True, max_steps=2, report_to="none",',
    'Config("out-sft",': 'Config("out-sft", use_cpu=True, bf16=False, max_steps=2, report_to="none",',
}


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[str]:
    """The Python blocks of a page."""
    return re.findall(r"```python\n(.*?)```", text_of(page), re.DOTALL)


def run(page: str, code: str, scope: dict) -> None:
    for large, small in SMALL.items():
        code = code.replace(large, small)
    exec(compile(code, page, "exec"), scope)


@pytest.fixture
def tiny_hub(tmp_path, monkeypatch):
    """The examples' model and data, tiny and local."""
    model, processor = FAMILIES["llava"].build("left")
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", lambda name, dtype: model.to(torch.float32))
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda name, **options: processor)
    monkeypatch.setenv("CI", "true")  # TRL sends no telemetry then
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    picture().save("data/one.png")
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "noise"}]
    Path("data/llava_v1_5_mix665k.json").write_text(json.dumps([{"image": "one.png", "conversations": turns}] * 2))
    samples = [{"prompt": [{"role": "user", "content": "what?"}], "images": [picture()]}] * 2
    samples = [{**sample, "completion": [{"role": "assistant", "content": "noise"}]} for sample in samples]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_list(samples))
    model.save_pretrained("llava-hf/llava-1.5-7b-hf")
    return processor


def test_examples_run(tiny_hub):
    """In one scope, as a reader would follow them; unpacking fails where a page gains a block that nothing runs."""
    (train,) = blocks("README.md")
    infer, own, _ = blocks("docs/pruners.md")
    peft, trl = blocks("docs/integrations.md")
    (options,) = blocks("docs/speed.md")
    scope = {}
    run("README.md", train, scope)
    assert Path("out/mode_isolator.safetensors").is_file()
    scope |= {"inputs": batch(FAMILIES["llava"], tiny_hub)}
    run("docs/pruners.md", infer, scope)
    assert scope["loss"].isfinite()
    scope["model"], _ = FAMILIES["llava"].build()  # one that has not been trained before
    run("docs/integrations.md", peft, scope)
    assert Path("adapters/adapter_model.safetensors").is_file()
    assert Path("merged/model.safetensors").is_file()
    run("docs/integrations.md", trl, scope)
    assert sum(scope["trainer"].clock.steps.values()) == 2
    run("docs/speed.md", options, scope)
    assert scope["args"].vision_feature_cache == "features"
    try:
        run("docs/pruners.md", own, scope)
        features = torch.arange(1.0, 9.0).view(1, 8, 1)
        out = hf_dualspeed.AutoPruner.from_name("largest", pruning_ratio=0.75)(hf_dualspeed.VisualTokens(features))
        assert out.positions.tolist() == [[6, 7]]
    finally:
        _REGISTRY.pop("largest", None)


def test_a_pruner_is_published(hub):
    hub.user = "user"
    scope = {}
    run("docs/pruners.md", blocks("docs/pruners.md")[-1], scope)
    assert scope["pruner"].config.pruning_ratio == 0.75
    assert cli.main(["push-pruner", "divprune", "user/divprune-75", "--pruning_ratio", "0.75"]) == 0
    assert "dualspeed push-pruner divprune user/divprune-75 --pruning_ratio 0.75" in text_of("docs/pruners.md")


def test_shards_become_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("shards").mkdir()
    picture().save("one.png")
    Path("one.txt").write_text("noise")
    with tarfile.open("shards/0.tar", "w") as shard:
        for name in ("one.png", "one.txt"):
            shard.add(name)
    (code,) = blocks("docs/data.md")
    run("docs/data.md", code, {})
    (row,) = load_examples("data/train")
    assert (row["question"], row["answer"]) == ("What is in the picture?", "noise")


def test_no_other_page_has_python():
    """Evaluation's two blocks read what an evaluation has written and load a metric, and publishing's goes on from the
    Hub: their own tests do so."""
    run_above = {"README.md", "docs/pruners.md", "docs/integrations.md", "docs/speed.md", "docs/data.md"}
    assert {page for page in PAGES if blocks(page)} == {*run_above, "docs/evaluation.md", "docs/publishing.md"}


TABLES = {
    "compare": compare_report.readme_table,
    "bench": bench_report.readme_table,
    "bench_batch8": bench_report.readme_table,
    "bench_batch6": bench_report.readme_table,
    "bench_smolvlm": bench_report.readme_table,
    "bench_h100_llava_1_5": bench_report.readme_table,
    "bench_h100_llava_next": bench_report.readme_table,
    "bench_h100_llava_next_off": bench_report.readme_table,
    "bench_growth": bench_growth.readme_table,
    "bench_lengths": bench_lengths.readme_table,
    "bench_loader": bench_loader.readme_table,
    "bench_one_row": bench_lengths.readme_table,
    "bench_profile": bench_profile.readme_table,
    "bench_selection": bench_selection.readme_table,
    "bench_switches": bench_lengths.readme_table,
    "bench_same_memory": bench_same_memory.readme_table,
    "memory": bench_estimate.readme_table,
    "ablation": ablation_report.readme_table,
    "ablation_longer": ablation_report.readme_table,
    "ablation_slow_ratios": ablation_report.readme_table,
    "ablation_equal_time": ablation_report.readme_table,
    "ablation_deeper": ablation_report.readme_table,
    "ablation_deeper-positions": ablation_report.readme_table,
    "ablation_pruning": ablation_report.readme_table,
    "ablation_schedules": ablation_report.readme_table,
    "ablation_pruners": ablation_report.readme_table,
    "ablation_pruners_paper": ablation_report.readme_table,
    "ablation_budgets": ablation_report.readme_table,
    "ablation_cool-down": ablation_report.readme_table,
    "ablation_selection": ablation_report.readme_table,
    "ablation_reading": ablation_report.readme_table,
    "ablation_objects-shallow": ablation_report.readme_table,
    "ablation_objects": ablation_report.readme_table,
    "ablation_first-layers": ablation_report.readme_table,
    "ablation_selection_cost": ablation_selection_cost.readme_table,
    "estimate_ablation": ablation_estimate.readme_table,
}
CPU = ["bench_batch8", "bench_batch6"]
TABLES_OF = {
    "docs/speed.md": ["compare", *(name for name in TABLES if name.startswith("bench"))],
    "docs/memory.md": ["memory"],
    "docs/ablation.md": [name for name in TABLES if name.startswith("ablation")],
    "benchmarks/README.md": ["estimate_ablation"],
}


def table_of(name: str) -> str:
    return TABLES[name](json.loads(text_of(f"docs/results/{name}.json")))


@pytest.mark.parametrize(("page", "name"), [(page, name) for page, names in TABLES_OF.items() for name in names])
def test_tables_show_the_published_results(page, name):
    marked = re.search(rf"<!-- {name}-table-start -->(.*?)<!-- {name}-table-end -->", text_of(page), re.DOTALL)
    assert marked[1].strip() == table_of(name)


def test_what_to_expect_is_what_was_measured():
    marked = re.search(
        r"<!-- expected-table-start -->(.*?)<!-- expected-table-end -->", text_of("docs/ablation.md"), re.S
    )
    assert marked[1].strip() == expected.table()


def test_every_marked_table_is_checked():
    marked = {(page, name) for page in PAGES for name in re.findall(r"<!-- ([\w-]+)-table-start -->", text_of(page))}
    tables = {(page, name) for page, names in TABLES_OF.items() for name in names}
    assert marked == {*tables, ("docs/ablation.md", "expected")}


def test_the_accuracy_is_that_of_the_ablation():
    said = " ".join(text_of("README.md").split())
    ours, paper, full = (
        json.loads(text_of("docs/results/ablation_deeper.json"))["summary"][key]
        for key in ("dualspeed", "paper:dualspeed", "time:full-tokens")
    )
    for way, words in ((ours, "keeps {} of full tokens' accuracy at {} times their speed"), (paper, "{} at {} times")):
        assert (
            words.format(f"{way['retention']['mean']:.1%}", f"{way['speed_up']['mean']:.2f}").replace("%", " %") in said
        )
    steps, ends = full["steps"]["slow"], [f"{way['full']['mean']:.1%}".replace("%", " %") for way in (full, ours)]
    assert "get {:.0f} of 400 steps and end at {}, against {}".format(steps, *ends) in said
    today = json.loads(text_of("docs/results/ablation_deeper-positions.json"))["summary"]["dualspeed:original"]
    share = f"{today['retention']['mean']:.1%}".replace("%", " %")
    assert f"with today's positions it keeps {share}" in said
    assert f"That keeps {share} where renumbered" in " ".join(text_of("docs/ablation.md").split())
    objects = json.loads(text_of("docs/results/ablation_objects.json"))["summary"]
    kept = [objects[key]["retention"]["mean"] for key in ("pruning-0.75:original", "dualspeed:original")]
    assert "keep {:.1%} at 75% pruned and {:.1%} at 90%".format(*kept).replace("%", " %") in said


def test_words_that_are_read_are_those_of_the_ablation():
    said = " ".join(text_of("docs/ablation.md").split())
    shares: dict[str, list[float]] = {}
    for run in json.loads(text_of("docs/results/ablation_reading.json"))["runs"]:
        shares.setdefault(run["way"], []).append(run["full"]["word"])
    full, *ours = (mean(shares[key]) for key in ("full-tokens", *(f"pruning-{at}:original" for at in (0.5, 0.75, 0.9))))
    words = (
        "read {:.1%} right, letter by letter, and DualSpeed with original positions {:.1%} at 50%, {:.1%} at 75% and "
        "{:.1%} at 90%: {:.1%}, {:.1%} and {:.1%} of them"
    )
    assert words.format(full, *ours, *(own / full for own in ours)).replace("%", " %") in said
    assert f"reads {mean(shares['paper:pruning-0.9']):.1%} at".replace("%", " %") in said


@pytest.mark.parametrize("name", ["ablation_objects-shallow", "ablation_objects"])
def test_objects_are_kept_as_in_the_ablation(name):
    said = " ".join(text_of("docs/ablation.md").split())
    ways = json.loads(text_of(f"docs/results/{name}.json"))["summary"]
    ours, full = ways["dualspeed:original"], ways["time:full-tokens"]
    words = "{:.1%} of full tokens' accuracy at 90%, at {:.2f} times their speed".format(
        *(ours[column]["mean"] for column in ("retention", "speed_up"))
    )
    ends = "full tokens get {:.0f} of their 400 steps and end at {:.1%}, DualSpeed at {:.1%}".format(
        full["steps"]["slow"], *(way["full"]["mean"] for way in (full, ours))
    )
    for sentence in (words, ends):
        assert sentence.replace("%", " %") in said


def test_pruners_in_the_first_layers_do_as_in_the_ablation():
    said = " ".join(text_of("docs/ablation.md").split())
    results = json.loads(text_of("docs/results/ablation_first-layers.json"))
    ways = results["summary"]
    figures = [
        ways[key][column]["mean"]
        for key in ("fastv-2:original", "dualspeed:original", "fastv-1:original", "pruner-pyramiddrop:original")
        for column in ("retention", "speed_up")
    ]
    words = (
        "keeps {:.1%} at {:.2f} times the speed of full tokens, where `divprune` keeps {:.1%} at {:.2f} times. Behind "
        "one layer it keeps {:.1%} at {:.2f} times",
        "`pyramiddrop` keeps {:.1%} at {:.2f} times",
    )
    assert words[0].format(*figures[:6]).replace("%", " %") in said
    assert words[1].format(*figures[6:]).replace("%", " %") in said
    shares = {(run["way"], run["seed"]): run["full"]["all"] for run in results["runs"]}
    gains = [shares["fastv-2:original", seed] - shares["dualspeed:original", seed] for seed in results["seeds"]]
    assert min(gains) > 0
    assert f"in each pair of seeds, by {100 * mean(gains):.1f} points on average" in said


def test_the_first_figures_are_those_of_the_bench():
    said = " ".join(text_of("README.md").split())
    gpu = ["bench_h100_llava_1_5", "bench_h100_llava_next", "bench_h100_llava_next_off"]
    for names, on in ((CPU, "CPU cores it is {:.2f}x and {:.2f}x"), (gpu, "{:.2f}x and {:.2f}x as fast")):
        runs = [run for name in names for run in json.loads(text_of(f"docs/results/{name}.json"))["runs"]]
        of = {(run["shape"], run["checkpointing"]): run["ratios"]["expected_speedup"]["median"] for run in runs}
        for checkpointing, words in (("on", on), ("off", "{:.2f}x and {:.2f}x without")):
            assert words.format(*(of[shape, checkpointing] for shape in ("llava-1.5", "llava-next"))) in said


def test_results_of_another_default_are_named():
    """Today's default leaves merged tokens in their places."""
    said, speed = (" ".join(text_of(page).split()) for page in ("README.md", "docs/speed.md"))
    changed = "2026-11-29 09:02"
    assert all(json.loads(text_of(f"docs/results/{name}.json"))["date"] < changed for name in CPU)
    assert "with today's defaults but renumbered tokens" in said
    dated = (*TABLES_OF["docs/speed.md"], "dinov2_smollm2_finetune")
    assert all(json.loads(text_of(f"docs/results/{name}.json"))["date"] < changed for name in dated)
    assert "all are older than the default by which merged tokens stay in their places" in speed
    assert "in one run with renumbered tokens (then the default)" in " ".join(text_of("docs/training.md").split())


def test_recomputing_fast_steps_take_the_time_that_was_measured():
    said = " ".join(text_of("docs/speed.md").split())
    (run, *_) = json.loads(text_of("docs/results/bench_same_memory.json"))["runs"]
    assert run["checkpointing"] == "on"
    trials = {(trial["optimizer"], trial["fast_mode_checkpointing"]): trial for trial in run["trials"]}
    more = []
    for optimizer in ("none", "adamw"):
        without, recomputed = (trials[optimizer, fast] for fast in (False, True))
        assert recomputed["micro_batch"]["fast"] > 2 * without["micro_batch"]["fast"]
        each = [trial["seconds"]["fast"]["median"] / trial["samples"] for trial in (without, recomputed)]
        more.append(each[1] / each[0] - 1)
    words = (
        "more than twice the samples at once, in {:.0%} more time for each without an optimizer and {:.0%} less with"
    )
    assert words.format(more[0], -more[1]).replace("%", " %") in said


def test_readme_is_short():
    assert len(text_of("README.md")) <= 9000


def test_the_picture_of_a_step_is_the_same_on_both_pages():
    picture_of = {page: re.search(r"```\n +batch: .*?```", text_of(page), re.DOTALL) for page in PAGES[:1] + DOCS}
    first, second = (match[0] for match in picture_of.values() if match)
    assert first == second


def test_every_pruner_is_listed():
    ours = [n for n in hf_dualspeed.available_pruners() if pruner_class(n).__module__.startswith("hf_dualspeed.")]
    assert [name for name in ours if f"`{name}`" not in text_of("docs/pruners.md")] == []


def test_the_number_of_families_is_that_of_the_conformance_run():
    families = len(json.loads(text_of("docs/results/conformance.json"))["families"])
    assert f"checks {families} families" in text_of("docs/models.md")
    said = " ".join(text_of("README.md").split())
    assert f"[{families} model families]" in said
    assert f"[the table of {families} families]" in said


def test_every_command_is_listed():
    listed = text_of("docs/training.md")
    assert [name for name in cli.COMMANDS if f"`dualspeed {name}`" not in listed] == []


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page):
    """Of the command line, of make and of the benchmarks; tables keep the commands that were really run."""
    text = re.sub(r"<!-- [\w-]+-table-start -->.*?<!-- [\w-]+-table-end -->", "", text_of(page), flags=re.DOTALL)
    assert set(re.findall(r"(?<![\w-])dualspeed ([a-z][a-z-]*)", text)) <= cli.COMMANDS.keys()
    targets = " ".join(re.findall(r"^([a-z -]+):", text_of("Makefile"), re.MULTILINE)).split()
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE)) <= set(targets)
    for module in re.findall(r"python -m (benchmarks\.\w+)", text):
        path = ROOT / module.replace(".", "/")
        assert (path / "__main__.py").is_file() or path.with_suffix(".py").is_file(), module
    for path in re.findall(r"\b(?:trainer_configs|tests|hf_dualspeed|benchmarks)/[\w/]+\.(?:yaml|py)\b", text):
        assert (ROOT / path).is_file(), path


def command_lines() -> list[str]:
    """The commands of this library in the blocks of all pages."""
    shell = "\n".join(block for page in PAGES for block in re.findall(r"```bash\n(.*?)```", text_of(page), re.DOTALL))
    found = [line.strip() for line in shell.replace("\\\n", " ").splitlines()]
    return [line for line in found if line.startswith("dualspeed ") or " train.py " in line]


class ParsedError(Exception):
    pass


@pytest.mark.parametrize("line", command_lines())
def test_commands_are_understood(line, monkeypatch):
    """Up to where they would begin to work."""
    monkeypatch.chdir(ROOT)
    words = shlex.split(line.partition(" > ")[0], comments=True)
    if "train.py" in words or words[1] == "train":
        parse_recipe(words[words.index("train.py") + 1 if "train.py" in words else 2 :])
        return
    parse = Parser.parse_known_args

    def parsed(self, *given):
        assert parse(self, *given)[1] == []
        raise ParsedError

    monkeypatch.setattr(Parser, "parse_known_args", parsed)
    module, function = cli.COMMANDS[words[1]][0].split(":")
    with pytest.raises(ParsedError):
        getattr(import_module(f"hf_dualspeed.commands.{module}"), function)(words[2:])


def messages() -> str:
    """All texts of the library, those with values in them too, where dots stand for a value."""

    def text(node: ast.AST) -> str:
        if isinstance(node, ast.JoinedStr):
            return "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
        return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""

    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "hf_dualspeed").rglob("*.py")]
    return "\n".join(text(node) for tree in trees for node in ast.walk(tree))


def test_errors_are_found_under_their_own_words():
    """What people paste into a search: the words of the page are those of the library, or of these others."""
    quoted = {" ".join(words.split()) for words in re.findall(r'\*\*"(.+?)"\*\*', text_of("docs/faq.md"), re.DOTALL)}
    assert len(quoted) > 8
    others = {"CUDA out of memory", "Unrecognized model"}  # torch's, transformers'
    known = messages()
    assert [words for words in quoted - others if words not in known] == []


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the page's headings."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in re.findall(r"^#+ (.+)$", text, re.M)}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def test_readme_links_every_page():
    assert [page for page in PAGES[1:] if f"]({page})" not in text_of("README.md")] == []


def test_the_reference_names_what_there_is():
    pytest.importorskip("trl")
    named = re.findall(r"^::: ([\w.]+)(?:\n +options: \{members: \[([\w, ]+)\])?", text_of("docs/api.md"), re.MULTILINE)
    assert len(named) > 10
    for path, members in named:
        module, _, name = path.rpartition(".")
        found = getattr(import_module(module), name)
        assert [member for member in members.split(", ") if member and not hasattr(found, member)] == []


def test_the_site_has_every_page():
    """`make docs` builds it, and fails where a link leads nowhere."""
    said = re.findall(r": ([\w/]+\.md)$", text_of("mkdocs.yml"), re.MULTILINE)
    assert sorted(name for name in said if "/" not in name) == sorted(["index.md", *(page[5:] for page in DOCS)])
