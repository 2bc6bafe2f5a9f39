"""Pictures of the Space as it opens, and on a phone after a question. `make demo` trains what it shows.

`python -m benchmarks.space_pictures` needs Chromium and Playwright, and writes docs/images/space*.png.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from hf_dualspeed.commands.space import source_folder
from hf_dualspeed.utils.writing import write_file

from .common import small

IMAGES = Path("docs/images")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
DESKTOP, PHONE = (1280, 900), (390, 844)
# Name, size and colours of each picture, and whether it is taken after a question.
PICTURES = (
    ("space", DESKTOP, "light", False),
    ("space-dark", DESKTOP, "dark", False),
    ("space-phone", PHONE, "light", True),
    ("space-phone-dark", PHONE, "dark", True),
)
PATIENCE = 120_000  # milliseconds
SEEN = "#cards .answer .text"


def main(folder: Path = IMAGES) -> list[Path]:
    """Starts the page around the runs of `make demo`, and writes its pictures into `folder`.

    Raises:
        FileNotFoundError: a run or the browser is missing.
    """
    sys.path.insert(0, str(source_folder()))  # whose modules import each other by plain names
    import app
    import slots

    found = slots.load_slots(slots.chosen_names({}))
    without = [slot.role.default for slot in found if slot.checkpoint is None]
    if without:
        raise FileNotFoundError(f"There is no run in {', '.join(without)}. Train them first: make demo")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise FileNotFoundError("Chromium is missing. Install it: apt-get install chromium")
    page = app.build(found)
    _, url, _ = app.launch(page, server_name="127.0.0.1", wait=False, quiet=True)
    try:
        with sync_playwright() as driver:
            chromium = driver.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
            written = []
            for name, (width, height), scheme, asked in PICTURES:
                window = chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
                view = window.new_page()
                view.set_default_timeout(PATIENCE)
                view.goto(url)
                view.wait_for_selector(SEEN)
                if asked:
                    ask(view)
                view.wait_for_timeout(1000)  # fonts, pictures and scrolling are at rest
                written.append(write_file(folder / f"{name}.png", small(view.screenshot(animations="disabled"))))
                window.close()
            chromium.close()
    finally:
        page.close()
    return written


def ask(view: Page) -> None:
    """Presses the button, and waits for cards that were not there before."""
    view.locator(".cards").evaluate("cards => cards.dataset.old = 1")
    view.locator("#ask").click()
    view.wait_for_selector(f".cards:not([data-old]) {SEEN.removeprefix('#cards ')}")


if __name__ == "__main__":
    print(*main(), sep="\n")
