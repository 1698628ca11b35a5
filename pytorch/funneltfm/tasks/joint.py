"""A query and k of its candidates in one input of the encoder, and heads that score them together (Di Liello et al.
2022, "Paragraph-based Transformer Pre-training for Multi-Sentence Inference").

Segment 0 is the query, segment j the j-th candidate; h_j is the hidden state of the first token of segment j.
"""

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from funneltfm.data.features import Example, Features
from funneltfm.data.text import NO_WORD, Pieces, TextEncoder, fit_lengths
from funneltfm.errors import InputError
from funneltfm.tasks.base import IGNORED

log = logging.getLogger(__name__)

NO_ROW = -1  # the row of a candidate that is missing
_EMPTY = Pieces([], [], [])


# ---- inputs


def packed(parts: Sequence[Pieces], text: TextEncoder) -> Example:
    """All segments in one row as the tokenizer joins texts, `<s>q</s></s>c1</s></s>c2</s>`, cut longest first.

    "segment_starts" is 1 at the first token of every segment: the row's first token, and the first piece of each
    candidate; where it has none, the separator after it.
    """
    layout = text.layout
    if not layout.between or not layout.suffix:
        raise InputError("this tokenizer puts no separator between texts, so candidates cannot be packed: --separated.")
    example = text.join(parts)
    room = text.max_length - layout.n_special(len(parts))
    lengths = fit_lengths([len(part.ids) for part in parts], room)
    starts = [0] * len(example["input_ids"])
    position = len(layout.prefix)
    for length in lengths[:-1]:
        position += length + len(layout.between)
        starts[position] = 1
    starts[0] = 1
    return example | {"segment_starts": starts}


def separated(parts: Sequence[Pieces], text: TextEncoder) -> Example:
    """Every segment a text of its own with its special tokens, padded on the right to text.max_length = L, one after
    another: the first token of segment j is at j * L. "attention_mask" is 0 at the padding in between.
    """
    example: Example = {}
    for j, part in enumerate(parts):
        one = text.join([part], first=j)
        n = len(one["input_ids"])
        if not n:
            raise InputError("an empty text has no token with this tokenizer, so candidates cannot be separated.")
        one |= {"attention_mask": [1] * n, "segment_starts": [1] + [0] * (n - 1)}
        fill = {"input_ids": text.tokenizer.pad_token_id, "word_ids": NO_WORD}
        fill["token_type_ids"] = one.get("token_type_ids", [0])[0]
        for name, values in one.items():
            example.setdefault(name, []).extend(values + [fill.get(name, 0)] * (text.max_length - n))
    return example


@dataclass(frozen=True)
class Candidates:
    """The pieces of all queries and candidates of some data, and who belongs to whom."""

    query_pieces: Features
    pieces: Features
    members: list[np.ndarray]
    """Rows of the candidates of each query."""
    labels: np.ndarray | None
    """(N,) of rows."""
    k: int
    lay_out: Any
    """`packed` or `separated`."""

    @classmethod
    def of(
        cls,
        texts: Sequence[Sequence[Any]],
        queries: np.ndarray,
        members: list[np.ndarray],
        labels: np.ndarray | None,
        k: int,
        apart: bool,
        text: TextEncoder,
    ) -> "Candidates":
        """texts: (query, candidate) of every row. queries: (N,) the query's number."""
        firsts = np.unique(queries, return_index=True)[1]
        return cls(
            _kept([texts[row][0] for row in firsts], text),
            _kept([candidate for _, candidate in texts], text),
            members,
            labels,
            k,
            separated if apart else packed,
        )

    def example(self, query: int, chunk: int, rows: np.ndarray, text: TextEncoder) -> Example:
        """The example of up to k candidates: "members", their rows, and where there are labels those, each filled up
        to k.
        """
        missing = self.k - len(rows)
        parts = [_pieces(self.query_pieces, query), *(_pieces(self.pieces, int(row)) for row in rows)]
        example = self.lay_out(parts + [_EMPTY] * missing, text)
        example |= {"row": int(rows[0]), "query": query, "chunk": chunk}
        example["members"] = [*map(int, rows), *[NO_ROW] * missing]
        if self.labels is not None:
            example["answer_selection_labels"] = [*map(int, self.labels[rows]), *[IGNORED] * missing]
        return example

    def examples(self, text: TextEncoder) -> list[Example]:
        """Every candidate once, in the order of the data."""
        return [
            self.example(query, chunk, rows[chunk * self.k : (chunk + 1) * self.k], text)
            for query, rows in enumerate(self.members)
            for chunk in range(-(-len(rows) // self.k))
        ]

    def redrawn(self, example: Example, rng: np.random.Generator, text: TextEncoder) -> Example:
        """The example in its place when its query's candidates are put in random order. Examples of one query that
        are given equal generators share the candidates out, each to one.
        """
        query, chunk = int(example["query"]), int(example["chunk"])
        rows = rng.permutation(self.members[query])[chunk * self.k : (chunk + 1) * self.k]
        new = self.example(query, chunk, rows, text)
        new = {name: np.array(value) if isinstance(value, list) else value for name, value in new.items()}
        return example | new


def _kept(texts: Sequence[Any], text: TextEncoder) -> Features:
    """Pieces in flat arrays."""
    return Features.of([{"input_ids": part.ids, "word_ids": part.word_ids} for part in text.pieces(texts)])


def _pieces(kept: Features, number: int) -> Pieces:
    one = kept[number]
    return Pieces(one["input_ids"].tolist(), one["word_ids"].tolist(), [])


# ---- the model


class JointHead(nn.Module):
    """Logits of segments' states: f(u) = W2 drop(tanh(W1 drop(u))).

    kind, with the u that f reads and the logits' shape:
    RE_k: h_0, f gives all k at once, (B, k, C). IE_k: h_j, (B, k, C). AE_k: [h_0; h_j], (B, k, C).
    IE_1: h_0, (B, C). AE_1: the sum of all h_j, the query's too, (B, C).
    """

    def __init__(self, kind: str, k: int, d_model: int, n_labels: int, dropout: float, std: float = 0.02):
        super().__init__()
        self.kind, self.k = kind, k
        self.drop = nn.Dropout(dropout)
        self.W1 = nn.Linear(2 * d_model if kind == "AE_k" else d_model, d_model)
        self.W2 = nn.Linear(d_model, k * n_labels if kind == "RE_k" else n_labels)
        for layer in (self.W1, self.W2):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, h: Tensor, real: Tensor | None = None) -> Tensor:
        """h: (B, 1 + k, D). real: (B, 1 + k) bool, False for missing candidates, which AE_1 does not add up."""
        query = h[:, 0]
        if self.kind == "IE_k":
            u = h[:, 1:]
        elif self.kind == "AE_k":
            u = torch.cat([query[:, None].expand(-1, self.k, -1), h[:, 1:]], dim=-1)
        elif self.kind == "AE_1":
            u = (h if real is None else h * real[..., None]).sum(dim=1)
        else:
            u = query
        logits = self.W2(self.drop(torch.tanh(self.W1(self.drop(u)))))
        return logits.view(len(h), self.k, -1) if self.kind == "RE_k" else logits


# What architectures call the dropout before a classifier.
_DROPOUTS = ("classifier_dropout", "classifier_dropout_prob", "seq_classif_dropout", "hidden_dropout_prob", "dropout")


class JointModel(nn.Module):
    """Any encoder of `transformers` with a JointHead. The config says which: `classification_head_type`, `joint_k`.

    A saved folder is one that AutoModel loads, with the head in a file of its own beside it.
    """

    base_model_prefix = "encoder"
    head_file = "joint_head.safetensors"
    name_or_path = ""
    """Where it was loaded from."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder
        config: Any = encoder.config
        rates = (getattr(config, name, None) for name in _DROPOUTS)
        self.head = JointHead(
            config.classification_head_type,
            config.joint_k,
            config.hidden_size,
            config.num_labels,
            next((rate for rate in rates if rate is not None), 0.1),
            getattr(config, "initializer_range", 0.02),
        )

    @property
    def config(self) -> Any:
        return self.encoder.config

    def forward(self, segment_starts: Tensor, real: Tensor | None = None, **inputs: Tensor) -> Tensor:
        """Logits, as JointHead gives them. segment_starts: (B, T), 1 at the first tokens of 1 + k segments."""
        return self.head(first_states(self.encoder(**inputs).last_hidden_state, segment_starts, self.head.k), real)

    def tie_weights(self) -> None:
        self.encoder.tie_weights()  # type: ignore[operator]

    def save_pretrained(self, folder: str | Path) -> None:
        from safetensors.torch import save_file

        self.encoder.save_pretrained(folder)  # type: ignore[operator]
        state = {f"head.{name}": t.detach().cpu().contiguous() for name, t in self.head.state_dict().items()}
        save_file(state, self._in(folder))

    @classmethod
    def from_pretrained(cls, source: str | Path, config: Any = None) -> "JointModel":
        """The encoder of any checkpoint; with its head, if it is one that `save_pretrained` has written, else with a
        new one. config: in place of the checkpoint's own.
        """
        import transformers

        own = transformers.AutoConfig.from_pretrained(source)
        model = cls(encoder_of(source, config or own))
        model.name_or_path = str(source)
        file = cls._in(source)
        if file.is_file():
            keys = ("classification_head_type", "joint_k", "num_labels")
            saved, wanted = ({key: getattr(c, key, None) for key in keys} for c in (own, model.config))
            if saved == wanted:
                from safetensors.torch import load_file

                known = model.head.state_dict()  # the file of a sparse model has masks too
                state = {name.removeprefix("head."): tensor for name, tensor in load_file(file).items()}
                model.head.load_state_dict({name: state[name] for name in known})
            else:
                log.warning("the head in %s is left, a new one begins: it has %s, wanted is %s", source, saved, wanted)
        return model

    @classmethod
    def _in(cls, folder: str | Path) -> Path:
        return Path(folder) / cls.head_file


def encoder_of(source: Any, config: Any) -> nn.Module:
    """The encoder alone, of a checkpoint or from scratch (None). It has no pooler: parameters that learn nothing would
    stop training in several processes.
    """
    import transformers

    auto = transformers.AutoModel
    cls: Any = auto._model_mapping[type(config)]
    takes = inspect.signature(cls[0] if isinstance(cls, tuple) else cls).parameters
    kwargs = {"add_pooling_layer": False} if "add_pooling_layer" in takes else {}
    return (
        auto.from_config(config, **kwargs) if source is None else auto.from_pretrained(source, config=config, **kwargs)
    )


def first_states(hidden: Tensor, segment_starts: Tensor, k: int) -> Tensor:
    """(B, 1 + k, D): the states (B, T, D) where segment_starts (B, T) is 1."""
    if hidden.size(1) != segment_starts.size(1):
        raise InputError(
            f"the encoder makes {hidden.size(1)} states of {segment_starts.size(1)} tokens, so a candidate has none of "
            f"its own. A Funnel needs its decoder: decoder_size."
        )
    at = segment_starts.nonzero()[:, 1].view(len(hidden), 1 + k, 1)
    return hidden.take_along_dim(at, dim=1)
