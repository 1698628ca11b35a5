"""A layer of `transformers`' in evaluation on a CPU: its products by oneDNN, each with what follows it in one pass.

Where attention costs as little as LSG's, most of the time goes to linear layers. oneDNN's products are as exact as
those that torch takes by default and on many CPUs faster, and it applies the activation, or adds the residual, to rows
that the cache still holds.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from transformers import activations

from funneltfm.lsg.attention import lsg_attention_forward
from funneltfm.lsg.settings import LSGSettings

Mixin: Any = object  # our mixins stand in front of a class of transformers', whose methods and attributes they use

SMALLEST = 256  # rows, and width, from which on oneDNN gains more than its calls cost
PIECE = 1024  # rows of the feed-forward layer at a time, about: what is between its two products is used at once
RECORDS = "transformers.utils.output_capturing"  # its hooks on attention record weights, which LSG refuses to show


class LayerNames(NamedTuple):
    """What a model type calls its layers, and in a layer the modules."""

    layer: str
    """The class, without the prefix."""
    attention: str
    query: str
    key: str
    value: str
    output: str
    attention_norm: str
    up: str
    activation: str
    down: str
    norm: str
    norm_first: bool = False
    """Whether the input of each half is normalised, not the sum of its input and output."""
    head_size: str = "attention_head_size"
    """An attribute of the attention."""


BERT_LAYER = LayerNames(
    layer="Layer",
    attention="attention.self",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    output="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    up="intermediate.dense",
    activation="intermediate.intermediate_act_fn",
    down="output.dense",
    norm="output.LayerNorm",
)
ALBERT_LAYER = LayerNames(
    layer="Layer",
    attention="attention",
    query="attention.query",
    key="attention.key",
    value="attention.value",
    output="attention.dense",
    attention_norm="attention.LayerNorm",
    up="ffn",
    activation="activation",
    down="ffn_output",
    norm="full_layer_layer_norm",
)
DISTILBERT_LAYER = LayerNames(
    layer="/TransformerBlock",
    attention="attention",
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    output="attention.out_lin",
    attention_norm="sa_layer_norm",
    up="ffn.lin1",
    activation="ffn.activation",
    down="ffn.lin2",
    norm="output_layer_norm",
)
BART_LAYER = LayerNames(
    layer="EncoderLayer",
    attention="self_attn",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.out_proj",
    attention_norm="self_attn_layer_norm",
    up="fc1",
    activation="activation_fn",
    down="fc2",
    norm="final_layer_norm",
    head_size="head_dim",
)
MBART_LAYER = BART_LAYER._replace(norm_first=True)

LAYERS = {
    **dict.fromkeys(("bert", "camembert", "electra", "roberta", "xlm-roberta"), BERT_LAYER),
    "albert": ALBERT_LAYER,
    "distilbert": DISTILBERT_LAYER,
    "bart": BART_LAYER,
    **dict.fromkeys(("mbart", "pegasus"), MBART_LAYER),
}

# Activations that oneDNN knows: its name and algorithm.
EPILOGUES: dict[type, tuple[str, str]] = {
    activations.GELUActivation: ("gelu", "none"),
    activations.NewGELUActivation: ("gelu", "tanh"),
    activations.GELUTanh: ("gelu", "tanh"),
    nn.ReLU: ("relu", ""),
}


class FusedLayer(Mixin):
    """A layer that takes this way where nobody can tell but by the clock, else its own. Made by `fuse`."""

    lsg_names: LayerNames
    lsg_types: list[type]
    """Of its modules, as transformers made them."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        others = (*args, kwargs.get("encoder_hidden_states"), kwargs.get("past_key_values"))
        if any(other is not None for other in others) or not _may_fuse(self, hidden_states):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        _keep_some_memory()
        hidden, names, modules = hidden_states, self.lsg_names, dict(self.named_modules())
        attention, norm = modules[names.attention], modules[names.attention_norm]
        first = norm(hidden) if names.norm_first else hidden
        heads = (-1, getattr(attention, names.head_size))
        query, key, value = (
            _product(first, modules[name]).unflatten(-1, heads).transpose(1, 2)
            for name in (names.query, names.key, names.value)
        )
        kwargs["scaling"] = attention.scaling
        attended, _ = lsg_attention_forward(attention, query, key, value, attention_mask, **kwargs)
        del first, query, key, value
        hidden = _product(attended.flatten(2), modules[names.output], residual=hidden)
        del attended
        if not names.norm_first:
            hidden = norm(hidden)
        rows = hidden.flatten(0, 1)
        for piece in rows.tensor_split(max(1, round(len(rows) / PIECE))):
            piece.copy_(self.lsg_feed_forward(piece, modules))  # nobody else has them
        return rows.view_as(hidden)

    def lsg_feed_forward(self, rows: Tensor, modules: dict[str, Any]) -> Tensor:
        """The second half of the layer, for rows (R, D)."""
        names = self.lsg_names
        norm = modules[names.norm]
        inner = _product(norm(rows) if names.norm_first else rows, modules[names.up], modules[names.activation])
        out = _product(inner, modules[names.down], residual=rows)
        return out if names.norm_first else norm(out)


@cache
def _keep_some_memory() -> None:
    """Let glibc keep 64 MB of freed memory for the next tensors, as it does by itself once a block of almost 32 MB was
    freed. Until then it keeps twice the largest, and every layer waits for new pages.
    """
    torch.empty(2**25 - 2**17, dtype=torch.uint8)


def fuse(layer: Any, names: LayerNames) -> None:
    """Say what the modules of a layer, whose class is a `FusedLayer`, are called."""
    layer.lsg_names, layer.lsg_types = names, _types(layer)


def _types(layer: Any) -> list[type]:
    return [type(module) for module in layer.modules()][1:]


def _may_fuse(layer: Any, hidden: Tensor) -> bool:
    """Whether there is nothing to learn or to trace, LSG attention (short texts are to be the base model's bit for bit)
    and enough to do, and no module that would be passed over was exchanged or is listened to.
    """
    if torch.is_grad_enabled() or layer.training or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if type(hidden) is not Tensor or hidden.dtype != torch.float32 or hidden.device.type != "cpu":
        return False
    rows, width = hidden.shape[:-1].numel(), hidden.shape[-1]
    if rows < SMALLEST or width < SMALLEST or torch.is_autocast_enabled("cpu") or is_in_torch_dispatch_mode():
        return False
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):  # elsewhere oneDNN's are not known to be fast
        return False
    attention = layer.get_submodule(layer.lsg_names.attention)
    if not LSGSettings.of(attention.config).globals_in(hidden.shape[1]) or _types(layer) != layer.lsg_types:
        return False
    if _global_forward_hooks or _global_forward_pre_hooks:
        return False
    if any(p.dtype != torch.float32 or type(p) is not nn.Parameter for p in layer.parameters()):
        return False
    return not any(module.training or _is_watched(module) for module in layer.modules() if module is not layer)


def _is_watched(module: nn.Module) -> bool:
    """Whether something is to happen when the module is called, beside its own forward."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return "forward" in vars(module) or any(getattr(hook, "__module__", None) != RECORDS for hook in hooks)


def _product(x: Tensor, linear: Any, activation: Any = None, residual: Tensor | None = None) -> Tensor:
    """linear(x), then the activation, or with the residual added."""
    op = torch.ops.mkldnn._linear_pointwise
    if residual is not None:
        return op.binary(x, residual, linear.weight, linear.bias, "add")
    name, algorithm = EPILOGUES.get(type(activation), ("none", ""))
    out = op(x, linear.weight, linear.bias, name, [], algorithm)
    return activation(out) if activation is not None and name == "none" else out
