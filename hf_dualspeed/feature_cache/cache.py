"""An optional cache of a frozen vision tower's outputs across epochs: `vision_feature_cache`.

It stores, for each image or tile, what the model's own encoder reads of the tower's output. The projector and
everything after it run in each step. Shapes: U units (images or tiles), R rows of all of them.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from hashlib import blake2b
from pathlib import Path

import torch
import transformers
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import TrainerCallback

from ..models.families import family_of
from ..models.interface import unwrap
from ..pruners import Pruner
from ..pruning.encoding import CONFIGURED, IN_TOWER
from ..utils.devices import on_host
from ..utils.memory import GIB
from .store import IN_USE, FeatureStore
from .tower import TowerCall
from .units import REMEDY, UNITS, ImageUnits

logger = logging.getLogger(__name__)

CHUNK = 2**26  # bytes of weights that are hashed at a time
WAITING = 8  # batches in the writer's queue, beyond which a step waits for the first
MARK_EVERY = 3600.0  # seconds, far less than `IN_USE`, after which another run may remove this tower's files


class FeatureCache(TrainerCallback):
    """Stores the tower's outputs for each image, and serves them in place of the tower.

    Args:
        folder (`str`): the cache's folder, for several models and runs.
        gib (`float`): its maximal size in GiB.
        pruner (`Pruner`): may need the tower to run.
        precision (`str`): the precision of autocast, which changes the tower's outputs.
    """

    def __init__(self, folder: str, gib: float, pruner: Pruner, precision: str = "no"):
        self.root, self.bound, self.pruner, self.precision = folder, int(gib * GIB), pruner, precision
        self.store: FeatureStore | None = None
        self._layout: tuple[str, ...] | None = None  # names of the tensors that the encoder reads
        self._alike = False  # whether the tower was seen to encode a unit alone as in a batch
        self._said = False  # whether the one warning was given
        self._marked = 0.0  # time of the last mark as used
        self._hits = self._asked = 0
        self._writer = ThreadPoolExecutor(1, "feature_cache")
        self._waiting: deque[Future] = deque()

    # --- what the trainer calls -----------------------------------------------------------------------------------

    def check(self, model: nn.Module) -> None:
        """Raises a `ValueError` if the outputs of the model's tower cannot be stored, or not in this folder."""
        reason = obstacle(unwrap(model), self.pruner)
        if reason is not None:
            raise ValueError(f"`vision_feature_cache` is set, but {reason}")
        try:
            os.makedirs(self.root, exist_ok=True)
            writable = os.access(self.root, os.W_OK)
        except OSError:
            writable = False
        if not writable:
            raise ValueError(
                f"`vision_feature_cache` must be a folder that can be written, got {self.root!r}. {REMEDY}"
            )

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.begin(model, count=args.local_process_index == 0)

    def begin(self, model: nn.Module, count: bool = True) -> None:
        """Opens the store for this model's tower. One of several processes counts its bytes."""
        self.check(model)
        outer = unwrap(model)
        self.store = FeatureStore(self.root, fingerprint(outer, self.precision), self.bound)
        self.store.open(count)
        self._marked = time.monotonic()
        self._layout, self._hits, self._asked = None, 0, 0

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.mark()
        self.flush()  # data loader workers may be forked next, which is unsafe while the lock is held

    def on_step_end(self, args, state, control, **kwargs):
        if time.monotonic() - self._marked > MARK_EVERY:
            self.mark()

    def on_epoch_end(self, args, state, control, **kwargs):
        self.mark()
        self.flush()

    def on_train_end(self, args, state, control, **kwargs):
        self.flush()

    def mark(self) -> None:
        """Marks the stored features as used, without waiting for the disk."""
        self._marked = time.monotonic()
        self._waiting.append(self._writer.submit(self._on_disk, self.store.use))

    def flush(self) -> None:
        """Waits until all encoded features are on the disk."""
        while self._waiting:
            self._waiting.popleft().result()

    def taken(self, inputs: Mapping) -> tuple[Mapping, Callable | None]:
        """Splits a batch into its model inputs and the context that serves its [`ImageUnits`] in place of the tower."""
        if UNITS not in inputs:
            return inputs, None
        rest = {key: value for key, value in inputs.items() if key != UNITS}
        return rest, partial(self.serving, inputs[UNITS])

    def window(self) -> dict[str, float]:
        """The share of this process's images found in the cache since the last call."""
        hits, asked = self._hits, self._asked
        self._hits = self._asked = 0
        return {"vision_cache_hit_rate": round(hits / asked, 4)} if asked else {}

    def __getstate__(self) -> dict:
        """The state for data loader workers, which only look up features."""
        return {"store": self.store}

    # --- in place of the tower ------------------------------------------------------------------------------------

    @contextmanager
    def serving(self, units: ImageUnits, tower: nn.Module) -> Iterator[None]:
        """Inside, a call of `tower` returns the stored outputs of `units`, and runs the tower on the others only."""
        # Replace the tower's forward for one call of the encoder.
        call, own = TowerCall(tower, units, self._layout or tuple(units.features)), vars(tower).get("forward")
        tower.forward = call
        try:
            yield
        finally:
            del tower.forward
            if own is not None:
                tower.forward = own
        # Count hits, check the tower once, and store new features.
        names = call.end()
        if names is None:  # the tower's inputs did not match the units, so it ran normally
            self._asked += len(units.keys)
            return
        if not self._alike and len(call.missing) > 1:
            call.check_alone(names)
            self._alike = True
        self._layout = names
        self._hits, self._asked = self._hits + call.hits, self._asked + len(call.keys)
        if call.missing:
            self._keep([call.keys[index] for index in call.missing], {name: call.encoded(name) for name in names})

    def _keep(self, keys: list[str], encoded: dict[str, tuple[torch.Tensor, list[int]]]) -> None:
        """Queues encoded features for the disk, without waiting for the device."""
        if self.store.full:
            return
        # Copy (R, ...) to the host. The event marks the end of the copies for the writer.
        rows = {name: (on_host(tensor), lengths) for name, (tensor, lengths) in encoded.items()}
        copied = torch.cuda.Event() if any(tensor.is_cuda for tensor, _ in encoded.values()) else None
        if copied is not None:
            copied.record()
        if len(self._waiting) >= WAITING:
            self._waiting.popleft().result()
        self._waiting.append(self._writer.submit(self._on_disk, self._write, keys, rows, copied))

    def _write(self, keys: list[str], rows: dict, copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        if self.store.full:
            return
        # Rows of each unit, (R, ...) -> U times (rows, ...).
        parts = {name: tensor.split(lengths) for name, (tensor, lengths) in rows.items()}
        self.store.write({key: {name: units[i] for name, units in parts.items()} for i, key in enumerate(keys)})
        if self.store.full:
            self._warn("%s", full_message(self.store))

    def _on_disk(self, task: Callable, *given) -> None:
        """Runs a task of the writer. A disk error ends the storing, not the training."""
        try:
            task(*given)
        except OSError as error:
            self.store.full = True
            self._warn("Vision features are no longer stored: %s.", error)

    def _warn(self, message: str, *values) -> None:
        if not self._said:
            self._said = True
            logger.warning(message, *values)


def feature_cache_of(
    folder: str | None,
    bound_gib: float,
    model: nn.Module,
    pruner: Pruner,
    precision: str,
    separable: bool,
    dispatched: bool = False,
) -> FeatureCache | None:
    """The cache in `folder` for the tower of `model`, which runs in `precision`; None without a folder.

    Raises:
        ValueError: it cannot be used, the tower is not `separable` from the model, or batches are `dispatched` by one
            process; the message says why.
    """
    if folder is None:
        return None
    if not separable:
        raise ValueError(
            "`vision_feature_cache` is set, but a sharded tower has to run in all processes at once, and a compiled "
            f"one cannot be left out. {REMEDY}"
        )
    if dispatched:
        raise ValueError(
            "`vision_feature_cache` is set, but with `dispatch_batches` one process makes a batch for all and cuts it "
            "into theirs, which leaves no images to look up. Set dispatch_batches=False in accelerator_config. "
            f"{REMEDY}"
        )
    cache = FeatureCache(folder, bound_gib, pruner, precision)
    cache.check(model)
    return cache


def full_message(store: FeatureStore) -> str:
    """Why no more is stored, and how to choose a larger bound."""
    units, size, total = store.held()
    each = size / units if units else store.refused
    others = ""
    if total > size:
        hours = f"{IN_USE / 3600:g} hours"
        others = f", and {(total - size) / GIB:.3g} GiB of other towers, which stay for {hours} after their last use"
    return (
        f"The cache of vision features takes all of vision_feature_cache_gib={store.bound / GIB:g}: "
        f"{str(store.root)!r} holds {total / GIB:.3g} GiB, of {units} images or tiles of this vision tower, "
        f"{each / 1e6:.3g} MB each on average{others}. Further ones are encoded in each epoch. Raise "
        "vision_feature_cache_gib, to that size times the images or tiles of the data, and to what other towers take "
        "beside, or set vision_feature_cache to another folder."
    )


def image_tower(outer: nn.Module) -> nn.Module | None:
    """The vision tower, if it is a module of its own."""
    tower = outer.get_encoder(modality="image") if hasattr(outer, "get_encoder") else None
    return None if tower in (None, outer, getattr(outer, "model", None)) else tower


def obstacle(outer: nn.Module, pruner: Pruner) -> str | None:
    """Why this model's vision features cannot be cached, with the remedy; None if they can."""
    tower = image_tower(outer)
    if tower is None or family_of(outer.config).encode is not None:
        return f"{type(outer).__name__} has no vision tower of its own. {REMEDY}"
    kind = type(tower).__name__
    adapter = next((name or kind for name, module in tower.named_modules() if is_of_peft(module)), None)
    if adapter is not None:
        return (
            f"`{adapter}` of the vision tower is a PEFT adapter, which can be scaled, switched and disabled at any "
            "time. Merge it first: model = model.merge_and_unload(), or keep adapters off the tower (target_modules, "
            f"exclude_modules). {REMEDY}"
        )
    trained = next((name for name, p in tower.named_parameters() if p.requires_grad), None)
    if trained is not None:
        return (
            f"`{trained}` of the vision tower is trained, so that its outputs change with each step. Freeze the tower: "
            "model.get_encoder(modality='image').requires_grad_(False), or in a recipe train_vision_tower: false, and "
            f"train_projector: false where the projector is a part of it, as in Qwen-VL. {REMEDY}"
        )
    if any(rate > 0 for module in tower.modules() for rate in dropout_rates(module)):
        return f"{kind} drops at random in training. Set its dropout to 0. {REMEDY}"
    if any(isinstance(module, _BatchNorm) for module in tower.modules()):
        return f"{kind} normalizes over the batch in training. {REMEDY}"
    read = sorted(pruner.needs & IN_TOWER)
    if read:
        return (
            f"the pruner {pruner.config.pruner_type!r} reads {' and '.join(read)} of the tower, which has to run for "
            f"it. Choose another, such as 'divprune'. {REMEDY}"
        )
    return None


def is_of_peft(module: nn.Module) -> bool:
    """Whether a module's class, or one that it derives from, is from PEFT. PEFT need not be installed."""
    return any(kind.__module__.split(".")[0] == "peft" for kind in type(module).__mro__)


def dropout_rates(module: nn.Module) -> list[float]:
    """A module's dropout rates, under any attribute name."""
    rates = [value for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]
    return [*rates, module.p] if isinstance(module, nn.modules.dropout._DropoutNd) else rates


def fingerprint(outer: nn.Module, precision: str) -> str:
    """A hash of everything but the image that the tower's outputs depend on: weights, code, precision, tensors read."""
    tower, config = image_tower(outer), outer.config
    own = getattr(tower, "config", None)
    settings = own.to_dict() if own is not None else {}
    settings.pop("_name_or_path", None)  # the same weights may come from another path
    facts = {
        "model": type(outer).__name__,
        "tower": type(tower).__name__,
        "config": settings,
        "attention": getattr(own, "_attn_implementation", None),
        "read": {name: getattr(config, name, None) for name in CONFIGURED},
        "autocast": precision,
        "transformers": transformers.__version__,
    }
    brought = code_of(tower)
    facts |= {"code": brought} if brought else {}
    found = blake2b(json.dumps(facts, sort_keys=True, default=str).encode(), digest_size=16)
    for name, tensor in tower.state_dict().items():
        found.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        for chunk in tensor.detach().contiguous().flatten().view(torch.uint8).split(CHUNK):
            found.update(chunk.cpu().numpy())
    return found.hexdigest()


def code_of(tower: nn.Module) -> list[str]:
    """Hashes of the files that define the tower's modules, but for those of torch and transformers: code that a model
    brings along changes under the same names."""
    kinds = {kind for module in tower.modules() for kind in type(module).__mro__ if issubclass(kind, nn.Module)}
    names = {kind.__module__ for kind in kinds if kind.__module__.partition(".")[0] not in ("torch", "transformers")}
    paths = [getattr(sys.modules.get(name), "__file__", None) for name in names]
    return sorted(blake2b(Path(path).read_bytes(), digest_size=16).hexdigest() for path in paths if path)
