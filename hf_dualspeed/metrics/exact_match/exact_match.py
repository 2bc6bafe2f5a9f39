"""Exact match: the share of answers that equal one of their references, except for case and white space."""

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
        hits = [
            normalized(prediction) in map(normalized, [accepted] if isinstance(accepted, str) else accepted)
            for prediction, accepted in zip(predictions, references, strict=True)
        ]
        return {"exact_match": sum(hits) / len(hits)}


def normalized(text):
    """The text in lower case, with single spaces between words."""
    return " ".join(text.lower().split())
