"""A batch in parts: the gradients of the whole, through one encoding, for every family."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, batch
from families.cases import CASES, ROWS

from hf_dualspeed import AutoPruner
from hf_dualspeed.batch_parts import BatchParts
from hf_dualspeed.encoding import encode
from hf_dualspeed.fast_pass import shorten_inputs

WHOLE = AutoPruner.from_name("random", pruning_ratio=0.0)


def loss_of(model, inputs, encodings, scheme):
    """Sum of the cross-entropies."""
    inputs = shorten_inputs(model, inputs, encodings, WHOLE, None, scheme)
    labels = inputs.pop("labels")
    logits = model(**inputs, use_cache=False).logits
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), shifted.flatten(), reduction="sum")


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {name: grad for name, grad in found.items() if grad.abs().max() > 0}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("name", "modality"), CASES)
def test_parts_add_up_to_the_whole(name, modality, side):
    family = FAMILIES[name]
    if not family.rows_alone:
        pytest.skip("a sample's result depends on its batch")
    if not family.prunes_audio and "audio" in modality:
        pytest.skip("raw audio is left to forward, which the trainer does not split")
    if name in ("blip_2", "instructblip"):
        pytest.skip("transformers itself takes no sample without an image")
    model, rows = family.model(), ROWS[modality]
    inputs = batch(family, model, rows, side)
    whole = loss_of(model, inputs, encode(model, inputs), family.position_ids)
    whole.backward()
    expected, total = gradients(model), 0.0
    encodings = encode(model, inputs)
    parts = BatchParts(model, inputs, encodings, len(rows))
    for index in range(parts.count):
        part, own = parts[index]
        assert len(part["input_ids"]) == 1
        loss = loss_of(model, part, own, family.position_ids)
        total += loss.detach()
        (loss + sum(end.flatten()[:0].sum() for end in parts.ends)).backward()
    torch.testing.assert_close(total, whole.detach(), rtol=1e-4, atol=1e-5)
    actual = gradients(model)
    assert actual.keys() == expected.keys()
    for key, grad in expected.items():
        torch.testing.assert_close(actual[key], grad, rtol=2e-3, atol=1e-4 * float(grad.abs().max()) + 5e-6)
