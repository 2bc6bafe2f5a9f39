"""ANLS: scores answers read from an image; small spelling errors get partial credit."""

import unicodedata

import datasets
import evaluate

DESCRIPTION = (
    "Average Normalized Levenshtein Similarity of DocVQA and ST-VQA: for each answer 1 minus the edit distance to the "
    "nearest reference, divided by the length of the longer of the two; 0 where that share is not below the threshold. "
    "Case and the number of spaces do not count."
)
CITATION = """
@inproceedings{biten2019stvqa,
  title = {Scene Text Visual Question Answering},
  author = {Biten, Ali Furkan and Tito, Ruben and Mafla, Andres and Gomez, Lluis and Rusinol, Mar{\\c{c}}al and
            Valveny, Ernest and Jawahar, C. V. and Karatzas, Dimosthenis},
  booktitle = {ICCV},
  year = {2019}
}
"""
INPUTS = """
Args:
    predictions (`list` of `str`): The answers.
    references (`list` of `list` of `str`, or of `str`): What is right, for each answer one or several texts.
    threshold (`float`, *optional*, defaults to 0.5): From this share of edits on, an answer counts 0.

Returns:
    `dict` with `anls` (`float`), between 0 and 1.
"""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class ANLS(evaluate.Metric):
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

    def _compute(self, predictions, references, threshold=0.5):
        if not 0 < threshold <= 1:
            raise ValueError(f"`threshold` must be in (0, 1], got {threshold}.")
        scores = [
            max(similarity(prediction, one, threshold) for one in accepted)
            for prediction, accepted in pairs(predictions, references)
        ]
        return {"anls": sum(scores) / len(scores)}


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


def similarity(prediction, reference, threshold):
    first, second = (" ".join(unicodedata.normalize("NFC", text).lower().split()) for text in (prediction, reference))
    share = edit_distance(first, second) / max(len(first), len(second), 1)
    return 1 - share if share < threshold else 0.0


def edit_distance(first, second):
    """Levenshtein distance: the fewest letters to insert, delete or replace to turn one text into the other."""
    row = list(range(len(second) + 1))
    for count, letter in enumerate(first, start=1):
        above, row = row, [count]
        for place, other in enumerate(second, start=1):
            row.append(min(above[place] + 1, row[-1] + 1, above[place - 1] + (letter != other)))
    return row[-1]
