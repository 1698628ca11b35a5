"""Tokenizers of every kind and tiny configs of every architecture, made here."""

from collections.abc import Callable
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import funneltfm  # noqa: F401  its models are known to the Auto classes
from funneltfm.funnel.hf import FunnelTFMConfig

SENTENCES = (
    "the quick brown fox jumps over the lazy dog . Mr. Smith's unbelievable tokenization isn't easy !",
    "Mary lives in New York , Paris and London ; she works for Acme Corporation since 1999 ? good bad fine",
)
CORPUS = " ".join(SENTENCES).split()
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def word_piece() -> Any:
    """Like BERT's: words of the corpus, and every other word in pieces of a letter or few."""
    letters = sorted({c for word in CORPUS for c in word.lower()})
    words = sorted({word.lower() for word in CORPUS if len(word) < 7})
    pieces = [*BERT, *letters, *(f"##{c}" for c in letters), *words, "un", "##able", "##bel", "##iev", "token"]
    tokenizer = Tokenizer(models.WordPiece({p: i for i, p in enumerate(dict.fromkeys(pieces))}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return _named(tokenizer, *BERT)


def byte_level(add_prefix_space: bool = False) -> Any:
    """Like RoBERTa's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=ROBERTA, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(CORPUS)] * 3, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=add_prefix_space)
    return _named(tokenizer, *(ROBERTA[i] for i in (1, 3, 0, 2, 4)))


def unigram() -> Any:
    """Like XLM-R's: SentencePiece."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=ROBERTA, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator([" ".join(CORPUS)] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return _named(tokenizer, *(ROBERTA[i] for i in (1, 3, 0, 2, 4)))


def _named(tokenizer: Tokenizer, pad: str, unk: str, cls: str, sep: str, mask: str) -> Any:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, unk_token=unk, cls_token=cls, sep_token=sep, mask_token=mask
    )


TOKENIZERS: dict[str, Callable[[], Any]] = {"word_piece": word_piece, "byte_level": byte_level, "unigram": unigram}


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, Any]:
    return {name: make() for name, make in TOKENIZERS.items()}


@pytest.fixture(scope="session")
def tiny_tokenizer(tokenizers: dict[str, Any]) -> Any:
    return tokenizers["word_piece"]


_SIZES = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
_TYPES: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"type_vocab_size": 1},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8},
    "electra": {"embedding_size": 8},
    "albert": {"embedding_size": 8},
    "distilbert": {
        "dim": 16,
        "n_layers": 1,
        "n_heads": 2,
        "hidden_dim": 32,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "seq_classif_dropout": 0.0,
    },
    "camembert": {"type_vocab_size": 1},
    "xlm-roberta": {"type_vocab_size": 1},
    "modernbert": {"global_attn_every_n_layers": 1, "cls_token_id": 2, "sep_token_id": 3},
}
MODEL_TYPES = (*_TYPES, "funnel_tfm")


def tiny_config(model_type: str, vocab_size: int, pad_id: int = 0) -> Any:
    """A config of a tiny model without dropout."""
    if model_type == "funnel_tfm":
        return FunnelTFMConfig(
            block_size="1_1", d_model=32, d_embed=32, n_head=2, d_head=16, d_inner=64, decoder_size="1",
            vocab_size=vocab_size, pad_id=pad_id, dropout=0.0, dropact=0.0, dropatt=0.0,
        )  # fmt: skip
    sizes = {} if model_type == "distilbert" else _SIZES
    more = {"max_position_embeddings": 64, "vocab_size": vocab_size, "pad_token_id": pad_id}
    return transformers.CONFIG_MAPPING[model_type](**(sizes | more | _TYPES[model_type]))


@pytest.fixture(scope="session")
def make_config() -> Callable[..., Any]:
    return tiny_config
