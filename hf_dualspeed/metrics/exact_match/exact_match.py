"""Exact match: the share of answers that equal one of their references, except for case and white space."""

import unicodedata

import datasets
import evaluate

DESCRIPTION = (
    "The share of predictions that equal one of their references. Upper and lower case, spaces around and how many "
    "spaces lie between words do not count; everything else does."
)
INPUTS = """
Args:
    predictions (`list` of `str`): The answers.
    references (`list` of `list` of `str`, or of `str`): What is right, for each answer one or several texts.

Returns:
    `dict` with `exact_match` (`float`), between 0 and 1.
"""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class ExactMatch(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=[
                datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
                datasets.Features({"predictions": text, "references": text}),
            ],
        )

    def _compute(self, predictions, references):
        hits = [normalized(text) in map(normalized, accepted) for text, accepted in pairs(predictions, references)]
        return {"exact_match": sum(hits) / len(hits)}


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


def normalized(text):
    """The text in lower case, with single spaces between words."""
    return " ".join(unicodedata.normalize("NFC", text).lower().split())
