"""Floating-point operations of a call.

FLOPs are those of `torch.utils.flop_counter.FlopCounterMode` over the same call, with a formula added for the
CPU's flash attention, which it would leave out. It counts attention without regard to the causal mask.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

FLOP_COUNTING = (
    "torch.utils.flop_counter.FlopCounterMode over one training_step with SDPA; CPU flash attention by "
    "torch's own attention formulas, registered through custom_mapping; causal masks not deducted"
)


def flops_of(run: Callable[[], object]) -> int:
    """The floating-point operations of a call, backward included where it goes backward."""
    cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    formulas = {
        cpu: lambda query, key, value, *_, **__: sdpa_flop_count(query, *with_heads_of(query, key, value)),
        backward: lambda gradient, query, key, value, *_, **__: sdpa_backward_flop_count(
            gradient, query, *with_heads_of(query, key, value)
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        run()
    return counter.get_total_flops()


def with_heads_of(query: torch.Size, *shapes: torch.Size) -> list[tuple[int, ...]]:
    """Shapes of keys and values `(B, H', S, d)` whose heads are shared by groups of the query's, with a head for each:
    the formulas of torch before 2.11 know no groups."""
    return [(shape[0], query[1], *shape[2:]) for shape in shapes]
