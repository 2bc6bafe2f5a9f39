"""Finds the tokens of spans of a conversation's text in a processor's output.

Processors replace placeholders by visual tokens, and some add text: a BOS behind the last image, a line break at the
end. All text ends up in the call of the tokenizer, so that call is recorded and compared with the rendered text.
Shapes: B batch, S sequence.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import ProcessorMixin

from .media import shown

Span = tuple[int, int]


class TokenizerRecorder:
    """Wraps a fast tokenizer and keeps every text with its encoding."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.rows: list[tuple[str, Any]] = []

    def __call__(self, text: str | list[str] | None = None, *args: Any, **options: Any) -> Any:
        output = self.tokenizer(text, *args, **options)
        texts = [text] if isinstance(text, str) else text or []
        self.rows += zip(texts, output.encodings or [], strict=False)
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


def recorded(processor: ProcessorMixin, call: Callable[[ProcessorMixin], dict]) -> tuple[dict, list[tuple[str, Any]]]:
    """Calls a copy of the processor that records what it passes to its tokenizer.

    Returns:
        The processor's batch, and `(text, encoding)` of every tokenized text.
    """
    stand_in = copy.copy(processor)
    recorder = TokenizerRecorder(processor.tokenizer)
    stand_in.tokenizer = recorder
    return call(stand_in), recorder.rows


@dataclass(frozen=True)
class Piece:
    """A part of the rendered text between placeholders, and its possible places in the tokenized text.

    Args:
        start (`int`), end (`int`): its characters in the rendered text.
        first (`int`), last (`int`): its leftmost and rightmost possible place in the tokenized text.
    """

    start: int
    end: int
    first: int
    last: int

    def move(self, span: Span) -> Span | None:
        """The part of a rendered-text span in this piece, as characters of the tokenized text; None if there is none.

        Raises:
            ValueError: the piece has several possible places.
        """
        start, end = max(span[0], self.start), min(span[1], self.end)
        if start >= end:
            return None
        if self.first != self.last:
            raise ValueError("it could be in several places")
        return start - self.start + self.first, end - self.start + self.first


def find_pieces(text: str, tokenized: str, placeholders: Iterable[str]) -> list[Piece]:
    """Finds the pieces between the placeholders of `text`, in order, in `tokenized`.

    One search takes the leftmost place for each piece, another the rightmost. If the two agree, the piece has only one
    place, and nothing is guessed.

    Raises:
        ValueError: a piece is missing, because the processor changed the text.
    """
    pattern = "|".join(re.escape(p) for p in sorted(placeholders, key=len, reverse=True)) or "(?!)"
    cuts = [0, *(edge for match in re.finditer(pattern, text) for edge in match.span()), len(text)]
    bounds = [(start, end) for start, end in zip(cuts[::2], cuts[1::2], strict=True) if start < end]
    first, left = [], 0
    for start, end in bounds:
        first.append(tokenized.find(text[start:end], left))
        if first[-1] < 0:
            raise ValueError(f"it changed the text {text[start:end][:80]!r}")
        left = first[-1] + end - start
    last, right = [], len(tokenized)
    for start, end in reversed(bounds):
        right = tokenized.rfind(text[start:end], 0, right)
        last.append(right)
    places = zip(bounds, first, reversed(last), strict=True)
    return [Piece(start, end, leftmost, rightmost) for (start, end), leftmost, rightmost in places]


def replacements(text: str, tokenized: str, pieces: list[Piece]) -> list[Span]:
    """Spans of the tokenized text that replace placeholders; text added around the whole is left out."""
    ends = [piece.first + piece.end - piece.start for piece in pieces]
    spans = [(end, piece.first) for end, piece in zip(ends, pieces[1:], strict=False)]
    if not pieces:
        return [(0, len(tokenized))]
    if pieces[0].start:
        spans.append((0, pieces[0].first))
    if pieces[-1].end < len(text):
        spans.append((ends[-1], len(tokenized)))
    return spans


def overlaps(offsets: torch.Tensor, spans: Iterable[Span]) -> torch.Tensor:
    """Which tokens share a character with a span, `(S,)`; `offsets` `(S, 2)` holds each token's start and end."""
    found = torch.zeros(len(offsets), dtype=torch.bool)
    for start, end in spans:
        # Tokens that the tokenizer adds have offsets (0, 0) and match no span.
        found |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
    return found


def placeholders_of(processor: ProcessorMixin) -> set[str]:
    """The placeholders that templates write for images, clips and sounds."""
    names = ("image_token", "video_token", "audio_token")
    return {str(token) for name in names if (token := getattr(processor, name, None))}


def check_texts(processor: ProcessorMixin, messages: list, name: str) -> None:
    """Raises a `ValueError` where a text holds a placeholder of the processor, which would be read as a picture.

    Args:
        processor (`ProcessorMixin`): Reads the texts.
        messages (`list`): Messages as [`to_messages`] makes them, or tools.
        name (`str`): What the error calls the sample.
    """
    for key, text in texts_in(messages):
        mark = mark_in(processor, text)
        if mark is not None:
            raise ValueError(
                f"The sample ({name}) has {shown(text)} under `{key}`: {type(processor).__name__} would read "
                f"{mark!r} in it as a picture or clip. Write a part of that type where there is one; else change the "
                f"text, for example to {mark[:1] + ' ' + mark[1:]!r}."
            )


def mark_in(processor: ProcessorMixin, text: str) -> str | None:
    """What of a text the processor would read as a picture, clip or sound; None if there is nothing."""
    # Some templates write the mark in front of an image, and the processor puts the image's tokens behind it.
    marks = placeholders_of(processor) | {str(mark) for mark in [getattr(processor, "boi_token", None)] if mark}
    return next((mark for mark in marks if mark in text), None)


def texts_in(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """All texts within lists and dicts, each with the key that it stands under."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for inner, item in value.items():
            yield from texts_in(item, inner)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from texts_in(item, key)


def place(
    processor: ProcessorMixin, batch: dict, rows: list[tuple[str, Any]], samples: list[dict[str, Any]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Finds the tokens of spans of rendered texts, and the tokens that replace placeholders.

    Args:
        processor (`ProcessorMixin`): Made the batch.
        batch (`dict`): `input_ids` `(B, S)` and `attention_mask` `(B, S)`.
        rows (`list`): What [`recorded`] kept.
        samples (`list[dict]`): The `text` given to the processor, its `spans` to find, and a `name` for errors.

    Returns:
        Two masks `(B, S)`: the tokens of the spans, and those in place of placeholders.

    Raises:
        ValueError: for some sample, the places are not certain.
    """
    # Recorded texts by their token ids, with token offsets (S, 2), padding removed.
    known = defaultdict(list)
    for text, encoding in rows:
        # Read each attribute of the encoding once: it copies its list on every access.
        here = torch.tensor(encoding.attention_mask, dtype=torch.bool)
        ids, offsets = torch.tensor(encoding.ids), torch.tensor(encoding.offsets).view(-1, 2)
        known[tuple(ids[here].tolist())].append((text, offsets[here]))
    placeholders = placeholders_of(processor)
    wanted, inserted = (torch.zeros_like(batch["input_ids"], dtype=torch.bool) for _ in range(2))
    for row, sample in enumerate(samples):
        text = sample["text"]
        here = batch["attention_mask"][row].bool()
        try:
            same = known[tuple(batch["input_ids"][row][here].tolist())]
            if not same:
                raise ValueError("it does not tokenize a conversation as a whole")
            # Texts with equal tokens were recorded in batch order.
            tokenized, offsets = same.pop(0) if len(same) > 1 else same[0]
            pieces = find_pieces(text, tokenized, placeholders)
            moved = [place for span in sample["spans"] for piece in pieces if (place := piece.move(span))]
        except ValueError as error:
            raise ValueError(
                f"`processor` ({type(processor).__name__}) does not show where the conversation {text[:80]!r} "
                f"({sample['name']}) ends up among its tokens, so labels cannot be placed: {error}. Give every sample "
                "an image if the processor expects one, or use your own collator, which returns `labels`."
            ) from error
        wanted[row, here] = overlaps(offsets, moved)
        inserted[row, here] = overlaps(offsets, replacements(text, tokenized, pieces)) & ~wanted[row, here]
    return wanted, inserted
