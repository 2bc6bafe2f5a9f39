import sys

from hf_dualspeed.cli import call

from .ablation import main

if __name__ == "__main__":  # spawned processes import this module, too
    sys.exit(call(lambda: main(sys.argv[1:])))
