"""FunnelTFM: the encoder that shortens its sequence, and the decoder that restores it. Read from top to bottom.

Dai, Lai, Yang, Le: Funnel-Transformer: Filtering out Sequential Redundancy for Efficient Language Processing, 2020.
Alphabet: B batch, T tokens, D d_model, C classes. Masks: 1 (or True) = pad.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from funneltfm.errors import InputError
from funneltfm.funnel.attention import ATTN_TYPES, AttentionPath, AttentionStructure, Positions, RelMultiheadAttention
from funneltfm.funnel.config import ModelConfig
from funneltfm.funnel.heads import SummaryHead
from funneltfm.funnel.ops import (
    ACTIVATIONS,
    Dense,
    EmbeddingLookup,
    LayerNorm,
    can_pool,
    pool_hidden,
    pool_mask,
    pool_stride,
    upsample,
)

# Settings of the model that the original kept in its command-line arguments, outside the saved config.
_ARGS_KEYS = ("attn_type", "truncate_seq", "seg_id_cls", "pad_id", "num_class")


class Activation(nn.Module):
    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.name](x)


class PositionwiseFFN(nn.Module):
    """Two dense layers with an activation between, then a residual connection and a LayerNorm."""

    def __init__(self, d_model: int, d_inner: int, dropout: float, dropact: float, activation: str):
        super().__init__()
        self.pffn = nn.Sequential(
            Dense(d_model, d_inner),
            Activation(activation),
            nn.Dropout(dropact),
            Dense(d_inner, d_model),
            nn.Dropout(dropout),
        )
        self.layer_norm = LayerNorm(d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer_norm(x + self.pffn(x))


class Tokens(NamedTuple):
    """The tokens, or pooled tokens, of a hidden state: where they are, in which segment, and which are padding."""

    pos: Positions
    seg_id: Tensor | None
    """(B, T')."""
    input_mask: Tensor
    """(B, T') bool, True = pad."""


class FunnelTFM(nn.Module):
    """A Funnel-Transformer with a classification head.

    net_config: the model.
    args: None, or any object; of the settings that the original kept outside its saved config (attn_type, truncate_seq,
        seg_id_cls, pad_id, num_class) those that it has as attributes replace the config's.
    cls_target: whether the model has a classification head (num_class outputs, 1 = regression).

    Parameter names are the original's, so its `model.pt` loads with nothing missing and nothing unexpected.
    """

    def __init__(self, net_config: ModelConfig, args: Any = None, cls_target: bool = True):
        super().__init__()
        replaced = {key: getattr(args, key) for key in _ARGS_KEYS if getattr(args, key, None) is not None}
        config = dataclasses.replace(net_config, **replaced)
        self.net_config = config
        # By which the sequence is pooled: inputs that are padded for it may have `without_truncation(net_config)`.
        self.pooling = config
        # In training, compute each layer again going backward, to save memory.
        self.gradient_checkpointing = False
        # How attention is computed: "auto", "plain" or "chunked". The numbers are the same.
        self.attention_path: AttentionPath = "auto"

        self.input_layer = nn.Sequential(
            EmbeddingLookup(config.vocab_size, config.d_embed),
            LayerNorm(config.d_embed),
            nn.Dropout(config.dropout),
        )
        if config.d_embed != config.d_model:
            self.input_projection = Dense(config.d_embed, config.d_model)
        self.pos_dropout = nn.Dropout(config.dropout)

        # Layers of the decoder, where there is one, continue the numbers of the encoder's.
        n_layer = sum(n_param for n_param, _ in config.blocks) + config.decoder[0]
        self.attn_layers = nn.ModuleList(
            RelMultiheadAttention(
                config.d_model, config.n_head, config.d_head, config.dropout, config.dropatt, config.attn_type
            )
            for _ in range(n_layer)
        )
        self.pffn_layers = nn.ModuleList(
            PositionwiseFFN(config.d_model, config.d_inner, config.dropout, config.dropact, config.ff_activation)
            for _ in range(n_layer)
        )
        if cls_target:
            self.cls_head = SummaryHead(config.d_model, config.num_class, config.dropout)

    # ---- text in: ids -> embedding -> one structure per block

    def _input_mask(self, inputs: Tensor, input_mask: Tensor | None) -> Tensor:
        ids = inputs.dim() == 2 and not inputs.is_floating_point()
        embeddings = inputs.dim() == 3 and inputs.is_floating_point() and inputs.size(2) == self.net_config.d_embed
        if not (ids or embeddings) or inputs.size(1) == 0:
            raise InputError(
                f"inputs must be token ids of shape (batch, length), length at least 1, or embeddings of shape "
                f"(batch, length, {self.net_config.d_embed}); got {tuple(inputs.shape)} of {inputs.dtype}."
            )
        if input_mask is None:
            return inputs == self.net_config.pad_id if ids else inputs.new_zeros(inputs.shape[:2], dtype=torch.bool)
        if input_mask.shape != inputs.shape[:2]:
            raise InputError(
                f"input_mask must have the shape of inputs, {tuple(inputs.shape[:2])}, 1 = pad; "
                f"got {tuple(input_mask.shape)}."
            )
        return input_mask.bool()

    def _check_seg_id(self, inputs: Tensor, seg_id: Tensor | None) -> None:
        if seg_id is not None and seg_id.shape != inputs.shape[:2]:
            raise InputError(
                f"seg_id must have the shape of inputs, {tuple(inputs.shape[:2])}; got {tuple(seg_id.shape)}."
            )

    def _check_target(self, logits: Tensor, cls_target: Tensor) -> None:
        if cls_target.shape != logits.shape[:1]:
            raise InputError(
                f"cls_target must have the shape {tuple(logits.shape[:1])}, one for each input; "
                f"got {tuple(cls_target.shape)}."
            )
        if self.net_config.num_class > 1 and (cls_target.is_floating_point() or cls_target.dtype == torch.bool):
            raise InputError(
                f"cls_target must be class indices (integers) for num_class {self.net_config.num_class}; "
                f"got {cls_target.dtype}. Numbers to predict need num_class 1."
            )

    def _structure(self, like: Tensor, query: Tokens, key: Tokens) -> AttentionStructure:
        config = self.net_config
        encode = ATTN_TYPES[config.attn_type].encode
        structure = AttentionStructure(
            pos_enc=encode(query.pos, key.pos, config.d_model, self.pos_dropout, like),
            input_mask=key.input_mask,
            q_seg=query.seg_id,
            k_seg=key.seg_id,
            seg_id_cls=config.seg_id_cls,
            func_mask=config.separate_cls or config.func_mask == "always",
            path=self.attention_path,
        )
        if self.attention_path == "plain":
            structure.same_segment  # noqa: B018 (made here, once, where a compiled layer would make it anew)
        return structure

    # ---- the funnel

    def _layer(self, index: int, query: Tensor, key: Tensor, structure: AttentionStructure) -> Tensor:
        def layer(query: Tensor, key: Tensor) -> Tensor:
            return self.pffn_layers[index](self.attn_layers[index](query, key, key, structure))

        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(layer, query, key, use_reentrant=False)
        return layer(query, key)

    def _pool(self, hidden: Tensor, tokens: Tokens) -> tuple[Tensor, Tokens]:
        config = self.pooling
        hidden = pool_hidden(hidden, config)
        stride = tokens.pos.stride * config.pooling_size
        # [CLS] kept aside sits where even spacing wants it: before the first of every second token, at 1 - 2^b.
        start = 1 - stride if config.separate_cls else 0
        return hidden, Tokens(
            pos=Positions(start, stride, hidden.size(1)),
            seg_id=None if tokens.seg_id is None else pool_stride(tokens.seg_id, config),
            input_mask=pool_mask(tokens.input_mask, config),
        )

    def _encode(self, hidden: Tensor, tokens: Tokens) -> Iterator[tuple[Tensor, Tokens]]:
        """Yield the hidden states (B, T', D) after every layer, and where its tokens are."""
        config = self.net_config
        index = 0
        for block, (n_param, n_repeat) in enumerate(config.blocks):
            key, key_tokens = hidden, tokens
            if block > 0 and can_pool(hidden.size(1), self.pooling):
                hidden, tokens = self._pool(hidden, tokens)
                if not config.pool_q_only:
                    key, key_tokens = hidden, tokens
            structure = self._structure(hidden, tokens, key_tokens)
            for _ in range(n_param):
                for _ in range(n_repeat):
                    hidden = self._layer(index, hidden, key, structure)
                    yield hidden, tokens
                    if key_tokens is not tokens:  # after the first layer of a block the keys are pooled too
                        key_tokens = tokens
                        structure = self._structure(hidden, tokens, tokens)
                    key = hidden
                index += 1

    def _decode(self, last: Tensor, bridge: Tensor, factor: int, tokens: Tokens) -> Iterator[Tensor]:
        """Yield the hidden states (B, T, D) of every decoder layer. Paper, section 2.3.

        last: the encoder's output, one state for `factor` tokens. bridge: the output of its first block, full length.
        """
        config = self.net_config
        n_param, n_repeat = config.decoder
        hidden = upsample(last, bridge.size(1), factor, config) + bridge
        structure = self._structure(hidden, tokens, tokens)
        for index in range(len(self.attn_layers) - n_param, len(self.attn_layers)):
            for _ in range(n_repeat):
                hidden = self._layer(index, hidden, hidden, structure)
                yield hidden

    def extract_hiddens(
        self,
        inputs: Tensor,
        seg_id: Tensor | None = None,
        input_mask: Tensor | None = None,
        use_decoder: bool = False,
    ) -> tuple[list[Tensor], dict[str, Any]]:
        """Hidden states of every layer.

        inputs: (B, T) token ids, or (B, T, d_embed) embeddings in place of the table's.
        seg_id: (B, T) segment ids, or None to leave the segment term out.
        input_mask: (B, T), 1 = pad; None takes the tokens that equal pad_id, and none where embeddings were given.
        Returns (hiddens, ret_dict). hiddens[0] is the word embedding (B, T, D), then comes one (B, T', D) for every
        application of an encoder layer, T' shrinking from block to block; with use_decoder, then one (B, T, D) for
        every application of a decoder layer. ret_dict["hidden_masks"] is the padding mask of each of them, (B, T')
        bool, True = pad.
        """
        config = self.net_config
        if use_decoder and config.decoder[0] == 0:
            raise InputError("use_decoder=True needs a model with a decoder; this one has decoder_size '0'.")
        mask = self._input_mask(inputs, input_mask)
        self._check_seg_id(inputs, seg_id)
        embedding = self.input_layer(inputs) if inputs.dim() == 2 else self.input_layer[1:](inputs)
        if config.d_embed != config.d_model:
            embedding = self.input_projection(embedding)

        tokens = Tokens(Positions(0, 1, embedding.size(1)), seg_id, mask)
        layers = [(embedding, tokens), *self._encode(embedding, tokens)]
        hiddens = [hidden for hidden, _ in layers]
        masks = [at.input_mask for _, at in layers]
        if use_decoder:
            n_param, n_repeat = config.blocks[0]
            last, at = layers[-1]
            decoded = list(self._decode(last, hiddens[n_param * n_repeat], at.pos.stride, tokens))
            hiddens += decoded
            masks += [mask] * len(decoded)
        return hiddens, {"hidden_masks": masks}

    def get_pooled_output(
        self, inputs: Tensor, seg_id: Tensor | None = None, input_mask: Tensor | None = None
    ) -> Tensor:
        """The summary vector (B, D) of each sequence: the classification head's dense layer and tanh over [CLS]."""
        if not hasattr(self, "cls_head"):
            raise InputError(
                "get_pooled_output needs the dense layer of the head; build the model with cls_target=True."
            )
        hiddens, _ = self.extract_hiddens(inputs, seg_id=seg_id, input_mask=input_mask)
        return self.cls_head.summary(hiddens[-1][:, 0])

    def forward(
        self,
        inputs: Tensor,
        input_mask: Tensor | None = None,
        seg_id: Tensor | None = None,
        cls_target: Tensor | None = None,
    ) -> tuple[list[Tensor], dict[str, Any]]:
        """Hidden states as `extract_hiddens` gives them, and what the classification head says of [CLS].

        cls_target: (B,) class indices, or (B,) numbers where num_class is 1.
        ret_dict: "cls_logits" (B, C), "cls_pred" (B,) the class or the number; with cls_target also
        "cls_loss", the mean cross entropy or mean squared error, and for classes "cls_corr", how many are right.
        """
        hiddens, ret_dict = self.extract_hiddens(inputs, seg_id=seg_id, input_mask=input_mask)
        if not hasattr(self, "cls_head"):
            if cls_target is not None:
                raise InputError("cls_target was given, but the model was built with cls_target=False and has no head.")
            return hiddens, ret_dict
        logits = self.cls_head(hiddens[-1][:, 0])
        regression = self.net_config.num_class == 1
        ret_dict["cls_logits"] = logits
        ret_dict["cls_pred"] = logits[:, 0] if regression else logits.argmax(dim=-1)
        if cls_target is not None:
            self._check_target(logits, cls_target)
            if regression:
                ret_dict["cls_loss"] = F.mse_loss(logits[:, 0].float(), cls_target.float())
            else:
                ret_dict["cls_loss"] = F.cross_entropy(logits.float(), cls_target)
                ret_dict["cls_corr"] = (ret_dict["cls_pred"] == cls_target).sum()
        return hiddens, ret_dict
