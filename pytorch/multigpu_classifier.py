"""Doorstep: `python multigpu_classifier.py ...` is `funneltfm classify ...` on all GPUs, or on two CPU processes."""

import sys

from funneltfm.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["classify", "--distributed_world_size=0", *sys.argv[1:]]))
