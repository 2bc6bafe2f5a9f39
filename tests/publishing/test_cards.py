"""Cards that are written again keep what a person wrote."""

from pathlib import Path

import jinja2
import pytest
import yaml

from hf_dualspeed.publishing.cards import MARKER, adopt_card, merge_card, plain, render, sections, split_front_matter

ROOT = Path(__file__).parents[2]
HEADINGS = ("# name", "## How to use it", "## Results", "## Citation")
TITLE, USE, RESULTS, END = (f"{words} {MARKER}" for words in HEADINGS)
GENERATED = f"""---
library_name: hf_dualspeed
tags:
- dualspeed
- dualspeed-pruner
---

{TITLE}

What it is.

{USE}

```python
# load it
## twice
```

{END}

Us.
"""


def body(card: str) -> str:
    return split_front_matter(card)[1]


def keys(card: str) -> list[str]:
    return [section.key for section in sections(body(card)) if section.text.strip()]


def test_a_first_card_is_the_generated_one():
    assert merge_card("", GENERATED) == GENERATED
    assert merge_card(" \n", GENERATED) == GENERATED


def test_merging_again_changes_nothing():
    assert merge_card(GENERATED, GENERATED) == GENERATED
    for own in (
        "mine",
        "# Mine\n\nwords\n",
        "---\na: 1\n---\n## x",
        "---\r\na: 1\r\n---\r\n# T\r\n\r\nwords\r\n",
        "---\n---\nx",
    ):
        once = merge_card(own, GENERATED)
        assert merge_card(once, GENERATED) == once


def test_generated_sections_are_replaced_in_place_and_the_users_kept_to_the_byte():
    own = "## My notes  \n\n\n* one\t \n\n    # no heading\n\n\n\n"
    existing = GENERATED.replace(USE, own + USE).replace("What it is.", "What it was.")
    merged = merge_card(existing, GENERATED)
    assert own in merged
    assert "What it was." not in merged
    assert merged.replace(own, "") == GENERATED
    assert merged.index("What it is.") < merged.index("My notes") < merged.index("How to use it")


def test_a_card_without_a_marker_is_all_the_users():
    own = "---\nlicense: mit\ntags: [mine, dualspeed]\nlanguage:\n- en\n---\n"
    own += "Hello.\n\n# My model\n\nwords\n\n## Uses\n\nmany"
    merged = merge_card(own, GENERATED)
    assert body(merged).strip().startswith(body(own))
    values = split_front_matter(merged)[0]
    assert values == {
        "license": "mit",
        "tags": ["mine", "dualspeed", "dualspeed-pruner"],
        "language": ["en"],
        "library_name": "hf_dualspeed",
    }
    assert keys(merged) == ["", "#", "Uses", "How to use it", "Citation"]


def test_without_the_marker_a_section_is_the_users():
    existing = GENERATED.replace(END, "## Citation").replace("Us.", "Me.")
    merged = merge_card(existing, GENERATED)
    assert "Me." in merged
    assert "Us." not in merged
    assert merged.count("Citation") == 1


def test_new_sections_come_behind_their_predecessor_and_old_ones_go():
    more = GENERATED.replace(END, f"{RESULTS}\n\n99 %\n\n{END}")
    merged = merge_card(GENERATED + "\n## Mine\n\nwords\n", more)
    assert keys(merged) == ["#", "How to use it", "Results", "Citation", "Mine"]
    gone = merge_card(merged, GENERATED)
    assert "99 %" not in gone
    assert "## Mine\n\nwords\n" in gone


def test_smaller_headings_of_a_person_stay_below_a_generated_section():
    notes = "### Notes\n\nIt likes cats.\n\n"
    existing = GENERATED.replace(END, f"{notes}{END}").replace("What it is.", "What it was.")
    merged = merge_card(existing, GENERATED)
    assert merged == GENERATED.replace(END, f"{notes}{END}")
    assert notes in adopt_card(GENERATED, existing)
    # They stay where they stand, and take no generated section's place by the same words.
    notes = notes.replace("Notes", "Results")
    more = GENERATED.replace(END, f"{RESULTS}\n\n99 %\n\n{END}")
    assert merge_card(GENERATED.replace(END, f"{notes}{END}"), more) == more.replace(RESULTS, f"{notes}{RESULTS}")


def test_headings_in_code_are_code():
    assert keys("~~~\n# a\n```\n# b\n~~~\n## c\n````\n## d\n```\n## e\n````\n## f\n") == ["", "c", "f"]


@pytest.mark.parametrize("mark", ["\u2028", "\x85", "\x0c"])
def test_lines_end_where_those_of_markdown_do(mark):
    assert keys(f"words{mark}## no heading\n\n## a{mark}b\r\n## c\r## d") == ["", f"a{mark}b", "c", "d"]
    # Words of a generated section do not become a person's, who would keep them for ever.
    told = GENERATED.replace("Us.", f"Us{mark}## They\n")
    assert merge_card(told, GENERATED) == GENERATED


def test_generated_keys_win_and_an_unchanged_front_matter_keeps_its_comments():
    existing = GENERATED.replace("library_name: hf_dualspeed", "library_name: hf_dualspeed  # ours")
    assert merge_card(existing, GENERATED) == existing
    existing = GENERATED.replace("library_name: hf_dualspeed", "library_name: other")
    assert yaml.safe_load(merge_card(existing, GENERATED).split("---")[1])["library_name"] == "hf_dualspeed"


def test_further_headings_of_the_first_level_are_no_title():
    for place in (TITLE, END):
        existing = GENERATED.replace(place, f"# Thanks\n\nto all\n\n{place}")
        merged = merge_card(existing, GENERATED.replace("What it is.", "What it was."))
        assert merged == existing.replace("What it is.", "What it was.")
    renamed = GENERATED.replace(TITLE, "# Mine")
    assert keys(merge_card(renamed, GENERATED)) == ["#", "How to use it", "Citation"]


# --- taken over from the Hub --------------------------------------------------------------------------------------


def test_what_the_published_card_says_beyond_the_local_one_is_taken_over():
    banner, thanks, notes = "![banner](b.png)\n\n", "# Thanks\n\nto all\n\n", "## Notes\n\none\n\n"
    published = GENERATED.replace(TITLE, banner + TITLE).replace(USE, notes + USE) + "\n" + thanks + notes
    assert adopt_card(GENERATED, published) == published
    assert adopt_card(published, GENERATED) == published  # what was deleted there returns
    assert adopt_card(published, published) == published
    assert adopt_card("", published) == published
    assert adopt_card(published, "") == published
    assert merge_card(published, GENERATED) == published


def test_the_published_words_are_newer():
    local = GENERATED.replace("tags:", "license: apache-2.0\ntags:\n- mine") + "\n## Notes\n\none\n\n## Here\n\nmine\n"
    published = GENERATED.replace("tags:", "license: mit\ntags:\n- theirs").replace(USE, "## How to use it")
    published = published.replace("Us.", "Us, earlier.") + "\n## Notes\n\ntwo\n\n## Notes\n\nthree\n"
    adopted = adopt_card(local, published)
    values = split_front_matter(adopted)[0]
    assert (values["license"], values["tags"]) == ("mit", ["mine", "dualspeed", "dualspeed-pruner", "theirs"])
    assert keys(adopted) == ["#", "How to use it", "Citation", "Notes", "Notes (2)", "Here"]
    for kept in ("\ntwo\n", "\nthree\n", "\nmine\n", "\nUs.\n", "\n## How to use it\n"):
        assert kept in adopted
    assert "\none\n" not in adopted
    assert adopt_card(adopted, published) == adopted


def test_generated_front_matter_is_not_taken_over():
    def card(values: str, given: str) -> str:
        return f"---\n{values}---\n{TITLE}\n\n<!-- front matter by dualspeed: {given} -->\n"

    published = card("base_model: earlier\nlicense: mit\ntags: [dualspeed, theirs]\n", "base_model tags")
    local = card("datasets: [now]\ntags: [dualspeed]\n", "datasets tags")
    values = split_front_matter(adopt_card(local, published))[0]
    assert values == {"datasets": ["now"], "tags": ["dualspeed", "theirs"], "license": "mit"}
    assert split_front_matter(adopt_card("# Mine\n", published))[0]["base_model"] == "earlier"  # nothing renders it


# --- broken -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tags", ["[{a: b}]", "{a: b}", "[[a]]"])
def test_tags_are_words(tags):
    for adopt in (merge_card, adopt_card):
        with pytest.raises(ValueError, match="`tags` in the front matter of README.md must be words"):
            adopt(f"---\ntags: {tags}\n---\nwords", GENERATED)


@pytest.mark.parametrize("head", ["- a\n- b", "a: [", "words"])
def test_a_broken_front_matter_is_named(head):
    with pytest.raises(ValueError, match="front matter of README.md"):
        merge_card(f"---\n{head}\n---\nwords", GENERATED)


# --- templates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["publishing", "pruners"])
def test_headings_of_templates_are_marked(folder):
    templates = sorted((ROOT / "hf_dualspeed" / folder / "templates").glob("*.jinja"))
    lines = [line for path in templates for line in path.read_text(encoding="utf-8").splitlines()]
    headings = [line for line in lines if line.startswith(("# ", "## "))]
    assert len(headings) > 5
    assert [line for line in headings if not line.endswith(f" {MARKER}")] == []


def test_values_are_shown_as_they_are(tmp_path):
    template = tmp_path / "card.md.jinja"
    template.write_text('{{ value }}\n{{ rows | table("a", "b|c") }}\n{{ share | form(".1%") }}\n')
    values = {"value": "<b> {{ x }} \n", "rows": [("1|2", None)], "share": 0.125}
    assert render(template, values) == "&lt;b&gt; {{ x }} \n| a | b\\|c |\n| --- | --- |\n| 1\\|2 |  |\n12.5%\n"
    with pytest.raises(jinja2.UndefinedError, match="'value' is undefined"):
        render(template, {})


def test_the_marker_is_no_visible_text():
    assert MARKER.startswith("<!--")
    assert MARKER.endswith("-->")


def test_emphasis_and_addresses_of_mail_are_shown_as_they_stand():
    assert plain("_a_ my_run ~~b~~ me@there.org @ me") == r"\_a\_ my_run \~\~b\~\~ me&#64;there.org @ me"
