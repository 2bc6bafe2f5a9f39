"""The page: answers of three checkpoints to one question about an image, side by side."""

from __future__ import annotations

import asyncio
import html
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from threading import Thread

import limits  # isort: skip  # sets what gradio reads when it is imported
import gradio as gr
from inference import (
    MAX_QUESTION,
    MAX_RATIO,
    InputError,
    check_question,
    explained_pruners,
    pruner_names,
    read_image,
)
from overlay import write_examples
from slots import HERE, Slot, ask, chosen_names, know_shapes_alone, load_slots, loaded
from starlette.middleware import Middleware
from views import EQUAL_TIME, about, cards, comparison, header, learning_curves, runs_table

QUEUE = 20
PRUNER, RATIO = "divprune", 0.9
# On a phone the answers are far below the button.
TO_ANSWERS = """(image, question) => {
    if (!image || !question.trim() || !matchMedia("(max-width: 860px)").matches) return;
    const behavior = matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth";
    document.getElementById("cards").scrollIntoView({behavior, block: "start"});
}"""
# Fonts of the visitor's system: none is fetched.
SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


def build(slots: list[Slot], webcam: bool = False) -> limits.Page:
    """The page around loaded checkpoints.

    Args:
        slots (`list[Slot]`): The checkpoints.
        webcam (`bool`): Whether visitors may take a picture.
    """
    with limits.Page(title="DualSpeed", analytics_enabled=False, delete_cache=(300, limits.MAX_AGE)) as page:
        gr.HTML(header(slots), elem_id="masthead")
        pruners = explained_pruners(pruner_names(loaded(slots)))
        with gr.Tab("Ask"):
            _ask_tab(page, slots, pruners, webcam)
        with gr.Tab("Results"):
            _results_tab(slots)
        with gr.Tab("How to read it"):
            gr.Markdown(about(pruners))
    # One answer at a time, because all visitors share the models. The queue is short enough to be served.
    # `api_open` would let programs past the queue.
    return page.queue(max_size=QUEUE, default_concurrency_limit=1, api_open=False)


def _ask_tab(page: limits.Page, slots: list[Slot], pruners: Mapping[str, str], webcam: bool) -> None:
    shapes = know_shapes_alone(slots)
    examples = write_examples(Path(tempfile.mkdtemp(prefix="examples-", dir=limits.FOLDER)), shapes_first=shapes)
    first = examples[0] if loaded(slots) else (None, "")
    with gr.Row():
        with gr.Column(scale=4, min_width=300):
            sources = ["upload", "clipboard", *(["webcam"] if webcam else [])]
            look = {"sources": sources, "label": "Image", "height": 248, "buttons": [], "elem_id": "image"}
            image = gr.Image(first[0], type="filepath", **look)
            # The path is passed on unread: gradio would open a bad file and fail without a reason. The page has
            # checked before that the path is an upload's.
            image.preprocess = lambda payload: payload and payload.path
        with gr.Column(scale=6, min_width=300):
            question = gr.Textbox(
                first[1],
                label="Question",
                placeholder="what color is the shape?",
                max_length=MAX_QUESTION,
                lines=1,
                elem_id="question",
            )
            with gr.Row():
                pruner = gr.Dropdown(list(pruners), value=PRUNER, label="Pruner", elem_id="pruner", min_width=140)
                ratio = gr.Slider(
                    0, MAX_RATIO, RATIO, step=0.05, label="Tokens removed", elem_id="ratio", min_width=180
                )
            lines = {name: html.escape(words) for name, words in pruners.items()}
            with gr.Row(elem_id="asking"):
                line = gr.HTML(lines[PRUNER], elem_id="explained", min_width=180)
                button = gr.Button("Ask all", variant="primary", elem_id="ask", min_width=180)
    label = "Examples (these models have seen drawn shapes alone)" if shapes else "Examples"
    gr.Examples(examples, [image, question], label=label, elem_id="examples", cache_examples=False)
    shown = gr.HTML(cards(slots), elem_id="cards")
    inputs = [image, question, pruner, ratio]
    answer, renew = handlers(slots)
    # Both events share one limit by its id.
    shared = {"concurrency_id": "models", "concurrency_limit": 1}
    asked = [button.click, question.submit]
    gr.on(asked, answer, inputs, shown, api_name="ask", **shared)
    changes = [pruner.input, ratio.release]  # "always_last": while busy, only the last change is kept
    gr.on(changes, renew, inputs, shown, api_visibility="private", trigger_mode="always_last", **shared)
    checks = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": 4}
    image.upload(checked_upload, image, image, **checks)
    gr.on(asked, None, [image, question], js=TO_ANSWERS, api_visibility="private")
    pruner.change(None, pruner, line, js=f"(name) => ({json.dumps(lines)})[name]", api_visibility="private")
    if loaded(slots):
        answered, page.worker = answered_example(slots, *first)

        async def example() -> str:
            return await asyncio.shield(asyncio.wrap_future(answered))

        # It waits in no thread, and ends when the visitor asks something else.
        opened = page.load(example, None, shown, api_visibility="private", concurrency_limit=None)
        gr.on([*asked, *changes], None, cancels=opened, api_visibility="private")


def answered_example(slots: list[Slot], path: str, question: str) -> tuple[Future[str], Thread]:
    """The cards with the answers to an example, and the thread that works them out once it is started."""
    found: Future[str] = Future()

    def work() -> None:
        try:
            found.set_result(cards(slots, ask(slots, read_image(path), question, PRUNER, RATIO), PRUNER))
        except Exception as error:  # whatever a model raises: visitors may still ask
            print(f"The first example has no answer: {error}", file=sys.stderr, flush=True)
            found.set_result(cards(slots))

    return found, Thread(target=work, daemon=True, name="example")


def handlers(slots: list[Slot]) -> tuple[Callable, Callable]:
    """The button's handler, and that of a new pruner or ratio, which answers once there are image and question."""

    def answer(path: str | None, question: str, pruner: str, ratio: float) -> str:
        """Answers of all checkpoints to a question about an image, as HTML."""
        try:
            image, words = read_image(path), check_question(question)
            return cards(slots, ask(slots, image, words, pruner, min(max(float(ratio), 0.0), MAX_RATIO)), pruner)
        except InputError as error:
            raise limits.refusal(error) from None

    def renew(path: str | None, question: str, pruner: str, ratio: float) -> str:
        return answer(path, question, pruner, ratio) if path and (question or "").strip() else cards(slots)

    return answer, renew


def checked_upload(path: str | None) -> str | None:
    """Removes an upload that is no image, and shows why."""
    try:
        read_image(path)
    except InputError as error:
        gr.Warning(html.escape(str(error)))
        return None
    return path


def _results_tab(slots: list[Slot]) -> None:
    gr.Markdown("### The checkpoints of this page")
    gr.HTML(runs_table(slots), elem_classes="results")
    curves = learning_curves(slots)
    if curves:
        with gr.Row():
            for title, path in curves:
                show_picture(path, f"Losses of {title}")
    compared = comparison()
    if compared is not None:
        text, picture = compared
        gr.Markdown("### The same model trained four ways")
        gr.HTML(text, elem_classes="results")
        if picture is not None:
            show_picture(picture, "Seconds of the training in each way, and the accuracy that it reached")
    in_time = next((path for path in EQUAL_TIME if path.is_file()), None)
    if in_time is not None:
        gr.Markdown("### On a harder task, in the same time")
        show_picture(in_time, "Accuracy with all tokens against seconds of training, in each way")


def show_picture(path: Path, words: str) -> None:
    """A plot without a label, which would cover its title."""
    look = {"show_label": False, "buttons": [], "min_width": 280, "elem_classes": "picture"}
    gr.Image(str(path), alt_text=words, interactive=False, **look)


def launch(page: limits.Page, wait: bool = True, **options) -> tuple:
    """Serves the page within the limits of a public Space, and answers its first example.

    Args:
        page (`limits.Page`): The page.
        wait (`bool`): Return only when the page is stopped.
        options: Those of gradio's `launch`.
    """
    theme = gr.themes.Default(primary_hue="emerald", neutral_hue="slate", radius_size="lg", font=SANS, font_mono=MONO)
    theme = theme.set(
        body_text_color_subdued="*neutral_500",
        button_primary_background_fill="#007a5a",  # dark enough for white text
        button_primary_background_fill_hover="#00654a",
        slider_color="#007a5a",
        button_primary_text_color="white",
        button_primary_text_color_dark="white",
        button_primary_background_fill_dark="#007a5a",
    )
    served = page.launch(
        theme=theme,
        css_paths=HERE / "style.css",
        max_file_size=limits.MAX_UPLOAD,
        state_session_capacity=limits.MAX_SESSIONS,
        app_kwargs={"middleware": [Middleware(limits.BodyLimit, page=page)]},
        ssr_mode=False,
        footer_links=[],
        prevent_thread_lock=True,
        **options,
    )
    if page.worker is not None:  # not earlier: starting the page would be in its latency
        page.worker.start()
    if wait:
        page.block_thread()
    return served


def main(names: Mapping[str, str | None] | None = None, webcam: bool = False, port: int | None = None) -> None:
    """Loads the checkpoints and serves the page until it is stopped.

    Args:
        names (`Mapping[str, str | None]`, *optional*): Folder or Hub id by role. By default as in `chosen_names`.
        webcam (`bool`): Let visitors use their webcam, as does the variable DEMO_WEBCAM=1.
        port (`int`, *optional*): By default 7860, or the next free one.
    """
    slots = load_slots(chosen_names(names or {}))
    for slot in slots:
        print(f"{slot.role.title}: {slot.name or '-'} {slot.problem}".rstrip(), flush=True)
    page = build(slots, webcam or os.environ.get("DEMO_WEBCAM") == "1")
    launch(page, server_port=port)


if __name__ == "__main__":
    main()
