"""Multiple choice: finds the option that a free text chooses, and checks whether it is the right one."""

import itertools
import re
import string
import unicodedata

import datasets
import evaluate

DESCRIPTION = (
    "The share of questions whose right option was chosen. The choice is read out of a free text: a letter such as "
    "'B', '(b) because' or 'The answer is B', or an option's own words. What the text denies ('not A') does not count. "
    "A text that makes no choice, or several, is wrong."
)
INPUTS = """
Args:
    predictions (`list` of `str`): The answers.
    references (`list` of `list` of `str`, or of `str`): The letter of the right option, or its text.
    options (`list` of `list` of `str`): The options of each question, without letters: the first one is A. No two may
        be the same, and none the letter of another one.

Returns:
    `dict` with `multiple_choice` (`float`), between 0 and 1.
"""

LETTERS = string.ascii_uppercase
# The minus sign, full-width letters, digits and signs, and the full stop, comma and space of Chinese and Japanese.
ASCII = {0x2212: "-", 0x3002: ".", 0x3001: ",", 0x3000: " "}
ASCII |= {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
# What may surround a word and says nothing. Signs and symbols do: "-5", "C++", "Na+", "5%".
MARKS = ".,;:!?*\"'`()[]{}“”‘’„«»"

# A capital letter by itself. A and I in front of a lower-case word are words themselves, but for the verbs and
# conjunctions that follow no article.
CAPITAL = (
    r"(?:[B-HJ-Z]|[AI](?!\s+[a-z])|[AI](?=\s+(?:or|and|nor)\s+(?:[Oo]ption\s+)?[(\[]?[A-Z]\b)"
    r"|A(?=\s+(?:is|was|isn|wasn|seems|looks|fits|because|since|as|but|rather|instead|cannot|can|must|does|doesn)\b))"
    r"(?![\w'’+#&]|-\w)"
)
# Letters that name an option, one in each match. Lower-case ones count in brackets only, because "a" is an article.
LETTER = re.compile(rf"(?<![\w'’&-])(?:[(\[]\s*([A-Za-z])\s*[)\]]|({CAPITAL}))")
# A letter alone or at the start: "B", "(b)", "B.", "b) because", "**B**: it is".
LEADING = re.compile(r"[\s*\"'(\[]*([A-Za-z])[\s*\"']*(?:$|[).\]:,]+(?:\W|$))")
# "The answer is B", "Answer: (b)", "I choose option C"; a lower-case letter where the clause ends.
NAMED = re.compile(
    r"\b(?:answer|option|choice)\b(?:\s+(?:is|would\s+be|must\s+be|should\s+be|option|choice|letter))*[\s:*\"']*"
    rf"(?:[(\[]\s*([A-Za-z])\s*[)\]]|((?-i:{CAPITAL}))|((?-i:[a-z]))(?=[\s*\"']*(?:[.,;:)]|$)))",
    re.IGNORECASE,
)

NOT = r"\b(?:not|never|cannot)\b|n['’]t\b"
BETWEEN = (
    r"be|been|is|it|it['’]s|that|this|the|a|an|either|both|say|think|believe|choose|pick|select|really|likely|probably|"
    r"correct|right|answer|option|choice|letter"
)
# "not", with words behind it that hand it on to what follows: "I do not think it is".
OTHER_THAN = (
    r"\b(?:neither|nor|rather\s+than|instead\s+of|other\s+than|except|excludes?|excluding|eliminates?"
    r"|rules?\s+out|ruling\s+out|(?:all|any|anything|everything|every\s+option)\s+but)\b"
)
NO_BEFORE = re.compile(rf"(?:{NOT}|{OTHER_THAN})(?:\s+(?:{BETWEEN}))*[\s*\"'(\[]*$", re.IGNORECASE)
REACH = 200  # characters in front of an option in which a denial is looked for
# "is wrong", "is not right", "isn't", "can be ruled out", up to the end of a clause.
NO_BEHIND = re.compile(
    r"(?<!not )(?<!n't )(?<!n’t )\b(?:wrong|incorrect|false|impossible|(?:ruled|left)\s+out|excluded|eliminated)\b"
    rf"|(?:{NOT})(?:\s+(?:be|quite|the|an?|right|correct|true|possible|valid|it|one|answer|option|choice))*"
    r"(?:\s+(?:and|or))?\s*$",
    re.IGNORECASE,
)
CLAUSE = re.compile(r"[.,;:!?\n]|\b(?:but|so|because|since|while|whereas|then|thus|hence|therefore)\b", re.IGNORECASE)
# What joins options to a list: "A or B", "A, B", "(A)/(B)".
LIST = re.compile(
    r"[\s*\"')\]]*(?:[,/&]|,?\s*\b(?:or|and|nor)\b)[\s*\"'(\[]*(?:(?:the|option|a|an)\s+)*", re.IGNORECASE
)


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
        hits = []
        for place, (prediction, accepted) in enumerate(pairs(predictions, references)):
            try:
                given = checked(options[place])
                hits.append(chosen(prediction, given) in {right_one(one, given) for one in accepted})
            except ValueError as error:
                raise ValueError(f"Question {place} cannot be scored: {error}") from None
        return {"multiple_choice": sum(hits) / len(hits)}


def pairs(predictions, references):
    """Each prediction with the list of its references. Raises a `ValueError` where a text is missing."""
    for place, (prediction, given) in enumerate(zip(predictions, references, strict=True)):
        accepted = [given] if isinstance(given, str) else list(given or ())
        for name, value in (("predictions", [prediction]), ("references", accepted)):
            if not value or None in value:
                raise ValueError(
                    f"`{name}`[{place}] is {value[0] if name == 'predictions' else given}: a text is missing. Fill it, "
                    "or leave the question out of all columns."
                )
        # A blank text among others would make no answer a right one.
        yield prediction, [text for text in accepted if text.strip()] or accepted


def checked(options):
    """The options as a list. Raises a `ValueError` where one is missing, or two cannot be told apart."""
    if not options or None in options:
        raise ValueError(
            f"its options are {options}: a text is missing, which would give others its letter. Fill it, or "
            "leave the question out."
        )
    texts, letters = [spaced(option) for option in options], LETTERS[: len(options)]
    for place, text in enumerate(texts):
        if texts.index(text) != place:
            raise ValueError(f"two of its options are {text!r}, and nobody knows which one is meant. Leave one out.")
        if len(text) == 1 and text.upper() in letters and letters.index(text.upper()) != place:
            raise ValueError(
                f"its option {letters[place]} is {text!r}, which is also the letter of another one. Write options that "
                f"are no letters, such as 'type {text}'."
            )
    return list(options)


def right_one(reference, options):
    """The index of the option that a reference names by text or letter."""
    places, letters = same(reference, options), LETTERS[: len(options)]
    if not places and spaced(reference).upper() in list(letters):
        return letters.index(spaced(reference).upper())
    if not places:
        raise ValueError(
            f"The reference {reference!r} is neither a letter of {letters!r} nor one of the options {list(options)}. "
            "Give the letter of the right option, or its text."
        )
    if len(places) > 1:
        likes = [options[place] for place in places]
        raise ValueError(f"the reference {reference!r} may be each of the options {likes}. Write it as the option is.")
    return places[0]


def chosen(text, options):
    """The index of the option that a text chooses; None if it chooses none, or several."""
    places = same(text, options)
    if places:
        return only(places)
    text, letters = unicodedata.normalize("NFC", text).translate(ASCII), LETTERS[: len(options)]
    found = {**marked(LETTER, text, letters), **marked(NAMED, text, letters)}
    leading = marked(LEADING, text, letters, whole=False)
    meant = affirmed(text, {**found, **leading})
    for start in leading:
        if start in meant:
            return only(meant[start])
    named = [meant[start] for start in sorted(marked(NAMED, text, letters)) if start in meant]
    if named:  # the last one counts: an answer may correct itself
        return only(named[-1])
    meant_texts = affirmed(text, quoted(text, options))
    if meant_texts:
        return only(set().union(*meant_texts.values()))
    # Brackets say more than a capital letter by itself.
    bracketed = [places for start, places in meant.items() if text[start - 1 : start] in ("(", "[")]
    return only(set().union(*(bracketed or meant.values())))


def marked(pattern, text, letters, whole=True):
    """The options that letters name: start to (end, indices). Not `whole`, only a match at the text's start counts."""
    matches = pattern.finditer(text) if whole else filter(None, [pattern.match(text)])
    spans = [match.span(group) for match in matches for group in range(1, pattern.groups + 1) if match[group]]
    return {a: (b, {letters.index(text[a:b].upper())}) for a, b in spans if text[a:b].upper() in letters}


def quoted(text, options):
    """The options whose words stand in the text, but not within those of a longer one: start to (end, indices)."""
    for flags in (0, re.IGNORECASE):
        spans = {}
        for index, option in enumerate(options):
            for match in words_of(option, flags).finditer(text):
                spans.setdefault(match.span(), set()).add(index)
        if spans:
            return {
                a: (b, spans[a, b]) for a, b in spans if not any(c <= a < b <= d for c, d in spans if (c, d) != (a, b))
            }
    return {}


def words_of(option, flags):
    """A pattern of the option's words as they stand in a text."""
    words = [re.escape(word.strip(MARKS) or word) for word in spaced(option).split()]
    between = rf"[\s{re.escape(MARKS)}]+"
    return re.compile(rf"(?<![\w+#$€£-])(?<!\d[.,]){between.join(words) or '(?!)'}(?![\w+#%°]|[.,]\d|-\w)", flags)


def affirmed(text, found):
    """Those of the options found in a text that it does not deny: start to the set of a list's options."""
    kept, group, denied, last = {}, None, False, None
    starts = sorted(found)
    for start, following in itertools.pairwise([*starts, len(text)]):
        end, places = found[start]
        joint = last is not None and LIST.fullmatch(text[last:start])
        handed_on = denied and joint and "," not in text[last:start]
        denied = bool(handed_on or NO_BEFORE.search(text[max(start - REACH, 0) : start]))
        clause = CLAUSE.split(text[end:following], maxsplit=1)[0]
        if not denied and not NO_BEHIND.search(clause):
            group = group if joint and group is not None else set()
            group |= places
            kept[start] = group
        else:
            group = None
        last = end
    return kept


def only(places):
    return next(iter(places)) if len(places) == 1 else None


def same(text, options):
    """The indices of the options that equal the text: as written, else but for marks around it, else but for case."""
    for form in (spaced, trimmed, normalized):
        places = [place for place, option in enumerate(options) if form(option) == form(text) != ""]
        if places:
            return places
    return []


def spaced(text):
    return " ".join(unicodedata.normalize("NFC", text).translate(ASCII).split())


def trimmed(text):
    return spaced(text).strip(MARKS + " ")


def normalized(text):
    """The text's words in lower case, without marks around them."""
    return " ".join(word.strip(MARKS) or word for word in spaced(text).lower().split())
