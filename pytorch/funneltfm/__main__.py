"""`python -m funneltfm VERB ...` is `funneltfm VERB ...`."""

import sys

from funneltfm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
