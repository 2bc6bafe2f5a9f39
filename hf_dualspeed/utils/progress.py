"""Shows that work goes on: a bar on a terminal or in a notebook, elsewhere a plain line now and then, on stderr."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import IO, TypeVar

from rich.console import Console, RenderableType
from rich.file_proxy import FileProxy
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column
from rich.text import Text

Item = TypeVar("Item")
# Seconds between two plain lines: more of them the longer it takes, as 60 h need no line every 8 s.
PAUSE, LONGEST_PAUSE = 8.0, 60.0


class Work:
    """A piece of work that is shown from `with` to its end, which leaves no trace of a bar, whatever happens.

    A terminal and a notebook get a bar, beside those of other work. Off a terminal, a thread writes a line after each
    `PAUSE` seconds, so that short work says nothing.

    Args:
        description (`str`): what is done, such as "Counting tokens".
        total (`int`, *optional*): its steps, if it is known how many.
        disable (`bool`): shows nothing.
    """

    def __init__(self, description: str, total: int | None = None, disable: bool = False):
        self.description, self.total, self.disable = description, total, disable
        self.done, self.note = 0, ""
        self._task: TaskID | None = None
        self._over: threading.Event | None = None

    def __enter__(self) -> Work:
        self._begun = time.monotonic()
        if self.disable:
            return self
        self._task = _screen.add(self)
        if self._task is None:
            self._over = threading.Event()
            threading.Thread(target=self._speak, args=(self._over,), daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        if self._task is not None:
            _screen.remove(self._task)
        if self._over is not None:
            self._over.set()
        self._task = self._over = None

    def advance(self, steps: int = 1, note: str | None = None) -> None:
        """Counts steps. `note` replaces the estimate of the time left, which supposes that steps take equally long."""
        self.done += steps
        self.note = self._left() if note is None else note
        if self._task is not None:
            _screen.update(self._task, completed=self.done, note=self.note)

    def _left(self) -> str:
        if not self.total or not self.done:
            return ""
        taken = time.monotonic() - self._begun
        return f"{clock_time(taken / self.done * (self.total - self.done))} left"

    def line(self) -> str:
        """The state of the work in a line."""
        counted = f"{self.done:,} of {self.total:,}" if self.total else f"{self.done:,}" if self.done else ""
        after = f"after {clock_time(time.monotonic() - self._begun)}"
        return f"{self.description}: {', '.join(filter(None, (counted, after, self.note)))}"

    def _speak(self, over: threading.Event) -> None:
        while not over.wait(min(LONGEST_PAUSE, max(PAUSE, (time.monotonic() - self._begun) / 60))):
            print(self.line(), file=sys.stderr, flush=True)


def track(items: Iterable[Item], description: str, total: int | None = None, disable: bool = False) -> Iterator[Item]:
    """The items, with their progress. A generator: close it where a loop may end early."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)
    with Work(description, total, disable) as work:
        for item in items:
            yield item
            work.advance()


def clock_time(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))


def to_people(stream=None) -> bool:
    """Whether a person reads what goes to the stream, stdout by default: a terminal or a notebook."""
    return is_terminal(stream or sys.stdout) or Console().is_jupyter


def is_terminal(stream) -> bool:
    """Whether a stream, or that behind rich's stand-in, is a terminal. Old versions of rich deny it of theirs."""
    return getattr(stream, "rich_proxied_file", stream).isatty()


class Screen:
    """The one live display of a process, to which each piece of work adds a bar.

    While it is open, lines that go to stdout and stderr appear above it, those of log handlers too, and bars of other
    packages below.
    """

    def __init__(self):
        self._bars: Bars | None = None
        self._plain = None  # stderr as it was
        self._handlers: list[tuple[logging.StreamHandler, object]] = []
        self._lock = threading.RLock()

    def add(self, work: Work) -> TaskID | None:
        """Adds a bar and returns its name; None where there is no place for bars."""
        with self._lock:
            if self._bars is None:
                console = Console(stderr=True)
                if not (console.is_jupyter or (is_terminal(sys.stderr) and not console.is_dumb_terminal)):
                    return None
                self._open(console)
            return self._bars.add_task(work.description, total=work.total, note="")

    def update(self, task: TaskID, **values) -> None:
        with self._lock:
            if self._bars is not None:
                self._bars.update(task, **values)

    def remove(self, task: TaskID) -> None:
        with self._lock:
            if self._bars is not None:
                self._bars.remove_task(task)
                if not self._bars.task_ids:
                    self._close()

    def print(self, *parts) -> None:
        """Prints to stdout, above the bars if they are on the same terminal."""
        with self._lock:
            shared = self._bars is not None and is_terminal(sys.stdout)
            console = self._bars.console if shared else Console(highlight=False)
            console.print(*parts, highlight=False)

    def _open(self, console: Console) -> None:
        self._bars = Bars(
            SpinnerColumn(finished_text=" "),
            TextColumn(
                "{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=2)
            ),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            Counts(table_column=Column(no_wrap=True)),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", markup=False, table_column=Column(no_wrap=True)),
            console=console,
            transient=True,
            redirect_stdout=is_terminal(sys.stdout),
            redirect_stderr=False,
            expand=True,
        )
        self._plain = plain = sys.stderr
        self._bars.start()
        sys.stderr = Lines(console, plain, self._bars)
        # Handlers hold the stream of before, and would write into the bar.
        for logger in [logging.root, *logging.root.manager.loggerDict.values()]:
            for handler in getattr(logger, "handlers", ()):
                if isinstance(handler, logging.StreamHandler) and handler.stream is plain:
                    self._handlers.append((handler, plain))
                    handler.setStream(sys.stderr)

    def _close(self) -> None:
        for handler, stream in self._handlers:
            handler.setStream(stream)
        if isinstance(sys.stderr, Lines):
            sys.stderr = self._plain
        self._bars.stop()
        self._bars, self._handlers = None, []


class Bars(Progress):
    """The bars of our work, and below them the last line that another package writes over and over."""

    others = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        if self.others:
            yield Text(self.others, no_wrap=True, overflow="ellipsis")


class Lines(FileProxy):
    """Stands in for stderr beside bars: whole lines go above them, a line that is written over and over below.

    Such a line, as tqdm's bars are, begins with a carriage return; it is over with the next line break. Bars that lie
    below one another come after line breaks and moves of the cursor, which are left out.
    """

    def __init__(self, console: Console, file: IO[str], bars: Bars):
        super().__init__(console, file)
        self._bars, self._begun = bars, False

    def write(self, text: str) -> int:
        shown = text.replace("\x1b[A", "")
        if shown.startswith("\r"):
            self._bars.others = shown.rpartition("\r")[2].strip()
        elif shown.strip("\n") or self._begun:
            self._begun = not shown.endswith("\n")
            super().write(shown)
        elif shown:
            self._bars.others = ""
        return len(text)

    def flush(self) -> None:
        self._begun = False
        super().flush()


class Counts(ProgressColumn):
    """Steps done, of all if they are known."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.completed:,.0f}/{task.total:,.0f}" if task.total else "")


_screen = Screen()
screen_print: Callable[..., None] = _screen.print
