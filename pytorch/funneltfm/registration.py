"""Makes `import funneltfm` enough for the Auto classes of `transformers`, and still free: nothing is imported
before its time.
"""

import importlib
import importlib.util
import logging
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_NEEDED = (
    "transformers.modeling_utils",
    "transformers.models.auto.configuration_auto",
    "transformers.models.auto.modeling_auto",
)
_CONFIGS = _NEEDED[1]
_MODELS = "transformers.models."  # ours need the configs of some of them


def _register() -> None:
    try:
        importlib.import_module("funneltfm.funnel.hf")
        importlib.import_module("funneltfm.lsg.models")
    except ImportError as error:  # an older transformers must go on working for what it can do
        logging.getLogger(__name__).warning("FunnelTFM is not registered with transformers: %s", error)


class _Finder:
    """An import finder that waits for the Auto classes and registers our models as soon as `transformers` has them.

    Ours need all of `_NEEDED`, and these and the models import each other, so ours follow the outermost of them. They
    register themselves.
    """

    def __init__(self) -> None:
        self.underway = 0

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in _NEEDED and not name.startswith(_MODELS):
            return None
        sys.meta_path.remove(self)  # ask the others
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            self.underway += 1
            try:
                execute(module)
            finally:
                self.underway -= 1
            if self.underway == 0 and _CONFIGS in sys.modules and self in sys.meta_path:
                sys.meta_path.remove(self)
                _register()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register_with_transformers() -> None:
    """Register now if `transformers` is there already, else when it comes."""
    if _CONFIGS in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
