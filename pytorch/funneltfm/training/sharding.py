"""FSDP: every process holds a part of the weights, gradients and optimizer state, and gathers what it computes with."""

import copy
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from funneltfm.training import ranks


class ShardedStrategy(ModelParallelStrategy):
    """torch's `fully_shard` (FSDP2) over all processes, for modules that are Shardable. Checkpoints are single files
    with whole weights, as they are with one process.
    """

    def __init__(self) -> None:
        super().__init__(ranks.size(), tensor_parallel_size=1, save_distributed_checkpoint=False)


class Shardable(lightning.LightningModule):
    """A module that ShardedStrategy can cut up: from then on it computes with copies of its children, whose weights are
    cut. The originals stay whole, for saving. Under other strategies it is as it was.
    """

    def __init__(self) -> None:
        super().__init__()
        self._originals: dict[str, nn.Module] = {}

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        if self._originals or not isinstance(self.trainer.strategy, ShardedStrategy):
            return
        self._originals = dict(self.named_children())
        for name, child in self._originals.items():
            setattr(self, name, copy.deepcopy(child))
        mesh = self.trainer.strategy.device_mesh["data_parallel"]
        for block in layers_of(self):
            fully_shard(block, mesh=mesh)
        fully_shard(self, mesh=mesh)
        for step in ("training_step", "validation_step", "test_step"):
            register_fsdp_forward_method(self, step)

    def whole(self, name: str) -> Any:
        """A child with whole weights as they are now, to be saved. All processes must ask together."""
        child = getattr(self, name)
        if name not in self._originals:
            return child
        from torch.distributed.tensor import DTensor

        state = {
            key: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()
            for key, tensor in child.state_dict().items()
        }
        self._originals[name].load_state_dict(state)
        return self._originals[name]

    @torch.no_grad()
    def load_whole(self, state: dict[str, Tensor]) -> None:
        """`load_state_dict` with whole weights, in all processes together."""
        if not self._originals:
            self.load_state_dict(state)
            return
        from torch.distributed.tensor import DTensor, distribute_tensor

        for name, tensor in self.state_dict().items():
            new = state[name].to(tensor.device)
            if isinstance(tensor, DTensor):
                new = distribute_tensor(new, tensor.device_mesh, tensor.placements)
            tensor.copy_(new)


def layers_of(module: nn.Module) -> list[nn.Module]:
    """Members of the outermost lists of layers, each of which computes by itself."""
    found: list[nn.Module] = []
    for child in module.children():
        found += child.children() if isinstance(child, nn.ModuleList) else layers_of(child)
    return [block for block in dict.fromkeys(found) if next(block.parameters(), None) is not None]
