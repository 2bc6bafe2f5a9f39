"""Finds tokens and keys in what is to be published."""

from __future__ import annotations

import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from huggingface_hub import get_token

PNG = b"\x89PNG\r\n\x1a\n"
INFLATED_LIMIT = 2**24  # bytes of a PNG's compressed text, all chunks together
HEADER_LIMIT = 10**8  # bytes of a safetensors header, as in safetensors itself
NO_TEXT = ".distcp"  # tensors of a sharded checkpoint; their names stand in a file of its own


def check_no_secret(
    contents: Mapping[str, Path | bytes], tokens: Iterable[str | bool | None] = (), folder: str | Path = ""
) -> None:
    """Raises a `ValueError` if a file or text to be published holds a token or key, which the message does not show.

    All text is searched, that in headers of safetensors, in pickles of `torch.save` and in compressed chunks of PNG
    included. Tensors and pixels are not read.

    Args:
        contents (`Mapping[str, Path or bytes]`): names in the repo, with files or their bytes.
        tokens (`Iterable[str]`, *optional*): tokens of the Hub that are in use, beside that of `hf auth login`.
        folder (`str` or `Path`, *optional*): where they come from, for the message.
    """
    own = {token.encode() for token in (get_token(), *tokens) if isinstance(token, str) and len(token) > 3}
    for name, content in contents.items():
        kind = kind_of_secret(content if isinstance(content, bytes) else text_in(content), own)
        if kind is not None:
            raise ValueError(
                f"{str(Path(folder, name))!r} holds {kind} and is not pushed. Take it out, and make it invalid."
            )


def text_in(path: Path) -> bytes:
    """The part of a file that may hold text: all of it, but the header of safetensors, and what is no tensor in a file
    of `torch.save`."""
    if path.suffix == NO_TEXT:
        return b""
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            return file.read(min(int.from_bytes(file.read(8), "little"), HEADER_LIMIT))
        if file.read(4) != b"PK\x03\x04":
            file.seek(0)
            return file.read()
        try:
            with zipfile.ZipFile(file) as archive:
                names = [name for name in archive.namelist() if not re.search(r"(^|/)data/\d+$", name)]
                return b"\n".join(map(archive.read, names))
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError):
            file.seek(0)
            return file.read()


def inflated(png: bytes) -> bytes:
    """The text in the compressed chunks of a PNG; pixels stay as they are.

    Raises:
        OverflowError: it is longer than `INFLATED_LIMIT`.
    """
    texts, at, left = [], len(PNG), INFLATED_LIMIT
    while at + 8 <= len(png):
        length, kind = struct.unpack_from(">I4s", png, at)
        _, _, body = png[at + 8 : at + 8 + length].partition(b"\0")  # behind the keyword
        at += 12 + length  # with the checksum
        # Method and text; in iTXt a flag and the method, language, translated keyword and text.
        if kind == b"iTXt" and body[:1] == b"\1":
            body = b"\0" + body[2:].split(b"\0", 2)[-1]
        elif kind not in (b"zTXt", b"iCCP"):
            continue
        stream = zlib.decompressobj()
        with suppress(zlib.error):  # nobody can read it
            texts.append(stream.decompress(body[1:], left))
            left -= len(texts[-1])
            if stream.unconsumed_tail or left <= 0:
                raise OverflowError
    return b"\n".join([b"", *texts])


def kind_of_secret(data: bytes, own: Iterable[bytes] = ()) -> str | None:
    """What kind of token or key stands in the data, or None; `own` are tokens of the Hub that are in use."""
    if data.startswith(PNG):
        try:
            data += inflated(data)
        except OverflowError:
            return "more compressed text than can be searched"
    if b"\0" in data:  # also text in UTF-16
        data += data.replace(b"\0", b"")
    if any(token in data for token in own):
        return "your Hub token"
    lowered = data.lower()
    found = (kind for kind, patterns in LOOKS.items() if any(pattern.search(data) for pattern in patterns))
    named = (
        kind for kind, (word, pattern) in NAMED.items() if word in lowered and re.search(pattern.encode(), lowered)
    )
    kind = next(found, None) or next(named, None)
    return kind and f"what looks like {kind}"


def _starting(prefix: str, rest: str) -> re.Pattern[bytes]:
    """A pattern of `prefix` and `rest` where a word begins, which may be behind an escape such as JSON's "\\n".

    It looks for the prefix first, which is fast, and then back.
    """
    before = rf"(?<![A-Za-z0-9]{prefix})|(?<=\\[nrtbf]{prefix})|(?<=\\u[0-9A-Fa-f]{{4}}{prefix})"
    return re.compile(f"{prefix}(?:{before})(?:{rest})".encode())


# Kinds of keys that show by themselves.
LOOKS = {
    "a Hub token": [
        _starting("hf_", "(?:[a-z]+_+){0,2}[A-Za-z0-9]{30,}"),
        _starting("api_org_", "[A-Za-z0-9]{30,}"),
    ],
    "an OAuth token": [
        _starting("hf_oauth_", r"[\w.-]{20,}"),
        _starting("eyJ", r"[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}"),
        _starting(r"ya29\.", r"[\w-]{30,}"),
    ],
    "a GitHub token": [_starting("gh", "[pousr]_[A-Za-z0-9]{30,}"), _starting("github_pat_", r"\w{30,}")],
    "a GitLab token": [_starting("glpat-", r"[\w-]{20,}")],
    "an Anthropic key": [_starting("sk-ant-", r"[\w-]{20,}")],
    "an OpenAI key": [_starting("sk-", r"[A-Za-z0-9]{20,}|(?:proj|svcacct|admin|None|or)-[\w-]{20,}")],
    "an AWS key": [_starting(prefix, "[A-Z0-9]{16}(?![A-Za-z0-9+/=])") for prefix in ("AKIA", "ASIA")],
    "a Google key": [_starting("AIza", r"[\w-]{35}(?![\w+/=-])"), _starting("GOCSPX-", r"[\w-]{20,}")],
    "a Slack token": [
        _starting("xox", "[a-z]-[A-Za-z0-9-]{10,}"),
        _starting("xapp-", r"\d-[A-Za-z0-9-]{10,}"),
        re.compile(rb"hooks\.slack\.com/(?:services|workflows)/\w+/\w+"),
    ],
    "a package registry's token": [_starting("npm_", "[A-Za-z0-9]{36}"), _starting("pypi-AgEI", r"[\w-]{50,}")],
    "a private key": [
        re.compile(rb"----[ -]{,2}BEGIN (?:[A-Z0-9]+ ){,3}PRIVATE KEY"),
        # How OpenSSH's begin inside; the brackets keep this line, which a Space brings along, from looking like one.
        re.compile(rb"b3BlbnNzaC1rZXkt[d]jE"),
        re.compile(rb"PuTTY-User-Key-File-\d"),
    ],
}
# Kinds that the name before them tells, in small letters: that of a variable, of a key in JSON or YAML, or of .netrc. A
# text without any of the words is not searched.
IS = r"""(?:["'\\\s]|\\u[0-9a-f]{4})*[:=](?:["'\\\s]|\\u[0-9a-f]{4})*"""
GAP, WORD = r"(?:\s|\\[nrt])+", r"""[^\s<>{}$*"'\\]"""
NETRC = (
    f"(?:machine{GAP}{WORD}+|default){GAP}login{GAP}{WORD}+(?:{GAP}account{GAP}{WORD}+)?{GAP}password{GAP}{WORD}{{6,}}"
)
NAMED = {
    "an AWS key": (b"secret", rf"secret_?access_?key{IS}[a-z0-9/+=\\]{{40,}}"),
    "a Weights & Biases key": (b"wandb", rf"wandb_?(?:api_?)?key{IS}(?=\w*\d)[\w-]{{40,}}"),
    "a Hub token": (b"token", rf"(?:hub|hf|hugging_?face(?:_?hub)?)_?token{IS}(?=[a-z_.-]*\d)[\w.-]{{16,}}"),
    "a key": (b"key", rf"(?:api|secret|access)_?key{IS}(?=[a-z_-]*\d)(?=[\d_-]*[a-z])[\w-]{{24,}}"),
    "a password as in .netrc": (b"password", NETRC),
    "a password in an address": (b"://", r"://[^\s/:@\"'<>\\]{1,100}:[^\s/:@\"'<>{}$*\\]{16,200}@[a-z0-9]"),
}
