"""The parts of the page as HTML."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path

from huggingface_hub.constants import ENDPOINT
from inference import MAX_NEW_TOKENS, TIMED, Answer
from overlay import data_url
from slots import HERE, Pair, Slot

from hf_dualspeed.evaluation.visualize import View, draw
from hf_dualspeed.publishing.plots import CURVE_NAME
from hf_dualspeed.utils.text import percent

RATIO, PRUNER = ("settings", "pruning_ratio"), ("settings", "pruner", "pruner_type")
COMPARE = (HERE / "compare.md", Path("docs/results/compare.md"))
EQUAL_TIME = (HERE / "equal_time.png", Path("docs/results/ablation_equal_time.png"))  # of the ablation
PAPER = "https://arxiv.org/abs/2602.03815"
WORDS = """Train vision-language models on a tenth of the visual tokens, answer with all of them. Ask three of them the
same question, and see what is left of the image when a pruner has been over it."""
ABOUT = """
- **Each card** says what the checkpoint's own results.json says: model, data, steps, pruner, accuracy with all tokens,
  time of the training on its machine, and the speed-up of its average step over a plain one on all tokens.
- **All tokens** is the model as it is deployed. **Pruned tokens** is the same model on what the chosen pruner keeps of
  the image; DualSpeed's isolator, a few learned tokens, stands in front of them where the checkpoint has one.
- **Latency** is measured on this machine, from the preprocessed image to the last token. {timing}
- **Probability** is that of exactly this answer: the product of the probabilities of its tokens, its end included. An
  answer is cut after {most} tokens; without an end, the probability is that of all answers which begin so.
- **The picture** is what the model saw, as its processor cut and scaled it. Kept tokens are in colour. Where a pruner
  merges, they stand for others too, and the picture shows only where each group has its place. Of models that cut an
  image into tiles, it shows the whole image's own tokens.
- **The photographs** among the examples come with gradio; Grace Hopper's portrait, in the public domain, with
  matplotlib.
- Pruners inside the language model (fastv, pyramiddrop) shorten no prompt and are not offered; learned ones only where
  a checkpoint was trained with them.
"""


TIMING = """A first answer warms up; the latency is the median of {count} more. A model that takes over half a second
  answers once, so that visitors do not wait."""


def header(slots: list[Slot]) -> str:
    """Title, words, and links to the paper, the models that are on the Hub, and the code where a setting names it.

    Raises:
        ValueError: the setting DEMO_CODE is no address.
    """
    links = {"Paper": PAPER}
    space = os.environ.get("SPACE_ID")  # set on Spaces, which hold the library's source
    code = os.environ.get("DEMO_CODE") or (f"{ENDPOINT}/spaces/{space}/tree/main" if space else None)
    if code:
        if not re.fullmatch(r"https?://[^\s\"'<>]+", code):
            raise ValueError(f"DEMO_CODE must be the address of the code, https://..., got {code[:80]!r}.")
        links["Code"] = code
    for slot in slots:
        if slot.checkpoint is not None and slot.checkpoint.on_hub:
            links[f"Model: {slot.name}"] = f"{ENDPOINT}/{slot.name}"
    shown = "".join(
        f'<a href="{escape(url)}" target="_blank" rel="noopener">{escape(name)}</a>' for name, url in links.items()
    )
    return f'<div class="masthead"><h1>DualSpeed</h1><p>{WORDS}</p><nav aria-label="Links">{shown}</nav></div>'


def about(pruners: Mapping[str, str]) -> str:
    """How to read the page, as Markdown, with a line on each pruner that is offered."""
    lines = "".join(f"  - `{name}`: {line}\n" for name, line in pruners.items())
    timing = TIMING.format(count=TIMED) if TIMED else "Each question is answered once."
    words = ABOUT.format(timing=timing, most=MAX_NEW_TOKENS).rstrip()
    return f"{words}\n- **The pruners**, each by its own words:\n{lines}"


def cards(slots: list[Slot], answers: Mapping[str, Pair] | None = None, pruner: str = "") -> str:
    """A card per checkpoint, with its answers where there are any."""
    inner = "".join(card(slot, (answers or {}).get(slot.key), pruner) for slot in slots)
    return f'<div class="cards">{inner}</div>'


def card(slot: Slot, pair: Pair | None, pruner: str) -> str:
    name = f'<p class="name">{escape(slot.name)}</p>' if slot.name else ""
    if slot.checkpoint is None:
        body = f'<p class="problem">{escape(slot.problem)}</p>'
    else:
        body = f'<p class="how">{escape(trained(slot))}</p>{figures(slot)}'
        body += '<p class="wait">Its answers appear here.</p>' if pair is None else answers(pair, pruner)
    head = f"<h3>{slot.title()}</h3>{name}"
    return f'<article class="card {slot.key}" data-role="{slot.key}">{head}{body}</article>'


def trained(slot: Slot) -> str:
    """How a checkpoint was trained: model, data, steps and pruner, as far as its results say."""
    fast, slow, ratio = (slot.number(*path) for path in (("steps", "fast"), ("steps", "slow"), RATIO))
    model, data, pruner = slot.told("model"), slot.told("datasets"), slot.told(*PRUNER)
    if fast is None or slow is None:
        return "No results.json says how it was trained."
    kept = f"{1 - ratio:.0%} of the tokens" if ratio is not None else "few tokens"
    kept += f" (by {pruner})" if isinstance(pruner, str) else ""
    parts = [f"{fast:,.0f} steps on {kept}"] if fast else []
    parts += [f"{slow:,.0f} {'' if fast else 'steps '}on all"] if slow else []
    names = ", ".join(map(str, data)) if isinstance(data, list) else ""
    of = f"{model}{f' on {names}' if names else ''}: " if isinstance(model, str) else ""
    return f"{of}{', '.join(parts)}."


def figures(slot: Slot) -> str:
    """What the training reached and cost, as far as the results say."""
    seconds, speedup = slot.number("seconds", "total"), slot.number("speedup", "speedup")
    rows = {
        "Accuracy": escape(accuracy(slot) or ""),
        "Training": seconds is not None and training_time(seconds),
        "Speed-up": speedup is not None and f"{speedup:.2f}x",
    }
    facts = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in rows.items() if value)
    return f'<dl class="trained">{facts}</dl>' if facts else ""


def accuracy(slot: Slot) -> str | None:
    """The accuracy, and of which questions it is where those are a part of the data."""
    share, part = percent(slot.number("accuracy")), slot.told("eval_part")
    return f"{share} ({part})" if share and isinstance(part, str) else share


def answers(pair: Pair, pruner: str) -> str:
    both = answer("All tokens", "full", pair.full) + answer("Pruned tokens", "pruned", pair.pruned)
    return f'<div class="answered"><div class="answers">{both}</div>{figure(pair.pruned, pruner)}</div>'


def answer(title: str, kind: str, given: Answer | str) -> str:
    if isinstance(given, str):
        inner = f'<p class="problem">{escape(given)}</p>'
    else:
        share = given.used / max(1, given.total)
        timing = "Median latency" if given.timed else "Latency, once"
        rows = (
            (timing, "latency", duration(given.seconds), ""),
            ("Tokens", "tokens", f"{given.used} of {given.total}", bar(share)),
            ("Probability", "probability", probability(given.probability), bar(given.probability)),
        )
        facts = "".join(
            f'<div><dt>{name}</dt><dd class="{key}">{value}</dd>{drawn}</div>' for name, key, value, drawn in rows
        )
        inner = f'<p class="text">{escape(given.text) or "<i>no words</i>"}</p><dl>{facts}</dl>'
    return f'<div class="answer {kind}"><h4>{title}</h4>{inner}</div>'


def figure(given: Answer | str, pruner: str) -> str:
    if isinstance(given, str):
        return ""
    if given.view is None:
        return '<p class="wait">No picture: this model prunes the tiles of an image each by itself.</p>'
    words = figure_caption(given, given.view, pruner)
    picture = f'<img src="{data_url(draw(given.view, veil=None))}" alt="{escape(words)}">'
    return f"<figure>{picture}<figcaption>{escape(words)}</figcaption></figure>"


def figure_caption(given: Answer, view: View, pruner: str) -> str:
    share = given.used / max(1, given.total)
    words = f"{given.used} of {given.total} tokens ({share:.0%}) kept by {pruner}"
    words += f", + {given.isolator} learned." if given.isolator else "."
    if given.merged:
        words += " They are means that stand for others too."
    if view.elsewhere:
        words += f" Shown are the {len(view.kept)} of the whole image; {view.elsewhere} lie in tiles."
    return words


def bar(share: float) -> str:
    return f'<dd class="bar" aria-hidden="true"><span style="width:{100 * min(1, max(0, share)):.1f}%"></span></dd>'


def duration(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def training_time(seconds: float) -> str:
    """Seconds up to two minutes, then minutes, then hours."""
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def probability(value: float) -> str:
    return "below 0.1%" if value < 0.001 else f"{value:.1%}"


# --- results ------------------------------------------------------------------------------------------------------


def runs_table(slots: list[Slot]) -> str:
    """A table of the loaded checkpoints' results.json, as HTML."""
    found = [slot for slot in slots if slot.checkpoint is not None and slot.checkpoint.results]
    if not found:
        return '<p class="note">None of the loaded checkpoints brings a results.json, which training writes.</p>'
    header = (
        "checkpoint",
        "accuracy",
        "guessing",
        "fast steps",
        "slow steps",
        "training",
        "speed-up",
        "machine",
        "date",
    )
    note = "Accuracy with all visual tokens; guessing is the most frequent answer, without the image. "
    note += "Speed-up: a training step on average, over a plain one on all tokens."
    return f'{table(header, [run_row(slot) for slot in found])}<p class="note">{note}</p>'


def run_row(slot: Slot) -> tuple[str, ...]:
    seconds, speedup = slot.number("seconds", "total"), slot.number("speedup", "speedup")
    machine = slot.told("machine", "accelerator") or slot.told("machine", "cpu")
    return (
        f"{slot.title()} ({slot.name})",
        accuracy(slot) or "n/a",
        percent(slot.number("majority_accuracy")) or "n/a",
        *(str(steps) if (steps := slot.told("steps", kind)) is not None else "n/a" for kind in ("fast", "slow")),
        "n/a" if seconds is None else training_time(seconds),
        "n/a" if speedup is None else f"{speedup:.2f}x",
        str(machine or "n/a"),
        str(slot.told("date") or "n/a"),
    )


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """An HTML table. It scrolls where it is wider than the page."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def cell(words: str) -> str:
    """A table cell. Text in brackets wraps as a whole."""
    before, bracket, inside = words.partition(" (")
    return f"<td>{escape(before)}{f' <span>({escape(inside)}</span>' if bracket else ''}</td>"


def learning_curves(slots: list[Slot]) -> list[tuple[str, Path]]:
    """Title and learning curve of each loaded run that has one."""
    folders = [(slot.title(), slot.checkpoint.folder) for slot in slots if slot.checkpoint is not None]
    return [(title, folder / CURVE_NAME) for title, folder in folders if (folder / CURVE_NAME).is_file()]


def comparison() -> tuple[str, Path | None] | None:
    """Table with caption, and plot, that `python -m benchmarks.compare` wrote. None where there are none."""
    path = next((path for path in COMPARE if path.is_file()), None)
    if path is None:
        return None
    picture = path.with_suffix(".png")
    caption, _, lines = path.read_text(encoding="utf-8").partition("\n\n")
    header, _, *rows = (line.strip("| ").split(" | ") for line in lines.splitlines() if line.startswith("|"))
    note = escape(caption.replace("`", ""))
    return f'{table(header, rows)}<p class="note">{note}</p>', picture if picture.is_file() else None
