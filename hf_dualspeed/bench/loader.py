"""`dualspeed bench --loader`: what one data loader worker makes of JPEGs, from the file to the batch, on one core.

Times are processor time: a worker has one thread, its files are in memory, and other work on the machine counts for
nothing.

The pictures are one photograph, the portrait of Grace Hopper that matplotlib brings, enlarged to each size, with grain
of its own on each, so that a file has about as many bytes for a pixel as one from a camera.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from matplotlib.cbook import get_sample_data
from PIL import Image
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ProcessorMixin
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava import LlavaProcessor
from transformers.models.llava_next import LlavaNextProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from ..data.collators import VisionLanguageCollator
from ..data.media import open_image
from ..data.pictures import draft_edge
from ..publishing.plots import describe, figure_of, save_figure
from ..utils.environment import machine, versions
from ..utils.progress import Work
from ..utils.text import markdown_table
from ..utils.writing import write_file
from .measure import order
from .options import QUESTIONS, BenchArguments
from .report import check_format, print_table, quartiles

KIND = "batches from JPEG files"
MEGAPIXELS = (1, 2, 4, 8, 12)
QUALITY, GRAIN, ASPECT, SEED = 90, 5.0, 4 / 3, 0
EDGE, PATCH = 336, 14
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # LLaVA-NeXT's
# Samples and seconds of a fast step at 7 B on an H100, without the optimizer, checkpointing on, from docs/results:
# bench_h100_llava_1_5.json and bench_h100_llava_next.json.
H100 = {"llava-1.5": (8, 0.2134), "llava-next": (3, 0.1805)}
WAYS = {
    "read": "reading alone",
    "batch": "different pictures",
    "repeated": f"{QUESTIONS} questions about each picture",
    "draft": "different pictures, jpeg_draft=True",
}
STYLE = {"read": ("#999999", "s"), "batch": ("#D55E00", "o"), "repeated": ("#0072B2", "^"), "draft": ("#009E73", "v")}
HEADER = ("shape", "megapixels", "MB a file", "reading", "a batch", "4 questions each", "gain", "draft", "workers")
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for part in message['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] + ' ' }}{% endfor %}"
    "{{ '</s>' if message['role'] == 'assistant' }}{% endfor %}{{ 'ASSISTANT: ' if add_generation_prompt }}"
)


def measure(options: BenchArguments) -> dict:
    """Times all ways with each shape's processor and each size of pictures, on one thread as in a worker."""
    threads, runs, parallel = torch.get_num_threads(), [], os.environ.get("TOKENIZERS_PARALLELISM")
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        total = len(options.shape) * len(MEGAPIXELS)
        with tempfile.TemporaryDirectory() as folder, Work("batches", total) as work:
            for size in MEGAPIXELS:
                files = photographs(Path(folder), size, options.batch or 8)
                for shape in options.shape:
                    runs.append(timed(shape, size, files, options.rounds))
                    work.advance()
                for file in files:
                    file.unlink()
    finally:
        torch.set_num_threads(threads)
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if parallel is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = parallel
    return {
        "benchmark": KIND,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
        "rounds": options.rounds,
        "settings": {"batch": options.batch or 8, "quality": QUALITY, "grain": GRAIN, "questions": QUESTIONS},
        "fast_steps_h100": {name: samples / seconds for name, (samples, seconds) in H100.items()},
        "runs": sorted(runs, key=lambda run: options.shape.index(run["shape"])),
    }


def photographs(folder: Path, megapixels: int, count: int) -> list[Path]:
    """JPEG files of a size, each with grain of its own."""
    height = round(math.sqrt(megapixels * 1e6 / ASPECT))
    width = round(height * ASPECT)
    with Image.open(get_sample_data("grace_hopper.jpg")) as photo:
        cut = photo.convert("RGB").crop((0, 0, photo.width, round(photo.width / ASPECT)))
    large = np.asarray(cut.resize((width, height), Image.Resampling.LANCZOS), dtype=np.float32)
    files = []
    for number in range(count):
        # Grain of brightness (H, W, 1), as film and sensors have it.
        noise = np.random.default_rng(SEED + number).standard_normal((height, width, 1), dtype=np.float32)
        pixels = (large + GRAIN * noise).clip(0, 255).astype(np.uint8)
        buffer = BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=QUALITY)
        files.append(write_file(folder / f"{megapixels}_{number}.jpg", buffer.getvalue()))
    return files


def processor_of(shape: str) -> ProcessorMixin:
    """The real processor's sizes, with a small tokenizer of letters."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<pad>", "</s>", "<image>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )
    size = {"size": {"shortest_edge": EDGE}, "crop_size": {"height": EDGE, "width": EDGE}}
    kind, images = LlavaProcessor, CLIPImageProcessorPil(**size)
    if shape == "llava-next":
        kind, images = LlavaNextProcessor, LlavaNextImageProcessorPil(**size, image_grid_pinpoints=PINPOINTS)
    return kind(
        image_processor=images,
        tokenizer=fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def samples_of(files: list[Path], count: int) -> list[dict]:
    """So many questions with short answers, about the files in turn, those about one file together."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"<image>\nQuestion {number}: what does the picture show, and where?"},
                {"role": "assistant", "content": f"Answer {number}: a woman in uniform in front of a flag."},
            ],
            "images": [str(files[number * len(files) // count])],
        }
        for number in range(count)
    ]


def ways_of(shape: str, files: list[Path]) -> dict[str, Callable[[], object]]:
    """What is timed, by its key in [`WAYS`], on as many samples as there are files."""
    processor, count = processor_of(shape), len(files)
    # No picture is kept beyond a batch: all rounds read the same files.
    collator = VisionLanguageCollator(processor, image_cache_mib=0)
    few = files[: count // QUESTIONS]
    ways = {
        "read": lambda: [open_image(file) for file in files],
        "batch": partial(collator, samples_of(files, count)),
        "repeated": partial(collator, samples_of(few, count)),
    }
    if draft_edge(processor) is not None:
        drafting = VisionLanguageCollator(processor, image_cache_mib=0, jpeg_draft=True)
        ways["draft"] = partial(drafting, samples_of(files, count))
    return ways


def timed(shape: str, megapixels: int, files: list[Path], rounds: int) -> dict:
    """Seconds for each sample by way and round, after a warm-up round."""
    ways = ways_of(shape, files)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(-1, rounds):
        for name, run in order(list(ways.items()), number):
            begun = time.process_time()
            run()
            if number >= 0:
                seconds[name].append((time.process_time() - begun) / len(files))
    with Image.open(files[0]) as picture:
        width, height = picture.size
    found = {
        "shape": shape,
        "megapixels": megapixels,
        "width": width,
        "height": height,
        "bytes": round(sum(file.stat().st_size for file in files) / len(files)),
        "seconds_by_round": seconds,
        "seconds": {name: quartiles(torch.tensor(values, dtype=torch.float64)) for name, values in seconds.items()},
    }
    if "draft" in ways:
        whole, drafted = (ways[name]()["pixel_values"] for name in ("batch", "draft"))
        # In brightness of 0 to 255, of pixels (B, 3, H, W) that were divided by about 0.27 times that.
        deviation = torch.tensor(processor_of(shape).image_processor.image_std)[:, None, None]
        found["draft_difference"] = ((whole - drafted).abs() * deviation * 255).mean().item()
    return found


def rate(run: dict, way: str) -> float:
    """Samples per second of one worker."""
    return 1 / run["seconds"][way]["median"]


def rows(results: dict) -> list[tuple[str, ...]]:
    """A row per shape and size: samples per second and worker."""
    table = []
    for run in results["runs"]:
        by_round = run["seconds_by_round"]
        gains = torch.tensor(by_round["batch"], dtype=torch.float64) / torch.tensor(by_round["repeated"])
        needed = results["fast_steps_h100"][run["shape"]] / rate(run, "batch")
        table.append(
            (
                run["shape"],
                str(run["megapixels"]),
                f"{run['bytes'] / 1e6:.2f}",
                *(f"{rate(run, way):.1f}" for way in ("read", "batch", "repeated")),
                f"{quartiles(gains)['median']:.2f} x",
                f"{rate(run, 'draft'):.1f}" if "draft" in run["seconds"] else "-",
                str(math.ceil(needed)),
            )
        )
    return table


def said(results: dict) -> str:
    """What was measured, in words."""
    host, settings = results["machine"], results["settings"]
    versions = results["versions"]
    return (
        f"Samples per second of processor time of one worker, that is of one core of {host['cpu']}; batches of "
        f"{settings['batch']}, each sample with one picture; torch {versions['torch']}, transformers "
        f"{versions['transformers']} with its PIL processors; medians of {results['rounds']} interleaved rounds."
    )


def demand(results: dict) -> str:
    """What fast steps eat, in words."""
    eaten = results["fast_steps_h100"]
    shapes = dict.fromkeys(run["shape"] for run in results["runs"])
    rates = " and ".join(f"{eaten[shape]:.0f} samples of {shape}" for shape in shapes)
    differences = [run["draft_difference"] for run in results["runs"] if "draft_difference" in run]
    drafts = (
        f" Pixels of drafts differ from the others by {min(differences):.2f} to {max(differences):.2f} of 255 on "
        "average."
        if differences
        else ""
    )
    return (
        f"`workers` is how many of them feed fast steps of a 7 B model on an H100, which take {rates} a second there, "
        f"without the optimizer; its host's cores are other ones.{drafts}"
    )


def readme_table(results: dict) -> str:
    """Table and notes, for a page that shows the plot itself."""
    check_format(results, KIND)
    return "\n\n".join([said(results), markdown_table(HEADER, rows(results)), demand(results)])


def markdown(results: dict, plot: str) -> str:
    """The Markdown page."""
    settings = results["settings"]
    parts = [
        "# From JPEG files to batches",
        f"The pictures are one photograph, which matplotlib brings, enlarged to each size, with grain of its own on "
        f"each (sigma {settings['grain']:g}), saved with quality {settings['quality']}. Processors have the sizes of "
        "the real ones; the tokenizer is one of letters, and texts are short. `reading` opens and decodes the files; "
        "`a batch` adds all that the collator does; with "
        f"{settings['questions']} questions about each picture, a batch of as many samples reads and processes each "
        "picture once, and `gain` compares the two. `draft` decodes at a reduced size; where that rounds the picture's "
        "proportions, the processor's crop may lie a pixel off. Times are processor time, without waiting for a disk.",
        readme_table(results),
        f"![Samples per second of one worker]({plot})",
        f"Measured {results['date']} UTC with `dualspeed bench --loader`.",
    ]
    return "\n\n".join(parts) + "\n"


def report(results: dict, path: Path) -> None:
    """Prints the table; writes Markdown and plot beside the JSON file `path`."""
    check_format(results, KIND)
    console = Console()
    console.print(said(results), highlight=False)
    print_table(console, HEADER, rows(results))
    console.print(demand(results), highlight=False)
    plot = plot_rates(results, path.with_suffix(".png"))
    write_file(path.with_suffix(".md"), markdown(results, plot.name))


def plot_rates(results: dict, path: Path) -> Path:
    """Draws samples per second by size of the pictures, a panel for each shape."""
    shapes = list(dict.fromkeys(run["shape"] for run in results["runs"]))
    figure, (panels,) = figure_of(4.6 * len(shapes), 3.8, 1, len(shapes))
    for axis, shape in zip(panels, shapes, strict=True):
        runs = [run for run in results["runs"] if run["shape"] == shape]
        for way, (colour, mark) in STYLE.items():
            values = [rate(run, way) for run in runs if way in run["seconds"]]
            if values:
                axis.plot([run["megapixels"] for run in runs], values, color=colour, marker=mark, label=WAYS[way])
        eaten = results["fast_steps_h100"][shape]
        axis.axhline(eaten, color="black", linestyle="--", linewidth=1, label="fast steps at 7 B on an H100")
        axis.set_yscale("log")
        axis.set_xlabel("megapixels of a picture")
        axis.set_title(shape, fontsize=11)
        axis.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("samples per second of one worker")
    handles, words = panels[0].get_legend_handles_labels()
    figure.legend(handles, words, frameon=False, loc="outside lower center", ncols=2, fontsize=9)
    describe(figure, "From JPEG files to batches, on one core", results, "the models' processors alone")
    return save_figure(figure, path)
