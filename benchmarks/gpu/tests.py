"""`python -m benchmarks.gpu.tests --output FILE [pytest's words]`: the GPU tests, with their outcomes as JSON."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

from hf_dualspeed.utils.environment import machine, versions
from hf_dualspeed.utils.writing import write_json

KIND = "GPU tests"
ROOT = Path(__file__).parents[2]


class Outcomes:
    """A plugin of pytest that writes the outcomes after each test, so that a run that is cut short leaves them."""

    def __init__(self, path: Path):
        self.path, self.found = path, {}

    def pytest_runtest_logreport(self, report) -> None:
        # Setup and teardown count where they fail or skip.
        if report.when == "call" or report.outcome != "passed":
            said = {"outcome": report.outcome, "seconds": round(report.duration, 2)}
            if report.failed:
                said["error"] = str(report.longrepr)[-2000:]
            self.found[report.nodeid.partition("::")[2]] = said
            self.write(whole=False)

    def write(self, whole: bool) -> None:
        counts = Counter(said["outcome"] for said in self.found.values())
        head = {"benchmark": KIND, "machine": machine(), "versions": versions(), "whole": whole}
        write_json(self.path, {**head, "outcomes": dict(counts), "tests": self.found})


def main(argv: list[str]) -> int:
    """Runs the tests. Failing ones are a result, so that the exit code is 0 for them."""
    place = argv.index("--output")
    outcomes, words = Outcomes(Path(argv[place + 1])), argv[:place] + argv[place + 2 :]
    file = ROOT / "tests" / "integration" / "test_gpu.py"
    code = pytest.main(["-m", "gpu", "-q", "-p", "no:cacheprovider", str(file), *words], plugins=[outcomes])
    outcomes.write(whole=code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED))
    return 0 if code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) else int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
