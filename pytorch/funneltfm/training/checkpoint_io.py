"""Training checkpoints that are whole or not there."""

import os
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from funneltfm.errors import InputError
from funneltfm.files import atomic_path


class WholeCheckpoints(TorchCheckpointIO):
    """Writes beside the target and renames, on the same file system; names a damaged file when it reads one."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        with atomic_path(path) as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return super().load_checkpoint(path, *args, **kwargs)
        except FileNotFoundError:
            raise
        except Exception as error:  # a damaged file makes the unpickler raise almost anything
            raise InputError(
                f"the checkpoint {path} is damaged ({type(error).__name__}), so the run cannot go on from it. "
                f"Start the run anew with --overwrite, or restore the file."
            ) from error
