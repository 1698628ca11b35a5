"""A checkpoint is whole or known not to be: any change of any byte shows, and what could not be written leaves the one
before as it was.
"""

import errno
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from funneltfm.errors import InputError
from funneltfm.training import checkpoint_io
from funneltfm.training.callbacks import SaveRun
from funneltfm.training.checkpoint_io import WholeCheckpoints, is_whole, newest_whole, seal
from funneltfm.training.classify import classify
from funneltfm.training.rundir import RunDir

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT: dict[str, Any] = {"weights": torch.arange(300.0), "step": 7, "rows": [{"loss": 0.5}], "note": "\u00e9"}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return torch.equal(one["weights"], other["weights"]) and {**one, "weights": 0} == {**other, "weights": 0}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A checkpoint."""
    WholeCheckpoints().save_checkpoint(CHECKPOINT, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


# ---- whole


def test_what_was_written_is_whole_and_every_reader_reads_it(path: Path) -> None:
    assert is_whole(path)
    assert same(WholeCheckpoints().load_checkpoint(path, weights_only=True), CHECKPOINT)
    assert same(torch.load(path, weights_only=True), CHECKPOINT)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert len(archive.comment) == 64
    assert [entry.name for entry in path.parent.iterdir()] == ["last.ckpt"]


def test_the_folder_is_made(tmp_path: Path) -> None:
    WholeCheckpoints().save_checkpoint(CHECKPOINT, tmp_path / "a" / "b" / "last.ckpt")
    assert is_whole(tmp_path / "a" / "b" / "last.ckpt")


def test_a_checkpoint_larger_than_a_block(tmp_path: Path) -> None:
    """Its digest is computed block by block; a change beyond the first one shows too."""
    path = tmp_path / "large.ckpt"
    WholeCheckpoints().save_checkpoint({"weights": torch.zeros(700_000)}, path)
    assert path.stat().st_size > 2 * 2**20
    assert is_whole(path)
    with open(path, "r+b") as handle:
        handle.seek(2**21 + 5)
        handle.write(b"\x01")
    assert not is_whole(path)


# ---- not whole


def refused(path: Path) -> None:
    assert not is_whole(path)
    with pytest.raises(InputError, match="is damaged") as caught:
        WholeCheckpoints().load_checkpoint(path, weights_only=True)
    assert str(path) in str(caught.value)


def test_a_flipped_bit_anywhere_shows(path: Path) -> None:
    """torch itself checks nothing: most of these would load, with other numbers."""
    content = path.read_bytes()
    n = len(content)
    places = {0, 1, 2, n // 2, n - 88, n - 67, n - 66, n - 65, n - 64, n - 63, n - 2, n - 1}
    places |= set(random.Random(0).sample(range(n), 60))
    for place in sorted(places):
        for bit in (0, 7):
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            path.write_bytes(changed)
            assert not is_whole(path), place
    refused(path)
    path.write_bytes(content)
    assert is_whole(path)


def test_a_file_cut_short_shows(path: Path) -> None:
    content = path.read_bytes()
    for n in [*range(70), *random.Random(0).sample(range(len(content)), 60), *range(len(content) - 70, len(content))]:
        path.write_bytes(content[:n])
        assert not is_whole(path), n
    refused(path)


@pytest.mark.parametrize("more", [b"\0", b"\n", b"x" * 66, b"\0\0", (64).to_bytes(2, "little") + b"0" * 64])
def test_appended_bytes_show(path: Path, more: bytes) -> None:
    path.write_bytes(path.read_bytes() + more)
    refused(path)


def test_blocks_in_another_order_show(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[256:512] + content[:256] + content[512:])
    refused(path)


def test_foreign_files_show(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save(CHECKPOINT, path)  # by another program
    refused(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "mine")
    refused(path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"0" * 64
    refused(path)
    for content in (b"", b"\0" * 66, b"not a zip archive" * 10):
        path.write_bytes(content)
        refused(path)


def test_the_end_of_another_checkpoint_shows(path: Path, tmp_path: Path) -> None:
    """A seal belongs to one content."""
    WholeCheckpoints().save_checkpoint(CHECKPOINT | {"step": 8}, tmp_path / "other.ckpt")
    other = (tmp_path / "other.ckpt").read_bytes()
    path.write_bytes(path.read_bytes()[:-66] + other[-66:])
    refused(path)


def test_what_is_sealed_has_no_comment_yet(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(ValueError, match="without a comment"):
        seal(path)
    assert path.read_bytes() == before


# ---- the newest that is whole


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / name for name in ("next.ckpt", "last.ckpt", "previous.ckpt")]
    for step, path in enumerate(paths):
        WholeCheckpoints().save_checkpoint(CHECKPOINT | {"step": step}, path)
    return paths


def damage(path: Path) -> None:
    with open(path, "r+b") as handle:
        handle.seek(100)
        handle.write(b"\xff\x00\xff")


@pytest.mark.parametrize(
    ("gone", "damaged", "taken"),
    [
        ((), (), 0),
        ((0,), (), 1),
        ((0, 1), (), 2),
        ((), (0,), 1),
        ((), (0, 1), 2),
        ((0,), (1,), 2),
        ((1,), (0,), 2),
        ((2,), (0,), 1),
        ((), (1, 2), 0),
    ],
)
def test_the_newest_that_is_whole_is_taken(
    gone: tuple[int, ...], damaged: tuple[int, ...], taken: int, three: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    for i in gone:
        three[i].unlink()
    for i in damaged:
        damage(three[i])
    assert newest_whole(three) == three[taken]
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    passed_over = [i for i in damaged if i < taken]
    assert len(warned) == len(passed_over)
    for i, message in zip(passed_over, warned, strict=True):
        left = [j for j in range(i + 1, 3) if j not in gone]
        assert message == f"the checkpoint {three[i]} is damaged; trying {three[left[0]].name}"


def test_nothing_whole_and_nothing_at_all(three: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    three[0].unlink()
    damage(three[1])
    damage(three[2])
    with pytest.raises(InputError, match=r"every checkpoint .* damaged .*--overwrite") as caught:
        newest_whole(three)
    assert f"({three[1]}, {three[2]})" in str(caught.value)
    assert caplog.messages == [
        f"the checkpoint {three[1]} is damaged; trying previous.ckpt",
        f"the checkpoint {three[2]} is damaged",
    ]
    three[1].unlink()
    three[2].unlink()
    with pytest.raises(InputError, match=r"nothing to resume.*without --resume"):
        newest_whole(three)


# ---- what cannot be written


def unchanged(path: Path, before: bytes) -> None:
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]  # no half file is left
    assert is_whole(path)


@pytest.mark.parametrize("when", ["writing", "sealing", "syncing", "renaming"])
def test_a_full_disk_leaves_the_one_before(path: Path, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target, name = {
        "writing": (torch, "save"), "sealing": (checkpoint_io, "seal"), "syncing": (os, "fsync"),
        "renaming": (os, "replace"),
    }[when]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(target, name, full)
        with pytest.raises(
            InputError, match=r"cannot write the checkpoint .*last\.ckpt: No space left on device\..*--resume"
        ):
            WholeCheckpoints().save_checkpoint(CHECKPOINT | {"step": 8}, path)
    unchanged(path, before)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match=r"cannot write the checkpoint .*file/last\.ckpt: "):
        WholeCheckpoints().save_checkpoint(CHECKPOINT, tmp_path / "file" / "last.ckpt")


@pytest.mark.parametrize("limit", [0, 100, 1000, 2500])
def test_the_system_s_own_refusal(path: Path, limit: int) -> None:
    """A real error of write(2), in the middle of a file: beyond the largest size that a process may write."""
    before = path.read_bytes()
    assert len(before) > 2500
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with pytest.raises(InputError) as caught:
            WholeCheckpoints().save_checkpoint(CHECKPOINT | {"step": 8}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert f"cannot write the checkpoint {path}: File too large" in str(caught.value)
    unchanged(path, before)


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    ("renamed", "left"),
    [
        (0, {"next": 3, "last": 2, "previous": 1}),
        (1, {"next": 3, "previous": 2}),
        (2, {"last": 3, "previous": 2}),
    ],
)
def test_killed_between_writing_and_renaming(
    renamed: int, left: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written last is whole and is taken, wherever the renaming broke off; nothing else is needed."""
    run_dir = RunDir(tmp_path)
    step, renames, replace = 0, 0, os.replace

    def save_checkpoint(path: Path) -> None:
        WholeCheckpoints().save_checkpoint({"step": step}, path)
        if step == 3 and renamed == 0:
            raise Killed

    def counted(one: Path, other: Path) -> None:
        nonlocal renames
        replace(one, other)
        if Path(one) in run_dir.resumable:
            renames += 1
            if step == 3 and renames == renamed:
                raise Killed

    monkeypatch.setattr(os, "replace", counted)
    state = SimpleNamespace(fn="fit")
    trainer: Any = SimpleNamespace(save_checkpoint=save_checkpoint, state=state, sanity_checking=False)
    save = SaveRun(run_dir, 0, set())
    for step in (1, 2):  # noqa: B007
        save.on_validation_end(trainer, None)
    step, renames = 3, 0
    with pytest.raises(Killed):
        save.on_validation_end(trainer, None)
    found = {path.stem: torch.load(path, weights_only=True)["step"] for path in run_dir.checkpoints.iterdir()}
    assert found == left
    assert torch.load(newest_whole(run_dir.resumable), weights_only=True)["step"] == 3


# ---- a run on a disk that fills up

FILLS_UP = """
import resource, signal, sys
from funneltfm.cli.main import main
from funneltfm.training.callbacks import SaveRun

original, saved = SaveRun._save, 0

def save(self, trainer, leaves):
    global saved
    saved += 1
    if saved == 3:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, resource.RLIM_INFINITY))
    original(self, trainer, leaves)

SaveRun._save = save
sys.exit(main(["classify", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_a_run_that_cannot_save_ends_with_one_line_and_goes_on_later(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        rows = [f'{{"text_a": "a {("bad", "good")[i % 2]} dog", "label": "{i % 2}"}}\n' for i in range(24)]
        (tmp_path / f"{split}.jsonl").write_text("".join(rows), encoding="utf-8")
    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "bad", "good", "dog")
    (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    flags: dict[str, Any] = {
        "dataset": "custom", "data_dir": str(tmp_path), "tokenizer_path": str(tmp_path / "vocab.txt"),
        "output_dir": str(tmp_path / "processed"), "epochs": 1, "train_bsz": 4, "lr": 1e-2, "n_valid": 6,
        "block_size": "1_1", "d_embed": 8, "d_model": 8, "n_head": 2, "d_head": 4, "d_inner": 16, "device_id": -1,
    }  # fmt: skip
    classify(**flags, model_dir=str(tmp_path / "whole"))
    run_dir = RunDir(tmp_path / "run")
    argv = [f"--{name}={value}" for name, value in flags.items()] + [f"--model_dir={run_dir.root}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "pytorch"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", FILLS_UP, *argv], env=environment, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"funneltfm classify: error: cannot write the checkpoint {run_dir.resumable[0]}: File too ")
    steps = {path.name: torch.load(path, weights_only=True)["global_step"] for path in run_dir.checkpoints.iterdir()}
    assert steps == {"last.ckpt": 2, "previous.ckpt": 1, "best.ckpt": steps["best.ckpt"]}
    assert all(is_whole(path) for path in run_dir.checkpoints.iterdir())
    classify(model_dir=str(run_dir.root), resume=True)
    one, other = (
        torch.load(root / "best" / "model.pt", weights_only=True) for root in (run_dir.root, tmp_path / "whole")
    )
    assert all(torch.equal(one[name], other[name]) for name in other)
