"""Doorstep: `import modeling; modeling.FunnelTFM`. Needs torch alone."""

from funneltfm.funnel.config import ModelConfig
from funneltfm.funnel.model import FunnelTFM

__all__ = ["FunnelTFM", "ModelConfig"]
