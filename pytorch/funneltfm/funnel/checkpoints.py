"""Checkpoints in and out: which tensor goes where, and what to say when one does not fit."""

import os
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from funneltfm.errors import InputError, brief
from funneltfm.files import atomic_path, existing_file, torch_save

_LAYER = re.compile(r"(?:attn|pffn)_layers\.(\d+)\.")
_HEAD = re.compile(r"cls_head\.")


CONFIG_NAMES = ("net_config.json", "net_config.pytorch.json")


def config_beside(path: Path, flag: str) -> Path:
    """The model's config in a checkpoint's folder, or beside its file; `flag` is what names another one."""
    folder = path if path.is_dir() else path.parent
    for name in CONFIG_NAMES:
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"there is no {' or '.join(CONFIG_NAMES)} beside {path}; name the model's config with {flag}.")


def read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a `model.pt` by name. Files from strangers are safe: nothing but tensors is unpickled."""
    path = existing_file(path, "the checkpoint")
    try:
        _check_sums(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the unpickler raise almost anything
        raise InputError(
            f"{path} is not a checkpoint of tensors ({_first_line(error)}). Expected a state dict saved by "
            "torch.save, such as model.pt of a published archive; a file that was cut short must be downloaded or "
            "copied again."
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise InputError(
            f"{path} must hold a state dict (names to tensors); it holds a {type(state).__name__} with other values."
        )
    check_kind(state, path)
    names = [name.removeprefix("module.") for name in state]
    if len(set(names)) < len(names):
        raise InputError(f"{path} holds the same tensors with and without the prefix 'module.'. Keep one of each.")
    return dict(zip(names, state.values(), strict=True))


def check_kind(state: dict[str, Tensor], path: Path) -> None:
    """InputError for a tensor that no model can hold: of whole or complex numbers, sparse, or without values."""
    for name, value in state.items():
        if not value.is_floating_point() or value.layout is not torch.strided or value.is_meta:
            kind = "without values" if value.is_meta else f"of {value.dtype}, {value.layout}"
            raise InputError(f"{path} must hold dense tensors of real numbers; {brief(name)} is {kind}.")


def _check_sums(path: Path) -> None:
    """torch.load does not look at the checksums of a zip archive, so a flipped bit would load as another weight."""
    with open(path, "rb") as handle:
        if handle.read(4) != b"PK\x03\x04":
            return  # torch's older format, which has no checksums
    with zipfile.ZipFile(path) as archive:
        if (record := archive.testzip()) is not None:
            raise ValueError(f"the checksum of its record {record} is wrong")


def _first_line(error: Exception) -> str:
    return brief((str(error).splitlines() or [type(error).__name__])[0], 200)


def load_checkpoint(
    model: nn.Module, path: str | os.PathLike[str], new_head: bool = False, decoder_layers: int = 0
) -> list[str]:
    """Load a checkpoint into `model`; every tensor must find its place.

    new_head: the classification head may be absent from the checkpoint, or have another number of classes; what does
        not fit keeps its fresh initialisation.
    decoder_layers: how many layers beyond the model's own the checkpoint may hold; a classifier leaves them out.
    Returns the names of parameters that were not loaded. Raises InputError for anything else that is missing,
    unexpected or of another shape, naming it.
    """
    state = read_state(path)
    own = model.state_dict()
    n_layer = 1 + max((int(match[1]) for name in own if (match := _LAYER.match(name))), default=-1)
    for name in [
        name for name in state if (match := _LAYER.match(name)) and 0 <= int(match[1]) - n_layer < decoder_layers
    ]:
        del state[name]
    if new_head:
        for name in [name for name in state if _HEAD.match(name)]:
            if name not in own or state[name].shape != own[name].shape:
                del state[name]
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    shapes = [name for name in own if name in state and own[name].shape != state[name].shape]
    refused = [name for name in missing if not (new_head and _HEAD.match(name))]
    if refused or unexpected or shapes:
        raise InputError(_explain(Path(path), own, state, refused, unexpected, shapes))
    state = {name: tensor.to(own[name].dtype) for name, tensor in state.items()}
    if broken := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        raise InputError(
            f"the checkpoint {path} holds NaN or infinity in {len(broken)} of its {len(state)} tensors (first "
            f"{broken[0]}): its training diverged, or its numbers are too large for {own[broken[0]].dtype}."
        )
    model.load_state_dict(state, strict=False)
    return missing


def _explain(
    path: Path,
    own: dict[str, Tensor],
    state: dict[str, Tensor],
    missing: list[str],
    unexpected: list[str],
    shapes: list[str],
) -> str:
    table = "input_layer.0.lookup_table"
    if table in shapes and own[table].shape[0] != state[table].shape[0]:
        return (
            f"the vocabulary does not match the checkpoint: {path} has embeddings of {state[table].shape[0]} pieces, "
            f"the model is built for {own[table].shape[0]}. Give the vocabulary (--tokenizer_path) and the config "
            "(--init_ckpt_config) that belong to the checkpoint."
        )
    parts = []
    if shapes:
        example = shapes[0]
        parts.append(
            f"{len(shapes)} of another shape (first {example}: {tuple(state[example].shape)} there, "
            f"{tuple(own[example].shape)} here)"
        )
    for names, what in ((missing, "missing"), (unexpected, "unexpected")):
        if names:
            parts.append(f"{len(names)} {what} (first {brief(names[0])})")
    return (
        f"the checkpoint {path} does not fit the model: of its {len(state)} tensors, {'; '.join(parts)}. "
        f"Give the config that belongs to it with --init_ckpt_config."
    )


def save_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the model's tensors as a `model.pt` under the original's names: complete or not at all."""
    state: dict[str, Any] = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    with atomic_path(path) as temporary:
        torch_save(state, temporary)
