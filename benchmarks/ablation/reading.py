"""Pages to read: rows of a word and a number, and a bar chart below. Questions ask for one of them, letter by letter.

Merging should hurt here: a letter is about as large as a token, and its neighbours are other letters.
"""

from __future__ import annotations

import random
import string
from dataclasses import dataclass

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image as Pillow
from PIL import ImageDraw

from .fashion_grid import Question
from .letters import FONTS, font

PIXELS, CHART = 336, 112  # edge of the page; height of the chart, which fills its lower third
ROWS = 4
BARS = tuple("bcde")
HIGHEST = 9
VOCABULARY = (
    "apple arrow badge beach bell bird boat bread brick brush cable camp card chair cloud coin corn crown desk door "
    "drum duck eagle farm field fish flag flute frog glass glove goat gold grape hand honey horse house iron ivory "
    "jade jeep juice kite knife lake lamp leaf lemon lion maple mask melon milk moon nest ocean olive onion paint "
    "paper pearl piano pilot plate pond queen rain river robe rope rose sail salt shoe shop silk snow spoon star stone "
    "sugar table tiger train tree truck tulip vase wagon water whale wheel wolf zebra"
)
LONGEST = 5  # letters of a word
WORDS = tuple(VOCABULARY.split())
# What stands at a place of a page: a letter, nothing, a digit, or a part of a bar.
SIGNS = (*string.ascii_lowercase, "", *string.digits, "bar")
COLOURED = 30  # distance of the colours of a pixel, which bars alone have
DIGITS = 2  # of a number


@dataclass(frozen=True)
class Page:
    """Five letters of each of four words, two digits of each of four numbers, four heights of bars: codes of signs."""

    items: tuple[int, ...]
    style: int = 0  # seed of its looks

    @property
    def words(self) -> list[str]:
        signs = [SIGNS[code] for code in self.items[: ROWS * LONGEST]]
        return ["".join(signs[LONGEST * row : LONGEST * (row + 1)]) for row in range(ROWS)]

    @property
    def numbers(self) -> list[str]:
        signs = [SIGNS[code] for code in self.items[ROWS * LONGEST : -len(BARS)]]
        return ["".join(signs[DIGITS * row : DIGITS * (row + 1)]) for row in range(ROWS)]

    @property
    def heights(self) -> list[int]:
        return [int(SIGNS[code]) for code in self.items[-len(BARS) :]]

    def image(self) -> Pillow.Image:
        """The page as an image of 336 x 336 pixels."""
        generator = random.Random(self.style)
        page = Pillow.new("RGB", (PIXELS, PIXELS), "white")
        pen = ImageDraw.Draw(page)
        for text, written, place, grey in self._texts(generator):
            pen.text(place, text, (grey,) * 3, written, anchor="lm")
        page.paste(self._chart(generator), (0, PIXELS - CHART))
        return page

    def _texts(self, generator: random.Random) -> list[tuple]:
        """Each word and number with its font, its left and middle in pixels, and its shade of grey."""
        texts, step = [], (PIXELS - CHART) // ROWS
        for row, pair in enumerate(zip(self.words, self.numbers, strict=True)):
            for left, text in zip((6, 232), pair, strict=True):
                written = font(generator.choice(FONTS), generator.randint(34, 40))
                place = (left + generator.randint(0, 14), row * step + step // 2 + generator.randint(-3, 3))
                texts.append((text, written, place, generator.randint(0, 100)))
        return texts

    def patches(self, side: int) -> np.ndarray:
        """The code of the sign in the middle of each of side x side patches, `(side, side)`."""
        signs = np.full((side, side), SIGNS.index(""))
        middles = (np.arange(side) + 0.5) * PIXELS / side
        for text, written, (left, middle), _ in self._texts(random.Random(self.style)):
            lines = abs(middles - middle) < written.size / 2
            for index, sign in enumerate(text):
                begin, end = (left + written.getlength(text[:count]) for count in (index, index + 1))
                signs[np.ix_(lines, (begin <= middles) & (middles < end))] = SIGNS.index(sign)
        at = middles.astype(int)
        signs[np.ptp(np.asarray(self.image(), dtype=int)[np.ix_(at, at)], axis=2) > COLOURED] = SIGNS.index("bar")
        return signs

    def _chart(self, generator: random.Random) -> Pillow.Image:
        figure = Figure((PIXELS / 100, CHART / 100), dpi=100)
        axis = figure.add_axes((0.1, 0.24, 0.87, 0.72))
        axis.bar(BARS, self.heights, color=f"C{generator.randrange(10)}", width=generator.uniform(0.5, 0.9))
        axis.set_ylim(0, HIGHEST + 0.5)
        axis.set_yticks(range(0, HIGHEST + 1, 3))
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return Pillow.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")

    def questions(self, generator: random.Random) -> list[Question]:
        """Eight questions in random order: two each for a word, a number, what stands beside, and the chart."""
        asked = []
        for row in generator.sample(range(ROWS), 2):
            asked.append(Question("word", f"which word stands in row {row + 1}?", spelled(self.words[row])))
        for row in generator.sample(range(ROWS), 2):
            asked.append(Question("number", f"which number stands in row {row + 1}?", spelled(self.numbers[row])))
        for row in generator.sample(range(ROWS), 2):
            asked.append(
                Question(
                    "beside", f"which number stands beside {spelled(self.words[row])}?", spelled(self.numbers[row])
                )
            )
        bar = generator.randrange(ROWS)
        asked.append(Question("bar", f"how high is bar {BARS[bar]}?", str(self.heights[bar])))
        asked.append(Question("bar", "which bar is the highest?", BARS[self.heights.index(max(self.heights))]))
        generator.shuffle(asked)
        return asked


def spelled(text: str) -> str:
    return " ".join(text)


@dataclass(frozen=True)
class Reading:
    """The world of pages."""

    name: str = "reading"
    shows: str = "pages with words, numbers and a chart"
    pixels: int = PIXELS
    kinds: tuple[str, ...] = ("word", "number", "beside", "bar")
    codes: int = len(SIGNS)

    @property
    def layout(self) -> list[int]:
        """The place of each of 8 x 8 patches: a line for each row in the upper half, a word and a number in it; bars
        below."""
        lines = []
        for row in range(ROWS):
            number = ROWS * LONGEST + DIGITS * row
            lines += [*range(LONGEST * row, LONGEST * (row + 1)), number, number + 1, number + 1]
        return lines + [ROWS * (LONGEST + DIGITS) + column // 2 for _ in range(ROWS) for column in range(8)]

    @property
    def texts(self) -> list[str]:
        """Texts that hold all words of questions and answers."""
        generator = random.Random(0)
        asked = [one.text for _ in range(100) for one in self.drawn(generator).questions(generator)]
        return [*asked, *SIGNS]

    def drawn(self, generator: random.Random) -> Page:
        """A page. No word and no height stands on it twice."""
        words = generator.sample(WORDS, ROWS)
        numbers = [str(number) for number in generator.sample(range(10, 100), ROWS)]
        heights = [str(height) for height in generator.sample(range(1, HIGHEST + 1), ROWS)]
        # Shorter words end in nothing.
        signs = [(*word, "")[:LONGEST] for word in words] + numbers + heights
        return Page(tuple(SIGNS.index(sign) for part in signs for sign in part), generator.randrange(2**30))

    def scenes(self, split: str, count: int) -> list[Page]:
        """The first `count` pages of a split. They are the same in every call."""
        return [self.drawn(random.Random(f"reading:{split}:{number}")) for number in range(count)]

    def conversations(self, split: str, made: list[Page]) -> list[list[Question]]:
        """Eight questions on each page of a split, the same in every call."""
        return [page.questions(random.Random(f"reading:{split}:asked:{index}")) for index, page in enumerate(made)]


READING = Reading()
