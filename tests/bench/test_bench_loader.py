"""`dualspeed bench --loader`: a data loader worker on JPEG files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from hf_dualspeed import cli
from hf_dualspeed.bench import loader
from hf_dualspeed.bench import report as bench_report
from hf_dualspeed.bench.options import parse_arguments
from hf_dualspeed.data.collators import VisionLanguageCollator

RESULTS = Path(__file__).parents[2] / "docs/results"
SIZES = (0.02, 0.08)  # with processors of a sixth of the real edge


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("loader") / "bench_loader.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "MEGAPIXELS", SIZES)
        patch.setattr(loader, "EDGE", 56)
        patch.setattr(loader, "PINPOINTS", [[56, 112], [112, 56], [112, 112]])
        patch.setenv("TOKENIZERS_PARALLELISM", "kept")
        threads = torch.get_num_threads()
        assert cli.main(["bench", "--loader", "--rounds", "2", "--batch", "4", "--output", str(path)]) == 0
        assert (torch.get_num_threads(), os.environ["TOKENIZERS_PARALLELISM"]) == (threads, "kept")
    return path, json.loads(path.read_text())


def test_each_file_is_a_picture_of_its_own(tmp_path):
    files = loader.photographs(tmp_path, 0.03, 2)
    pictures = [Image.open(file) for file in files]
    assert [picture.size for picture in pictures] == [(200, 150)] * 2
    assert files[0].read_bytes() != files[1].read_bytes()
    again = tmp_path / "again"
    again.mkdir()
    assert loader.photographs(again, 0.03, 1)[0].read_bytes() == files[0].read_bytes()


@pytest.mark.parametrize("shape", loader.H100)
def test_the_ways_read_what_they_say(tmp_path, monkeypatch, shape):
    files = loader.photographs(tmp_path, 0.4, 4)
    read = []
    monkeypatch.setattr(
        "hf_dualspeed.data.pictures.open_image", lambda *given: read.append(given) or Image.open(given[0])
    )
    ways = loader.ways_of(shape, files)
    assert ("draft" in ways) == (shape == "llava-1.5")
    for way, count in {"batch": 4, "repeated": 1}.items():
        ways[way]()
        assert len(read) == count
        read.clear()
    # Four questions are as many samples as before, with the visual tokens of the real processor.
    processor = loader.processor_of(shape)
    batch = VisionLanguageCollator(processor)(loader.samples_of(files[:1], 4))
    visual = (batch["input_ids"] == processor.image_token_id).sum(1).tolist()
    # LLaVA-NeXT on 4:3: a base of 24 x 24 tokens, and 36 rows of 48 with a separator each of 2 x 2 tiles.
    assert visual == [576 if shape == "llava-1.5" else 576 + 36 * 49] * 4


def test_results_and_page(measured):
    path, results = measured
    assert [(run["shape"], run["megapixels"]) for run in results["runs"]] == [
        (shape, size) for shape in loader.H100 for size in SIZES
    ]
    small, large = results["runs"][:2]
    assert small["width"] * small["height"] == pytest.approx(2e4, rel=0.01)
    assert small["bytes"] < large["bytes"]
    # A small picture is not drafted; a large one is, and shows the same.
    assert small["draft_difference"] == 0 < large["draft_difference"] < 10
    for run in results["runs"]:
        assert all(len(values) == 2 and min(values) > 0 for values in run["seconds_by_round"].values())
    page = path.with_suffix(".md").read_text()
    assert loader.readme_table(results) in page
    assert "one photograph" in page
    with Image.open(path.with_suffix(".png")) as image:
        assert {(0, 114, 178), (213, 94, 0)} <= {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}
    assert cli.main(["bench", "--loader", "--render-only", "--output", str(path)]) == 0


def test_a_gpu_beside_the_core_that_was_timed_is_not_named(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(loader, "photographs", lambda *given: [])
    monkeypatch.setattr(loader, "timed", lambda shape, *given: {"shape": shape})
    assert loader.measure(parse_arguments(["--loader"]))["machine"]["accelerator"] is None


def test_workers_are_what_fast_steps_eat_over_what_one_makes(measured):
    _, results = measured
    results = {**results, "fast_steps_h100": {"llava-1.5": 30.0, "llava-next": 30.0}}
    for run in results["runs"]:
        run["seconds"]["batch"]["median"] = 0.1
    assert {row[-1] for row in loader.rows(results)} == {"3"}


def test_what_fast_steps_eat_is_what_was_measured_on_an_h100():
    for shape, name in {"llava-1.5": "bench_h100_llava_1_5", "llava-next": "bench_h100_llava_next"}.items():
        runs = json.loads((RESULTS / f"{name}.json").read_text())["runs"]
        run = next(run for run in runs if run["checkpointing"] == "on")
        samples, seconds = loader.H100[shape]
        assert (run["batch"], run["seconds"]["fast"]["median"]) == (samples, pytest.approx(seconds, abs=1e-4))


def test_files_of_another_kind_and_options_that_do_not_go_together_are_named(measured):
    with pytest.raises(ValueError, match="holds 'batches from JPEG files'.*--loader"):
        bench_report.readme_table(measured[1])
    options = parse_arguments(["--loader"])
    assert (options.kind, options.rounds, options.output) == ("loader", 3, "docs/results/bench_loader.json")
    for flags in (["--shape", "smolvlm"], ["--model", "x"]):
        with pytest.raises(ValueError, match="`loader` is measured with the processors of llava-1.5 and llava-next"):
            parse_arguments(["--loader", *flags])
    with pytest.raises(ValueError, match="Give --lengths or --loader"):
        parse_arguments(["--loader", "--lengths"])
