"""Distillation: the loss against its formula, and heads that compute what counts and nothing else."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funneltfm.errors import InputError
from funneltfm.sparse.config import SparsityConfig
from funneltfm.sparse.distill import Distilled, at, distillation_loss, heads_see, logits_at
from funneltfm.sparse.masks import attach, densities

Make = Callable[..., nn.Module]


class Classifier(nn.Module):
    """A module without anything of `transformers`."""

    def __init__(self, seed: int = 0, classes: int = 3) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table, self.head, self.dropout = nn.Embedding(20, 8), nn.Linear(8, classes), nn.Dropout(0.5)

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(self.dropout(self.table(ids).mean(dim=1)))
        return logits if labels is None else (F.cross_entropy(logits, labels), logits)


IDS = torch.arange(24).view(4, 6) % 20
LABELS = torch.tensor([0, 1, 2, 0])


def token_batch(vocabulary: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, vocabulary, (3, 8), generator=generator)
    labels = ids.masked_fill(torch.rand(3, 8, generator=generator) > 0.3, -100)
    assert 2 < (labels != -100).sum() < 12
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


# ---- the loss


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_loss_is_its_formula(temperature: float) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    q, p = (t / temperature for t in (teacher, student))
    q, p = q.exp() / q.exp().sum(-1, keepdim=True), p.exp() / p.exp().sum(-1, keepdim=True)
    expected = temperature**2 * (q * (q / p).log()).sum(-1).mean()
    assert distillation_loss(student, [teacher], temperature).item() == pytest.approx(expected.item(), rel=1e-5)
    assert distillation_loss(student, [student], temperature).item() == pytest.approx(0, abs=1e-6)


def test_the_gradient_at_temperature_1_is_that_of_cross_entropy_with_soft_targets() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
    (ours,) = torch.autograd.grad(distillation_loss(student, [teacher]), student)
    (soft,) = torch.autograd.grad(F.cross_entropy(student, teacher.softmax(-1)), student)
    assert torch.allclose(ours, soft, atol=1e-7)


def test_several_teachers_are_a_mean_of_probabilities() -> None:
    torch.manual_seed(0)
    student, first, second = torch.randn(3, 4, 7)
    mean = (0.25 * first.softmax(-1) + 0.75 * second.softmax(-1)).log()
    expected = distillation_loss(student, [mean])
    assert torch.allclose(distillation_loss(student, [first, second], weights=[1, 3]), expected, atol=1e-6)


def test_nothing_that_counts_is_no_loss() -> None:
    logits = torch.randn(0, 7, requires_grad=True)
    loss = distillation_loss(logits, [logits])
    assert loss == 0
    loss.backward()


def test_schedules() -> None:
    assert at(0.3, 0.9) == 0.3
    assert at((1.0, 0.0), 0.25) == 0.75
    assert at(lambda progress: progress**2, 0.5) == 0.25


# ---- the wrapper


def test_without_weight_it_is_the_plain_loss() -> None:
    student, plain = Classifier(), Classifier()
    distilled = Distilled(student, [Classifier(1)], weight=0.0).train()
    torch.manual_seed(5)
    loss = distilled(ids=IDS, labels=LABELS).loss
    torch.manual_seed(5)
    expected = F.cross_entropy(plain(IDS), LABELS)
    assert torch.allclose(loss, expected)
    loss.backward()
    expected.backward()
    for ours, theirs in zip(student.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad)


def test_soft_and_hard_are_mixed() -> None:
    distilled = Distilled(Classifier(), [Classifier(1)], weight=(1.0, 0.5), temperature=(1.0, 3.0)).train()
    distilled.student.dropout.p = 0.0
    for progress, weight, temperature in ((0.0, 1.0, 1.0), (0.5, 0.75, 2.0), (1.0, 0.5, 3.0)):
        distilled.progress = progress
        out = distilled(ids=IDS, labels=LABELS)
        teacher = distilled.teachers[0](IDS)
        assert torch.allclose(out.soft_loss, distillation_loss(out.logits, [teacher], temperature))
        assert torch.allclose(out.hard_loss, F.cross_entropy(out.logits, LABELS))
        assert torch.allclose(out.loss, weight * out.soft_loss + (1 - weight) * out.hard_loss)


def test_teachers_are_frozen_and_belong_to_nobody() -> None:
    teacher = Classifier(1).train()
    before = copy.deepcopy(teacher.state_dict())
    distilled = Distilled(Classifier(), [teacher])
    names = {name for name, _ in Classifier().named_parameters()}
    assert (
        set(distilled.state_dict())
        == {f"student.{name}" for name in names}
        == dict(distilled.named_parameters()).keys()
    )
    distilled.train()
    assert not teacher.training
    optimizer = torch.optim.SGD(distilled.parameters(), 0.1)
    distilled(ids=IDS, labels=LABELS).loss.backward()
    optimizer.step()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(teacher.state_dict()[name], before[name]) for name in before)
    attach(distilled, SparsityConfig(sparsity=0.5))  # prunes the student alone
    assert list(densities(distilled).weights) == ["student.head.weight"]
    distilled.half()
    assert distilled.student.head.weight.dtype == torch.float16
    assert teacher.head.weight.dtype == torch.float32
    distilled.to("meta")
    assert teacher.head.weight.device.type == "meta"  # it goes where the student goes


def test_evaluation_is_the_student_s_own() -> None:
    student = Classifier()
    distilled = Distilled(student, [Classifier(1)]).eval()
    assert torch.equal(distilled(ids=IDS), student(IDS))
    assert torch.equal(distilled(ids=IDS, labels=LABELS)[0], F.cross_entropy(student(IDS), LABELS))
    assert isinstance(distilled.train()(ids=IDS), Tensor)


def test_a_task_s_own_loss() -> None:
    distilled = Distilled(Classifier(), [Classifier(1)], 0.0, hard_loss=lambda logits, labels: logits.sum() * 0 + 7)
    assert distilled(ids=IDS, labels=LABELS).loss == 7


@pytest.mark.parametrize("model", ["bert", "funnel"])
def test_chosen_positions_before_the_heads_are_those_chosen_after(model: str, bert: Make, funnel_lm: Make) -> None:
    make = bert if model == "bert" else funnel_lm
    student, teacher = make(), make()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.5)
    batch = token_batch(40)
    chosen = batch["labels"] != -100
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    rows = []
    head = student.cls if model == "bert" else student.lm_head
    handle = head.register_forward_hook(lambda _, args, __: rows.append(args[0].shape[:2]))
    distilled = Distilled(student, [teacher], weight=0.5, temperature=2.0).train()
    out = distilled(**batch)
    handle.remove()
    assert rows == [(1, int(chosen.sum()))]
    full, target = student(**inputs).logits[chosen], teacher(**inputs).logits[chosen]
    assert torch.allclose(out.logits, full, atol=1e-6)
    hard = F.cross_entropy(full, batch["labels"][chosen])
    expected = 0.5 * distillation_loss(full, [target], 2.0) + 0.5 * hard
    assert torch.allclose(out.loss, expected, atol=1e-6)
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    expected.backward()
    for name, parameter in student.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(grads[name], parameter.grad, atol=1e-6), name
    assert torch.allclose(student(**batch).loss, hard, atol=1e-6)  # the hook is gone


def test_a_batch_without_masked_tokens(bert: Make) -> None:
    batch = token_batch(40)
    batch["labels"].fill_(-100)
    out = Distilled(bert(), [bert()], weight=0.5).train()(**batch)
    assert out.loss == 0
    out.loss.backward()


def test_a_module_without_an_encoder_computes_all() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(20, 5)

        def forward(self, ids: Tensor) -> Tensor:
            return self.table(ids)

    tagger, chosen = Tagger(), IDS % 2 == 0
    with heads_see(tagger, chosen) as cut:
        assert not cut
    assert torch.equal(logits_at(tagger, {"ids": IDS}, chosen), tagger(IDS)[chosen])


def test_pooled_states_have_no_tokens_to_choose(bert: Make) -> None:
    model = bert()
    with pytest.raises(InputError, match=r"states \(4, 6\) are not those of the labels \(4, 3\)"):
        logits_at(model, {"input_ids": IDS}, torch.ones(4, 3, dtype=torch.bool))
    assert model(input_ids=IDS).logits.shape == (4, 6, 60)


def test_hooks_are_gone_after_an_error(bert: Make) -> None:
    model = bert()
    with pytest.raises(InputError), heads_see(model, torch.ones(4, 3, dtype=torch.bool)):
        model(input_ids=IDS)
    assert not model.bert._forward_hooks


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teachers": []}, "at least one teacher"),
        ({"weight": 1.5}, "from 0 to 1; got 1.5 at progress 0.0"),
        ({"weight": (1.0, -1.0)}, "from 0 to 1; got -1.0 at progress 1.0"),
        ({"temperature": (1.0, 0.0)}, "temperature must be above 0; got 0.0 at progress 1.0"),
        ({"teacher_weights": [1.0, 1.0]}, "one positive number for each of the 1 teachers"),
        ({"teacher_weights": [0.0]}, "one positive number"),
    ],
)
def test_what_cannot_be_asked_for(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Distilled(Classifier(), **({"teachers": [Classifier()]} | settings))


def test_labels_that_name_no_class() -> None:
    with pytest.raises(InputError, match=r"labels that name a class; got torch\.float32"):
        Distilled(Classifier(), [Classifier(1)])(ids=IDS, labels=LABELS.float())


def test_a_teacher_of_other_classes() -> None:
    distilled = Distilled(Classifier(), [Classifier(), Classifier(1, classes=4)])
    with pytest.raises(InputError, match=r"teacher 1 gives logits of the shape \(4, 4\), the student \(4, 3\)"):
        distilled(ids=IDS, labels=LABELS)
