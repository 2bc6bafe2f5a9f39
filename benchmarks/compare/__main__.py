import sys
from importlib import import_module

from hf_dualspeed.cli import call

# Imported in the call: a cache of the Hub that cannot be read fails as its client is imported.
sys.exit(call(lambda: import_module("benchmarks.compare.compare").main(sys.argv[1:])))
