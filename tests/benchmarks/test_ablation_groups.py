"""The ablation's deeper, wider and harder groups: worlds, callbacks, k-means, and a tiny run of each kind."""

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from tiny import write_fashion_mnist
from torch.nn.functional import normalize
from transformers import Dinov2Config, Dinov2Model, LlamaModel, TrainerState, get_scheduler

from benchmarks.ablation import ablation, estimate, large, reading, selection_cost
from benchmarks.ablation import task as ablation_task
from benchmarks.ablation.callbacks import DrawnBudgets, LearningCurve
from benchmarks.ablation.fashion_grid import FASHION, FASHION_336
from benchmarks.ablation.language import Size, talk, tokenizer
from benchmarks.ablation.letters import LETTERS, NAMES
from benchmarks.ablation.objects import LEAST
from benchmarks.ablation.plan import GROUPS, SETUPS, TODAYS, setup_of
from benchmarks.ablation.reading import READING
from benchmarks.ablation.report import readme_table, write_report
from benchmarks.ablation.worlds import WORLDS, world_of
from hf_dualspeed import cli
from hf_dualspeed.pruners import AutoPruner, registry
from hf_dualspeed.pruners.tokens import VisualTokens

FLAGS = ["--steps", "4", "--batch_size", "2", "--seeds", "0", "--cpu", "--jobs", "1", "--hidden_size", "16"]
FLAGS += ["--heads", "2", "--pretraining_steps", "2", "--start_steps", "2", "--train_grids", "8", "--test_grids", "2"]
STAMPS = {"animals/mammals/bovines": "red", "animals/fish": "brown", "food/fruit": "green", "space": "blue"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working directory with small data sets, and a tower in random weights."""
    folder = tmp_path_factory.mktemp("groups")
    write_fashion_mnist(folder, tiles=40)
    few = {"food/nuts/one": "black", "symbols/chess/king": "black"}  # too few of a kind, and no object
    of_kinds = {f"{kind}/{number}": colour for kind, colour in STAMPS.items() for number in range(LEAST)}
    for name, colour in {**of_kinds, **few}.items():
        path = folder / "stamps" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Pillow.new("RGBA", (60, 40), colour).save(path)
        path.with_suffix(".txt").write_text("A picture.")
    patch = pytest.MonkeyPatch()
    patch.setenv("FASHION_MNIST", str(folder))
    patch.setenv("TUXPAINT_STAMPS", str(folder / "stamps"))
    patch.chdir(folder)
    patch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))  # the ablation's own pruner is not the library's
    tower = Dinov2Model(Dinov2Config(hidden_size=384, num_hidden_layers=1, num_attention_heads=4, image_size=168))
    patch.setattr(ablation_task, "read_vision_tower", lambda path: tower.eval())
    patch.setattr(ablation_task, "fetch", lambda *given: "tower.onnx")
    world_of.cache_clear()
    yield folder
    world_of.cache_clear()
    patch.undo()


# The variants of a group that stand for its kinds of runs, in tiny; all of them are built by the tests of the plan.
KINDS = {
    "deeper": (3, ("full-tokens", "dualspeed", "time:full-tokens")),
    "reading": (1, ("full-tokens", "pruning-0.75")),
    "objects": (1, ("full-tokens", "dualspeed", "time:full-tokens")),
    "cool-down": (1, ("full-tokens", "tail-0.05", "paper:slow-0.02")),
    "budgets": (1, ("full-tokens", "budgets")),
    "first-layers": (4, ("fastv-1:original", "fastv-2:original", "pruner-pyramiddrop:original")),
    "selection": (1, ("full-tokens", "random-0.9:kmeans-1", "tome-0.97:kmeans-2", "divprune-0.97:kmeans-1")),
}


@pytest.mark.parametrize("group", KINDS)
def test_each_kind_of_run_trains(place, group, monkeypatch):
    layers, keys = KINDS[group]
    chosen = tuple(variant for variant in GROUPS[group] if variant.key in keys)
    assert len(chosen) == len(keys)
    monkeypatch.setattr(ablation, "GROUPS", {**GROUPS, group: chosen})
    ablation.main([*FLAGS, "--layers", str(layers), "--groups", group, "--output", f"{group}.json"])
    results = json.loads(Path(f"{group}.json").read_text())
    assert {run["way"] for run in results["runs"]} == set(keys)
    assert results["settings"]["world"] == setup_of(group).world
    assert Path(f"{group}_curve.png").is_file() == bool(setup_of(group).curve)
    for run in results["runs"]:
        steps, timed = sum(run["steps"].values()), run["way"].startswith("time:")
        assert (steps >= 1) if timed else (steps == 4)
        # In the reference's time the end alone is read; as many steps as the others have are the others' run.
        points = 1 if timed and steps != 4 else steps
        assert len(run.get("curve", ())) == min(setup_of(group).curve, points)
    assert f"conversations about 4 {world_of(setup_of(group).world).shows}" in readme_table(results)
    write_report({**results, "timed": False}, place / "untimed.json")
    assert (place / "untimed.png").is_file()
    assert not (place / "untimed_curve.png").exists()  # which is drawn over seconds


def test_groups_without_their_pictures_are_skipped_by_name(place, monkeypatch, capsys):
    monkeypatch.setenv("TUXPAINT_STAMPS", str(place / "elsewhere"))
    world_of.cache_clear()
    ablation.main([*FLAGS, "--groups", "objects", "--output", "none.json"])
    said = capsys.readouterr().out
    assert "objects: skipped" in said
    assert "tuxpaint-stamps-default" in said
    assert not Path("none.json").exists()
    world_of.cache_clear()


def test_groups_of_different_setups_have_a_file_each(capsys):
    assert cli.call(lambda: ablation.main([*FLAGS, "--groups", "parts", "reading"])) == 2
    assert "an --output of its own" in " ".join(capsys.readouterr().err.split())
    assert all(setup_of(group) == setup_of("parts") for group in ablation.FIRST)
    assert SETUPS.keys() <= GROUPS.keys()


def test_settings_of_earlier_runs_are_as_ever():
    """Fingerprints of the first groups name no later setting, so their runs stay finished."""
    names = {"steps", "batch_size", "learning_rate", "weight_decay", "warmup", "size", "cpu", "threads"}
    assert ablation.Settings().depends_on().keys() == names
    assert ablation.Settings(decay=0.1).depends_on().keys() == {*names, "decay"}
    plain = ablation.settings_of(setup_of("parts"), {"steps": None, "layers": 5})
    assert plain == ablation.Settings(size=Size(layers=5))
    large = ablation.settings_of(setup_of("large"), {"batch_size": 3})
    assert (large.batch_size, large.learning_rate, large.size.layers) == (3, 4e-4, 12)


def test_the_learning_rate_decays_at_the_end():
    settings = replace(ablation.Settings(), decay=0.1)
    args = ablation._arguments(ablation.Run(GROUPS["cool-down"][0], 0, 200, settings))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = get_scheduler(
        args.lr_scheduler_type, optimizer, args.get_warmup_steps(200), 200, args.lr_scheduler_kwargs
    )
    rates = []
    for _ in range(200):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[10:180] == [1.0] * 170
    assert rates[190] == pytest.approx(0.5)
    assert rates[199] == pytest.approx(0.05)


# --- worlds


@pytest.mark.parametrize("name", WORLDS)
def test_every_world_has_words_and_pictures(place, name):
    world = world_of(name)
    scenes = world.scenes("train", 3)
    assert [scene.items for scene in scenes] == [scene.items for scene in world.scenes("train", 3)]
    assert [scene.items for scene in scenes] != [scene.items for scene in world.scenes("test", 3)]
    places = len(scenes[0].items)
    assert world.pixels % 14 == 0
    assert set(world.layout) == set(range(places))
    assert len(world.layout) == 64
    for scene, asked in zip(scenes, world.conversations("train", scenes), strict=True):
        assert scene.image().size == (world.pixels, world.pixels)
        assert np.array_equal(scene.image(), scene.image())
        assert max(scene.items) < world.codes
        ids, _ = talk(asked, world)
        assert tokenizer(world).unk_token_id not in ids
        assert {question.kind for question in asked} == set(world.kinds)


def test_large_grids_are_the_small_ones_enlarged(place):
    small, large = (world.scenes("test", 3) for world in (FASHION, FASHION_336))
    for one, other in zip(small, large, strict=True):
        assert one.items == other.items
        assert (one.image().size, other.image().size) == ((168, 168), (336, 336))
    assert [FASHION_336.layout[8 * row + column] for row, column in ((0, 0), (3, 4), (4, 3), (7, 7))] == [0, 1, 2, 3]


def test_answers_about_a_page_are_right():
    page = READING.drawn(random.Random(5))
    assert set(page.words) < set(reading.WORDS)
    signs = "".join(reading.SIGNS[code] for code in page.items)
    assert signs == "".join([*page.words, *page.numbers, *map(str, page.heights)])
    words, numbers = ([" ".join(text) for text in texts] for texts in (page.words, page.numbers))
    highest = "bcde"[page.heights.index(max(page.heights))]
    for number in range(20):
        for question in page.questions(random.Random(number)):
            text = question.text.rstrip("?")
            last = text.split()[-1]
            if question.kind == "word":
                assert question.answer == words[int(last) - 1]
            elif question.kind == "number":
                assert question.answer == numbers[int(last) - 1]
            elif question.kind == "beside":
                assert question.answer == numbers[words.index(text.partition(" beside ")[2])]
            else:
                expected = highest if "highest" in text else str(page.heights["bcde".index(last)])
                assert question.answer == expected


def test_a_page_written_as_text_has_its_signs_where_the_picture_has_them():
    # A line of 8 patches for each row: five letters, then two digits, the second of them twice. Bars fill the rest.
    page = READING.drawn(random.Random(5))
    patches = [reading.SIGNS[page.items[place]] for place in READING.layout]
    for row in range(4):
        line = patches[8 * row : 8 * (row + 1)]
        assert "".join(line[:5]) == page.words[row]
        assert "".join(line[5:7]) == page.numbers[row]
    assert [int(sign) for sign in patches[32::2]] == 4 * page.heights


def test_the_tower_is_told_what_is_at_each_patch():
    page = READING.drawn(random.Random(5))
    signs = np.array(reading.SIGNS)[page.patches(24)]
    for row in range(4):
        # From left to right in the middle of a row. A letter narrower than a patch may lie between two middles.
        line = [sign for sign in signs[4 * row + 2] if sign]
        seen = [sign for index, sign in enumerate(line) if index == 0 or sign != line[index - 1]]
        rest = iter(page.words[row] + page.numbers[row])
        assert all(sign in rest for sign in seen)
        assert len(seen) >= 4
    bars = [(part == "bar").sum(0).max() for part in np.array_split(signs[16:, 2:23], 4, axis=1)]
    assert [bars[at] for at in np.argsort(page.heights)] == sorted(bars)
    assert len(set(bars)) > 1
    assert not (signs[:16] == "bar").any()
    grid = LETTERS.drawn(random.Random(5))
    assert grid.patches(4)[[0, 1, 2, 3], [1, 2, 0, 3]].tolist() == [grid.items[place] for place in (0, 1, 2, 3)]


def test_bars_are_as_high_as_they_are_said_to_be():
    """The share of coloured pixels below each bar's place grows with its height."""
    codes = [reading.SIGNS.index(sign) for sign in (*"applebreadchairdrums", *"10203040", *"9631")]
    pixels = np.asarray(reading.Page(tuple(codes)).image(), dtype=int)[-reading.CHART :]
    coloured = (np.ptp(pixels, axis=2) > 30).sum(0)
    heights = [int(part.max()) for part in np.array_split(coloured[34:326], 4)]
    assert heights == sorted(heights, reverse=True)
    assert heights[0] / heights[2] == pytest.approx(3, abs=0.3)


class Answers(torch.nn.Module):
    """Gives each row of a batch its own next tokens, `(B, S)`."""

    def __init__(self, next_ids):
        super().__init__()
        self.anchor, self.next_ids = torch.nn.Parameter(torch.zeros(())), next_ids

    def forward(self, input_ids, **others):
        return SimpleNamespace(logits=torch.nn.functional.one_hot(self.next_ids, 200).float())


def test_an_answer_is_right_if_all_its_tokens_are():
    asked = [
        {"grid": 0, "input_ids": [1, 5, *own, 3], "labels": [-100, -100, *own, 3], "kind": "word"}
        for own in ([20, 21, 22], [20, 21, 22], [20], [20, 21, 22], [30, 31])
    ]
    features = {"test": np.zeros((1, 145, 4), np.float16)}
    task = ablation_task.Task([], asked, features, {}, replace(READING, kinds=("word",)))
    # Right, the second token wrong, right, only the end wrong, the first token wrong: one shorter, padded at the end.
    given = torch.tensor(
        [[0, 20, 21, 22, 3, 0], [0, 20, 99, 22, 3, 0], [0, 20, 3, 9, 9, 9], [0, 20, 21, 22, 9, 0], [0, 99, 31, 3, 9, 9]]
    )
    assert ablation_task.accuracy(Answers(given), task) == {"all": 0.6, "word": 0.6}


def test_letters_need_no_files_and_splits_differ():
    first, other = LETTERS.pictures("train"), LETTERS.pictures("test")
    assert len(first[0]) == 200 * len(NAMES)
    assert not any(np.array_equal(other[0][0], tile) for tile in first[0][:200])
    assert len(set(map(len, first[1]))) == 1


def test_stamps_of_one_kind_are_one_item(place):
    world = world_of("objects")
    assert world.names == ("fish", "fruit", "mammals", "space")
    tiles, indices = world.pictures("train")
    assert [len(own) for own in indices] == [LEAST] * 4
    assert tuple(tiles[indices[1][0]][84, 84]) == (0, 128, 0)
    assert tuple(tiles[0][0, 0]) == (255, 255, 255)


# --- callbacks


def test_a_curve_leaves_its_own_time_out():
    now = iter([0.0, 5.0, 105.0, 107.0, 207.0])  # begin; then before and after each of two measurements of 100 s
    model, values = torch.nn.Linear(1, 1).eval(), iter([0.25, 0.5])
    curve = LearningCurve(2, lambda given: next(values), lambda: next(now))
    curve.on_train_begin(None, None, None)
    for step in range(1, 9):
        curve.on_step_end(None, TrainerState(global_step=step, max_steps=8), None, model)
    assert curve.points == [[4, 5.0, 0.25], [8, 7.0, 0.5]]
    assert curve.paused == 200
    assert model.training


def test_budgets_are_drawn_by_step_and_end_as_they_were():
    pruner = AutoPruner.from_name("divprune", pruning_ratio=0.9)
    drawn = DrawnBudgets(pruner, ((0.1, 0.5), (0.85, 0.93)), 0)
    ratios = Counter(drawn.ratio_at(step) for step in range(2000))
    assert ratios.keys() == {0.5, 0.93}
    assert ratios[0.5] / 2000 == pytest.approx(0.1 / 0.95, abs=0.03)
    step = next(step for step in range(2000) if drawn.ratio_at(step) == 0.5)
    tokens = VisualTokens(torch.randn(1, 100, 8))
    drawn.on_step_begin(None, TrainerState(global_step=step), None)
    assert pruner(tokens).lengths == [50]
    drawn.on_train_end(None, None, None)
    assert pruner(tokens).lengths == [10]


# --- k-means


@pytest.mark.parametrize("start", ["random", "grid", "divprune", "tome"])
@pytest.mark.parametrize("ragged", [False, True])
def test_kmeans_is_what_a_loop_finds(place, start, ragged):
    from benchmarks.ablation import kmeans  # registers itself

    torch.manual_seed(0)
    features = torch.randn(2, 36, 8)
    lengths, kept = ([36, 20], [6, 3]) if ragged else ([36, 36], [6, 6])
    valid = torch.arange(36) < torch.tensor(lengths)[:, None] if ragged else None
    pruner = kmeans.KMeans(kmeans.KMeans.config_class(pruning_ratio=5 / 6, start=start, rounds=2))
    tokens = VisualTokens(features, valid, generator=torch.Generator().manual_seed(1))
    first = pruner.first.reduce(tokens, kept)
    tokens.generator.manual_seed(1)
    pruned = pruner(tokens)
    assert pruned.lengths == kept
    for image, (count, k) in enumerate(zip(lengths, kept, strict=True)):
        units = normalize(features[image, :count], dim=-1)
        seeds = first.positions[image, :k].tolist()
        nearest = (units @ units[seeds].T).argmax(1).tolist()
        owner = [seeds.index(n) if n in seeds else nearest[n] for n in range(count)]
        for _ in range(2):
            own = [[n for n in range(count) if owner[n] == slot] for slot in range(k)]
            centres = normalize(torch.stack([units[members].mean(0) for members in own]), dim=-1)
            seeds = [
                members[int((units[members] @ centre).argmax())] for members, centre in zip(own, centres, strict=True)
            ]
            nearest = (units @ centres.T).argmax(1).tolist()
            owner = [seeds.index(n) if n in seeds else nearest[n] for n in range(count)]
        order = sorted(range(k), key=lambda slot: seeds[slot])
        assert pruned.positions[image, :k].tolist() == sorted(seeds)
        assert pruned.sizes[image, :k].tolist() == [owner.count(slot) for slot in order]
        own = torch.tensor(owner)
        means = torch.stack([features[image, :count][own == slot].mean(0) for slot in order])
        torch.testing.assert_close(pruned.features[image, :k], means)


def test_choices_are_timed_beside_divprune(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(selection_cost, "TOKENS", (40, 60))
    monkeypatch.setattr(selection_cost, "WIDTHS", (8,))
    path = tmp_path / "cost.json"
    selection_cost.main(["--output", str(path), "--rounds", "2"])
    results = json.loads(path.read_text())
    assert [size["visual_tokens"] for size in results["sizes"]] == [40, 60]
    # Four choices, alone and with one and two rounds of k-means, of which the baseline over itself is 1.
    seconds, over = results["sizes"][0]["seconds"], results["sizes"][0]["over_divprune"]
    assert len(seconds) == len(over) == 12
    assert min(seconds.values()) > 0
    assert over["divprune"] == {"mean": 1.0, "min": 1.0, "max": 1.0, "sd": 0.0}
    table = selection_cost.readme_table(results).splitlines()
    assert table[2] == "| chosen by | 40 x 8 | 60 x 8 |"
    assert len(table) == 4 + 12
    assert table[-1].startswith("| tome, k-means 2x | ")
    assert table[-1] in capsys.readouterr().out


# --- on one GPU


@pytest.fixture
def trained(place, tmp_path, monkeypatch):
    """Trains in a tiny size, as many runs as are asked for; returns the results and how many were trained."""
    executed, count = large.execute, Counter()

    def call(most, *words):
        def execute(run):
            if run.seed < 2**20:  # others warm up
                count["runs"] += 1
            return executed(run)

        def end(*given):
            return count["runs"] < most

        count.clear()
        monkeypatch.setattr(large, "execute", execute)
        monkeypatch.setattr(large, "fits", end)
        code = large.main(["--tiny", "--earlier", str(tmp_path), *words])
        file = tmp_path / "gpu_cpu_tiny_ablation_large.json"
        return code, json.loads(file.read_text()) if file.is_file() else None, count["runs"]

    return call


def test_each_call_adds_the_next_seed_to_the_results_of_the_card(trained, tmp_path):
    code, results, count = trained(5)
    assert (code, count) == (0, 5)
    done = [(run["way"], run["seed"]) for run in results["runs"]]
    assert done == [(variant.key, 0) for variant in GROUPS["large"]] + [("full-tokens", 1)]
    assert results["seeds"] == [0, 1]
    assert results["card"] == "cpu"
    steps = {run["way"]: sum(run["steps"].values()) for run in results["runs"]}
    # In the reference's time the end alone is read, unless that is as many steps: then it is the others' run.
    ends = {"time:full-tokens"} if steps["time:full-tokens"] != 4 else set()
    assert [len(run["curve"]) for run in results["runs"]] == [1 if way in ends else 2 for way, _ in done]
    seconds = {run["way"]: run["seconds"] for run in results["runs"] if run["seed"] == 0}
    assert steps[TODAYS.key] == steps["paper:dualspeed"] == 4
    assert steps["time:full-tokens"] == max(1, round(4 * seconds[TODAYS.key] / seconds["full-tokens"]))
    # A second call goes on, in another file too, from what the card's own has.
    _, more, count = trained(3, "--output", str(tmp_path / "other.json"))
    assert count == 3
    other = json.loads((tmp_path / "other.json").read_text())
    assert [(run["way"], run["seed"]) for run in other["runs"]][5:] == [
        (variant.key, 1) for variant in GROUPS["large"][1:]
    ]
    assert other["runs"][:5] == results["runs"] == more["runs"]
    assert "grids of letters" in readme_table(other)
    assert (tmp_path / "other_curve.png").is_file()


def test_a_run_is_known_by_the_card_alone(place, monkeypatch):
    options = large._parser().parse_args(["--tiny"])
    settings = large.settings_for(options)
    variant = GROUPS["large"][0]
    here = large.CardRun(variant, 0, 4, settings, "h100").fingerprint()
    monkeypatch.setattr(ablation, "machine", lambda: {"cpu": "another", "cores": 1, "threads": 1, "accelerator": None})
    assert large.CardRun(variant, 0, 4, settings, "h100").fingerprint() == here
    assert large.CardRun(variant, 0, 4, settings, "h200").fingerprint() != here
    assert large.CardRun(variant, 0, 5, settings, "h100").fingerprint() != here


def test_a_gpu_is_needed(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="finds no GPU. Use --tiny"):
        large.main([])


def test_its_model_is_large_and_its_images_are_many_tokens():
    own = large.settings_for(large._parser().parse_args([]))
    shape = ablation_task.language_model_config(own.size, 576, world_of(own.world))
    with torch.device("meta"):
        parameters = sum(one.numel() for one in LlamaModel(shape).parameters())
    assert parameters > 30e6
    assert ablation_task.patches_of(world_of(own.world)) == 576
    assert (own.bf16, own.cpu, own.curve) == (True, False, 10)
    assert large.SECONDS < 12 * 60


def test_numbers_stand_for_the_same_features(place):
    """A model that holds the features answers as one whose batches bring them."""
    size = Size(16, 2, 2, 2, 2, train_grids=4, test_grids=2)
    plain, numbered = (ablation_task.load_task(size, world=world_of("letters"), numbered=own) for own in (False, True))
    rows = {"train": plain.train[:2], "test": plain.test[-2:]}
    for split, own in rows.items():
        logits = []
        for task in (plain, numbered):
            batch = task.collator(split)(own)
            batch.pop("labels")
            logits.append(ablation_task.build_model(task, size).eval()(**batch).logits)
        assert batch["pixel_values"].shape == (2, 1, 1, 1)
        torch.testing.assert_close(*logits)


# --- estimates


def test_groups_are_estimated_from_one_step_of_each_kind(place, monkeypatch, capsys):
    size = Size(16, 1, 2, 2, 2, train_grids=4, test_grids=2)
    tiny = replace(ablation.Settings(steps=4, batch_size=2, threads=1), size=size)
    monkeypatch.setattr(estimate, "settings_of", lambda setup, given, **others: replace(tiny, world=setup.world))
    monkeypatch.setenv("TUXPAINT_STAMPS", str(place / "elsewhere"))
    world_of.cache_clear()
    threads = torch.get_num_threads()
    estimate.main(["--groups", "budgets", "objects", "--output", "estimate.json"])
    torch.set_num_threads(threads)
    world_of.cache_clear()
    results = json.loads(Path("estimate.json").read_text())
    own = results["groups"]["budgets"]
    assert own["runs"] == 3 * 7
    assert all(seconds > 0 for seconds in own["seconds"].values())
    assert "tuxpaint" in results["groups"]["objects"]["skipped"]
    assert "| `budgets` | 21 |" in estimate.readme_table(results)
    assert estimate.readme_table(results) in capsys.readouterr().out


def test_steps_cost_what_their_modes_do():
    settings, seconds = ablation.Settings(steps=100), {"full": 10.0, "fast": 1.0, "slow": 12.0}
    variants = {variant.key: variant for group in GROUPS.values() for variant in group}
    costs = {key: estimate.steps_cost(variant, settings, seconds) for key, variant in variants.items()}
    assert costs["full-tokens"] == 1000
    assert costs["pruned-only"] == pytest.approx(100)
    assert costs["dualspeed"] == costs["time:full-tokens"] == pytest.approx(5 * 12 + 95)
    assert costs["paper:tail-0.05"] == pytest.approx(5 * 12 + 95)
    assert costs["pruning-0.5"] == pytest.approx(5 * 12 + 95 * 5)
