"""Funnel-Transformer, and efficient transformer encoders around it.

The public face. Names are imported when they are first used, so `import funneltfm` is quick and needs torch for
the model only.
"""

import importlib
from typing import Any

from funneltfm.registration import register_with_transformers

__version__ = "0.1.0"

_FACE = {
    "FunnelTFM": "funneltfm.funnel.model",
    "ModelConfig": "funneltfm.funnel.config",
    "PUBLISHED_SIZES": "funneltfm.funnel.config",
    "canonical_length": "funneltfm.funnel.config",
    "load_checkpoint": "funneltfm.funnel.checkpoints",
    "convert_checkpoint": "funneltfm.funnel.formats",
    "InputError": "funneltfm.errors",
    "get_tokenizer": "funneltfm.data.tokenization",
    "get_dataset": "funneltfm.data.readers",
    "classify": "funneltfm.training.classify",
    "train": "funneltfm.training.train",
    "predict": "funneltfm.training.train",
    "LSGConverter": "funneltfm.lsg.convert",
}
# Citizens of `transformers` (the extra "hf"); the Auto classes know them as soon as it is imported.
_FACE |= dict.fromkeys(
    (
        "FunnelTFMConfig",
        "FunnelTFMModel",
        "FunnelTFMForPreTraining",
        "FunnelTFMForMaskedLM",
        "FunnelTFMForSequenceClassification",
        "FunnelTFMForMultipleChoice",
        "FunnelTFMForTokenClassification",
        "FunnelTFMForQuestionAnswering",
    ),
    "funneltfm.funnel.hf",
)
__all__ = sorted(_FACE)


def __getattr__(name: str) -> Any:
    if name not in _FACE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_FACE[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]


register_with_transformers()
