"""Files are written whole or not at all, and by one function."""

from __future__ import annotations

import ast
import json
import os
import re
import stat
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

import hf_dualspeed
from hf_dualspeed.utils.writing import copy_file, new_folder, write_file, write_json

ROOT = Path(hf_dualspeed.__file__).parents[1]
WRITES = {"write_text", "write_bytes", "savefig", "save_file", "to_parquet", "imwrite", "tofile", "to_csv"}
# Where else files are written: the function itself, lines that are appended, and a cache that can be made anew.
ELSEWHERE = {
    "hf_dualspeed/utils/writing.py": {"open('wb')", "shutil.copyfileobj"},
    "hf_dualspeed/evaluation/predictions.py": {"open('ab')"},
    "hf_dualspeed/feature_cache/store.py": {"write_text", "write_bytes"},
}


def writes_in(source: str) -> set[str]:
    """Calls that write to a path; what goes to a `buffer` does not."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        first = ast.unparse(node.args[0]) if node.args else ""
        texts = [arg.value for arg in (*node.args, *(key.value for key in node.keywords)) if type(arg) is ast.Constant]
        modes = [text for text in map(str, texts) if text.strip("rwaxbt+") == "" and {*text} & {*"wax+"}]
        on = ast.unparse(node.func)
        if name == "open" and modes:
            found.add(f"open({modes[0]!r})")
        elif on in ("json.dump", "torch.save", "pickle.dump", "yaml.dump") or re.match(
            r"shutil\.(copy(?!mode)|move)", on
        ):
            found.add(on)
        elif first != "buffer" and (name in WRITES or (name == "save" and isinstance(node.func, ast.Attribute))):
            found.add(name)
    return found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("path.write_text('x')", {"write_text"}),
        ("open(path, 'w')", {"open('w')"}),
        ("path.open(mode='r+b')", {"open('r+b')"}),
        ("open(path)", set()),
        ("json.dump(value, file)", {"json.dump"}),
        ("Image.new(size).save(path)", {"save"}),
        ("image.save(buffer, 'PNG')", set()),
        ("figure.savefig(path)", {"savefig"}),
        ("shutil.copy(path, folder)", {"shutil.copy"}),
        ("shutil.copytree(path, folder)", {"shutil.copytree"}),
        ("shutil.copymode(path, other)", set()),
    ],
)
def test_writes_are_seen(source, found):
    assert writes_in(source) == found


def test_no_other_place_writes_a_file():
    paths = [path for folder in ("hf_dualspeed", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    found = {path.relative_to(ROOT).as_posix(): writes_in(path.read_text(encoding="utf-8")) for path in paths}
    assert {name: writes for name, writes in found.items() if writes} == ELSEWHERE


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_an_interruption_leaves_the_earlier_file_whole(tmp_path, monkeypatch, fails):
    path = write_json(tmp_path / "new" / "results.json", {"a": 1})
    assert path.read_text() == '{\n  "a": 1\n}\n'

    def disk_is_full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((os, "fsync") if fails == "fsync" else (Path, "replace")), disk_is_full)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(path.parent) == ["results.json"]


def test_line_breaks_rights_and_links_stay(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("mine")
    path.chmod(0o640)
    (tmp_path / "link.md").symlink_to(path)
    write_file(tmp_path / "link.md", "one\r\ntwo\n")
    assert path.read_bytes() == b"one\r\ntwo\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert (tmp_path / "link.md").is_symlink()


def test_what_is_no_file_is_not_replaced(tmp_path):
    for path in (tmp_path, Path("/dev/null")):
        with pytest.raises(OSError, match="is no regular file"):
            write_file(path, "x")
    assert not Path("/dev/null").is_file()


def test_a_copy_is_whole_and_follows_no_link(tmp_path, monkeypatch):
    source, target = tmp_path / "a", tmp_path / "new" / "b"
    source.write_bytes(b"x" * 10_000_000)
    assert copy_file(source, target).read_bytes() == source.read_bytes()
    (tmp_path / "link").symlink_to(source)
    for path in (tmp_path / "link", tmp_path, tmp_path / "gone", Path("/dev/zero")):
        with pytest.raises(OSError, match="is a link or no regular file"):
            copy_file(path, target)
    # A link in the way is replaced, and the file behind it stays.
    (tmp_path / "short").write_text("short")
    copy_file(tmp_path / "short", tmp_path / "link")
    assert (tmp_path / "link").read_text() == "short"
    assert not (tmp_path / "link").is_symlink()
    assert source.stat().st_size == 10_000_000

    def disk_is_full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_is_full)
    with pytest.raises(OSError, match="No space left"):
        copy_file(tmp_path / "short", target)
    assert target.stat().st_size == 10_000_000
    assert os.listdir(target.parent) == ["b"]


def test_parts_of_killed_processes_are_cleared_and_no_others(tmp_path):
    path, ended = tmp_path / "results[1].json", subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True)
    dead, day_ago = ended.stdout.strip(), time.time() - 25 * 3600
    names = {
        f"_{path.name}.{dead}.part": False,
        f"_{path.name}.{dead}.ab_1.part": False,  # a folder
        f"_{path.name}.{os.getppid()}.part": True,  # its process runs
        f"_{path.name}.notes.part": True,  # a person's
        f"_other.json.{dead}.part": True,  # of another file
        f"_{path.name}.{dead}.young.part": True,
    }
    for name in names:
        part = tmp_path / name
        if "ab_1" in name:
            part.mkdir()
            part.joinpath("model").write_text("half")
        else:
            part.write_text("half")
        if "young" not in name:
            os.utime(part, (day_ago, day_ago))
    write_file(path, "whole")
    assert {name: (tmp_path / name).exists() for name in names} == names
    assert path.read_text() == "whole"


@pytest.mark.parametrize("there", [False, True])
def test_a_new_folder_has_files_once_all_are_written(tmp_path, monkeypatch, there):
    folder = tmp_path / "model"
    if there:
        folder.mkdir()
    monkeypatch.chdir(folder if there else tmp_path)
    given = "." if there else "model"
    with suppress(KeyboardInterrupt), new_folder(given) as part:
        write_file(part / "config.json", "half")
        raise KeyboardInterrupt
    assert folder.exists() == there
    with new_folder(given) as part:
        assert part.name == "model"
        write_file(part / "code" / "model.py", "code")
        write_file(part / "config.json", "whole")
        assert not (folder / "config.json").exists()
    assert sorted(path.name for path in folder.rglob("*")) == ["code", "config.json", "model.py"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
