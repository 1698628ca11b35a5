"""One encoder under the heads of several models, of every architecture."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from funneltfm.tasks.heads import Heads, backbone_of, n_token_types, replayed, selected

AUTO = {
    "masked_lm": "AutoModelForMaskedLM",
    "seq_class": "AutoModelForSequenceClassification",
    "token_class": "AutoModelForTokenClassification",
    "question_answering": "AutoModelForQuestionAnswering",
}
MODEL_TYPES = (
    *("bert", "roberta", "deberta", "deberta-v2", "electra", "albert", "distilbert", "camembert", "xlm-roberta"),
    *("modernbert", "funnel_tfm"),
)
IDS = torch.tensor([[2, 8, 9, 10, 11, 3, 0, 0], [2, 12, 13, 14, 15, 16, 17, 3]])
INPUTS = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}


@pytest.fixture(params=MODEL_TYPES)
def models(request: Any, make_config: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    config = make_config(request.param, 40)
    return {name: getattr(transformers, auto).from_config(config) for name, auto in AUTO.items()}


def logits_of(output: Any) -> Tensor:
    """Question answering has no `logits`."""
    return output.logits if "logits" in output else torch.stack([output.start_logits, output.end_logits], -1)


def test_replaying_is_the_model_itself(models: dict[str, Any]) -> None:
    for model in models.values():
        model.eval()
        expected = logits_of(model(**INPUTS))
        hidden = backbone_of(model)(**INPUTS)
        with replayed(model, hidden):
            torch.testing.assert_close(logits_of(model(**INPUTS)), expected)
        assert "forward" not in vars(backbone_of(model))
        torch.testing.assert_close(logits_of(model(**INPUTS)), expected)


def test_an_error_within_leaves_the_model_as_it_was(models: dict[str, Any]) -> None:
    model = models["seq_class"]
    with pytest.raises(ZeroDivisionError), replayed(model, None):
        _ = 1 / 0
    assert logits_of(model(**INPUTS)).shape == (2, 2)


def test_logits_of_selected_tokens_are_those_of_all(models: dict[str, Any]) -> None:
    model = models["masked_lm"].eval()
    chosen = torch.zeros_like(IDS, dtype=torch.bool)
    chosen[0, [1, 4]] = chosen[1, [2, 6, 7]] = True
    few = {name: tensor[:1, :1] for name, tensor in INPUTS.items()}
    hidden = backbone_of(model)(**INPUTS)
    for choice in (chosen, ~chosen, chosen & False, chosen | True):
        with replayed(model, selected(hidden, choice)):
            logits = model(**few).logits
        assert logits.shape == (1, int(choice.sum()), 40)
        torch.testing.assert_close(logits[0], model(**INPUTS).logits[choice])


def test_all_heads_share_one_encoder(models: dict[str, Any]) -> None:
    heads = Heads(dict(models)).eval()
    assert len({id(backbone_of(model)) for model in heads.models.values()}) == 1
    counts = [sum(p.numel() for p in backbone_of(model).parameters()) for model in heads.models.values()]
    assert sum(p.numel() for p in heads.parameters()) > counts[0]  # parameters() gives each once
    hidden = heads(INPUTS)
    for model in heads.models.values():
        with replayed(model, hidden):
            one = logits_of(model(**INPUTS))
        torch.testing.assert_close(one, logits_of(model(**INPUTS)))
    with torch.no_grad():
        hidden = heads(INPUTS)
    with replayed(heads.models["masked_lm"], hidden):
        heads.models["masked_lm"](**INPUTS).logits.square().sum().backward()
    assert heads.backbone.get_input_embeddings().weight.grad.abs().sum() > 0  # type: ignore[operator]  still tied


def test_a_step_moves_encoder_and_heads(models: dict[str, Any]) -> None:
    heads = Heads(dict(models)).train()
    hidden = heads(INPUTS)
    loss = torch.zeros(())
    for model in heads.models.values():
        with replayed(model, hidden):
            loss = loss + logits_of(model(**INPUTS)).square().mean()
    loss.backward()
    without = {name for name, p in heads.named_parameters() if p.grad is None}
    assert len(without) < len(list(heads.parameters()))
    embedding = heads.backbone.get_input_embeddings().weight  # type: ignore[operator]
    assert embedding.grad.abs().sum() > 0
    for name, model in heads.models.items():
        own = [p for n, p in model.named_parameters() if not n.startswith(model.base_model_prefix)]
        assert own, name
        assert all(p.grad is not None for p in own), name


def test_token_types(make_config: Any) -> None:
    known = {kind: n_token_types(transformers.AutoModel.from_config(make_config(kind, 40))) for kind in MODEL_TYPES}
    assert {kind for kind, n in known.items() if n == 2} == {"bert", "electra", "albert"}
    assert {kind for kind, n in known.items() if n in (0, 1)} == {
        *("roberta", "camembert", "xlm-roberta"),  # as published: a table of one row
        *("deberta", "deberta-v2"),  # as published: none
        *("distilbert", "modernbert"),
    }
    assert known["funnel_tfm"] > 100
