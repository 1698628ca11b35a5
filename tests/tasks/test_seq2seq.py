"""What decoders are given and what it costs, for every kind of encoder-decoder."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from funneltfm.data.text import TextEncoder
from funneltfm.errors import InputError
from funneltfm.tasks.base import IGNORED, Collate, encode_rows, make_tasks
from funneltfm.tasks.heads import Heads
from funneltfm.tasks.seq2seq import decoder_positions, shifted, target_ids
from funneltfm.tasks.summarization import Summarization
from funneltfm.training.model_source import load_config, make_heads
from funneltfm.training.train_config import make_train_args

WRITERS = ("bart", "t5", "mbart", "pegasus", "longt5", "m2m_100", "blenderbot")
ROWS = [
    {"document": "the quick brown fox jumps over the lazy dog", "summary": "fox jumps"},
    {"document": "Mary lives in New York", "summary": "Mary lives in a city ; good"},
    {"document": "", "summary": ""},
]


def made(model: str, tokenizer: Any, make_writer: Any, **flags: Any) -> tuple[Summarization, Heads, Any]:
    """A task, its model, and the features of ROWS."""
    args = make_train_args(
        pipeline="summarization", model=model, additional_config_kwargs=make_writer(model), max_sequence_length=32,
        **{"max_target_length": 24, **flags},
    )  # fmt: skip
    task = Summarization(args)
    features = encode_rows([task], ROWS, TextEncoder(tokenizer, 32), "rows")
    torch.manual_seed(0)
    return task, make_heads(args, [task], tokenizer).eval(), features


def tokenizer_for(model: str, tokenizers: dict[str, Any]) -> Any:
    return tokenizers["sentinels" if "t5" in model else "byte_level"]


@pytest.mark.parametrize("model", WRITERS)
def test_the_loss_is_that_of_the_model_itself(model: str, tokenizers: dict[str, Any], make_writer: Any) -> None:
    tokenizer = tokenizer_for(model, tokenizers)
    task, heads, features = made(model, tokenizer, make_writer)
    batch = Collate([task], tokenizer)([features[i] for i in range(3)])
    labels, net = batch["summarization_labels"], heads.models["summarization"]
    assert labels.shape[0] == 3
    assert (labels[2] == IGNORED).any()
    hidden = heads(task.inputs(net, batch))
    logits = task.logits(net, hidden, batch)
    assert len(logits) == (labels != IGNORED).sum() == task.size(batch)
    own = net(**batch["inputs"], decoder_input_ids=shifted(net, labels), use_cache=False).logits
    torch.testing.assert_close(logits, own[labels != IGNORED])
    if model != "mbart":  # what transformers makes of labels has no start of its own there
        whole = net(**batch["inputs"], labels=labels)
        torch.testing.assert_close(task.loss(logits, batch), whole.loss)


@pytest.mark.parametrize("model", WRITERS)
def test_the_decoder_begins_as_the_model_does(model: str, tokenizers: dict[str, Any], make_writer: Any) -> None:
    """T5 and Pegasus with padding, BART with the end of a text, mBART with what the labels end with."""
    tokenizer = tokenizer_for(model, tokenizers)
    _, heads, features = made(model, tokenizer, make_writer)
    net = heads.models["summarization"]
    labels = torch.from_numpy(features[0]["summarization_labels"])[None]
    given = shifted(net, labels)
    pad, end, begin = tokenizer.pad_token_id, labels[0, -1].item(), tokenizer.cls_token_id
    first = {"t5": pad, "longt5": pad, "pegasus": pad, "bart": end, "mbart": end, "m2m_100": end, "blenderbot": begin}
    assert given[0].tolist() == [first[model], *labels[0, :-1].tolist()]
    assert net.generation_config.decoder_start_token_id == first[model]
    assert net.generation_config.eos_token_id == end
    assert net.generation_config.pad_token_id == pad
    padded = torch.tensor([[*labels[0].tolist(), IGNORED, IGNORED]])
    assert shifted(net, padded)[0, : labels.shape[1]].tolist() == given[0].tolist()
    assert shifted(net, padded).min() >= 0


def test_targets_end_and_are_cut_before_their_end(tokenizers: dict[str, Any]) -> None:
    for kind, before, after in (("byte_level", [0], [2]), ("sentinels", [], [1]), ("word_piece", [2], [3])):
        text = TextEncoder(tokenizers[kind], 64)
        whole, empty = target_ids(["the lazy dog jumps", ""], text)
        bare = tokenizers[kind]("the lazy dog jumps", add_special_tokens=False)["input_ids"]
        assert whole == [*before, *bare, *after]
        assert empty == [*before, *after]
        n = len(before) + 3
        assert target_ids(["the lazy dog jumps"], text, n) == [[*before, *bare[:2], *after]]
        with pytest.raises(InputError, match=f"--max_target_length={n - 3} leaves no room"):
            target_ids(["the"], text, n - 3)
    assert target_ids([], text) == []


def test_targets_have_the_language_that_the_tokenizer_gives_them() -> None:
    """mBART's: a text ends with its language, a target with that of the targets."""
    words = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581the", -1.0), ("\u2581a", -1.0)]
    tokenizer = transformers.MBartTokenizer(vocab=words, src_lang="en_XX", tgt_lang="ro_RO")
    ids = target_ids(["the the"], TextEncoder(tokenizer, 16))[0]
    assert tokenizer.convert_ids_to_tokens(ids) == ["\u2581the", "\u2581the", "</s>", "ro_RO"]
    assert tokenizer("the")["input_ids"][-1] == tokenizer.convert_tokens_to_ids("en_XX")


def test_padding_at_the_left_changes_nothing(tokenizers: dict[str, Any], make_writer: Any) -> None:
    """For T5, whose positions are relative; targets are filled up at the right all the same."""
    tokenizer = tokenizers["sentinels"]
    task, heads, features = made("t5", tokenizer, make_writer)
    net = heads.models["summarization"]
    said = []
    for side in ("right", "left"):
        tokenizer.padding_side = side
        batch = Collate([task], tokenizer)([features[i] for i in range(3)])
        assert (batch["summarization_labels"][:, 0] != IGNORED).all()
        assert (batch["inputs"]["attention_mask"][1:, 0 if side == "left" else -1] == 0).all()
        said.append((task.logits(net, heads(task.inputs(net, batch)), batch), task.generate(net, batch)))
    tokenizer.padding_side = "right"
    torch.testing.assert_close(said[0][0], said[1][0])
    assert torch.equal(said[0][1], said[1][1])


def test_special_ids_of_a_config_from_scratch(tokenizers: dict[str, Any], make_writer: Any, tmp_path: Path) -> None:
    """With BERT's tokenizer, which has separators in place of an end."""
    flags: dict[str, Any] = {"pipeline": "denoising", "model": "bart", "max_sequence_length": 32}
    tokenizer, keys = tokenizers["word_piece"], make_writer("bart")
    tasks = make_tasks("denoising", make_train_args(**flags))
    config = load_config(make_train_args(**flags, additional_config_kwargs=keys), tasks, tokenizer)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (2, 3, 0)
    assert (config.decoder_start_token_id, config.forced_eos_token_id) == (3, 3)
    own = transformers.BartConfig(vocab_size=50, decoder_start_token_id=44, d_model=16)
    own.save_pretrained(tmp_path)
    config = load_config(make_train_args(pipeline="denoising", pre_trained_config=str(tmp_path)), tasks, tokenizer)
    assert (config.decoder_start_token_id, config.forced_eos_token_id) == (44, 3)  # a language stays
    keys = (*keys, "decoder_start_token_id=2")
    assert (
        load_config(make_train_args(**flags, additional_config_kwargs=keys), tasks, tokenizer).decoder_start_token_id
        == 2
    )


@pytest.mark.parametrize("pipeline", ["denoising", "summarization"])
def test_models_that_write_nothing(pipeline: str, tokenizers: dict[str, Any], make_config: Any) -> None:
    (task,) = make_tasks(pipeline, make_train_args(pipeline=pipeline))
    for model_type in ("bert", "funnel_tfm"):
        with pytest.raises(InputError, match=f"needs an encoder-decoder that writes text .*{model_type} is none"):
            task.make_model(None, make_config(model_type, 50))


def test_what_does_not_go() -> None:
    for pipeline in ("summarization+seq_class", "masked_lm+denoising", "denoising+summarization"):
        with pytest.raises(InputError, match=r"needs a model of its own\. Train it alone"):
            make_tasks(pipeline, make_train_args(pipeline=pipeline))
    task = Summarization(make_train_args(pipeline="summarization", max_target_length=20))
    assert decoder_positions(transformers.LEDConfig(max_decoder_position_embeddings=16)) == 16
    assert decoder_positions(transformers.T5Config()) is None
    with pytest.raises(InputError, match="the model's decoder takes 16"):
        task.make_model(None, transformers.BartConfig(max_position_embeddings=16))
