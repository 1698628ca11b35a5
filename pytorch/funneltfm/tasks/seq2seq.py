"""Tasks of encoder-decoder models: what the decoder is given, what it costs, what it writes.

Such a model takes text and writes text; it is trained to say the next token of the right text, which its decoder sees
up to there (teacher forcing). How the decoder begins is the model's own matter.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from funneltfm.data.features import Batch, Example, pad
from funneltfm.data.text import TextEncoder
from funneltfm.errors import InputError
from funneltfm.tasks.base import IGNORED
from funneltfm.tasks.heads import replayed, save_pretrained
from funneltfm.tasks.multi_token import MultiToken
from funneltfm.tasks.tokens import PredictsTokens


class Seq2Seq(PredictsTokens):
    """Cross entropy on all tokens of the target, "NAME_labels" of the examples, its end among them."""

    auto = "AutoModelForSeq2SeqLM"
    alone = True

    @property
    def longest_target(self) -> int:
        """Tokens of the longest target."""
        raise NotImplementedError

    def collate(self, examples: list[Example], tokens: Callable[[str, int], Tensor]) -> Batch:
        """NAME_labels (B, longest target), filled up at the right whichever side the encoder's padding is on."""
        name = f"{self.name}_labels"
        if name not in examples[0]:
            return {}
        labels = [example[name] for example in examples]
        return {name: pad(labels, IGNORED, max(map(len, labels)))}

    # ---- model

    def make_model(self, source: Any, config: Any) -> nn.Module:
        import transformers

        mapping: Any = transformers.AutoModelForSeq2SeqLM._model_mapping
        if type(config) not in mapping:
            raise InputError(
                f"cannot make a model for {self.name} of {source or config.model_type}: it needs an encoder-decoder "
                f"that writes text (bart, t5, mbart, pegasus, longt5, ...), and {config.model_type} is none that "
                f"AutoModelForSeq2SeqLM has."
            )
        limit = decoder_positions(config)
        if limit is not None and limit < self.longest_target:
            raise InputError(
                f"targets of {self.name} may have {self.longest_target} tokens, but the model's decoder takes {limit}. "
                f"Lower the length, or from scratch give --additional_config_kwargs max_position_embeddings=N."
            )
        return super().make_model(source, config)

    def make_beside(self, model: nn.Module, source: Any, tokenizer: Any) -> nn.Module | None:
        """The projections of --max_multi_token_predictions, where that is given."""
        generation: Any = model.generation_config
        if source is None or generation.decoder_start_token_id is None:
            some = torch.tensor([target_ids(["a"], TextEncoder(tokenizer))[0]])
            generation.decoder_start_token_id = int(shifted(model, some)[0, 0])
        m = self.args.max_multi_token_predictions
        return None if m is None else MultiToken.on(model, m, source)

    def save(self, model: nn.Module, beside: nn.Module | None, folder: Path) -> None:
        save_pretrained(model, folder)
        if isinstance(beside, MultiToken):
            beside.save(folder)

    def inputs(self, model: nn.Module, batch: Batch) -> dict[str, Any]:
        """With the decoder's: the labels moved to the right; where there are none its first token alone."""
        labels = self.labels(batch)
        target = batch["inputs"]["input_ids"][:, :1] if labels is None else labels
        return batch["inputs"] | {"decoder_input_ids": shifted(model, target), "use_cache": False}

    def logits(self, model: nn.Module, hidden: Any, batch: Batch) -> Tensor:
        """(n, V): of the tokens of the targets, text by text."""
        labels = self.labels(batch)
        if labels is None:
            raise InputError(f"training data of {self.name} has rows without the text to write; training needs it.")
        with replayed(model, hidden):
            logits = model(**self.inputs(model, batch)).logits[:, : labels.shape[1]]
        return logits[labels != IGNORED]


def decoder_positions(config: Any) -> int | None:
    """Tokens that a decoder can be given; None where its positions have no end (T5)."""
    names = ("max_decoder_position_embeddings", "max_position_embeddings")
    return next((getattr(config, name) for name in names if getattr(config, name, None) is not None), None)


def shifted(model: nn.Module, labels: Tensor) -> Tensor:
    """What the decoder is given for labels (B, T): in the model's own way where it has one (mBART begins with the
    language that the labels end with), else its first token and the labels without the last.
    """
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return model.prepare_decoder_input_ids_from_labels(labels=labels)  # type: ignore[operator]
    config: Any = model.config
    first = labels.new_full((len(labels), 1), config.decoder_start_token_id)
    return torch.cat([first, labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, config.pad_token_id)], dim=1)


def target_ids(texts: Sequence[str], text: TextEncoder, longest: int | None = None) -> list[list[int]]:
    """Ids of texts that are to be written: with the special tokens that the tokenizer gives targets, and an end.
    Longer ones lose their last tokens before it.
    """

    def ids_of(texts: list[str], special: bool) -> list[list[int]]:
        return text.tokenizer(text_target=texts, add_special_tokens=special, verbose=False)["input_ids"]

    (bare,), (whole,) = (ids_of([text.probe], special) for special in (False, True))
    start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    before, after = whole[:start], whole[start + len(bare) :]
    if text.end_id not in after:
        after = [*after, text.end_id]
    room = None if longest is None else longest - len(before) - len(after)
    if room is not None and room < 1:
        raise InputError(f"--max_target_length={longest} leaves no room beside {len(before + after)} special tokens.")
    return [[*before, *ids[:room], *after] for ids in (ids_of(list(texts), False) if texts else [])]
