"""log(size) on the keys: equal to attention over the tokens that they stand for, under every implementation."""

from __future__ import annotations

import copy
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from attention_cases import CLOSE, GROUPS, QUERIES, REPEATS, WIDTH, Layer, flash, key_sizes, repeated, tensors
from families import FAMILIES, MIXED, batch
from layer_reference import deep
from peft import LoraConfig, get_peft_model
from transformers import AttentionInterface
from transformers.models.unlimited_ocr.modeling_unlimited_ocr import UnlimitedOcrDynamicReferenceSlidingWindowLayer

from hf_dualspeed import AutoPruner, prune_inputs, prune_visual_tokens
from hf_dualspeed.models.attention import change_calls
from hf_dualspeed.models.interface import ModelInterface
from hf_dualspeed.pruning.encoding import encode as encodings_of
from hf_dualspeed.pruning.proportional_attention import ATTRIBUTE, CARRIED, KeySizes, change_call, widened
from hf_dualspeed.trainer.dual_forward import DualForward
from hf_dualspeed.trainer.schedule import FAST

AttentionInterface.register("flash_for_sizes", flash)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention", "flash_for_sizes"])
def test_few_keys_with_sizes_equal_the_many_that_they_stand_for(implementation):
    states = tensors(4)
    short, whole = Layer(implementation, key_sizes()), Layer("sdpa")
    expected = whole(states[0], *map(repeated, states[1:]))
    torch.testing.assert_close(short(*states), expected, **CLOSE)
    assert not torch.allclose(Layer(implementation)(*states), expected, atol=1e-3)  # without sizes it is another


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flash_for_sizes"])  # flex has no gradients on a CPU
def test_gradients_equal_those_of_the_many(implementation):
    gradients = []
    for layer, change in ((Layer(implementation, key_sizes()), lambda x: x), (Layer("sdpa"), repeated)):
        query, key, value = (state.requires_grad_() for state in tensors(4))
        out = layer(query, change(key), change(value))
        (out * torch.arange(out.numel()).view_as(out).sin()).sum().backward()
        gradients.append((query.grad, key.grad, value.grad))
    for short, whole in zip(*gradients, strict=True):
        torch.testing.assert_close(short, whole, **CLOSE)


@pytest.mark.parametrize("mask", ["boolean", "added"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_layers_own_mask_stays(implementation, mask):
    query, key, value = tensors(4)
    seen = torch.rand(2, 1, QUERIES, 4) > 0.4
    seen[..., 0] = True
    own = seen if mask == "boolean" else torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    if implementation == "eager" and mask == "boolean":
        pytest.skip("eager attention adds its mask")
    whole = torch.stack([row.repeat_interleave(torch.tensor(n), -1) for row, n in zip(seen, REPEATS, strict=True)])
    expected = Layer("sdpa")(query, repeated(key), repeated(value), whole)
    torch.testing.assert_close(Layer(implementation, key_sizes())(query, key, value, own), expected, **CLOSE)


def test_causal_attention_without_a_mask_stays_causal():
    query, key, value = tensors(QUERIES)
    log_sizes = torch.randint(1, 9, (2, QUERIES)).float().log()
    layer = Layer("sdpa", KeySizes(log_sizes))
    layer.is_causal = True
    change_calls(change_call)
    out = layer(query, key, value)
    for last in range(1, QUERIES + 1):  # a query sees nothing behind it
        part = Layer("eager", KeySizes(log_sizes[:, :last]))
        alone = part(query[:, :, last - 1 : last], key[:, :, :last], value[:, :, :last])
        torch.testing.assert_close(alone[:, 0], out[:, last - 1], **CLOSE)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("packed", [False, True])
def test_heads_too_wide_for_flash_attention_go_through_sdpa(packed, window):
    wide = 256
    query, key, value = (states.repeat(1, 1, 1, wide // WIDTH) for states in tensors(QUERIES))
    log_sizes = torch.randint(1, 9, (2, QUERIES)).float().log()
    change_calls(change_call)
    layer = Layer("flash_for_sizes", KeySizes(log_sizes))
    layer.is_causal = True
    place = torch.arange(QUERIES)
    seen = (place <= place[:, None]).expand(2, 1, -1, -1).clone()
    options, mask = {}, torch.ones(2, QUERIES, dtype=torch.long)
    if window is not None:
        options["sliding_window"] = window
        seen &= place > place[:, None] - window
    if packed:
        ends = torch.tensor([0, 2, QUERIES], dtype=torch.int32)
        options |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
        seen &= (place < 2) == (place < 2)[:, None]
    else:
        mask[1, -1] = 0
        seen[1, ..., -1] = False
    bias = torch.where(seen, log_sizes[:, None, None], torch.finfo(torch.float32).min)
    expected = Layer("sdpa")(query, key, value, bias)
    out = layer(query, key, value, None if packed else mask, **options)
    torch.testing.assert_close(out, expected, **CLOSE)


def test_half_precision_loses_no_size():
    """In bfloat16 the bias over the scale would be off by a tenth; in three numbers it is exact."""
    query, key, value = (state.bfloat16() for state in tensors(4))
    seen = []
    function = lambda module, query, key, *rest, **options: (  # noqa: E731
        seen.append((query.double(), key.double(), options["scaling"])) or query.transpose(1, 2),
        None,
    )
    bias = torch.tensor([[0.0, 1e-3, 4.0431, 7.98], [0.1, 0.2, 0.3, 0.4]])
    widened(function, Layer("sdpa"), query, key, value, None, {}, bias)
    (query, key, scaling), width = seen[0], WIDTH
    added = (query[:, :GROUPS, :, width:] @ key[..., width:].mT) * scaling
    torch.testing.assert_close(added[:, 0, 0], bias.double(), rtol=1e-6, atol=1e-7)


def test_capped_logits_are_refused_where_the_cap_would_eat_the_size():
    with pytest.raises(ValueError, match=r"Layer caps its attention logits.*attn_implementation='eager'"):
        Layer("flash_for_sizes", key_sizes())(*tensors(4), softcap=30.0)


def test_keys_of_another_batch_are_refused():
    with pytest.raises(ValueError, match="knows the sizes of 2 samples, but is asked for those of 3"):
        key_sizes().of_keys(3, 4)


def test_a_window_of_generated_tokens_leaves_the_sizes_of_the_prompt():
    """Unlimited-OCR's cache, whose states are here what is to be added for them."""
    prompt, window = torch.arange(1.0, 6.0)[None], UnlimitedOcrDynamicReferenceSlidingWindowLayer(sliding_window=3)
    sizes = KeySizes(keeps_prompt=True)
    for generated in range(7):
        states = (prompt if not generated else torch.zeros(1, 1)).view(1, 1, -1, 1)
        keys, _ = window.update(states, states)
        sizes.set(prompt, prompt.shape[1] + generated)
        assert torch.equal(sizes.of_keys(1, keys.shape[2]), keys.view(1, -1))
    assert keys.shape[2] < sizes.total  # some were dropped


# --- in models ----------------------------------------------------------------------------------------------------


def still(model):
    """Rotary frequencies of zero: where a token stands makes no difference."""
    found = 0
    for module in model.get_decoder().modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("inv_freq"):
                buffer.zero_()
                found += 1
    assert found
    return model


@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["paligemma", "gemma3"])
def test_an_image_whose_tokens_repeat_is_its_pruned_view(name, implementation, layers, monkeypatch):
    """At any depth, where the tokens of an image see each other, and for all text behind it."""
    family, model = FAMILIES[name], still(deep(name, layers))
    model.set_attn_implementation(implementation)
    rows = [[1, "image", 7], [1, "image", 4]]
    inputs = batch(family, model, rows, "left")
    if name == "paligemma":  # which sees both ways in front of the suffix
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        inputs["token_type_ids"][:, -3:] = 1
    encode = model.model.get_image_features

    def repeating(*args, **kwargs):
        output = encode(*args, **kwargs)
        features = output.pooler_output
        pick = torch.tensor([0, 1, 1, 2, 0, 3, 3, 3, 2, 1, 1, 1, 0, 0, 3, 1])  # 4 distinct ones
        count = features.shape[-2]
        output.pooler_output = features[..., pick[:count] if count <= 16 else pick.repeat(count // 16), :]
        return output

    monkeypatch.setattr(model.model, "get_image_features", repeating)
    whole = model(**inputs)
    (encoding,) = encodings_of(ModelInterface(model), inputs)
    pruner = AutoPruner.from_name("divprune", pruning_ratio=1 - 4 / encoding.lengths[0])
    pruned = pruner(encoding.tokens())
    assert set(pruned.lengths) == {4}
    assert (pruned.sizes > 1).any()
    short = prune_inputs(model, inputs, pruner, position_ids="compact")
    text = [ids != model.config.image_token_id for ids in (inputs["input_ids"], short["input_ids"])]
    text = [found & i["attention_mask"].bool() for found, i in zip(text, (inputs, short), strict=True)]
    torch.testing.assert_close(model(**short).logits[text[1]], whole.logits[text[0]], rtol=1e-4, atol=1e-5)
    plain = prune_inputs(model, inputs, pruner, position_ids="compact", proportional_attention=False)
    assert not torch.allclose(model(**plain).logits[text[1]], whole.logits[text[0]], atol=1e-3)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_ratio_zero_is_the_plain_forward_to_the_bit(name):
    model = FAMILIES[name].model()
    inputs = batch(FAMILIES[name], model, MIXED, "left")
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        pruner = AutoPruner.from_name("divprune", pruning_ratio=0.0)
        short = prune_inputs(model, inputs, pruner, position_ids="original")
        assert CARRIED not in short["mm_encoder_outputs"]
        assert torch.equal(model(**short).logits[mask], model(**inputs).logits[mask])


@pytest.mark.parametrize("way", ["inputs", "context"])
def test_a_plain_call_after_a_pruned_one_is_plain(way):
    """Wherever it enters, and whatever its batch."""
    model = FAMILIES["llava"].model()
    inputs = batch(FAMILIES["llava"], model)
    pruner = AutoPruner.from_name("divprune", pruning_ratio=0.75)
    text = {"input_ids": inputs["input_ids"][:2, :4]}
    plain = [model(**inputs).logits, model(**text).logits, model.model(**text)[0], model.get_decoder()(**text)[0]]

    def pruned():
        if way == "inputs":
            return model(**prune_inputs(model, inputs, pruner)).logits
        with prune_visual_tokens(model, pruner):
            return model(**inputs).logits

    calls = (
        lambda: model(**inputs).logits,
        lambda: model(**text).logits,
        lambda: model.model(**text)[0],
        lambda: model.get_decoder()(**text)[0],
    )
    first = pruned()
    for call, expected in zip(calls, plain, strict=True):
        assert torch.equal(call(), expected)
        assert torch.equal(pruned(), first)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(**prune_inputs(copied, inputs, pruner)).logits, first)
    assert torch.equal(copied(**inputs).logits, plain[0])
    assert not any(CARRIED in name or ATTRIBUTE in name for name in model.state_dict())


def test_a_call_that_failed_leaves_nothing_behind():
    model = FAMILIES["llava"].model()
    inputs = batch(FAMILIES["llava"], model)
    pruner = AutoPruner.from_name("divprune", pruning_ratio=0.75)
    plain, pruned = model(**inputs).logits, model(**prune_inputs(model, inputs, pruner)).logits
    for error in (ZeroDivisionError, KeyboardInterrupt):

        def fail(*call, error=error):
            raise error

        handle = model.get_decoder().layers[-1].register_forward_hook(fail)
        with pytest.raises(error):
            model(**prune_inputs(model, inputs, pruner))
        handle.remove()
        assert torch.equal(model(**inputs).logits, plain)
        assert torch.equal(model(**prune_inputs(model, inputs, pruner)).logits, pruned)


def test_another_thread_is_refused_while_the_model_runs():
    sizes, errors = KeySizes(), []
    assert sizes.take("a")
    assert not sizes.take("b")  # a call within a call

    def other():
        with pytest.raises(RuntimeError, match="running in another thread") as caught:
            sizes.take("c")
        errors.append(caught.value)

    thread = Thread(target=other)
    thread.start()
    thread.join()
    assert len(errors) == 1


@pytest.mark.parametrize("returned", ["dict", "tuple", "context"])
def test_a_cache_knows_the_sizes_of_its_prompt(returned):
    """Also for a loop of one's own: decoding by hand equals the whole sequence at once, and so does a later turn."""
    model = FAMILIES["llava"].model()
    family, pruner = FAMILIES["llava"], AutoPruner.from_name("divprune", pruning_ratio=0.75)
    first, later = (batch(family, model, [["image", 3]], labels=False, seeds=[seed]) for seed in (0, 1))
    # transformers counts the tokens before a later turn, so positions are counted, too.
    short = [prune_inputs(model, inputs, pruner, position_ids="compact") for inputs in (first, later)]
    ids = torch.cat([s["input_ids"] for s in short], 1)
    features = [s["mm_encoder_outputs"]["image"].pooler_output for s in short]
    sizes = torch.cat([s["mm_encoder_outputs"][CARRIED] for s in short], 1)
    outputs = copy.copy(short[0]["mm_encoder_outputs"]["image"])
    outputs.pooler_output = [*features[0], *features[1]]
    whole = model(input_ids=ids, mm_encoder_outputs={"image": outputs, CARRIED: sizes}).logits
    options = {"use_cache": True, "return_dict": returned != "tuple"}
    if returned == "context":
        with prune_visual_tokens(model, pruner, position_ids="compact"):
            out = model(**first, use_cache=True)
    else:
        out = model(**short[0], **options)
    cache = out[1] if returned == "tuple" else out.past_key_values
    length = short[0]["input_ids"].shape[1]
    after = model(
        input_ids=short[1]["input_ids"], mm_encoder_outputs=short[1]["mm_encoder_outputs"], past_key_values=cache
    )
    torch.testing.assert_close(after.logits, whole[:, length:], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="called with 2 tokens, but with the sizes of"):
        model(input_ids=ids[:, :2], mm_encoder_outputs=short[1]["mm_encoder_outputs"])


def test_through_peft_and_at_either_entrance():
    model = FAMILIES["llava"].model()
    inputs = batch(FAMILIES["llava"], model, MIXED, "left", labels=False)
    pruner = AutoPruner.from_name("divprune", pruning_ratio=0.75)
    expected = model(**prune_inputs(model, inputs, pruner)).logits
    options = {"max_new_tokens": 4, "do_sample": False}
    answer = model.generate(**prune_inputs(model, inputs, pruner), **options)
    adapted = get_peft_model(model, LoraConfig(target_modules=r".*language_model.*\.(q_proj|v_proj)"))
    torch.testing.assert_close(adapted(**prune_inputs(adapted, inputs, pruner)).logits, expected)
    assert torch.equal(adapted.generate(**prune_inputs(adapted, inputs, pruner), **options), answer)
    with prune_visual_tokens(adapted, pruner):
        torch.testing.assert_close(adapted(**inputs).logits, expected)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_5_vl"])
def test_generation_with_a_cache_is_that_without(name, beams, cache):
    """Also beyond a sliding window, where the cache has lost the first tokens (Gemma 3's is of 4096, here of 8)."""
    family, model = FAMILIES[name], FAMILIES[name].model()
    if name == "gemma3":
        config = copy.deepcopy(model.config)
        config.text_config.sliding_window = 8
        config.text_config.layer_types = ["sliding_attention", "full_attention"]
        config.text_config.num_hidden_layers = 2
        torch.manual_seed(0)
        model = type(model)(config).eval()
    inputs = batch(family, model, [["image", 9]], "left", labels=False)
    pruner = AutoPruner.from_name("divprune", pruning_ratio=0.75)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "num_beams": beams}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    kind = {"cache_implementation": "static"} if cache == "static" else {}
    cached = model.generate(**prune_inputs(model, inputs, pruner), **options, **kind)
    anew = model.generate(**prune_inputs(model, inputs, pruner), **options, use_cache=False)
    plain = model.generate(**prune_inputs(model, inputs, pruner, proportional_attention=False), **options)
    assert torch.equal(cached.sequences[:, -12:], anew.sequences[:, -12:])
    torch.testing.assert_close(cached.logits, anew.logits, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(cached.logits[0], plain.logits[0], atol=1e-3)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_recomputed_activations_have_the_same_sizes(implementation, reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = deep("llava").train()
        model.set_attn_implementation(implementation)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        forward = DualForward(AutoPruner.from_name("divprune", pruning_ratio=0.75), None, "compact")
        forward.attach(model)
        with forward.in_mode(FAST):
            out = model(**batch(FAMILIES["llava"], model))
            F.cross_entropy(out.logits, out.targets).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_compiled_layers_see_the_sizes_of_each_pass():
    model, compiled = deep("llava", 2), deep("llava", 2)
    for layer in compiled.get_decoder().layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    inputs = batch(FAMILIES["llava"], model)
    for ratio in (0.75, 0.5, 0.0):
        pruner = AutoPruner.from_name("divprune", pruning_ratio=ratio)
        results = []
        for each in (model, compiled):
            forward = DualForward(pruner, None, "compact")
            forward.attach(each)
            with forward.in_mode(FAST):
                out = each(**inputs)
                F.cross_entropy(out.logits, out.targets).backward()
            forward.detach()
            weight = each.get_decoder().layers[0].self_attn.k_proj.weight
            results.append((out.logits, weight.grad))
            each.zero_grad()
        torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_a_model_without_transformers_attention_functions_is_refused_by_name(monkeypatch):
    model = FAMILIES["llava"].model()
    inputs = batch(FAMILIES["llava"], model)
    pruner = AutoPruner.from_name("divprune", pruning_ratio=0.75)
    # As if its layers had an attention function of their own.
    own = SimpleNamespace(get_interface=lambda implementation, default: AttentionInterface._global_mapping["sdpa"])
    monkeypatch.setattr("transformers.models.llama.modeling_llama.ALL_ATTENTION_FUNCTIONS", own)
    short = prune_inputs(model, inputs, pruner)
    with pytest.raises(ValueError, match="LlavaForConditionalGeneration does not call.*proportional_attention=False"):
        model(**short)
    with (
        pytest.raises(ValueError, match="LlavaForConditionalGeneration does not call"),
        prune_visual_tokens(model, pruner),
    ):
        model(**inputs)
    model(**prune_inputs(model, inputs, pruner, proportional_attention=False))
