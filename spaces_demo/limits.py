"""What a visitor may send to the page, through the page or past it, by programs."""

from __future__ import annotations

import atexit
import contextlib
import html
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from stat import S_ISDIR
from threading import Thread

# Read when gradio is imported, and at each upload. By default all of a machine's pages would share one folder.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "1000")
UPLOADS = os.environ.get("GRADIO_TEMP_DIR")
Path(UPLOADS or tempfile.gettempdir()).mkdir(parents=True, exist_ok=True)
FOLDER = Path(os.path.realpath(tempfile.mkdtemp(prefix="dualspeed-uploads-", dir=UPLOADS)))
os.environ["GRADIO_TEMP_DIR"] = str(FOLDER)
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)

import gradio as gr  # noqa: E402
from gradio.utils import get_upload_folder  # noqa: E402
from inference import InputError, check_question, check_upload  # noqa: E402
from starlette.formparsers import MultiPartException  # noqa: E402
from starlette.responses import PlainTextResponse  # noqa: E402

MAX_UPLOAD = 10 * 2**20  # bytes of an upload
MAX_HELD = 50 * MAX_UPLOAD  # bytes of all uploads on the disk
MAX_FILES = 1000  # their number
MAX_AGE = 3600  # seconds that an upload stays
MAX_FIELDS = 16 * 2**10  # bytes of a request's other fields
MAX_SESSIONS = 64  # sessions that are kept while they wait for nothing
MAX_UNREAD = 8  # answers of a session that were not fetched yet
MAX_NAME = 64  # characters of a session's name
# The types of a part's values; of others, those of an example's place in the list. None is an empty part.
TYPES = {gr.Textbox: (str, type(None)), gr.Dropdown: (str,), gr.Slider: (int, float)}


class Page(gr.Blocks):
    """Blocks whose handlers get plain values, and pictures that were uploaded to this server.

    gradio checks a path only where the caller says that it is one (by `meta`), downloads the addresses in any value,
    and keeps a session's values. So each value is checked before gradio touches it.

    `worker` is a thread to start once the page is served.
    """

    worker: Thread | None = None

    def validate_inputs(self, block_fn, inputs):
        super().validate_inputs(block_fn, inputs)
        try:
            inputs[:] = [checked(*pair) for pair in zip(block_fn.inputs, inputs, strict=False)]
        except InputError as error:
            raise refusal(error) from None

    def queue(self, *args, **options):
        """As gradio's, with answers that nobody fetches bounded; gradio keeps any number of them in a session."""
        super().queue(*args, **options)
        push, inboxes = self._queue.push, self._queue.pending_messages_per_session
        unread = self._queue.pending_event_ids_session

        async def bounded_push(body, request, username):
            session = body.session_hash
            if session and len(session) > MAX_NAME:
                return False, f"A session's name has at most {MAX_NAME} characters.", "error"
            if len(unread.get(session, ())) >= MAX_UNREAD:
                return False, f"{MAX_UNREAD} answers wait to be fetched. Fetch them first.", "queue_full"
            running = {event.session_hash for event in self._queue.event_ids_to_events.values()}
            idle = [name for name in inboxes if name not in running]
            for name in {*idle[: max(0, len(idle) - MAX_SESSIONS)], *(unread.keys() - inboxes.keys())}:
                inboxes.pop(name, None)
                unread.pop(name, None)
            return await push(body, request, username)

        self._queue.push = bounded_push
        return self


class BodyLimit:
    """Middleware that reads no request of more bytes than the page sends: an upload, or a few fields.

    After an upload, the oldest ones go where all together are too many. So does what gradio itself never removes: files
    of uploads that were broken off, or that had another field's name.
    """

    def __init__(self, app, page: Page):
        self.app, self.page = app, page
        self.own = {path for path in within(FOLDER) if path.is_file()}  # examples and plots

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        uploads = scope["path"].rstrip("/").endswith("/upload")
        limit = MAX_FIELDS + MAX_UPLOAD * uploads
        words, read = f"The request exceeds the maximum allowed size of {limit} bytes.", 0
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > limit:
            await PlainTextResponse(words, 413)(scope, receive, send)
            return

        async def counted():
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > limit:  # of unknown length
                raise MultiPartException(words)  # gradio removes what it has written of the upload
            return message

        try:
            await self.app(scope, counted, send)
        finally:
            if uploads:
                self.make_room()

    def make_room(self) -> None:
        """Removes uploads that are too old, and the oldest ones beyond `MAX_HELD` and `MAX_FILES`."""
        now, held, found = time.time(), 0, []
        for path in within(FOLDER):
            with contextlib.suppress(FileNotFoundError):  # gradio removes files, too
                found.append((path, path.lstat()))
        files = [(path, status) for path, status in found if not S_ISDIR(status.st_mode) and path not in self.own]
        files.sort(key=lambda one: one[1].st_mtime, reverse=True)
        for number, (path, status) in enumerate(files):
            held += status.st_size
            if held > MAX_HELD or number >= MAX_FILES or now - status.st_mtime > MAX_AGE:
                path.unlink(missing_ok=True)
                for known in self.page.temp_file_sets:
                    known.discard(str(path))
        for path, status in found:  # folders without files; a new one is about to get its file
            if S_ISDIR(status.st_mode) and now - status.st_mtime > MAX_AGE:
                with contextlib.suppress(OSError):
                    path.rmdir()


def within(folder: Path) -> Iterator[Path]:
    """Files and folders anywhere in a folder. Unlike `Path.rglob`, it bears that others remove folders meanwhile."""
    for path, folders, files in os.walk(folder):
        yield from (Path(path, name) for name in (*folders, *files))


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
