"""Numbers and tables as text, and JSON files."""

from __future__ import annotations

import json
from pathlib import Path, PurePath
from statistics import mean, stdev


def one_line(error: BaseException) -> str:
    """An error's message without line breaks, not too long."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def write_json(path: Path, value: dict) -> None:
    """Writes a JSON file, and its folder where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Through a second file, so that an interruption leaves the earlier one whole.
    part = path.with_name(f"_{path.name}.part")
    part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    part.replace(path)


def spread(values: list[float | None]) -> dict[str, float] | None:
    """Mean, smallest, largest and standard deviation; None where a value could not be computed."""
    if None in values:
        return None
    deviation = stdev(values) if len(values) > 1 else 0.0
    return {"mean": mean(values), "min": min(values), "max": max(values), "sd": deviation}


def without_paths(value: object) -> object:
    """The value with each absolute path in it replaced by the path's last part."""
    if isinstance(value, dict):
        return {key: without_paths(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_paths(inner) for inner in value]
    if isinstance(value, (str, PurePath)) and Path(value).is_absolute():
        return Path(value).name
    return value


def markdown_table(header: tuple[str, ...], rows: list[tuple[str, ...]], words: bool = False) -> str:
    """A Markdown table whose columns but the first are aligned right, or left where they are of words."""
    rule = ("---", *["---" if words else "---:"] * (len(header) - 1))
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def percent(share: float | None) -> str | None:
    """A share in words, or None where it was not measured."""
    return None if share is None else f"{share:.1%}"
