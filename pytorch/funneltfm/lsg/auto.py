"""The Auto classes of `transformers` learn the LSG model types, and read checkpoints of the original converter.

Published ones are of the base model's type, `bert` say, with LSG's keys in their config, and code that no longer runs.
"""

import functools
from typing import Any

from transformers import AutoConfig

from funneltfm.lsg.models import MODEL_TYPES, base_class, config_class, lsg_config

MARKS = ("sparsity_type", "sparse_block_size", "num_global_tokens")  # a config that has these is LSG's


def register() -> None:
    """Register the config classes; each registers its models when the first of it is made."""
    for model_type in MODEL_TYPES:
        AutoConfig.register(f"lsg-{model_type}", config_class(model_type), exist_ok=True)
    auto: Any = AutoConfig
    read = auto.from_pretrained.__func__
    if getattr(read, "reads_lsg", False):
        return

    @functools.wraps(read)
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        result = read(cls, *args, **kwargs)
        config, *rest = result if isinstance(result, tuple) else (result,)
        if is_published(config):
            config = lsg_config(config)
        return (config, *rest) if rest else config

    from_pretrained.reads_lsg = True  # type: ignore[attr-defined]
    auto.from_pretrained = classmethod(from_pretrained)


def is_published(config: Any) -> bool:
    """Whether a config is a checkpoint's that the original converter made."""
    marked = config.model_type in MODEL_TYPES and all(hasattr(config, name) for name in MARKS)
    return marked and type(config) is base_class(config.model_type, "Config")


register()
