"""Progress of work: bars on a terminal that leave no trace, plain lines elsewhere."""

import io
import logging
import re
import sys
import time

import pytest
from tqdm import tqdm

from hf_dualspeed.utils import progress
from hf_dualspeed.utils.progress import Work, clock_time, screen_print, to_people, track


class Terminal(io.StringIO):
    def isatty(self):
        return True


def on_terminal(monkeypatch) -> Terminal:
    """Both streams as one terminal of 80 columns. No fixture: pytest sets the streams between it and the test."""
    stream = Terminal()
    for name, value in (("TERM", "xterm"), ("COLUMNS", "80"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(sys, "stdout", stream)
    return stream


def lines(text: str) -> list[str]:
    """What was ever written, without control sequences; what comes after one begins a line."""
    return [line.strip() for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "\n", text))]


def on_screen(text: str) -> list[str]:
    """The lines that a terminal shows in the end."""
    rows, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[\d;?]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", text):
        if part == "\n":
            row, column = row + 1, 0
            rows += [""] * (row == len(rows))
        elif part == "\r":
            column = 0
        elif part == "\x1b[2K":
            rows[row] = ""
        elif part.startswith("\x1b"):
            row -= int(part[2:-1] or 1) if part.endswith("A") else 0
        else:
            rows[row] = rows[row][:column].ljust(column) + part + rows[row][column + len(part) :]
            column += len(part)
    return [line.strip() for line in rows if line.strip()]


def test_off_a_terminal_long_work_says_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setattr(progress, "PAUSE", 0.01)
    with Work("Counting", 1000) as work:
        work.advance(250)
        until, said = time.monotonic() + 20, ""
        while "left\n" not in said and time.monotonic() < until:
            time.sleep(0.01)
            said += capsys.readouterr().err
    # A line may have come before there was anything to count.
    assert re.search(r"^Counting: 250 of 1,000, after 0:00:\d\d, 0:00:\d\d left\n", said, re.MULTILINE)


def test_short_work_and_silent_work_say_nothing_there(monkeypatch, capsys):
    assert list(track("abc", "Counting")) == ["a", "b", "c"]
    monkeypatch.setattr(progress, "PAUSE", 0.001)
    for _ in track(range(3), "Counting", disable=True):
        time.sleep(0.005)
    assert capsys.readouterr() == ("", "")


def test_work_of_unknown_length_has_a_line_too():
    with Work("Merging") as work:
        assert work.line() == "Merging: after 0:00:00"
    assert clock_time(3725.4) == "1:02:05"


def fails_while_it_is_shown(logger: logging.Logger) -> None:
    with Work("Training", 4) as outer:
        outer.advance()
        with Work("Evaluating", 2):  # inside of the other, on the same screen
            logger.warning("a warning")
            print("a line")
            screen_print("from ours")
            assert to_people()
        raise RuntimeError("ends here")


def test_lines_stand_above_the_bar_and_errors_below_nothing(monkeypatch):
    terminal = on_terminal(monkeypatch)
    handler = logging.StreamHandler()  # holds the stream of before
    logger = logging.getLogger("test_progress")
    logger.addHandler(handler)
    try:
        with pytest.raises(RuntimeError, match="ends here"):
            fails_while_it_is_shown(logger)
        assert handler.stream is terminal
    finally:
        logger.removeHandler(handler)
    assert sys.stderr is terminal
    shown = lines(terminal.getvalue())
    assert {"a warning", "a line", "from ours"} <= set(shown)
    assert any("Training" in line and "1/4" in line for line in shown)
    assert any("Evaluating" in line and "0/2" in line for line in shown)
    # The last of the bar is taken away: what comes next begins a line.
    assert not any(lines(terminal.getvalue().rpartition("\x1b[2K")[2]))
    assert progress._screen._bars is None


def test_what_goes_to_a_file_is_not_drawn_into_the_bar_of_a_terminal(monkeypatch):
    terminal = on_terminal(monkeypatch)
    file = io.StringIO()
    monkeypatch.setattr(sys, "stdout", file)
    with Work("Training", 4):
        print("a line")
        screen_print("from ours")
    assert file.getvalue() == "a line\nfrom ours\n"
    assert "a line" not in terminal.getvalue()


def test_bars_of_other_packages_have_their_place(monkeypatch):
    """They are drawn below ours, once at a time, and leave no line behind; neither does what moves the cursor."""
    terminal = on_terminal(monkeypatch)
    with Work("Loading the model"):
        inner = tqdm(total=47, desc="Loading weights", file=sys.stderr, mininterval=0)
        below = tqdm(total=3, desc="Below it", file=sys.stderr, position=1, leave=False, mininterval=0)
        for done in range(47):
            inner.update()
            below.update(done < 3)
            assert "Loading weights" in progress._screen._bars.others or "Below" in progress._screen._bars.others
        progress._screen._bars.refresh()
        print("a warning", file=sys.stderr)
        below.close()
        inner.close()
        assert progress._screen._bars.others == ""
    assert sys.stderr is terminal
    assert "Loading weights" in terminal.getvalue()
    assert on_screen(terminal.getvalue()) == ["a warning"]
