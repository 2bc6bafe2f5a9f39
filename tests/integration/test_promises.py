"""SECURITY.md promises no foreign code and no pickles: nothing here could run or read them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import hf_dualspeed

ROOT = Path(hf_dualspeed.__file__).parents[1]
DANGERS = ("eval", "exec", "compile", "os.system", "os.popen", "torch.load", "yaml.unsafe_load", "yaml.full_load")
MODULES = (
    "runpy.",
    "subprocess.",
    "pty.",
    "ctypes.",
    "pickle.",
    "dill.",
    "cloudpickle.",
    "joblib.",
    "marshal.",
    "shelve.",
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
        name, given = ast.unparse(node.func), [ast.unparse(value) for value in node.args]
        options = [f"{key.arg}={ast.unparse(key.value)}" for key in node.keywords]
        loads = name in ("yaml.load", "yaml.load_all") and not any(part.endswith(LOADERS) for part in given + options)
        trusts = {"trust_remote_code=True", "allow_pickle=True"}.intersection(options)
        if name in DANGERS or name.startswith(MODULES) or name.endswith(".read_pickle") or loads or trusts:
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
