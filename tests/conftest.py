"""What all tests share: hypothesis without time limits, since machines are shared; in CI always the same examples."""

import os

from hypothesis import settings

settings.register_profile("funneltfm", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("funneltfm")
