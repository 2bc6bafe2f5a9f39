"""Multiple choice: finds the option that a free text chooses, and checks whether it is the right one."""

import re
import string

import datasets
import evaluate

DESCRIPTION = (
    "The share of questions whose right option was chosen. The choice is read out of a free text: a letter such as "
    "'B', '(b) because' or 'The answer is B', or an option's own words. A text that makes no choice is wrong."
)
INPUTS = """
Args:
    predictions (`list` of `str`): The answers.
    references (`list` of `list` of `str`, or of `str`): The letter of the right option, or its text.
    options (`list` of `list` of `str`): The options of each question, without letters: the first one is A.

Returns:
    `dict` with `multiple_choice` (`float`), between 0 and 1.
"""

LETTERS = string.ascii_uppercase
# A letter alone or at the start: "B", "(b)", "B.", "b) because", "**B**: it is".
LEADING = re.compile(r"[\s*\"'(\[]*([a-z])[\s*\"']*(?:$|[).\]:,]+(?:\W|$))", re.IGNORECASE)
# "The answer is B", "Answer: (b)", "I choose option C". Lower-case letters count only in brackets or at an end, because
# "a" may be an article.
NAMED = re.compile(
    r"\b(?:[Aa]nswer|ANSWER|[Oo]ption|[Cc]hoice)\b(?:\s+(?:is|would be|must be|[Oo]ption|[Cc]hoice))*[\s:*\"']*"
    r"(?:([A-Z])(?![\w'])|[(\[]([A-Za-z])[)\]]|([a-z])(?=[\s*\"']*(?:[.,;:)]|$)))"
)
BRACKETED = re.compile(r"[(\[]([A-Za-z])[)\]]")
# A single capital letter; A and I in front of a lower-case word are words themselves.
CAPITAL = re.compile(r"(?<![\w'])(?:([B-HJ-Z])|([AI])(?!\s+[a-z]))(?![\w'])")


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class MultipleChoice(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        texts = datasets.Sequence(text)
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=[
                datasets.Features({"predictions": text, "references": texts, "options": texts}),
                datasets.Features({"predictions": text, "references": text, "options": texts}),
            ],
        )

    def _compute(self, predictions, references, options):
        hits = [
            chosen(prediction, given) in right_ones(accepted, given)
            for prediction, accepted, given in zip(predictions, references, options, strict=True)
        ]
        return {"multiple_choice": sum(hits) / len(hits)}


def right_ones(references, options):
    """The indices of the right options."""
    return {right_one(one, options) for one in ([references] if isinstance(references, str) else references)}


def right_one(reference, options):
    letters = LETTERS[: len(options)]
    if len(reference.strip()) == 1 and reference.strip().upper() in letters:
        return letters.index(reference.strip().upper())
    texts = [normalized(option) for option in options]
    if normalized(reference) not in texts:
        raise ValueError(
            f"The reference {reference!r} is neither a letter of {letters!r} nor one of the options {list(options)}. "
            "Give the letter of the right option, or its text."
        )
    return texts.index(normalized(reference))


def chosen(text, options):
    """The index of the option that a text chooses; None if it chooses none, or several."""
    letters, texts = LETTERS[: len(options)], [normalized(option) for option in options]
    leading = LEADING.match(text)
    if leading and leading[1].upper() in letters:
        return letters.index(leading[1].upper())
    if normalized(text) in texts:
        return texts.index(normalized(text))
    named = [found for match in NAMED.finditer(text) for found in match.groups() if found and found.upper() in letters]
    if named:  # the last one counts: an answer may correct itself
        return letters.index(named[-1].upper())
    found = quoted(normalized(text), texts)
    return only(found) if found else lettered(text, letters)


def quoted(text, options):
    """The indices of the options quoted in the text, except those contained in a longer quoted option."""
    there = [place for place, option in enumerate(options) if option and f" {option} " in f" {text} "]
    return [p for p in there if not any(p != q and f" {options[p]} " in f" {options[q]} " for q in there)]


def lettered(text, letters):
    """The index of the only letter in brackets, or else of the only single capital letter; None if there is none."""
    for pattern in (BRACKETED, CAPITAL):
        found = {found.upper() for match in pattern.finditer(text) for found in match.groups() if found}
        places = sorted(letters.index(letter) for letter in found if letter in letters)
        if places:
            return only(places)
    return None


def only(places):
    return places[0] if len(places) == 1 else None


def normalized(text):
    """The text's words in lower case, without punctuation around them."""
    words = (word.strip(string.punctuation) or word for word in text.lower().split())
    return " ".join(words)
