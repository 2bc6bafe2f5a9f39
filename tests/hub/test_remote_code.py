"""Pruners with code of their own: pushed with it, and run by others only where they trust it."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
import torch
from evaluation_cases import evaluate, texts
from transformers import dynamic_module_utils

from hf_dualspeed import AutoPruner, DualSpeedTrainingArguments, PrunerConfig, VisualTokens
from hf_dualspeed.pruners import base, config, registry
from hf_dualspeed.recipes.run import check_pruner
from hf_dualspeed.trainer.setup import resolve_pruner

REPO = "tester/own"
CONFIG = "pruner_config.json"
CODE = '''"""Keeps what comes first (arXiv 1234.56789)."""
from dataclasses import dataclass

import torch
from hf_dualspeed import Pruner, PrunerConfig, register_pruner

from .helper import ORDER


@dataclass
class FirstSettings(PrunerConfig):
    skip: int = 0


@register_pruner("own_first")
class First(Pruner):
    """Keeps the first tokens."""

    config_class = FirstSettings
    version = 1

    def rank(self, tokens, most):
        order = torch.arange(tokens.features.shape[1]).expand(len(tokens.lengths), -1)
        return (order if ORDER > 0 else order.flip(1))[:, self.config.skip : self.config.skip + most]
'''


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """No code is left behind, neither in the registry nor among the imported modules."""
    cache = tmp_path / "modules"
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(cache))
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield
    forget()


def forget():
    """As if in another program, which has registered nothing of its own."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("transformers_modules", "mine", "single")]:
        del sys.modules[name]
    registry._REGISTRY.pop("own_first", None)
    importlib.invalidate_caches()


@pytest.fixture
def own(tmp_path):
    """The class of a user's package, `mine`."""
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "helper.py").write_text("ORDER = 1\n")
    (package / "first.py").write_text(CODE)
    return importlib.import_module("mine.first").First


@pytest.fixture
def published(hub, own):
    """The commit of a repo with the user's pruner, in a program that does not know it."""
    commit = AutoPruner.from_name("own_first", skip=1, pruning_ratio=0.5).push_to_hub(REPO).oid
    forget()
    return commit


def kept(pruner) -> list[int]:
    return pruner(VisualTokens(torch.arange(8.0).view(1, 8, 1))).positions.tolist()[0]


def test_code_is_pushed_and_run_where_it_is_trusted(hub, published, tmp_path):
    assert hub.files(REPO).keys() == {CONFIG, "README.md", "first.py", "helper.py"}
    assert json.loads(hub.files(REPO)[CONFIG])["auto_map"] == {"AutoPruner": "first.First"}
    pruner = AutoPruner.from_pretrained(REPO, trust_remote_code=True)
    assert kept(pruner) == [1, 2, 3, 4]
    assert published in type(pruner).__module__
    assert PrunerConfig.from_pretrained(REPO, trust_remote_code=True) == pruner.config
    # Saved again, it still takes its code along.
    pruner.save_pretrained(tmp_path / "copy")
    assert {p.name for p in (tmp_path / "copy").iterdir()} == {CONFIG, "first.py", "helper.py"}
    forget()
    with pytest.raises(ValueError, match=r"of the folder '.*copy' is code of its own, first\.py"):
        AutoPruner.from_pretrained(tmp_path / "copy")
    assert kept(AutoPruner.from_pretrained(tmp_path / "copy", trust_remote_code=True)) == [1, 2, 3, 4]


def test_a_class_may_have_any_name(tmp_path):
    """transformers takes one with "Tokenizer" in it for a pair of classes."""
    (tmp_path / "single.py").write_text(
        CODE.replace("class First(", "class VisualTokenizer(").replace(".helper", "helper")
    )
    (tmp_path / "helper.py").write_text("ORDER = 1\n")
    importlib.import_module("single")
    AutoPruner.from_name("own_first", pruning_ratio=0.5).save_pretrained(tmp_path / "saved")
    forget()
    assert kept(AutoPruner.from_pretrained(tmp_path / "saved", trust_remote_code=True)) == [0, 1, 2, 3]


def test_without_trust_no_code_is_fetched(hub, published, tmp_path):
    before = len(hub.log)
    with pytest.raises(ValueError, match="is not run unasked") as error:
        AutoPruner.from_pretrained(REPO)
    for words in ("'own_first'", "'tester/own'", "first.py", "trust_remote_code=True", f"revision='{published}'"):
        assert words in str(error.value)
    assert not any(".py" in line for line in hub.log[before:])
    assert "own_first" not in registry._REGISTRY
    assert not any(name.startswith("transformers_modules") for name in sys.modules)
    arguments = DualSpeedTrainingArguments(str(tmp_path), use_cpu=True, pruner=REPO)
    for load in (lambda: check_pruner(arguments, False), lambda: resolve_pruner(None, arguments, None)):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            load()


def test_a_recipe_that_trusts_its_repositories(hub, published, tmp_path):
    arguments = DualSpeedTrainingArguments(str(tmp_path), use_cpu=True, pruner=REPO)
    check_pruner(arguments, trust_remote_code=True)
    assert kept(resolve_pruner(None, arguments, None)) == [1, 2, 3, 4]
    # What was trusted is that commit, not what came later.
    hub.put(REPO, {"first.py": "raise SystemExit"})
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        resolve_pruner(None, arguments, None)


def test_a_class_of_the_users_own_is_used_instead(hub, own):
    commit = AutoPruner.from_name("own_first", skip=1, pruning_ratio=0.5).push_to_hub(REPO).oid
    before = len(hub.log)
    for options in ({}, {"trust_remote_code": True}, {"trust_remote_code": True, "revision": commit}):
        assert type(AutoPruner.from_pretrained(REPO, **options)) is own
    assert not any(".py" in line for line in hub.log[before:])


def test_code_comes_from_the_commit_of_the_config(hub, published):
    hub.put(REPO, {"first.py": CODE.replace("version = 1", "version = 2"), "helper.py": "ORDER = -1\n"})
    new = AutoPruner.from_pretrained(REPO, trust_remote_code=True)
    assert (new.version, kept(new)) == (2, [3, 4, 5, 6])
    old = AutoPruner.from_pretrained(REPO, trust_remote_code=True, revision=published)
    assert (old.version, kept(old), type(new).version) == (1, [1, 2, 3, 4], 2)
    # The network may be gone by then.
    hub.stop()
    again = AutoPruner.from_pretrained(REPO, trust_remote_code=True, revision=published)
    assert again.version == 1


def test_a_push_between_config_and_code_changes_nothing(hub, published, monkeypatch):
    load = config.load_class

    def changing(reference, source):
        hub.put(REPO, {"first.py": CODE.replace("version = 1", "version = 2")})
        return load(reference, source)

    monkeypatch.setattr(config, "load_class", changing)
    assert AutoPruner.from_pretrained(REPO, trust_remote_code=True).version == 1


LEARNED = """import torch
from hf_dualspeed import Pruner, register_pruner


@register_pruner("own_first")
class Learned(Pruner):
    \"\"\"Keeps the tokens with the largest sums, times what it has learned.\"\"\"

    def __init__(self, config):
        super().__init__(config)
        start = torch.linspace(0, 1, 3)
        CHECK  # no number can be read on the device "meta"
        self.scale = torch.nn.Parameter(start)
        self.register_buffer("calls", torch.tensor(len(start)))

    def rank(self, tokens, most):
        return (tokens.features.sum(-1) * self.scale.sum()).argsort(1, descending=True)[:, :most]
"""


@pytest.mark.parametrize("check", ["assert start[1].item() == 0.5", "if start.is_meta: raise ValueError"])
def test_code_that_only_runs_on_a_real_device_loads_its_weights(hub, tmp_path, check):
    (tmp_path / "single.py").write_text(LEARNED.replace("CHECK", check))
    pruner = importlib.import_module("single").Learned(
        registry.pruner_class("own_first").config_class(pruning_ratio=0.5)
    )
    with torch.no_grad():
        pruner.scale.copy_(torch.tensor([3.0, 4.0, 5.0]))
        pruner.calls.fill_(7)
    pruner.push_to_hub(REPO)
    pruner.reconfigure(pruning_ratio=0.25)
    forget()
    loaded = AutoPruner.from_pretrained(REPO, trust_remote_code=True)
    assert (loaded.scale.tolist(), loaded.calls.item(), loaded.pruning_ratio) == ([3.0, 4.0, 5.0], 7, 0.5)
    assert kept(loaded) == [4, 5, 6, 7]


@pytest.mark.parametrize(
    "reference",
    [
        "os.path.join",
        "../first.First",
        "/etc/first.First",
        "other/repo--first.First",
        "first",
        "first.First()",
        "first.First\n",
        ".First",
        "",
        3,
        ["first.First"],
        {"x": "first.First"},
        "fírst.First",
    ],
)
def test_auto_map_names_a_file_beside_the_config(hub, published, reference):
    values = json.loads(hub.files(REPO)[CONFIG])
    hub.put(REPO, {CONFIG: json.dumps({**values, "auto_map": {"AutoPruner": reference}})})
    for trust in (False, True):
        with pytest.raises(
            ValueError, match=r"`auto_map` in pruner_config\.json of .*'tester/own'.* 'file\.ClassName'"
        ):
            AutoPruner.from_pretrained(REPO, trust_remote_code=trust)


def test_code_that_is_no_such_pruner(hub, published):
    values = json.loads(hub.files(REPO)[CONFIG])
    hub.put(REPO, {CONFIG: json.dumps({**values, "auto_map": {"AutoPruner": "helper.ORDER"}})})
    with pytest.raises(ValueError, match=r"helper\.ORDER of .* is no pruner that is registered as 'own_first'"):
        AutoPruner.from_pretrained(REPO, trust_remote_code=True)
    hub.put(REPO, {CONFIG: json.dumps({**values, "pruner_type": "another"})})
    with pytest.raises(ValueError, match="is no pruner that is registered as 'another'"):
        AutoPruner.from_pretrained(REPO, trust_remote_code=True)
    hub.put(REPO, {CONFIG: json.dumps({**values, "auto_map": {"AutoPruner": "gone.First"}})})
    with pytest.raises(OSError, match=r"'tester/own'.*gone\.py"):
        AutoPruner.from_pretrained(REPO, trust_remote_code=True)
    # The name of one of ours is never another's code.
    hub.put(REPO, {CONFIG: json.dumps({**values, "pruner_type": "divprune"})})
    assert type(AutoPruner.from_pretrained(REPO, trust_remote_code=True)) is registry.pruner_class("divprune")


def test_an_evaluation_runs_a_pruners_code_where_it_is_trusted(hub, own, folder, asked, caplog):
    for place in ("run", "copy"):
        AutoPruner.from_name("own_first", skip=1, pruning_ratio=0.5).save_pretrained(place)
    hub.put("tester/run", {path.name: path.read_bytes() for path in (folder / "run").iterdir()})
    forget()
    with pytest.raises(ValueError, match="is not run unasked"):
        evaluate("--pruning_ratio", "0.5")
    for words, checkpoint in ((["--pruning_ratio", "0.5"], "run"), (["--pruner", "copy"], "tester/run")):
        assert evaluate("--trust_remote_code", *words, checkpoint=checkpoint) == 0
        forget()
    answers = texts("own_first-0.5")
    assert texts("own_first-0.5", "runs/evaluations/tester--run/data.json") == answers
    # Its answers belong to the code, too.
    (folder / "copy" / "helper.py").write_text("ORDER = -1\n")
    asked.clear()
    assert evaluate("--trust_remote_code", "--pruner", "copy", checkpoint="tester/run") == 0
    assert len(asked) == 4  # all tokens were answered from before
    assert "pruner's code helper.py changed" in caplog.text
    forget()
    assert evaluate("--trust_remote_code", "--pruning_ratio", "0.5", checkpoint="tester/run") == 0


def test_two_repos_may_use_the_same_name(hub, published):
    files = {**hub.files(REPO), "first.py": CODE.replace("version = 1", "version = 2")}
    hub.put("other/own", files)
    versions = [AutoPruner.from_pretrained(r, trust_remote_code=True).version for r in (REPO, "other/own", REPO)]
    assert versions == [1, 2, 1]


def test_classes_without_a_file_are_saved_without_code(hub, tmp_path, caplog):
    @registry.register_pruner("own_first")
    class Inner(base.Pruner):
        """Keeps the first tokens."""

    pruner = AutoPruner.from_name("own_first")
    pruner.save_pretrained(tmp_path / "saved")
    assert {p.name for p in (tmp_path / "saved").iterdir()} == {CONFIG}
    assert not caplog.text
    assert type(AutoPruner.from_pretrained(tmp_path / "saved")) is Inner


def in_a_function():
    class Mine(base.Pruner):
        """Keeps the first tokens."""

    return Mine


def in_a_script():
    spec = importlib.util.spec_from_loader("__main__", loader=None)
    module = importlib.util.module_from_spec(spec)
    module.__file__ = __file__  # a notebook's has none
    exec("from hf_dualspeed import Pruner\nclass Mine(Pruner):\n    'Keeps the first tokens.'", vars(module))
    return module.Mine


@pytest.mark.parametrize("define", [in_a_function, in_a_script])
def test_a_pruner_whose_code_cannot_be_pushed_is_refused(hub, monkeypatch, define):
    cls = registry.register_pruner("own_first")(define())
    if define is in_a_script:
        monkeypatch.setattr(sys.modules["__main__"], "Mine", cls, raising=False)
    with pytest.raises(ValueError, match=r"The pruner Mine is defined in .*Move the class to the top of a file"):
        AutoPruner.from_name("own_first").push_to_hub(REPO)
    assert REPO not in hub.repos


@pytest.mark.parametrize(("file", "module"), [("mine/__init__.py", "mine"), ("mine-too.py", "mine-too")])
def test_a_pruner_in_a_file_that_no_reference_can_name_is_refused(hub, tmp_path, file, module):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(CODE.replace("from .helper import ORDER", "ORDER = 1"))
    importlib.import_module(module)
    with pytest.raises(ValueError, match=r"The pruner First is defined in 'mine"):
        AutoPruner.from_name("own_first").push_to_hub(REPO)
    sys.modules.pop(module)
    assert REPO not in hub.repos
