"""What all tests share: hypothesis without time limits, since machines are shared; in CI always the same examples."""

import os

import pytest
from hypothesis import settings

settings.register_profile("funneltfm", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("funneltfm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: files are dealt to processes as these become free, and the last ones are short."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
