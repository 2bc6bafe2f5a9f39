"""easy-VQA (github.com/vzhou842/easy-VQA): questions about images of one coloured shape, a PyPI package."""

from __future__ import annotations

from collections import Counter, defaultdict

from datasets import Dataset, Features, Image, List, Value

from ..utils.validation import check_choice, checked

SPLITS = ("train", "test")
# Data set name -> subset of questions.
DATASETS = {"easy-vqa": "open", "easy-vqa-color": "color"}
SHAPES = ("circle", "rectangle", "triangle")
# Answers that each subset of questions leaves out.
LEFT_OUT = {"open": ("yes", "no"), "color": ("yes", "no", *SHAPES), "all": ()}
# Arrow wants one type per field: a part is an image (without text) or a text.
MESSAGES = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})
FEATURES = Features(
    {"messages": MESSAGES, "images": List(Image()), "question": Value("string"), "answer": Value("string")}
)


@checked
def load_easy_vqa(split: str = "train", questions: str = "open") -> Dataset:
    """Loads easy-VQA as conversations; images stay paths until a row is read.

    Args:
        split (`str`, *optional*, defaults to `"train"`): `"train"` (4,000 images) or `"test"` (1,000 images).
        questions (`str`, *optional*, defaults to `"open"`): `"open"` leaves out yes-or-no questions, which a model
            answers well without the image; `"color"` keeps only questions for a colour, which a small model learns
            within minutes; `"all"` keeps all.

    Returns:
        `datasets.Dataset` with columns `messages`, `images`, `question` and `answer`.
    """
    check_choice("split", split, SPLITS)
    check_choice("questions", questions, tuple(LEFT_OUT))
    try:
        import easy_vqa
    except ImportError as error:
        raise ImportError("easy-VQA is not installed. Run `pip install hf-dualspeed[quickstart]`.") from error
    if split == "train":
        rows, paths = easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()
    else:
        rows, paths = easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()
    kept = [row for row in zip(*rows, strict=True) if row[1] not in LEFT_OUT[questions]]
    columns = {
        "messages": [_conversation(question, answer) for question, answer, _ in kept],
        "images": [[paths[image]] for _, _, image in kept],
        "question": [question for question, _, _ in kept],
        "answer": [answer for _, answer, _ in kept],
    }
    return Dataset.from_dict(columns, features=FEATURES)


def majority_accuracy(train: Dataset, test: Dataset) -> float:
    """Accuracy of guessing each question's most frequent answer in `train`.

    A model that beats this number looks at the image.

    Args:
        train (`datasets.Dataset`): Rows with `question` and `answer` to count.
        test (`datasets.Dataset`): Rows to guess; a question not in `train` gets the most frequent answer of all.
    """
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for question, answer in zip(train["question"], train["answer"], strict=True):
        answers[question][answer] += 1
    overall = sum(answers.values(), Counter())
    hits = [
        (answers.get(question) or overall).most_common(1)[0][0] == answer
        for question, answer in zip(test["question"], test["answer"], strict=True)
    ]
    return sum(hits) / len(hits)


def _conversation(question: str, answer: str) -> list[dict]:
    user = [{"type": "image", "text": None}, {"type": "text", "text": question}]
    return [
        {"role": "user", "content": user},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
