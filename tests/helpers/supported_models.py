"""Runs the conformance checks of every family and writes the table of supported models: `make conformance`."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from families import FAMILIES, Family
from families.cases import CASES, ROWS, batch_of
from rich.progress import track

from hf_dualspeed.conformance import CHECKS, check_model, encodings
from hf_dualspeed.models.interface import ModelInterface
from hf_dualspeed.pruning.inputs import full_positions
from hf_dualspeed.utils.text import markdown_table

DOCS = Path(__file__).parents[2] / "docs"
RESULT, PAGE = DOCS / "results" / "conformance.json", DOCS / "supported_models.md"
# What a pruner's budget covers: the whole, unless the model hands over its parts or sets them off from each other.
UNITS = {"image": ("image", "tile"), "video": ("clip", "frame"), "audio": ("clip", "window")}
WORDS = {True: "yes", False: "no", None: "n/a"}


def run_family(family: Family) -> dict:
    """Outcome of each check, over all modalities and both sides of padding: passed only where each of them did."""
    model = family.model()
    outcomes: dict[str, list[bool | None]] = {name: [] for name in CHECKS}
    modalities = [modality for name, modality in CASES if name == family.name]
    axes, units = 0, {}
    for modality in modalities:
        for side in ("right", "left"):
            batch = batch_of(family, model, modality, side)
            for check in check_model(model, batch):
                outcomes[check.name].append(check.passed)
        for encoding in encodings(model, batch):
            whole, part = UNITS[encoding.modality]
            given = sum(row.count(encoding.modality) for row in ROWS[modality])
            units.setdefault(encoding.modality, whole if len(encoding.lengths) == given else part)
        axes = full_positions(ModelInterface(model), batch.inputs, batch.inputs["attention_mask"]).dim()
    return {
        "model": family.name,
        "class": type(model).__name__,
        "modalities": modalities,
        "units": list(units.values()),
        "positions": "M-RoPE" if axes == 3 else "1-D",
        "checks": {name: together(results) for name, results in outcomes.items()},
        "notes": family.notes,
    }


def together(results: list[bool | None]) -> bool | None:
    known = [result for result in results if result is not None]
    return all(known) if known else None


def page(result: dict) -> str:
    """The page of supported models."""
    header = ("model", "modalities", "budget per", "positions", *result["checks"], "notes")
    rows = [
        (
            f"`{family['model']}`",
            ", ".join(family["modalities"]),
            ", ".join(family["units"]),
            family["positions"],
            *(WORDS[family["checks"][name]] for name in result["checks"]),
            family["notes"],
        )
        for family in sorted(result["families"], key=lambda family: family["model"])
    ]
    return f"""# Supported models

Written by `make conformance` from {len(rows)} families of transformers {result["transformers"]}, each a tiny model with
random weights built from its configuration, on batches of different text lengths and image counts, padded on either
side. `model` is the family's folder in transformers. Other families that take `mm_encoder_outputs` are treated by the
same rules; `hf_dualspeed.conformance.check_model` runs the checks on a model and a batch of yours.

{explained(result)}

**budget per** says what the pruning ratio applies to, with an isolator in front: a whole image, or each of the tiles
that a model sets off from each other; a whole clip (or, with `video_budget="frame"`, each frame).

"n/a" says that a family cannot show it: state space and convolution layers see masked tokens too, and some models
number the images of a whole batch.

{markdown_table(header, rows, words=True)}
"""


def explained(result: dict) -> str:
    return "\n".join(f"- **{name}**: {meaning}" for name, meaning in result["checks"].items())


def main() -> None:
    torch.set_num_threads(1)
    families = [run_family(family) for family in track(list(FAMILIES.values()), "Checking")]
    meanings = {name: " ".join(check.__doc__.split()) for name, check in CHECKS.items()}
    result = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "checks": meanings,
        "families": families,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(result), encoding="utf-8")
    failed = [f"{f['model']}: {n}" for f in families for n, passed in f["checks"].items() if passed is False]
    raise SystemExit("\n".join(failed) or None)


if __name__ == "__main__":
    main()
