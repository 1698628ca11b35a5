"""Checkpoints: what goes out comes back, what does not fit is named, and a file from a stranger runs nothing."""

import io
import os
import pickle
import tarfile
import zipfile

import pytest
import torch

from funneltfm.errors import InputError
from funneltfm.funnel.checkpoints import load_checkpoint, read_state, save_checkpoint
from funneltfm.funnel.config import ModelConfig
from funneltfm.funnel.model import FunnelTFM


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def saved(tiny, build, tmp_path):
    """(model, path of its checkpoint)"""
    model = build(tiny(decoder_size="1", d_embed=8))
    path = tmp_path / "run" / "model.pt"
    save_checkpoint(model, path)
    return model, path


# ---- there and back


def test_round_trip(saved, tmp_path):
    model, path = saved
    other = FunnelTFM(model.net_config)
    assert not equal(other.state_dict(), model.state_dict())
    assert load_checkpoint(other, path) == []
    assert equal(other.state_dict(), model.state_dict())
    assert equal(read_state(str(path)), dict(model.state_dict()))


def test_file_holds_plain_tensors_under_the_original_names(saved):
    model, path = saved
    state = torch.load(path, weights_only=True)
    assert list(state) == list(model.state_dict())
    assert all(type(tensor) is torch.Tensor and not tensor.requires_grad for tensor in state.values())


def test_converted_checkpoint_of_the_original(shared):
    folder = shared / "fixtures" / "funnel" / "enc_2_2_2"
    model = FunnelTFM(ModelConfig.init_from_json(folder / "net_config.pytorch.json"))
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    head = ["cls_head.0.weight", "cls_head.0.bias", "cls_head.3.weight", "cls_head.3.bias"]
    with pytest.raises(InputError, match=r"4 missing \(first cls_head"):
        load_checkpoint(model, folder / "converted.pt")
    assert equal(model.state_dict(), fresh)  # refused: nothing was loaded
    assert load_checkpoint(model, folder / "converted.pt", new_head=True) == head
    assert equal({name: model.state_dict()[name] for name in head}, {name: fresh[name] for name in head})
    rest = {name: tensor for name, tensor in model.state_dict().items() if name not in head}
    assert equal(rest, torch.load(folder / "converted.pt", weights_only=True))


def test_module_prefix_of_distributed_training(saved, tmp_path):
    model, _ = saved
    torch.save({f"module.{name}": tensor for name, tensor in model.state_dict().items()}, tmp_path / "ddp.pt")
    other = FunnelTFM(model.net_config)
    assert load_checkpoint(other, tmp_path / "ddp.pt") == []
    assert equal(other.state_dict(), model.state_dict())


def test_half_precision_checkpoint_into_fp32(saved, tmp_path):
    model, _ = saved
    torch.save({name: tensor.bfloat16() for name, tensor in model.state_dict().items()}, tmp_path / "half.pt")
    other = FunnelTFM(model.net_config)
    load_checkpoint(other, tmp_path / "half.pt")
    assert all(tensor.dtype == torch.float32 for tensor in other.state_dict().values())
    assert equal(other.state_dict(), {name: t.bfloat16().float() for name, t in model.state_dict().items()})


def test_old_serialisation(saved, tmp_path):
    """The published archives date from torch 1.5 and before."""
    model, _ = saved
    torch.save(dict(model.state_dict()), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert equal(read_state(tmp_path / "old.pt"), dict(model.state_dict()))


# ---- the head


def test_new_head_takes_a_head_that_fits_and_leaves_one_that_does_not(tiny, build, tmp_path):
    trained = build(tiny(num_class=3))
    save_checkpoint(trained, tmp_path / "model.pt")
    same = FunnelTFM(tiny(num_class=3))
    assert load_checkpoint(same, tmp_path / "model.pt", new_head=True) == []
    assert equal(same.state_dict(), trained.state_dict())

    other = FunnelTFM(tiny(num_class=5))
    fresh = other.cls_head[3].weight.detach().clone()
    with pytest.raises(InputError, match=r"2 of another shape \(first cls_head\.3\.weight: \(16, 3\) there, \(16, 5\)"):
        load_checkpoint(other, tmp_path / "model.pt")
    assert load_checkpoint(other, tmp_path / "model.pt", new_head=True) == ["cls_head.3.weight", "cls_head.3.bias"]
    assert torch.equal(other.cls_head[3].weight, fresh)
    assert torch.equal(other.cls_head[0].weight, trained.cls_head[0].weight)

    bare = FunnelTFM(tiny(), cls_target=False)
    with pytest.raises(InputError, match=r"4 unexpected \(first cls_head"):
        load_checkpoint(bare, tmp_path / "model.pt")
    assert load_checkpoint(bare, tmp_path / "model.pt", new_head=True) == []


def test_new_head_forgives_nothing_else(tiny, build, tmp_path):
    model = build(tiny())
    state = dict(model.state_dict())
    for name, word in (("pffn_layers.1.pffn.0.bias", "missing"), ("stranger", "unexpected")):
        changed = {key: value for key, value in state.items() if key != name}
        if word == "unexpected":
            changed[name] = torch.zeros(1)
        torch.save(changed, tmp_path / "changed.pt")
        with pytest.raises(InputError, match=rf"1 {word} \(first {name}\)"):
            load_checkpoint(FunnelTFM(tiny()), tmp_path / "changed.pt", new_head=True)


# ---- what does not fit


def test_another_vocabulary(tiny, build, tmp_path):
    save_checkpoint(build(tiny(vocab_size=60)), tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"vocabulary does not match.*60 pieces.*built for 50.*--tokenizer_path"):
        load_checkpoint(FunnelTFM(tiny(vocab_size=50)), tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"block_size": "1_1_2"}, ("20 missing", "attn_layers.3.")),
        ({"block_size": "1_1"}, ("unexpected", "attn_layers.2.")),
        ({"d_inner": 32}, ("of another shape", "pffn_layers.0.pffn.0.weight", "(16, 24) there", "(16, 32) here")),
        ({"d_embed": 8}, ("of another shape", "2 missing (first input_projection.weight", "(50, 16) there")),
        ({"decoder_size": "1"}, ("missing", "attn_layers.3.")),
    ],
)
def test_another_config_is_named(tiny, build, tmp_path, keys, words):
    save_checkpoint(build(tiny()), tmp_path / "model.pt")
    model = FunnelTFM(tiny(**keys))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError) as caught:
        load_checkpoint(model, tmp_path / "model.pt")
    assert str(tmp_path / "model.pt") in str(caught.value)
    assert "--init_ckpt_config" in str(caught.value)
    for word in words:
        assert word in str(caught.value)
    assert equal(model.state_dict(), before)


# ---- files that are no checkpoint


def zipped(**files):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return data.getvalue()


def tarred():
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("model.pt"))
    return data.getvalue()


OTHER_FILES = {
    "empty": b"",
    "newline": b"\n",
    "text": b"not a checkpoint\n",
    "html": b"<html>404</html>",
    "zeros": b"\0" * 200,
    "start of a zip": b"PK\x03\x04",
    "start of a pickle": b"\x80\x02",
    "empty zip": zipped(),
    "another zip": zipped(a="b"),
    "zip of junk": zipped(**{"archive/data.pkl": "x"}),
    "tar.gz": tarred(),
    "pickle 2": pickle.dumps({"a": 1}, 2),
    "pickle 4": pickle.dumps([1], 4),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4:UserWarning")
@pytest.mark.parametrize("content", OTHER_FILES.values(), ids=OTHER_FILES)
def test_other_files(tmp_path, content):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"model\.pt") as caught:
        read_state(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("zip_format", [True, False], ids=["zip", "legacy"])
def test_truncated_at_any_place(tmp_path, zip_format):
    path = tmp_path / "model.pt"
    torch.save({"a": torch.ones(5, 5), "b": torch.zeros(3)}, path, _use_new_zipfile_serialization=zip_format)
    whole = path.read_bytes()
    for length in range(0, len(whole), 13):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"model\.pt"):
            read_state(path)


def test_a_flipped_bit_is_noticed(saved, tmp_path):
    model, path = saved
    whole = path.read_bytes()
    weight = model.state_dict()["input_layer.0.lookup_table"].numpy().tobytes()
    at = whole.index(weight) + len(weight) // 2
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    assert set(torch.load(path, weights_only=True)) == set(model.state_dict())  # torch does not look
    with pytest.raises(InputError, match="checksum"):
        load_checkpoint(model, path)


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(8, dtype=torch.int64), torch.ones(8, dtype=torch.complex64), torch.ones(8).to_sparse(),
     torch.ones(8, device="meta")],
    ids=["int64", "complex64", "sparse", "meta"],
)  # fmt: skip
def test_tensors_that_no_model_holds(saved, tensor):
    model, path = saved
    name = "pffn_layers.0.pffn.3.bias"
    torch.save(model.state_dict() | {name: tensor}, path)
    with pytest.raises(InputError, match=rf"model\.pt must hold dense tensors of real numbers; {name} is"):
        load_checkpoint(model, path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_values_that_are_no_numbers(saved, value):
    model, path = saved
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changed = before["input_layer.1.bias"].double()
    changed[0] = value
    torch.save(before | {"input_layer.1.bias": changed}, path)
    with pytest.raises(InputError, match=r"NaN or infinity in 1 of its .* \(first input_layer\.1\.bias\)"):
        load_checkpoint(model, path)
    assert equal(model.state_dict(), before)


def test_one_name_with_and_without_prefix(saved):
    model, path = saved
    torch.save(model.state_dict() | {"module.input_layer.1.bias": torch.zeros(8)}, path)
    with pytest.raises(InputError, match="with and without the prefix"):
        load_checkpoint(model, path)


def test_other_contents(tmp_path):
    tensor = torch.zeros(1)
    for value in (tensor, [tensor], {"state_dict": {"a": tensor}}, {"a": tensor, "epoch": 3}, {"a": 1.0}, 3):
        torch.save(value, tmp_path / "model.pt")
        with pytest.raises(InputError, match="must hold a state dict"):
            read_state(tmp_path / "model.pt")


def test_names_must_be_text(tmp_path):
    torch.save({1: torch.zeros(1)}, tmp_path / "model.pt")
    with pytest.raises(InputError, match="state dict"):
        read_state(tmp_path / "model.pt")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(InputError, match=r"none\.pt: there is no such file"):
        read_state(tmp_path / "none.pt")
    with pytest.raises(InputError, match="it is a folder"):
        read_state(tmp_path)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zip_format", [True, False], ids=["zip", "legacy"])
def test_code_in_a_pickle_is_not_run(tmp_path, zip_format):
    bomb = tmp_path / "executed"
    torch.save({"a": Bomb(bomb)}, tmp_path / "model.pt", _use_new_zipfile_serialization=zip_format)
    with pytest.raises(InputError, match=r"model\.pt"):
        read_state(tmp_path / "model.pt")
    assert not bomb.exists()
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Bomb(bomb), 2))
    with pytest.raises(InputError, match=r"bare\.pt"):
        read_state(tmp_path / "bare.pt")
    assert not bomb.exists()
    torch.load(tmp_path / "model.pt", weights_only=False)  # the bomb is live: the test could fail
    assert bomb.exists()


# ---- written whole or not at all


def test_an_interrupted_save_leaves_the_old_checkpoint(saved, monkeypatch):
    model, path = saved
    before = path.read_bytes()

    def fails(state, target):
        target.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(model, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["model.pt"]
