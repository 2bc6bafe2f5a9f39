"""What the conformance checks need of a model family, and mixed batches written without a processor.

A batch is rows of segments: a number is so many text tokens, `"image"`, `"video"` or `"audio"` one of these. Texts,
pictures and sounds follow from the row's seed alone, so that a row is the same in every batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

# Ids of tiny vocabularies: specials below TEXT_IDS, ordinary text in it, placeholders above. Models have VOCABULARY.
PAD, BOS, EOS = 0, 1, 2
AUDIO = 62  # the placeholder of audio
TEXT_IDS = range(10, 60)
VOCABULARY = 100
HIDDEN = 32

# Pixels and the placeholder tokens of each image (or clip), in the order of the batch; from the seeds of each row.
Pixels = Callable[[PreTrainedModel, list[list[int]]], tuple[dict[str, torch.Tensor], list[list[int]]]]


@dataclass(frozen=True)
class Family:
    """A model family of transformers, tiny.

    Args:
        name (`str`): its folder in transformers.
        build: makes the model from its config alone; random weights, float32.
        images (`Pixels`, *optional*): image inputs. Sizes vary with the seed where the family allows it.
        videos (`Pixels`, *optional*): the same for clips.
        type_ids (`tuple[str, ...]`): which of "token_type_ids", "mm_token_type_ids" its processor makes.
        masks_tokens (`bool`): whether a padding mask can hide single tokens, so that the masked full-length forward is
            a reference for pruning.
        rows_alone (`bool`): whether a sample's result is the same alone and in a batch.
        trains_encoder (`bool`): whether gradients flow from visual tokens.
        video_type (`int`): what its type ids call a video token.
        no_beams (`tuple[str, ...]`): modalities for which transformers itself cannot search with several beams.
        generates (`bool`): whether its `generate` takes encoded images, or input embeddings in case of audio.
        position_ids (`str`): the scheme it can be pruned with.
        audios (`Pixels`, *optional*): the same for sounds.
        prunes_audio (`bool`): whether sounds are pruned rather than left whole.
        notes (`str`): for the table of supported models.
    """

    name: str
    build: Callable[[], PreTrainedModel]
    images: Pixels | None = None
    videos: Pixels | None = None
    type_ids: tuple[str, ...] = ()
    masks_tokens: bool = True
    rows_alone: bool = True
    trains_encoder: bool = True
    video_type: int = 2
    audios: Pixels | None = None
    prunes_audio: bool = True
    no_beams: tuple[str, ...] = ()
    generates: bool = True
    position_ids: str = "original"
    notes: str = ""

    def model(self, seed: int = 0) -> PreTrainedModel:
        torch.manual_seed(seed)
        return self.build().eval()


# Two images, none, and one, beside texts of different lengths.
MIXED = [[3, "image", 5, "image", 4], [6], ["image", 9]]
MIXED_VIDEO = [[3, "video", 5], [6], [2, "video", 9]]
MIXED_AUDIO = [[3, "audio", 5, "audio", 4], [6], ["audio", 9]]
MIXED_BOTH = [[3, "image", 5, "audio", 4], [6], ["audio", 2, "image", 9]]


def batch(
    family: Family,
    model: PreTrainedModel,
    rows: Sequence[Sequence[int | str]] = MIXED,
    side: str = "right",
    labels: bool = True,
    seeds: Sequence[int] | None = None,
) -> dict[str, torch.Tensor]:
    """A batch as the family's processor would make it, with every third text token supervised."""
    seeds = range(len(rows)) if seeds is None else seeds
    inputs, spans = {}, {}
    for kind, make in (("image", family.images), ("video", family.videos), ("audio", family.audios)):
        wanted = [
            [100 * seed + place for place, segment in enumerate(row) if segment == kind]
            for seed, row in zip(seeds, rows, strict=True)
        ]
        if any(wanted):
            pixels, spans[kind] = make(model, wanted)
            inputs |= pixels
    written = {kind: iter(tokens) for kind, tokens in spans.items()}
    types = {"image": 1, "video": family.video_type, "audio": 3}
    texts = [write(row, seed, written, types) for row, seed in zip(rows, seeds, strict=True)]
    longest = max(len(ids) for ids, _ in texts)
    columns = {"input_ids": [], "attention_mask": [], "labels": [], "kinds": []}
    for ids, kinds in texts:
        gap = longest - len(ids)
        supervised = [t if k == 0 and i % 3 == 2 else -100 for i, (t, k) in enumerate(zip(ids, kinds, strict=True))]
        for key, values, fill in (
            ("input_ids", ids, PAD),
            ("attention_mask", [1] * len(ids), 0),
            ("labels", supervised, -100),
            ("kinds", kinds, 0),
        ):
            columns[key].append(values + [fill] * gap if side == "right" else [fill] * gap + values)
    tensors = {key: torch.tensor(value) for key, value in columns.items()}
    kinds = tensors.pop("kinds")
    if not labels:
        tensors.pop("labels")
    for name in family.type_ids:
        tensors[name] = kinds
    return {**tensors, **inputs}


def write(row: Sequence[int | str], seed: int, written: dict, types: dict[str, int]) -> tuple[list[int], list[int]]:
    """Ids of one row and the kind of each token: 0 text, else of `types` (the placeholders only)."""
    draw = torch.Generator().manual_seed(seed)
    ids, kinds = [BOS], [0]
    for segment in row:
        if isinstance(segment, int):
            new = torch.randint(TEXT_IDS.start, TEXT_IDS.stop, (segment,), generator=draw).tolist()
            kinds += [0] * segment
        else:
            new = next(written[segment])
            kinds += [(types[segment] if t >= TEXT_IDS.stop else 0) for t in new]
        ids += new
    return ids, kinds


def noise(shape: Sequence[int], seed: int) -> torch.Tensor:
    """Random pixels that follow from the seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
