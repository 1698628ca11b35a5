"""One encoder, and the heads of several `transformers` models on it."""

import contextlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize


def backbone_of(model: nn.Module) -> nn.Module:
    """The encoder of a `transformers` model; a model that is one is its own."""
    return getattr(model, getattr(model, "base_model_prefix", ""), model)


def n_token_types(model: nn.Module) -> int:
    """How many types of tokens (token_type_ids) a model's encoder tells apart; 0: it takes none."""
    backbone = backbone_of(model)
    if "token_type_ids" not in inspect.signature(backbone.forward).parameters:
        return 0
    # What has no table of types, such as Funnel, compares them.
    return getattr(backbone.config, "type_vocab_size", sys.maxsize)


@contextlib.contextmanager
def replayed(model: nn.Module, hidden: Any) -> Iterator[None]:
    """Within, the model's encoder does not compute: it says `hidden`, and the model's head works on that.

    So one pass through the encoder serves several heads, and a head may be shown some of the tokens only; no head has
    to be taken out of its model for it.
    """
    backbone = backbone_of(model)
    backbone.forward = lambda *args, **kwargs: hidden
    try:
        yield
    finally:
        del backbone.forward


def selected(hidden: Any, chosen: Tensor) -> Any:
    """The output of an encoder as if it had seen the chosen tokens alone, in one row: (1, n, D).

    chosen: (texts, T) bool.
    """
    return type(hidden)(last_hidden_state=hidden.last_hidden_state[chosen][None])


def save_pretrained(model: nn.Module, folder: Path) -> None:
    """Write a folder that the Auto classes load. What is parametrized in training is written as what it stands for."""
    state = None
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            state = model.state_dict() if state is None else state
            for tensor in module.parametrizations:
                inner = f"{name}.parametrizations.{tensor}."
                state = {key: value for key, value in state.items() if not key.startswith(inner)}
                state[f"{name}.{tensor}"] = getattr(module, tensor).detach()
    model.save_pretrained(folder, **({} if state is None else {"state_dict": state}))  # type: ignore[operator]


class Heads(nn.Module):
    """Models that share one encoder, by the name of their task. The largest encoder of them serves all: what it has
    more than others (a pooler, a decoder) some head reads. `beside` holds what tasks have beside their models.
    """

    def __init__(self, models: dict[str, nn.Module]):
        super().__init__()
        backbones = {name: backbone_of(model) for name, model in models.items()}
        largest = backbones[max(backbones, key=lambda name: sum(p.numel() for p in backbones[name].parameters()))]
        for name, model in models.items():
            if model is backbones[name]:
                models[name] = largest
            elif backbones[name] is not largest:
                setattr(model, model.base_model_prefix, largest)  # type: ignore[arg-type]
                model.tie_weights()  # type: ignore[operator]
        self.models = nn.ModuleDict(models)
        self.beside = nn.ModuleDict()

    @property
    def backbone(self) -> nn.Module:
        return backbone_of(next(iter(self.models.values())))

    def of_task(self, name: str) -> tuple[nn.Module, nn.Module | None]:
        """A task's model, and what it has beside it."""
        return self.models[name], dict(self.beside.items()).get(name)

    def forward(self, inputs: dict[str, Tensor]) -> Any:
        """The encoder's output for input_ids, attention_mask and token_type_ids, each (texts, T)."""
        return self.backbone(**inputs)
