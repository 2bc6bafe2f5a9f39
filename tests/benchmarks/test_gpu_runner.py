"""`python -m benchmarks.gpu`: parts within a budget, each with a result of its own."""

import contextlib
import json
import os
import select
import subprocess
import sys

import pytest
import torch

from benchmarks.ablation import large
from benchmarks.gpu import gpu, packages
from benchmarks.gpu import tests as gpu_tests
from benchmarks.gpu.parts import ABLATION, BENCH, ROOT, TESTS, Part, plan
from hf_dualspeed.bench.options import parse_arguments

WRITES = "import json, sys; json.dump({'benchmark': 'nothing', 'value': 7}, open(sys.argv[2], 'w'))"
HALF = WRITES.replace("sys.argv[2]", "sys.argv[2].replace('.json', '.part.json')") + "; import time; time.sleep(60)"


def part(key, code, least=1, most=30):
    return Part(key, ("-c", code), least, most, ())


@pytest.fixture
def called(tmp_path, monkeypatch):
    """Calls the command with parts that are scripts; returns its exit code and the summary."""
    monkeypatch.setattr(gpu, "PUBLISHED", tmp_path / "published")
    monkeypatch.setattr(gpu, "card_of", lambda: "h100")

    def call(parts, *words):
        monkeypatch.setattr(gpu, "plan", lambda tiny: parts)
        code = gpu.main(["--tiny", "--output", str(tmp_path / "out"), *words])
        summary = tmp_path / "out" / "gpu_h100_summary.json"
        return code, json.loads(summary.read_text()) if summary.is_file() else None

    return call


def states(summary):
    return {key: entry["state"] for key, entry in summary["parts"].items()}


def test_parts_run_once_for_a_version(called, tmp_path, monkeypatch):
    parts = [part("first", WRITES), part("second", "raise SystemExit('no such thing')"), part("third", WRITES, 9999)]
    code, summary = called(parts, "--commit", "abc")
    assert code == 1
    assert states(summary) == {"first": "done", "second": "failed", "third": "no time left"}
    assert summary["parts"]["second"]["last_lines"] == ["no such thing"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"gpu_h100_first.json", "gpu_h100_summary.json"}
    result = json.loads((tmp_path / "out" / "gpu_h100_first.json").read_text())
    assert result["value"] == 7
    assert result["origin"]["depends_on"] == parts[0].depends_on()
    assert len(result["origin"]["commit"]) in (3, 40)
    assert {"card", "machine", "versions", "commit"} <= summary.keys()
    assert str(tmp_path) not in (tmp_path / "out" / "gpu_h100_summary.json").read_text()
    # Again: the first is there, and published, it is there for another folder as well.
    assert states(called(parts[:1])[1]) == {"first": "there"}
    assert states(called(parts[:1], "--again")[1]) == {"first": "done"}
    assert states(called([part("first", WRITES + "; 1")])[1]) == {"first": "done"}  # of another version
    (tmp_path / "out").rename(tmp_path / "published")
    assert states(called([part("first", WRITES + "; 1")])[1]) == {"first": "there"}


def test_a_part_ends_at_its_limit_and_leaves_what_it_had(called, tmp_path):
    code, summary = called([part("slow", HALF, most=3)])
    assert code == 0
    assert states(summary) == {"slow": "stopped at its limit"}
    assert summary["parts"]["slow"]["seconds"] < 30
    result = json.loads((tmp_path / "out" / "gpu_h100_slow.json").read_text())
    assert (result["value"], result["origin"]["whole"]) == (7, False)
    assert states(called([part("slow", HALF, most=3)], "--dry-run", "--budget", "100")[1]) == states(summary)


def test_a_part_that_was_stopped_comes_last(called):
    """Otherwise those that are too slow for their limits would leave no time for the others in any call."""
    parts = [part("slow", HALF, most=3), part("next", WRITES, least=9)]
    budget = ("--budget", str(gpu.RESERVE + 12))
    assert states(called(parts, *budget)[1]) == {"slow": "stopped at its limit", "next": "no time left"}
    assert list(states(called(parts, *budget)[1])) == ["next", "slow"]


def test_a_part_that_grows_finds_its_earlier_result(called, tmp_path):
    adds = (
        "import json, pathlib, sys; path = pathlib.Path(sys.argv[2]); "
        "found = json.loads(path.read_text())['runs'] if path.is_file() else []; "
        "path.write_text(json.dumps({'runs': [*found, len(found)]}))"
    )
    growing = Part("first", ("-c", adds), 1, 30, (), grows=True)
    for expected in ([0], [0, 1]):
        assert states(called([growing], "--again")[1]) == {"first": "done"}
        assert json.loads((tmp_path / "out" / "gpu_h100_first.json").read_text())["runs"] == expected
    assert states(called([part("first", adds)], "--again")[1]) == {"first": "done"}
    assert json.loads((tmp_path / "out" / "gpu_h100_first.json").read_text())["runs"] == [0]


def test_the_budget_is_that_of_all_parts(called):
    _, summary = called([part("slow", HALF), part("next", WRITES, least=2)], "--budget", str(gpu.RESERVE + 3))
    assert states(summary) == {"slow": "stopped at its limit", "next": "no time left"}


def test_what_is_cut_off_leaves_what_is_done(called, tmp_path, monkeypatch):
    executed = gpu.executed

    def cut(command, limit):
        if "second" in command[-1]:
            raise KeyboardInterrupt
        return executed(command, limit)

    monkeypatch.setattr(gpu, "executed", cut)
    with pytest.raises(KeyboardInterrupt):
        called([part("first", WRITES), part("second", WRITES)])
    summary = json.loads((tmp_path / "out" / "gpu_h100_summary.json").read_text())
    assert states(summary) == {"first": "done", "second": "running"}
    assert (tmp_path / "out" / "gpu_h100_first.json").is_file()


def test_a_part_ends_with_all_that_it_started():
    child = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    code, lines = gpu.executed([sys.executable, "-c", child], 5)
    assert code is None
    # A killed process ends when the system comes to it.
    with contextlib.suppress(ProcessLookupError):
        assert select.select([os.pidfd_open(int(lines[0]))], [], [], 60)[0], "what a part had started lives on"


def test_a_dry_run_does_nothing(called, tmp_path, capsys):
    assert called([part("first", WRITES)], "--dry-run") == (0, None)
    assert "to be run" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tiny", [False, True])
def test_every_part_is_a_command(tiny):
    parts = plan(tiny)
    assert len({one.key for one in parts}) == len(parts)
    for one in parts:
        assert one.least <= one.most <= gpu.BUDGET
        words = list(one.words)
        assert words[:2] in (list(TESTS), list(ABLATION)) or words[:3] == list(BENCH)
        if words[:2] == list(ABLATION):
            options = large._parser().parse_args([*words[2:], "--output", "x.json"])
            assert options.tiny is tiny
            assert one.grows
            assert options.seconds <= one.most
        if words[:3] == list(BENCH):
            options = parse_arguments([*words[3:], "--output", "x.json"])
            assert (options.scale == "full") is not tiny
            assert options.kind in ("steps", "profile", "same_memory")
            # As on a card of 80 GB, whatever the card has, which says how long it takes.
            assert options.kind != "same_memory" or options.memory_gib < 75
    assert parts[0].depends_on() != parts[1].depends_on()


def test_a_tiny_part_is_measured_and_rendered(called, tmp_path):
    (profile,) = [one for one in plan(True) if one.key == "profile"]
    code, summary = called([profile], "--pages")
    assert (code, states(summary)) == (0, {"profile": "done"})
    path = tmp_path / "out" / "gpu_h100_profile.json"
    assert json.loads(path.read_text())["origin"]["whole"]
    assert all(path.with_suffix(suffix).is_file() for suffix in (".md", ".png"))


def test_outcomes_are_written_after_each_test(tmp_path):
    outcomes = gpu_tests.Outcomes(tmp_path / "tests.json")
    script = tmp_path / "test_own.py"
    script.write_text(
        "import pytest\n\ndef test_good(): pass\n\ndef test_bad(): assert 1 == 2\n\n"
        "@pytest.mark.skip\ndef test_left(): pass\n"
    )
    pytest.main(["-p", "no:cacheprovider", "-c", "/dev/null", str(script)], [outcomes])
    found = json.loads((tmp_path / "tests.json").read_text())
    assert (found["outcomes"], found["whole"]) == ({"passed": 1, "failed": 1, "skipped": 1}, False)
    assert "assert 1 == 2" in found["tests"]["test_bad"]["error"]


@pytest.mark.parametrize(
    ("card", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "nvidia_geforce_rtx_4090"),
    ],
)
def test_files_are_called_after_the_card(card, name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: card)
    assert gpu.card_of() == name


def test_without_git_the_commit_is_the_given_one(monkeypatch):
    def none(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", none)
    assert gpu.commit_of("abc") == {"commit": "abc", "changed": None}


def test_packages_that_are_missing_are_named(monkeypatch):
    monkeypatch.setattr(packages, "NEEDED", ("peft>=999", "no-such-thing"))
    with pytest.raises(ValueError, match=r"lacks peft>=999 \(found .*no-such-thing \(missing\).*WHEELS=folder"):
        gpu.main(["--tiny", "--output", "nowhere"])


def test_packages_without_which_nothing_can_be_imported_are_named():
    """As on a machine that has torch with CUDA and little else."""
    without = (
        "import importlib.metadata as m, runpy, sys\n"
        "sys.modules['datasets'] = None\n"
        "known = m.version\n"
        "def version(name):\n"
        "    if name == 'datasets': raise m.PackageNotFoundError(name)\n"
        "    return known(name)\n"
        "m.version, sys.argv = version, ['gpu', '--dry-run']\n"
        "runpy.run_module('benchmarks.gpu', run_name='__main__')"
    )
    run = subprocess.run([sys.executable, "-c", without], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2
    assert "lacks datasets>=4.7 (missing)." in run.stderr
    assert "make gpu WHEELS=folder" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_card_is_needed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="finds no GPU. Use --tiny"):
        gpu.main(["--output", "nowhere"])
    with pytest.raises(ValueError, match="`parts` must be one of 'llava_1_5'"):
        gpu.main(["--output", "nowhere", "--parts", "other"])
