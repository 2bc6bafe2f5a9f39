"""`dualspeed check`: does a model, with its processor, work with DualSpeed?"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from ..conformance import Batch, Check, check_model
from ..data.collators import VisionLanguageCollator
from ..data.media import opened, pattern
from ..hub.source import is_repo_id
from ..models.interface import ModelInterface
from ..utils.constants import POSITION_IDS
from ..utils.progress import Work
from ..utils.validation import Parser, loading

QUESTIONS = ("What is this?", "What is the difference between the two?", "What is the capital of France?")
ANSWER = "I cannot tell."
WORDS = {True: "[green]yes[/]", False: "[red]no[/]", None: "n/a"}


def main(argv: list[str]) -> int:
    """Prints the outcome of each check. Returns 1 where one failed."""
    options = parse(argv)
    if not Path(options.model).is_dir() and not is_repo_id(options.model):
        raise FileNotFoundError(f"`model` is {options.model!r}, which is neither a folder nor a Hub repo 'user/name'.")
    images = [opened(path) for path in options.image] or [pattern(320, 240), pattern(240, 320)]
    with loading(options.model), Work(f"Loading {options.model}"):
        model = AutoModelForImageTextToText.from_pretrained(options.model, dtype=torch.float32)
    interface = ModelInterface(model)
    interface.check_protocol()
    interface.position_scheme(options.position_ids)
    with loading(options.model), Work("Loading the processor"):
        processor = AutoProcessor.from_pretrained(options.model)
    checks = check_model(model, batch_of(model, processor, images, options.position_ids))
    show(checks, type(model).__name__)
    return int(any(check.passed is False for check in checks))


def parse(argv: list[str]) -> argparse.Namespace:
    description = "Checks whether a model works with DualSpeed: forward, gradients and generation on pruned tokens."
    parser = Parser(prog="dualspeed check", description=description)
    parser.add_argument("model", help="a Hub id or a folder with model and processor")
    parser.add_argument("--image", nargs="+", default=[], help="image files; without any, patterns are drawn")
    places = "where kept tokens lie: in their own places, or renumbered (default: original)"
    parser.add_argument("--position_ids", choices=POSITION_IDS[1:], default="original", help=places)
    return parser.parse_args(argv)


def batch_of(model: PreTrainedModel, processor: ProcessorMixin, images: list[Image.Image], positions: str) -> Batch:
    """Three conversations of different lengths, with one image, two and none, padded on the left."""
    processor.tokenizer.padding_side = "left"
    collator = VisionLanguageCollator(processor)
    shown = [images[:1], [images[0], images[-1]], []]
    samples = [
        {
            "messages": [
                {"role": "user", "content": [*[{"type": "image"}] * len(pictures), {"type": "text", "text": question}]},
                {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
            ],
            "images": pictures,
        }
        for question, pictures in zip(QUESTIONS, shown, strict=True)
    ]
    inputs, alone = collator(samples), collator(samples[:1])
    return Batch(inputs, alone, masks_tokens=removal_is_masking(model, alone["input_ids"]), position_ids=positions)


@torch.no_grad()
def removal_is_masking(model: PreTrainedModel, ids: torch.Tensor) -> bool:
    """Whether masking a token has the effect of removing it, as in models of attention alone."""
    # Logits of the last 8 ids (1, 8), text of the answer, with the one at place 3 masked or removed.
    ids = ids[:1, -8:]
    places = torch.arange(ids.shape[1])
    left = places != 3
    mask = left.long()[None]
    masked = model(input_ids=ids, attention_mask=mask, position_ids=places[None]).logits[:, left]
    removed = model(input_ids=ids[:, left], attention_mask=mask[:, left], position_ids=places[None, left]).logits
    return torch.allclose(masked[:, 3:], removed[:, 3:], rtol=1e-3, atol=1e-4)


def show(checks: list[Check], name: str) -> None:
    columns = [Column("check", min_width=12), Column(name, no_wrap=True)]
    if any(check.detail for check in checks):
        columns.append(Column("why", overflow="fold"))
    table = Table(*columns)
    for check in checks:
        table.add_row(*(check.name, WORDS[check.passed], Text(check.detail))[: len(columns)])
    Console().print(table)
