"""The page: answers of three checkpoints to one question about an image, side by side."""

from __future__ import annotations

import html
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import limits  # isort: skip  # sets what gradio reads when it is imported
import gradio as gr
from inference import MAX_QUESTION, MAX_RATIO, InputError, check_question, pruner_names, read_image
from overlay import write_examples
from slots import HERE, Slot, ask, chosen_names, load_slots, loaded
from starlette.middleware import Middleware
from views import ABOUT, HEADER, cards, comparison, learning_curves, runs_table

QUEUE = 20
PRUNER, RATIO = "divprune", 0.9
# Fonts of the visitor's system: none is fetched.
SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


def build(slots: list[Slot], webcam: bool = False) -> gr.Blocks:
    """The page around loaded checkpoints.

    Args:
        slots (`list[Slot]`): The checkpoints.
        webcam (`bool`): Whether visitors may take a picture.
    """
    with limits.Page(title="DualSpeed", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.HTML(HEADER, elem_id="masthead")
        with gr.Tab("Ask"):
            _ask_tab(slots, webcam)
        with gr.Tab("Results"):
            _results_tab(slots)
        with gr.Tab("How to read it"):
            gr.Markdown(ABOUT)
    # One answer at a time, because all visitors share the models. The queue is short enough to be served.
    # `api_open` would let programs past the queue.
    return page.queue(max_size=QUEUE, default_concurrency_limit=1, api_open=False)


def _ask_tab(slots: list[Slot], webcam: bool) -> None:
    with gr.Row():
        with gr.Column(scale=4, min_width=300):
            sources = ["upload", "clipboard", *(["webcam"] if webcam else [])]
            image = gr.Image(type="filepath", sources=sources, label="Image", height=380, buttons=[], elem_id="image")
            # The path is passed on unread: gradio would open a bad file and fail without a reason. The page has
            # checked before that the path is an upload's.
            image.preprocess = lambda payload: payload and payload.path
        with gr.Column(scale=6, min_width=300):
            question = gr.Textbox(
                label="Question",
                placeholder="what color is the shape?",
                max_length=MAX_QUESTION,
                lines=1,
                elem_id="question",
            )
            with gr.Row():
                names = pruner_names(loaded(slots))
                pruner = gr.Dropdown(names, value=PRUNER, label="Pruner", elem_id="pruner", min_width=140)
                ratio = gr.Slider(
                    0, MAX_RATIO, RATIO, step=0.05, label="Tokens removed", elem_id="ratio", min_width=180
                )
            button = gr.Button("Ask all", variant="primary", elem_id="ask")
            folder = Path(tempfile.mkdtemp(prefix="dualspeed-examples-"))
            gr.Examples(
                write_examples(folder), [image, question], label="Examples", elem_id="examples", cache_examples=False
            )
    shown = gr.HTML(cards(slots), elem_id="cards")
    inputs = [image, question, pruner, ratio]
    answer, renew = handlers(slots)
    # Both events share one limit by its id.
    limits = {"concurrency_id": "models", "concurrency_limit": 1}
    gr.on([button.click, question.submit], answer, inputs, shown, api_name="ask", **limits)
    changes = [pruner.input, ratio.release]  # "always_last": while busy, only the last change is kept
    gr.on(changes, renew, inputs, shown, api_visibility="private", trigger_mode="always_last", **limits)
    checks = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": 4}
    image.upload(checked_upload, image, image, **checks)


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
            show_picture(picture, "Accuracy against training time")


def show_picture(path: Path, words: str) -> None:
    """A plot without a label, which would cover its title."""
    look = {"show_label": False, "buttons": [], "min_width": 280, "elem_classes": "picture"}
    gr.Image(str(path), alt_text=words, interactive=False, **look)


def launch(page: gr.Blocks, **options) -> object:
    """Serves the page within the limits of a public Space."""
    theme = gr.themes.Default(primary_hue="emerald", neutral_hue="slate", radius_size="lg", font=SANS, font_mono=MONO)
    theme = theme.set(
        body_text_color_subdued="*neutral_500",
        button_primary_background_fill="#007a5a",  # dark enough for white text
        button_primary_background_fill_hover="#00654a",
        button_primary_text_color="white",
        button_primary_text_color_dark="white",
        button_primary_background_fill_dark="#007a5a",
    )
    return page.launch(
        theme=theme,
        css_paths=HERE / "style.css",
        max_file_size=limits.MAX_UPLOAD,
        state_session_capacity=limits.MAX_SESSIONS,
        app_kwargs={"middleware": [Middleware(limits.BodyLimit)]},
        ssr_mode=False,
        footer_links=[],
        **options,
    )


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
