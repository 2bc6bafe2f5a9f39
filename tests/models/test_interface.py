"""What a model says about itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tiny_models import FAMILIES
from torch import nn

from hf_dualspeed.models.interface import ModelInterface, unwrap


class Wrapper(nn.Module):
    """Passes names on to what it wraps, as DeepSpeed's engine does, but has a `config` of its own."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module, self.config = module, {"train_batch_size": 1}

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)


class Adapted(nn.Module):
    """Has a base model, as PEFT's wrapper does."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def get_base_model(self):
        return self.model


class Compiled(nn.Module):
    """Keeps the original, as `torch.compile` does."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self._orig_mod = model


@pytest.mark.parametrize(
    "wrappers", [(), (Wrapper,), (Adapted, Wrapper), (Compiled, Wrapper), (Wrapper, Compiled)], ids=str
)
def test_the_model_inside_any_wrappers(wrappers):
    model = wrapped = nn.Linear(1, 1)
    model.config = SimpleNamespace(model_type="llava")
    for wrapper in wrappers:
        wrapped = wrapper(wrapped)
    assert unwrap(wrapped) is model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_in_place_of_the_models_own_is_named(family, monkeypatch):
    """As Liger's own loss and some training scripts put it there."""
    model, _ = FAMILIES[family].build()
    ModelInterface(model).check_protocol()

    def forward(self, input_ids=None, pixel_values=None, labels=None, **kwargs):
        raise AssertionError

    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(
        ValueError, match="no `mm_encoder_outputs`. It is that of test_interface, .* Leave that patch out"
    ):
        ModelInterface(model).check_protocol()
