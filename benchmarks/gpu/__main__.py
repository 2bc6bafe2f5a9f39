import sys

from hf_dualspeed.cli import call

from .gpu import main

sys.exit(call(lambda: main(sys.argv[1:])))
