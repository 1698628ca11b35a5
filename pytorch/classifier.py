"""Doorstep: `python classifier.py ...` is `funneltfm classify ...`."""

import sys

from funneltfm.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["classify", *sys.argv[1:]]))
