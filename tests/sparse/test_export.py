"""Sparse models on disk: what is read back is what was written, and compact is compact."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from funneltfm.errors import InputError
from funneltfm.sparse.config import SparsityConfig
from funneltfm.sparse.export import (
    COMPACT,
    compact_folder,
    expand_folder,
    load_compact,
    load_sparse,
    read_compact,
    read_masks,
    restore_masks,
    save_sparse,
    write_compact,
)
from funneltfm.sparse.masks import attach, densities, fingerprint, sparse_weights

pytest.importorskip("safetensors")
Make = Callable[..., nn.Module]
IDS = torch.arange(24).view(3, 8) % 30 + 1
WHOLE = SparsityConfig(sparsity=0.8, count="model", embeddings=True)


def same(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def grow_some(model: nn.Module) -> None:
    """Turn a weight on in every matrix that stays 0, as RigL does."""
    for weight in sparse_weights(model):
        weight.mask.view(-1)[int((~weight.mask.view(-1)).nonzero()[0])] = True


@pytest.mark.parametrize("form", ["safetensors", "shards", "bin"])
def test_folders_go_from_one_form_to_the_other(form: str, bert: Make, tmp_path: Path) -> None:
    """Compact is as if save_sparse had written it, and back again nothing has changed."""
    transformers = pytest.importorskip("transformers")
    model = bert().eval()
    attach(model, SparsityConfig(sparsity=0.6, embeddings=True))
    grow_some(model)
    save_sparse(model, tmp_path / "dense")
    if form == "bin":
        torch.save(model.state_dict(), tmp_path / "dense/pytorch_model.bin")
        (tmp_path / "dense/model.safetensors").unlink()
    elif form == "shards":
        shutil.rmtree(tmp_path / "dense")
        model.save_pretrained(tmp_path / "dense", max_shard_size="4KB")
        assert len(list((tmp_path / "dense").glob("model-*.safetensors"))) > 1
    (tmp_path / "dense/vocab.txt").write_text("[PAD]\n")
    compact_folder(tmp_path / "dense", tmp_path / "small")
    assert (tmp_path / "small/vocab.txt").is_file()
    assert [path.name for path in (tmp_path / "small").glob("*model*")] == [COMPACT]
    expand_folder(tmp_path / "small", tmp_path / "again")
    sizes = {}
    for name in ("small", "again"):
        loaded = load_sparse(transformers.AutoModelForMaskedLM, tmp_path / name)
        assert same(model, loaded)
        assert loaded.cls.predictions.decoder.weight is loaded.bert.embeddings.word_embeddings.weight
        sizes[name] = sum(path.stat().st_size for path in (tmp_path / name).glob("*.safetensors"))
    if form == "safetensors":
        assert sizes["again"] <= (tmp_path / "dense/model.safetensors").stat().st_size + 100  # ties are written once


def test_folders_that_have_no_other_form_are_refused(bert: Make, tmp_path: Path) -> None:
    model = bert()
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(InputError, match="holds no masks"):
        compact_folder(tmp_path / "dense", tmp_path / "small")
    attach(model, SparsityConfig(sparsity=0.6))
    save_sparse(model, tmp_path / "small", compact=True)
    with pytest.raises(InputError, match="in the compact form already"):
        compact_folder(tmp_path / "small", tmp_path / "smaller")
    with pytest.raises(InputError, match="exists and is not empty"):
        expand_folder(tmp_path / "small", tmp_path / "dense")
    expand_folder(tmp_path / "small", tmp_path / "dense", overwrite=True)
    assert read_masks(tmp_path / "dense")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "small"]  # nothing is left behind


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("kind", ["bert", "funnel"])
def test_a_folder_gives_the_same_model(kind: str, compact: bool, bert: Make, funnel_lm: Make, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = (bert if kind == "bert" else funnel_lm)().eval()
    attach(model, SparsityConfig(sparsity=0.6, embeddings=True))
    grow_some(model)
    save_sparse(model, tmp_path / "model", compact=compact, config=WHOLE)
    loaded = load_sparse(transformers.AutoModelForMaskedLM, tmp_path / "model")
    assert type(loaded) is type(model)
    assert same(model, loaded)
    assert torch.equal(model(input_ids=IDS).logits, loaded(input_ids=IDS).logits)
    assert loaded.name_or_path == str(tmp_path / "model")
    if kind == "bert":
        assert loaded.cls.predictions.decoder.weight is loaded.bert.embeddings.word_embeddings.weight
    note = json.loads((tmp_path / "model" / "sparsity.json").read_text())
    assert note["density"] == densities(model).sparse.mask_density
    assert SparsityConfig(**note["config"]) == WHOLE
    assert densities(loaded).sparse.on > densities(loaded).sparse.nonzero  # what grew is on, though 0


def test_every_tool_reads_the_dense_form(bert: Make, tmp_path: Path) -> None:
    model = bert().eval()
    attach(model, WHOLE)
    save_sparse(model, tmp_path)
    plain = type(model).from_pretrained(tmp_path).eval()
    assert torch.allclose(plain(input_ids=IDS).logits, model(input_ids=IDS).logits, atol=1e-6)
    assert not sparse_weights(plain)
    for weight in sparse_weights(model):
        assert torch.equal(plain.get_parameter(weight.name) != 0, weight.mask & (weight.weight != 0))
    assert restore_masks(plain, tmp_path)
    assert same(plain, model)


@pytest.mark.parametrize("compact", [False, True])
def test_another_head_keeps_the_masks_of_what_it_shares(compact: bool, bert: Make, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = bert()
    attach(model, SparsityConfig(sparsity=0.8))
    save_sparse(model, tmp_path, compact=compact)
    other = load_sparse(transformers.AutoModelForSequenceClassification, tmp_path, num_labels=3)
    assert other.classifier.out_features == 3
    masks = {weight.name: weight.mask for weight in sparse_weights(model)}
    found = {weight.name: weight.mask for weight in sparse_weights(other)}
    assert found.keys() == {name for name in masks if name.startswith("bert.")}
    assert all(torch.equal(found[name], masks[name]) for name in found)
    body = load_sparse(transformers.AutoModel, tmp_path)
    assert {f"bert.{weight.name}" for weight in sparse_weights(body)} == found.keys()
    assert torch.equal(body.encoder.layer[0].output.dense.weight, model.bert.encoder.layer[0].output.dense.weight)


def test_a_body_s_masks_go_into_a_model_with_a_head(bert: Make, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    body = bert("BertModel")
    attach(body, SparsityConfig(sparsity=0.8, include=["encoder.*"]))
    body.save_pretrained(tmp_path)  # transformers' own way carries the masks too
    model = load_sparse(transformers.AutoModelForMaskedLM, tmp_path)
    assert [f"bert.{weight.name}" for weight in sparse_weights(body)] == [w.name for w in sparse_weights(model)]
    assert fingerprint(sparse_weights(body)) != fingerprint(sparse_weights(model))  # names count too
    assert densities(body).sparse == densities(model).sparse


def as_bin(folder: Path, kind: str) -> None:
    """Turn a folder's safetensors into the pickled files of before."""
    from safetensors.torch import load_file

    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if kind == "sharded":
        parts = {f"pytorch_model-0000{i}-of-00002.bin": dict(list(state.items())[i - 1 :: 2]) for i in (1, 2)}
        for name, part in parts.items():
            torch.save(part, folder / name)
        of = {key: name for name, part in parts.items() for key in part}
        index = {"metadata": {"total_size": 0}, "weight_map": of}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "zip")


@pytest.mark.parametrize("kind", ["zip", "legacy", "sharded"])
def test_masks_in_pickled_files(kind: str, bert: Make, tmp_path: Path) -> None:
    model = bert()
    attach(model, WHOLE)
    model.save_pretrained(tmp_path)
    as_bin(tmp_path, kind)
    plain = type(model).from_pretrained(tmp_path)
    assert restore_masks(plain, tmp_path)
    assert same(plain, model)
    bert().save_pretrained(tmp_path)  # the files that from_pretrained prefers are dense
    assert read_masks(tmp_path) == {}


def test_a_pickled_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"no tensors")
    with pytest.raises(InputError, match=r"cannot read the tensors in .*pytorch_model\.bin"):
        read_masks(tmp_path)


def test_what_is_neither_a_folder_nor_in_the_cache_has_no_masks() -> None:
    for name in ("no/where", "no-one's model", "a/b/c", "/no/where"):
        assert read_masks(name) == {}


@pytest.mark.parametrize("number", [0.8, 0.9])
def test_the_compact_file_is_small(number: float, tmp_path: Path) -> None:
    """bits: 1 + 32 (1 - s) in fp32, 1 + 16 (1 - s) in fp16, of 32."""
    model = nn.Sequential(nn.Linear(512, 1024, bias=False), nn.Linear(1024, 512, bias=False))
    attach(model, SparsityConfig(sparsity=number))
    dense = 4 * sum(parameter.numel() for parameter in model.parameters())
    for values, bits in (("fp32", 32), ("fp16", 16)):
        write_compact(model, tmp_path / values, values)  # type: ignore[arg-type]
        ratio = dense / (tmp_path / values).stat().st_size
        assert ratio == pytest.approx(32 / (1 + bits * (1 - number)), rel=0.01)
        if number == 0.8:
            assert ratio > (4 if values == "fp32" else 7)


def test_fp16_rounds_values_and_nothing_else(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, other = nn.Sequential(nn.Linear(9, 5)), nn.Sequential(nn.Linear(9, 5))
    attach(model, SparsityConfig(sparsity=0.7))
    write_compact(model, tmp_path / "m", "fp16")
    load_compact(other, tmp_path / "m")
    assert torch.equal(other[0].weight_mask, model[0].weight_mask)
    assert other[0].weight.dtype == torch.float32
    assert torch.equal(other[0].weight, model[0].weight.half().float())
    with torch.no_grad():
        model[0].weight[model[0].weight_mask] = 1e5
    with pytest.raises(InputError, match=r"0\.weight has values that do not fit fp16"):
        write_compact(model, tmp_path / "m", "fp16")
    with pytest.raises(InputError, match="values must be one of fp32, fp16"):
        write_compact(model, tmp_path / "m", "fp8")  # type: ignore[arg-type]


@pytest.mark.parametrize("pattern", ["unstructured", "constant_fan_in", "4x1", "1:4"])
def test_any_module_bit_for_bit(pattern: str, funnel: nn.Module, tmp_path: Path) -> None:
    attach(funnel, SparsityConfig(sparsity=0.75, pattern=pattern, exclude=["cls_head.*"]))
    grow_some(funnel)
    write_compact(funnel, tmp_path / "m")
    other = type(funnel)(funnel.net_config)
    load_compact(other, tmp_path / "m")
    assert same(funnel, other)
    load_compact(other, tmp_path / "m")  # over masks that are there
    assert same(funnel, other)
    for weight in sparse_weights(other):
        assert not weight.weight.detach()[~weight.mask].signbit().any()


def test_tied_tensors_are_written_once(bert: Make, tmp_path: Path) -> None:
    model = bert()
    attach(model, SparsityConfig(sparsity=0.8))  # the table, tied to the decoder, is dense here
    write_compact(model, tmp_path / "m")
    state, masks = read_compact(tmp_path / "m")
    assert masks.keys() == densities(model).weights.keys()
    dense = {name for name in model.state_dict() if not name.endswith("_mask")}
    assert state.keys() == dense
    assert state["cls.predictions.decoder.weight"] is state["bert.embeddings.word_embeddings.weight"]


# ---- what cannot be read or written


def test_a_dense_model_is_not_written_as_a_sparse_one(bert: Make, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no masks"):
        save_sparse(bert(), tmp_path)
    model = bert()
    attach(model, WHOLE)
    with pytest.raises(InputError, match="values is for the compact form"):
        save_sparse(model, tmp_path, values="fp16")


@pytest.mark.parametrize("compact", [False, True])
def test_a_folder_holds_one_form(compact: bool, bert: Make, tmp_path: Path) -> None:
    model = bert()
    attach(model, WHOLE)
    for _ in range(2):
        save_sparse(model, tmp_path, compact=compact)
    with pytest.raises(InputError, match="holds a model in the other form"):
        save_sparse(model, tmp_path, compact=not compact)


def test_a_folder_without_masks_is_not_loaded_as_a_sparse_model(bert: Make, tmp_path: Path) -> None:
    model = bert()
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="holds no masks"):
        load_sparse(type(model), tmp_path)
    with pytest.raises(InputError, match="is no folder"):
        load_sparse(type(model), "some-one/some-model")


def test_masks_of_another_model(bert: Make, tmp_path: Path) -> None:
    model = bert()
    attach(model, WHOLE)
    save_sparse(model, tmp_path)
    with pytest.raises(InputError, match="none of the 14 masks"):
        restore_masks(nn.Sequential(nn.Linear(2, 2)), tmp_path)
    small = bert("BertModel", num_labels=2)
    small.encoder.layer[0].output.dense = nn.Linear(3, 3)
    with pytest.raises(InputError, match="does not fit the model"):
        restore_masks(small, tmp_path)
    dense = tmp_path / "dense"
    bert().save_pretrained(dense)
    assert read_masks(dense) == {}
    assert not restore_masks(bert(), dense)


def test_a_file_of_another_model(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    attach(model, SparsityConfig(sparsity=0.5))
    write_compact(model, tmp_path / "m")
    with pytest.raises(InputError, match=r"2 tensors differ \(first 1\.bias\)"):
        load_compact(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), tmp_path / "m")
    with pytest.raises(InputError, match=r"2 tensors differ"):
        load_compact(nn.Sequential(nn.Linear(4, 5)), tmp_path / "m")


def damaged(path: Path, **changes: Any) -> Path:
    """The file with some tensors or notes replaced; None takes one away."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        note = file.metadata()
    for name, value in changes.items():
        target = note if name in note else tensors
        target.pop(name)
        if value is not None:
            target[name] = value
    save_file(tensors, path.with_name("damaged"), metadata=note)
    return path.with_name("damaged")


def test_damaged_files_say_so(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(5, 4, bias=False))
    attach(model, SparsityConfig(sparsity=0.5))
    path = tmp_path / "m"
    write_compact(model, path)
    for changes, message in (
        ({"0.weight.bits": torch.zeros(2, dtype=torch.uint8)}, "has 2 bytes of bits for 20 weights"),
        ({"0.weight.bits": torch.zeros(3, dtype=torch.uint8)}, "has 10 values, its bits say 0"),
        ({"0.weight.values": torch.zeros(9)}, "has 9 values, its bits say 10"),
        ({"0.weight.values": None}, r"lacks 0\.weight\.values"),
        ({"tied": None}, "is no compact model"),
    ):
        with pytest.raises(InputError, match=message):
            read_compact(damaged(path, **changes))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - 5])
    with pytest.raises(InputError, match="cannot read the tensors"):
        read_compact(path)
    with pytest.raises(InputError, match="cannot read the compact model"):
        read_compact(tmp_path / "nothing")


def test_a_compact_folder_stands_alone(bert: Make, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = bert()
    attach(model, WHOLE)
    save_sparse(model, tmp_path / "a", compact=True)
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"config.json", "sparsity.json", COMPACT}
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert same(load_sparse(transformers.BertForMaskedLM, tmp_path / "b"), model)
