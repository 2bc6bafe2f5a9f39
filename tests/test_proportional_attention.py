"""log(size) on the keys: equal to attention over the tokens that they stand for, under every implementation."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface
from transformers.models.llama.modeling_llama import eager_attention_forward

from hf_dualspeed.proportional_attention import ATTRIBUTE, EXTRA_WIDTH, KeySizes, change_call
from hf_dualspeed.attention_capture import change_calls

HEADS, GROUPS, WIDTH, QUERIES = 4, 2, 16, 6
REPEATS = ((1, 3, 2, 5), (4, 1, 1, 5))  # how many tokens each of K distinct ones stands for: the same sum in each row


def flash(module, query, key, value, attention_mask=None, scaling=None, softcap=None, sliding_window=None, **options):
    """FlashAttention's contract, on a CPU: one head width for all, a mask of what is no padding, windows by number."""
    assert query.shape[-1] == key.shape[-1] == value.shape[-1] <= 256
    scores = query @ key.repeat_interleave(HEADS // GROUPS, 1).mT * scaling
    if attention_mask is not None:
        assert attention_mask.dim() == 2
        scores = scores.masked_fill(~attention_mask[:, None, None].bool(), float("-inf"))
    states = scores.softmax(-1) @ value.repeat_interleave(HEADS // GROUPS, 1)
    return states.transpose(1, 2), None


AttentionInterface.register("flash_for_sizes", flash)


class Layer(nn.Module):
    """An attention layer that looks its function up as those of transformers do."""

    is_causal = False
    num_key_value_groups = HEADS // GROUPS

    def __init__(self, implementation: str, sizes: KeySizes | None = None):
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation=implementation)
        self.eval()
        if sizes is not None:
            self.__dict__[ATTRIBUTE] = sizes

    def forward(self, query, key, value, mask=None, **options):
        function = AttentionInterface().get_interface(self.config._attn_implementation, eager_attention_forward)
        return function(self, query, key, value, mask, scaling=WIDTH**-0.5, **options)[0]


def tensors(count: int, width: int = WIDTH, dtype=torch.float32):
    torch.manual_seed(0)
    query = torch.randn(2, HEADS, QUERIES, width, dtype=dtype)
    key, value = (torch.randn(2, GROUPS, count, width, dtype=dtype) for _ in range(2))
    return query, key, value


def repeated(states: torch.Tensor) -> torch.Tensor:
    """Each of the K states as often as it stands for a token, `(B, H, N, d)`."""
    return torch.stack([row.repeat_interleave(torch.tensor(n), 1) for row, n in zip(states, REPEATS, strict=True)])


def key_sizes(**options) -> KeySizes:
    change_calls(change_call)
    return KeySizes(torch.tensor(REPEATS).float().log(), **options)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention", "flash_for_sizes"])
def test_few_keys_with_sizes_equal_the_many_that_they_stand_for(implementation):
    states = tensors(4)
    short, whole = Layer(implementation, key_sizes()), Layer("sdpa")
    expected = whole(states[0], *map(repeated, states[1:]))
    torch.testing.assert_close(short(*states), expected, rtol=1e-5, atol=1e-5)
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
        torch.testing.assert_close(short, whole, rtol=1e-5, atol=1e-5)
