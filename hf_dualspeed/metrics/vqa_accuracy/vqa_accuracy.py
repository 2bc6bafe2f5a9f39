"""VQA accuracy: the share of people who gave the same answer, where three are enough for full credit."""

import re

import datasets
import evaluate

DESCRIPTION = (
    "The accuracy of VQAv2 (https://visualqa.org/evaluation.html): with ten answers of people, an answer that three of "
    "them gave is right, and one that fewer gave is right in part: min(agreeing / 3, 1), averaged over the ten ways to "
    "leave out one person. Answers are compared in the official normal form, or as written where all people agree."
)
CITATION = """
@inproceedings{antol2015vqa,
  title = {VQA: Visual Question Answering},
  author = {Antol, Stanislaw and Agrawal, Aishwarya and Lu, Jiasen and Mitchell, Margaret and Batra, Dhruv and
            Zitnick, C. Lawrence and Parikh, Devi},
  booktitle = {ICCV},
  year = {2015}
}
"""
INPUTS = """
Args:
    predictions (`list` of `str`): The answers.
    references (`list` of `list` of `str`, or of `str`): For each question what people answered. Where these are
        fewer than four, all of the others have to agree instead of three; a single one has to be met.

Returns:
    `dict` with `vqa_accuracy` (`float`), between 0 and 1.
"""

ENOUGH = 3
ARTICLES = ("a", "an", "the")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(NUMBERS)}}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# A full stop is removed unless a digit follows.
FULL_STOP = re.compile(r"\.(?!\d)")
THOUSANDS = re.compile(r"\d,\d")
# Each of these is recognised without (one of) its apostrophes. Contractions that would then equal another word, such
# as "well", "ill" or "its", are left out.
CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _spellings():
    """Maps spellings with fewer apostrophes to their contraction."""
    found = {}
    for word in CONTRACTIONS.split():
        places = [place for place, letter in enumerate(word) if letter == "'"]
        found[word.replace("'", "")] = word
        if len(places) > 1:
            found.update({word[:place] + word[place + 1 :]: word for place in places})
    return found


SPELLINGS = _spellings()


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class VQAAccuracy(evaluate.Metric):
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

    def _compute(self, predictions, references):
        scores = [accuracy(prediction, answers) for prediction, answers in pairs(predictions, references)]
        return {"vqa_accuracy": sum(scores) / len(scores)}


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
        yield prediction, accepted


def accuracy(prediction, answers):
    """The mean of min(agreeing / 3, 1) over all ways to leave one answer out."""
    texts, people = [" ".join(text.split()) for text in (prediction, *answers)], len(answers)
    # As in the official script, an answer that all people gave is compared as it is written.
    if people == 1 or len(set(texts[1:])) > 1:
        texts = [normalized(text) or text.lower() for text in texts]
    agreeing = texts[1:].count(texts[0])
    if people == 1:
        return float(agreeing)
    enough = min(ENOUGH, people - 1)
    # In `agreeing` of the ways, the answer left out is one that agrees.
    without = agreeing * min((agreeing - 1) / enough, 1) if agreeing else 0
    return (without + (people - agreeing) * min(agreeing / enough, 1)) / people


def normalized(text):
    """The official normal form: lower case, without punctuation and articles, digits for number words."""
    text = without_punctuation(" ".join(text.split()))
    words = [DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(SPELLINGS.get(word, word) for word in words if word not in ARTICLES)


def without_punctuation(text):
    """Removes punctuation if it touches a space or the text has a number such as 1,000; else replaces it by a space."""
    written, thousands = text, THOUSANDS.search(text) is not None
    for mark in PUNCTUATION:
        loose = f"{mark} " in written or f" {mark}" in written
        text = text.replace(mark, "" if loose or thousands else " ")
    return FULL_STOP.sub("", text)
