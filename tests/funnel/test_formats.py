"""Checkpoint folders: read, write, refuse; TensorFlow files where a Python with TensorFlow is at hand."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from funneltfm import FunnelTFM, InputError, ModelConfig
from funneltfm.funnel.checkpoints import save_checkpoint
from funneltfm.funnel.formats import FORMATS, Options, convert_checkpoint, detect, read_pt, verify
from funneltfm.funnel.heads import BeamSpanHead, MaskedLMHead, TokenDetectionHead, TokenHead

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT.parent / "shared/fixtures/funnel"
TF_PYTHON = os.environ.get("FUNNELTFM_TF_PYTHON") or str(ROOT / ".venv-tf/bin/python")
NEEDS_TF = pytest.mark.skipif(
    not Path(TF_PYTHON).exists(), reason="needs TensorFlow: bash scripts/setup_tf.sh, or FUNNELTFM_TF_PYTHON"
)
NEEDS_FIXTURES = pytest.mark.skipif(not FIXTURES.is_dir(), reason="needs ../shared/fixtures/funnel")
CASES = ["enc_2_2_2", "dec_2_2_2_d2", "dec_maxpool", "share_dec_2_1x2_1x2_d1x2", "mlm_2_2_2_d2", "electra_2_2_2_d2"]
OPTIONS = Options(tf_python=TF_PYTHON)

TINY = ModelConfig(
    vocab_size=19, d_embed=16, d_model=16, n_head=2, d_head=8, d_inner=24, block_size="1_1x2", decoder_size="1",
    separate_cls=True, pool_q_only=True, truncate_seq=True,
)  # fmt: skip


def pt_folder(path: Path, config: ModelConfig = TINY, cls_target: bool = False) -> Path:
    torch.manual_seed(0)
    path.mkdir(parents=True)
    save_checkpoint(FunnelTFM(config, cls_target=cls_target), path / "model.pt")
    config.to_json(path / "net_config.json")
    return path


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_pt_to_hf_to_pt_is_bit_equal_and_runs_in_transformers(tmp_path: Path) -> None:
    source = pt_folder(tmp_path / "pt")
    (source / "vocab.txt").write_text("[PAD]\n")
    parts, report = convert_checkpoint(source, tmp_path / "hf", to="hf")
    assert "bit-equal" in report[-1]
    assert (tmp_path / "hf/vocab.txt").exists()
    assert detect(tmp_path / "hf") == "hf"
    pytest.importorskip("transformers")
    assert verify(parts, tmp_path / "hf") < 1e-5
    convert_checkpoint(tmp_path / "hf", tmp_path / "again", to="pt")
    again = read_pt(tmp_path / "again", None, Options())
    assert same(again.core, parts.core)
    assert again.config == parts.config


def test_verify_notices_a_difference(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    parts, _ = convert_checkpoint(pt_folder(tmp_path / "pt"), tmp_path / "hf", to="hf")
    parts.core["attn_layers.0.r_kernel"] += 1.0
    with pytest.raises(InputError, match="differs"):
        verify(parts, tmp_path / "hf")


def test_a_classifier_keeps_its_head(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, num_class=4, decoder_size="0")
    source = pt_folder(tmp_path / "pt", config, cls_target=True)
    parts, _ = convert_checkpoint(source, tmp_path / "hf", to="hf")
    assert parts.config.num_class == 4
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf").eval()
    ours = FunnelTFM(config).eval()
    ours.load_state_dict(parts.core | parts.heads)
    inputs = torch.arange(1, 18)[None]
    seg_id = torch.zeros_like(inputs)
    seg_id[:, 0] = 2
    with torch.no_grad():
        expected = theirs(input_ids=inputs, token_type_ids=seg_id, attention_mask=torch.ones_like(inputs)).logits
        logits = ours(inputs, seg_id=seg_id, input_mask=torch.zeros_like(inputs))[1]["cls_logits"]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_heads_and_generator_survive_in_pt(tmp_path: Path) -> None:
    source = pt_folder(tmp_path / "pt")
    head = {f"detection_head.{k}": v for k, v in TokenDetectionHead(16, "gelu").state_dict().items()}
    torch.save(head, source / "heads.pt")
    pt_folder(source / "generator", dataclasses.replace(TINY, d_model=8, n_head=1))
    parts, report = convert_checkpoint(source, tmp_path / "copy", to="pt")
    assert "generator" in report[-1]
    again = read_pt(tmp_path / "copy", None, Options())
    assert same(again.heads, head)
    assert again.generator is not None
    assert parts.generator is not None
    assert same(again.generator.core, parts.generator.core)
    with pytest.raises(InputError, match="generator"):
        convert_checkpoint(source, tmp_path / "hf", to="hf")
    assert not (tmp_path / "hf").exists()
    _, report = convert_checkpoint(source, tmp_path / "hf", to="hf", drop_heads=True)
    assert any("left out on request" in line for line in report)


@pytest.mark.parametrize("head", [None, "detection_head", "lm_head", "cls_head", "qa_head", "beam_head"])
def test_funneltfm_folders_load_with_the_auto_classes(tmp_path: Path, head: str | None) -> None:
    transformers = pytest.importorskip("transformers")
    auto = {
        "detection_head": "PreTraining",
        "lm_head": "MaskedLM",
        "cls_head": "SequenceClassification",
        "qa_head": "QuestionAnswering",
        "beam_head": "QuestionAnswering",
    }
    source = pt_folder(tmp_path / "pt", dataclasses.replace(TINY, num_class=3), cls_target=head == "cls_head")
    module = {
        "detection_head": TokenDetectionHead(16, "gelu"),
        "lm_head": MaskedLMHead(16, 16, 19, "gelu"),
        "qa_head": TokenHead(16, 2, 0.1),
        "beam_head": BeamSpanHead(16, 0.1),
    }.get(head or "")
    if module is not None:
        torch.save({f"{head}.{k}": v for k, v in module.state_dict().items()}, source / "heads.pt")
    parts, _ = convert_checkpoint(source, tmp_path / "ours", to="funneltfm")
    assert detect(tmp_path / "ours") == "funneltfm"
    cls = getattr(transformers, f"AutoModelFor{auto[head]}" if head else "AutoModel")
    model, loading = cls.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert type(model).__name__.startswith("FunnelTFM")
    assert not any(loading.values()), loading
    assert model.config.qa_head == ("beam" if head == "beam_head" else "plain")
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in parts.heads.items())
    convert_checkpoint(tmp_path / "ours", tmp_path / "again", to="pt")
    again = read_pt(tmp_path / "again", None, Options())
    assert same(again.core, parts.core)
    assert same(again.heads, parts.heads)


def test_the_beam_head_is_refused_by_transformers_funnel(tmp_path: Path) -> None:
    source = pt_folder(tmp_path / "pt")
    torch.save({f"beam_head.{k}": v for k, v in BeamSpanHead(16, 0.1).state_dict().items()}, source / "heads.pt")
    with pytest.raises(InputError, match="no beam_head; convert to funneltfm"):
        convert_checkpoint(source, tmp_path / "hf", to="hf")
    assert not (tmp_path / "hf").exists()
    parts, _ = convert_checkpoint(source, tmp_path / "hf", to="hf", drop_heads=True)
    assert not parts.heads


def test_the_target_is_not_overwritten_unasked(tmp_path: Path) -> None:
    source = pt_folder(tmp_path / "pt")
    target = tmp_path / "target"
    target.mkdir()
    (target / "precious.txt").write_text("x")
    with pytest.raises(InputError, match="--overwrite"):
        convert_checkpoint(source, target, to="hf")
    assert (target / "precious.txt").exists()
    convert_checkpoint(source, target, to="hf", overwrite=True)
    assert not (target / "precious.txt").exists()


def broken(case: str, folder: Path) -> None:
    if case == "truncated":
        data = (folder / "model.pt").read_bytes()
        (folder / "model.pt").write_bytes(data[: len(data) // 2])
    elif case == "config of another size":
        dataclasses.replace(TINY, d_inner=32).to_json(folder / "net_config.json")
    elif case == "config of other blocks":
        dataclasses.replace(TINY, block_size="2_2").to_json(folder / "net_config.json")
    elif case == "another model":
        torch.save({"embeddings.word_embeddings.weight": torch.ones(3)}, folder / "model.pt")
    elif case == "no config":
        (folder / "net_config.json").unlink()
    elif case == "bad json":
        (folder / "net_config.json").write_text("{")


@pytest.mark.parametrize(
    "case", ["truncated", "config of another size", "config of other blocks", "another model", "no config", "bad json"]
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path: Path, case: str) -> None:
    source = pt_folder(tmp_path / "pt")
    broken(case, source)
    with pytest.raises(InputError):
        convert_checkpoint(source, tmp_path / "out", to="hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pt"]


def test_detect(tmp_path: Path) -> None:
    source = pt_folder(tmp_path / "pt")
    assert detect(source) == detect(source / "model.pt") == "pt"
    (tmp_path / "tf").mkdir()
    (tmp_path / "tf/model.ckpt-3.index").write_text("")
    assert detect(tmp_path / "tf") == detect(tmp_path / "tf/model.ckpt-3") == "tf"
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(InputError, match="bert"):
        detect(tmp_path / "bert")
    with pytest.raises(InputError, match="no checkpoint"):
        detect(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="It holds nothing"):
        detect(tmp_path / "empty")


def test_truncated_safetensors(tmp_path: Path) -> None:
    convert_checkpoint(pt_folder(tmp_path / "pt"), tmp_path / "hf", to="hf")
    data = (tmp_path / "hf/model.safetensors").read_bytes()
    (tmp_path / "hf/model.safetensors").write_bytes(data[:-100])
    with pytest.raises(InputError, match="safetensors"):
        convert_checkpoint(tmp_path / "hf", tmp_path / "out", to="pt")


def test_without_tensorflow_the_error_says_what_to_do(tmp_path: Path) -> None:
    source = pt_folder(tmp_path / "pt")
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 3\n")
    python.chmod(0o755)
    with pytest.raises(InputError, match=r"funneltfm\[tf\]"):
        convert_checkpoint(source, tmp_path / "tf", to="tf", options=Options(tf_python=str(python)))
    assert not (tmp_path / "tf").exists()


@pytest.mark.slow
@NEEDS_TF
@NEEDS_FIXTURES
@pytest.mark.parametrize("case", CASES)
def test_tensorflow_files_give_the_recorded_hidden_states(tmp_path: Path, case: str) -> None:
    parts, report = convert_checkpoint(FIXTURES / case, tmp_path / "pt", to="pt", options=OPTIONS)
    assert "bit-equal" in report[-1]
    assert bool(parts.left) == case.startswith(("mlm", "electra"))
    assert (parts.generator is not None) == case.startswith("electra")
    arrays = np.load(FIXTURES / case / "hiddens.npz")
    cases = sorted({key.removesuffix("__inputs") for key in arrays.files if key.endswith("__inputs")})
    assert cases
    for name in cases:
        config = dataclasses.replace(parts.config, attn_type=name.split("__")[0])
        model = FunnelTFM(config, cls_target=False).eval()
        model.load_state_dict(parts.core)
        take = {key: torch.from_numpy(arrays[f"{name}__{key}"]) for key in ("inputs", "seg", "emb")}
        mask = arrays[f"{name}__mask"] if f"{name}__mask" in arrays.files else np.zeros(take["inputs"].shape)
        use_decoder = config.decoder[0] > 0
        with torch.no_grad():
            hiddens, ret_dict = model.extract_hiddens(
                take["inputs"].long(),
                seg_id=take["seg"].long(),
                input_mask=torch.from_numpy(mask),
                use_decoder=use_decoder,
            )
        names = ["emb"] + [f"hid{i}" for i in range(100) if f"{name}__hid{i}" in arrays.files]
        pairs = [(hiddens[i], ret_dict["hidden_masks"][i], arrays[f"{name}__{key}"]) for i, key in enumerate(names)]
        if use_decoder:
            pairs.append((hiddens[-1], ret_dict["hidden_masks"][-1], arrays[f"{name}__dec"]))
        for hidden, padding, expected in pairs:
            difference = (hidden - torch.from_numpy(expected)).abs()[~padding].max()
            assert difference < 1e-5, (name, difference)


@pytest.mark.slow
@NEEDS_TF
@NEEDS_FIXTURES
def test_tf_pt_hf_pt_tf_is_bit_equal(tmp_path: Path) -> None:
    chain = [("tf1", "pt"), ("pt1", "hf"), ("hf1", "pt"), ("pt2", "tf")]
    source = FIXTURES / "dec_2_2_2_d2"
    first = FORMATS["tf"].read(source, None, OPTIONS)
    for name, to in chain:
        convert_checkpoint(source, tmp_path / name, to=to, options=OPTIONS)
        source = tmp_path / name
    last = FORMATS["tf"].read(source, None, OPTIONS)
    assert same(last.core, first.core)
    assert last.config == first.config
    original = json.loads((FIXTURES / "dec_2_2_2_d2/net_config.json").read_text())
    written = json.loads((source / "net_config.json").read_text())
    assert {key: written[key] for key in original if key != "rel_attn_type"} == {
        key: original[key] for key in original if key != "rel_attn_type"
    }


@pytest.mark.slow
@NEEDS_TF
def test_a_tensorflow_squad_checkpoint_answers_questions(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    source = pt_folder(tmp_path / "pt")
    torch.save({f"beam_head.{k}": v for k, v in BeamSpanHead(16, 0.1).state_dict().items()}, source / "heads.pt")
    first, _ = convert_checkpoint(source, tmp_path / "tf", to="tf", options=OPTIONS)
    convert_checkpoint(tmp_path / "tf", tmp_path / "ours", to="funneltfm", options=OPTIONS)
    model, loading = transformers.AutoModelForQuestionAnswering.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(loading.values()), loading
    state = model.state_dict()
    assert same({name: state[name] for name in first.heads}, first.heads)
    output = model(torch.arange(1, 18)[None])
    assert output.start_top_index.shape == (1, 5)
    assert output.end_top_index.shape == (1, 25)
    again, _ = convert_checkpoint(tmp_path / "ours", tmp_path / "tf_again", to="tf", options=OPTIONS)
    assert same(again.core | again.heads, first.core | first.heads)


@pytest.mark.slow
@NEEDS_TF
def test_a_damaged_tensorflow_checkpoint_is_refused(tmp_path: Path) -> None:
    convert_checkpoint(pt_folder(tmp_path / "pt"), tmp_path / "tf", to="tf", options=OPTIONS)
    index = tmp_path / "tf/model.ckpt-0.index"
    index.write_bytes(index.read_bytes()[:50])
    with pytest.raises(InputError, match="TensorFlow could not read"):
        convert_checkpoint(tmp_path / "tf", tmp_path / "out", to="pt", options=OPTIONS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [("block_sizes", 4), ("block_sizes", [1, "1"]), ("block_sizes", [1, 1, 1]), ("block_repeats", [0, 1]),
     ("hidden_act", {}), ("attention_type", "absolute"), ("num_decoder_layers", True), ("id2label", 3),
     ("n_head", 3), ("d_model", "16")],
)  # fmt: skip
def test_a_config_of_transformers_that_cannot_be(tmp_path: Path, key: str, value: object) -> None:
    convert_checkpoint(pt_folder(tmp_path / "pt"), tmp_path / "hf", to="hf")
    path = tmp_path / "hf/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(InputError, match=r"hf/config\.json"):
        convert_checkpoint(tmp_path / "hf", tmp_path / "again", to="pt")
    assert not (tmp_path / "again").exists()


def test_tensors_that_are_no_numbers_are_not_converted(tmp_path: Path) -> None:
    source = pt_folder(tmp_path / "pt")
    state = torch.load(source / "model.pt", weights_only=True)
    state["input_layer.1.bias"][0] = float("nan")
    torch.save(state, source / "model.pt")
    with pytest.raises(InputError, match=r"NaN or infinity in 1 tensors \(first input_layer\.1\.bias\)"):
        convert_checkpoint(source, tmp_path / "hf", to="hf")


def test_whole_numbers_in_a_safetensors_file(tmp_path: Path) -> None:
    convert_checkpoint(pt_folder(tmp_path / "pt"), tmp_path / "hf", to="hf")
    path = tmp_path / "hf/model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"', 1))
    with pytest.raises(InputError, match="dense tensors of real numbers"):
        convert_checkpoint(tmp_path / "hf", tmp_path / "again", to="pt")
