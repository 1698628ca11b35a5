"""FunnelTFM as a citizen of `transformers`: config, seven models, Auto classes (together, hence over 400 lines).

The one border where its habits become ours: names (hidden_size -> d_model), the polarity of masks (1 = real there,
1 = pad here), segment ids (0 and 1 there; [CLS] has its own here), and padding. A sentence is moved to the left edge
of its row and padded to its canonical length, so it gets the same result alone, in any batch, padded on either side.

Alphabet: B batch, T tokens as given, L tokens as computed, D d_model, V vocab_size, C classes, K choices.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funneltfm.errors import InputError
from funneltfm.funnel.attention import RelMultiheadAttention
from funneltfm.funnel.config import ModelConfig, canonical_length
from funneltfm.funnel.heads import BeamSpanHead, MaskedLMHead, SummaryHead, TokenDetectionHead, TokenHead, rule_out
from funneltfm.funnel.model import FunnelTFM
from funneltfm.funnel.ops import EmbeddingLookup

try:
    import transformers
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import (
        BaseModelOutputWithPooling,
        MaskedLMOutput,
        ModelOutput,
        MultipleChoiceModelOutput,
        QuestionAnsweringModelOutput,
        SequenceClassifierOutput,
        TokenClassifierOutput,
    )
    from transformers.utils import can_return_tuple
except ImportError as error:
    raise ImportError("funneltfm.funnel.hf needs `transformers` 5: pip install 'funneltfm[hf]'") from error

IGNORED = -100  # the label of a token without one


class FunnelTFMConfig(PreTrainedConfig):
    """Every key of ModelConfig under its own name and with its own default, and what `transformers` adds.

    hidden_size, num_attention_heads, pad_token_id and num_class are other names of d_model, n_head, pad_id and
    num_labels. Values that ModelConfig refuses raise its InputError.
    """

    model_type = "funnel_tfm"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "n_head",
        "pad_token_id": "pad_id",
        "num_class": "num_labels",
    }

    lm_transform: bool = True
    """Dense, activation and LayerNorm before the tied table of the language modelling head."""
    pad_to_canonical: bool = True
    """Compute at the canonical length of the longest sentence; False computes at the shape given, as FunnelTFM does."""
    tie_word_embeddings: bool = True
    """The language modelling head has no table of its own, so this cannot be False there."""
    qa_head: Literal["plain", "beam"] = "plain"
    """Question answering: start and end apart, or the original's head for SQuAD 2.0, the end given the start."""
    start_n_top: int = 5
    """Starts that the beam head keeps; a row of fewer tokens keeps them all."""
    end_n_top: int = 5
    """Ends that the beam head keeps for each of its starts."""

    def __post_init__(self, **kwargs: Any) -> None:
        keys = ModelConfig().to_dict()
        del keys["num_class"]  # num_labels and id2label say it
        super().__post_init__(**(keys | _own_names(kwargs)))
        for name, value in self.net_config().to_dict().items():  # as ModelConfig writes it: decoder_size 2 -> "2"
            setattr(self, name, value)
        if self.qa_head not in ("plain", "beam"):
            raise InputError(f"qa_head must be one of plain, beam; got {self.qa_head!r}.")
        for name in ("start_n_top", "end_n_top"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InputError(f"{name} must be a whole number of at least 1; got {value!r}.")

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the encoder that have parameters."""
        return sum(n_param for n_param, _ in self.net_config().blocks)

    def net_config(self) -> ModelConfig:
        """What defines the FunnelTFM inside."""
        return ModelConfig(**{name: getattr(self, name) for name in ModelConfig.names()})

    @classmethod
    def from_net_config(cls, net_config: ModelConfig, **kwargs: Any) -> "FunnelTFMConfig":
        """The config of a model that holds FunnelTFM(net_config); `kwargs` win over its keys."""
        keys = net_config.to_dict()
        num_class = keys.pop("num_class")
        if not {"num_labels", "num_class", "id2label"} & set(kwargs):
            keys["num_labels"] = num_class
        return cls(**(keys | _own_names(kwargs)))


def _own_names(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keys by our names. Two names of one key must agree."""
    keys: dict[str, Any] = {}
    for key, value in kwargs.items():
        name = FunnelTFMConfig.attribute_map.get(key, key)
        if keys.setdefault(name, value) != value:
            raise InputError(f"{key} is another name of {name}, but they differ: {value!r} and {keys[name]!r}.")
    return keys


# ---- rows in, rows out


class Layout(NamedTuple):
    """Where the sentences of a batch lie: `take` moves them to the left edge, `put_back` to where they came from."""

    source: Tensor
    """(B, L): the column of the input that each column of the computation takes."""
    inside: Tensor
    """(B, L) bool: False where the computation pads."""
    target: Tensor
    """(B, T): the column of the computation that each column of the output takes."""
    kept: Tensor
    """(B, T) bool: False where the output is zero, because its column is padding."""

    @classmethod
    def of(cls, real: Tensor, config: ModelConfig, pad_to_canonical: bool) -> "Layout":
        """real: (B, T) bool. Compute the canonical length of the longest sentence, or every column that was given."""
        T = length = real.size(1)
        columns = torch.arange(T, device=real.device)
        start = real.int().argmax(dim=1, keepdim=True)  # the first real token; a row that is all padding stays
        n = T - real.flip(1).int().argmax(dim=1, keepdim=True) - start
        if pad_to_canonical:
            length = canonical_length(int(n.max()), config)
        else:
            n = torch.full_like(n, T)
        computed = torch.arange(length, device=real.device)
        source, target = (start + computed) % T, (columns - start) % T
        return cls(source, computed < n, target.clamp(max=length - 1), target < n)

    def take(self, x: Tensor, padding: Tensor | int) -> Tensor:
        """(B, T) or (B, T, d_embed) -> (B, L, ...), `padding` where there is no token."""
        source, inside = (t.view(*t.shape, *(1,) * (x.dim() - 2)) for t in (self.source, self.inside))
        return torch.where(inside, x.take_along_dim(source, dim=1), padding)

    def put_back(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, T, D), zeros where there is no token. Shorter, pooled states (B, L', D) stay as they are."""
        if x.size(1) != self.source.size(1):
            return x
        return x.take_along_dim(self.target[..., None], dim=1).masked_fill(~self.kept[..., None], 0)


# ---- losses: a mean over what has a label, 0 where nothing has


def mean_over(losses: Tensor, counted: Tensor) -> Tensor:
    return losses.masked_fill(~counted, 0).sum() / counted.sum().clamp(min=1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """logits: (..., C); labels: (...), -100 = none."""
    logits, labels = logits.float().flatten(0, -2), labels.flatten()
    return mean_over(F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none"), labels != IGNORED)


def detection_loss(logits: Tensor, labels: Tensor, real: Tensor) -> Tensor:
    """logits: (B, T); labels: (B, T), 1 = replaced, -100 = none; real: (B, T) bool."""
    losses = F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none")
    return mean_over(losses, real & (labels != IGNORED))


def position_loss(logits: Tensor, positions: Tensor) -> Tensor:
    """logits: (B, T); positions: (B,) or (B, 1). A position outside of the row is none."""
    positions = positions.flatten()
    outside = (positions < 0) | (positions >= logits.size(1))
    return cross_entropy(logits, positions.masked_fill(outside, IGNORED))


def span_loss(start: Tensor, end: Tensor, start_positions: Tensor, end_positions: Tensor) -> Tensor:
    """start, end: (B, T) logits. The mean of both losses."""
    return (position_loss(start, start_positions) + position_loss(end, end_positions)) / 2


def answer_loss(logits: Tensor, is_impossible: Tensor) -> Tensor:
    """logits: (B,); is_impossible: (B,) or (B, 1), 1 = unanswerable, 0 = has an answer, -100 = none."""
    labels = is_impossible.flatten()
    losses = F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none")
    return mean_over(losses, labels != IGNORED)


def _binary(logits: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits.float(), labels.float())


def _squared(logits: Tensor, labels: Tensor) -> Tensor:
    return F.mse_loss(logits.float(), labels.float().view_as(logits))


ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]
PROBLEM_LOSSES: dict[ProblemType, Callable[[Tensor, Tensor], Tensor]] = {
    "regression": _squared,
    "single_label_classification": cross_entropy,
    "multi_label_classification": _binary,
}


def problem_type(num_labels: int | None, labels: Tensor) -> ProblemType:
    """What the labels (B,) or (B, C) say where the config says nothing, by the rule of `transformers`."""
    if num_labels == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


# ---- models


class FunnelTFMPreTrainedModel(PreTrainedModel):
    """What all the models share: how they begin, which input is padding, and how their table is resized."""

    config: FunnelTFMConfig
    base_model_prefix = "funnel"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = {"FunnelTFM"}  # noqa: RUF012 (its layers share what they know of a block)

    def _init_weights(self, module: nn.Module) -> None:
        """As the modules begin by themselves; `transformers` guards torch.nn.init, so that what was loaded stays.

        But for the table, which begins as in the original's pretraining: the language modelling head compares hidden
        states with it, and of N(0, 1) they would get scores of the size sqrt(d_embed).
        """
        if isinstance(module, EmbeddingLookup):
            nn.init.normal_(module.lookup_table, std=0.02)
        elif isinstance(module, RelMultiheadAttention):
            for parameter in module.parameters(recurse=False):
                nn.init.uniform_(parameter, b=0.1)
        elif isinstance(module, MaskedLMHead):
            nn.init.zeros_(module.bias)
        elif callable(reset := getattr(module, "reset_parameters", None)):
            reset()

    def _get_resized_embeddings(self, old_embeddings: Any, *args: Any, **kwargs: Any) -> Any:
        """`transformers` resizes an nn.Embedding and nothing else: lend it one that holds our table."""
        lent = nn.Embedding.from_pretrained(old_embeddings.weight.detach())
        old_embeddings.lookup_table.data = super()._get_resized_embeddings(lent, *args, **kwargs).weight.data
        return old_embeddings

    def _real_tokens(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, inputs_embeds: Tensor | None
    ) -> Tensor:
        """(B, T) bool, True where the input is no padding."""
        inputs = input_ids if input_ids is not None else inputs_embeds
        if inputs is None or (input_ids is not None and inputs_embeds is not None):
            raise InputError("give either input_ids or inputs_embeds: one of them, and not both.")
        if inputs.dim() != (2 if input_ids is not None else 3) or inputs.size(1) == 0:
            raise InputError(
                f"input_ids must have the shape (batch, length) and inputs_embeds (batch, length, d_embed), length at "
                f"least 1; got {tuple(inputs.shape)}."
            )
        if attention_mask is None:
            if input_ids is None:
                return torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
            return input_ids != self.config.pad_id
        if attention_mask.shape != inputs.shape[:2]:
            raise InputError(
                f"attention_mask must have the shape of the input, {tuple(inputs.shape[:2])}, 1 = real, 0 = padding; "
                f"got {tuple(attention_mask.shape)}."
            )
        return attention_mask.bool()


class FunnelTFMModel(FunnelTFMPreTrainedModel):
    """FunnelTFM without a head.

    use_decoder: whether to build the decoder that the config names; sequence-level models leave it out.
    """

    def __init__(self, config: FunnelTFMConfig, use_decoder: bool = True):
        super().__init__(config)
        net_config = config.net_config()
        if not use_decoder and net_config.decoder[0]:
            first, n_param = config.num_hidden_layers, net_config.decoder[0]
            numbers = "|".join(str(number) for number in range(first, first + n_param))
            self._keys_to_ignore_on_load_unexpected = [rf"\b(attn|pffn)_layers\.({numbers})\."]
            net_config = dataclasses.replace(net_config, decoder_size="0")
        self.net = FunnelTFM(net_config, cls_target=False)
        self.post_init()

    def padded_length(self, n: int) -> int:
        """How many columns are computed of a batch whose longest sentence has n tokens."""
        return canonical_length(n, self.net.net_config) if self.config.pad_to_canonical else n

    @property
    def lookup_table(self) -> Tensor:
        """(V, d_embed), the embedding."""
        return self.net.input_layer[0].lookup_table  # type: ignore[return-value]

    def get_input_embeddings(self) -> nn.Module:
        return self.net.input_layer[0]

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Take the weight of `value`, an nn.Embedding or an EmbeddingLookup, as the table: the same parameter."""
        table = value.weight
        if not isinstance(table, nn.Parameter) or table.dim() != 2 or table.size(1) != self.config.d_embed:
            raise InputError(f"input embeddings must have a weight of shape (vocab_size, {self.config.d_embed}).")
        self.get_input_embeddings().lookup_table = table
        self.net.net_config = dataclasses.replace(self.net.net_config, vocab_size=table.size(0))

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPooling:
        """Hidden states of a batch.

        input_ids: (B, T), or in their place inputs_embeds: (B, T, d_embed), as the table gives them.
        attention_mask: (B, T), 1 = real, 0 = padding, on either side; None takes the tokens that equal pad_token_id.
        token_type_ids: (B, T) segment ids; the first token of a sentence gets seg_id_cls by itself. None = zeros.

        last_hidden_state: (B, T, D) of the decoder, zeros at padding; without a decoder what the encoder leaves,
        (B, T', D), [CLS] first. pooler_output: (B, D), the encoder's [CLS], which sequence-level heads read.
        hidden_states: the embedding, and every layer as FunnelTFM.extract_hiddens gives it; those of full length are
        brought to (B, T, D).
        """
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise InputError("output_attentions: attention probabilities are never made here, leave it False.")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        real = self._real_tokens(input_ids, attention_mask, inputs_embeds)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(real, dtype=torch.long)
        elif token_type_ids.shape != real.shape:
            raise InputError(
                f"token_type_ids must have the shape of the input, {tuple(real.shape)}; got "
                f"{tuple(token_type_ids.shape)}."
            )

        net, config = self.net, self.net.net_config
        layout = Layout.of(real, config, self.config.pad_to_canonical)
        if input_ids is not None:
            inputs = layout.take(input_ids, self.config.pad_id)
        elif inputs_embeds is not None:
            inputs = layout.take(inputs_embeds, self.lookup_table[self.config.pad_id])
        seg_id = layout.take(token_type_ids, 0)
        seg_id[:, 0] = config.seg_id_cls
        input_mask = ~layout.take(real, False)
        has_decoder = config.decoder[0] > 0
        hiddens, _ = net.extract_hiddens(inputs, seg_id=seg_id, input_mask=input_mask, use_decoder=has_decoder)

        n_encoder = sum(n_param * n_repeat for n_param, n_repeat in config.blocks)
        last = layout.put_back(hiddens[-1])
        return BaseModelOutputWithPooling(
            last_hidden_state=last,
            pooler_output=hiddens[n_encoder][:, 0],
            hidden_states=(*map(layout.put_back, hiddens[:-1]), last) if output_hidden_states else None,
        )


class _WithHead(FunnelTFMPreTrainedModel):
    """A FunnelTFMModel and one head; the classes below say which head, what it reads, and its loss."""

    token_level: ClassVar[bool] = True
    """The head reads every token of the decoder, not the encoder's [CLS] alone."""
    output_type: ClassVar[type[ModelOutput]] = TokenClassifierOutput

    def __init__(self, config: FunnelTFMConfig):
        super().__init__(config)
        net_config = config.net_config()
        if self.token_level and not net_config.decoder[0] and len(net_config.blocks) > 1:
            raise InputError(
                f"{type(self).__name__} needs a deep state of every token, which the decoder gives; this config has "
                f"decoder_size {config.decoder_size!r}. Give it a decoder, as in decoder_size='2'."
            )
        self.funnel = FunnelTFMModel(config, use_decoder=self.token_level)
        self.add_head(config)
        self.post_init()

    def add_head(self, config: FunnelTFMConfig) -> None:
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: (B, T, D) of the tokens, or (B, D) of [CLS]."""
        raise NotImplementedError

    def loss(self, logits: Tensor, labels: Tensor, real: Tensor) -> Tensor:
        """real: (B, T) bool, False at padding."""
        return cross_entropy(logits, labels)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> ModelOutput:
        """Logits, and with labels the loss. Inputs as in FunnelTFMModel.forward; labels as the class says."""
        outputs = self.funnel(
            input_ids,
            attention_mask,
            token_type_ids,
            inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.logits(outputs.last_hidden_state if self.token_level else outputs.pooler_output)
        loss = None
        if labels is not None:
            loss = self.loss(logits, labels, self._real_tokens(input_ids, attention_mask, inputs_embeds))
        return self.output_type(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class FunnelTFMForPreTraining(_WithHead):
    """Which tokens were replaced: ELECTRA's discriminator.

    labels: (B, T), 1 = replaced, 0 = original, -100 = not counted; padding never is. logits: (B, T).
    """

    def add_head(self, config: FunnelTFMConfig) -> None:
        self.detection_head = TokenDetectionHead(config.d_model, config.ff_activation)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.detection_head(hidden)

    def loss(self, logits: Tensor, labels: Tensor, real: Tensor) -> Tensor:
        return detection_loss(logits, labels, real)


class FunnelTFMForMaskedLM(_WithHead):
    """Which token stood here. labels: (B, T) token ids, -100 = not counted. logits: (B, T, V).

    The head reads the embedding table itself: there is no second one to tie, to save or to resize.
    """

    output_type = MaskedLMOutput

    def add_head(self, config: FunnelTFMConfig) -> None:
        if not config.tie_word_embeddings:
            raise InputError("tie_word_embeddings must be True: the language modelling head has no table of its own.")
        if not config.lm_transform and config.d_embed != config.d_model:
            raise InputError(
                f"lm_transform=False compares hidden states with the table directly, so d_embed ({config.d_embed}) "
                f"must be d_model ({config.d_model})."
            )
        self.lm_head = MaskedLMHead(
            config.d_model, config.d_embed, config.vocab_size, config.ff_activation, transform=config.lm_transform
        )

    def get_output_embeddings(self) -> None:
        """None: they are the input embeddings."""
        return None

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        bias = self.lm_head.bias
        bias.data = F.pad(bias.data, (0, embeddings.num_embeddings - len(bias)))
        return embeddings

    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden, self.funnel.lookup_table)


class FunnelTFMForSequenceClassification(_WithHead):
    """One class, number or set of classes for the whole input, from the encoder's [CLS]; no decoder is built.

    labels: (B,) class indices; or (B,) or (B, C) numbers for regression, (B, C) of 0. and 1. for multi-label. logits:
    (B, C). Where config.problem_type is None, the first labels decide it for good, as everywhere in `transformers`.
    """

    token_level = False
    output_type = SequenceClassifierOutput

    def add_head(self, config: FunnelTFMConfig) -> None:
        self.cls_head = SummaryHead(config.d_model, config.net_config().num_class, config.dropout)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.cls_head(hidden)

    def loss(self, logits: Tensor, labels: Tensor, real: Tensor) -> Tensor:
        kind = self.config.problem_type or problem_type(self.config.num_labels, labels)
        self.config.problem_type = kind
        return PROBLEM_LOSSES[kind](logits, labels)


class FunnelTFMForMultipleChoice(_WithHead):
    """Which of K choices is right, from the encoder's [CLS] of each; no decoder is built.

    Inputs are (B, K, T), or embeddings (B, K, T, d_embed). labels: (B,), index of the right one. logits: (B, K).
    """

    token_level = False

    def add_head(self, config: FunnelTFMConfig) -> None:
        self.cls_head = SummaryHead(config.d_model, 1, config.dropout)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.cls_head(hidden)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> MultipleChoiceModelOutput:
        inputs = (input_ids, attention_mask, token_type_ids, inputs_embeds)
        given = next((x for x in (input_ids, inputs_embeds) if x is not None), None)
        if given is None or given.dim() != (3 if input_ids is not None else 4):
            shape = None if given is None else tuple(given.shape)
            raise InputError(f"give input_ids (batch, choices, length), or inputs_embeds (..., d_embed); got {shape}.")
        rows = (None if x is None else x.flatten(0, 1) for x in inputs)
        outputs = super().forward(
            *rows, output_attentions=output_attentions, output_hidden_states=output_hidden_states, return_dict=True
        )
        logits = outputs.logits.view(given.shape[:2])
        loss = None if labels is None else cross_entropy(logits, labels)
        return MultipleChoiceModelOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class FunnelTFMForTokenClassification(_WithHead):
    """One class for every token. labels: (B, T), -100 = not counted. logits: (B, T, C)."""

    def add_head(self, config: FunnelTFMConfig) -> None:
        self.token_head = TokenHead(config.d_model, config.net_config().num_class, config.dropout)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.token_head(hidden)


@dataclass
class BeamSpanOutput(ModelOutput):
    """What the beam head says. J = start_n_top and K = end_n_top, or T where a row is shorter.

    Log probabilities and cls_logits are fp32. Indices are columns of the input.
    """

    loss: Tensor | None = None
    start_top_log_probs: Tensor | None = None
    """(B, J), the best starts first."""
    start_top_index: Tensor | None = None
    """(B, J)"""
    end_top_log_probs: Tensor | None = None
    """(B, J * K), of an end given its start: number j * K + k is the k-th best end of the j-th start."""
    end_top_index: Tensor | None = None
    """(B, J * K). An end may lie before its start: who reads the spans leaves such pairs out, as the original does."""
    cls_logits: Tensor | None = None
    """(B,), more than 0 says unanswerable."""
    start_logits: Tensor | None = None
    """(B, T), very low where no answer can be."""
    end_logits: Tensor | None = None
    """(B, T), of the ends given the best start; very low where no answer can be."""
    hidden_states: tuple[Tensor, ...] | None = None


class FunnelTFMForQuestionAnswering(_WithHead):
    """Where the answer starts and ends. Logits (B, T) of both are very low at padding.

    start_positions, end_positions: (B,), columns of the input; one outside of the row (-100, or past a cut) is not
    counted. p_mask: (B, T), 1 = no answer can be here (the question, [SEP]); padding never is one.

    With config.qa_head "beam" it is the head that XLNet introduced and the original finetunes on SQuAD 2.0. The loss
    is as there: the mean of the start's and the end's cross entropy, the end's given the labelled start (and not
    counted where that is outside of the row); and with is_impossible, (B,) of 0 and 1, -100 = not counted, half of
    the binary cross entropy of cls_logits, which read [CLS] and the tokens weighted by the softmax over starts. An
    unanswerable question has both positions at [CLS], so p_mask must be 0 there. While training with labels no beam
    is made: loss, start_logits and cls_logits are all there is.
    """

    def add_head(self, config: FunnelTFMConfig) -> None:
        if config.qa_head == "beam":
            self.beam_head = BeamSpanHead(config.d_model, config.dropout)
        else:
            self.qa_head = TokenHead(config.d_model, 2, config.dropout)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        is_impossible: Tensor | None = None,
        p_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> QuestionAnsweringModelOutput | BeamSpanOutput:
        """Inputs as in FunnelTFMModel.forward; labels and p_mask as the class says."""
        positions = None
        if start_positions is not None and end_positions is not None:
            positions = (start_positions, end_positions)
        self._check_labels(positions, is_impossible)
        real = self._real_tokens(input_ids, attention_mask, inputs_embeds)
        if p_mask is not None and p_mask.shape != real.shape:
            raise InputError(
                f"p_mask must have the shape of the input, {tuple(real.shape)}, 1 = no answer can be here; got "
                f"{tuple(p_mask.shape)}."
            )
        outputs = self.funnel(
            input_ids,
            attention_mask,
            token_type_ids,
            inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        hidden, states = outputs.last_hidden_state, outputs.hidden_states
        ruled_out = ~real if p_mask is None else ~real | p_mask.bool()
        if self.config.qa_head == "beam":
            return self._beam(hidden, real, ruled_out, positions, is_impossible, states)
        start, end = (rule_out(x, ruled_out) for x in self.qa_head(hidden).unbind(dim=-1))
        loss = None if positions is None else span_loss(start, end, *positions)
        return QuestionAnsweringModelOutput(loss=loss, start_logits=start, end_logits=end, hidden_states=states)

    def _check_labels(self, positions: tuple[Tensor, Tensor] | None, is_impossible: Tensor | None) -> None:
        if is_impossible is None:
            return
        if self.config.qa_head != "beam":
            raise InputError(
                "is_impossible is a label of the beam head, this model has the plain one. Build it with "
                "qa_head='beam', or leave is_impossible out and let both positions of such a row be 0."
            )
        if positions is None:
            raise InputError("is_impossible is counted with the spans: give start_positions and end_positions too.")

    def _beam(
        self,
        hidden: Tensor,
        real: Tensor,
        ruled_out: Tensor,
        positions: tuple[Tensor, Tensor] | None,
        is_impossible: Tensor | None,
        states: tuple[Tensor, ...] | None,
    ) -> BeamSpanOutput:
        """hidden: (B, T, D) in the columns of the input; real, ruled_out: (B, T) bool."""
        start = self.beam_head.start_logits(hidden, ruled_out)
        log_probs = start.float().log_softmax(-1)  # (B, T)
        first = real.int().argmax(dim=1)[:, None, None]
        cls = hidden.take_along_dim(first, dim=1).squeeze(1)  # (B, D)
        answer = self.beam_head.answer_logits(hidden, log_probs.exp().to(hidden.dtype), cls).float()
        loss = None
        if positions is not None:
            loss = self._beam_span_loss(hidden, ruled_out, start, *positions)
            if is_impossible is not None:
                loss = loss + 0.5 * answer_loss(answer, is_impossible)
        spans = self._search(hidden, ruled_out, log_probs) if loss is None or not self.training else {}
        return BeamSpanOutput(loss=loss, **spans, cls_logits=answer, start_logits=start, hidden_states=states)

    def _beam_span_loss(
        self, hidden: Tensor, ruled_out: Tensor, start: Tensor, start_positions: Tensor, end_positions: Tensor
    ) -> Tensor:
        """start: (B, T) logits. The ends are those given the labelled starts."""
        at, end_at = start_positions.flatten(), end_positions.flatten()
        outside = (at < 0) | (at >= start.size(1))
        end = self.beam_head.end_logits(hidden, at.masked_fill(outside, 0)[:, None], ruled_out).squeeze(1)
        return span_loss(start, end, at, end_at.masked_fill(outside, IGNORED))

    def _search(self, hidden: Tensor, ruled_out: Tensor, log_probs: Tensor) -> dict[str, Tensor]:
        """log_probs: (B, T) of the starts. The best of them, and the best ends of each."""
        T = hidden.size(1)
        starts = log_probs.topk(min(self.config.start_n_top, T))  # (B, J)
        end = self.beam_head.end_logits(hidden, starts.indices, ruled_out)  # (B, J, T)
        ends = end.float().log_softmax(-1).topk(min(self.config.end_n_top, T))  # (B, J, K)
        return {
            "start_top_log_probs": starts.values,
            "start_top_index": starts.indices,
            "end_top_log_probs": ends.values.flatten(1),
            "end_top_index": ends.indices.flatten(1),
            "end_logits": end[:, 0],
        }


AUTO_CLASSES = {
    "AutoModel": FunnelTFMModel,
    "AutoModelForPreTraining": FunnelTFMForPreTraining,
    "AutoModelForMaskedLM": FunnelTFMForMaskedLM,
    "AutoModelForSequenceClassification": FunnelTFMForSequenceClassification,
    "AutoModelForMultipleChoice": FunnelTFMForMultipleChoice,
    "AutoModelForTokenClassification": FunnelTFMForTokenClassification,
    "AutoModelForQuestionAnswering": FunnelTFMForQuestionAnswering,
}


def register() -> None:
    """Make the Auto classes know us; again changes nothing."""
    transformers.AutoConfig.register(FunnelTFMConfig.model_type, FunnelTFMConfig, exist_ok=True)
    for auto, model in AUTO_CLASSES.items():
        getattr(transformers, auto).register(FunnelTFMConfig, model, exist_ok=True)


register()
