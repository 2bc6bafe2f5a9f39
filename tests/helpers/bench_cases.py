"""A bench small enough for a test."""

from __future__ import annotations

from hf_dualspeed.bench import measure as bench
from hf_dualspeed.bench.options import BenchArguments

# 16 visual tokens: 8 of them stay at a ratio of 0.5.
TINY = {"image_size": 56, "text_tokens": 12, "hidden_size": 64, "layers": 2}
FLAGS = [word for key, value in TINY.items() for word in (f"--{key.replace('_', '-')}", str(value))]


def tiny_bench(folder, checkpointing="off", like=None, **options):
    arguments = BenchArguments(**{**TINY, "shape": ["llava-1.5"], "batch": 4, "pruning_ratio": 0.5, **options})
    return bench.Bench(arguments, like or arguments.shapes()[0], checkpointing, str(folder))
