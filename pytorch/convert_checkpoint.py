"""Doorstep: `python convert_checkpoint.py ...` is `funneltfm convert-lsg ...`."""

import sys

from funneltfm.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert-lsg", *sys.argv[1:]]))
