import sys
from importlib import import_module

from hf_dualspeed.cli import call

if __name__ == "__main__":  # spawned processes import this module, too
    sys.exit(call(lambda: import_module("benchmarks.ablation.ablation").main(sys.argv[1:])))
