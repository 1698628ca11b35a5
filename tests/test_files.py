"""Files are written whole or not at all."""

import doctest
import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
import torch

from funneltfm import files
from funneltfm.errors import InputError
from funneltfm.files import atomic_path, existing_file, file_digest, read_json, torch_save, write_json, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_name_that_is_too_long_is_told_in_short(tmp_path):
    with pytest.raises(InputError, match="File name too long") as told:
        existing_file(tmp_path / ("x" * 5000), "the vocabulary")
    assert len(str(told.value)) < 600


def test_doctests():
    assert doctest.testmod(files).failed == 0


def test_atomic_path_makes_folders_and_leaves_one_file(tmp_path):
    with atomic_path(tmp_path / "a" / "b" / "plot.png") as temporary:
        assert temporary.parent == tmp_path / "a" / "b"  # on the same disk, or os.replace could not be atomic
        assert temporary.suffix == ".png"
        assert temporary.name.startswith(".")
        temporary.write_bytes(b"x")
        assert not (tmp_path / "a" / "b" / "plot.png").exists()
    assert names(tmp_path / "a" / "b") == ["plot.png"]


def test_nothing_changes_when_the_block_fails(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def broken():
        with atomic_path(path) as temporary:
            temporary.write_text("ne")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        broken()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_interrupting_leaves_nothing(tmp_path):
    def interrupted():
        with atomic_path(tmp_path / "file.txt") as temporary:
            temporary.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == []


def test_the_content_is_on_disk_before_it_has_the_name(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("replace"), replace(a, b))[1])
    write_text(tmp_path / "file.txt", "text")
    assert order[:2] == ["fsync", "replace"]


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "file.txt"):
        pass
    assert names(tmp_path) == []


def test_an_error_says_of_which_file(tmp_path, monkeypatch):
    """That of a full disk does not, by itself."""

    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*file\.txt'$") as caught:
        write_text(tmp_path / "file.txt", "text")
    assert caught.value.filename == str(tmp_path / "file.txt")
    assert names(tmp_path) == []

    def other():
        with atomic_path(tmp_path / "file.txt"):
            (tmp_path / "none").read_bytes()

    with pytest.raises(FileNotFoundError) as caught:
        other()
    assert Path(caught.value.filename) == tmp_path / "none"  # not ours


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_torch_save_names_the_reason():
    with pytest.raises(OSError, match="No space left on device") as caught:
        torch_save({"weights": torch.zeros(100_000)}, "/dev/full")
    assert caught.value.errno == errno.ENOSPC


def test_torch_save_is_that_of_torch(tmp_path):
    torch_save({"a": torch.arange(3)}, tmp_path / "file.pt")
    assert torch.load(tmp_path / "file.pt", weights_only=True)["a"].tolist() == [0, 1, 2]
    with pytest.raises((AttributeError, TypeError, RuntimeError), match=r"pickle|local"):
        torch_save(lambda: None, tmp_path / "file.pt")


def test_two_files_of_one_stem_do_not_meet(tmp_path):
    with atomic_path(tmp_path / "a.json") as one, atomic_path(tmp_path / "a.txt") as two:
        one.write_text("1")
        two.write_text("2")
    assert ((tmp_path / "a.json").read_text(), (tmp_path / "a.txt").read_text()) == ("1", "2")


def test_write_text_is_utf8(tmp_path):
    write_text(tmp_path / "file.txt", "\u00e9\u4e2d\n")
    assert (tmp_path / "file.txt").read_bytes() == "\u00e9\u4e2d\n".encode()


def test_write_json(tmp_path):
    write_json(tmp_path / "file.json", {"b": [1, 2.5, None], "a": "\u00e9"})
    text = (tmp_path / "file.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"b": [1, 2.5, None], "a": "\u00e9"}
    assert text.index('"b"') < text.index('"a"')  # the order given
    assert "\u00e9" in text
    assert text.endswith("}\n")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}])
def test_what_is_no_json_is_not_written(tmp_path, value):
    (tmp_path / "file.json").write_text("old")
    with pytest.raises((ValueError, TypeError)):
        write_json(tmp_path / "file.json", {"value": value})
    assert (tmp_path / "file.json").read_text() == "old"


def test_file_digest(tmp_path):
    (tmp_path / "file").write_bytes(b"abc" * 100_000)
    assert file_digest(tmp_path / "file") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_existing_file(tmp_path):
    (tmp_path / "file").write_text("")
    assert existing_file(str(tmp_path / "file"), "the vocabulary") == Path(tmp_path / "file")
    with pytest.raises(InputError, match=r"cannot read the vocabulary .*none: there is no such file"):
        existing_file(tmp_path / "none", "the vocabulary")
    with pytest.raises(InputError, match="it is a folder"):
        existing_file(tmp_path, "the vocabulary")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff", b'{"a": 1, "a": 2}', b'["\\ud800"]', b"[" * 99_999, b"9" * 5000],
    ids=lambda content: content[:9],
)
def test_json_that_cannot_be_read_is_named(tmp_path, content):
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(InputError, match=r"cannot read the labels .*file\.json: ") as caught:
        read_json(tmp_path / "file.json", "the labels")
    assert len(str(caught.value)) < 800
    (tmp_path / "file.json").write_text('{"a": {"a": [1]}}')
    assert read_json(tmp_path / "file.json", "the labels") == {"a": {"a": [1]}}
