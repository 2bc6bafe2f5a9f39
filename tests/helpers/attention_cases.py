"""An attention layer of its own, and keys that repeat."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.models.llama.modeling_llama import eager_attention_forward

from hf_dualspeed.models.attention import change_calls
from hf_dualspeed.pruning.proportional_attention import ATTRIBUTE, KeySizes, change_call

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
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


def key_sizes(device: str = "cpu") -> KeySizes:
    change_calls(change_call)
    sizes = KeySizes()
    sizes.set(torch.tensor(REPEATS, device=device).float().log())
    return sizes
