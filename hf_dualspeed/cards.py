"""Cards that are written again: what is generated is renewed, what a person wrote stays."""

from __future__ import annotations

import re
from dataclasses import dataclass

import yaml

MARKER = "<!-- dualspeed -->"
FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?)(?:^|\r?\n)---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
HEADING = re.compile(r"(#{1,2})[ \t]+(.*)")
FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")


@dataclass
class Section:
    """A heading of level 1 or 2 with what stands below it; `key` is the heading's words, "#" for a title."""

    key: str
    text: str
    generated: bool


def heading(words: str, level: int = 2) -> str:
    """The heading of a generated section, with the hidden marker by which it is found again."""
    return f"{'#' * level} {words} {MARKER}"


def merge_card(existing: str, generated: str) -> str:
    """Renews a card (README.md with YAML front matter) and keeps what a person wrote.

    Front matter: generated keys replace their likes, other keys stay, `tags` are united. Sections, the parts below
    headings of level 1 and 2: those that carry the marker are replaced in place, or removed where they are no longer
    generated; those without it are the user's and kept as they are, also in place of a generated one of the same
    heading. What is new comes behind the generated section before it, or at the end. Merging again changes nothing.

    Raises:
        ValueError: the front matter of the existing card is no YAML mapping.
    """
    if not existing.strip():
        return generated
    old_head, old_body = split_front_matter(existing)
    new_head, new_body = split_front_matter(generated)
    return _merged_head(existing, old_head, new_head, old_body) + _merged_body(sections(old_body), sections(new_body))


def split_front_matter(card: str) -> tuple[dict, str]:
    """The front matter's values and the text below it.

    Raises:
        ValueError: the front matter is no YAML mapping.
    """
    match = FRONT_MATTER.match(card)
    if match is None:
        return {}, card
    try:
        values = yaml.safe_load(match[1]) or {}
    except yaml.YAMLError as error:
        values = error
    if not isinstance(values, dict):
        raise ValueError(
            f"The front matter of README.md, between the lines `---`, must be a YAML mapping, got "
            f"{' '.join(str(values).split())[:200]!r}. Correct it, or move README.md away to have it written anew."
        )
    return values, card[match.end() :]


def sections(body: str) -> list[Section]:
    """The parts of a card; what stands above the first heading has the key ""."""
    found, fence = [Section("", "", False)], None
    for line in body.splitlines(keepends=True):
        mark = FENCE.match(line)
        if mark is not None and (fence is None or mark[1].startswith(fence)):
            fence = mark[1] if fence is None else None
        match = HEADING.match(line) if fence is None else None
        if match is not None:
            words = match[2].replace(MARKER, "").strip()
            found.append(Section("#" if match[1] == "#" else words, "", MARKER in line))
        found[-1].text += line
    return found


def _merged_head(existing: str, old: dict, new: dict, old_body: str) -> str:
    values = {**old, **new}
    tags = [*_as_list(old.get("tags")), *_as_list(new.get("tags"))]
    if tags:
        values["tags"] = list(dict.fromkeys(tags))
    if values == old:
        return existing[: len(existing) - len(old_body)]
    gap = "" if old_body[:1] in ("", "\r", "\n") else "\n"
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---\n{gap}"


def _merged_body(old: list[Section], new: list[Section]) -> str:
    fresh = {section.key: section for section in new}
    kept, taken = [], set()
    for section in old:
        if section.generated and (section.key not in fresh or section.key in taken):
            continue
        taken.add(section.key)
        kept.append(fresh[section.key] if section.generated else section)
    end = None  # behind which generated section the next one goes
    for section in new:
        if section.key not in taken and section.text.strip():
            kept.insert(len(kept) if end is None else end, section)
        if section in kept:
            end = kept.index(section) + 1
    return _joined(kept)


def _joined(parts: list[Section]) -> str:
    """The sections' texts with an empty line behind each; those of a user otherwise as they are."""
    text = ""
    for part in parts:
        if text.strip() and not text.endswith(("\n\n", "\n\r\n")):
            text += "\n" if text.endswith("\n") else "\n\n"
        text += f"{part.text.rstrip()}\n" if part.generated else part.text
    return text


def _as_list(value: object) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]
