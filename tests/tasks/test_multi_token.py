"""Several tokens at once: which states count, what is written, and that it is saved."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from funneltfm.errors import InputError
from funneltfm.tasks.multi_token import MultiToken

V, END, PAD = 30, 2, 1
SIZES = {"vocab_size": V, "pad_token_id": PAD, "eos_token_id": END, "d_model": 16}
BART = {
    "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64, "init_std": 0.5,
}  # fmt: skip
T5 = {"d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": PAD}


def model_of(kind: str) -> Any:
    torch.manual_seed(1)
    config = transformers.BartConfig(**SIZES, **BART) if kind == "bart" else transformers.T5Config(**SIZES, **T5)
    return transformers.AutoModelForSeq2SeqLM.from_config(config).eval()


def spread(multi: MultiToken) -> MultiToken:
    with torch.no_grad():
        multi.project.weight.normal_(0, 0.5)
    return multi


@pytest.fixture(params=["bart", "t5"])
def model(request: pytest.FixtureRequest) -> Any:
    return model_of(request.param)


INPUTS = {"input_ids": torch.tensor([[5, 6, 7, 8], [9, 10, PAD, PAD]])}
INPUTS["attention_mask"] = (INPUTS["input_ids"] != PAD).long()
DECODER = torch.tensor([[PAD, 11, 12, 13, 14, 15, 16], [PAD, 17, 18, 19, 20, 21, 22]])


def test_one_token_at_once_is_the_model_itself(model: Any) -> None:
    before = model(**INPUTS, decoder_input_ids=DECODER).logits
    MultiToken.on(model, 1, None)
    torch.testing.assert_close(model(**INPUTS, decoder_input_ids=DECODER).logits, before)


def test_logits_are_those_of_every_third_state(model: Any) -> None:
    before = model(**INPUTS, decoder_input_ids=DECODER).logits
    states: list[Any] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda head, given: states.append(given[0]))
    model(**INPUTS, decoder_input_ids=DECODER)
    handle.remove()
    multi = MultiToken.on(model, 3, None)
    logits = model(**INPUTS, decoder_input_ids=DECODER).logits
    assert logits.shape == (2, 9, V)
    for t in range(7):  # it begins with what the model says at the state
        torch.testing.assert_close(logits[:, t], before[:, t // 3 * 3])
    spread(multi)
    logits = model(**INPUTS, decoder_input_ids=DECODER).logits
    bias = getattr(model, "final_logits_bias", torch.zeros(V))
    for t in range(9):
        part = multi.project.weight[t % 3 * 16 : (t % 3 + 1) * 16]
        z = states[0][:, t // 3 * 3] @ part.T
        torch.testing.assert_close(logits[:, t], z @ model.get_output_embeddings().weight.T + bias.view(-1))


def test_a_token_depends_on_nothing_that_is_said_with_it(model: Any) -> None:
    spread(MultiToken.on(model, 3, None))
    before = model(**INPUTS, decoder_input_ids=DECODER).logits
    other = DECODER.clone()
    other[:, 4] = 25  # said by the state at 3, as are those at 4 and 5 of the labels
    after = model(**INPUTS, decoder_input_ids=other).logits
    torch.testing.assert_close(after[:, :6], before[:, :6])
    assert not torch.allclose(after[:, 6:], before[:, 6:])


@pytest.mark.parametrize("longest", [1, 2, 8, 13])
def test_what_is_written_is_what_training_would_say(model: Any, longest: int) -> None:
    """With the cache, and against all states anew each time."""
    multi = spread(MultiToken.on(model, 3, None))
    model.generation_config.eos_token_id = [END, 7]
    model.generation_config.decoder_start_token_id = PAD
    ids = torch.tensor([[PAD], [PAD]])
    while ids.shape[1] < longest:
        ids = torch.cat([ids, model(**INPUTS, decoder_input_ids=ids).logits[:, ids.shape[1] - 1 :].argmax(-1)], 1)
    for row in ids:
        found = [i for i in range(1, len(row)) if row[i] in (END, 7)]
        row[found[0] + 1 if found else len(row) :] = PAD
    written = multi.generate(model, longest, model.get_encoder()(**INPUTS), INPUTS["attention_mask"])
    width = written.shape[1]
    assert width <= longest
    assert torch.equal(written, ids[:, :width])
    assert (ids[:, width:longest] == PAD).all()
    assert not multi.last


def test_it_is_saved(model: Any, tmp_path: Path) -> None:
    spread(MultiToken.on(model, 2, None)).save(tmp_path)
    before = model(**INPUTS, decoder_input_ids=DECODER).logits
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    MultiToken.on(again, 2, str(tmp_path))
    torch.testing.assert_close(again(**INPUTS, decoder_input_ids=DECODER).logits, before)
    with pytest.raises(InputError, match="not for --max_multi_token_predictions=3"):
        MultiToken.on(again, 3, str(tmp_path))
