"""Scores of texts that a model has written, against one or more references each: ROUGE, BLEU, BERTScore."""

import functools
import importlib.util
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from funneltfm.errors import InputError, brief

ROUGES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def sentences(text: str) -> list[str]:
    """A text cut after every full stop, exclamation mark and question mark that a blank follows, and at line ends.

    >>> sentences("He came at 3.15 p.m. today. Who? I saw!")
    ['He came at 3.15 p.m.', 'today.', 'Who?', 'I saw!']
    """
    return [part for line in text.splitlines() for part in _SENTENCE_END.split(line.strip()) if part]


def check_installed() -> None:
    """An InputError where the packages for ROUGE and BLEU are missing."""
    for name in ("rouge_score", "sacrebleu"):
        if importlib.util.find_spec(name) is None:
            raise InputError(f"scores of written texts need {name}: pip install 'funneltfm[generation]'.")


def check_encoder(model: str, layer: int) -> None:
    """An InputError where `model` has no such layer for BERTScore, or there is no such model."""
    import transformers

    try:
        n_layers = transformers.AutoConfig.from_pretrained(model).num_hidden_layers
    except Exception as error:  # transformers and the hub raise all kinds
        raise _no_encoder(model, error) from error
    if not 0 <= layer <= n_layers:
        raise InputError(f"bert_score_layer must be from 0 to {n_layers}, the layers of {model}; got {layer}.")


def _no_encoder(model: str, error: Exception) -> InputError:
    return InputError(
        f"BERTScore cannot load the encoder {model}: {brief(' '.join(str(error).split()), 400)}. Give another "
        f"--bert_score_model, a folder or a name on the hub, and its --bert_score_layer; or leave BERTScore out."
    )


def rouge(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Means over all texts of precision, recall and F of ROUGE-1, -2, -L and -Lsum (Lin 2004), words without their
    endings (Porter), by the package rouge-score. Of several references the one with the best F counts, for each kind
    apart. Sentences, for Lsum, are those of `sentences`.
    """
    check_installed()
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    words = DefaultTokenizer(use_stemmer=True)  # given, or absl puts a handler on the root logger to say that it is not
    scorer = RougeScorer(list(ROUGES), tokenizer=words)
    scores = [
        scorer.score_multi(["\n".join(sentences(text)) for text in several], "\n".join(sentences(prediction)))
        for prediction, several in zip(predictions, references, strict=True)
    ]
    return {
        f"{kind}_{part}": float(np.mean([getattr(score[kind], part) for score in scores]))
        for kind in ROUGES
        for part in ("precision", "recall", "fmeasure")
    }


def sacrebleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU of the whole corpus, 0 to 100, as the package sacrebleu takes it by default (Post 2018)."""
    check_installed()
    from sacrebleu import corpus_bleu

    most = max(map(len, references))
    streams: Any = [[several[i] if i < len(several) else None for several in references] for i in range(most)]
    return float(corpus_bleu(list(predictions), streams).score)


@functools.lru_cache(maxsize=1)
def _encoder(model: str, device: str) -> tuple[Any, Any]:
    """Tokenizer and encoder for BERTScore. They are kept: every validation of a run needs them."""
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        with torch.random.fork_rng([]):  # weights that it lacks are drawn, and a resumed run loads it at another time
            return tokenizer, transformers.AutoModel.from_pretrained(model).to(device).eval()
    except Exception as error:  # transformers and the hub raise all kinds
        raise _no_encoder(model, error) from error


@torch.inference_mode()
def bert_score(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    model: str,
    layer: int,
    device: str | None = None,
    batch_size: int = 32,
) -> dict[str, float]:
    """Means over all texts of precision, recall and F of BERTScore (Zhang et al. 2020, section 3), without idf and
    without rescaling, on the hidden states of a layer of the encoder `model` (a folder or a name). Special tokens do
    not count; a text without others scores 0. Of several references the one with the best F counts.
    """
    check_encoder(model, layer)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer, encoder = _encoder(model, device)
    longest = min(tokenizer.model_max_length, getattr(encoder.config, "max_position_embeddings", 512))

    def vectors(texts: Sequence[str]) -> list[Tensor]:
        """Of unit length, (tokens, D), for each text."""
        made = tokenizer(
            list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt",
            return_special_tokens_mask=True,
        ).to(device)  # fmt: skip
        special = made.pop("special_tokens_mask").bool()
        hidden = encoder(**made, output_hidden_states=True).hidden_states[layer].float()
        return [row[~own] for row, own in zip(F.normalize(hidden, dim=-1), special, strict=True)]

    pairs = [(text, one) for text, several in zip(predictions, references, strict=True) for one in several]
    scores: list[tuple[float, float, float]] = []
    for i in range(0, len(pairs), batch_size):
        some = pairs[i : i + batch_size]
        for said, right in zip(vectors([said for said, _ in some]), vectors([one for _, one in some]), strict=True):
            scores.append(_matched(said @ right.T))
    several_scores = iter(scores)
    best = [max((next(several_scores) for _ in several), key=lambda score: score[2]) for several in references]
    means = np.mean(best, axis=0).tolist()
    return {f"bert_score_{name}": mean for name, mean in zip(("precision", "recall", "fmeasure"), means, strict=True)}


def _matched(similarity: Tensor) -> tuple[float, float, float]:
    """Precision, recall and F of each token with the one that is most like it. similarity: (said, right)."""
    if not similarity.numel():
        return 0.0, 0.0, 0.0
    precision, recall = similarity.amax(1).mean().item(), similarity.amax(0).mean().item()
    return precision, recall, 2 * precision * recall / (precision + recall) if precision + recall else 0.0
