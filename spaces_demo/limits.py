"""What a visitor may send to the page, through the page or past it, by programs."""

from __future__ import annotations

import html
import math
import os
import tempfile
from pathlib import Path

# Read when gradio is imported, and at each upload. By default all of a machine's pages would share one folder.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
UPLOADS = os.environ.get("GRADIO_TEMP_DIR")
Path(UPLOADS or tempfile.gettempdir()).mkdir(parents=True, exist_ok=True)
os.environ["GRADIO_TEMP_DIR"] = os.path.realpath(tempfile.mkdtemp(prefix="dualspeed-uploads-", dir=UPLOADS))

import gradio as gr  # noqa: E402
from gradio.utils import get_upload_folder  # noqa: E402
from inference import InputError, check_question, check_upload  # noqa: E402

# The types of a part's values; of others, those of an example's place in the list. None is an empty part.
TYPES = {gr.Textbox: (str, type(None)), gr.Dropdown: (str,), gr.Slider: (int, float)}


class Page(gr.Blocks):
    """Blocks whose handlers get plain values, and pictures that were uploaded to this server.

    gradio checks a path only where the caller says that it is one (by `meta`), downloads the addresses in any value,
    and keeps a session's values. So each value is checked before gradio touches it.
    """

    def validate_inputs(self, block_fn, inputs):
        super().validate_inputs(block_fn, inputs)
        try:
            inputs[:] = [checked(*pair) for pair in zip(block_fn.inputs, inputs, strict=False)]
        except InputError as error:
            raise refusal(error) from None


def checked(part: gr.blocks.Block, value: object) -> object:
    """A value that a caller sends for a part of the page; of a picture, nothing but its path.

    Raises:
        InputError: it is no value of such a part, is too long, or its path is no upload's.
    """
    if isinstance(part, gr.Image):
        path = value.get("path") if isinstance(value, dict) else value
        return path and {"path": check_upload(path, get_upload_folder()), "meta": {"_type": "gradio.FileData"}}
    name = getattr(part, "label", None) or "A value"
    if type(value) not in TYPES.get(type(part), (int, type(None))):
        raise InputError(f"{name} may not be of type {type(value).__name__}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{name} may not be {value}.")
    if isinstance(value, str) and value.strip():
        check_question(value)
    return value


def refusal(error: InputError) -> gr.Error:
    """The error as gradio shows it, which is HTML."""
    return gr.Error(html.escape(str(error)), title="Please check", print_exception=False)
