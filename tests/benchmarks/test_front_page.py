"""README's picture shows the published results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import front_page

ROOT = Path(__file__).parents[2]
FOUND = [json.loads((ROOT / front_page.RESULTS / f"{name}.json").read_text()) for name in front_page.NAMES]


def test_rows_are_those_of_the_results():
    rows = front_page.rows_of(FOUND)
    assert [round(row["speed_up"], 2) for row in rows] == [2.83, 2.17, 3.81, 2.82]
    for row in rows:
        assert row["plain"] / row["ours"] == pytest.approx(row["speed_up"])
        assert row["limit"] > row["speed_up"]
    assert ([name for row in rows for name in ("on", "off") if row["name"].endswith(name)]) == [
        "on",
        "off",
        "on",
        "off",
    ]


def test_the_picture_is_drawn(tmp_path):
    with Image.open(front_page.draw(FOUND, tmp_path / "h100.png")) as image:
        assert {(0, 114, 178), (153, 153, 153)} <= {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}


def test_results_of_other_settings_do_not_go_into_one_picture(tmp_path):
    other = {**FOUND[1], "settings": {**FOUND[1]["settings"], "slow_ratio": 0.05}}
    with pytest.raises(ValueError, match="differ in their machine or slow ratio"):
        front_page.draw([FOUND[0], other], tmp_path / "h100.png")
    assert not (tmp_path / "h100.png").exists()
