"""Trains a model from a recipe: `accelerate launch train.py --config trainer_configs/quickstart.yaml`."""

import sys

from hf_dualspeed.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
