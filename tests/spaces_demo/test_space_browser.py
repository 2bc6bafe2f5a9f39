"""The Space's page in headless Chromium. DUALSPEED_SCREENSHOTS=FOLDER keeps pictures of it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from urllib.parse import urlsplit

import pytest

pytest.importorskip("app", reason='needs gradio: pip install "hf-dualspeed[demo]"')
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")

from overlay import COLOURS, drawn_shape  # noqa: E402
from playwright.sync_api import Page, expect, sync_playwright  # noqa: E402
from tiny_runs import QUESTION, TOKENS  # noqa: E402

from hf_dualspeed.pruners.config import budget  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]
QUIET = ("background-networking", "component-update", "sync", "dev-shm-usage", "gpu", "extensions", "default-apps")
DESKTOP, PHONE = (1280, 900), (390, 844)


PATIENCE = 60_000  # milliseconds that a busy machine may take for what a quiet one does at once
expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def browser():
    options = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in QUIET)]
    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        yield found
        found.close()


@pytest.fixture
def visit(browser, server):
    """Opens the page in a window of its own, of some size. What it asks of other machines fails the test, and so do
    errors of its scripts."""
    contexts, asked, errors = [], [], []

    def opened(size: tuple[int, int] = DESKTOP, scheme: str = "light") -> Page:
        contexts.append(browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: asked.append(request.url))
        page.on("websocket", lambda socket: asked.append(socket.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(server.url)
        expect(page.locator("#cards figure img")).to_have_count(3)  # of the first example
        return page

    yield opened
    for context in contexts:
        context.close()
    hosts = {urlsplit(url).hostname for url in asked if urlsplit(url).scheme not in ("data", "blob")}
    assert hosts == {"127.0.0.1"}
    assert server.outside == []
    assert errors == []


@pytest.fixture
def image(tmp_path) -> str:
    path = tmp_path / "shape.png"
    drawn_shape("triangle", COLOURS["green"]).save(path)
    return str(path)


def choose(page: Page, path: str) -> None:
    if page.locator("#image img").count():
        clear(page)
    page.locator("#image input[type=file]").first.set_input_files(path)


def clear(page: Page) -> None:
    page.locator("#image").get_by_role("button", name="Remove Image").click()
    expect(page.locator("#image img")).to_have_count(0)


def press(page: Page) -> None:
    """Asks, and waits for cards that were not there before."""
    page.locator(".cards").evaluate("cards => cards.dataset.old = 1")
    page.locator("#ask").click()
    expect(page.locator(".cards:not([data-old]) figure img")).to_have_count(3)


def ask(page: Page, image: str, question: str = QUESTION) -> None:
    choose(page, image)
    expect(page.locator("#image img")).to_be_visible()
    page.locator("#question textarea, #question input").first.fill(question)
    press(page)


def pictures(page: Page) -> list[str]:
    return [picture.get_attribute("src") for picture in page.locator("#cards figure img").all()]


def keep(page: Page, name: str, whole: bool = True) -> None:
    folder = os.environ.get("DUALSPEED_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=whole, animations="disabled")


def faint(page: Page) -> list[str]:
    """The words in sight whose contrast with what is behind them is below 4.5:1, by WCAG's formula."""
    return page.evaluate("""() => {
        const pen = Object.assign(document.createElement("canvas"), {width: 1, height: 1}).getContext("2d");
        const layer = (colour, below) => {
            pen.fillStyle = `rgb(${below})`; pen.fillRect(0, 0, 1, 1);
            pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1);
            return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3);
        };
        const behind = (part) => layer(getComputedStyle(part).backgroundColor,
            part.parentElement ? behind(part.parentElement) : [255, 255, 255]);
        const light = (rgb) => rgb.map((v) => v / 255)
            .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
        const found = [];
        const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
        while (texts.nextNode()) {
            const part = texts.currentNode.parentElement, words = texts.currentNode.textContent.trim();
            if (!words || !part.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
            const below = behind(part), own = light(layer(getComputedStyle(part).color, below)), other = light(below);
            const contrast = (Math.max(own, other) + 0.05) / (Math.min(own, other) + 0.05);
            if (contrast < 4.5) found.push(`${words.slice(0, 40)}: ${contrast.toFixed(2)}`);
        }
        return found;
    }""")


def wider_than_page(page: Page) -> float:
    """Pixels by which the page, or a part of it that does not scroll by itself, sticks out on the right."""
    return page.evaluate("""() => {
        const width = document.documentElement.clientWidth;
        const parts = [...document.querySelectorAll("main *")].filter((part) => !part.closest(".wide table"));
        const rights = parts.map((part) => part.getBoundingClientRect().right);
        return Math.max(document.documentElement.scrollWidth, ...rights) - width;
    }""")


def test_a_question_is_answered_by_all_side_by_side(visit, image):
    page = visit()
    ask(page, image)
    for role in ("baseline", "dualspeed", "pruned"):
        card = page.locator(f"article.{role}")
        expect(card.locator(".full .tokens")).to_have_text(f"{TOKENS} of {TOKENS}")
        expect(card.locator(".pruned .tokens")).to_have_text(f"6 of {TOKENS}")
        expect(card.locator(".answer .latency")).to_have_count(2)
        expect(card.get_by_text("Probability")).to_have_count(2)
    tops = {round(card.bounding_box()["y"]) for card in page.locator("#cards article").all()}
    assert len(tops) == 1
    keep(page, "desktop")


def test_another_ratio_and_another_pruner_change_the_picture(visit, image):
    page = visit()
    ask(page, image)
    first = pictures(page)
    slider = page.locator("#ratio input[type=range]").first
    box = slider.bounding_box()
    slider.click(position={"x": box["width"] / 2, "y": box["height"] / 2})
    tokens = page.locator("article.dualspeed .pruned .tokens")
    expect(tokens).not_to_have_text(f"6 of {TOKENS}")
    ratio = float(page.locator("#ratio input[type=number]").input_value())
    assert 0.4 <= ratio <= 0.55
    expect(tokens).to_have_text(f"{budget(TOKENS, ratio)} of {TOKENS}")
    second = pictures(page)
    page.locator("#pruner input").first.click()
    page.get_by_role("option", name="grid", exact=True).click()
    expect(page.locator("article.dualspeed figcaption")).to_contain_text("kept by grid")
    third = pictures(page)
    for one, two in ((first, second), (second, third), (first, third)):
        assert all(a != b for a, b in zip(one, two, strict=True))


def test_an_example_fills_in_image_and_question(visit):
    page = visit()
    page.locator("#examples tbody tr").filter(has_text="rectangle").click()
    expect(page.locator("#question textarea, #question input").first).to_have_value("what color is the rectangle?")
    expect(page.locator("#image img")).to_be_visible()
    press(page)


def test_the_page_opens_with_an_answered_example_in_sight(visit):
    page = visit()
    assert page.locator("#image img").evaluate("image => image.naturalWidth") > 0
    assert page.locator("#question textarea, #question input").first.input_value()
    for picture in page.locator("#cards figure img").all():
        box = picture.bounding_box()
        assert box["y"] + box["height"] <= DESKTOP[1]  # kept tokens, without scrolling
    before = pictures(page)
    press(page)
    assert pictures(page) == before  # it is the answer to what stands above it


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_and_pictures_are_as_dark_as_the_page(visit, scheme):
    page = visit(scheme=scheme)
    keep(page, f"start-{scheme}", whole=False)
    assert faint(page) == []
    light = page.locator("#cards figure img").first.evaluate("""(image) => {
        const card = getComputedStyle(image.closest(".card")).backgroundColor;
        const canvas = Object.assign(document.createElement("canvas"), {width: 448, height: 448});
        const pen = canvas.getContext("2d");
        pen.fillStyle = card; pen.fillRect(0, 0, 448, 448); pen.drawImage(image, 0, 0);
        const data = pen.getImageData(0, 0, 448, 448).data;
        return data.reduce((sum, v, i) => i % 4 == 3 ? sum : sum + v, 0) / (3 * 448 * 448);
    }""")
    assert (light > 160) == (scheme == "light")
    page.get_by_role("tab", name="Results").click()
    expect(page.locator(".results table").first).to_be_visible()
    assert faint(page) == []
    look = page.locator(".picture img").first.evaluate("image => getComputedStyle(image).filter")
    assert ("invert" in look) == (scheme == "dark")
    page.get_by_role("tab", name="How to read it").click()
    expect(page.get_by_text("The pruners")).to_be_visible()
    assert faint(page) == []


def test_the_keyboard_shows_where_it_is(visit):
    page = visit()
    page.locator("#masthead a").first.focus()
    outlined = set()
    for _ in range(25):
        page.keyboard.press("Tab")
        part = page.evaluate("""() => {
            const part = document.activeElement, look = getComputedStyle(part);
            const name = part.id || part.getAttribute("role") || part.tagName;
            return [name, look.outlineStyle, parseFloat(look.outlineWidth)];
        }""")
        if part[0] != "BODY":
            assert part[1:] == ["solid", 3], part
            outlined.add(part[0])
    assert {"ask", "tab"} <= outlined


def test_a_pruner_is_explained_when_it_is_chosen(visit):
    page = visit()
    expect(page.locator("#explained")).to_contain_text("Keeps the most diverse tokens")
    page.locator("#pruner input").first.click()
    page.get_by_role("option", name="grid", exact=True).click()
    expect(page.locator("#explained")).to_contain_text("Keeps evenly spaced tokens")


def test_a_broken_file_is_taken_away_with_a_word(visit, tmp_path, image):
    page = visit()
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    choose(page, str(broken))
    expect(page.get_by_text("The file is damaged, or no image")).to_be_visible()
    expect(page.locator("#image img")).to_have_count(0)
    keep(page, "broken")
    ask(page, image)  # which still works


def test_a_file_that_is_too_large_is_refused(visit, tmp_path):
    page = visit()
    large = tmp_path / "large.png"
    large.write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 11 * 1024 * 1024)
    choose(page, str(large))
    expect(page.get_by_text("maximum allowed")).to_be_visible()


def test_nothing_to_ask_is_told(visit, image):
    page = visit()
    clear(page)
    page.locator("#question textarea, #question input").first.fill("")
    page.locator("#ask").click()
    expect(page.get_by_text("Please choose an image first")).to_be_visible()
    choose(page, image)
    expect(page.locator("#image img")).to_be_visible()
    page.locator("#ask").click()
    expect(page.get_by_text("Please type a question")).to_be_visible()


def test_two_at_once_get_their_own_answers(visit, image, tmp_path):
    other = tmp_path / "other.png"
    drawn_shape("circle", COLOURS["blue"]).save(other)
    alone = []
    for path in (image, str(other)):
        page = visit()
        ask(page, path)
        alone.append(pictures(page))
    assert alone[0] != alone[1]
    pages = [visit(), visit()]
    for page, path in zip(pages, (image, str(other)), strict=True):
        choose(page, path)
        expect(page.locator("#image img")).to_be_visible()
        page.locator("#question textarea, #question input").first.fill(QUESTION)
    for page in pages:
        page.locator(".cards").evaluate("cards => cards.dataset.old = 1")
        page.locator("#ask").click()
    for page, expected in zip(pages, alone, strict=True):
        expect(page.locator(".cards:not([data-old]) figure img")).to_have_count(3)
        assert pictures(page) == expected


def test_it_fits_a_phone(visit, image):
    page = visit(PHONE)
    assert page.locator("#cards").bounding_box()["y"] > PHONE[1] / 2
    ask(page, image)
    page.wait_for_function("() => document.getElementById('cards').getBoundingClientRect().top < 80")
    keep(page, "phone-asked", whole=False)
    assert wider_than_page(page) <= 0
    boxes = [card.bounding_box() for card in page.locator("#cards article").all()]
    assert len({round(box["x"]) for box in boxes}) == 1  # below each other
    assert all(box["width"] > 320 for box in boxes)
    keep(page, "phone")
    for tab in ("Results", "How to read it"):
        page.get_by_role("tab", name=tab).click()
        expect(page.get_by_role("tab", name=tab)).to_have_attribute("aria-selected", "true")
        page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        assert wider_than_page(page) <= 0
        keep(page, f"phone-{tab.split()[0].lower()}")
    page.get_by_role("tab", name="Results").click()
    table = page.locator(".wide").first  # wider than a phone, and scrolls by itself
    assert table.evaluate("element => element.scrollWidth > element.clientWidth")
    assert table.evaluate("element => getComputedStyle(element).overflowX") == "auto"


def test_results_are_shown(visit):
    page = visit()
    page.get_by_role("tab", name="Results").click()
    table = page.locator(".results table").first
    expect(table.locator("tbody tr")).to_have_count(3)
    for title in ("Full-token baseline", "DualSpeed", "Pruned-trained"):
        expect(table.get_by_text(title)).to_be_visible()
    curves = page.locator(".picture img")
    expect(curves.first).to_be_visible()
    assert curves.first.evaluate("image => image.naturalWidth") > 100
    keep(page, "results")
