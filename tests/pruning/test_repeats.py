"""Images that a batch holds several times are encoded once, and nothing else changes."""

import pytest
import torch
from families import FAMILIES as ALL
from families import batch as written
from tiny_models import FAMILIES, batch
from training import make

from hf_dualspeed.models.interface import ModelInterface
from hf_dualspeed.pruning.encoding import encode
from hf_dualspeed.pruning.inputs import whole_inputs
from hf_dualspeed.pruning.repeats import REPEATS, WithRepeats, repeats_of

# Pictures follow from a text's length: the first two samples share one, and so do the fourth and the last.
TEXTS = ["{image} one?", "{image} two?", "none here", "{image}{image} of them", "{image} a longer one", "{image} six"]
SIZES = [[(16, 16)], [(16, 16)], [], [(40, 24), (40, 24)], [(24, 40)], [(16, 16)]]
REPEATING = list(zip(TEXTS, SIZES, strict=True))
NEEDS = [set(), {"grid"}, {"grid", "attention"}, {"keys"}, {"text"}]


def towers_input(model):
    """The number of images, or patches, in each call of the vision tower."""
    calls = []
    tower = model.get_encoder(modality="image")
    tower.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len([*args, *kwargs.values()][0])), with_kwargs=True
    )
    return calls


@pytest.mark.parametrize("needs", NEEDS, ids=lambda needs: " ".join(sorted(needs)) or "none")
@pytest.mark.parametrize("name", FAMILIES)
def test_the_encoding_is_the_same(name, needs):
    model, processor = FAMILIES[name].build()
    if needs & {"attention", "keys"}:
        model.set_attn_implementation("eager")
    inputs, calls = batch(FAMILIES[name], processor, REPEATING), towers_input(model)
    repeats = repeats_of(inputs)
    assert repeats.places == [0, 0, 1, 2, 3, 4]
    interface = ModelInterface(model)
    (plain,), (once,) = (encode(interface, inputs, frozenset(needs), repeats=found) for found in (None, repeats))
    assert calls[1] < calls[0]
    assert once.lengths == plain.lengths
    torch.testing.assert_close(once.features, plain.features, rtol=1e-5, atol=1e-6)
    for field in ("grids", "attention", "keys"):
        for one, other in zip(getattr(once, field) or [], getattr(plain, field) or [], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    if "text" in needs:
        assert torch.equal(once.text, plain.text)
    # What the model's forward takes is the same, too.
    outputs = [model(**whole_inputs(interface, inputs, [encoding])).logits for encoding in (once, plain)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_a_trained_tower_are_the_same(name):
    model, processor = FAMILIES[name].build()
    inputs = batch(FAMILIES[name], processor, REPEATING)
    gradients = []
    for repeats in (None, repeats_of(inputs)):
        model.zero_grad()
        (encoding,) = encode(ModelInterface(model), inputs, repeats=repeats)
        (encoding.features * torch.linspace(-1, 1, len(encoding.features))[:, None]).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"slow_mode_splits": 2}, {"distillation_weight": 0.0}], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_training_is_the_same_with_fewer_images_in_the_tower(tmp_path, monkeypatch, name, options):
    monkeypatch.setattr("training.SAMPLES", REPEATING)
    data = [{"index": index} for index in range(len(REPEATING))]
    settings = {"per_device_train_batch_size": 6, "slow_mode_ratio": 0.5, "mode_schedule": "periodic", "data": data}
    trainers, calls = [], []
    for once in (True, False):
        trainer = make(tmp_path / str(once), name, **settings, **options)
        assert trainer.encodes_once
        if not once:
            monkeypatch.setattr(type(trainer), "encodes_once", False)
        calls.append(towers_input(trainer.model))
        trainer.train()
        trainers.append(trainer)
    assert len(calls[0]) == len(calls[1])
    assert sum(calls[0]) < sum(calls[1])
    first, second = (dict(trainer.model.named_parameters()) for trainer in trainers)
    for key, value in first.items():
        torch.testing.assert_close(value, second[key], rtol=1e-3, atol=1e-4, msg=key)


def test_what_makes_an_encoding_random_or_keeps_it_as_it_is_encodes_all(tmp_path):
    assert not make(tmp_path, plain_path=True).encodes_once
    trainer = make(tmp_path)
    trainer.model.get_encoder(modality="image").config.attention_dropout = 0.1
    next(m for m in trainer.model.get_encoder(modality="image").modules() if hasattr(m, "dropout")).dropout = 0.1
    assert not trainer.encodes_once


def test_images_are_the_same_only_if_all_their_values_are():
    one, other = torch.rand(3, 4, 4), torch.rand(3, 4, 4)
    almost = one.clone()
    almost[-1, -1, -1] += 1e-6
    pixels = torch.stack([one, other, one, almost])
    assert repeats_of({"pixel_values": pixels}).places == [0, 1, 0, 2]
    assert repeats_of({"pixel_values": pixels[[0, 1, 3]]}) is None
    # Padded alike, but of other sizes.
    sizes = torch.tensor([[4, 4], [4, 4], [4, 3], [4, 4]])
    assert repeats_of({"pixel_values": pixels, "image_sizes": sizes}) is None
    # No picture, or inputs that do not say which of them is whose.
    assert repeats_of({"input_ids": torch.zeros(1, 3)}) is None
    assert repeats_of({"pixel_values": pixels, "image_attention_mask": torch.ones(2, 5)}) is None


def test_patches_belong_to_images_as_the_grid_says():
    patches = torch.rand(4, 6)
    grid = torch.tensor([[1, 2, 2], [1, 1, 4], [1, 2, 2]])
    batch = {"pixel_values": patches.repeat(3, 1), "image_grid_thw": grid, "video_grid_thw": torch.ones(9, 3)}
    found = repeats_of(batch)
    assert (found.first, found.places, found.sizes) == ([0, 1], [0, 1, 0], [4, 4, 4])
    distinct = found.distinct(batch)
    assert torch.equal(distinct["pixel_values"], patches.repeat(2, 1))
    assert torch.equal(distinct["image_grid_thw"], grid[:2])


ROWS = [[3, "image", 5], [3, "image", 5], [2, "image", 1, "image", 4], [6]]


@pytest.mark.parametrize("rows", [ROWS, ROWS[:2]], ids=["mixed", "alone"])
@pytest.mark.parametrize("name", ["llava_onevision", "instructblip"])
def test_encoders_that_read_more_than_single_images(name, rows):
    """Counts of the images of a sample, and questions beside images."""
    model = ALL[name].model()
    inputs = written(ALL[name], model, rows, seeds=[0, 0, 1, 2][: len(rows)])
    if name == "instructblip":
        inputs["qformer_input_ids"][1] += 1
    interface, calls = ModelInterface(model), towers_input(model)
    encodings = [encode(interface, inputs, frozenset({"grid"}), repeats=found) for found in (None, repeats_of(inputs))]
    (plain,), (once,) = encodings
    assert once.lengths == plain.lengths
    torch.testing.assert_close(once.features, plain.features, rtol=1e-5, atol=1e-6)
    if (name, rows) == ("llava_onevision", ROWS[:2]):
        assert calls[1] < calls[0]


def test_a_batch_without_repeats_is_left_as_it_is():
    whole = {"pixel_values": torch.rand(2, 3, 4, 4)}
    assert WithRepeats(lambda examples: whole)([]) is whole
    twice = {"pixel_values": torch.ones(2, 3, 4, 4)}
    assert WithRepeats(lambda examples: twice)([]).keys() == {"pixel_values", REPEATS}
