"""Scores of written texts are those of the packages and formulas."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from funneltfm.errors import InputError
from funneltfm.summaries import ROUGES, bert_score, rouge, sacrebleu, sentences

SAID = ["They were running home. The cats sat on a mat.", "two dogs", "", "a cat"]
RIGHT = [
    ["A cat sat on the mat. It runs home."],
    ["three dogs", "two big dogs", "nothing"],
    ["something"],
    ["a cat", "the cat"],
]


@pytest.fixture
def rouge_scorer():
    return pytest.importorskip("rouge_score.rouge_scorer")


def test_sentences() -> None:
    assert sentences("One. Two!  Three?\nFour\n\n 3.5 five.") == ["One.", "Two!", "Three?", "Four", "3.5 five."]
    assert sentences("") == sentences(" \n ") == []


def test_rouge_is_that_of_the_package(rouge_scorer, monkeypatch) -> None:
    scorer = rouge_scorer.RougeScorer(list(ROUGES), use_stemmer=True)
    broken = [text.replace(". ", ".\n") for text in SAID], [[t.replace(". ", ".\n") for t in some] for some in RIGHT]
    kept: dict[str, list[float]] = {}
    for said, right in zip(*broken, strict=True):
        for kind in ROUGES:
            best = max((scorer.score(one, said)[kind] for one in right), key=lambda score: score.fmeasure)
            for part in ("precision", "recall", "fmeasure"):
                kept.setdefault(f"{kind}_{part}", []).append(getattr(best, part))
    with monkeypatch.context() as patch:  # what absl logs puts a handler on the root logger: all lines would come twice
        patch.setattr(rouge_scorer.logging, "info", None)
        found = rouge(SAID, RIGHT)
    assert found.keys() == kept.keys()
    assert {name: pytest.approx(np.mean(values), abs=1e-12) for name, values in kept.items()} == found
    assert found["rougeL_fmeasure"] != found["rougeLsum_fmeasure"]  # so the sentences count


def test_rouge_by_hand(rouge_scorer) -> None:
    found = rouge(["a b c d"], [["a c b d e"]])
    assert found["rouge1_precision"] == 1
    assert found["rouge1_recall"] == 4 / 5
    assert found["rouge2_fmeasure"] == 0
    assert found["rougeL_precision"] == 3 / 4  # a b d, or a c d


def test_bleu_is_that_of_the_package() -> None:
    package = pytest.importorskip("sacrebleu")
    streams = [[some[i] if i < len(some) else None for some in RIGHT] for i in range(3)]
    assert sacrebleu(SAID, RIGHT) == package.corpus_bleu(SAID, streams).score
    assert sacrebleu(["the cat sat on a mat"], [["nothing", "the cat sat on a mat"]]) == pytest.approx(100)


def test_what_is_not_installed(monkeypatch) -> None:
    for name in ("rouge_score", "sacrebleu"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"pip install 'funneltfm\[generation\]'"):
        rouge(SAID, RIGHT)
    with pytest.raises(InputError, match=r"pip install 'funneltfm\[generation\]'"):
        sacrebleu(SAID, RIGHT)


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    texts = [*SAID, *(text for several in RIGHT for text in several)]
    words = sorted({word for text in texts for word in re.findall(r"\w+|\.", text.lower())})
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    transformers.BertTokenizer(vocab=str(vocabulary)).save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words) + 5, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        initializer_range=1.0, max_position_embeddings=32,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(tmp_path)
    return tmp_path


def test_bert_score_is_its_formula(encoder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
    model = transformers.AutoModel.from_pretrained(encoder).eval()

    def vectors(text: str) -> np.ndarray:
        with torch.no_grad():
            made = tokenizer(text, return_tensors="pt")
            hidden = model(**made, output_hidden_states=True).hidden_states[1][0, 1:-1].double().numpy()
        return hidden / np.linalg.norm(hidden, axis=1, keepdims=True)

    best = []
    for said, right in zip(SAID, RIGHT, strict=True):
        scores = []
        for one in right:
            similar = vectors(said) @ vectors(one).T
            if not similar.size:
                scores.append((0.0, 0.0, 0.0))
                continue
            precision, recall = similar.max(1).mean(), similar.max(0).mean()
            scores.append((precision, recall, 2 * precision * recall / (precision + recall)))
        best.append(max(scores, key=lambda score: score[2]))
    expected = dict(zip(("precision", "recall", "fmeasure"), np.mean(best, axis=0), strict=True))
    for batch_size in (1, 3, 32):
        found = bert_score(SAID, RIGHT, str(encoder), 1, batch_size=batch_size)
        assert found == {f"bert_score_{name}": pytest.approx(value, abs=1e-5) for name, value in expected.items()}
    assert bert_score(["the cat"], [["the cat"]], str(encoder), 2)["bert_score_fmeasure"] == pytest.approx(1)
    assert bert_score(["the cat " * 40], [["the"]], str(encoder), 2)  # too long: cut


def test_bert_score_without_its_encoder(encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"BERTScore cannot load the encoder .*--bert_score_model"):
        bert_score(SAID, RIGHT, str(tmp_path / "nothing"), 1)
    with pytest.raises(InputError, match="must be from 0 to 2"):
        bert_score(SAID, RIGHT, str(encoder), 3)


def test_bert_score_loads_its_encoder_once(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = bert_score(SAID, RIGHT, str(encoder), 1)
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", None)
    assert bert_score(SAID, RIGHT, str(encoder), 1) == first
