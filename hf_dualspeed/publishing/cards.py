"""Renders cards from templates, and merges them: generated parts are renewed, hand-written parts stay."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..utils.text import markdown_table

TEMPLATES = Path(__file__).with_name("templates")
MARKER = "<!-- dualspeed -->"  # ends the headings of generated sections
# Lists the generated keys of the front matter, which are removed when a later run does not give them.
GIVEN = re.compile(r"<!-- front matter by dualspeed: ([\w -]*) -->")
FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?)(?:^|\r?\n)---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
# Cards generate none below the second level: smaller ones are a person's, also within a generated section.
HEADING = re.compile(r"(#{1,6})[ \t]+(.*)")
# Of Markdown's lines; `splitlines` ends them within words, too, such as at U+2028.
LINE_END = re.compile(r"(?<=\n)|(?<=\r)(?!\n)")
FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")


@dataclass
class Section:
    """A heading with the text below it, up to the next one.

    `key` is the heading's words, "#" for the title, "# words" and "### words" for headings of other levels than 2, and
    "" for the text above all headings. It is unique within a card.
    """

    key: str
    text: str
    generated: bool


class Markdown(str):
    """Text that is Markdown of our own making, which [`render`] leaves as it is."""


def plain(value: object) -> object:
    """Text as Markdown that shows it as it stands, in one line: no HTML, no link, no code. Other values unchanged."""
    if not isinstance(value, str) or isinstance(value, Markdown):
        return value
    text = re.sub(r"[ \t]*[\r\n]\s*", " ", value)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*~\[\]]|(?<!\w)_|_(?!\w))", r"\\\1", text)
    text = re.sub(r"(www)\.", r"\1&#46;", text.replace("://", "&#58;//"), flags=re.IGNORECASE)
    return re.sub(r"(?<=\S)@(?=\S)", "&#64;", text)  # no address of mail


def code(value: object) -> Markdown:
    """Text, or each text of a list, as a code span in one line."""
    if isinstance(value, list):
        return Markdown(", ".join(map(code, value)))
    return Markdown(f"`{' '.join(str(value).replace('`', chr(39)).split())}`")


def quoted(value: str) -> Markdown:
    """Text as a string of Python, within a fenced block."""
    return Markdown(json.dumps(value, ensure_ascii=False))


def address(value: str) -> Markdown:
    """The address of a file beside the card, as the target of a link: never one with a scheme."""
    return Markdown(quote(value.lstrip("/")))


def render(template: Path, values: dict) -> str:
    """A card from a Jinja template, which may include those of [`TEMPLATES`] by name.

    Text is shown as it stands ([`plain`]), unless it is [`Markdown`]. Beside Jinja's own filters there are `form`,
    Python's `format`; `code`, `quoted` and `address`, the functions of this module; `markdown`, which declares
    [`Markdown`]; and `table`, a Markdown table of rows below the given header.

    Raises:
        jinja2.UndefinedError: the template names a value that is not there.
    """
    environment = Environment(
        loader=FileSystemLoader([template.parent, TEMPLATES]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=plain,
    )
    environment.filters["form"] = format
    environment.filters |= {"code": code, "quoted": quoted, "address": address, "markdown": Markdown, "table": table}
    return environment.get_template(template.name).render(values)


def table(rows: Iterable[Sequence[object]], *header: str) -> Markdown:
    """A Markdown table of words, whose cells are [`plain`]."""
    lines = ([plain(cell) for cell in row] for row in rows)
    return Markdown(markdown_table([plain(name) for name in header], lines, words=True))


def merge_card(existing: str, generated: str) -> str:
    """Renews a card (README.md with YAML front matter) and keeps what a person wrote.

    Front matter: generated keys replace existing ones, other keys stay, `tags` are united.

    Sections (below headings of any level): those with the marker are replaced in place, or removed if they are no
    longer generated. Those without it are the user's and stay, even against a generated section of the same heading.
    New sections come behind the generated section before them, or at the end. Merging again changes nothing.

    Raises:
        ValueError: the front matter of the existing card is not a YAML mapping.
    """
    if not existing.strip():
        return generated
    old_head, old_body = split_front_matter(existing)
    new_head, new_body = split_front_matter(generated)
    return _merged_head(existing, old_head, new_head, old_body) + _merged_body(sections(old_body), sections(new_body))


def adopt_card(local: str, published: str, generated: bool = True) -> str:
    """Copies what a person wrote into the published card to the local one; the published card counts as newer.

    Of hand-written sections and front matter values in both cards, the published ones win. Those in one card only stay,
    even if they were deleted on the Hub. Generated sections stay local; those that are missing there are taken over
    with `generated`, for a later [`merge_card`] to renew or remove.

    Raises:
        ValueError: the front matter of either card is not a YAML mapping.
    """
    ours, our_body = split_front_matter(local)
    theirs, their_body = split_front_matter(published)
    if not local.strip() or not published.strip():
        return local if local.strip() else published
    # Generated values of the published card come from an earlier run; its tags may be a person's.
    if given_keys(local):
        given = given_keys(published) - {"tags"}
        theirs = {key: value for key, value in theirs.items() if key not in given}
    own = {section.key for section in sections(our_body)}
    found = [one for one in sections(their_body) if generated or not one.generated or one.key in own]
    newer = {section.key: section for section in found if not section.generated and section.text.strip()}
    kept = [newer.get(section.key, section) for section in sections(our_body)]
    return _merged_head(local, ours, theirs, our_body) + _joined(_with_missing(kept, found))


def given_keys(card: str) -> set[str]:
    """The generated keys of the front matter, as the card itself lists them."""
    match = GIVEN.search(card)
    return set(match[1].split()) if match else set()


def split_front_matter(card: str) -> tuple[dict, str]:
    """The front matter's values and the text below it.

    Raises:
        ValueError: the front matter is not a YAML mapping, or its tags are not words.
    """
    match = FRONT_MATTER.match(card)
    if match is None:
        return {}, card
    try:
        values = yaml.safe_load(match[1]) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # broken dates, deep nesting
        values = error
    if not isinstance(values, dict):
        raise ValueError(
            f"The front matter of README.md, between the lines `---`, must be a YAML mapping, got "
            f"{' '.join(str(values).split())[:200]!r}. Correct it, or move README.md away to have it written anew."
        )
    if any(isinstance(tag, (dict, list)) for tag in _as_list(values.get("tags"))):
        raise ValueError(f"`tags` in the front matter of README.md must be words, got {values['tags']!r}. Correct it.")
    return values, card[match.end() :]


def sections(body: str) -> list[Section]:
    """The sections of a card; the first is the text above all headings.

    The title is the generated heading of level 1, or the first one if none is generated.
    """
    found, fence = [Section("", "", False)], None
    for line in LINE_END.split(body):
        mark = FENCE.match(line)
        if mark is not None and (fence is None or mark[1].startswith(fence)):
            fence = mark[1] if fence is None else None
        match = HEADING.match(line) if fence is None else None
        if match is not None:
            words = match[2].replace(MARKER, "").strip()
            found.append(Section(words if match[1] == "##" else f"{match[1]} {words}", "", MARKER in line))
        found[-1].text += line
    titles = [section for section in found if section.key.startswith("# ")]
    for section in sorted(titles, key=lambda section: not section.generated)[:1]:
        section.key = "#"
    seen: dict[str, int] = {}
    for section in found:
        seen[section.key] = number = seen.get(section.key, 0) + 1
        section.key += f" ({number})" if number > 1 else ""
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
    kept = [fresh.get(section.key) if section.generated else section for section in old]
    return _joined(_with_missing([section for section in kept if section is not None], new))


def _with_missing(kept: list[Section], others: list[Section]) -> list[Section]:
    """`kept` plus the sections of `others` whose keys it lacks, each behind the one that it follows in `others`."""
    kept, end = list(kept), None  # end: index where the next new section goes
    for section in others:
        places = [place for place, one in enumerate(kept) if one.key == section.key and one.text.strip()]
        if not places and section.text.strip():
            kept = kept if section.key else [one for one in kept if one.key]  # it replaces empty lines
            places = [0 if section.key == "" else len(kept) if end is None else end]
            kept.insert(places[0], section)
        if section.key and places and kept[places[0]].generated == section.generated:
            end = places[0] + 1
            while end < len(kept) and kept[end].key.startswith("###"):  # smaller headings belong to it
                end += 1
    return kept


def _joined(parts: list[Section]) -> str:
    """The sections' texts, separated by empty lines; a user's are otherwise unchanged."""
    text = ""
    for part in parts:
        if text.strip() and not text.endswith(("\n\n", "\n\r\n")):
            text += "\n" if text.endswith("\n") else "\n\n"
        text += f"{part.text.rstrip()}\n" if part.generated else part.text
    return text


def _as_list(value: object) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]
