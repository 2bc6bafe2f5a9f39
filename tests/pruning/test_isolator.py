"""The mode isolator."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES

import hf_dualspeed
from hf_dualspeed import ModeIsolator
from hf_dualspeed.pruning.isolator import saved_length

PACKAGE = Path(hf_dualspeed.__file__).parent


def test_isolator_has_the_models_width_and_scale_and_round_trips(tmp_path):
    model, _ = FAMILIES["llava"].build()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(10)
    isolator = ModeIsolator.for_model(model, 64)
    assert isolator().shape == (64, 32)
    scale = model.get_input_embeddings().weight.std().item()
    assert isolator.prompt.std().item() == pytest.approx(scale, rel=0.1)
    isolator.save_pretrained(tmp_path)
    assert saved_length(tmp_path) == 64
    other = ModeIsolator(64, 32)
    other.load_pretrained(tmp_path)
    assert torch.equal(other.prompt, isolator.prompt)
    with pytest.raises(ValueError, match=r"`isolator_length` is 3 .* length 64 .* Set isolator_length=64"):
        ModeIsolator(3, 32).load_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"No mode_isolator\.safetensors"):
        other.load_pretrained(tmp_path / "elsewhere")
    assert saved_length(tmp_path / "elsewhere") is None


def test_isolator_knows_its_size_where_its_prompt_is_partitioned(tmp_path):
    ModeIsolator(4, 8).save_pretrained(tmp_path)
    isolator = ModeIsolator(3, 8)
    isolator.prompt.data = torch.empty(0)  # as ZeRO-3 leaves it between passes
    assert (isolator.length, isolator.extra_repr()) == (3, "length=3, hidden_size=8")
    with pytest.raises(ValueError, match=r"`isolator_length` is 3 \(width 8\), .* length 4"):
        isolator.load_pretrained(tmp_path)
