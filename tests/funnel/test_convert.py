"""The name tables, both ways; what does not fit is refused."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from funneltfm import FunnelTFM, InputError, ModelConfig
from funneltfm.funnel.convert import (
    HF_HEADS,
    TF_HEADS,
    Parts,
    config_from_hf,
    config_to_hf,
    core_shapes,
    from_hf,
    from_tf,
    hf_names,
    tf_names,
    to_hf,
    to_tf,
)
from funneltfm.funnel.heads import BeamSpanHead, MaskedLMHead, SummaryHead, TokenDetectionHead, TokenHead

FIXTURES = Path(__file__).resolve().parents[2].parent / "shared/fixtures/funnel"
NEEDS_FIXTURES = pytest.mark.skipif(not FIXTURES.is_dir(), reason="needs ../shared/fixtures/funnel")
CASES = ["enc_2_2_2", "dec_2_2_2_d2", "dec_maxpool", "share_dec_2_1x2_1x2_d1x2", "mlm_2_2_2_d2", "electra_2_2_2_d2"]

TINY = ModelConfig(
    vocab_size=19, d_embed=16, d_model=16, n_head=2, d_head=8, d_inner=24, block_size="2_1x2", decoder_size="1",
    separate_cls=True, pool_q_only=True, truncate_seq=True,
)  # fmt: skip


def random_core(config: ModelConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in core_shapes(config).items()}


def random_head(module: torch.nn.Module, name: str) -> dict[str, torch.Tensor]:
    return {f"{name}.{key}": torch.randn_like(value) for key, value in module.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@NEEDS_FIXTURES
@pytest.mark.parametrize("case", CASES)
def test_tf_names_are_those_of_real_checkpoints(case: str) -> None:
    config = ModelConfig.init_from_json(FIXTURES / case / "net_config.json")
    lines = (FIXTURES / case / "variables.txt").read_text().splitlines()
    shapes = {name: json.loads(shape) for name, shape in (line.split("\t") for line in lines if line)}
    expected = {name: list(shape) for name, shape in core_shapes(config).items()}
    assert {ours: shapes[theirs] for ours, theirs in tf_names(config).items()} == expected
    known = set(tf_names(config).values()) | {f"model/{name}" for name in TF_HEADS.values()}
    rest = {name for name in shapes if name.startswith("model/") and "adam" not in name} - known
    assert not rest


@NEEDS_FIXTURES
def test_finetuned_heads_have_their_names() -> None:
    variables = json.loads((FIXTURES / "finetune_head_variables.json").read_text())
    for kind, entries in variables.items():
        tensors = {name: torch.randn(shape) for name, shape in entries}
        config = dataclasses.replace(TINY, d_embed=32, d_model=32)
        core = random_core(config)
        parts = from_tf(to_tf(Parts(config, core)) | tensors, config)
        assert len(parts.heads) == len(entries), kind


@pytest.mark.parametrize(
    "config", [TINY, dataclasses.replace(TINY, d_embed=8), dataclasses.replace(TINY, decoder_size="0")]
)
def test_tf_round_trip(config: ModelConfig) -> None:
    heads = random_head(MaskedLMHead(16, config.d_embed, 19, "gelu"), "lm_head")
    parts = Parts(config, random_core(config), heads)
    again = from_tf(to_tf(parts), config)
    assert equal(again.core, parts.core)
    assert equal(again.heads, parts.heads)
    assert again.config == config


def test_tf_round_trip_of_the_beam_head() -> None:
    heads = random_head(BeamSpanHead(16, 0.1), "beam_head")
    assert set(heads) == {name for name in TF_HEADS if name.startswith("beam_head.")}
    parts = Parts(TINY, random_core(TINY), heads)
    variables = to_tf(parts)
    assert variables["model/end_logits/dense_0/kernel"].shape == (32, 16)
    assert equal(from_tf(variables, TINY).heads, heads)


def test_tf_round_trip_with_generator_and_training_variables() -> None:
    small = dataclasses.replace(TINY, d_model=8, n_head=1, d_inner=12)
    core = random_core(TINY)
    generator_core = random_core(small) | {name: core[name] for name in core if name.startswith("input_layer")}
    generator = Parts(small, generator_core, random_head(MaskedLMHead(8, 16, 19, "gelu"), "lm_head"))
    parts = Parts(TINY, core, random_head(TokenDetectionHead(16, "gelu"), "detection_head"), generator)
    variables = to_tf(parts)
    extra = {
        "global_step": torch.tensor(1),
        "beta1_power": torch.tensor(0.9),
        "model/lm_loss/bias/adam_1": torch.ones(19),
    }
    again = from_tf(variables | extra, TINY)
    assert again.left == sorted(extra)
    assert equal(again.heads, parts.heads)
    assert again.generator is not None
    assert again.generator.config == small
    assert equal(again.generator.core, generator_core)
    assert equal(again.generator.heads, generator.heads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("model/encoder/layer_1/ff/layer_2/bias"), "lacks model/encoder/layer_1/ff/layer_2/bias"),
        (lambda v: v.update({"model/encoder/layer_9/x": torch.ones(1)}), "first model/encoder/layer_9/x"),
        (
            lambda v: v.update({"model/encoder/layer_0/rel_attn/q/kernel": torch.ones(3, 2, 8)}),
            "q_head.weight has shape",
        ),
    ],
)
def test_tf_refuses_what_does_not_fit(change, message: str) -> None:
    variables = to_tf(Parts(TINY, random_core(TINY)))
    change(variables)
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        from_tf(variables, TINY)


HEADS = {
    "detection_head": TokenDetectionHead(16, "gelu"),
    "cls_head": SummaryHead(16, 3, 0.1),
    "lm_head": MaskedLMHead(16, 16, 19, "gelu", transform=False),
    "token_head": TokenHead(16, 5, 0.1),
    "qa_head": TokenHead(16, 2, 0.1),
}


@pytest.mark.parametrize("head", [None, *HEADS])
def test_hf_round_trip(head: str | None) -> None:
    heads = random_head(HEADS[head], head) if head else {}
    config = dataclasses.replace(TINY, num_class={"cls_head": 3, "token_head": 5}.get(head or "", 2))
    parts = Parts(config, random_core(TINY), heads)
    hf_config, state, _ = to_hf(parts)
    again = from_hf(state, hf_config)
    assert equal(again.core, parts.core)
    assert equal(again.heads, parts.heads)
    assert again.config == config


def test_hf_config_round_trip() -> None:
    for change in [
        {},
        {"attn_type": "factorized"},
        {"ff_activation": "relu"},
        {"pooling_type": "max"},
        {"truncate_seq": False},
    ]:
        config = dataclasses.replace(TINY, **change)
        assert config_from_hf(config_to_hf(config)) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder_size": "1x2"}, "decoder repeats"),
        ({"d_embed": 8}, "d_embed != d_model"),
        ({"pooling_size": 3}, "pooling_size 3"),
        ({"pooling_type": "min"}, "pooling_type min"),
    ],
)
def test_hf_refuses_what_it_cannot_express(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        config_to_hf(dataclasses.replace(TINY, **change))


def test_hf_refuses_a_transformed_lm_head() -> None:
    parts = Parts(TINY, random_core(TINY), random_head(MaskedLMHead(16, 16, 19, "gelu"), "lm_head"))
    with pytest.raises(InputError, match=r"no lm_head\.dense"):
        to_hf(parts)


def test_hf_refuses_the_beam_head() -> None:
    parts = Parts(TINY, random_core(TINY), random_head(BeamSpanHead(16, 0.1), "beam_head"))
    with pytest.raises(InputError, match="transformers' Funnel has no beam_head; convert to funneltfm, which has"):
        to_hf(parts)


def test_hf_refuses_strangers() -> None:
    hf_config, state, _ = to_hf(Parts(TINY, random_core(TINY)))
    with pytest.raises(InputError, match="no known part"):
        from_hf(state | {"pooler.weight": torch.ones(1)}, hf_config)
    with pytest.raises(InputError, match="model_type"):
        from_hf(state, {"model_type": "bert"})
    with pytest.raises(InputError, match="hidden_act"):
        from_hf(state, hf_config | {"hidden_act": "silu"})
    del state["encoder.blocks.0.0.attention.r_kernel"]
    with pytest.raises(InputError, match=r"lacks encoder\.blocks\.0\.0\.attention\.r_kernel"):
        from_hf(state, hf_config)


@pytest.mark.parametrize(
    ("head", "model"),
    [
        ("cls_head", "FunnelForSequenceClassification"),
        ("detection_head", "FunnelForPreTraining"),
        ("lm_head", "FunnelForMaskedLM"),
        ("token_head", "FunnelForTokenClassification"),
        ("qa_head", "FunnelForQuestionAnswering"),
        (None, "FunnelModel"),
    ],
)
def test_hf_names_are_those_of_transformers(head: str | None, model: str) -> None:
    transformers = pytest.importorskip("transformers")
    parts = Parts(TINY, random_core(TINY), random_head(HEADS[head], head) if head else {})
    hf_config, state, architecture = to_hf(parts)
    assert architecture == model
    theirs = getattr(transformers, model)(transformers.FunnelConfig(**hf_config))
    loaded = theirs.load_state_dict(state, strict=False)
    # A classifier of transformers has no decoder; the tensors are then left over.
    assert not loaded.missing_keys
    assert all(name.startswith("funnel.decoder") for name in loaded.unexpected_keys)


def test_tables_name_real_parameters() -> None:
    assert set(core_shapes(TINY)) == set(FunnelTFM(TINY, cls_target=False).state_dict())
    assert set(tf_names(TINY)) == set(hf_names(TINY)) == set(core_shapes(TINY))
    for table in (TF_HEADS, HF_HEADS):
        assert len(set(table.values())) == len(table)


def test_tensorflow_masks_the_first_token_without_separate_cls_too() -> None:
    """With func_mask "always" the first token sees no positions and no segments, as the TensorFlow code computes."""
    config = dataclasses.replace(TINY, separate_cls=False, truncate_seq=False, block_size="1", decoder_size="0")
    parts = from_tf(to_tf(Parts(config, random_core(config))), config)
    assert parts.config.func_mask == "always"
    model = FunnelTFM(parts.config, cls_target=False).eval()
    model.load_state_dict(parts.core)
    inputs = torch.tensor([[3, 4, 5, 6, 7]])
    swapped = torch.tensor([[3, 6, 5, 4, 7]])
    seg_id = torch.zeros_like(inputs)
    with torch.no_grad():
        first, other = (model.extract_hiddens(x, seg_id=seg_id)[0][-1][0] for x in (inputs, swapped))
        torch.testing.assert_close(first[0], other[0])  # order says nothing to the first token
        assert not torch.allclose(first[2], other[2])
        plain = FunnelTFM(config, cls_target=False).eval()
        plain.load_state_dict(parts.core)
        first, other = (plain.extract_hiddens(x, seg_id=seg_id)[0][-1][0] for x in (inputs, swapped))
        assert not torch.allclose(first[0], other[0])
    with pytest.raises(InputError, match="func_mask"):
        config_to_hf(parts.config)
    factorized = FunnelTFM(dataclasses.replace(parts.config, attn_type="factorized"), cls_target=False).eval()
    factorized.load_state_dict(parts.core)
    with torch.no_grad():
        a, b = (net.extract_hiddens(inputs, seg_id=seg_id)[0][-1] for net in (model, factorized))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
