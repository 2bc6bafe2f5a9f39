"""`dualspeed check` on saved models: a good one, a broken one, and one that cannot be pruned."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES
from transformers import LlamaConfig, LlamaForCausalLM

from hf_dualspeed import cli, conformance
from hf_dualspeed.commands import check
from hf_dualspeed.pruning.encoding import VisualEncoding


@pytest.fixture
def saved(tmp_path):
    model, processor = FAMILIES["llava"].build()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    return str(tmp_path)


def test_a_good_model_passes_every_check(saved, capsys):
    assert cli.main(["check", saved]) == 0
    out = capsys.readouterr().out
    assert out.count("yes") == len(conformance.CHECKS)
    assert "LlavaForConditionalGeneration" in out


def test_a_failed_check_is_named(saved, capsys, monkeypatch):
    monkeypatch.setattr(VisualEncoding, "with_features", lambda self, *pruned: self.output)  # all tokens
    assert cli.main(["check", saved]) == 1
    out = capsys.readouterr().out
    assert "no" in out
    assert "do not match" in " ".join(out.split())


def test_a_model_that_cannot_be_pruned(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("DUALSPEED_DEBUG", raising=False)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    monkeypatch.setattr(check.AutoModelForImageTextToText, "from_pretrained", lambda name, dtype: model)
    assert cli.main(["check", str(tmp_path)]) == 2
    assert "LlamaForCausalLM cannot be pruned" in capsys.readouterr().err


def test_what_masking_can_show():
    from families import FAMILIES as ALL

    ids = torch.arange(10, 20)[None]
    assert check.removal_is_masking(ALL["llava"].model(), ids)
    assert not check.removal_is_masking(ALL["lfm2_vl"].model(), ids)
    assert not check.removal_is_masking(ALL["qwen3_5"].model(), ids)
