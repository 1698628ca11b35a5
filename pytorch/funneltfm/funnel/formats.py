"""Checkpoint folders of four formats: tell which it is, read it into Parts, write Parts, check what was written.

pt         net_config.json or net_config.pytorch.json, model.pt, and for what the original's model.pt cannot hold
           heads.pt and generator/ (a folder like this one)
tf         net_config.json, model.ckpt-N.index, model.ckpt-N.data-00000-of-00001
hf         config.json (model_type "funnel"), model.safetensors
funneltfm  config.json (model_type "funnel_tfm"), model.safetensors; generator/ beside them
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from funneltfm.errors import InputError, brief
from funneltfm.files import atomic_folder, check_target, read_json, write_json
from funneltfm.funnel import convert
from funneltfm.funnel.checkpoints import check_kind, config_beside, read_state
from funneltfm.funnel.config import ModelConfig
from funneltfm.funnel.convert import Parts
from funneltfm.funnel.model import FunnelTFM


def detect(path: Path) -> str:
    """The format of a checkpoint folder (or of a model.pt, or of the prefix of a TensorFlow checkpoint)."""
    if path.is_file() and path.suffix == ".pt":
        return "pt"
    if not path.is_dir():
        if Path(f"{path}.index").is_file() or path.suffix == ".index":
            return "tf"
        raise InputError(f"there is no checkpoint at {path}: no such folder or file.")
    if (path / "config.json").is_file():
        kind = _json(path / "config.json").get("model_type")
        if kind not in ("funnel", "funnel_tfm"):
            raise InputError(
                f"{path / 'config.json'} is of model_type {brief(repr(kind))}; expected a Funnel-Transformer."
            )
        return "hf" if kind == "funnel" else "funneltfm"
    if any(path.glob("*.index")):
        return "tf"
    if (path / "model.pt").is_file():
        return "pt"
    found = ", ".join(sorted(p.name for p in path.iterdir())[:20]) or "nothing"
    raise InputError(
        f"{path} holds no checkpoint of a known format (model.pt; *.index; config.json with model.safetensors). "
        f"It holds {found}."
    )


def _json(path: Path) -> dict[str, Any]:
    value = read_json(path, "the config")
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object.")
    return value


def _net_config(path: Path, given: Path | None, options: "Options") -> ModelConfig:
    """The named config, else the one beside; what the older code kept outside its file comes from the options."""
    return ModelConfig.init_from_json(given or config_beside(path, "--net_config"), options)


def _fitted(core: dict[str, Tensor], config: ModelConfig, path: Path) -> ModelConfig:
    """The config, without a decoder where `core` has none; an InputError where the two do not belong together."""
    if not any(name.startswith(f"attn_layers.{convert.n_layers(config)[0]}.") for name in core):
        config = replace(config, decoder_size="0")
    shapes = convert.core_shapes(config)
    if wrong := sorted(set(shapes) ^ set(core)):
        what = "lacks" if wrong[0] in shapes else "holds the unknown"
        raise InputError(
            f"{path} {what} {wrong[0]} (and {len(wrong) - 1} more that do not fit). Is its config its own?"
        )
    try:
        convert.check_shapes(core, config)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return config


# ---- pt


def read_pt(path: Path, config_path: Path | None, options: "Options") -> Parts:
    folder = path if path.is_dir() else path.parent
    state = read_state(path / "model.pt" if path.is_dir() else path)
    config = _net_config(path, config_path, options)
    heads = {name: tensor for name, tensor in state.items() if name.startswith("cls_head.")}
    core = {name: tensor for name, tensor in state.items() if name not in heads}
    if "cls_head.3.bias" in heads:
        config = replace(config, num_class=heads["cls_head.3.bias"].numel())
    config = _fitted(core, config, path)
    if (folder / "heads.pt").is_file():
        heads |= read_state(folder / "heads.pt")
    generator = read_pt(folder / "generator", None, options) if (folder / "generator").is_dir() else None
    return Parts(config, core, heads, generator)


def write_pt(parts: Parts, folder: Path, options: "Options") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    in_model = {name: tensor for name, tensor in parts.heads.items() if name.startswith("cls_head.")}
    heads = {name: tensor for name, tensor in parts.heads.items() if name not in in_model}
    torch.save(_plain(parts.core | in_model), folder / "model.pt")
    parts.config.to_json(folder / "net_config.pytorch.json")
    if heads:
        torch.save(_plain(heads), folder / "heads.pt")
    if parts.generator is not None:
        write_pt(parts.generator, folder / "generator", options)


def _plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}


# ---- tf


def read_tf(path: Path, config_path: Path | None, options: "Options") -> Parts:
    config = _net_config(path, config_path, options)
    with tempfile.TemporaryDirectory() as scratch:
        npz = Path(scratch) / "variables.npz"
        _tensorflow(options, "read", path, npz)
        with np.load(npz, allow_pickle=False) as arrays:
            variables = {str(name): torch.from_numpy(arrays[str(i)]) for i, name in enumerate(arrays["names"])}
    return convert.from_tf(variables, config)


def write_tf(parts: Parts, folder: Path, options: "Options") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    variables = {name: tensor.detach().cpu().numpy() for name, tensor in convert.to_tf(parts).items()}
    with tempfile.TemporaryDirectory() as scratch:
        npz = Path(scratch) / "variables.npz"
        arrays: Any = {str(i): value for i, value in enumerate(variables.values())}
        np.savez(npz, names=np.array(list(variables)), **arrays)
        _tensorflow(options, "write", npz, folder / "model.ckpt-0")
    write_json(folder / "net_config.json", _tf_config(parts.config))


def _tf_config(config: ModelConfig) -> dict[str, Any]:
    """net_config.json as the TensorFlow code reads it."""
    keys = config.to_dict()
    keys["rel_attn_type"] = keys.pop("attn_type")
    for outside in ("truncate_seq", "num_class", "seg_id_cls", "pad_id", "func_mask"):
        del keys[outside]
    return keys | {"init": "truncated_normal", "init_range": 0.1, "init_std": 0.02}


def _tensorflow(options: "Options", verb: str, *paths: Path) -> None:
    """Run the one program that imports TensorFlow, in the Python that has it."""
    program = Path(__file__).resolve().parents[3] / "tensorflow" / "checkpoint.py"
    if not program.is_file():
        raise InputError(
            "TensorFlow files are read and written by tensorflow/checkpoint.py of the repository; run the "
            "conversion from a checkout."
        )
    python = options.tf_python or os.environ.get("FUNNELTFM_TF_PYTHON") or sys.executable
    done = subprocess.run([python, str(program), verb, *map(str, paths)], capture_output=True, text=True)
    if done.returncode == 3:
        raise InputError(
            f"reading and writing TensorFlow files needs TensorFlow, which {python} lacks. Install it there with "
            f"pip install 'funneltfm[tf]', or name a Python that has it with --tf_python."
        )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(f"TensorFlow could not {verb} {paths[0] if verb == 'read' else paths[1]}: {reason}")


# ---- hf: transformers' own Funnel


def read_hf(path: Path, config_path: Path | None, options: "Options") -> Parts:
    config_path = config_path or path / "config.json"
    try:
        return convert.from_hf(_read_tensors(path), _json(config_path))
    except InputError as error:
        raise InputError(f"{config_path} or the tensors beside it: {error}") from error


def write_hf(parts: Parts, folder: Path, options: "Options") -> None:
    config, state, _ = convert.to_hf(parts)
    _write_tensors(state, folder)
    write_json(folder / "config.json", config)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """model.safetensors, else pytorch_model.bin (tensors alone are unpickled)."""
    path = folder / "model.safetensors"
    if not path.is_file():
        return read_state(folder / "pytorch_model.bin")
    from safetensors.torch import load_file

    try:
        state = load_file(path)
    except Exception as error:  # a damaged header makes the reader raise almost anything
        why = brief(str(error))
        raise InputError(f"{path} is not a whole safetensors file ({why}). Copy or download it again.") from error
    check_kind(state, path)
    return state


def _write_tensors(state: dict[str, Tensor], folder: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(_plain(state), folder / "model.safetensors", metadata={"format": "pt"})


# ---- funneltfm: FunnelTFMFor... of funnel.hf

CLASSES = {head: name.replace("Funnel", "FunnelTFM") for head, name in convert.HF_CLASSES.items()} | {
    "beam_head": "FunnelTFMForQuestionAnswering"
}


def read_funneltfm(path: Path, config_path: Path | None, options: "Options") -> Parts:
    from funneltfm.funnel.hf import FunnelTFMConfig

    config = FunnelTFMConfig.from_dict(_json(config_path or path / "config.json")).net_config()
    state = {name.removeprefix("funnel."): tensor for name, tensor in _read_tensors(path).items()}
    core = {name.removeprefix("net."): tensor for name, tensor in state.items() if name.startswith("net.")}
    heads = {name: tensor for name, tensor in state.items() if not name.startswith("net.")}
    config = _fitted(core, config, path)
    generator = read_funneltfm(path / "generator", None, options) if (path / "generator").is_dir() else None
    return Parts(config, core, heads, generator)


def write_funneltfm(parts: Parts, folder: Path, options: "Options") -> None:
    from funneltfm.funnel.hf import FunnelTFMConfig

    names = sorted({name.split(".")[0] for name in parts.heads})
    if len(names) > 1 or not set(names) <= set(CLASSES):
        raise InputError(f"a FunnelTFMFor... model has one head of {', '.join(CLASSES)}; got {', '.join(names)}.")
    keys: dict[str, Any] = {"architectures": [CLASSES[names[0]] if names else "FunnelTFMModel"]}
    if names == ["lm_head"]:
        keys["lm_transform"] = "lm_head.dense.weight" in parts.heads
    if names == ["token_head"]:
        keys["num_labels"] = len(parts.heads["token_head.dense.bias"])
    if names == ["beam_head"]:
        keys["qa_head"] = "beam"
    prefix = "funnel.net." if names else "net."
    _write_tensors({f"{prefix}{name}": tensor for name, tensor in parts.core.items()} | parts.heads, folder)
    FunnelTFMConfig.from_net_config(parts.config, **keys).save_pretrained(folder)
    if parts.generator is not None:
        write_funneltfm(parts.generator, folder / "generator", options)


# ---- all of them


class Options:
    """What a conversion needs beside the files.

    attn_type, truncate_seq: settings that older configs do not hold; keys of the file win.
    tf_python: a Python that has TensorFlow, where this one has not.
    """

    def __init__(self, attn_type: str | None = None, truncate_seq: bool = True, tf_python: str | None = None):
        if attn_type is not None:
            self.attn_type = attn_type
        self.truncate_seq = truncate_seq
        self.tf_python = tf_python


class Format(NamedTuple):
    read: Callable[[Path, Path | None, Options], Parts]
    write: Callable[[Parts, Path, Options], None]


FORMATS: dict[str, Format] = {
    "pt": Format(read_pt, write_pt),
    "tf": Format(read_tf, write_tf),
    "hf": Format(read_hf, write_hf),
    "funneltfm": Format(read_funneltfm, write_funneltfm),
}


def convert_checkpoint(
    source: Path,
    target: Path,
    to: str,
    kind: str = "auto",
    config_path: Path | None = None,
    options: Options | None = None,
    drop_heads: bool = False,
    overwrite: bool = False,
    finish: Callable[[Path], None] | None = None,
) -> tuple[Parts, list[str]]:
    """Convert a checkpoint folder; the target appears whole or not at all. Returns what it holds and report lines.

    kind: the source's format, or "auto". drop_heads: leave out heads (and a generator) that the target cannot hold.
    finish: called with the new folder before it takes its place, to add files. Raises InputError where anything
    does not fit.
    """
    options = options or Options()
    kind = detect(source) if kind == "auto" else kind
    for name in (kind, to):
        if name not in FORMATS:
            raise InputError(f"a format must be one of {', '.join(FORMATS)}; got {name!r}.")
    check_target(target, overwrite)
    parts = FORMATS[kind].read(source, config_path, options)
    if broken := [name for part in _parts(parts) for name, tensor in part.items() if not tensor.isfinite().all()]:
        raise InputError(f"{source} holds NaN or infinity in {len(broken)} tensors (first {broken[0]}).")
    report = [f"{source} ({kind}): {_describe(parts)}"]
    if parts.left:
        report.append(f"left out: {len(parts.left)} training variables ({_families(parts.left)})")
    if drop_heads and (parts.heads or parts.generator):
        report.append(f"left out on request: {_describe_extras(parts)}")
        parts = replace(parts, heads={}, generator=None)
    if to == "hf" and parts.generator is not None:
        raise InputError(
            "transformers' Funnel cannot hold a generator; give --drop_heads, or convert to another format."
        )

    with atomic_folder(target, overwrite) as fresh:
        FORMATS[to].write(parts, fresh, options)
        _check_written(parts, FORMATS[to].read(fresh, None, options))
        folder = source if source.is_dir() else source.parent
        for vocabulary in [*folder.glob("vocab*.txt"), *folder.glob("*.model"), *folder.glob("tokenizer*.json")]:
            shutil.copy(vocabulary, fresh / vocabulary.name)
        if finish is not None:
            finish(fresh)
    report.append(f"{target} ({to}): {_describe(parts)}; read back, every tensor bit-equal")
    return parts, report


def verify(parts: Parts, hf_folder: Path, length: int = 33) -> float:
    """The largest difference between transformers' model of a folder and ours of `parts`, on random input without
    padding.

    Raises InputError above 1e-4 of the hidden states' unit scale.
    """
    try:
        from transformers import FunnelBaseModel, FunnelModel
    except ImportError as error:
        raise InputError("--verify runs transformers' model: pip install 'funneltfm[hf]'.") from error
    use_decoder = parts.config.decoder[0] > 0
    theirs = (FunnelModel if use_decoder else FunnelBaseModel).from_pretrained(hf_folder, dtype=torch.float32).eval()
    ours = FunnelTFM(parts.config, cls_target=False).eval()
    ours.load_state_dict(parts.core)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(parts.config.vocab_size, (2, length), generator=generator)
    seg_id = (torch.arange(length) >= length // 2).long().expand(2, length).clone()
    seg_id[:, 0] = parts.config.seg_id_cls
    with torch.no_grad():
        expected = theirs(input_ids=inputs, attention_mask=torch.ones_like(inputs), token_type_ids=seg_id)
        mask = torch.zeros_like(inputs)
        hiddens, _ = ours.extract_hiddens(inputs, seg_id=seg_id, input_mask=mask, use_decoder=use_decoder)
    difference = (hiddens[-1] - expected.last_hidden_state).abs().max().item()
    if not difference < 1e-4:
        raise InputError(f"{hf_folder} in transformers differs from the converted model by {difference:.1e}.")
    return difference


def _check_written(parts: Parts, again: Parts) -> None:
    """Our own mistake if it fails: what was written reads back to the same tensors."""
    for mine, read in ((parts, again), (parts.generator, again.generator)):
        if mine is None or read is None:
            assert mine is None, "the generator was not written"
            assert read is None, "a generator appeared"
            continue
        for a, b in ((mine.core, read.core), (mine.heads, read.heads)):
            assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())
            assert all(torch.equal(a[name], b[name]) for name in a)


def _parts(parts: Parts) -> list[dict[str, Tensor]]:
    """Every dictionary of tensors."""
    return [parts.core, parts.heads, *(_parts(parts.generator) if parts.generator else [])]


def _describe(parts: Parts) -> str:
    encoder, decoder = convert.n_layers(parts.config)
    return (
        f"{len(parts.core)} tensors of the encoder ({encoder} layers)"
        + (f" and decoder ({decoder})" if decoder else "")
        + _describe_extras(parts)
    )


def _describe_extras(parts: Parts) -> str:
    heads = sorted({name.split(".")[0] for name in parts.heads})
    text = f"; {len(parts.heads)} of {', '.join(heads)}" if heads else ""
    return text + (f"; generator: {_describe(parts.generator)}" if parts.generator else "")


def _families(names: list[str]) -> str:
    """`model/x/adam`, `model/y/adam`, `global_step` -> `adam, global_step`."""
    return ", ".join(sorted({name.rsplit("/", 1)[-1] for name in names}))
