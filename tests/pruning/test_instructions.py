"""What the fast pass tells pruners of a unit's instruction and of the tower's keys: all of it, and never an answer."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, MIXED, batch
from families.base import EOS
from tower_cases import SUPPLY, patches_of_tokens
from transformers.integrations.neftune import activate_neftune

from hf_dualspeed.models.attention import penultimate_layer
from hf_dualspeed.models.interface import ModelInterface, unwrap, visual_token_ids
from hf_dualspeed.pruning.encoding import encode
from hf_dualspeed.pruning.instructions import instructions

IGNORED = -100


class Wrapped(torch.nn.Module):
    """As much of a model as instructions need."""

    class config:  # noqa: N801
        image_token_id, model_type = 90, "llava"


def found(ids, labels=None, mask=None, lengths=(2, 2)) -> list[list[int]]:
    """The instruction's tokens of each image."""
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": None if mask is None else torch.tensor(mask)}
    inputs["labels"] = None if labels is None else torch.tensor(labels)
    result = instructions(ModelInterface(Wrapped()), inputs, 90, list(lengths))
    return [inputs["input_ids"][row][valid].tolist() for row, valid in zip(result.rows, result.valid, strict=True)]


def test_without_labels_all_text_of_the_row_instructs():
    ids = [[1, 11, 90, 90, 12, 0], [1, 90, 90, 13, 14, 15]]
    mask = [[1, 1, 1, 1, 1, 0], [1] * 6]
    assert found(ids, mask=mask) == [[1, 11, 12], [1, 13, 14, 15]]


def test_answers_and_what_follows_them_are_left_out():
    # question 11, answer 21, question 12 about a second image, answer 22, question 13, answer 23
    ids = [[90, 90, 11, 21, 12, 90, 90, 22, 13, 23]]
    labels = [[t if t in (21, 22, 23) else IGNORED for t in ids[0]]]
    assert found(ids, labels) == [[11], [11, 12]]


def test_labels_on_placeholders_are_none():
    ids = [[90, 90, 11, 21, 90, 90]]
    assert found(ids, labels=[[90, 90, IGNORED, 21, 90, 90]]) == [[11], [11]]


def test_an_image_between_answers_only_has_no_instruction():
    ids = [[90, 90, 21, 22, 90, 90]]
    assert found(ids, labels=[[IGNORED] * 2 + [21, 22] + [IGNORED] * 2]) == [[], []]


def test_the_noise_of_neftune_is_not_in_what_pruners_read():
    family = FAMILIES["llava"]
    model = family.model().train()
    inputs = batch(family, model, MIXED)
    (clean,) = encode(ModelInterface(model), inputs, frozenset({"text"}))
    handle = activate_neftune(model, 5.0)
    (noisy,) = encode(ModelInterface(model), inputs, frozenset({"text"}))
    assert torch.equal(noisy.text, clean.text)
    assert model.get_input_embeddings().training
    ids = inputs["input_ids"][:, -1:]
    assert not torch.equal(model.get_input_embeddings()(ids), model.get_input_embeddings()(ids))
    handle.remove()


def test_packed_samples_do_not_instruct_each_other():
    inputs = {
        "input_ids": torch.tensor([[90, 90, 11, 21, 12, 90, 90, 13, 22]]),
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]),
        "labels": torch.tensor([[IGNORED] * 3 + [21] + [IGNORED] * 4 + [22]]),
    }

    class Model(Wrapped):
        dtype = torch.float32

        class config(Wrapped.config):  # noqa: N801
            get_text_config = staticmethod(lambda: None)

    result = instructions(ModelInterface(Model()), inputs, 90, [2, 2])
    assert [inputs["input_ids"][0][valid].tolist() for valid in result.valid] == [[11], [12, 13]]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "smolvlm", "internvl", "gemma3"])
def test_text_is_embedded_beside_each_unit(name, side):
    model = FAMILIES[name].model()
    inputs = batch(FAMILIES[name], model, MIXED, side)
    (encoding,) = encode(ModelInterface(model), inputs, frozenset({"text"}))
    tokens = encoding.tokens()
    visual = torch.isin(inputs["input_ids"], torch.tensor(visual_token_ids(unwrap(model).config)))
    found = instructions(ModelInterface(model), inputs, encoding.token_id, encoding.lengths)
    longest = int(found.valid.sum(1).max())  # rows are longer: images, answers and what follows them are not held
    assert tokens.text.shape[:2] == tokens.text_valid.shape == (len(encoding.lengths), longest)
    assert longest < inputs["input_ids"].shape[1]
    assert not tokens.text.requires_grad
    for unit, (row, valid) in enumerate(zip(found.rows, found.valid, strict=True)):
        assert valid.any()  # a beginning of sequence at least
        assert not visual[row, valid].any()
        assert inputs["attention_mask"][row, valid].all()
        assert (inputs["labels"][row, valid] == IGNORED).all()
        expected = model.get_input_embeddings()(inputs["input_ids"][row, valid])
        torch.testing.assert_close(tokens.text[unit, tokens.text_valid[unit]], expected)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_other_answers_change_nothing_that_a_pruner_sees(name):
    model = FAMILIES[name].model()
    inputs = batch(FAMILIES[name], model, [[4, "image", 7]])
    answers = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    answers[:, -5:] = True
    inputs["labels"] = torch.where(answers, inputs["input_ids"], IGNORED)
    other = {**inputs, "input_ids": inputs["input_ids"].masked_fill(answers, EOS)}
    other["labels"] = torch.where(answers, other["input_ids"], IGNORED)
    seen = [encode(ModelInterface(model), i, frozenset({"text"}))[0].tokens() for i in (inputs, other)]
    assert torch.equal(seen[0].text_valid, seen[1].text_valid)
    assert torch.equal(seen[0].text[seen[0].text_valid], seen[1].text[seen[1].text_valid])
    assert seen[0].text_valid.any()


@pytest.mark.parametrize("name", sorted({name for name, modality in SUPPLY if modality == "image"}))
def test_keys_are_those_of_the_towers_layer(name):
    model = FAMILIES[name].model()
    inputs = batch(FAMILIES[name], model)
    (encoding,) = encode(ModelInterface(model), inputs, frozenset({"keys"}))
    made_of = patches_of_tokens(model, inputs, "image", 0).float()
    layer, handed = penultimate_layer(unwrap(model).get_encoder(modality="image")), []
    original = torch.nn.functional.scaled_dot_product_attention
    handle = layer.register_forward_pre_hook(lambda *_: handed.append("begin"))
    done = layer.register_forward_hook(lambda *_: handed.append("end"))

    def spy(query, key, *args, **options):
        handed.append(key)
        return original(query, key, *args, **options)

    torch.nn.functional.scaled_dot_product_attention = spy
    try:
        encode(ModelInterface(model), inputs)
    finally:
        torch.nn.functional.scaled_dot_product_attention = original
        handle.remove()
        done.remove()
    inside, keys = False, []
    for event in handed:
        if isinstance(event, str):
            inside = event == "begin"
        elif inside:
            keys.append(event.mean(1).flatten(0, 1))
    keys = torch.cat(keys)
    expected = made_of @ keys / made_of.sum(1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(torch.cat(encoding.keys), expected, rtol=1e-4, atol=1e-5)
