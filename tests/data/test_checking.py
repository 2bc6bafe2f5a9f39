"""The look at the data before training."""

from __future__ import annotations

import pytest
from data_cases import PROCESSORS, picture, talk
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from tiny import tiny_llava_processor, tiny_qwen2_5_vl_processor

from hf_dualspeed.data import checking
from hf_dualspeed.data.checking import DataReport, check_samples, with_lengths, without_rows
from hf_dualspeed.data.collators import VisionLanguageCollator
from hf_dualspeed.data.lengths import given_lengths

TALK = Features(
    {"messages": List({"role": Value("string"), "content": Value("string")}), "images": List(ImageFeature())}
)
STRIP = Image.new("RGB", (900, 4))


def samples(tmp_path) -> list[dict]:
    """A good sample, and one of each fault."""
    picture().save(tmp_path / "a.png")
    return [
        talk("q", "a", images=[str(tmp_path / "a.png")], id="good"),
        talk("q", "a", images=[str(tmp_path / "none.png")], id="missing"),
        talk("q", "a", images=[STRIP], id="strip"),
        talk("q", "x" * 300, images=[picture()], id="long"),
        talk("q", id="silent"),
        talk("q " * 100, "a", id="cut"),
        talk("<image> q", "a", id="placeholder"),
        {"id": "empty", "text": "q"},
        talk("q", "a", images=[b"no picture"], id="bytes"),
    ]


KINDS = {
    "missing": ["unreadable"],
    "strip": ["unreadable"],
    "long": ["truncated"],
    "silent": ["unsupervised"],
    "cut": ["truncated", "unsupervised"],
    "placeholder": ["wrong"],
    "empty": ["wrong"],
    "bytes": ["unreadable"],
}


def found(report: DataReport, rows: list[dict]) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {}
    for finding in report.findings:
        kinds.setdefault(rows[finding.index]["id"], []).append(finding.kind)
    return kinds


def test_each_fault_is_found_and_names_its_row(tmp_path):
    rows = samples(tmp_path)
    collator = VisionLanguageCollator(tiny_qwen2_5_vl_processor(), max_length=150)
    report = check_samples(rows, collator, name="pets")
    assert found(report, rows) == KINDS
    assert (report.total, report.checked) == (9, 9)
    exact = VisionLanguageCollator(collator.processor)([rows[3]])["input_ids"].shape[1]
    assert report.longest == exact
    for finding in report.findings:
        assert f"row {finding.index} of 'pets', id '{rows[finding.index]['id']}'" in finding.message
    assert "row 1 of 'pets', id 'missing'): [Errno 2] No such file" in report.findings[0].message
    assert collator.skipped == collator.unsupervised == collator.seen == 0


def test_other_policies_find_other_kinds(tmp_path):
    rows = samples(tmp_path)
    options = {"processor": tiny_qwen2_5_vl_processor(), "unreadable_images": "skip"}
    report = check_samples(rows, VisionLanguageCollator(**options, max_length=150, long_samples="skip"))
    assert found(report, rows) == {**KINDS, "long": ["long"], "cut": ["long"]}
    report = check_samples(rows, VisionLanguageCollator(**options))
    assert found(report, rows) == {key: kinds for key, kinds in KINDS.items() if key not in ("long", "cut")}


def test_several_processes_and_ranks_find_the_same(tmp_path):
    rows = samples(tmp_path)
    collator = VisionLanguageCollator(tiny_qwen2_5_vl_processor(), max_length=150)
    alone = check_samples(rows, collator)
    assert check_samples(rows, collator, processes=2) == alone
    shares = [check_samples(rows, collator, share=(rank, 2)) for rank in range(2)]
    assert [report.checked for report in shares] == [5, 4]
    assert DataReport.joined(shares) == alone


def test_a_large_data_set_is_looked_at_here_and_there(tmp_path):
    rows = [talk("q", "a", id=str(index)) for index in range(10)]
    rows[8] = talk("q", "a", images=["none.png"])
    collator = VisionLanguageCollator(tiny_qwen2_5_vl_processor())
    report = check_samples(rows, collator, limit=5)
    assert (report.checked, [finding.index for finding in report.findings]) == (5, [8])
    with pytest.raises(ValueError, match="1 of 5 checked ones, of 10, samples cannot be used"):
        report.settle(collator)


@pytest.mark.parametrize("name", PROCESSORS)
def test_near_the_limit_lengths_are_exact(name):
    processor = PROCESSORS[name][0]()
    rows = [talk("q", "x" * letters, images=[picture(33, 21)]) for letters in range(1, 12)]
    exact = [VisionLanguageCollator(processor)([row])["input_ids"].shape[1] for row in rows]
    report = check_samples(rows, VisionLanguageCollator(processor, max_length=exact[5]))
    assert [finding.index for finding in report.findings if finding.kind == "truncated"] == [6, 7, 8, 9, 10]
    assert report.longest == exact[-1]


def test_truncation_into_a_picture_is_an_error():
    rows = [talk("q", "a", images=[picture()])]
    report = check_samples(rows, VisionLanguageCollator(tiny_llava_processor(), max_length=12))
    assert [finding.kind for finding in report.findings] == ["wrong"]
    assert "would cut" in report.findings[0].message


def test_pictures_are_not_decoded(tmp_path, monkeypatch):
    rows = Dataset.from_list(
        [{"prompt": "q", "completion": "a", "image": picture()}] * 3,
        features=Features({"prompt": Value("string"), "completion": Value("string"), "image": ImageFeature()}),
    )
    load, decoded = Image.Image.load, []
    monkeypatch.setattr(Image.Image, "load", lambda self: decoded.append(self) or load(self))
    check_samples(rows.select([0]), VisionLanguageCollator(tiny_qwen2_5_vl_processor()))
    first, decoded[:] = len(decoded), []
    report = check_samples(rows.with_format("numpy"), VisionLanguageCollator(tiny_qwen2_5_vl_processor()))
    assert (report.checked, report.findings) == (3, [])
    assert len(decoded) == first


# what follows from it


def settled(rows: list[dict], learns: bool = True, **options) -> list[int]:
    collator = VisionLanguageCollator(tiny_qwen2_5_vl_processor(), **options)
    return check_samples(rows, collator, name="pets", learns=learns).settle(collator)


def test_faults_stop_the_training_with_their_number_and_the_first_ones(tmp_path):
    rows = samples(tmp_path)
    with pytest.raises(ValueError, match=r"'pets': 5 of 9 samples cannot be used:\n- .*'missing'") as error:
        settled(rows)
    assert str(error.value).count("\n") == 4
    assert str(error.value).endswith("\n- and 2 more")
    with pytest.raises(ValueError, match=r"'pets': 2 of 9 samples cannot be used:\n- .*'placeholder'.*\n- .*'empty'"):
        settled(rows, unreadable_images="skip")


def test_skipped_samples_are_counted_and_left_out(tmp_path, caplog):
    rows = samples(tmp_path)[:6]
    options = {"unreadable_images": "skip", "long_samples": "skip", "max_length": 150}
    assert settled(rows, **options) == [1, 2, 3, 5]
    assert "'pets': 4 of 6 samples are left out:" in caplog.text
    assert "'pets': 1 of 6 samples have no token to learn:\n- row 4 of 'pets', id 'silent'" in caplog.text
    assert [row["id"] for row in without_rows(rows, [1, 2, 3, 5])] == ["good", "silent"]
    kept = without_rows(Dataset.from_dict({"n": [0, 1, 2]}), [1])
    assert kept["n"][:] == [0, 2]
    assert without_rows(rows, []) is rows
    with pytest.raises(ValueError, match="2 of 2 samples would be left out, so nothing remains"):
        settled(rows[1:3], **options)


def test_what_is_cut_off_is_shown(tmp_path, caplog):
    rows = samples(tmp_path)
    assert settled([rows[0], rows[3], rows[5]], max_length=150) == []
    assert "2 of 3 samples lose their end, the longest of" in caplog.text
    assert "1 of 3 samples have no token to learn:\n- row 2 of 'pets', id 'cut': `max_length`=150 cuts" in caplog.text


def test_nothing_to_learn_is_an_error():
    for rows, options in (([talk("q")] * 2, {}), ([talk("q " * 100, "a")] * 2, {"max_length": 150})):
        with pytest.raises(ValueError, match="2 of 2 samples have no token to learn"):
            settled(rows, **options)


def test_questions_need_no_answer_and_no_length(tmp_path, caplog):
    rows = [talk("q"), talk("q " * 100, "a")]
    assert settled(rows, learns=False, long_samples="raise", max_length=150) == []
    assert not caplog.text
    with pytest.raises(ValueError, match="cannot be used"):
        settled([talk("q", images=["none.png"])], learns=False)


def test_a_data_set_of_features_is_left_as_it_is(tmp_path):
    features = Features(
        {"messages": List({"role": Value("string"), "content": Value("string")}), "images": List(ImageFeature())}
    )
    data = Dataset.from_list([talk("q", "a", images=[picture()])], features=features)
    assert settled(data) == []
    assert isinstance(data[0]["images"][0], Image.Image)


def test_small_data_sets_start_no_process(monkeypatch, tmp_path):
    seen = []
    whole = checking.DataLoader
    monkeypatch.setattr(checking, "DataLoader", lambda *a, **k: seen.append(k["num_workers"]) or whole(*a, **k))
    monkeypatch.setattr(checking, "SHARE", 1)
    collator = VisionLanguageCollator(tiny_qwen2_5_vl_processor())
    check_samples([talk("q", "a")], collator)
    check_samples([talk("q", "a")] * 3, collator)
    assert seen[0] == 0
    assert seen[1] in (0, 2, 3)


@pytest.mark.parametrize("form", [{"type": "pandas"}, {"type": "torch", "columns": ["prompt"]}])
def test_a_format_that_fails_in_training_fails_in_the_check(form):
    rows = Dataset.from_list([{"prompt": "q", "completion": "a"}] * 2).with_format(**form)
    collator = VisionLanguageCollator(tiny_qwen2_5_vl_processor())
    with pytest.raises(ValueError, match="must be a dict|no conversation"):
        collator([rows[0]])
    assert [finding.kind for finding in check_samples(rows, collator).findings] == ["wrong", "wrong"]


def test_a_stream_is_refused_with_the_remedy():
    rows = Dataset.from_list([{"prompt": "q", "completion": "a"}]).to_iterable_dataset()
    collator = VisionLanguageCollator(tiny_qwen2_5_vl_processor())
    with pytest.raises(ValueError, match=r"'the stream', of type IterableDataset, has no length.*take\(1000\)"):
        check_samples(rows, collator, name="the stream")
    assert not check_samples(list(rows.take(1)), collator).findings


# lengths


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_look_counts_what_grouping_by_length_needs(name, tmp_path):
    picture(40, 20).save(tmp_path / "a.png")
    rows = [
        talk("q", "a", images=[str(tmp_path / "a.png")]),
        talk("a longer question", "with an answer"),
        talk("<image> and <image>", "b", images=[str(tmp_path / "a.png"), str(tmp_path / "a.png")]),
        talk("q", "a", images=[str(tmp_path / "none.png")]),
        talk("x" * 200, "cut"),
    ]
    dataset = Dataset.from_list(rows, features=Features({**TALK, "images": List(Value("string"))}))
    collator = VisionLanguageCollator(PROCESSORS[name][0](), max_length=150, unreadable_images="skip")
    report = check_samples(dataset, collator)
    left_out = report.settle(collator)
    assert left_out == [3]
    found = given_lengths(with_lengths(dataset, report, left_out, "length", 150), "length")
    batches = [collator([rows[row]])["input_ids"][0] for row in (0, 1, 2, 4)]
    image = collator.processor.image_token_id
    exact = [(len(ids), int((ids == image).sum())) for ids in batches]
    estimated = [(found.full[row].item(), sum(found.visual[row])) for row in (0, 1, 2, 4)]
    for (length, visual), (about, counted) in zip(exact, estimated, strict=True):
        assert counted == visual
        assert abs(about - length) <= 8
    assert len(found.visual[2]) == 2


def test_lengths_are_added_only_where_all_rows_are_counted():
    dataset = Dataset.from_list([talk("q", "a"), talk("q", "a")], features=TALK)
    counted = {0: (3, []), 1: (4, [])}
    whole, part = (DataReport("pets", 2, counted=rows) for rows in (counted, {0: (3, [])}))
    assert with_lengths(dataset, whole, [], "length", 3)["length"][:] == [3, 3]
    assert with_lengths(dataset, part, [], "length", None) is dataset
    assert with_lengths(dataset, part, [1], "length", None)["length"][:] == [3, 0]
    for column in ("length", "visual_length"):
        given = dataset.add_column(column, [5, 5])
        assert with_lengths(given, whole, [], "length", None) is given
