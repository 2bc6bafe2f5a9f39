"""Isolator and learned pruner of an earlier stage of training: in memory, beside the weights, or beside adapters."""

from __future__ import annotations

import logging
from pathlib import Path

from huggingface_hub.errors import EntryNotFoundError
from torch import nn

from ..hub.source import Source, is_repo_id
from ..models.adapters import Origin, active_adapters, merged_origins, origin_of, seems_trained
from ..models.interface import ModelInterface
from ..pruners import Pruner
from ..pruning.isolator import ModeIsolator
from ..publishing.files import read_mapping
from ..utils.constants import ISOLATOR_WEIGHTS_NAME, PRUNER_CONFIG_NAME, PRUNER_WEIGHTS_NAME
from ..utils.text import one_line
from .dual_forward import earlier_fast_view

logger = logging.getLogger(__name__)

# The files of a trained fast view.
FAST_VIEW = (PRUNER_CONFIG_NAME, PRUNER_WEIGHTS_NAME, ISOLATOR_WEIGHTS_NAME)


def take_over(model: nn.Module, isolator: ModeIsolator | None, pruner: Pruner | None) -> bool:
    """Fills isolator and learned pruner from those that an earlier trainer has trained with this same model.

    Returns False if there are none. Those of other shapes stay new, with a warning.
    """
    earlier = earlier_fast_view(model)
    if earlier is None or not earlier.trained:
        return False
    for part, before in ((isolator, earlier.isolator), (pruner, earlier.pruner)):
        if part is None or before is None or not part.state_dict():
            continue
        shapes, others = ({name: t.shape for name, t in p.state_dict().items()} for p in (part, before))
        if type(part) is type(before) and shapes == others:
            part.load_state_dict(before.state_dict())
        else:
            kind = type(part).__name__
            logger.warning("%s starts anew: what was trained with this model is a %r.", kind, before)
    return True


def folder_of_fast_view(model: nn.Module) -> Path | None:
    """The folder in which isolator and pruner lie beside weights that this model was read from; None without any.

    The adapters' folders come first, active ones ahead of others, then that of the model.
    """
    adapters = getattr(model, "peft_config", None) or {}
    active = active_adapters(model) if adapters else []
    folders = []
    for name in sorted(adapters, key=lambda name: name not in active):
        origin = origin_of(adapters[name])
        if origin is not None:
            folder = local_folder(origin)
            folders += [folder, folder.parent]  # an adapter that is not "default" lies in a folder of its own
        elif seems_trained(model, name, adapters[name]):
            logger.warning(
                "The adapter %r was trained before, but it is not known where it was read from, so that isolator and "
                "learned pruner may start anew. Import DualSpeedTrainer before the adapter is loaded, or fill them: "
                "trainer.dual_forward.isolator.load_pretrained(folder), "
                "trainer.dual_forward.pruner.load_weights(folder).",
                name,
            )
    outer = ModelInterface(model).outer
    folders += [local_folder(origin) for origin in reversed(merged_origins(outer))]
    found = next((folder for folder in folders if holds_fast_view(folder)), None)
    if found is not None:
        return found
    commit = getattr(outer.config, "_commit_hash", None)
    # Most models have no fast view, so it is no news if the Hub cannot be asked.
    folder = local_folder(Origin(getattr(outer, "name_or_path", "") or "", commit), logging.INFO)
    return folder if holds_fast_view(folder) else None


def holds_fast_view(folder: Path) -> bool:
    """Whether a pruner or an isolator is saved in `folder`."""
    return any((folder / name).is_file() for name in FAST_VIEW)


def local_folder(origin: Origin, level: int = logging.WARNING) -> Path:
    """The folder of an adapter or a model; if it is from the Hub, the one in the cache, with isolator and pruner.

    What cannot be read is logged at `level`.
    """
    folder = Path(origin.name)
    if folder.is_dir() or not is_repo_id(origin.name):
        return folder
    source = Source(origin.name, False, revision=origin.revision, cache_dir=origin.cache_dir)
    for name in FAST_VIEW:
        try:
            path = source.fetch(name)
        except EntryNotFoundError:
            continue
        except (OSError, ValueError) as error:
            logger.log(
                level,
                "Isolator and learned pruner of %s start anew, because %s cannot be read: %s Download the repo, and "
                "load it from the folder.",
                source,
                name,
                one_line(error),
            )
            break
        source, folder = source.pinned(path), path.parent
    return folder


def holds_weights_of(folder: Path, pruner: Pruner) -> bool:
    """Whether `folder` holds the weights of a learned pruner of this type. Warns of another learned type."""
    if not pruner.state_dict() or not (folder / PRUNER_WEIGHTS_NAME).is_file():
        return False
    saved, wanted = read_mapping(folder / PRUNER_CONFIG_NAME).get("pruner_type"), pruner.config.pruner_type
    if saved != wanted:
        logger.warning("The pruner %r starts anew: what was trained and saved in %s is a %r.", wanted, folder, saved)
    return saved == wanted
