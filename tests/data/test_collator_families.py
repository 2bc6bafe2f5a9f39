"""The collator with the processors of many families: labels, token types, truncation, videos, training."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from data_cases import mixed_batch, picture, supervised, talk
from PIL import Image
from tiny_models import clip_config, text_config
from tiny_processors import EDGE, FAMILIES, PATCH_SIZE, qwen
from transformers import (
    BatchFeature,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.video_utils import make_batched_metadata

from hf_dualspeed import AutoPruner, DualSpeedTrainer, DualSpeedTrainingArguments, prune_inputs
from hf_dualspeed.data.checking import check_samples
from hf_dualspeed.data.collators import VisionLanguageCollator, encode
from hf_dualspeed.data.conversations import to_messages
from hf_dualspeed.data.labels import find_pieces
from hf_dualspeed.data.media import open_image


def build(name: str, side: str = "right"):
    missing = [package for package in FAMILIES[name].needs if find_spec(package) is None]
    if missing:
        pytest.skip(f"{name}'s processor needs {', '.join(missing)}")
    return FAMILIES[name].build(side)


def examples_for(name: str) -> tuple[list[dict], list[list[str]]]:
    """Samples with as many images as the family's processor takes, and the answers in each."""
    answers = [["A cat, né."], ["Hi!"], ["Yes", "A much longer answer"], ["grey"]]
    rows = list(zip(mixed_batch(), answers, strict=True))
    rows = [(row, texts) for row, texts in rows if len(row["images"]) in FAMILIES[name].images]
    return [row for row, _ in rows], [texts for _, texts in rows]


# labels


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
def test_labels_are_the_assistants_words(name, side):
    processor = build(name, side)
    examples, answers = examples_for(name)
    batch = VisionLanguageCollator(processor)(examples)
    for row, texts in enumerate(answers):
        assert supervised(processor, batch, row) == "".join(text + FAMILIES[name].end for text in texts)
    kept = batch["labels"] != -100
    assert torch.equal(batch["labels"][kept], batch["input_ids"][kept])
    assert not kept[batch["attention_mask"] == 0].any()
    bos = processor.tokenizer.bos_token_id
    if bos is not None:
        assert ((batch["input_ids"] == bos).sum(1) <= 1).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_of_broken_pictures_is_a_blank_one_without_labels(name):
    processor = build(name)
    batch = VisionLanguageCollator(processor, unreadable_images="skip")([talk("q", "a", images=[b"no"])])
    assert (batch["labels"] == -100).all()
    whole = VisionLanguageCollator(processor)([talk("q", "a", images=[picture()])])
    assert batch.keys() == whole.keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_look_before_training_knows_what_is_too_long(name):
    processor = build(name)
    rows = [talk("q", "a" * letters, images=[picture(40, 30)]) for letters in (1, 2, 30)]
    exact = [VisionLanguageCollator(processor)([row])["input_ids"].shape[1] for row in rows]
    report = check_samples(rows, VisionLanguageCollator(processor, max_length=exact[0], long_samples="skip"))
    assert [(finding.index, finding.kind) for finding in report.findings] == [(1, "long"), (2, "long")]
    assert report.longest == exact[2]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_without_images(name):
    processor = build(name)
    if 0 not in FAMILIES[name].images:
        with pytest.raises(ValueError, match="images"):
            VisionLanguageCollator(processor)([talk("q", "a")])
        return
    batch = VisionLanguageCollator(processor)([talk("q", "a"), talk("Hello?", "Hi!", "Why?", "So.")])
    end = FAMILIES[name].end
    assert [supervised(processor, batch, row) for row in (0, 1)] == [f"a{end}", f"Hi!{end}So.{end}"]


@pytest.mark.parametrize("name", FAMILIES)
def test_everything_the_processor_makes_goes_through(name):
    processor = build(name)
    examples, _ = examples_for(name)
    batch = VisionLanguageCollator(processor)(examples)
    texts = [processor.apply_chat_template(to_messages(example)["messages"]) for example in examples]
    plain = encode(processor, texts, [[open_image(image) for image in example["images"]] for example in examples])
    assert set(plain) | {"labels"} == set(batch)
    for key in set(plain) - {"labels", "token_type_ids" if name == "paligemma" else None}:
        assert torch.equal(torch.as_tensor(plain[key]), torch.as_tensor(batch[key])), key


@pytest.mark.parametrize("name", FAMILIES)
def test_truncation(name):
    processor = build(name)
    examples = [talk("q", "short", images=[picture()]), talk("q", "x" * 300, images=[picture()])]
    whole = VisionLanguageCollator(processor)(examples)
    short = int(whole["attention_mask"][0].sum())
    cut = VisionLanguageCollator(processor, max_length=short + 3)(examples)
    assert cut["attention_mask"].sum(1).tolist() == [short, short + 3]
    assert supervised(processor, cut, 0) == supervised(processor, whole, 0)
    for key in ("input_ids", "labels"):
        full, part = (batch[key][1][batch["attention_mask"][1] == 1] for batch in (whole, cut))
        assert torch.equal(part, full[: short + 3])
    with pytest.raises(ValueError, match="would cut .* visual tokens"):
        VisionLanguageCollator(processor, max_length=4)(examples)


def test_paligemma_refuses_a_text_it_would_write_a_bos_into():
    with pytest.raises(ValueError, match=r"PaliGemmaProcessor.*placed: it changed the text.*every sample an im"):
        VisionLanguageCollator(build("paligemma"))(mixed_batch())


@pytest.mark.parametrize("name", ["qwen3_vl", "internvl"])
def test_type_ids_are_added_where_a_grid_asks_for_them(name):
    processor = build(name)
    reference = VisionLanguageCollator(processor)(mixed_batch())
    processor.return_mm_token_type_ids = False
    batch = VisionLanguageCollator(processor)(mixed_batch())
    assert set(batch) == set(reference)
    if name == "qwen3_vl":
        assert torch.equal(batch["mm_token_type_ids"], reference["mm_token_type_ids"])


# where pieces lie


def test_pieces_with_one_place_and_with_several():
    pieces = find_pieces("A:<i>B", "<s>A:\n<i><i>\nB", {"<i>"})
    assert [(piece.first, piece.last) for piece in pieces] == [(3, 3), (13, 13)]
    assert pieces[1].move((5, 6)) == (13, 14)
    assert pieces[0].move((5, 6)) is None
    piece = find_pieces("<i>a", "<i>aa", {"<i>"})[0]
    with pytest.raises(ValueError, match="several places"):
        piece.move((3, 4))
    with pytest.raises(ValueError, match="changed the text 'B'"):
        find_pieces("<i>B", "<i>b", {"<i>"})
    assert find_pieces("<i>", "<i><i>", {"<i>"}) == []


# training


def gemma3(processor):
    ids = processor.tokenizer.convert_tokens_to_ids
    config = Gemma3Config(
        vision_config=clip_config() | {"model_type": "siglip_vision_model", "vision_use_head": False},
        text_config=text_config(processor, model_type="gemma3_text", head_dim=8, query_pre_attn_scalar=8),
        image_token_index=ids("<image_soft_token>"),
        boi_token_index=ids("<start_of_image>"),
        eoi_token_index=ids("<end_of_image>"),
        mm_tokens_per_image=4,
    )
    model = Gemma3ForConditionalGeneration(config)
    # Starts as zeros.
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.1)
    return model


def paligemma(processor):
    text = text_config(processor, model_type="gemma", head_dim=8, initializer_range=0.1)
    config = PaliGemmaConfig(
        vision_config=clip_config() | {"model_type": "siglip_vision_model", "vision_use_head": False},
        text_config=text,
        image_token_index=processor.image_token_id,
        vocab_size=text["vocab_size"],
        hidden_size=text["hidden_size"],
        projection_dim=text["hidden_size"],
    )
    return PaliGemmaForConditionalGeneration(config)


def idefics3(processor):
    config = Idefics3Config(
        vision_config=clip_config() | {"model_type": "idefics3_vision"},
        text_config=text_config(processor, model_type="llama"),
        image_token_id=processor.image_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
        scale_factor=2,
    )
    return Idefics3ForConditionalGeneration(config)


def internvl(processor):
    vision = clip_config() | {
        "model_type": "internvl_vision",
        "image_size": [EDGE, EDGE],
        "patch_size": [PATCH_SIZE, PATCH_SIZE],
    }
    config = InternVLConfig(
        vision_config=vision,
        text_config=text_config(processor, model_type="qwen2"),
        image_token_id=processor.image_token_id,
        image_seq_length=4,
    )
    return InternVLForConditionalGeneration(config)


def qwen3_vl(processor):
    ids = processor.tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0, "mrope_interleaved": True}
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": PATCH_SIZE,
        "spatial_merge_size": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 36,
        "deepstack_visual_indexes": [0, 1],
    }
    config = Qwen3VLConfig(
        vision_config=vision,
        text_config=text_config(processor, head_dim=8, rope_parameters=rope),
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )
    return Qwen3VLForConditionalGeneration(config)


MODELS = {
    "gemma3": gemma3,
    "paligemma": paligemma,
    "idefics3": idefics3,
    "internvl": internvl,
    "qwen3_vl": qwen3_vl,
}


def model_for(name: str, processor):
    torch.manual_seed(0)
    return MODELS[name](processor).eval()


@pytest.mark.parametrize("name", MODELS)
def test_a_step_of_training_in_each_mode(name, tmp_path):
    processor = build(name)
    examples, _ = examples_for(name)
    trainer = DualSpeedTrainer(
        model_for(name, processor),
        DualSpeedTrainingArguments(
            str(tmp_path),
            pruning_ratio=0.5,
            slow_mode_ratio=0.5,
            mode_schedule="periodic",
            max_steps=2,
            per_device_train_batch_size=len(examples),
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
        ),
        train_dataset=examples,
        processing_class=processor,
        data_collator=VisionLanguageCollator(processor),
    )
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(losses) == 2
    assert np.isfinite(losses).all()


# PaliGemma's prefix


@pytest.mark.parametrize("side", ["left", "right"])
def test_paligemma_marks_the_prefix(side):
    """Everything before the first answer sees all of itself; padding is 0, and nothing is 0 after an answer."""
    processor = build("paligemma", side)
    examples, _ = examples_for("paligemma")
    batch = VisionLanguageCollator(processor)(examples)
    types, kept, real = batch["token_type_ids"], batch["labels"] != -100, batch["attention_mask"].bool()
    assert (types[~real] == 0).all()
    assert (types[kept] == 1).all()
    for row in range(len(examples)):
        first = kept[row].int().argmax()
        assert (types[row, :first] == 0).all()
        assert (types[row][real[row]].diff() >= 0).all()


def test_paligemma_answers_do_not_leak_through_a_later_question():
    """The logits that predict the first answer are those of the first turn alone."""
    processor = build("paligemma")
    model = model_for("paligemma", processor)
    turns = ("What is it?", "A cat", "And <image>?", "yes")
    long = VisionLanguageCollator(processor)(
        [talk("<image>" + turns[0], *turns[1:], images=[picture(), picture(9, 30)])]
    )
    other = {key: value.clone() for key, value in long.items()}
    last = int((long["labels"][0] != -100).nonzero()[0]) + len("A cat")
    other["input_ids"][0, last + 1 : last + 3] = processor.tokenizer.convert_tokens_to_ids("x")
    with torch.no_grad():
        logits = [model(**{k: v for k, v in b.items() if k != "labels"}).logits[0, :last] for b in (long, other)]
    torch.testing.assert_close(*logits)


def plain_forward(model, batch: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("side", ["left", "right"])
def test_paligemma_at_ratio_zero_equals_the_plain_forward(side):
    processor = build("paligemma", side)
    model = model_for("paligemma", processor)
    batch = VisionLanguageCollator(processor)(examples_for("paligemma")[0])
    expected = plain_forward(model, {k: v for k, v in batch.items() if k != "labels"})
    pruned = prune_inputs(model, batch, AutoPruner.from_name("grid", pruning_ratio=0.0))
    pruned.pop("labels", None)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(plain_forward(model, pruned)[pruned["attention_mask"].bool()], expected[real])


def test_paligemma_pruned_equals_masked():
    """The bidirectional prefix, less the dropped tokens, is what a padding mask over them leaves."""
    processor = build("paligemma")
    model = model_for("paligemma", processor)
    batch = VisionLanguageCollator(processor)([talk("What is it?", "A cat", images=[picture()])])
    batch.pop("labels")
    pruner = AutoPruner.from_name("grid", pruning_ratio=0.5, dropped_tokens="discard")
    pruned = prune_inputs(model, batch, pruner, position_ids="original", proportional_attention=False)
    kept = pruned["position_ids"][0]
    mask = torch.zeros_like(batch["attention_mask"])
    mask[0, kept] = 1
    hidden = batch["input_ids"][0, mask[0] == 0]
    assert len(hidden) == 8
    assert (hidden == processor.image_token_id).all()
    positions = torch.arange(batch["input_ids"].shape[1])[None]
    masked = plain_forward(model, {**batch, "attention_mask": mask, "position_ids": positions})
    torch.testing.assert_close(plain_forward(model, pruned)[0], masked[0, kept])
    assert torch.equal(pruned["token_type_ids"][0], batch["token_type_ids"][0, kept])


# videos


def clip(frames: int = 4, edge: int = EDGE) -> np.ndarray:
    return np.random.default_rng(frames).integers(0, 255, (frames, edge, edge, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["array", "tensor", "images"])
def test_videos_of_every_kind_give_the_same_pixels(kind):
    pytest.importorskip("torchvision")
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    processor = qwen("qwen2_vl", "Qwen2VLProcessor")()
    processor.video_processor = Qwen2VLVideoProcessor(
        patch_size=PATCH_SIZE, merge_size=2, size={"shortest_edge": 8 * 8, "longest_edge": 4 * 32 * 32}
    )
    frames = clip()
    kinds = {
        "array": frames,
        "tensor": torch.from_numpy(frames),
        "images": [Image.fromarray(frame) for frame in frames],
    }
    examples = [
        {**talk("What happens?", "Rain"), "videos": [kinds[kind]]},
        talk("Hello?", "Hi!", images=[picture()]),
        {**talk("<video> and <video>?", "no"), "videos": [clip(2), kinds[kind]]},
    ]
    batch = VisionLanguageCollator(processor)(examples)
    assert [supervised(processor, batch, row) for row in range(3)] == [f"{a}<|im_end|>" for a in ("Rain", "Hi!", "no")]
    assert batch["video_grid_thw"].tolist() == [[2, 4, 4], [1, 4, 4], [2, 4, 4]]
    assert (batch["mm_token_type_ids"] == 2).sum(1).tolist() == [8, 0, 12]
    reference = VisionLanguageCollator(processor)([{**talk("q", "a"), "videos": [frames]}])
    rows = len(reference["pixel_values_videos"])
    assert torch.equal(batch["pixel_values_videos"][:rows], reference["pixel_values_videos"])


class Clips:
    """Stands in for transformers' video processors, which need torchvision: two frames are a token."""

    merge_size, temporal_patch_size = 1, 2

    def __call__(self, videos, **options):
        grid = torch.tensor([[len(video) // 2, 1, 1] for video in videos])
        metadata = make_batched_metadata(videos, options.get("video_metadata"))
        found = {"pixel_values_videos": torch.zeros(int(grid[:, 0].sum()), 3), "video_grid_thw": grid}
        return BatchFeature(found | {"video_metadata": metadata})


def test_times_between_frames_are_no_labels_and_said_to_be_made_up(caplog):
    processor = build("qwen3_vl")
    processor.video_processor = Clips()
    examples = [{**talk("<video> and <video>?", "no"), "videos": [clip(2), clip(4)]}, talk("Hello?", "Hi!")]
    collator = VisionLanguageCollator(processor)
    batch = collator(examples)
    collator(examples)
    assert [supervised(processor, batch, row) for row in range(2)] == ["no<|im_end|>", "Hi!<|im_end|>"]
    assert batch["mm_token_type_ids"].sum(1).tolist() == [2 * 3, 0]
    assert "<0.1 seconds>" in processor.decode(batch["input_ids"][0])
    assert caplog.text.count("without their times: Qwen3VLProcessor") == 1


def test_videos_that_cannot_be_used_are_refused():
    collator = VisionLanguageCollator(build("qwen3_vl"))
    with pytest.raises(ValueError, match="Qwen3VLProcessor.*no video processor.*torchvision.*as `images`"):
        collator([{**talk("q", "a"), "video": clip()}])
    with pytest.raises(TypeError, match="must be its frames, got 'a.mp4'.*torchcodec"):
        collator([{**talk("q", "a"), "video": "a.mp4"}])
    for video in (clip()[0], [picture(), picture(9, 30)]):
        with pytest.raises(ValueError, match="a video cannot be read .*frames of a video must have"):
            collator([{**talk("q", "a"), "video": video}])
