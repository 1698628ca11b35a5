import copy

import numpy as np
import pytest
import torch
import transformers
from tokenizers import processors

from funneltfm.data.features import Features, pad
from funneltfm.data.text import Pieces, TextEncoder
from funneltfm.errors import InputError
from funneltfm.tasks.heads import Heads
from funneltfm.tasks.joint import JointHead, JointModel, encoder_of, first_states, packed, separated

KINDS = ("IE_1", "IE_k", "AE_1", "AE_k", "RE_k")
EMPTY = Pieces([], [], [])


def lay_out(lay_out, texts, text):
    """An example of texts; None is a missing candidate."""
    pieces = text.pieces([one for one in texts if one is not None])
    return lay_out([EMPTY if one is None else next(pieces) for one in texts], text)


def tokens_of(example, text):
    return " ".join(text.tokenizer.convert_ids_to_tokens(example["input_ids"]))


def starts_of(example):
    return np.flatnonzero(example["segment_starts"]).tolist()


# ---- inputs


def test_packed_joins_texts_as_the_tokenizer_does(tokenizers):
    text = TextEncoder(tokenizers["bert_like"], 32)
    example = lay_out(packed, ["what is red ?", "red is red", "blue"], text)
    assert tokens_of(example, text) == "[CLS] what is red ? [SEP] red is red [SEP] blue [SEP]"
    assert starts_of(example) == [0, 6, 10]
    assert example["token_type_ids"] == [0] * 6 + [1] * 6

    text = TextEncoder(tokenizers["roberta_like"], 32)
    example = lay_out(packed, ["a b", "cd", "e"], text)
    assert tokens_of(example, text) == "<s> a \u0120 b </s> </s> c d </s> </s> e </s>"
    assert starts_of(example) == [0, 6, 10]
    assert "token_type_ids" not in example


def test_packed_cuts_the_longest_first(tokenizers):
    text = TextEncoder(tokenizers["bert_like"], 12)
    example = lay_out(packed, ["who is it", "red " * 20, "big city"], text)
    assert tokens_of(example, text) == "[CLS] who is i [SEP] red red red [SEP] big city [SEP]"
    assert starts_of(example) == [0, 5, 9]


def test_a_candidate_without_pieces_starts_at_its_separator(tokenizers):
    text = TextEncoder(tokenizers["bert_like"], 32)
    example = lay_out(packed, ["who", "", "red", None, None], text)
    assert tokens_of(example, text) == "[CLS] who [SEP] [SEP] red [SEP] [SEP] [SEP]"
    assert starts_of(example) == [0, 3, 4, 6, 7]


def test_separated_texts_start_at_multiples_of_the_length(tokenizers):
    text = TextEncoder(tokenizers["bert_like"], 6)
    example = lay_out(separated, ["what is red ?", "red " * 20, "", None], text)
    assert tokens_of(example, text) == (
        "[CLS] what is red ? [SEP] [CLS] red red red red [SEP] "
        "[CLS] [SEP] [PAD] [PAD] [PAD] [PAD] [CLS] [SEP] [PAD] [PAD] [PAD] [PAD]"
    )
    assert starts_of(example) == [0, 6, 12, 18]
    assert example["attention_mask"] == [1] * 12 + [1, 1, 0, 0, 0, 0] * 2
    assert example["token_type_ids"] == [0] * 6 + [1] * 18
    assert {len(values) for values in example.values()} == {24}


def test_extended_token_types_are_one_for_each_segment(tokenizers):
    text = TextEncoder(tokenizers["bert_like"], 4, token_types=(0, 1, 2))
    assert lay_out(separated, ["red", "blue", None], text)["token_type_ids"] == [0] * 4 + [1] * 4 + [2] * 4
    text = TextEncoder(tokenizers["roberta_like"], 16, token_types=(0, 1, 2))
    assert lay_out(packed, ["r", "b", None], text)["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1, 2]
    with pytest.raises(InputError, match="has 3 types, but there are 4 texts"):
        lay_out(packed, ["r", "b", None, None], text)


def test_packed_needs_a_separator(tokenizers):
    plain = copy.deepcopy(tokenizers["bert_like"])
    plain.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    with pytest.raises(InputError, match="no separator"):
        lay_out(packed, ["red", "blue"], TextEncoder(plain, 16))


# ---- heads


def reference(kind, head, h, k, real):
    """2.9 of the specification, row by row, without dropout."""

    def f(u):
        return head.W2.weight @ torch.tanh(head.W1.weight @ u + head.W1.bias) + head.W2.bias

    rows = []
    for b in range(len(h)):
        if kind == "IE_1":
            rows.append(f(h[b, 0]))
        elif kind == "AE_1":
            rows.append(f(sum(h[b, j] for j in range(k + 1) if real[b, j])))
        elif kind == "RE_k":
            rows.append(f(h[b, 0]).reshape(k, 2))
        elif kind == "IE_k":
            rows.append(torch.stack([f(h[b, j]) for j in range(1, k + 1)]))
        else:
            rows.append(torch.stack([f(torch.cat([h[b, 0], h[b, j]])) for j in range(1, k + 1)]))
    return torch.stack(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_head_formulas(kind):
    torch.manual_seed(0)
    k, head = 3, JointHead(kind, 3, 8, 2, dropout=0.5, std=0.5).eval()
    torch.nn.init.normal_(head.W1.bias)
    torch.nn.init.normal_(head.W2.bias)
    h, real = torch.randn(4, k + 1, 8), torch.tensor([[1, 1, 1, 0]] * 2 + [[1, 1, 1, 1]] * 2).bool()
    logits = head(h, real)
    assert logits.shape == ((4, 2) if kind.endswith("1") else (4, k, 2))
    torch.testing.assert_close(logits, reference(kind, head, h, k, real))
    head.train()
    assert not torch.equal(head(h, real), head(h, real))  # dropout is there


def test_first_states_whichever_side_is_padded(tokenizers):
    text = TextEncoder(tokenizers["bert_like"], 32)
    examples = [lay_out(packed, texts, text) for texts in (["who", "red ?", "a"], ["what is it", "big big sea", "a b"])]
    ids = [example["input_ids"] for example in examples]
    length = max(map(len, ids))
    expected = torch.tensor([[one[i] for i in starts_of(example)] for one, example in zip(ids, examples, strict=True)])
    for left in (False, True):
        hidden = pad(ids, 0, length, left)[..., None].float()
        starts = pad([example["segment_starts"] for example in examples], 0, length, left)
        assert torch.equal(first_states(hidden, starts, 2)[..., 0].long(), expected)
    with pytest.raises(InputError, match="needs its decoder"):
        first_states(hidden[:, ::2], starts, 2)


# ---- models


def batch_of(examples, tokenizer):
    features = Features.of(examples)
    rows = [features[i] for i in range(len(features))]
    length = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": tokenizer.pad_token_id}
    names = [name for name in ("input_ids", "token_type_ids", "segment_starts") if name in rows[0]]
    batch = {name: pad([row[name] for row in rows], fill.get(name, 0), length) for name in names}
    mask = [row.get("attention_mask", np.ones_like(row["input_ids"])) for row in rows]
    return batch | {"attention_mask": pad(mask, 0, length)}


def joint_model(config, kind, k=2):
    keys = config.to_dict() | {"classification_head_type": kind, "joint_k": k, "num_labels": 2}
    torch.manual_seed(0)
    return JointModel(encoder_of(None, type(config).from_dict(keys)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_encoder_learns_with_every_parameter(tiny, kind, tmp_path):
    """A parameter without gradient (a pooler that nothing reads) would stop training in several processes."""
    name, config, tokenizer = tiny
    model = joint_model(config, kind).train()
    heads = Heads({"answer_selection": model})
    assert heads.backbone is model.encoder
    text = TextEncoder(tokenizer, 16)
    texts = [["who is red", "red is it", "the sea"], ["where", "blue", None]]
    for form in (packed, separated):
        batch = batch_of([lay_out(form, row, text) for row in texts], tokenizer)
        heads.zero_grad()
        model(**batch).square().sum().backward()
        idle = [key for key, p in heads.named_parameters() if p.requires_grad and p.grad is None]
        assert not idle, (name, form.__name__, idle)

    model.eval().save_pretrained(tmp_path)
    again = JointModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(**batch), model(**batch), rtol=0, atol=0)
    del batch["segment_starts"]
    encoder = transformers.AutoModel.from_pretrained(tmp_path).eval()
    states, expected = (one(**batch).last_hidden_state for one in (encoder, model.encoder))
    torch.testing.assert_close(states, expected, rtol=0, atol=0)


def test_separated_rows_do_not_depend_on_their_batch(tokenizers):
    config = transformers.BertConfig(
        vocab_size=200, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = joint_model(config, "AE_k").eval()
    text = TextEncoder(tokenizers["bert_like"], 8)
    examples = [lay_out(separated, row, text) for row in (["who", "red", "blue sea"], ["what is it ?", "a " * 9, None])]
    together = model(**batch_of(examples, text.tokenizer))
    for i, example in enumerate(examples):
        torch.testing.assert_close(model(**batch_of([example], text.tokenizer))[0], together[i])


def test_another_head_begins_anew_and_says_so(tmp_path, caplog):
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = joint_model(config, "RE_k", k=3)
    model.save_pretrained(tmp_path)
    wanted = type(config).from_dict(model.config.to_dict() | {"joint_k": 5})
    other = JointModel.from_pretrained(tmp_path, wanted)
    assert "a new one begins" in caplog.text
    assert other.head.W2.weight.shape == (10, 16)
    key = "encoder.layer.0.output.dense.weight"
    assert torch.equal(other.encoder.state_dict()[key], model.encoder.state_dict()[key])
