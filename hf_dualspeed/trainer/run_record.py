"""The record of a run: results.json, the model card, and pushes to the Hub during and after training."""

from __future__ import annotations

import json
import logging
import math
import shlex
import tempfile
import time
from concurrent.futures import Future
from pathlib import Path

import torch
from huggingface_hub import CommitInfo, run_as_future
from huggingface_hub.errors import HfHubHTTPError
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, SaveStrategy
from transformers.utils import PushInProgress

from ..hub.errors import explained
from ..hub.secrets import check_no_secret
from ..hub.upload import push_files
from ..pruners import budget
from ..publishing.cards import given_keys
from ..publishing.display import is_silent, print_end
from ..publishing.files import RECORD, is_stale, left_out, published_files
from ..publishing.model_card import adopt_published_card, license_of, read_card, with_latest_words, write_model_card
from ..publishing.results import OF_WEIGHTS, dataset_name, is_hub_id, read_results, run_record, write_results
from ..utils.constants import CARD_NAME
from ..utils.devices import others_wait
from ..utils.environment import peak_memory, reset_peak_memory
from ..utils.text import one_line, without_paths
from ..utils.validation import checked
from ..utils.writing import copy_file
from .speedup import SpeedupMeter

logger = logging.getLogger(__name__)


class RunRecordMixin:
    """Writes results.json and README.md, and pushes them to the Hub."""

    _pushing: dict | None = None  # revision and token of `push_to_hub`, while it runs
    _roles: dict[str, dict[str, int]] = {}  # parameters of each, counted as training begins

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        self._begin_record()
        if resume_from_checkpoint:
            self._earlier = read_results(self.args.output_dir)
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.display.stop()
            if self.adaptive_schedule is not None:  # errors and Ctrl-C pass the end of training by
                self.adaptive_schedule.end()
        if self.display.shows_end and not is_silent(self.args):
            try:
                self.print_end(self.record())
            # What is said of a training must not lose one that is not saved yet.
            except Exception as error:
                logger.warning("The training has ended well, but its numbers cannot be shown: %s", one_line(error))
        return output

    def print_end(self, results: dict) -> None:
        """Prints the run's main numbers, and the files that it has written."""
        print_end({**results, "why": self.speedup_meter.reason}, self.args.output_dir, self._began)

    def evaluation_loop(self, *args, **kwargs):
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            self.display.end_evaluation()

    def _inner_training_loop(self, *args, **kwargs):
        # Of this try of `auto_find_batch_size` alone: batches of an earlier one do not fit.
        self.speedup_meter = SpeedupMeter(self.args.speedup_rounds)
        reset_peak_memory(self.args.device)
        return super()._inner_training_loop(*args, **kwargs)

    def _begin_record(self) -> None:
        self._began = time.time()
        self._earlier: dict = {}
        self._speedup: dict | None = None
        self._peak: dict | None = None
        self._licenses: dict[str | None, dict[str, str]] = {}  # by the name of the base model
        self._failed_pushes: dict[str, str] = {}  # errors of those in the background, by their messages
        # The data set of each metric, by step and name.
        self._evaluated_on: dict[tuple[int, str], str | None] = {}

    def _finalize_training(self, *args, **kwargs):
        with others_wait():  # for its pushes
            output = super()._finalize_training(*args, **kwargs)
        self.add_up()  # before plain passes, which need more memory
        steps = self.state.global_step - self._initial_global_step
        self._speedup = self.speedup_meter.measure(self, steps)
        if self._speedup is not None:
            logger.info("Speed-up over plain full-token steps: %s.", self._speedup)
        return output

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval", **kwargs):
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **kwargs)
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        data = self.eval_dataset[data] if isinstance(data, str) else data
        if not isinstance(data, dict):  # each of several data sets comes here on its own
            self._evaluated_on |= {(self.state.global_step, key): dataset_name(data) for key in metrics}
        return metrics

    def add_up(self) -> None:
        """Sums the visual tokens of all processes, and takes the largest peak memory and share of waiting.

        Call it in all of them.
        """
        clock, peak = self.clock, peak_memory(self.args.device)
        clock.set_total(**clock.visual_tokens)
        if self.accelerator.num_processes > 1:
            # Tensor parallel ranks receive the same batch, which the first of them counts for all.
            counts = torch.tensor([*clock.visual_tokens.values()], device=self.args.device)
            counts *= self.args.process_index % self.get_tp_size() == 0
            full, kept = self.accelerator.reduce(counts, "sum").tolist()
            clock.set_total(full, kept)
            held = torch.tensor([peak["bytes"] if peak else 0], device=self.args.device)
            peak = peak and {**peak, "bytes": self.accelerator.gather(held).max().item()}
        self._peak = peak
        self.longest_data_wait()

    def record(self, folder: str | Path | None = None) -> dict:
        """The record of the run so far, for results.json in `folder` and the model card.

        Measurements of an earlier part of a resumed run stay, except those of its weights. With several processes,
        visual tokens and memory are those of the last checkpoint, or of the end.
        """
        if self.is_in_train and self.accelerator.num_processes == 1:
            self.add_up()
        model = self.dual_forward.interface.outer
        results = {"name": Path(folder or self.args.output_dir).resolve().name}
        results |= {key: value for key, value in self._earlier.items() if key not in (*results, *OF_WEIGHTS)}
        known = [dataset_name(self.train_dataset)]
        results |= {"base_model": getattr(model, "name_or_path", "") or None, "datasets": [n for n in known if n]}
        results |= {"adapter": bool(getattr(self.model, "peft_config", None))}
        evaluation, of = self._evaluated()
        results |= {"evaluation": evaluation, "eval_dataset": of}
        results |= {"processor": self.processing_class is not None, **self.facts}
        results |= run_record(self.args, self.summary(), self.clock.total_seconds)
        # As it was trained, where arguments say otherwise: `auto_find_batch_size` leaves them as they were.
        rows = self._train_batch_size // (self.args.world_size if self.accelerator.split_batches else 1)
        results["training"] |= {"global_batch_size": self.samples_of_step, "per_device_train_batch_size": rows}
        results |= {"progress": progress(self.state), "parameters": self.parameters if self._roles else None}
        results |= {"visual_tokens": self.clock.all_visual_tokens if self.clock.all_visual_tokens["full"] else None}
        results |= {"data_wait": None if self.clock.data_wait is None else round(self.clock.data_wait, 4)}
        results |= {"peak_memory": larger(self._peak, self._earlier.get("peak_memory"))}
        same = as_stored(results["settings"]) == self._earlier.get("settings")
        results |= {"speedup": self._speedup or (self._earlier.get("speedup") if same else None)}
        results |= {"pruned_in_language_model": self._pruner.in_language_model or None}
        repo_id = self.hub_model_id or self.args.hub_model_id
        on_hub = {
            "repo_id": repo_id if repo_id and "/" in repo_id else None,
            "base_model": results["base_model"] if is_hub_id(results["base_model"]) else None,
            "datasets": [name for name in results["datasets"] if is_hub_id(name)],
            **self._base_license(results["base_model"]),
        }
        results |= {"hub": {key: value for key, value in on_hub.items() if value}}
        return without_paths({key: value for key, value in results.items() if is_known(value)})

    def _base_license(self, base: str | None) -> dict[str, str]:
        """The base model's licence. The Hub is asked once, and by the main process alone."""
        if base not in self._licenses:
            self._licenses[base] = license_of(base, self.args.hub_token) if self.is_world_process_zero() else {}
        return self._licenses[base]

    def _evaluated(self) -> tuple[dict | None, str | None]:
        """Metrics of the current weights from the Trainer's evaluation, and their data set if there is exactly one.

        None without an evaluation. Numbers that are not finite are left out.
        """
        state = self.state
        best = self.args.load_best_model_at_end and not self.is_in_train and state.best_global_step
        found = {}
        for entry in state.log_history:
            if entry["step"] == (best or state.global_step):
                found |= {k: v for k, v in entry.items() if k.startswith("eval_") and isinstance(v, (int, float))}
        names = {self._evaluated_on.get((best or state.global_step, key)) for key in found}
        found = {key: value for key, value in found.items() if is_known(value)}
        return found or None, names.pop() if len(names) == 1 else None

    def write_results(self, folder: str | Path | None = None) -> dict:
        """Writes results.json and, if losses were logged, learning_curve.png to `folder`; returns the results."""
        # Imported late, because matplotlib is slow to import.
        from ..publishing.plots import CURVE_NAME, plot_learning_curve

        folder = Path(folder or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        results, history = self.record(folder), self.state.log_history
        if any("fast_loss" in entry or "slow_loss" in entry for entry in history):
            of = f" on {', '.join(results['datasets'])}" if results["datasets"] else ""
            plot_learning_curve(history, folder / CURVE_NAME, f"{results['name']}: training{of}", results)
            results["learning_curve"] = CURVE_NAME
        write_results(folder, results)
        return results

    def write_record(self, folder: Path) -> None:
        """Writes the results beside a saved model and, beside adapters, the card, in place of PEFT's empty form.

        A card that a person wrote, or that cannot be read, stays as it is.
        """
        results, path = self.write_results(folder), folder / CARD_NAME
        if not results["adapter"]:
            return
        try:
            earlier = read_card(path)
            if not earlier or given_keys(earlier):
                write_model_card(folder, results)
        except ValueError as error:
            logger.warning("%s is left as it is: %s", path, one_line(error))

    @checked
    def create_model_card(
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name=None,
        finetuned_from: str | None = None,
        tasks=None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args=None,
    ) -> None:
        """Writes results.json and README.md from the measurements. Sections that a person wrote there stay.

        `model_name`, `tasks` and `dataset_args` are not used: the card has the name of the folder or repo, and the
        results hold the rest.
        """
        given = {"language": language, "license": license, "tags": as_list(tags), "base_model": finetuned_from}
        given["datasets"] = list(dict.fromkeys([*as_list(dataset), *as_list(dataset_tags)]))
        self.facts |= {key: value for key, value in given.items() if value}
        if self.is_world_process_zero():
            if self._pushing is not None:
                self._adopt_card(**self._pushing)
            write_model_card(self.args.output_dir, self.write_results())

    # --- what is shown --------------------------------------------------------------------------------------------

    def kept_of(self, tokens: int) -> int:
        """How many tokens of an image of so many a fast step keeps now."""
        progress = self.state.global_step / max(1, self.state.max_steps - 1)
        return budget(tokens, self._pruner.config.ratio_at(progress))

    @property
    def samples_of_step(self) -> int:
        """The samples of an optimizer step, of all micro-batches and processes."""
        if self.accelerator.split_batches:  # a micro-batch is made for all processes
            return self._train_batch_size * self.args.gradient_accumulation_steps
        return self.get_total_train_batch_size(self.args)

    @property
    def parameters(self) -> dict[str, int]:
        """How many parameters the model has, by what training does with them."""
        return {kind: sum(counts[kind] for counts in self._roles.values()) for kind in ("trained", "frozen")}

    def run_facts(self) -> dict:
        """What is known of the run before its first step."""
        outer, config = self.dual_forward.interface.outer, self._pruner.config
        roles, adapters = self._roles, getattr(self.model, "peft_config", None) or {}
        return {
            "model": getattr(outer, "name_or_path", "") or type(outer).__name__,
            "parameters": self.parameters,
            "roles": {role: {kind: counts[kind] for kind in ("trained", "frozen")} for role, counts in roles.items()},
            "weights_bytes": sum(counts["bytes"] for counts in roles.values()),
            "adapters": [f"{name} ({getattr(of.peft_type, 'value', of.peft_type)})" for name, of in adapters.items()],
            "pruner": config.pruner_type,
            "pruning_ratio": config.pruning_ratio,
            "pruned_in_language_model": self._pruner.in_language_model,
            "isolator_length": self.args.isolator_length,
            "step": self.state.global_step,
            "max_steps": self.state.max_steps,
            "steps": self.steps_left(),
            "samples": self.samples_of_step,
            "processes": self.args.world_size,
            "batch": self.size,
        }

    # --- pushing --------------------------------------------------------------------------------------------------

    def init_hf_repo(self, token=None, private=None):
        repo_id = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        with explained("push to", f"the Hub repo {repo_id!r}"):
            super().init_hf_repo(token, private)
        if self.args.push_to_hub and self.is_world_process_zero():  # what would break each push raises at the start
            self._adopt_card(token=token)
            self._check_parts(token)

    def _check_parts(self, token: str | None) -> None:
        """Raises a `ValueError` if card, config or processor hold a token or key."""
        with tempfile.TemporaryDirectory() as aside:
            for part in (self.processing_class, getattr(self.model, "config", None)):
                if hasattr(part, "save_pretrained"):
                    part.save_pretrained(aside)
            files = [path for path in Path(aside).rglob("*") if path.is_file()]
            contents = {path.relative_to(aside).as_posix(): path.read_bytes() for path in files}
            folder = Path(self.args.output_dir)
            contents[CARD_NAME] = read_card(folder / CARD_NAME).encode()
            check_no_secret(contents, [token, self.args.hub_token], folder)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ):
        """[`~transformers.Trainer.push_to_hub`] with results and card, but of files that `dualspeed push` allows alone.

        Text that a person wrote on the Hub stays.

        Raises:
            HfHubHTTPError, ConnectionError: the Hub refuses, fails or cannot be reached; the message says what to do.
            ValueError: the card here, or the one on the Hub, cannot be read, or a file holds a token or key.
        """
        self._pushing = {"revision": revision, "token": token}
        try:
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
            if self.hub_model_id is None:
                self.init_hf_repo(token=token, private=private)
            self.save_model(_internal_call=True)
            if not self.is_world_process_zero():
                return None
            self._finish_current_push()  # it may hold an older card
            tags = as_list(kwargs.pop("tags", None)) + as_list(getattr(self.model, "model_tags", None))
            with explained("push to", f"the Hub repo {self._repo_id()!r}"):
                self.create_model_card(**kwargs, **({"tags": list(dict.fromkeys(tags))} if tags else {}))
            contents = self._contents()
            others = left_out(Path(self.args.output_dir), list(contents))
            others = ", ".join(ascii(name) for name in others if not is_of_trainer(name))
            if others:
                logger.warning("Not pushed: %s. Add what belongs there by `hf upload`.", others)
            push = self._push if blocking else self._push_aside
            return push(contents, commit_message or "End of training", revision=revision, token=token)
        except (HfHubHTTPError, ConnectionError) as error:
            error.args = (f"The push to the Hub failed ({one_line(error)}). {self._push_later()}",)
            raise
        finally:
            self._pushing = None

    def _adopt_card(self, revision: str | None = None, token: str | None = None) -> None:
        """Adopts what a person wrote into the card on the Hub since the last push."""
        revision, token = revision or self.args.hub_revision, token or self.args.hub_token
        adopt_published_card(self.args.output_dir, self.hub_model_id, revision, token)

    def _contents(self) -> dict[str, Path]:
        """What is published of the output folder, by its names in the repo."""
        folder = Path(self.args.output_dir)
        return {name: folder / name for name in published_files(folder, read_card(folder / CARD_NAME))}

    def _push(self, contents, message, folder="", revision=None, token=None) -> CommitInfo:
        """Pushes files in one commit; those of an earlier checkpoint leave `folder` of the repo."""
        return push_files(
            contents,
            self.hub_model_id,
            message,
            create=False,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            stale=lambda name: name.startswith(folder) if folder else is_stale(name, contents),
            renew=with_latest_words,
            folder="" if folder else self.args.output_dir,
        )

    def _push_aside(self, contents, message, folder="", **options) -> Future:
        """Pushes files in a thread, after those before them; a failure is said at once, and at the end of training."""

        def push():
            try:
                return self._push(contents, message, folder, **options)
            except Exception as error:
                self._failed_pushes[message] = one_line(error)
                logger.warning("The push %r failed (%s). %s", message, one_line(error), self._push_later())
                raise

        return run_as_future(push)

    def _push_from_checkpoint(self, checkpoint_folder):
        args, checkpoint = self.args, Path(checkpoint_folder)
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        unit = "step" if args.save_strategy == SaveStrategy.STEPS else "epoch"
        reached = self.state.global_step if unit == "step" else int(self.state.epoch)
        message = f"Training in progress, {unit} {reached}"
        try:
            links = ", ".join(str(path) for path in checkpoint.rglob("*") if path.is_symlink())
            if links:
                logger.warning("Not pushed, because they are links: %s. Put the files themselves there.", links)
            with self._place_of(Path(args.output_dir)) as place:
                copy_published(checkpoint, place, Path(args.output_dir))
            self._adopt_card()
            self.create_model_card()
            pushes = {"": self._contents()}
            if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
                last = args.hub_strategy == HubStrategy.CHECKPOINT
                place = f"{'last-checkpoint' if last else checkpoint.name}/"
                names = published_files(checkpoint, resumable=True)
                pushes[place] = {f"{place}{name}": checkpoint / name for name in names}
        except Exception as error:  # must not end the training
            self._failed_pushes[message] = one_line(error)
            logger.warning("%s is not pushed: %s %s", checkpoint.name, one_line(error), self._push_later())
            return
        jobs = [
            self._push_aside(contents, f"{message}, checkpoint" if place else message, place)
            for place, contents in pushes.items()
        ]
        self.push_in_progress = PushInProgress([*(self.push_in_progress.jobs if busy else ()), *jobs])

    def _finish_current_push(self):
        super()._finish_current_push()
        if self._failed_pushes:
            failed = ", ".join(f"{message!r} ({error})" for message, error in self._failed_pushes.items())
            self._failed_pushes.clear()
            logger.warning("Pushes to the Hub failed: %s. %s", failed, self._push_later())

    def _push_later(self) -> str:
        return (
            f"Nothing on this machine is lost. When training has ended and the model is saved, push it with: "
            f"dualspeed push {shlex.quote(self.args.output_dir)} {self._repo_id()}"
        )

    def _repo_id(self) -> str:
        return self.hub_model_id or self.args.hub_model_id or "user/repo"


def progress(state: TrainerState) -> dict | None:
    """The optimizer step of a run that has not reached its last one; None for others."""
    return {"step": state.global_step, "of": state.max_steps} if state.global_step < state.max_steps else None


def larger(peak: dict | None, other: dict | None) -> dict | None:
    """The larger of two memory peaks of the same kind."""
    comparable = peak and other and peak["of"] == other["of"]
    return max(peak, other, key=lambda measured: measured["bytes"]) if comparable else peak or other


def as_list(value: str | list[str] | None) -> list[str]:
    """One name, several or none as a list."""
    return [value] if isinstance(value, str) else list(value or ())


def as_stored(value: object) -> object:
    """A value as it is read back from results.json."""
    return json.loads(json.dumps(without_paths(value)))


def is_known(value: object) -> bool:
    """Whether there is a value that JSON and the Hub can hold: no NaN or infinity."""
    return value is not None and (not isinstance(value, float) or math.isfinite(value))


def is_of_trainer(name: str) -> bool:
    """Whether the Trainer itself writes a file or folder of this name, which is of no use to others."""
    return name.startswith((f"{PREFIX_CHECKPOINT_DIR}-", "runs/", "training_args.bin", "trainer_state.json", "_"))


def copy_published(checkpoint: Path, place: Path, folder: Path) -> None:
    """Copies what is published of a checkpoint, but for card and results, to `place`, from where it goes into the run's
    folder; follows no links.

    Raises:
        OSError: the disk is full, or the checkpoint, or a subfolder of the run's, is a link.
    """
    if checkpoint.is_symlink():
        raise OSError(f"{str(checkpoint)!r} is a link, and links are not pushed.")
    for name in published_files(checkpoint):
        parent = (folder / name).parent
        if parent != folder and parent.is_symlink():
            raise OSError(f"{str(parent)!r} is a link, and links are not followed. Put the folder itself there.")
        if name not in RECORD:
            copy_file(checkpoint / name, place / name)
