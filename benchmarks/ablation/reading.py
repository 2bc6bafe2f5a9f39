"""Pages to read: rows of a word and a number, and a bar chart below. Questions ask for one of them.

Merging should hurt here: a letter is as wide as a token, and its neighbours, which differ from it, count as much.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image as Pillow
from PIL import ImageDraw

from .fashion_grid import Question
from .letters import FONTS, font

PIXELS, CHART = 336, 168  # edge of the page; height of the chart, which fills its lower half
ROWS = 4
BARS = tuple("bcde")
HIGHEST = 9
VOCABULARY = (
    "apple arrow badge basket beach bell bird boat bread brick bridge brush cable candle chair cloud coin "
    "crown desk door drum eagle engine farm field flag flute forest garden glass glove hammer harbor honey house "
    "island jacket kettle ladder lamp lemon letter market mirror moon mountain needle nest ocean orange paper "
    "pencil pepper piano planet pocket river rocket saddle school shadow silver table window"
)
WORDS = tuple(VOCABULARY.split())
NUMBERS = tuple(str(number) for number in range(1, 100))
TWO_DIGITS = range(10, 100)


@dataclass(frozen=True)
class Page:
    """Four words, four numbers of two digits and four heights of bars, all as codes: words first, then numbers."""

    items: tuple[int, ...]
    style: int = 0  # seed of its looks

    @property
    def words(self) -> list[str]:
        return [WORDS[code] for code in self.items[:ROWS]]

    @property
    def numbers(self) -> list[str]:
        return [NUMBERS[code - len(WORDS)] for code in self.items[ROWS : 2 * ROWS]]

    @property
    def heights(self) -> list[int]:
        return [int(NUMBERS[code - len(WORDS)]) for code in self.items[2 * ROWS :]]

    def image(self) -> Pillow.Image:
        """The page as an image of 336 x 336 pixels."""
        generator = random.Random(self.style)
        page = Pillow.new("RGB", (PIXELS, PIXELS), "white")
        pen, step = ImageDraw.Draw(page), (PIXELS - CHART) // ROWS
        for row, texts in enumerate(zip(self.words, self.numbers, strict=True)):
            for left, text in zip((8, 230), texts, strict=True):
                written = font(generator.choice(FONTS), generator.randint(24, 30))
                place = (left + generator.randint(0, 20), row * step + step // 2 + generator.randint(-3, 3))
                pen.text(place, text, (generator.randint(0, 100),) * 3, written, anchor="lm")
        page.paste(self._chart(generator), (0, PIXELS - CHART))
        return page

    def _chart(self, generator: random.Random) -> Pillow.Image:
        figure = Figure((PIXELS / 100, CHART / 100), dpi=100)
        axis = figure.add_axes((0.1, 0.16, 0.87, 0.8))
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
            asked.append(Question("word", f"which word stands in row {row + 1}?", self.words[row]))
        for row in generator.sample(range(ROWS), 2):
            asked.append(Question("number", f"which number stands in row {row + 1}?", self.numbers[row]))
        for row in generator.sample(range(ROWS), 2):
            asked.append(Question("beside", f"which number stands beside {self.words[row]}?", self.numbers[row]))
        bar = generator.randrange(ROWS)
        asked.append(Question("bar", f"how high is bar {BARS[bar]}?", str(self.heights[bar])))
        asked.append(Question("bar", "which bar is the highest?", BARS[self.heights.index(max(self.heights))]))
        generator.shuffle(asked)
        return asked


@dataclass(frozen=True)
class Reading:
    """The world of pages."""

    name: str = "reading"
    shows: str = "pages with words, numbers and a chart"
    pixels: int = PIXELS
    kinds: tuple[str, ...] = ("word", "number", "beside", "bar")
    codes: int = len(WORDS) + len(NUMBERS)

    @property
    def layout(self) -> list[int]:
        """The place of each of 8 x 8 patches: words and numbers in the upper four rows, bars below."""
        above = [row if column < 5 else ROWS + row for row in range(ROWS) for column in range(8)]
        return above + [2 * ROWS + column // 2 for _ in range(ROWS) for column in range(8)]

    @property
    def texts(self) -> list[str]:
        """Texts that hold all words of questions and answers."""
        generator = random.Random(0)
        asked = [one.text for _ in range(100) for one in self.drawn(generator).questions(generator)]
        return [*asked, *WORDS, *NUMBERS, *BARS]

    def drawn(self, generator: random.Random) -> Page:
        """A page. No word and no height stands on it twice."""
        words = generator.sample(range(len(WORDS)), ROWS)
        numbers = generator.sample(TWO_DIGITS, ROWS)
        heights = generator.sample(range(1, HIGHEST + 1), ROWS)
        codes = [len(WORDS) + number - 1 for number in (*numbers, *heights)]
        return Page((*words, *codes), generator.randrange(2**30))

    def scenes(self, split: str, count: int) -> list[Page]:
        """The first `count` pages of a split. They are the same in every call."""
        return [self.drawn(random.Random(f"reading:{split}:{number}")) for number in range(count)]

    def conversations(self, split: str, made: list[Page]) -> list[list[Question]]:
        """Eight questions on each page of a split, the same in every call."""
        return [page.questions(random.Random(f"reading:{split}:asked:{index}")) for index, page in enumerate(made)]


READING = Reading()
