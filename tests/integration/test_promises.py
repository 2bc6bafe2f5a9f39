"""SECURITY.md promises no foreign code and no pickles: nothing here could run or read them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import hf_dualspeed

ROOT = Path(hf_dualspeed.__file__).parents[1]
RUN = ("eval", "exec", "compile", "os.system", "os.popen", "runpy.", "subprocess.", "pty.", "ctypes.")
UNPICKLE = (
    "pickle.",
    "cPickle.",
    "dill.",
    "cloudpickle.",
    "joblib.",
    "marshal.",
    "shelve.",
    "torch.load",
    "read_pickle",
)
LOADERS = ("SafeLoader", "BaseLoader", "CSafeLoader")
# pip, which gets the packages that an assembled model is made of.
ALLOWED = {"hf_dualspeed/recipes/wheels.py": {"subprocess.run"}}


def dangers_in(source: str) -> set[str]:
    """Calls that could run a text or unpickle a file, and trust in remote code that nobody gave."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name, options = ast.unparse(node.func), {key.arg: ast.unparse(key.value) for key in node.keywords}
        loader = [ast.unparse(value) for value in (*node.args[1:], *(key.value for key in node.keywords))]
        if name in RUN or name.startswith(tuple(part for part in RUN + UNPICKLE if part.endswith("."))):
            found.add(name)
        elif name in UNPICKLE or name.rpartition(".")[2] == "read_pickle":
            found.add(name)
        elif name in ("yaml.load", "yaml.load_all") and not any(part.endswith(LOADERS) for part in loader):
            found.add(name)
        elif name in ("yaml.unsafe_load", "yaml.full_load") or "True" in (
            options.get("trust_remote_code"),
            options.get("allow_pickle"),
        ):
            found.add(name)
    return found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("eval(words)", {"eval"}),
        ("model.eval()", set()),
        ("re.compile(words)", set()),
        ("pickle.loads(data)", {"pickle.loads"}),
        ("torch.load(path, weights_only=True)", {"torch.load"}),
        ("np.load(path, allow_pickle=True)", {"np.load"}),
        ("np.load(path)", set()),
        ("pd.read_pickle(path)", {"pd.read_pickle"}),
        ("yaml.load(text, yaml.Loader)", {"yaml.load"}),
        ("yaml.load(text, yaml.BaseLoader)", set()),
        ("subprocess.check_output(words)", {"subprocess.check_output"}),
        ("AutoModel.from_pretrained(name, trust_remote_code=True)", {"AutoModel.from_pretrained"}),
        ("AutoModel.from_pretrained(name, trust_remote_code=options.trust_remote_code)", set()),
    ],
)
def test_dangers_are_seen(source, found):
    assert dangers_in(source) == found


def test_nothing_runs_a_text_or_unpickles_a_file():
    paths = [path for folder in ("hf_dualspeed", "spaces_demo") for path in (ROOT / folder).rglob("*.py")]
    found = {path.relative_to(ROOT).as_posix(): dangers_in(path.read_text(encoding="utf-8")) for path in paths}
    assert {name: dangers for name, dangers in found.items() if dangers} == ALLOWED
