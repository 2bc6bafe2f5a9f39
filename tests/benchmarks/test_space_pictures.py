"""What the pictures of the Space and of kept tokens need. The page itself is tested in tests/spaces_demo."""

import io

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason='needs gradio: pip install "hf-dualspeed[demo]"')
pytest.importorskip("playwright", reason="needs playwright: pip install playwright")

from benchmarks import common, kept_tokens, space_pictures


def test_runs_that_are_not_there_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = "runs/quickstart_full, runs/quickstart, runs/quickstart_pruned. Train them first: make demo"
    with pytest.raises(FileNotFoundError, match=message):
        space_pictures.main(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_small_picture_looks_like_the_large_one():
    drawn = Image.radial_gradient("L").convert("RGB")
    drawn.paste((0, 114, 178), (20, 20, 90, 60))
    buffer = io.BytesIO()
    drawn.save(buffer, "PNG")
    smaller = common.small(buffer.getvalue())
    with Image.open(io.BytesIO(smaller)) as image:
        assert abs(np.asarray(image.convert("RGB")).astype(int) - np.asarray(drawn)).max() < 8
    assert len(smaller) < len(buffer.getvalue())


def test_photographs_are_squares_of_whole_patches():
    edge = kept_tokens.SIDE * kept_tokens.PATCH
    assert [image.size for image in kept_tokens.photographs()] == [(edge, edge)] * 3
