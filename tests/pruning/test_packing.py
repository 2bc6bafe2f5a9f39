"""Batches without padding: each sample of a packed row gets the logits that it has by itself."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, batch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask
from transformers.modeling_flash_attention_utils import _is_packed_sequence

from hf_dualspeed import AutoPruner, ModeIsolator, prune_inputs
from hf_dualspeed.trainer.dual_forward import DualForward
from hf_dualspeed.trainer.schedule import FAST

ROWS = [["image", 4], [7], [2, "image", 3, "image", 5]]  # one begins with its image
SCHEMES = ("original", "compact")


def varlen_attention(module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, **kwargs):
    """FlashAttention's contract for one row, on a CPU: causal within the boundaries it is given."""
    assert attention_mask is None
    assert kwargs["max_length_q"] >= cu_seq_lens_q.diff().max()
    groups = query.shape[1] // key.shape[1]
    parts = []
    for begin, end in zip(cu_seq_lens_q.tolist(), cu_seq_lens_q.tolist()[1:], strict=False):
        q, k, v = (t[:, :, begin:end] for t in (query, key, value))
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        parts.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling))
    return torch.cat(parts, 2).transpose(1, 2), None


def answering_attention(
    module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, position_ids=None, **kwargs
):
    """FlashAttention's contract in generation from one row: boundaries, where it is given any, are of these queries."""
    rows, _, length, _ = query.shape
    assert attention_mask is None
    if cu_seq_lens_q is None:
        assert not _is_packed_sequence(position_ids, rows)
    else:
        assert rows == 1
        assert cu_seq_lens_q.tolist() == [0, length]
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    seen = torch.ones(length, key.shape[2], dtype=torch.bool).tril(key.shape[2] - length)
    states = torch.nn.functional.scaled_dot_product_attention(query, key, value, seen, scale=scaling)
    return states.transpose(1, 2), None


for name, function in (("flash_on_cpu", varlen_attention), ("flash_answering", answering_attention)):
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, flash_attention_mask)


def model_of(name, attention):
    model = FAMILIES[name].model()
    if attention.startswith("flash"):
        model.config.get_text_config()._attn_implementation = attention
        for module in model.modules():
            if hasattr(module, "config") and module.config is model.config.get_text_config():
                module.config._attn_implementation = attention
    else:
        model.set_attn_implementation(attention)
    return model


def singles(name, model):
    return [batch(FAMILIES[name], model, [row], seeds=[seed]) for seed, row in enumerate(ROWS)]


def positions(model, sample):
    """Text positions, and for M-RoPE the three axes behind them."""
    ids = sample["input_ids"]
    text = torch.arange(ids.shape[1])[None]
    if not hasattr(model.model, "get_rope_index"):
        return text
    grid = sample.get("image_grid_thw")
    kinds = sample["mm_token_type_ids"]
    axes, _ = model.model.get_rope_index(ids, kinds, grid, attention_mask=sample["attention_mask"])
    return torch.cat([text[None], axes])


def packed(model, samples):
    """The samples in one row, told apart by their positions."""
    row = {"position_ids": torch.cat([positions(model, s) for s in samples], -1)}
    for key in {key for sample in samples for key in sample} - {"attention_mask"}:
        by_token = key in ("input_ids", "labels", "mm_token_type_ids", "token_type_ids")
        row[key] = torch.cat([sample[key] for sample in samples if key in sample], dim=1 if by_token else 0)
    return row


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_on_cpu"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_a_packed_sample_is_as_alone(name, attention, scheme, isolated):
    model = model_of(name, attention)
    isolator = ModeIsolator.for_model(model, 2) if isolated else None
    if isolated:
        torch.nn.init.normal_(isolator.prompt)
    pruner = AutoPruner.from_name("divprune", pruning_ratio=0.5)
    samples = singles(name, model)
    short = prune_inputs(model, packed(model, samples), pruner, isolator, scheme)
    with torch.no_grad():
        together = model(**short).logits[0]
        reference = model_of(name, "sdpa")
        alone = [reference(**prune_inputs(reference, s, pruner, isolator, scheme)).logits[0] for s in samples]
    assert len(together) == sum(map(len, alone)) < sum(s["input_ids"].shape[1] for s in samples)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-3, atol=1e-5)


@pytest.fixture
def forgotten():
    """Forgets what was compiled of FlexAttention, which counts against a limit in later tests."""
    yield
    torch._dynamo.reset()


def fast_logits(model, inputs, padding_free, scheme="original", **options):
    """Logits `(M, V)` of a fast pass with an isolator, and the number of its tokens."""
    torch.manual_seed(0)
    forward = DualForward(
        AutoPruner.from_name("divprune", pruning_ratio=0.5),
        ModeIsolator.for_model(model, 2),
        scheme,
        padding_free=padding_free,
        **options,
    )
    forward.attach(model)
    with torch.no_grad(), forward.in_mode(FAST) as done:
        logits = model(**inputs).logits
    return logits, done.tokens


@pytest.mark.parametrize(("side", "proportional"), [("right", True), ("left", False)])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("name", "attention"),
    [("llava", a) for a in ("sdpa", "eager", "flash_on_cpu", "flex_attention")]
    + [("qwen2_5_vl", "flash_on_cpu"), ("gemma3", "eager")],
)
@pytest.mark.usefixtures("forgotten")
def test_padded_samples_in_one_row_are_as_padded(name, attention, scheme, side, proportional):
    reference = model_of(name, "sdpa")
    inputs = batch(FAMILIES[name], reference, ROWS, side)
    options = {"scheme": scheme, "proportional_attention": proportional}
    padded, many = fast_logits(reference, inputs, False, **options)
    row, tokens = fast_logits(model_of(name, attention), inputs, True, **options)
    assert tokens < many
    torch.testing.assert_close(row, padded, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_sliding_window_reaches_as_far_in_one_row(scheme):
    model = model_of("aya_vision", "sdpa")
    inputs = batch(FAMILIES["aya_vision"], model, ROWS)
    wide, _ = fast_logits(model, inputs, True, scheme)
    model.config.get_text_config().sliding_window = 4
    padded, _ = fast_logits(model, inputs, False, scheme)
    row, _ = fast_logits(model, inputs, True, scheme)
    torch.testing.assert_close(row, padded, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(row, wide, rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("forgotten")
def test_flex_attention_cannot_say_what_token_types_do():
    model = model_of("gemma3", "flex_attention")
    with pytest.raises(ValueError, match="attention that depends on `token_type_ids` do not go together"):
        fast_logits(model, batch(FAMILIES["gemma3"], model, ROWS), True)


@pytest.mark.parametrize("boundaries", [False, True])
def test_boundaries_given_or_found(boundaries):
    model = model_of("llava", "flash_on_cpu")
    samples = singles("llava", model)
    row = packed(model, samples)
    if boundaries:
        lengths = torch.tensor([s["input_ids"].shape[1] for s in samples])
        ends = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int()
        row |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 40, "max_length_k": 40}
    pruner = AutoPruner.from_name("divprune", pruning_ratio=0.5)
    short = prune_inputs(model, row, pruner)
    lengths = [prune_inputs(model, s, pruner)["input_ids"].shape[1] for s in samples]
    assert short["cu_seq_lens_q"].diff().tolist() == lengths
    assert short["attention_mask"] is None


def test_several_packed_rows():
    model = model_of("llava", "sdpa")
    samples = singles("llava", model)
    rows = [packed(model, samples[:2]), packed(model, samples[2:])]
    longest = max(r["input_ids"].shape[1] for r in rows)
    # What is left of a row is a sample of its own, of padding.
    for row in rows:
        gap = longest - row["input_ids"].shape[1]
        row["position_ids"] = torch.cat([row["position_ids"], torch.arange(gap)[None]], 1)
        row["input_ids"] = torch.nn.functional.pad(row["input_ids"], (0, gap))
        row["labels"] = torch.nn.functional.pad(row["labels"], (0, gap), value=-100)
    both = {key: torch.cat([r[key] for r in rows]) for key in rows[0]}
    pruner = AutoPruner.from_name("divprune", pruning_ratio=0.5)
    short = prune_inputs(model, both, pruner)
    with torch.no_grad():
        logits = model(**short).logits
        alone = [model(**prune_inputs(model, s, pruner)).logits[0] for s in samples]
    torch.testing.assert_close(logits[0, : len(alone[0])], alone[0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(logits[1, : len(alone[2])], alone[2], rtol=1e-3, atol=1e-5)
    both["attention_mask"] = None
    model.config.get_text_config()._attn_implementation = "flash_on_cpu"
    with pytest.raises(ValueError, match="one row, got 2 rows"):
        prune_inputs(model, both, pruner)


def test_a_packed_training_pass_counts_the_samples_losses():
    model = model_of("llava", "sdpa")
    samples = singles("llava", model)
    forward = DualForward(AutoPruner.from_name("divprune", pruning_ratio=0.5), None, "original")
    forward.attach(model)
    logits, targets = [], []
    for inputs in (packed(model, samples), *samples):
        with forward.in_mode(FAST):
            out = model(**inputs)
        logits.append(out.logits)
        targets.append(out.targets)
    assert torch.equal(targets[0], torch.cat(targets[1:]))
    torch.testing.assert_close(logits[0], torch.cat(logits[1:]), rtol=1e-3, atol=1e-5)


@pytest.fixture
def boundaries(monkeypatch):
    """The boundaries of each call of FlashAttention."""
    seen = []

    def spy(*args, cu_seq_lens_q=None, **kwargs):
        seen.append(cu_seq_lens_q.tolist())
        return varlen_attention(*args, cu_seq_lens_q=cu_seq_lens_q, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_on_cpu", spy)
    return seen


def test_isolator_at_the_start_of_a_row_is_no_sample_of_its_own(boundaries):
    """FlashAttention reads repeated first positions in a row without padding as boundaries, unless told otherwise."""
    model = model_of("llava", "flash_on_cpu")
    (sample, *_) = singles("llava", model)
    sample = {key: value[:, 1:] if value.dim() == 2 else value for key, value in sample.items()}  # the image is first
    isolator = ModeIsolator.for_model(model, 3)
    pruner = AutoPruner.from_name("divprune", pruning_ratio=0.5)
    short = prune_inputs(model, sample, pruner, isolator, position_ids="original")
    assert short["position_ids"][0, :4].tolist() == [0, 0, 0, 0]
    assert torch.isfinite(model(**short).loss)
    assert boundaries[0] == [0, short["input_ids"].shape[1]]


def test_gaps_between_original_positions_begin_no_sample(boundaries):
    """Without an isolator, too."""
    model = model_of("llava", "flash_on_cpu")
    (sample, *_) = singles("llava", model)
    pruner = AutoPruner.from_name("divprune", pruning_ratio=0.5)
    short = prune_inputs(model, sample, pruner, position_ids="original")
    assert short["position_ids"].diff().max() > 1
    model(**short)
    assert boundaries[0] == [0, short["input_ids"].shape[1]]


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize("isolated", [True, False])
def test_boundaries_of_a_prompt_are_those_of_its_own_call(isolated, proportional, options):
    """Not of single tokens that are answered, nor of a beam's rows."""
    answers, pruner = [], AutoPruner.from_name("divprune", pruning_ratio=0.5)
    for attention in ("sdpa", "flash_answering"):
        model = model_of("llava", attention)
        sample = batch(FAMILIES["llava"], model, [["image", 4]], labels=False)
        isolator = ModeIsolator.for_model(model, 2) if isolated else None
        short = prune_inputs(model, sample, pruner, isolator, "original", proportional_attention=proportional)
        asked = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": options.get("num_beams", 1)}
        asked |= options if attention == "flash_answering" else {}
        answers.append(model.generate(**short, **asked, output_logits=True, return_dict_in_generate=True).logits)
    torch.testing.assert_close(*answers, rtol=1e-3, atol=1e-5)


MIXING = {
    "gemma3": "attention that depends on `token_type_ids`",
    "gemma4": "attention that depends on `mm_token_type_ids`",
    "gemma4_unified": "attention that depends on `mm_token_type_ids`",
    "molmo2": "attention that depends on `mm_token_type_ids`",
    "inkling": "layers of kind 'hybrid', layers of kind 'hybrid_sliding'",
    "mistral_large4": "layers of kind 'indexed_attention'",
    "minimax_m3_vl": "layers of kind 'minimax_m3_sparse'",
    "lfm2_vl": "layers of kind 'conv'",
}


def row_of(model, inputs):
    """The real tokens of a padded batch in one row, told apart by their positions."""
    real = inputs["attention_mask"].bool()
    row = {key: value[real][None] if value.shape == real.shape else value for key, value in inputs.items()}
    del row["attention_mask"]
    return row | {"position_ids": (real.long().cumsum(1) - 1)[real][None]}


@pytest.mark.parametrize("name", MIXING)
def test_attention_that_cannot_be_told_the_boundaries(name):
    pruner = AutoPruner.from_name("divprune", pruning_ratio=0.5)
    model = FAMILIES[name].model()
    row = row_of(model, batch(FAMILIES[name], model, ROWS))
    with pytest.raises(ValueError, match=f"{MIXING[name]} do not go together.*Pad the batch instead of packing it"):
        prune_inputs(model, row, pruner, position_ids="compact")


def test_boundaries_of_flash_attention_reach_no_layer_of_another_kind():
    model = FAMILIES["lfm2_vl"].model()
    row = row_of(model, batch(FAMILIES["lfm2_vl"], model, ROWS))
    model.config.get_text_config()._attn_implementation = "flash_on_cpu"
    with pytest.raises(ValueError, match="layers of kind 'conv' do not go together"):
        prune_inputs(model, row, AutoPruner.from_name("divprune", pruning_ratio=0.5))


# Every other layer of Cohere2 is local, three of four of Llama 4 see chunks, and Mistral, in Idefics 2, names no kinds.
@pytest.mark.parametrize(
    ("name", "option"),
    [("aya_vision", "sliding_window"), ("llama4", "attention_chunk_size"), ("idefics2", "sliding_window")],
)
def test_layers_of_packed_samples_that_see_few_tokens(name, option):
    """They count places, so that is only right where the places of a sample have no gaps."""
    model = FAMILIES[name].model()
    config = model.config.get_text_config()
    assert getattr(config, option)
    pruner, inputs = AutoPruner.from_name("divprune", pruning_ratio=0.5), batch(FAMILIES[name], model, ROWS)
    results = {}
    for reach in (1000, 4):
        setattr(config, option, reach)
        padded = prune_inputs(model, inputs, pruner, position_ids="compact")
        row = prune_inputs(model, row_of(model, inputs), pruner, position_ids="compact")
        with torch.no_grad():
            results[reach] = model(**padded).logits[padded["attention_mask"].bool()]
            torch.testing.assert_close(model(**row).logits[0], results[reach], rtol=1e-3, atol=1e-5)
    assert not torch.allclose(results[4], results[1000], rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="layers that see 4 tokens .* need position_ids='compact'"):
        prune_inputs(model, row_of(model, inputs), pruner, position_ids="original")
