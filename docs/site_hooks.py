"""Hooks of MkDocs: the pages keep the links that a reader of the repository follows, and the site follows them too.

README is the site's first page. A link to a file outside of docs/ leads to a page of the site that shows this file, and
a link to a folder to a list of what it holds, so that the site is whole without the repository.
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)")
# How docstrings name classes: [`DualSpeedTrainer`], [`~transformers.Trainer`].
NAME = re.compile(r"\[<code>~?(?:[\w.]+\.)?(\w+)</code>\]")
# Code blocks hold no links.
CODE = re.compile(r"(```.*?```|`[^`\n]+`)", re.DOTALL)


def place_of(path: str) -> str:
    """Where the site shows the file or folder `path` of the repository."""
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/") and (ROOT / path).is_file():
        return path.removeprefix("docs/")
    return f"repository/{path}" if path.endswith(".md") else f"repository/{path}.md"


def targets_of(source: str, text: str) -> set[str]:
    """Files and folders of the repository that `text`, which stands in `source`, links to."""
    prose = CODE.sub("", text)
    return {posixpath.normpath(posixpath.join(posixpath.dirname(source), link)) for link in LINK.findall(prose)}


def shown(path: str) -> str:
    """A file or folder of the repository as Markdown."""
    if (ROOT / path).is_dir():
        inside = sorted(p.name + "/" * p.is_dir() for p in (ROOT / path).iterdir() if p.name[0] not in "._")
        return f"# {path}\n\n" + "\n".join(f"- `{name}`" for name in inside) + "\n"
    text = (ROOT / path).read_text(encoding="utf-8")
    return text if path.endswith(".md") else f"# {path}\n\n````{Path(path).suffix[1:]}\n{text}\n````\n"


def relinked(source: str, text: str) -> str:
    """`text` with its links leading to the site's pages."""
    here = posixpath.dirname(place_of(source))

    def place(match: re.Match) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        return posixpath.relpath(place_of(path), here or ".") if (ROOT / path).exists() else match[1]

    return "".join(part if part.startswith("`") else LINK.sub(place, part) for part in CODE.split(text))


def on_files(files: Files, config) -> Files:
    """Adds README and all that pages link to outside of docs/."""
    waiting = {"README.md", *(f"docs/{file.src_uri}" for file in files.documentation_pages())}
    done: set[str] = set()
    while waiting:
        path = waiting.pop()
        done.add(path)
        text = shown(path)
        if not (ROOT / path).is_relative_to(ROOT / "docs") or (ROOT / path).is_dir():
            files.append(File.generated(config, place_of(path), content=relinked(path, text)))
        if path.endswith(".md"):
            found = {p for p in targets_of(path, text) if (ROOT / p).exists() and not (ROOT / p).is_symlink()}
            waiting |= {p for p in found if not (p.startswith("docs/") and (ROOT / p).is_file())} - done
    return files


def options(file: str) -> str:
    """The fields of the first dataclass in `file` as a table: names, types, defaults and helps."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    fields = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.decorator_list).body
    rows = ["| option | type | default | what it does |", "| --- | --- | --- | --- |"]
    for field in (node for node in fields if isinstance(node, ast.AnnAssign)):
        given = {keyword.arg: keyword.value for keyword in field.value.keywords}
        default = given.get("default") or given["default_factory"]
        default = default.args[0] if isinstance(default, ast.Call) else default
        kind = ast.unparse(field.annotation).replace(" | ", "` or `")
        said = " ".join(ast.literal_eval(given["metadata"])["help"].replace("|", "\\|").split())
        rows.append(f"| `{field.target.id}` | `{kind}` | `{ast.unparse(default)}` | {said} |")
    return "\n".join(rows)


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Links of the pages in docs/, and the options where a page asks for them."""
    if page.file.generated_by is not None:
        return markdown
    markdown = re.sub(r"<!-- options of (\S+) -->", lambda match: options(match[1]), markdown)
    return relinked(f"docs/{page.file.src_uri}", markdown)


def on_page_content(html: str, **_) -> str:
    """Names of classes as docstrings have them."""
    return NAME.sub(r"<code>\1</code>", html)
