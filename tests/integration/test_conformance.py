"""Every family, each of its modalities, padded on either side: all checks of `hf_dualspeed.conformance`."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import replace

import pytest
import supported_models
from families import FAMILIES
from families.cases import CASES, batch_of

from hf_dualspeed.conformance import CHECKS, Batch, Check, check_model, encodings, original_positions_are_masking

ran: Counter = Counter()
shown: defaultdict[str, set[str]] = defaultdict(set)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("name", "modality"), CASES)
def test_family(name, modality, side):
    family = FAMILIES[name]
    model = family.model()
    batch = batch_of(family, model, modality, side)
    checks = check_model(model, batch)
    assert failed(checks) == []
    assert failures(model, replace(batch, proportional_attention=False)) == []
    ran[name] += 1
    shown[name] |= {check.name for check in checks if check.passed}


def test_no_family_shows_less_than_the_page_says():
    """What a batch cannot show passes above, so that a family which is refused, or an option left out, is unseen."""
    pages = json.loads(supported_models.RESULT.read_text(encoding="utf-8"))["families"]
    whole = [page for page in pages if ran[page["model"]] == 2 * len(page["modalities"])]  # not a choice of its cases
    said = {page["model"]: {check for check, passed in page["checks"].items() if passed} for page in whole}
    assert {name: shown[name] for name in said} == said


@pytest.mark.parametrize("name", [name for name, modality in CASES if modality == "video"])
def test_a_budget_for_each_frame(name):
    family = FAMILIES[name]
    model = family.model()
    batch = replace(batch_of(family, model, "video", "left"), video_budget="frame")
    (frames,), (clips,) = encodings(model, batch), encodings(model, replace(batch, video_budget="clip"))
    assert sum(frames.lengths) == sum(clips.lengths)
    # Without it, too, these give each frame a budget of its own.
    framewise = name in ("smolvlm", "internvl", "minicpmv4_6", "minicpmv4_7", "kimi_k25")
    assert (len(frames.lengths) == len(clips.lengths)) == framewise
    assert failures(model, batch) == []


def test_a_window_shorter_than_the_prompt_is_no_failure():
    """It counts kept tokens, so that a pass on all tokens with the dropped ones hidden is no reference."""
    family = FAMILIES["mistral3"]
    model = family.model()
    batch = batch_of(family, model, "image", "left")
    assert original_positions_are_masking(model, batch) is None
    model.config.text_config.sliding_window = 6
    assert original_positions_are_masking(model, batch) is False  # not shown


def failures(model, batch: Batch) -> list[str]:
    return failed(check_model(model, batch))


def failed(checks: list[Check]) -> list[str]:
    return [f"{check.name}: {check.detail}" for check in checks if check.passed is False]


def test_the_page_of_supported_models_is_of_these_families():
    result = json.loads(supported_models.RESULT.read_text(encoding="utf-8"))
    assert {(f["model"], m) for f in result["families"] for m in f["modalities"]} == set(CASES)
    assert set(result["checks"]) == set(CHECKS)
    assert supported_models.PAGE.read_text(encoding="utf-8") == supported_models.page(result)
    assert all(passed is not False for f in result["families"] for passed in f["checks"].values())
