"""Merges adapters into their base model: an ordinary checkpoint with processor, isolator, pruner, results and card."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightTransform

from ..hub.errors import explained
from ..publishing.files import code_files
from ..publishing.model_card import LICENSE, license_of, read_card, write_model_card
from ..publishing.results import OF_WEIGHTS, is_hub_id, read_results, write_results
from ..utils.constants import CARD_NAME, PRUNER_CONFIG_NAME, RESULTS_NAME
from ..utils.validation import checked
from ..utils.writing import check_new_folder, copy_file, new_folder, write_file
from .checkpoint import BESIDE, Checkpoint, find_checkpoint, view_settings

# The pictures of a run's card.
PICTURES = {"learning_curve": "learning_curve.png", "kept_tokens": "kept_tokens.png"}


@checked
def merge(
    name: str, output: str | Path, base: str | None = None, dtype: str = "auto", trust_remote_code: bool = False
) -> Checkpoint:
    """Merges the adapter `name` into its base model on the CPU, and saves the result as the folder `output`.

    A base model that is stored in 4 or 8 bits is unpacked first, because merging into few bits would round the adapter
    away. The evaluations of the adapter are left out of the results, as the merged weights have not been evaluated.

    Args:
        name (`str`): A folder or Hub repo with an adapter, such as that of a run.
        output (`str` or `Path`): The new folder. It appears once it is whole.
        base (`str`, *optional*): The base model, in place of the one that the adapter names.
        dtype (`str`): Type of the merged weights, or "auto" for that of the base model.
        trust_remote_code (`bool`): Run the base model's own code.

    Raises:
        ValueError: `name` holds no whole adapter, `output` is not empty or cannot be made, there is no processor, a
            weight would not be finite, or the base lacks one.
        OSError: there is no such adapter or base model, or the Hub refuses, fails or cannot be reached.
    """
    output = Path(output)
    check_new_folder("output", output)
    found = find_checkpoint(name, dtype, trust_remote_code, pruned=True, base=base)
    if found.base is None:
        raise ValueError(f"{name!r} holds no adapter but a whole model, so there is nothing to merge.")

    processor = found.processor()
    model = found.without_adapter()
    if getattr(model, "is_quantized", False):
        model = unpacked(model, None if dtype == "auto" else getattr(torch, dtype))
    model = found.adapted(model).merge_and_unload(safe_merge=True)

    with new_folder(output) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        _write_record(found, folder)
    return found


def unpacked(model: PreTrainedModel, dtype: torch.dtype | None) -> PreTrainedModel:
    """A quantized model with the weights that its bits stand for, ready to be saved."""
    model = model.dequantize(dtype)
    # transformers 5.23 would undo, when it saves the model, what it did to load packed weights, and cannot.
    model._weight_conversions = [one for one in getattr(model, "_weight_conversions", None) or [] if reversible(one)]
    return model


def reversible(conversion: WeightTransform) -> bool:
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True


def _beside(found: Checkpoint) -> Path | None:
    """The folder of what a run left beside its adapter: that of the cache where it is a Hub repo."""
    if found.commit is None:
        return found.beside
    names = [*BESIDE, *PICTURES.values(), CARD_NAME, "*.py"]
    with explained("read", f"the Hub repo {found.name!r}"):
        return Path(snapshot_download(found.name, revision=found.commit, allow_patterns=names))


def _write_record(found: Checkpoint, folder: Path) -> None:
    """Isolator, pruner, results and card of the adapter's run, as those of a whole model."""
    beside = _beside(found) or folder
    config = beside / PRUNER_CONFIG_NAME
    code = code_files(beside, [config.name], links=True) if config.is_file() else ()
    results = {key: value for key, value in read_results(beside).items() if key not in OF_WEIGHTS}
    if view := view_settings(beside):  # that of a checkpoint lies in its state
        results.setdefault("settings", view)
    for key in PICTURES:
        if not (beside / PICTURES[key]).is_file():
            results.pop(key, None)
    for file in (*BESIDE, *PICTURES.values(), *code):
        if file != RESULTS_NAME and (beside / file).is_file():
            copy_file((beside / file).resolve(), folder / file)  # a link in the cache of the Hub
    results |= {"name": folder.name, "adapter": False, "processor": True, "base_model": Path(found.base).name}
    on_hub = {key: results["hub"][key] for key in ("datasets", *LICENSE) if results.get("hub", {}).get(key)}
    on_hub = {**license_of(found.base), **on_hub}
    if is_hub_id(found.base):
        results["base_model"] = on_hub["base_model"] = found.base
    write_results(folder, {**results, "hub": on_hub})
    # What a person wrote into the adapter's card holds for the merged model too.
    if card := read_card(beside / CARD_NAME):
        write_file(folder / CARD_NAME, card)
    write_model_card(folder, read_results(folder))
