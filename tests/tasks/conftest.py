"""Tokenizers of every kind and tiny configs of every architecture, made here."""

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import funneltfm  # noqa: F401  its models are known to the Auto classes
from funneltfm.funnel.hf import FunnelTFMConfig
from funneltfm.training import train as train_module

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


def sentinels() -> Any:
    """Like T5's: SentencePiece, an end and no beginning, and sentinels, the last one first."""
    special = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{i}>" for i in range(11, -1, -1))]
    # Written down: a learned one differs from process to process, and may lack a letter.
    words, letters = set(" ".join(CORPUS).split()), set("".join(CORPUS)) - {" "}
    pieces = [*((f"\u2581{word}", -4.0) for word in sorted(words)[::2]), *((x, -8.0) for x in sorted(letters))]
    tokenizer = Tokenizer(models.Unigram([*((x, 0.0) for x in special), ("\u2581", -6.0), *pieces], unk_id=2))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def _named(tokenizer: Tokenizer, pad: str, unk: str, cls: str, sep: str, mask: str) -> Any:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, unk_token=unk, cls_token=cls, sep_token=sep, mask_token=mask
    )


TOKENIZERS: dict[str, Callable[[], Any]] = {"word_piece": word_piece, "byte_level": byte_level, "unigram": unigram}


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, Any]:
    return {name: make() for name, make in TOKENIZERS.items()} | {
        "bert_like": bert_like(),
        "roberta_like": roberta_like(),
        "sentinels": sentinels(),
    }


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


# ---- models that write

_SIDES = {
    "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64,
}  # fmt: skip
_T5 = {"d_kv": 8, "d_ff": 32, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
WRITERS: dict[str, dict[str, Any]] = {
    "bart": _SIDES,
    "t5": _T5,
    "mbart": _SIDES,
    "pegasus": _SIDES,
    "longt5": _T5 | {"local_radius": 3},
    "m2m_100": _SIDES,
    "blenderbot": _SIDES,
}


def writer_flags(model_type: str, **more: Any) -> tuple[str, ...]:
    """--additional_config_kwargs of a tiny encoder-decoder without dropout."""
    still = {} if "t5" in model_type else {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    return tuple(f"{key}={value}" for key, value in (WRITERS[model_type] | still | {"d_model": 16} | more).items())


@pytest.fixture(scope="session")
def make_writer() -> Callable[..., tuple[str, ...]]:
    return writer_flags


@pytest.fixture
def train_cut(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Trains with flags, once in one go and once cut hard before a step and resumed: both must end alike."""

    def go(flags: dict[str, Any], at_step: int) -> None:
        folders = {name: Path(flags["output_dir"]) / name for name in ("whole", "cut")}
        whole = train_module.train(**flags | {"output_dir": str(folders["whole"])})

        def stop(module: Any, batch: Any, batch_idx: int) -> None:
            if module.global_step >= at_step:
                raise InterruptedError

        with monkeypatch.context() as patch:
            patch.setattr(train_module.TaskModule, "on_train_batch_start", stop)
            with pytest.raises(InterruptedError):
                train_module.train(**flags | {"output_dir": str(folders["cut"])})
        more = {"name": "run", "output_dir": str(folders["cut"]), "resume": True}
        resumed = train_module.train(**more, pipeline=flags["pipeline"])
        assert {"valid", "steps"} <= whole.keys()
        assert {name: whole[name] for name in ("valid", "steps")} == {
            name: resumed[name] for name in ("valid", "steps")
        }
        states = [
            torch.load(folder / "checkpoints/run/last.ckpt", weights_only=True)["state_dict"]
            for folder in folders.values()
        ]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        written = [(folder / "predictions/run/valid.jsonl").read_bytes() for folder in folders.values()]
        assert written[0] == written[1]

    return go


# ---- for ranking: letters and a few words

WORDS = (
    "what is the of in a capital river red blue green city sea who where paris rome oslo long big old ? . , ##s ##er"
)
LETTERS = [*"abcdefghijklmnopqrstuvwxyz0123456789"]


def bert_like():
    """WordPiece with [CLS] a [SEP] b [SEP] and token types."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*specials, *WORDS.split(), *LETTERS, *("##" + letter for letter in LETTERS)]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])],
    )
    names = ("pad", "unk", "cls", "sep", "mask")
    return _fast(tokenizer, {f"{name}_token": token for name, token in zip(names, specials, strict=True)}, True)


def roberta_like():
    """Byte-level BPE with <s> a </s></s> b </s> and no token types."""
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    vocab = {piece: i for i, piece in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = ("cls", "pad", "sep", "unk", "mask")
    given = {f"{name}_token": token for name, token in zip(names, specials, strict=True)}
    return _fast(tokenizer, given | {"bos_token": "<s>", "eos_token": "</s>"}, False)


def _fast(tokenizer, specials, types):
    inputs = ["input_ids", "token_type_ids", "attention_mask"] if types else ["input_ids", "attention_mask"]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=inputs, clean_up_tokenization_spaces=False, **specials
    )


_PLAIN = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 200,
}
TINY_CONFIGS = {
    **{name: _PLAIN | {"type_vocab_size": 2} for name in ("bert", "deberta", "deberta-v2")},
    **{name: _PLAIN | {"type_vocab_size": 2, "pad_token_id": 1} for name in ("roberta", "camembert", "xlm-roberta")},
    "electra": _PLAIN | {"embedding_size": 16},
    "albert": _PLAIN | {"embedding_size": 16},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 200},
    "modernbert": _PLAIN | {"global_attn_every_n_layers": 2, "local_attention": 16},
    "funnel_tfm": {
        "block_size": "1_1",
        "d_model": 32,
        "d_embed": 32,
        "n_head": 2,
        "d_head": 16,
        "d_inner": 64,
        "decoder_size": "1",
    },
}
BYTES = ("roberta", "camembert", "xlm-roberta")  # these go with roberta_like


@pytest.fixture(scope="session", params=TINY_CONFIGS)
def tiny(request, tokenizers):
    """Every architecture: (model_type, its small config, a tokenizer that goes with it)."""
    tokenizer = tokenizers["roberta_like" if request.param in BYTES else "bert_like"]
    keys = TINY_CONFIGS[request.param] | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    if request.param == "modernbert":
        keys |= {"cls_token_id": tokenizer.cls_token_id, "sep_token_id": tokenizer.sep_token_id}
    return request.param, transformers.AutoConfig.for_model(request.param, **keys), tokenizer


# ---- for questions: numbers and colours

QUESTION_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
QUESTION_TEXT = [
    "the cat sat on the mat and the dog ran to the house",
    "where is the key of number one two three four five six seven",
    "who has the red green blue ball in the big small box ?",
] * 20
NO_TYPES = {"roberta", "camembert", "xlm_roberta", "distilbert", "modernbert"}  # no token types
_QUESTION_BERT = ("hidden_size=32", "num_hidden_layers=1", "num_attention_heads=2", "intermediate_size=64")
TINY_KWARGS = {
    **dict.fromkeys(
        ("bert", "roberta", "deberta", "deberta_v2", "camembert", "xlm_roberta", "modernbert"), _QUESTION_BERT
    ),
    "electra": (*_QUESTION_BERT, "embedding_size=16"),
    "albert": (*_QUESTION_BERT, "embedding_size=16"),
    "distilbert": ("dim=32", "n_layers=1", "n_heads=2", "hidden_dim=64"),
    "funnel": (
        *("block_size='1_1'", "d_model=32", "d_embed=32", "n_head=2", "d_head=16", "d_inner=64"),
        "decoder_size=1",
    ),
}


def question_bert() -> transformers.PreTrainedTokenizerFast:
    """Lower-case word pieces, [CLS] a [SEP] b [SEP], token types."""
    letters = sorted(set(string.ascii_lowercase + string.digits + string.punctuation))
    words = sorted({word for line in QUESTION_TEXT for word in line.split()} - set(letters))
    pieces = [*QUESTION_SPECIAL, *letters, *(f"##{letter}" for letter in letters), *words]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.decoder = decoders.WordPiece()
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **dict(zip(names, QUESTION_SPECIAL, strict=True))
    )


def question_roberta() -> transformers.PreTrainedTokenizerFast:
    """Byte-level pieces, <s> a </s></s> b </s>, no token types."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(QUESTION_TEXT, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ("bos_token", "pad_token", "eos_token", "unk_token", "mask_token")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token="<s>",
        sep_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
        **dict(zip(names, special, strict=True)),
    )


def question_sentencepiece() -> transformers.PreTrainedTokenizerFast:
    """Pieces that begin with the space before them, <s> a </s> b </s>."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(models.Unigram([(piece, 0.0) for piece in special], unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(QUESTION_TEXT, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=False)
    names = ("bos_token", "pad_token", "eos_token", "unk_token", "mask_token")
    more = dict(zip(names, special, strict=True))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, cls_token="<s>", sep_token="</s>", **more)


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[[str], transformers.PreTrainedTokenizerFast]:
    """A new one of a kind: "bert", "roberta" or "sentencepiece"."""
    kinds = {"bert": question_bert, "roberta": question_roberta, "sentencepiece": question_sentencepiece}
    return lambda kind: kinds[kind]()


@pytest.fixture(scope="session")
def tokenizer_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the tokenizers, by the name of each model."""
    folder = tmp_path_factory.mktemp("tokenizers")
    question_bert().save_pretrained(folder / "bert")
    question_roberta().save_pretrained(folder / "roberta")
    return {name: folder / ("roberta" if name in NO_TYPES else "bert") for name in TINY_KWARGS}


@pytest.fixture(scope="session")
def tiny_kwargs() -> dict[str, tuple[str, ...]]:
    """additional_config_kwargs of a tiny model, by its name."""
    return TINY_KWARGS
