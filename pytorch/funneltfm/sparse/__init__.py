"""Sparse training for any module: masks, RigL, gradual pruning, distillation, export. Knows no task and no loop."""

from funneltfm.sparse.config import SparsityConfig
from funneltfm.sparse.distill import Distilled, distillation_loss
from funneltfm.sparse.export import load_sparse, restore_masks, save_sparse
from funneltfm.sparse.masks import attach, densities, detach, keep_masks, sparse_weights

__all__ = [
    "Distilled",
    "SparsityConfig",
    "attach",
    "densities",
    "detach",
    "distillation_loss",
    "keep_masks",
    "load_sparse",
    "restore_masks",
    "save_sparse",
    "sparse_weights",
]
