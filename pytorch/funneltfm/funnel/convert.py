"""Checkpoints of three origins under one set of names: pure tables, tested both ways.

    tf   the TensorFlow code's variables: `model/encoder/layer_0/rel_attn/q/kernel`
    pt   FunnelTFM's own names, which are the original PyTorch code's: `attn_layers.0.q_head.weight`
    hf   the Funnel model of `transformers`: `encoder.blocks.0.0.attention.q_head.weight`

A checkpoint is a `Parts`: the config, the tensors of the FunnelTFM, those of heads by head, and for ELECTRA the
generator, a Parts of its own. Every tensor is accounted for: taken, or named in `left`.
"""

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from funneltfm.errors import InputError, brief
from funneltfm.funnel.config import ModelConfig
from funneltfm.funnel.model import FunnelTFM


@dataclass
class Parts:
    """What a checkpoint holds, under FunnelTFM's names."""

    config: ModelConfig
    core: dict[str, Tensor]
    """The FunnelTFM without a classification head: embedding, encoder and, where there is one, decoder."""
    heads: dict[str, Tensor] = field(default_factory=dict)
    """Names begin with the head's: cls_head, lm_head, detection_head, token_head, qa_head, beam_head."""
    generator: "Parts | None" = None
    left: list[str] = field(default_factory=list)
    """Variables that are no part of a model: optimizer slots and step counters."""

    def count(self) -> int:
        return len(self.core) + len(self.heads)


def n_layers(config: ModelConfig) -> tuple[int, int]:
    """Layers with parameters: (encoder, decoder)."""
    return sum(n for n, _ in config.blocks), config.decoder[0]


def core_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Every parameter of FunnelTFM(config, cls_target=False) and its shape."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in FunnelTFM(config, cls_target=False).state_dict().items()}


# FunnelTFM's name within a layer -> (TensorFlow's, transformers')
ATTENTION = {
    "q_head.weight": ("q/kernel", "q_head.weight"),
    "k_head.weight": ("k/kernel", "k_head.weight"),
    "k_head.bias": ("k/bias", "k_head.bias"),
    "v_head.weight": ("v/kernel", "v_head.weight"),
    "v_head.bias": ("v/bias", "v_head.bias"),
    "r_w_bias": ("r_w_bias", "r_w_bias"),
    "r_r_bias": ("r_r_bias", "r_r_bias"),
    "r_s_bias": ("r_s_bias", "r_s_bias"),
    "r_kernel": ("r/kernel", "r_kernel"),
    "seg_embed": ("seg_embed", "seg_embed"),
    "post_proj.weight": ("o/kernel", "post_proj.weight"),
    "post_proj.bias": ("o/bias", "post_proj.bias"),
    "layer_norm.weight": ("layer_norm/gamma", "layer_norm.weight"),
    "layer_norm.bias": ("layer_norm/beta", "layer_norm.bias"),
}
FFN = {
    "pffn.0.weight": ("layer_1/kernel", "linear_1.weight"),
    "pffn.0.bias": ("layer_1/bias", "linear_1.bias"),
    "pffn.3.weight": ("layer_2/kernel", "linear_2.weight"),
    "pffn.3.bias": ("layer_2/bias", "linear_2.bias"),
    "layer_norm.weight": ("layer_norm/gamma", "layer_norm.weight"),
    "layer_norm.bias": ("layer_norm/beta", "layer_norm.bias"),
}
INPUT = {
    "input_layer.0.lookup_table": ("model/input/word_embedding/lookup_table", "embeddings.word_embeddings.weight"),
    "input_layer.1.weight": ("model/input/layer_norm/gamma", "embeddings.layer_norm.weight"),
    "input_layer.1.bias": ("model/input/layer_norm/beta", "embeddings.layer_norm.bias"),
}
# Heads: FunnelTFM's name -> TensorFlow's below the scope; `*` is the name of the task it was finetuned on.
TF_HEADS = {
    "lm_head.dense.weight": "lm_proj/dense/kernel",
    "lm_head.dense.bias": "lm_proj/dense/bias",
    "lm_head.layer_norm.weight": "lm_proj/layer_norm/gamma",
    "lm_head.layer_norm.bias": "lm_proj/layer_norm/beta",
    "lm_head.bias": "lm_loss/bias",
    "detection_head.dense.weight": "binary_proj/dense/kernel",
    "detection_head.dense.bias": "binary_proj/dense/bias",
    "detection_head.logit.weight": "binary_loss/weight",
    "detection_head.logit.bias": "binary_loss/bias",
    "cls_head.0.weight": "sequnece_summary/summary/kernel",  # spelt so in real checkpoints
    "cls_head.0.bias": "sequnece_summary/summary/bias",
    "cls_head.3.weight": "*/logit/kernel",
    "cls_head.3.bias": "*/logit/bias",
    "beam_head.start.weight": "start_logits/dense/kernel",
    "beam_head.start.bias": "start_logits/dense/bias",
    "beam_head.end_dense_0.weight": "end_logits/dense_0/kernel",
    "beam_head.end_dense_0.bias": "end_logits/dense_0/bias",
    "beam_head.end_layer_norm.weight": "end_logits/layer_norm/gamma",
    "beam_head.end_layer_norm.bias": "end_logits/layer_norm/beta",
    "beam_head.end_dense_1.weight": "end_logits/dense_1/kernel",
    "beam_head.end_dense_1.bias": "end_logits/dense_1/bias",
    "beam_head.answer_dense_0.weight": "answer_class/dense_0/kernel",
    "beam_head.answer_dense_0.bias": "answer_class/dense_0/bias",
    "beam_head.answer_dense_1.weight": "answer_class/dense_1/kernel",
}
_TF_TASK = re.compile(r"model/((?:classification|regression)_[^/]+/logit|race/logits)/(kernel|bias)")
_TF_TRAINING = re.compile(r"(.*/)?(adam\w*|beta[12]_power|global_step)$", re.IGNORECASE)

HF_HEADS = {
    "lm_head.bias": "lm_head.bias",
    "detection_head.dense.weight": "discriminator_predictions.dense.weight",
    "detection_head.dense.bias": "discriminator_predictions.dense.bias",
    "detection_head.logit.weight": "discriminator_predictions.dense_prediction.weight",
    "detection_head.logit.bias": "discriminator_predictions.dense_prediction.bias",
    "cls_head.0.weight": "classifier.linear_hidden.weight",
    "cls_head.0.bias": "classifier.linear_hidden.bias",
    "cls_head.3.weight": "classifier.linear_out.weight",
    "cls_head.3.bias": "classifier.linear_out.bias",
    "token_head.dense.weight": "classifier.weight",
    "token_head.dense.bias": "classifier.bias",
    "qa_head.dense.weight": "qa_outputs.weight",
    "qa_head.dense.bias": "qa_outputs.bias",
}


# ---- TensorFlow


def tf_names(config: ModelConfig, scope: str = "model") -> dict[str, str]:
    """FunnelTFM's name -> TensorFlow's, for the core. The generator's scope shares the model's embedding."""
    n_encoder, _ = n_layers(config)
    names = {}
    for name in core_shapes(config):
        if name in INPUT:
            names[name] = INPUT[name][0]
        elif name.startswith("input_projection"):
            names[name] = f"{scope}/encoder/{name.replace('.', '/').replace('weight', 'kernel')}"
        else:
            kind, layer, rest = name.split(".", 2)
            part = "encoder" if int(layer) < n_encoder else "decoder"
            table, folder = (ATTENTION, "rel_attn") if kind == "attn_layers" else (FFN, "ff")
            names[name] = f"{scope}/{part}/layer_{layer}/{folder}/{table[rest][0]}"
    return names


def from_tf(variables: dict[str, Tensor], config: ModelConfig) -> Parts:
    """The parts of a TensorFlow checkpoint. Raises InputError where a variable is missing, unknown, or of another
    shape.
    """
    variables = dict(variables)
    left = sorted(name for name in variables if _TF_TRAINING.fullmatch(name))
    for name in left:
        del variables[name]
    used: set[str] = set()
    if not config.separate_cls:  # that code masks the first token all the same
        config = dataclasses.replace(config, func_mask="always")
    parts = _from_tf_scope(variables, _with_found_decoder(variables, config, "model"), "model", used)
    if any(name.startswith("generator/") for name in variables):
        generator = _generator_config(variables, parts.config)
        parts.generator = _from_tf_scope(variables, generator, "generator", used)
    if unknown := sorted(set(variables) - used):
        raise InputError(
            f"the TensorFlow checkpoint holds {len(unknown)} variables that belong to no known part (first "
            f"{unknown[0]}). Is it a Funnel-Transformer, and is net_config.json its config?"
        )
    parts.left = left
    return parts


def _with_found_decoder(variables: Iterable[str], config: ModelConfig, scope: str) -> ModelConfig:
    """The config without a decoder where the checkpoint has none: core-only archives keep the full model's config."""
    has_decoder = any(name.startswith(f"{scope}/decoder/") for name in variables)
    return config if has_decoder else dataclasses.replace(config, decoder_size="0")


def _from_tf_scope(variables: dict[str, Tensor], config: ModelConfig, scope: str, used: set[str]) -> Parts:
    core = {}
    for ours, theirs in tf_names(config, scope).items():
        if theirs not in variables:
            raise InputError(
                f"the TensorFlow checkpoint lacks {theirs}, which its config (block_size {config.block_size}, "
                f"decoder_size {config.decoder_size}) asks for. Give the net_config.json that belongs to it."
            )
        used.add(theirs)
        core[ours] = variables[theirs]
    heads = {}
    for ours, theirs in TF_HEADS.items():
        if theirs.startswith("*"):
            continue
        if (name := f"{scope}/{theirs}") in variables:
            used.add(name)
            heads[ours] = variables[name]
    for name, tensor in variables.items():
        if scope == "model" and (match := _TF_TASK.fullmatch(name)):
            used.add(name)
            heads["cls_head.3." + ("weight" if match[2] == "kernel" else "bias")] = tensor
    if "detection_head.logit.weight" in heads:
        heads["detection_head.logit.weight"] = heads["detection_head.logit.weight"][:, None]  # (D,) there, (D, 1) here
    check_shapes(core, config)
    return Parts(config, core, heads)


def _generator_config(variables: dict[str, Tensor], config: ModelConfig) -> ModelConfig:
    """ELECTRA's generator has the blocks of the model and a width of its own, which its variables tell."""
    query = variables.get("generator/encoder/layer_0/rel_attn/q/kernel")
    inner = variables.get("generator/encoder/layer_0/ff/layer_1/kernel")
    if query is None or inner is None:
        raise InputError("the TensorFlow checkpoint has a generator without its first layer; it is incomplete.")
    d_model, n_head, d_head = query.shape
    generator = dataclasses.replace(config, d_model=d_model, n_head=n_head, d_head=d_head, d_inner=inner.shape[1])
    return _with_found_decoder(variables, generator, "generator")


def to_tf(parts: Parts, task: str = "classification_task") -> dict[str, Tensor]:
    """The variables that the TensorFlow code would have saved, without optimizer slots. `task` names a finetuned
    head's scope.
    """
    variables: dict[str, Tensor] = {}
    for scope, part in (("model", parts), ("generator", parts.generator)):
        if part is None:
            continue
        names = tf_names(part.config, scope)
        variables |= {names[name]: tensor for name, tensor in part.core.items()}
        for name, tensor in part.heads.items():
            if name not in TF_HEADS:
                raise InputError(f"the TensorFlow code has no {name.split('.')[0]}, so {name} cannot be written.")
            if name == "detection_head.logit.weight":
                tensor = tensor[:, 0]
            variables[f"{scope}/{TF_HEADS[name]}".replace("*", task)] = tensor
    return variables


# ---- transformers' Funnel


def hf_names(config: ModelConfig) -> dict[str, str]:
    """FunnelTFM's name -> that of transformers' FunnelModel."""
    layers = [f"encoder.blocks.{block}.{i}" for block, (n, _) in enumerate(config.blocks) for i in range(n)]
    layers += [f"decoder.layers.{i}" for i in range(config.decoder[0])]
    names = {name: theirs for name, (_, theirs) in INPUT.items()}
    for number, prefix in enumerate(layers):
        names |= {f"attn_layers.{number}.{n}": f"{prefix}.attention.{theirs}" for n, (_, theirs) in ATTENTION.items()}
        names |= {f"pffn_layers.{number}.{n}": f"{prefix}.ffn.{theirs}" for n, (_, theirs) in FFN.items()}
    return names


# Dense weights are (in, out) here and (out, in) there; heads are flat there.
def _to_linear(name: str, tensor: Tensor) -> Tensor:
    if name.endswith(("q_head.weight", "k_head.weight", "v_head.weight")):
        return tensor.flatten(1).t()
    if name.endswith("post_proj.weight"):
        return tensor.flatten(0, 1).t()
    if name.endswith(("k_head.bias", "v_head.bias")):
        return tensor.flatten()
    return tensor.t() if _is_matrix(name) else tensor


def _from_linear(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    heads = (config.n_head, config.d_head)
    if name.endswith(("q_head.weight", "k_head.weight", "v_head.weight")):
        return tensor.t().unflatten(1, heads)
    if name.endswith("post_proj.weight"):
        return tensor.t().unflatten(0, heads)
    if name.endswith(("k_head.bias", "v_head.bias")):
        return tensor.unflatten(0, heads)
    return tensor.t() if _is_matrix(name) else tensor


def _taken(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    try:
        return _from_linear(name, tensor, config).contiguous()
    except (RuntimeError, IndexError) as error:  # too many dimensions, too few, or not of n_head x d_head
        raise InputError(
            f"the checkpoint's tensor for {name} has the shape {tuple(tensor.shape)}, which does not fit its config "
            f"(n_head {config.n_head}, d_head {config.d_head})."
        ) from error


def _is_matrix(name: str) -> bool:
    return name.endswith((".pffn.0.weight", ".pffn.3.weight", ".dense.weight", ".logit.weight")) or bool(
        re.fullmatch(r"cls_head\.\d\.weight", name)
    )


HF_ACTIVATIONS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "relu": "relu"}
HF_ATTENTION = {"relative_shift": "rel_shift", "factorized": "factorized"}


def _counterpart(name: Any, key: str, table: dict[str, str]) -> str:
    if not isinstance(name, str) or name not in table:
        raise InputError(f"{key} {brief(repr(name))} has no counterpart here; the known ones are {', '.join(table)}.")
    return table[name]


def config_from_hf(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a config.json of transformers' Funnel (model_type "funnel")."""
    if hf.get("model_type") != "funnel":
        raise InputError(
            f"expected a config of transformers' Funnel (model_type 'funnel'), got {brief(repr(hf.get('model_type')))}."
        )
    activation = _counterpart(hf.get("hidden_act", "gelu_new"), "hidden_act", HF_ACTIVATIONS)
    attn_type = _counterpart(hf.get("attention_type", "relative_shift"), "attention_type", HF_ATTENTION)
    sizes = hf.get("block_sizes", [4, 4, 4])
    repeats = hf.get("block_repeats") or ([1] * len(sizes) if isinstance(sizes, list) else [])
    for key, counts in (("block_sizes", sizes), ("block_repeats", repeats)):
        if not isinstance(counts, list) or not all(type(n) is int and n > 0 for n in counts):
            raise InputError(f"{key} must be whole numbers above 0, as in [4, 4, 4]; got {brief(repr(counts))}.")
    if len(sizes) != len(repeats):
        raise InputError(f"block_sizes and block_repeats must be of one length; got {len(sizes)} and {len(repeats)}.")
    blocks = [f"{size}x{repeat}" if repeat > 1 else str(size) for size, repeat in zip(sizes, repeats, strict=True)]
    d_model = hf.get("d_model", 768)
    if not isinstance(labels := hf.get("id2label") or {}, dict):
        raise InputError(f"id2label must name classes by their numbers; got {brief(repr(labels))}.")
    return ModelConfig(
        vocab_size=hf.get("vocab_size", 30522),
        d_embed=d_model,
        d_model=d_model,
        n_head=hf.get("n_head", 12),
        d_head=hf.get("d_head", 64),
        d_inner=hf.get("d_inner", 3072),
        dropout=hf.get("hidden_dropout", 0.1),
        dropatt=hf.get("attention_dropout", 0.1),
        dropact=hf.get("activation_dropout", 0.0),
        block_size="_".join(blocks),
        decoder_size=hf.get("num_decoder_layers", 2),
        pooling_type=hf.get("pooling_type", "mean"),
        pool_q_only=hf.get("pool_q_only", True),
        separate_cls=hf.get("separate_cls", True),
        truncate_seq=hf.get("truncate_seq", True),
        attn_type=attn_type,  # type: ignore[arg-type]
        ff_activation=activation,  # type: ignore[arg-type]
        num_class=len(labels) if labels else 2,
    )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The config of transformers' Funnel. Raises InputError for what it cannot express."""
    refused = {
        "d_embed != d_model": config.d_embed != config.d_model,
        f"pooling_size {config.pooling_size}": config.pooling_size != 2,
        f"pooling_type {config.pooling_type}": config.pooling_type not in ("mean", "max"),
        f"decoder repeats ({config.decoder_size})": config.decoder[1] > 1,
        f"func_mask {config.func_mask}": config.func_mask == "always" and not config.separate_cls,
    }
    if bad := [what for what, is_so in refused.items() if is_so]:
        raise InputError(f"transformers' Funnel cannot express {', '.join(bad)}; convert to funneltfm instead.")
    return {
        "model_type": "funnel",
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "n_head": config.n_head,
        "d_head": config.d_head,
        "d_inner": config.d_inner,
        "hidden_dropout": config.dropout,
        "attention_dropout": config.dropatt,
        "activation_dropout": config.dropact,
        "block_sizes": [n for n, _ in config.blocks],
        "block_repeats": [r for _, r in config.blocks],
        "num_decoder_layers": config.decoder[0],
        "pooling_type": config.pooling_type,
        "pool_q_only": config.pool_q_only,
        "separate_cls": config.separate_cls,
        "truncate_seq": config.truncate_seq,
        "attention_type": "relative_shift" if config.attn_type == "rel_shift" else "factorized",
        "hidden_act": "gelu_new" if config.ff_activation == "gelu" else config.ff_activation,
        "layer_norm_eps": 1e-9,
    }


def from_hf(state: dict[str, Tensor], hf_config: dict[str, Any]) -> Parts:
    """The parts of a checkpoint of transformers' FunnelModel, FunnelBaseModel or FunnelForX."""
    config = config_from_hf(hf_config)
    state = {name.removeprefix("funnel."): tensor for name, tensor in state.items()}
    if not any(name.startswith("decoder.") for name in state):
        config = dataclasses.replace(config, decoder_size="0")
    tied = {"lm_head.weight"}  # the embedding table once more
    used = tied & set(state)
    core = {}
    for ours, theirs in hf_names(config).items():
        if theirs not in state:
            raise InputError(f"the checkpoint lacks {theirs}, which its config asks for. Is config.json its own?")
        used.add(theirs)
        core[ours] = _taken(ours, state[theirs], config)
    heads = {}
    for ours, theirs in HF_HEADS.items():
        if theirs in state:
            used.add(theirs)
            heads[ours] = _taken(ours, state[theirs], config)
    if unknown := sorted(set(state) - used):
        raise InputError(
            f"the checkpoint holds {len(unknown)} tensors that belong to no known part (first {unknown[0]})."
        )
    check_shapes(core, config)
    return Parts(config, core, heads)


def to_hf(parts: Parts) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """(config.json, tensors, class name) of transformers' Funnel. Raises InputError for what it cannot express."""
    config = config_to_hf(parts.config)
    names = hf_names(parts.config)
    classes = sorted({name.split(".")[0] for name in parts.heads})
    if len(classes) > 1:
        raise InputError(f"a model of transformers has one head, this checkpoint has {', '.join(classes)}.")
    decoder = parts.config.decoder[0] > 0
    architecture = HF_CLASSES[classes[0]] if classes and classes[0] in HF_CLASSES else None
    if classes and architecture is None:
        raise InputError(f"transformers' Funnel has no {classes[0]}; convert to funneltfm, which has.")
    architecture = architecture or ("FunnelModel" if decoder else "FunnelBaseModel")
    prefix = "" if architecture in ("FunnelModel", "FunnelBaseModel") else "funnel."
    state = {f"{prefix}{names[n]}": _to_linear(n, tensor).contiguous() for n, tensor in parts.core.items()}
    for name, tensor in parts.heads.items():
        if name not in HF_HEADS:
            raise InputError(f"transformers' Funnel has no {name}; convert to funneltfm, which has.")
        state[HF_HEADS[name]] = _to_linear(name, tensor).contiguous()
    if architecture == "FunnelForMaskedLM":
        state["lm_head.weight"] = state["funnel.embeddings.word_embeddings.weight"]
    config["architectures"] = [architecture]
    if (bias := parts.heads.get("cls_head.3.bias", parts.heads.get("token_head.dense.bias"))) is not None:
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(len(bias))}
        config["label2id"] = {label: int(i) for i, label in config["id2label"].items()}
    return config, state, architecture


HF_CLASSES = {
    "lm_head": "FunnelForMaskedLM",
    "detection_head": "FunnelForPreTraining",
    "cls_head": "FunnelForSequenceClassification",
    "token_head": "FunnelForTokenClassification",
    "qa_head": "FunnelForQuestionAnswering",
}


# ---- shapes


def check_shapes(core: dict[str, Tensor], config: ModelConfig) -> None:
    """Raise InputError where a tensor is not of the shape that the config says."""
    for name, shape in core_shapes(config).items():
        if core[name].shape != shape:
            raise InputError(
                f"{name} has shape {tuple(core[name].shape)}, but the config says {tuple(shape)}. "
                f"Give the config that belongs to the checkpoint."
            )
