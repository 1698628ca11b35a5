"""Doorstep: `python run.py NAME [NAME ...]` is `funneltfm run ...`."""

import sys

from funneltfm.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
