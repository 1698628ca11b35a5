"""Sparse models on disk: a folder of `transformers` with exact zeros and masks, or compact: bits and values alone.

Alphabet: n weights of a matrix, k of them on.
"""

import contextlib
import json
import math
import os
import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from funneltfm.errors import InputError, brief
from funneltfm.files import atomic_folder, atomic_path, existing_file, write_json
from funneltfm.sparse.config import SparsityConfig
from funneltfm.sparse.masks import SUFFIX, apply_masks, attach_masks, densities, detach, pack_bits, sparse_weights

NOTE = "sparsity.json"
COMPACT = "model.sparse.safetensors"
_BITS, _VALUES = ".bits", ".values"
_TYPES = {"fp32": torch.float32, "fp16": torch.float16}


def save_sparse(
    model: Any,
    folder: str | os.PathLike[str],
    compact: bool = False,
    values: Literal["fp32", "fp16"] = "fp32",
    config: SparsityConfig | None = None,
) -> None:
    """Write a model of `transformers` that has masks.

    compact: False writes what `save_pretrained` writes: dense tensors with exact zeros, the masks beside them; every
        tool reads it. True writes `model.sparse.safetensors`: a bit for every weight and a value for those that are
        on; `load_sparse` reads it. values: the type of the numbers in the compact file; fp16 rounds them.
    config: kept in `sparsity.json` beside the densities, to know later how the model was made.
    """
    folder = Path(folder)
    apply_masks(sparse_weights(model))
    note = _note(model, config)
    if old := [path.name for path in folder.glob("*.safetensors") if (path.name == COMPACT) != compact]:
        raise InputError(f"{folder} holds a model in the other form ({old[0]}): choose another folder, or empty it.")
    if compact:
        folder.mkdir(parents=True, exist_ok=True)
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        write_compact(model, folder / COMPACT, values)
    elif values != "fp32":
        raise InputError("values is for the compact form; a dense folder has the model's own type.")
    else:
        model.save_pretrained(folder)
    write_json(folder / NOTE, note)


def _note(model: nn.Module, config: SparsityConfig | None) -> dict[str, Any]:
    found = densities(model)
    if not found.weights:
        raise InputError("the model has no masks: attach them first, or save it with save_pretrained.")
    return {
        "model_density": found.model.mask_density,
        "density": found.sparse.mask_density,
        "weights": {name: {"on": density.on, "size": density.size} for name, density in found.weights.items()},
        "config": None if config is None else config.to_dict(),
    }


def load_sparse(auto: Any, folder: str | os.PathLike[str], **kwargs: Any) -> Any:
    """A model with its masks from a folder that `save_sparse` wrote, in either form; the model may have another head.

    auto: a class of `transformers` (AutoModelForMaskedLM, BertForSequenceClassification, ...). kwargs: of its
    from_pretrained. What the folder lacks (a new head) is fresh and dense.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; a sparse model is loaded from a folder on this machine.")
    if (folder / COMPACT).is_file():
        model = _load_expanded(auto, folder, **kwargs)
    else:
        model = auto.from_pretrained(folder, **kwargs)
    if not restore_masks(model, folder):
        raise InputError(f"{folder} holds no masks: the model is dense. Load it with from_pretrained.")
    return model


def _load_expanded(auto: Any, folder: Path, **kwargs: Any) -> Any:
    """The model of a compact folder, by the rules of a dense one, which it is for a moment."""
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as expanded:
        shutil.copy(folder / "config.json", expanded)
        state = {name: value.clone() for name, value in read_compact(folder / COMPACT)[0].items()}
        save_file(state, Path(expanded, "model.safetensors"), metadata={"format": "pt"})
        model = auto.from_pretrained(expanded, **kwargs)
    model.config.name_or_path = model.name_or_path = str(folder)
    return model


def restore_masks(model: nn.Module, folder: str | os.PathLike[str]) -> bool:
    """Give a model loaded from `folder`, or by that name from the hub, the masks that are there; False where there are
    none.

    A mask goes to the weight of its name, with or without the prefix of the model below the head. Masks of what this
    model does not have (another head) are left out; the rest must fit.
    """
    masks = read_masks(folder)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    found = {}
    for name, mask in masks.items():
        for other in (name, prefix + name, name.removeprefix(prefix)):
            if other in own:
                found[other] = mask
                break
    if masks and not found:
        raise InputError(f"none of the {len(masks)} masks in {folder} belongs to a weight of the model.")
    attach_masks(model, found)
    return bool(found)


def read_masks(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The masks in a folder of either form, by the names of their weights; none where there are none.

    folder: or a model's name on the hub, whose cached files of the main revision are read. Of another revision give the
    folder in the cache.
    """
    found = local_folder(folder)
    if found is None:
        return {}
    if (found / COMPACT).is_file():
        return read_compact(found / COMPACT)[1]
    masks = _tensors(found, "*.safetensors", lambda name: name.endswith(SUFFIX))  # of a head in a file of its own too
    return {name.removesuffix(SUFFIX): mask for name, mask in masks.items() if mask.dtype == torch.bool}


def _tensors(folder: Path, files: str, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Tensors by name in these files, or, where from_pretrained would read a .bin, in that."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob(files)):
        with _open(path) as file:
            found |= {name: file.get_tensor(name) for name in file.keys() if wanted(name)}  # noqa: SIM118
    if not any(folder.glob("model*.safetensors")):
        for path in sorted(folder.glob("pytorch_model*.bin")):
            found |= _unpickled(path, wanted)
    return found


def local_folder(source: str | os.PathLike[str]) -> Path | None:
    """A folder; or of a model's name on the hub the folder in the cache that from_pretrained has filled. None where
    neither is.
    """
    if Path(source).is_dir():
        return Path(source)
    with contextlib.suppress(ImportError, ValueError):  # no huggingface_hub; what cannot be a name
        from huggingface_hub import try_to_load_from_cache

        if isinstance(config := try_to_load_from_cache(str(source), "config.json"), str):
            return Path(config).parent
    return None


def _unpickled(path: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    try:  # a file from before torch 1.6 is no zip, and cannot be mapped
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise InputError(f"cannot read the tensors in {path}: {brief(str(error), 200)}.") from error
    return {name: value.clone() for name, value in state.items() if wanted(name)}


# ---- the compact form


def write_compact(model: nn.Module, path: str | os.PathLike[str], values: Literal["fp32", "fp16"] = "fp32") -> None:
    """A module's state in one safetensors file. A sparse weight NAME is NAME.bits, one bit a weight (numpy's packbits,
    in the order of memory), and NAME.values, the k that are on; the rest is as it is. Tied tensors are written once.

    n weights of 32 bits become n + 32 k bits, or n + 16 k with fp16.
    """
    weights = sparse_weights(model)
    tied = {alias: weight.name for weight in weights for alias in weight.aliases if alias != weight.name}
    _write_compact(model.state_dict(), {weight.name: weight.mask for weight in weights}, tied, path, values)


def _write_compact(
    state: Mapping[str, Tensor], masks: Mapping[str, Tensor], tied: dict[str, str], path: Any, values: str
) -> None:
    from safetensors.torch import save_file

    if values not in _TYPES:
        raise InputError(f"values must be one of {', '.join(_TYPES)}; got {values!r}.")
    sparse: dict[str, list[int]] = {}
    tensors: dict[str, Tensor] = {}
    written: dict[tuple[int, torch.Size], str] = {}
    for name, value in state.items():
        if name in tied or (name.endswith(SUFFIX) and name.removesuffix(SUFFIX) in masks):
            continue
        if name in masks:
            sparse[name] = list(value.shape)
            tensors[name + _BITS] = torch.from_numpy(pack_bits(masks[name]))
            tensors[name + _VALUES] = _narrow(name, value[masks[name]], values)
        elif value.numel() and (same := written.setdefault((value.data_ptr(), value.shape), name)) != name:
            tied[name] = same
        else:
            tensors[name] = _narrow(name, value, values).contiguous()
    note = {"format": "pt", "sparse": json.dumps(sparse), "tied": json.dumps(tied)}
    with atomic_path(path) as temporary:
        save_file({name: value.cpu() for name, value in tensors.items()}, temporary, metadata=note)


_WEIGHTS = shutil.ignore_patterns("model*.safetensors*", "pytorch_model*.bin*")


def compact_folder(
    source: Path, target: Path, values: Literal["fp32", "fp16"] = "fp32", overwrite: bool = False
) -> None:
    """Write a folder of `transformers` that holds masks once more in the compact form, with everything beside."""
    if (source / COMPACT).is_file():
        raise InputError(f"{source} is in the compact form already.")
    masks = read_masks(source)
    if not masks:
        raise InputError(f"{source} holds no masks: it is no sparse model, and would not get smaller.")
    state = _tensors(source, "model*.safetensors", lambda name: True)
    if lost := masks.keys() - state.keys():
        raise InputError(f"{source} holds a mask of {brief(min(lost))}, but no such weight.")
    with atomic_folder(target, overwrite) as fresh:
        shutil.copytree(source, fresh, ignore=_WEIGHTS)
        _write_compact(state, masks, {}, fresh / COMPACT, values)


def expand_folder(source: Path, target: Path, overwrite: bool = False) -> None:
    """Write a compact folder once more as one that `transformers` reads: exact zeros, and masks beside them."""
    from safetensors.torch import save_file

    state, masks = read_compact(source / COMPACT)
    once: dict[int, str] = {}
    state = {name: value for name, value in state.items() if once.setdefault(id(value), name) == name}  # ties once
    with atomic_folder(target, overwrite) as fresh:
        shutil.copytree(source, fresh, ignore=_WEIGHTS)
        tensors = state | {name + SUFFIX: mask for name, mask in masks.items()}
        save_file(tensors, fresh / "model.safetensors", metadata={"format": "pt"})


def _narrow(name: str, value: Tensor, values: str) -> Tensor:
    if value.dtype != torch.float32 or values == "fp32":
        return value
    narrow = value.to(_TYPES[values])
    if not narrow.isfinite().all():
        raise InputError(f"{name} has values that do not fit {values} (beyond 65504, or not finite): write fp32.")
    return narrow


def read_compact(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What `write_compact` wrote: the state without masks, sparse weights with exact zeros; and the masks by the names
    of their weights. fp16 comes back as fp32.
    """
    path = existing_file(path, "the compact model")
    state: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    with _open(path) as file:
        note = file.metadata() or {}
        if not {"sparse", "tied"} <= note.keys():
            raise InputError(f"{path} is no compact model: write one with save_sparse(..., compact=True).")
        sparse = json.loads(note["sparse"])
        parts = {name + end for name in sparse for end in (_BITS, _VALUES)}
        if missing := parts - set(file.keys()):
            raise InputError(f"{path} is damaged: it lacks {brief(min(missing))}.")
        state = {name: _widen(file.get_tensor(name)) for name in file.keys() if name not in parts}  # noqa: SIM118
        for name, shape in sparse.items():
            on = _widen(file.get_tensor(name + _VALUES))
            masks[name] = _unpack(path, name, file.get_tensor(name + _BITS), shape)
            if on.numel() != (k := int(masks[name].sum())):
                raise InputError(f"{path} is damaged: {brief(name)} has {on.numel()} values, its bits say {k}.")
            state[name] = torch.zeros(shape, dtype=on.dtype)
            state[name][masks[name]] = on
    return state | {name: state[same] for name, same in json.loads(note["tied"]).items()}, masks


def _widen(value: Tensor) -> Tensor:
    return value.float() if value.dtype == torch.float16 else value


def _unpack(path: Path, name: str, bits: Tensor, shape: list[int]) -> Tensor:
    n = math.prod(shape)
    if bits.dtype != torch.uint8 or bits.numel() != (n + 7) // 8:
        raise InputError(f"{path} is damaged: {brief(name)} has {bits.numel()} bytes of bits for {n} weights.")
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=n).astype(bool)).view(shape)


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"cannot read the tensors in {path}: {brief(str(error), 200)}.") from error


def load_compact(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Read a compact file into a module of the same kind, masks included; everything must find its place."""
    state, masks = read_compact(path)
    detach(model)
    own = model.state_dict()
    wrong = sorted(own.keys() ^ state.keys())
    wrong += [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    if wrong:
        raise InputError(f"{path} does not fit the model: {len(wrong)} tensors differ (first {brief(wrong[0])}).")
    model.load_state_dict(state)
    attach_masks(model, masks)
