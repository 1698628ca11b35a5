"""LSG models of `transformers`' own: a table of model types, and the few methods in which theirs differ from ours.

An LSG model is the base model, with its names, whose embedding puts global tokens in front, whose layers attend with
`lsg_attention_forward`, and whose encoder takes the global tokens off again.
"""

import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface
from transformers.models.auto import modeling_auto
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from funneltfm.errors import InputError
from funneltfm.lsg.attention import lsg_attention_forward, lsg_mask
from funneltfm.lsg.layer import LAYERS, FusedLayer, Mixin, fuse
from funneltfm.lsg.settings import LSG_KEYS, NUM_GLOBAL_ROWS, LSGSettings

ATTENTION = "lsg"  # our name in transformers' tables of attention and mask functions
AttentionInterface.register(ATTENTION, lsg_attention_forward)
AttentionMaskInterface.register(ATTENTION, lsg_mask)


@dataclass(frozen=True)
class ModelType:
    """What we have to know of one of `transformers`' model types."""

    prefix: str
    """Of its classes' names."""
    embeddings: str = "Embeddings"
    """Its embedding class, without the prefix; of encoder-decoders, the class of positions."""
    encoder: str = "Encoder"
    """Its stack of layers, without the prefix."""
    is_encoder_decoder: bool = False
    position_offset: int = 0
    """Rows of the position table in front of the first position's."""
    counts_padding: bool = False
    """Whether those rows end with the padding token's, and config.max_position_embeddings counts them."""
    token_types: bool = False
    """Whether the original adds a token type to the global tokens."""


MODEL_TYPES = {
    "albert": ModelType("Albert", encoder="Transformer", token_types=True),
    "bart": ModelType("Bart", "LearnedPositionalEmbedding", is_encoder_decoder=True, position_offset=2),
    "bert": ModelType("Bert", token_types=True),
    "camembert": ModelType("Camembert", counts_padding=True),
    "distilbert": ModelType("DistilBert", "/Embeddings", "/Transformer"),
    "electra": ModelType("Electra", token_types=True),
    "mbart": ModelType("MBart", "LearnedPositionalEmbedding", is_encoder_decoder=True, position_offset=2),
    "pegasus": ModelType("Pegasus", "SinusoidalPositionalEmbedding", is_encoder_decoder=True),
    "roberta": ModelType("Roberta", counts_padding=True),
    "xlm-roberta": ModelType("XLMRoberta", counts_padding=True),
}
ALIASES = {"barthez": "mbart"}  # transformers has no model type of that name; the checkpoints say mbart

AUTO_CLASSES: dict[str, Any] = {
    "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
    "AutoModelForPreTraining": modeling_auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES,
    "AutoModelForMaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForSeq2SeqLM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForQuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "AutoModelForMultipleChoice": modeling_auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
    "AutoModelForNextSentencePrediction": modeling_auto.MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES,
}
REMOTE_MODULE = "modeling_lsg"


def base_class(model_type: str, name: str) -> Any:
    """A class in transformers' module of a model type. `name` is without the prefix, unless a slash leads it."""
    name = name.removeprefix("/") if name.startswith("/") else MODEL_TYPES[model_type].prefix + name
    module = model_type.replace("-", "_")
    kind = "configuration" if name.endswith("Config") else "modeling"
    return getattr(importlib.import_module(f"transformers.models.{module}.{kind}_{module}"), name)


def _here(name: str, bases: tuple[type, ...], **attributes: Any) -> type:
    """A class that can be found again under its name in this module, as pickling and saving want."""
    made = type(name, bases, {"__module__": __name__, **attributes})
    setattr(sys.modules[__name__], name, made)
    return made


# ---- configs


class LSGConfig(Mixin):
    """What an LSG config has beside the base model's. The encoder's attention is LSG's, whatever else is asked for."""

    lsg_type: str
    """The base model's type."""
    sparsity_type: Any
    _attn_implementation_internal: str | None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.sparsity_type = self.sparsity_type or "none"
        LSGSettings.of(self)
        register_models(self.lsg_type)

    @property
    def lsg_causal(self) -> bool:
        """Whether the LSG attention is a decoder's."""
        return bool(getattr(self, "is_decoder", False))

    @property
    def _attn_implementation(self) -> str | None:
        return ATTENTION

    @_attn_implementation.setter
    def _attn_implementation(self, value: str | None) -> None:
        if value not in (None, ATTENTION, "sdpa"):
            raise InputError(f"an LSG model's attention cannot be {value!r}; leave attn_implementation away.")
        self._attn_implementation_internal = ATTENTION


class LSGSeq2SeqConfig(LSGConfig):
    """Of encoder-decoders: the decoder's attention is what was asked for."""

    lsg_causal = False

    @property
    def _attn_implementation(self) -> str | None:
        return self._attn_implementation_internal

    @_attn_implementation.setter
    def _attn_implementation(self, value: str | None) -> None:
        self._attn_implementation_internal = value


class LSGEncoderView(LSGConfig):
    """The same config, key for key, as the encoder of an encoder-decoder sees it."""

    @classmethod
    def of(cls, config: Any) -> Any:
        view = object.__new__(getattr(sys.modules[__name__], f"{type(config).__name__}EncoderView"))
        object.__setattr__(view, "__dict__", config.__dict__)
        return view

    @property
    def _attn_implementation(self) -> str | None:
        return ATTENTION

    @_attn_implementation.setter
    def _attn_implementation(self, value: str | None) -> None:
        pass  # what is asked for is for the decoder


@cache
def config_class(model_type: str) -> Any:
    """The config class of the LSG form of a model type: LSGBertConfig, of model type lsg-bert."""
    base = base_class(model_type, "Config")
    seq2seq = MODEL_TYPES[model_type].is_encoder_decoder
    fields = {name: getattr(LSGSettings, name) for name in LSG_KEYS}
    fields["base_model_prefix"] = "lsg"
    if not seq2seq:
        del fields["pass_global_tokens_to_decoder"]
    annotations = dict.fromkeys(fields, Any)
    named = {"model_type": f"lsg-{model_type}", "lsg_type": model_type}
    mixin = LSGSeq2SeqConfig if seq2seq else LSGConfig
    made = _here(f"LSG{base.__name__}", (mixin, base), __annotations__=annotations, **fields, **named)
    if seq2seq:
        _here(f"LSG{base.__name__}EncoderView", (LSGEncoderView, made))
    return made


def lsg_config(config: Any, **settings: Any) -> Any:
    """The LSG form of a base model's config, with the settings given."""
    values = config.to_dict()
    for name in ("model_type", "auto_map", "transformers_version", "base_model_prefix"):
        values.pop(name, None)
    made = config_class(config.model_type).from_dict(values | settings)
    made.name_or_path = config.name_or_path
    return made


# ---- modules


class WithGlobals(Mixin):
    """An embedding that puts the global tokens in front: normalised and dropped out as the tokens are."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        tokens = super().forward(*args, **kwargs)
        settings = LSGSettings.of(self.lsg_config)
        number = settings.globals_in(tokens.shape[1])
        table = self.global_embeddings.weight
        if not number:
            return _with_gradient(tokens, table)
        ahead = self.dropout(self.LayerNorm(table[:number]).expand(tokens.shape[0], -1, -1))
        return torch.cat([ahead.to(tokens.dtype), tokens], 1)


class WithoutGlobals(Mixin):
    """A stack of layers that takes the global tokens off what it returns."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.last_hidden_state = take_off(out.last_hidden_state, LSGSettings.of(self.lsg_config))
        return out


class BehindGlobals(Mixin):
    """Positions of an encoder-decoder's encoder: none for the global tokens, then 0, 1, 2, ..."""

    def forward(self, shape: Any, *args: Any, **kwargs: Any) -> Tensor:
        is_tensor = isinstance(shape, Tensor)
        length = shape.shape[1] if is_tensor else shape[1]
        number = LSGSettings.of(self.lsg_config).globals_in(length)
        shape = shape[:, number:] if is_tensor else torch.Size((shape[0], length - number))
        positions = super().forward(shape, *args, **kwargs)
        return F.pad(positions, (0, 0, number, 0))


def take_off(hidden: Tensor, settings: LSGSettings, pool: bool = True) -> Tensor:
    """(B, G + T, D) -> (B, T, D). The first token's row becomes the first global token's, if the settings say so."""
    number = settings.globals_in(hidden.shape[1])
    if number and pool and settings.pools:
        return torch.cat([hidden[:, :1], hidden[:, number + 1 :]], 1)
    return hidden[:, number:]


def _with_gradient(hidden: Tensor, table: Tensor) -> Tensor:
    """Add nothing of a table: in distributed training, each weight must have a gradient, if it is zero."""
    if torch.is_grad_enabled() and table.requires_grad:
        hidden = hidden + (table.sum() * 0.0).to(hidden.dtype)
    return hidden


def _refuse(config: Any, kwargs: dict[str, Any]) -> None:
    if kwargs.get("output_attentions") or (kwargs.get("output_attentions") is None and config.output_attentions):
        raise InputError(
            "LSG attention has no weights to show: they are never all there at a time, and a key can stand for several "
            "tokens. Leave output_attentions away, or use the base model."
        )


class LSGBaseModel(Mixin):
    """A base model (BertModel, ...) in LSG form: hidden states without the global tokens, clear refusals."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        config = self.config
        _refuse(config, kwargs)
        if config.lsg_causal:
            if kwargs.get("past_key_values") is not None or kwargs.get("use_cache"):
                raise InputError("a causal LSG model has no cache of past keys: generate with use_cache=False.")
            kwargs["use_cache"] = False
        return_dict = kwargs.pop("return_dict", None)
        out = super().forward(*args, return_dict=True, **kwargs)
        if out.get("hidden_states") is not None:
            settings = LSGSettings.of(config)
            *inner, last = out.hidden_states
            out.hidden_states = (*(take_off(hidden, settings, pool=False) for hidden in inner), last)
        return_dict = config.return_dict if return_dict is None else return_dict
        return out if return_dict else out.to_tuple()


class LSGSeq2SeqEncoder(Mixin):
    """An encoder-decoder's encoder in LSG form."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        settings = LSGSettings.of(self.config)
        _refuse(self.config, kwargs)
        if input_ids is not None and inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids) * getattr(self, "embed_scale", 1.0)
            input_ids = None
        table = self.global_embeddings.weight
        if inputs_embeds is not None and input_ids is None:
            if settings.exact_short and inputs_embeds.shape[1] <= 2 * settings.block_size:
                inputs_embeds = _with_gradient(inputs_embeds, table)
            else:
                ahead = table[: settings.num_global_tokens].expand(inputs_embeds.shape[0], -1, -1)
                inputs_embeds = torch.cat([ahead.to(inputs_embeds.dtype), inputs_embeds], 1)
        return_dict = kwargs.pop("return_dict", None)
        out = super().forward(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, return_dict=True, **kwargs
        )
        if not settings.pass_global_tokens_to_decoder:
            out.last_hidden_state = take_off(out.last_hidden_state, settings)
            if out.get("hidden_states") is not None:
                *inner, _ = out.hidden_states
                inner = [take_off(hidden, settings, pool=False) for hidden in inner]
                out.hidden_states = (*inner, out.last_hidden_state)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return out if return_dict else out.to_tuple()


class LSGSeq2SeqDecoder(Mixin):
    """An encoder-decoder's decoder: where it sees the encoder's global tokens, the mask says so."""

    def forward(
        self, *args: Any, encoder_hidden_states: Any = None, encoder_attention_mask: Any = None, **kwargs: Any
    ) -> Any:
        if encoder_hidden_states is not None and encoder_attention_mask is not None:
            ahead = encoder_hidden_states.shape[1] - encoder_attention_mask.shape[-1]
            if encoder_attention_mask.ndim == 2 and ahead == LSGSettings.of(self.config).num_global_tokens:
                encoder_attention_mask = F.pad(encoder_attention_mask, (ahead, 0), value=1)
        return super().forward(
            *args, encoder_hidden_states=encoder_hidden_states, encoder_attention_mask=encoder_attention_mask, **kwargs
        )


# ---- models


class LSGModel(Mixin):
    """What all LSG models (LSGBertForMaskedLM, ...) have in common. Made by `model_class`."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        if getattr(config, "add_cross_attention", False) and not config.is_encoder_decoder:
            raise InputError("an LSG encoder cannot have cross-attention; use the base model as a decoder.")
        super().__init__(config, *args, **kwargs)
        _install(self)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As the base model's; the folder also gets the code that loads it where this package is not installed."""
        config = self.config
        config.auto_map = auto_map(config.lsg_type)
        super().save_pretrained(save_directory, *args, **kwargs)
        if Path(save_directory).is_dir():
            (Path(save_directory) / f"{REMOTE_MODULE}.py").write_text(_source(), encoding="utf-8")


class LSGGenerates(Mixin):
    """A causal LSG model keeps no past keys."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        if self.config.lsg_causal:
            kwargs.setdefault("use_cache", False)
        return super().generate(*args, **kwargs)


def _source() -> str:
    """The source of the module `modeling_lsg`, which holds all of this for use without the package. We may be it."""
    if __name__ == "funneltfm.lsg.models":
        return importlib.import_module("funneltfm.lsg.remote").remote_code()
    return Path(__file__).read_text(encoding="utf-8")


def auto_map(model_type: str) -> dict[str, str]:
    """Where the Auto classes find the LSG classes in the module that is saved with a model."""
    config = f"LSG{base_class(model_type, 'Config').__name__}"
    models = {auto: f"LSG{names[model_type]}" for auto, names in AUTO_CLASSES.items() if _has(names, model_type)}
    return {name: f"{REMOTE_MODULE}.{value}" for name, value in ({"AutoConfig": config} | models).items()}


def _has(names: dict[str, Any], model_type: str) -> bool:
    return isinstance(names.get(model_type), str)


def _variant(mixin: type, base: type) -> type:
    """A class of transformers' with a mixin of ours in front of it."""
    name = f"LSG{base.__name__}"
    return getattr(sys.modules[__name__], name, None) or _here(name, (mixin, base))


@cache
def model_class(model_type: str, name: str) -> Any:
    """The LSG form of a model class of transformers: ("bert", "BertForMaskedLM") -> LSGBertForMaskedLM."""
    base = base_class(model_type, f"/{name}")
    row = MODEL_TYPES[model_type]
    is_base = name == f"{row.prefix}Model" and not row.is_encoder_decoder
    mixins = (LSGModel, *[LSGBaseModel] * is_base, *[LSGGenerates] * issubclass(base, GenerationMixin))
    own = {"forward": _signed(LSGBaseModel.forward, base)} if is_base else {}
    return _here(f"LSG{name}", (*mixins, base), config_class=config_class(model_type), **own)


def _signed(forward: Callable[..., Any], base: type) -> Callable[..., Any]:
    """`forward` with the signature of a base model's, by which callers see what it takes (token_type_ids, say)."""

    def signed(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    signed.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
    return signed


def _install(model: Any) -> None:
    """Turn the modules of a new model into their LSG forms."""
    config = model.config
    model_type = config.lsg_type
    row = MODEL_TYPES[model_type]
    embeddings, encoder = base_class(model_type, row.embeddings), base_class(model_type, row.encoder)
    stacks = [module for module in model.modules() if type(module) is encoder]
    names = LAYERS[model_type]
    layer = base_class(model_type, names.layer)
    for module in [module for stack in stacks for module in stack.modules() if type(module) is layer]:
        _turn(module, _variant(FusedLayer, layer))
        fuse(module, names)
    if row.is_encoder_decoder:
        decoder = base_class(model_type, "Decoder")
        for module in list(model.modules()):
            if type(module) is decoder:
                _turn(module, _variant(LSGSeq2SeqDecoder, decoder))
        for stack in stacks:
            _turn(stack, _variant(LSGSeq2SeqEncoder, encoder))
            _turn(stack.embed_positions, _variant(BehindGlobals, embeddings))
            _add_table(model, stack, config.d_model)
            view = LSGEncoderView.of(config)
            for module in stack.modules():
                if getattr(module, "config", None) is config:
                    module.config = view
            stack.embed_positions.lsg_config = config
        return
    base_model = base_class(model_type, "Model")
    for module in list(model.modules()):
        if type(module) is base_model:
            _turn(module, model_class(model_type, base_model.__name__))
        elif type(module) is embeddings:
            _turn(module, _variant(WithGlobals, embeddings))
            _add_table(model, module, module.word_embeddings.embedding_dim)
            module.lsg_config = config
    for stack in stacks:
        _turn(stack, _variant(WithoutGlobals, encoder))
        stack.lsg_config = config


def _turn(module: Any, form: type) -> None:
    """Give a module its LSG form. transformers lists by class what it records of models, hidden states for instance."""
    module.__class__ = form
    if isinstance(module, PreTrainedModel):
        _CAN_RECORD_REGISTRY[module] = module._can_record_outputs


def _add_table(model: Any, module: Any, width: int) -> None:
    module.global_embeddings = nn.Embedding(NUM_GLOBAL_ROWS, width)
    with torch.no_grad():
        model._init_weights(module.global_embeddings)


# ---- the Auto classes


@cache
def register_models(model_type: str) -> None:
    """Make the Auto classes know the models of one type; configs do so when the first of their type is made."""
    for auto, names in AUTO_CLASSES.items():
        if _has(names, model_type):
            getattr(modeling_auto, auto).register(
                config_class(model_type), model_class(model_type, names[model_type]), exist_ok=True
            )


def __getattr__(name: str) -> type:
    """LSG classes by name, made when they are first asked for."""
    if name.startswith("LSG"):
        for model_type in MODEL_TYPES:
            if name == f"LSG{base_class(model_type, 'Config').__name__}":
                return config_class(model_type)
            if any(_has(names, model_type) and name == f"LSG{names[model_type]}" for names in AUTO_CLASSES.values()):
                return model_class(model_type, name.removeprefix("LSG"))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ == "funneltfm.lsg.models":  # not as a file in a model's folder
    importlib.import_module("funneltfm.lsg.auto")
