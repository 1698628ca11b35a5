"""From flags to a tokenizer, a config and a model with heads, for every architecture that has Auto classes."""

import contextlib
import difflib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from funneltfm.data.text import get_text_tokenizer
from funneltfm.errors import InputError, brief
from funneltfm.sparse.export import COMPACT
from funneltfm.tasks.base import Task
from funneltfm.tasks.heads import Heads
from funneltfm.training.config import Args
from funneltfm.training.speed import speed_up

log = logging.getLogger(__name__)

# --model by its older name -> model_type of transformers; all others are called alike.
MODEL_TYPES = {"deberta_v2": "deberta-v2", "xlm_roberta": "xlm-roberta", "funnel": "funnel_tfm"}
# Their positions begin after the padding id.
_POSITIONS_AFTER_PAD = {"roberta", "camembert", "xlm-roberta", "xlm-roberta-xl", "xmod", "data2vec-text", "longformer"}


def load_tokenizer(args: Args, tasks: Sequence[Task]) -> Any:
    """The tokenizer that --pre_trained_tokenizer names, or that of the model or config."""
    path = args.pre_trained_tokenizer or of_task(args.pre_trained_model, tasks[0].name) or args.pre_trained_config
    if path is None:
        raise InputError(
            "name the tokenizer: --pre_trained_tokenizer (a folder, a tokenizer.json, a vocab.txt, or a name on the "
            "hub), or a --pre_trained_model that has one."
        )
    tokenizer = get_text_tokenizer(path, words=any(task.words for task in tasks))
    if any(task.masks for task in tasks) and tokenizer.mask_token_id is None:
        raise InputError(f"the tokenizer {path} has no mask token, which masked language modelling needs.")
    return tokenizer


def load_config(args: Args, tasks: Sequence[Task], tokenizer: Any) -> Any:
    """The model's config. Keys of --additional_config_kwargs win; from scratch the tokenizer decides the vocabulary."""
    import transformers

    wanted = None if args.model is None else MODEL_TYPES.get(args.model, args.model)
    source = args.pre_trained_config or of_task(args.pre_trained_model, tasks[0].name)
    if args.pre_trained_model is not None and Path(args.pre_trained_model, COMPACT).is_file():
        raise InputError(
            f"{args.pre_trained_model} is in the compact form: write it as transformers reads it, with its masks, by "
            f"`funneltfm export --to hf {args.pre_trained_model} FOLDER`, and name that."
        )
    if source is not None:
        try:
            config = transformers.AutoConfig.from_pretrained(source)
        except Exception as error:  # transformers and the hub raise all kinds
            raise InputError(
                f"cannot load a config from {source}: {brief(' '.join(str(error).split()), 500)}. It must be a folder "
                "with a config.json, such a file, or a name on the hub; `funneltfm convert-ckpt` makes one of an "
                "original Funnel checkpoint."
            ) from error
        if wanted is not None and config.model_type != wanted:
            raise InputError(f"--model={args.model}, but {source} is of the type {config.model_type}.")
    elif wanted is None:
        raise InputError("name the model: --pre_trained_model; or --pre_trained_config or --model, from scratch.")
    else:
        if wanted not in transformers.CONFIG_MAPPING:
            close = difflib.get_close_matches(wanted, list(transformers.CONFIG_MAPPING), n=3)
            hint = f" Did you mean {', '.join(close)}?" if close else ""
            raise InputError(f"--model={args.model}: transformers has no such architecture.{hint}")
        config = transformers.AutoConfig.for_model(wanted)
    return _adjusted(config, args, tokenizer)


def _adjusted(config: Any, args: Args, tokenizer: Any) -> Any:
    more = additional_kwargs(args.additional_config_kwargs)
    for key in more:
        if not hasattr(config, key):
            close = difflib.get_close_matches(key, list(config.to_dict()), n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise InputError(f"--additional_config_kwargs: a {config.model_type} config has no {key!r}.{hint}")
    if args.pre_trained_model is None:
        more.setdefault("vocab_size", len(tokenizer))
        for name in ("pad", "cls", "sep", "mask", "bos", "eos"):
            key = f"{name}_token_id"
            if (value := getattr(tokenizer, key, None)) is not None and hasattr(config, key):
                more.setdefault(key, value)
        if config.is_encoder_decoder:
            more = _decoder_ids(config, tokenizer) | more
    by_name = args.pre_trained_config is None and args.pre_trained_model is None
    try:  # of a config by name, what is not given follows from what is: layer_types from num_hidden_layers, say
        config = type(config).from_dict(({} if by_name else config.to_dict()) | more)
    except InputError:
        raise
    except Exception as error:  # configs check themselves in their own ways
        raise InputError(f"--additional_config_kwargs: {brief(' '.join(str(error).split()), 500)}") from error
    if config.vocab_size < len(tokenizer):
        raise InputError(
            f"the tokenizer has {len(tokenizer)} pieces, the model {config.vocab_size}: they do not belong together."
        )
    limit = n_positions(config)
    n_texts, longest = args.k + 1 if args.separated else 1, max(args.max_sequence_length)
    if 0 < limit < longest * n_texts:
        times = f" for each of {n_texts} texts" if n_texts > 1 else ""
        raise InputError(
            f"--max_sequence_length={longest}{times}, but the model takes {limit} tokens. Lower it, "
            f"or from scratch give --additional_config_kwargs max_position_embeddings=N."
        )
    return config


def n_positions(config: Any) -> int:
    """Tokens that a model of this config takes; 0 or less: any number."""
    limit = getattr(config, "max_position_embeddings", None) or 0
    after_pad = limit > 0 and config.model_type.removeprefix("lsg-") in _POSITIONS_AFTER_PAD
    return limit - (config.pad_token_id + 1) if after_pad else limit


def _decoder_ids(config: Any, tokenizer: Any) -> dict[str, int]:
    """Ids with which a decoder begins and ends, from scratch: what they are in the config, the padding, the beginning
    or the end, they are in the tokenizer; others stay (a language). Where the config does not say, the decoder begins
    with padding.
    """
    names = {"pad": ("pad",), "eos": ("eos", "sep"), "bos": ("bos", "cls")}
    found = {role: [getattr(tokenizer, f"{name}_token_id") for name in some] for role, some in names.items()}
    own = {role: next((id for id in some if id is not None), None) for role, some in found.items()}
    ids = {f"{name}_token_id": id for name, id in own.items() if id is not None}
    for key in ("decoder_start_token_id", "forced_eos_token_id"):
        value = getattr(config, key, None)
        role = next((name for name in own if getattr(config, f"{name}_token_id", None) == value), None)
        if value is None:
            role = "pad" if key == "decoder_start_token_id" else None
        if role is not None:
            ids[key] = own["pad"] if own[role] is None else own[role]
    return ids


def additional_kwargs(words: Sequence[str]) -> dict[str, Any]:
    """key=value words; values are read as YAML, so that 0.0 is a number and true a truth value.

    >>> additional_kwargs(["hidden_size=64", "hidden_act=gelu", "block_size='4_4_4'"])
    {'hidden_size': 64, 'hidden_act': 'gelu', 'block_size': '4_4_4'}
    """
    result = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key.isidentifier():
            raise InputError(f"--additional_config_kwargs takes key=value; got {word!r}.")
        try:
            result[key] = _yaml_value(value)
        except yaml.YAMLError as error:
            raise InputError(f"--additional_config_kwargs: {key} has the value {value!r}, which is no YAML.") from error
    return result


def _yaml_value(text: str) -> Any:
    """YAML 1.1 takes 2_2_2 for 222, and 1e-3 for text; neither is meant here."""
    if "_" in text and text.replace("_", "").isdigit():
        return text
    value = yaml.safe_load(text)
    if isinstance(value, str) and "_" not in value:
        try:
            return float(value) if value.lstrip("+-")[:1].isdigit() else value
        except ValueError:
            return value
    return value


def make_heads(args: Args, tasks: Sequence[Task], tokenizer: Any) -> Heads:
    """The encoder with a head for every task: from a checkpoint, or from scratch."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    models: dict[str, nn.Module] = {}
    base = load_config(args, tasks, tokenizer)
    for task in tasks:
        config = type(base).from_dict(base.to_dict() | task.model_config())
        with _made_for(task, args.pre_trained_model or base.model_type):
            models[task.name] = task.make_model(of_task(args.pre_trained_model, task.name), config)
    heads = Heads(models)
    for task in tasks:
        with _made_for(task, args.pre_trained_model or base.model_type):
            source = of_task(args.pre_trained_model, task.name)
            if (beside := task.make_beside(heads.models[task.name], source, tokenizer)) is not None:
                heads.beside[task.name] = beside
    if args.gradient_checkpointing:
        for model in (heads.backbone, *(model for model in heads.beside.values() if hasattr(model, "base_model"))):
            newer = getattr(model, "activation_checkpointing_enable", None)  # its name from transformers 5.20 on
            (newer or model.gradient_checkpointing_enable)()  # type: ignore[operator]
    speed_up(heads.backbone, args)
    return heads.train()  # what comes from a checkpoint comes in evaluation mode, and Lightning leaves it so


@contextlib.contextmanager
def _made_for(task: Task, of: str) -> Iterator[None]:
    """Whatever goes wrong in making a model is an InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # transformers and the hub raise all kinds
        raise InputError(
            f"cannot make a model for {task.name} of {of}: {brief(' '.join(str(error).split()), 500)}"
        ) from error


def of_task(source: str | None, task: str) -> str | None:
    """The folder of a task in that of a mixture, where `source` is one."""
    if source is not None and (Path(source) / task / "config.json").is_file():
        return str(Path(source) / task)
    return source


def model_name(args: Args) -> str:
    """What a run is called by default."""
    return args.model or Path(args.pre_trained_model or args.pre_trained_config or "model").name
