"""Relaxed accuracy: numbers may be 5 % off, everything else must be equal."""

import math
import re
import unicodedata

import datasets
import evaluate

DESCRIPTION = (
    "The accuracy of ChartQA: a number is right if it lies within 5 % of the reference, any other answer if it equals "
    "the reference but for case. 12 % is the number 0.12, and 1,200 the number 1200."
)
CITATION = """
@inproceedings{masry2022chartqa,
  title = {ChartQA: A Benchmark for Question Answering about Charts with Visual and Logical Reasoning},
  author = {Masry, Ahmed and Long, Do Xuan and Tan, Jia Qing and Joty, Shafiq and Hoque, Enamul},
  booktitle = {Findings of ACL},
  year = {2022}
}
"""
INPUTS = """
Args:
    predictions (`list` of `str`): The answers.
    references (`list` of `list` of `str`, or of `str`): What is right, for each answer one or several texts.
    tolerance (`float`, *optional*, defaults to 0.05): How far off a number may be, as a fraction of the reference.

Returns:
    `dict` with `relaxed_accuracy` (`float`), between 0 and 1.
"""

# The minus sign, and full-width digits and signs.
ASCII = {0x2212: "-", **{code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}}
NUMBER = re.compile(r"([+-]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d*)?(?:e[+-]?\d+)?)\s*(%?)", re.IGNORECASE)


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class RelaxedAccuracy(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=[
                datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
                datasets.Features({"predictions": text, "references": text}),
            ],
        )

    def _compute(self, predictions, references, tolerance=0.05):
        if not 0 <= tolerance < math.inf:
            raise ValueError(f"`tolerance` must be a number from 0 on, got {tolerance}.")
        hits = [
            any(fits(prediction, one, tolerance) for one in accepted)
            for prediction, accepted in pairs(predictions, references)
        ]
        return {"relaxed_accuracy": sum(hits) / len(hits)}


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


def fits(prediction, reference, tolerance):
    given, right = number(prediction), number(reference)
    if given is None or right is None:
        return normalized(prediction) == normalized(reference)
    # Allow for rounding of binary fractions: 0.95 is exactly 5 % off 1.
    return abs(given - right) <= tolerance * abs(right) * (1 + 1e-9)


def number(text):
    """The number that a text consists of; None if it is anything else, or beyond what a float holds."""
    match = NUMBER.fullmatch(text.translate(ASCII).strip())
    if match is None:
        return None
    try:
        value = float(match[1].replace(",", ""))
    except ValueError:  # no digits
        return None
    if math.isinf(value):
        return None
    return value / 100 if match[2] else value


def normalized(text):
    return " ".join(unicodedata.normalize("NFC", text).translate(ASCII).lower().split())
