"""What a run shows while it trains: a panel ahead of the first step, a bar, and lines of the log.

A terminal and a notebook get words. A file or a pipe gets lines of JSON on stdout, and on stderr, now and then, how far
the run is.
"""

from __future__ import annotations

import json
import logging
import textwrap
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import has_length

from ..utils.progress import Work, clock_time, screen_print, to_people
from ..utils.text import finite, in_bytes, in_thousands

# How a line of the log names its values, in this order; what is not here follows by its own name.
NAMES = {
    "epoch": "epoch",
    "loss": "loss",
    "fast_loss": "fast",
    "slow_loss": "slow",
    "distillation_loss": "distillation",
    "eval_loss": "eval loss",
    "grad_norm": "gradient",
    "learning_rate": "rate",
}
# What the line leaves to the bar, or says in words of its own.
WITHOUT = {
    "fast_steps",
    "slow_steps",
    "steps_per_second",
    "total_flos",
    "seconds_left",
    "least_seconds_left",
    "visual_tokens_saved",
    "speedup_over_slow_steps",
}
WITHOUT |= {"fast_step_seconds", "slow_step_seconds", "data_wait", "step"}
# What the end shows of results.json, and why the speed-up was not measured.
END = ("accuracy", "n", "majority_accuracy", "evaluation", "steps", "seconds", "data_wait", "speedup", "why")
END += ("visual_tokens", "peak_memory")
# Endings of the names of times that evaluation notes, too, and that no line has.
TIMES = ("_runtime", "_per_second", "_time")
# The share of waiting that a line names.
WAITS = 0.05


class RunDisplay(ProgressCallback):
    """Takes the place of transformers' own bar and printer, of which it is one: who removes a `ProgressCallback`
    removes it.

    Args:
        facts (`Callable`): gives what is known of the run before its first step.
        pace (`Callable`): gives the seconds of steps, and of those left.
        kept (`Callable`): the tokens that a fast step keeps of so many.
        lines (`bool`): whether the bar and the log are shown too, not the panel alone.
    """

    def __init__(
        self,
        facts: Callable[[], dict],
        pace: Callable[[], dict],
        kept: Callable[[int], int],
        lines: bool = True,
    ):
        super().__init__()
        self.facts, self.pace, self.kept, self.lines = facts, pace, kept, lines
        self.shows_end = True  # a recipe has more to show at its end
        self._seen: dict | None = {}  # of the first micro-batches; None once they are shown
        self._training: Work | None = None
        self._evaluating: Work | None = None

    def __getstate__(self) -> dict:
        """Copies are not in the middle of a run."""
        return {**self.__dict__, "_training": None, "_evaluating": None}

    def saw(
        self, lengths: dict[str, list[int]], visual_tokens: tuple[int, int], tokens: int, fast_tokens: int | None
    ) -> None:
        """Notes the visual tokens of a micro-batch: of each image by modality, and of all before and after pruning; and
        its tokens, padding included, before pruning and, in a fast step, after it."""
        if self._seen is not None and not self._seen and lengths:
            units = {name: list(own) for name, own in lengths.items()}
            self._seen = {"lengths": units, "all": visual_tokens, "tokens": (tokens, fast_tokens)}

    def tell_size(self, args: TrainingArguments, size: dict) -> None:
        """Says in one line how large the micro-batch is, what it takes and what would fit."""
        if is_silent(args):
            return
        if to_people():
            screen_print(f"batch: {size_words(size)}")
        else:
            print_json({"batch": size})

    # --- training -------------------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, **kwargs):
        self._seen, self.current_step = {}, state.global_step
        if self.lines and not is_silent(args):
            self._training = Work("Training", state.max_steps)
            self._training.done = state.global_step
            self._training.__enter__()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self._seen is None:
            return
        seen, self._seen = self._seen, None
        if is_silent(args):
            return
        facts = {**self.facts(), "visual_tokens": tokens_of_images(seen, self.kept)}
        facts["speedup_limit"] = speedup_limit(facts, seen)
        if to_people():
            screen_print(panel(facts))
        else:
            print_json({"start": facts})

    def on_step_end(self, args, state, control, **kwargs):
        if self._training is not None:
            self._training.advance(state.global_step - self.current_step, time_left(self.pace()))
        self.current_step = state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if args.disable_tqdm and logs is not None:  # transformers' printer takes it out of what `train` returns
            logs.pop("total_flos", None)
        if not self.lines or is_silent(args) or logs is None:
            return
        if not to_people():
            print_json({"step": state.global_step, **{k: v for k, v in logs.items() if k != "total_flos"}})
        elif "train_runtime" not in logs:  # which the table at the end has
            screen_print(log_line(logs, state.global_step, state.max_steps, Console().width))

    def on_train_end(self, args, state, control, **kwargs):
        self.stop()

    def stop(self) -> None:
        """Takes the bars away, so that what is printed next, such as an error, has a line of its own."""
        self.end_evaluation()
        if self._training is not None:
            self._training.__exit__()
        self._training = None

    # --- evaluation -----------------------------------------------------------------------------------------------

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if not self.lines or is_silent(args):
            return
        if self._evaluating is None:
            self._evaluating = Work("Evaluating", len(eval_dataloader) if has_length(eval_dataloader) else None)
            self._evaluating.__enter__()
        self._evaluating.advance()

    def end_evaluation(self) -> None:
        """Takes the bar of an evaluation away, also where it fails."""
        if self._evaluating is not None:
            self._evaluating.__exit__()
        self._evaluating = None


def is_silent(args: TrainingArguments) -> bool:
    """Whether this process says nothing: another rank, or one that was asked to be silent."""
    return args.process_index > 0 or args.disable_tqdm or args.get_process_log_level() > logging.WARNING


def takes_the_place_of_defaults(callbacks: list, given: list) -> bool:
    """Removes transformers' own bar or printer from a trainer's callbacks; False if a person gave one, or a notebook
    has its own, which stay.

    Args:
        callbacks (`list`): of the trainer, whose last one of these classes is the default.
        given (`list`): those that a person gave to the trainer, classes or objects.
    """
    own = (PrinterCallback, ProgressCallback)
    if any(issubclass(one if isinstance(one, type) else type(one), own) for one in given):
        return False
    defaults = [one for one in callbacks if type(one) in own]
    if defaults:
        callbacks.remove(defaults[-1])
    return bool(defaults)


# --- what is known before the first step --------------------------------------------------------------------------


def tokens_of_images(seen: dict, kept: Callable[[int], int]) -> dict[str, dict]:
    """Visual tokens of the images, tiles or frames of a batch by modality: how many, and means before and after."""
    found = {}
    for name, units in seen.get("lengths", {}).items():
        after = [kept(length) for length in units]
        found[name] = {"count": len(units), "full": fmean(units), "kept": fmean(after), "sum": sum(after)}
        found[name] |= {"least": min(units), "most": max(units)}
    measured = seen.get("all", (0, 0))[1]
    # A pruner of its own mind, or a budget for a whole clip: what it has kept is what counts.
    if measured and found and measured != sum(one["sum"] for one in found.values()):
        share = measured / sum(one["sum"] for one in found.values())
        for one in found.values():
            one["kept"] *= share
    return {name: {key: value for key, value in one.items() if key != "sum"} for name, one in found.items()}


def speedup_limit(facts: dict, seen: dict) -> float | None:
    """How many times fewer tokens the language model reads than with full steps alone; None where that is not known, as
    of fast steps where the first one is slow."""
    steps, (full, fast) = facts["steps"], seen.get("tokens", (0, None))
    if not facts["visual_tokens"] or facts["pruned_in_language_model"] or not sum(steps.values()):
        return None
    if not steps["fast"]:
        return 1.0
    slow = steps["slow"] / sum(steps.values())
    return None if fast is None else full / (fast + slow * (full - fast))


def panel(facts: dict) -> Panel:
    """The panel ahead of the first step."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    for name, words in panel_rows(facts):
        table.add_row(name, words)
    return Panel(table, title="DualSpeed", title_align="left", expand=False)


def panel_rows(facts: dict) -> list[tuple[str, str]]:
    """The panel's rows: a name and its words. What is not known has no row."""
    parameters, steps, done = facts["parameters"], facts["steps"], facts["step"]
    rows = [("model", f"{facts['model']}, {in_thousands(parameters['trained'] + parameters['frozen'])} parameters")]
    for kind in ("trained", "frozen"):
        parts = {role.replace("_", " "): counts[kind] for role, counts in facts["roles"].items() if counts[kind]}
        of = ", ".join(f"{role} {in_thousands(count)}" for role, count in parts.items())
        rows.append((kind, f"{in_thousands(parameters[kind])}: {of}" if of else "nothing"))
    if facts["adapters"]:
        rows.append(("adapters", ", ".join(facts["adapters"])))
    rows += [("visual tokens", words) for words in token_words(facts)]
    left = f" of {facts['max_steps']:,}, from step {done:,} on" if done else ""
    total = f"{counted(steps['fast'] + steps['slow'], 'step')}{left} of {counted(facts['samples'], 'sample')}"
    rows.append(("to come", f"{total}: {steps['fast']:,} fast, {steps['slow']:,} slow"))
    if facts.get("batch"):
        rows.append(("batch", size_words(facts["batch"])))
    if facts.get("speedup_limit"):
        rows.append(("speed-up", f"at most {facts['speedup_limit']:.1f} x in the language model, by its tokens"))
    rows.append(("time", "measured from the first steps on"))
    held = f"{in_bytes(facts['weights_bytes'])} of weights"
    rows.append(("memory", held + (f", on {facts['processes']} processes" if facts["processes"] > 1 else "")))
    return rows


def size_words(size: dict) -> str:
    """The size of the micro-batch in words: what its steps take, what would fit, and what an optimizer step has.

    Args:
        size (`dict`): that of a trainer.
    """
    if "why" in size:
        return f"not measured: {size['why']}"
    rows, splits, chosen = size["micro_batch"], size["slow_mode_splits"], size.get("chosen")
    words = f"{rows:,} samples"
    if "tokens" in size:
        words += f" of up to {size['tokens']:,} tokens" + (", the largest micro-batch that fits" if chosen else "")
        names = {"fast": "a fast step", "slow": "a slow one" + with_splits(splits)}
        taken = [f"{words} {held_words(size, mode)}" for mode, words in names.items() if f"{mode}_bytes" in size]
        words += f": {', '.join(taken)}, of {in_bytes(size['budget_bytes'])}"
    elif size.get("resumed"):
        words += f"{with_splits(splits) or ','} as in the run that is resumed"
    if size.get("fits"):
        words += f"; about {size['fits']:,} would fit{with_splits(size['fits_slow_mode_splits']).rstrip(',')}"
    elif "fits" in size:
        words += "; not even one would fit"
    if chosen:
        counts = {"micro-batches": size["gradient_accumulation_steps"], "processes": size["processes"]}
        times = "".join(f" x {count:,} {name}" for name, count in counts.items() if count > 1)
        words += f"; {size['global_batch_size']:,} samples of an optimizer step" + (
            f": {rows:,}{times}" if times else ""
        )
    return words


def with_splits(splits: int | str) -> str:
    """The parts of slow steps, where there are several."""
    return f", with slow_mode_splits={splits}," if splits != 1 else ""


def held_words(size: dict, mode: str) -> str:
    """What a step takes; memory that ran out has no number."""
    held = size[f"{mode}_bytes"]
    return "takes more than there is" if held is None or held > size["budget_bytes"] else f"takes {in_bytes(held)}"


def token_words(facts: dict) -> list[str]:
    """A line for each modality: what fast steps keep of an image's tokens."""
    by = facts["pruner"] + (f" + {facts['isolator_length']} of the isolator" if facts["isolator_length"] else "")
    lines = []
    for name, found in facts["visual_tokens"].items():
        kept = "fewer from layer to layer" if facts["pruned_in_language_model"] else f"{found['kept']:,.0f}"
        words = f"{found['full']:,.0f} → {kept} per {'image or tile' if name == 'image' else name}, by {by}"
        if found["least"] < found["most"]:
            words += f"; means of {found['count']}, from {found['least']:,} to {found['most']:,}"
        lines.append(words)
    return lines or [f"{facts['pruning_ratio']:.0%} pruned in fast steps, by {by}"]


# --- at the end ---------------------------------------------------------------------------------------------------


def print_end(results: dict, folder: str | Path, since: float = 0.0) -> None:
    """Prints the run's main numbers, and the files written to `folder` since a time."""
    found = {key: results[key] for key in END if results.get(key) is not None}
    paths = sorted(Path(folder).iterdir()) if Path(folder).is_dir() else []
    names = [path.name + "/" * path.is_dir() for path in paths if path.lstat().st_mtime >= since]
    found |= {"folder": str(folder), "files": [name for name in names if not name.startswith((".", "_"))]}
    if not to_people():
        print_json({"end": found})
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, words in end_rows(found):
        table.add_row(name, words)
    screen_print(Panel(table, title="Trained", title_align="left", expand=False))


def end_rows(found: dict) -> list[tuple[str, str]]:
    """The rows of the table at the end. What was not measured has none, but for the speed-up."""
    seconds, steps, rows = found["seconds"], found["steps"], []
    if "accuracy" in found:
        rows.append(("accuracy", f"{found['accuracy']:.1%} of {found['n']:,} questions, from all visual tokens"))
    if "majority_accuracy" in found:
        rows.append(("guessing", f"{found['majority_accuracy']:.1%}: the most frequent answer, without the image"))
    measured = {key: value for key, value in found.get("evaluation", {}).items() if not key.endswith(TIMES)}
    if measured:
        rows.append(("evaluation", ", ".join(f"{k.replace('_', ' ')} {short(v)}" for k, v in measured.items())))
    modes = [
        f"{counted(steps[mode], f'{mode} step')} in {seconds[mode]:.1f} s" for mode in ("fast", "slow") if steps[mode]
    ]
    rows.append(("time", f"{seconds['total']:.1f} s: {', '.join(modes)}"))
    if found.get("data_wait"):
        rows.append(("waiting", f"{found['data_wait']:.1%} of the steps' time, for data"))
    speedup = found.get("speedup")
    if speedup is not None:
        words = f"{speedup['speedup']:.2f} x a Trainer's steps on all tokens, measured in {speedup['rounds']} rounds"
        rows.append(("speed-up", words))
    else:
        rows.append(("speed-up", "not measured" + (f": {found['why']}" if found.get("why") else "")))
    seen = found.get("visual_tokens")
    if seen:
        saved = f"{in_thousands(seen['full'] - seen['kept'])} of {in_thousands(seen['full'])}"
        rows.append(("tokens saved", f"{saved} visual tokens of fast steps ({1 - seen['kept'] / seen['full']:.0%})"))
    if "peak_memory" in found:
        peak = found["peak_memory"]
        rows.append(("memory", f"{in_bytes(peak['bytes'])} at most, of the {peak['of']}"))
    rows.append(("written to", found["folder"]))
    if found["files"]:
        rows.append(("files", ", ".join(found["files"])))
    return rows


# --- while it trains ----------------------------------------------------------------------------------------------


def log_line(logs: dict, step: int, steps: int, width: int) -> str:
    """A line of the log for people, broken between its parts."""
    parts = [f"step {step:,}/{steps:,}"]
    parts += filter(None, [time_left(logs) if step < steps else ""])
    names = [*(name for name in NAMES if name in logs), *(name for name in logs if name not in NAMES)]
    names = [name for name in names if name not in WITHOUT and not name.endswith(TIMES)]
    parts += [f"{NAMES.get(name, name.replace('_', ' '))} {short(logs[name])}" for name in names]
    fast, slow = logs.get("fast_step_seconds"), logs.get("slow_step_seconds")
    if fast:
        parts.append(f"fast step {fast:.2g} s" + (f", {fast / slow:.2f} of a slow one's" if slow else ""))
    if "speedup_over_slow_steps" in logs:
        parts.append(f"so far {logs['speedup_over_slow_steps']:.2f} x the speed of slow steps")
    if logs.get("visual_tokens_saved"):
        parts.append(f"visual tokens saved {logs['visual_tokens_saved']:.0%}")
    if logs.get("data_wait", 0) > WAITS:
        parts.append(f"{logs['data_wait']:.0%} waiting for data")
    # Spaces inside a part do not break, nor those before a dot.
    text = "\xa0· ".join(part.replace(" ", "\xa0") for part in parts)
    options = {"subsequent_indent": "  ", "break_on_hyphens": False, "break_long_words": False}
    return textwrap.fill(text, width, **options).replace("\xa0", " ")


def time_left(pace: dict) -> str:
    """The time of the steps left, and that it is the least where a mode still to come has not been timed."""
    if "seconds_left" in pace:
        return f"{clock_time(pace['seconds_left'])} left"
    return f"{clock_time(pace['least_seconds_left'])} or more left" if "least_seconds_left" in pace else ""


def counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:100]


def print_json(value: dict) -> None:
    print(json.dumps(finite(value), default=str), flush=True)
