"""What the trainer tells of a run: its record, its card, and pushes to the Hub while it trains and afterwards."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import torch
from transformers import TrainerState
from transformers.trainer_utils import HubStrategy

from .isolator import WEIGHTS_NAME
from .model_card import adopt_published_card, write_model_card
from .protocol import unwrap
from .pruners.base import CONFIG_NAME as PRUNER_CONFIG_NAME
from .pruners.base import WEIGHTS_NAME as PRUNER_WEIGHTS_NAME
from .results import (
    OF_WEIGHTS,
    dataset_name,
    is_hub_id,
    one_line,
    peak_memory,
    read_results,
    run_record,
    without_paths,
    write_results,
)
from .speedup import measure_speedup

logger = logging.getLogger(__name__)


class PublishingMixin:
    """results.json, README.md and what of them goes to the Hub."""

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        self._begin_record()
        if resume_from_checkpoint:
            self._earlier = read_results(self.args.output_dir)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _begin_record(self) -> None:
        self._aside: list[dict] = []
        self._earlier: dict = {}
        self._speedup: dict | None = None
        self._peak: dict | None = None

    def _finalize_training(self, *args, **kwargs):
        output = super()._finalize_training(*args, **kwargs)
        self.add_up()  # before plain passes, which take more memory
        steps = self.state.global_step - self._initial_global_step
        self._speedup, self._aside = measure_speedup(self, self._aside, steps), []
        if self._speedup is not None:
            logger.info("Speed-up over plain full-token steps: %s.", self._speedup)
        return output

    def add_up(self) -> None:
        """Sums the visual tokens of all processes, and takes the most memory of any. Call it in all of them."""
        clock, peak = self.clock, peak_memory(self.args.device)
        clock.all_visual_tokens = dict(clock.visual_tokens)
        if self.accelerator.num_processes > 1:
            counts = torch.tensor([*clock.visual_tokens.values(), 0], device=self.args.device)
            full, kept, _ = self.accelerator.reduce(counts, "sum").tolist()
            shared = self.get_tp_size()  # tensor parallel ranks are given the same batch
            clock.all_visual_tokens = {"full": full // shared, "kept": kept // shared}
            held = torch.tensor([peak["bytes"] if peak else 0], device=self.args.device)
            peak = peak and {**peak, "bytes": self.accelerator.gather(held).max().item()}
        self._peak = peak

    def record(self, folder: str | Path | None = None) -> dict:
        """What is known of the run so far, as results.json in `folder` holds it and the model card shows it.

        What an earlier part of a resumed run has measured stays, but for what its weights answered. In several
        processes, visual tokens and memory are those of the last checkpoint, or of the end.
        """
        if self.is_in_train and self.accelerator.num_processes == 1:
            self.add_up()
        model = unwrap(self.model)
        results = {"name": Path(folder or self.args.output_dir).resolve().name}
        results |= {key: value for key, value in self._earlier.items() if key not in (*results, *OF_WEIGHTS)}
        known = [dataset_name(self.train_dataset)]
        results |= {"base_model": getattr(model, "name_or_path", "") or None, "datasets": [n for n in known if n]}
        results |= {"eval_dataset": dataset_name(self.eval_dataset)}
        results |= {"adapter": bool(getattr(self.model, "peft_config", None))}
        results |= {"processor": self.processing_class is not None, **self.facts}
        results |= run_record(self.args, self.summary(), self.clock.total_seconds)
        results |= {"progress": progress(self.state), "evaluation": self._evaluated()}
        results |= {"visual_tokens": self.clock.all_visual_tokens if self.clock.all_visual_tokens["full"] else None}
        results |= {"peak_memory": larger(self._peak, self._earlier.get("peak_memory"))}
        results |= {"speedup": self._speedup or self._earlier.get("speedup")}
        results |= {"pruned_in_language_model": self._pruner.in_language_model or None}
        repo_id = self.hub_model_id or self.args.hub_model_id
        on_hub = {
            "repo_id": repo_id if repo_id and "/" in repo_id else None,
            "base_model": results["base_model"] if is_hub_id(results["base_model"]) else None,
            "datasets": [name for name in results["datasets"] if is_hub_id(name)],
        }
        results |= {"hub": {key: value for key, value in on_hub.items() if value}}
        return without_paths({key: value for key, value in results.items() if value is not None})

    def _evaluated(self) -> dict | None:
        """Metrics of the Trainer's evaluation of the weights as they are; None where there was none."""
        state = self.state
        best = self.args.load_best_model_at_end and not self.is_in_train and state.best_global_step
        found = {}
        for entry in state.log_history:
            if entry["step"] == (best or state.global_step):
                found |= {k: v for k, v in entry.items() if k.startswith("eval_") and isinstance(v, (int, float))}
        return found or None

    def write_results(self, folder: str | Path | None = None) -> dict:
        """Writes results.json and, where losses were logged, learning_curve.png to `folder`; returns the results."""
        from .plots import CURVE_NAME, plot_learning_curve  # matplotlib takes its time

        folder = Path(folder or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        results, history = self.record(folder), self.state.log_history
        if any("fast_loss" in entry or "slow_loss" in entry for entry in history):
            of = f" on {', '.join(results['datasets'])}" if results["datasets"] else ""
            plot_learning_curve(history, folder / CURVE_NAME, f"{results['name']}: training{of}")
            results["learning_curve"] = CURVE_NAME
        write_results(folder, results)
        return results

    def create_model_card(
        self,
        language=None,
        license=None,
        tags=None,
        model_name=None,
        finetuned_from=None,
        tasks=None,
        dataset_tags=None,
        dataset=None,
        dataset_args=None,
    ) -> None:
        """Writes results.json and README.md from what was measured; sections that a person wrote there stay.

        `model_name`, `tasks` and `dataset_args` are not used: the card's name is that of folder or repo, and the rest
        is in the results.
        """
        given = {"language": language, "license": license, "tags": as_list(tags), "base_model": finetuned_from}
        given["datasets"] = list(dict.fromkeys([*as_list(dataset), *as_list(dataset_tags)]))
        self.facts |= {key: value for key, value in given.items() if value}
        if self.is_world_process_zero():
            write_model_card(self.args.output_dir, self.write_results())

    # --- pushing --------------------------------------------------------------------------------------------------

    def init_hf_repo(self, token=None, private=None):
        super().init_hf_repo(token, private)
        if self.is_world_process_zero():
            revision = self.args.hub_revision
            adopt_published_card(self.args.output_dir, self.hub_model_id, revision, token or self.args.hub_token)

    def push_to_hub(self, *args, **kwargs):
        try:
            return super().push_to_hub(*args, **kwargs)
        except Exception as error:
            raise OSError(f"The push to the Hub failed ({one_line(error)}). {self._push_later()}") from error

    def _push_from_checkpoint(self, checkpoint_folder):
        self._report_failed_pushes()
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        ends = self.args.hub_strategy == HubStrategy.END
        if self.is_world_process_zero() and not ends and (self.args.hub_always_push or not busy):
            # The Trainer takes over files that it knows by name, and these are not among them.
            for name in (WEIGHTS_NAME, PRUNER_CONFIG_NAME, PRUNER_WEIGHTS_NAME):
                if (Path(checkpoint_folder) / name).is_file():
                    shutil.copy(Path(checkpoint_folder) / name, self.args.output_dir)
            self.create_model_card()
        super()._push_from_checkpoint(checkpoint_folder)

    def _finish_current_push(self):
        super()._finish_current_push()
        self._report_failed_pushes()

    def _report_failed_pushes(self) -> None:
        """Pushes during training run in the background, where the Trainer lets their errors go unseen."""
        pushing = getattr(self, "push_in_progress", None)
        for job in list(pushing.jobs) if pushing is not None else ():
            if job.done() and not job.cancelled() and job.exception() is not None:
                pushing.jobs.remove(job)
                logger.warning("A push to the Hub failed (%s). %s", one_line(job.exception()), self._push_later())

    def _push_later(self) -> str:
        repo_id = self.hub_model_id or self.args.hub_model_id or "user/repo"
        return (
            f"Nothing on this machine is lost. When training has ended and the model is saved, push it with: "
            f"dualspeed push {self.args.output_dir} {repo_id}"
        )


def progress(state: TrainerState) -> dict | None:
    """The optimizer step of a run that has not reached its last one."""
    return {"step": state.global_step, "of": state.max_steps} if state.global_step < state.max_steps else None


def larger(peak: dict | None, other: dict | None) -> dict | None:
    """The larger of two peaks of memory of one kind."""
    comparable = peak and other and peak["of"] == other["of"]
    return max(peak, other, key=lambda measured: measured["bytes"]) if comparable else peak or other


def as_list(value: str | list[str] | None) -> list[str]:
    """One name, several or none as a list."""
    return [value] if isinstance(value, str) else list(value or ())
