import sys

from hf_dualspeed.cli import call

from .compare import main

sys.exit(call(lambda: main(sys.argv[1:])))
