"""README's code runs as it is written, on a tiny model in place of the downloaded one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import datasets
import pytest
import torch
from tiny_models import FAMILIES, batch, picture
from transformers import AutoModelForImageTextToText, AutoProcessor

import hf_dualspeed
from hf_dualspeed import ablation_report, bench_growth, bench_lengths, bench_profile, bench_report, cli, compare_report
from hf_dualspeed.pruners import pruner_class

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def tiny_hub(tmp_path, monkeypatch):
    """The example's model and data, tiny and local."""
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
    return model, processor


def test_examples_run(tiny_hub):
    _, processor = tiny_hub
    train, infer, peft, trl, own, _ = BLOCKS
    scope = {}
    train = train.replace('Arguments("out",', 'Arguments("out", use_cpu=True, max_steps=2, report_to="none",')
    exec(compile(train, "README.md", "exec"), scope)
    assert Path("out/mode_isolator.safetensors").is_file()
    scope |= {"inputs": batch(FAMILIES["llava"], processor)}
    exec(compile(infer, "README.md", "exec"), scope)
    assert scope["loss"].isfinite()
    scope["model"], _ = FAMILIES["llava"].build()  # one that has not been trained before
    exec(compile(peft, "README.md", "exec"), scope)
    assert Path("adapters/adapter_model.safetensors").is_file()
    assert Path("merged/model.safetensors").is_file()
    trl = trl.replace('Config("out-sft",', 'Config("out-sft", use_cpu=True, bf16=False, max_steps=2, report_to="none",')
    exec(compile(trl, "README.md", "exec"), scope)
    assert sum(scope["trainer"].clock.steps.values()) == 2
    exec(compile(own, "README.md", "exec"), scope)
    from hf_dualspeed.pruners.base import _REGISTRY

    try:
        from hf_dualspeed import AutoPruner, VisualTokens

        features = torch.arange(1.0, 9.0).view(1, 8, 1)
        out = AutoPruner.from_name("largest", pruning_ratio=0.75)(VisualTokens(features))
        assert out.positions.tolist() == [[6, 7]]
    finally:
        _REGISTRY.pop("largest", None)


def test_a_pruner_is_published(hub):
    hub.user = "user"
    scope = {}
    exec(compile(BLOCKS[-1], "README.md", "exec"), scope)
    assert scope["pruner"].config.pruning_ratio == 0.75
    assert cli.main(["push-pruner", "divprune", "user/divprune-75", "--pruning_ratio", "0.75"]) == 0
    assert "dualspeed push-pruner divprune user/divprune-75 --pruning_ratio 0.75" in TEXT


TABLES = {
    "compare": compare_report.readme_table,
    "bench": bench_report.readme_table,
    "bench_batch8": bench_report.readme_table,
    "bench_smolvlm": bench_report.readme_table,
    "bench_h100_llava_1_5": bench_report.readme_table,
    "bench_h100_llava_next": bench_report.readme_table,
    "bench_h100_llava_next_off": bench_report.readme_table,
    "bench_growth": bench_growth.readme_table,
    "bench_lengths": bench_lengths.readme_table,
    "bench_profile": bench_profile.readme_table,
    "ablation": ablation_report.readme_table,
    "ablation_longer": ablation_report.readme_table,
    "ablation_slow_ratios": ablation_report.readme_table,
    "ablation_equal_time": ablation_report.readme_table,
    "ablation_pruning": ablation_report.readme_table,
    "ablation_schedules": ablation_report.readme_table,
    "ablation_pruners": ablation_report.readme_table,
}
PAGES = {
    "README.md": ["compare", "bench"],
    "docs/speed.md": [name for name in TABLES if name.startswith("bench")],
    "docs/ablation.md": [name for name in TABLES if name.startswith("ablation")],
}


@pytest.mark.parametrize(("page", "name"), [(page, name) for page, names in PAGES.items() for name in names])
def test_tables_show_the_published_results(page, name):
    text = (ROOT / page).read_text(encoding="utf-8")
    marked = re.search(rf"<!-- {name}-table-start -->(.*?)<!-- {name}-table-end -->", text, re.DOTALL)
    results = json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    assert marked[1].strip() == TABLES[name](results)


def test_the_first_figures_are_those_of_the_bench():
    said = " ".join(TEXT.split())
    cpu, gpu = ["bench"], ["bench_h100_llava_1_5", "bench_h100_llava_next", "bench_h100_llava_next_off"]
    for names, on in ((cpu, "CPU cores {:.2f}x and {:.2f}x"), (gpu, "{:.2f}x and {:.2f}x as fast")):
        paths = [ROOT / "docs" / "results" / f"{name}.json" for name in names]
        runs = [run for path in paths for run in json.loads(path.read_text(encoding="utf-8"))["runs"]]
        of = {(run["shape"], run["checkpointing"]): run["ratios"]["expected_speedup"]["median"] for run in runs}
        for checkpointing, words in (("on", on), ("off", "{:.2f}x and {:.2f}x without")):
            assert words.format(*(of[shape, checkpointing] for shape in ("llava-1.5", "llava-next"))) in said


def test_every_pruner_is_listed():
    ours = [n for n in hf_dualspeed.available_pruners() if pruner_class(n).__module__.startswith("hf_dualspeed.")]
    assert [name for name in ours if f"`{name}`" not in TEXT] == []


def test_the_number_of_families_is_that_of_the_conformance_run():
    result = json.loads((ROOT / "docs" / "results" / "conformance.json").read_text(encoding="utf-8"))
    assert f"checks {len(result['families'])} families" in TEXT


PAGES_WITH_LINKS = [
    "README.md",
    "CONTRIBUTING.md",
    "docs/ablation.md",
    "docs/evaluation.md",
    "docs/speed.md",
    "docs/supported_models.md",
]


@pytest.mark.parametrize("name", PAGES_WITH_LINKS)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", (ROOT / name).read_text(encoding="utf-8")):
        assert ((ROOT / name).parent / target).exists(), target


def test_every_module_is_on_the_map():
    described = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for path in (ROOT / "hf_dualspeed").glob("*.py"):
        assert path.name == "__init__.py" or f"`{path.name}`" in described, path.name
