"""`python -m benchmarks.gpu`: all that is measured on one GPU, in nine minutes."""

import sys

from hf_dualspeed.cli import call

from .packages import check_packages


def run() -> int:
    """The command, or what it lacks where it cannot be imported."""
    try:
        from .gpu import main
    except ImportError:
        check_packages()
        raise
    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(call(run))
