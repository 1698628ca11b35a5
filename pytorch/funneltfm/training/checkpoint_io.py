"""Training checkpoints that are whole, or known not to be."""

import hashlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from funneltfm.errors import InputError
from funneltfm.files import atomic_path, torch_save

log = logging.getLogger(__name__)

# A seal is the SHA-256 of a file, at the end of the same file: as the comment of the zip archive that torch.save
# writes. So every reader of checkpoints still reads it. torch itself checks nothing: a flipped bit loads silently.
_NO_COMMENT = b"\0\0"
_COMMENT = (64).to_bytes(2, "little")
_SEAL = len(_COMMENT) + 64


def seal(path: Path) -> None:
    """Put the seal on a file that torch.save has written."""
    digest = _digest(path, len(_NO_COMMENT))
    with open(path, "r+b") as handle:
        handle.seek(-len(_NO_COMMENT), os.SEEK_END)
        if handle.read() != _NO_COMMENT:
            raise ValueError(f"{path} is no zip archive without a comment")
        handle.seek(-len(_NO_COMMENT), os.SEEK_END)
        handle.write(_COMMENT + digest)


def is_whole(path: Path) -> bool:
    """Whether every byte of a sealed file is as it was written."""
    if path.stat().st_size < _SEAL:
        return False
    with open(path, "rb") as handle:
        handle.seek(-_SEAL, os.SEEK_END)
        found = handle.read()
    return found == _COMMENT + _digest(path, _SEAL)


def _digest(path: Path, without: int) -> bytes:
    """SHA-256 (hex) of a file but for its last bytes."""
    digest, left = hashlib.sha256(), path.stat().st_size - without
    with open(path, "rb") as handle:
        while left > 0:
            block = handle.read(min(left, 2**20))
            left -= len(block)
            digest.update(block)
    return digest.hexdigest().encode()


def newest_whole(paths: list[Path], shapes: Mapping[str, torch.Size] | None = None) -> Path:
    """The first of `paths`, which go from new to old, that is whole and of this run; another is named and passed over.

    shapes: of the tensors that the model has; without them what a file holds is not looked at.
    """
    there = [path for path in paths if path.is_file()]
    if not there:
        raise InputError(f"there is nothing to resume: no checkpoint in {paths[0].parent}. Start without --resume.")
    for path in there:
        wrong = _foreign(path, shapes) if is_whole(path) else "damaged"
        if not wrong:
            return path
        older = there[there.index(path) + 1 :]
        log.warning("the checkpoint %s is %s%s", path, wrong, f"; trying {older[0].name}" if older else "")
    raise InputError(
        f"every checkpoint of the run is foreign or damaged ({', '.join(map(str, there))}): cut short, changed, of "
        f"another model, or not written by this program. Restore one, or start the run anew with --overwrite."
    )


def _foreign(path: Path, shapes: Mapping[str, torch.Size] | None) -> str:
    """What a whole file is if training cannot go on from it, else nothing."""
    if shapes is None:
        return ""
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not {"state_dict", "optimizer_states", "loops", "rng"} <= content.keys():
        return "not of a training that can go on"
    found = {name: value.shape for name, value in content["state_dict"].items()}
    return "" if found.items() >= shapes.items() else "of another model"


class WholeCheckpoints(TorchCheckpointIO):
    """Writes beside the target, seals, syncs and renames, on the same file system; refuses a damaged file."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        try:
            with atomic_path(path) as temporary:
                torch_save(checkpoint, temporary)
                seal(temporary)
        except OSError as error:
            raise InputError(
                f"cannot write the checkpoint {path}: {error.strerror or error}. The one before is as it was: free "
                f"space (or make the folder writable), then go on with --resume."
            ) from error

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if not is_whole(Path(path)):
            raise InputError(
                f"the checkpoint {path} is damaged: its bytes are not those that were written. Restore it, or start "
                "the run anew with --overwrite."
            )
        return super().load_checkpoint(path, *args, **kwargs)
