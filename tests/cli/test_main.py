"""The command: its help, its exit codes, and one paragraph for every mistake a person can make."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from funneltfm import __version__
from funneltfm.cli.main import main
from funneltfm.errors import InputError, Stopped
from funneltfm.training.config import flag_fields

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT / "pytorch"), "OMP_NUM_THREADS": "1"}
COMMAND = [sys.executable, str(ROOT / "pytorch" / "classifier.py")]

# The flags of the original's classifier.py, with its defaults where it has them (specification, section 2).
ORIGINAL = {
    "overwrite_keys": "''", "model_size": None, "vocab_size": None, "d_model": 768, "d_embed": 768, "n_head": 12,
    "d_head": 64, "d_inner": 3072, "dropout": 0.1, "dropatt": 0.1, "dropact": 0.0, "attn_type": "rel_shift",
    "data_dir": None, "output_dir": None, "dataset": None, "max_length": 128, "tokenizer_type": "word_piece",
    "tokenizer_path": None, "cased": False, "overwrite_data": False, "seg_id_a": 0, "seg_id_b": 1, "seg_id_cls": 2,
    "seg_id_pad": 0, "resume": False, "init_ckpt": None, "init_ckpt_config": None, "model_dir": None, "log_path": None,
    "lr": 1e-5, "warmup_prop": 0.1, "min_lr": 0.0, "weight_decay": 0.01, "clip": 1.0, "epochs": 10, "train_bsz": 16,
    "valid_bsz": 32, "test_bsz": 32, "seed": None, "n_log_epoch": 20, "test_only": False, "debug": False,
    "write_prediction": False, "device_id": 0, "distributed_init_method": None, "distributed_port": 11111,
    "distributed_world_size": None, "distributed_rank": None, "ddp_backend": None, "distributed_backend": "nccl",
    "log_all_processes": False, "block_size": "4_4_4", "pooling_type": "mean", "pooling_size": 2, "pool_q_only": False,
    "separate_cls": False, "truncate_seq": False, "fp16": False, "amp_opt": "O2",
}  # fmt: skip
CHOICES = {
    "attn_type": "rel_shift,factorized", "tokenizer_type": "word_piece,sent_piece", "ddp_backend": "apex,pytorch",
    "pooling_type": "mean,max,min",
}  # fmt: skip


def run(*argv: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *argv], capture_output=True, text=True, env=ENVIRONMENT, timeout=120, **kwargs)


# ---- help


@pytest.fixture(scope="module")
def help_text() -> str:
    done = run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    return " ".join(done.stdout.split())


@pytest.mark.parametrize("name", list(ORIGINAL))
def test_help_has_every_flag_of_the_original_with_its_default(help_text: str, name: str) -> None:
    match = re.search(rf" --{name} .*?\((?:type: [^()]*, )?default: ([^)]*)\)", help_text)
    assert match, f"--{name}"
    assert " --" not in match[0].replace(f" --{name}", "", 1).replace(f", --no_{name}", "")  # its own default
    default = match[1]
    if ORIGINAL[name] is not None:
        shown = {"''": "", "none": "", "null": "None", "False": False, "false": False}.get(default, default)
        expected = "" if ORIGINAL[name] == "''" else ORIGINAL[name]
        assert shown == expected or float(shown) == expected
    if name in CHOICES:
        assert f"--{name} {{{CHOICES[name]}}}" in help_text


def test_help_has_every_flag_with_a_default_and_an_explanation(help_text: str) -> None:
    for name in flag_fields():
        assert re.search(rf" --{name} .*?[.)] \((type: [^()]*, )?default: [^)]*\)", help_text), name


def test_help_does_not_import_torch() -> None:
    code = """
import sys
from funneltfm.cli.main import main
for argv in (["--help"], ["--version"], ["classify", "--help"], ["classify", "--config=none.yaml"]):
    try:
        main(argv)
    except SystemExit:
        pass
print(sorted({"torch", "lightning", "numpy", "sklearn", "matplotlib"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"


def test_verbs(capsys: pytest.CaptureFixture) -> None:
    assert main(["--help"]) == 0
    assert "classify" in capsys.readouterr().out
    assert main([]) == 2
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.endswith(f"funneltfm {__version__}\n")
    assert main(["clasify"]) == 2
    assert "no verb 'clasify'; the verbs are classify" in capsys.readouterr().err


# ---- mistakes

WORDS = ("a", "bad", "cat", "dog", "good", "man", "not", "old", "red", "the", "was", "we")
MODEL = {"block_size": "1_1", "d_embed": 8, "d_model": 8, "n_head": 2, "d_head": 4, "d_inner": 16}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in: data/, vocab.txt, and a checkpoint in ckpt/."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for split in ("train", "valid"):
        rows = [{"text_a": f"the {word} was good", "label": ["no", "yes"][i % 2]} for i, word in enumerate(WORDS)]
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    (tmp_path / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces), encoding="utf-8")
    return tmp_path


@pytest.fixture
def checkpoint(place: Path) -> Path:
    from funneltfm.funnel.checkpoints import save_checkpoint
    from funneltfm.funnel.config import ModelConfig
    from funneltfm.funnel.model import FunnelTFM

    torch.manual_seed(0)
    config = ModelConfig(**MODEL, vocab_size=len(WORDS) + 4)
    (place / "ckpt").mkdir()
    config.to_json(place / "ckpt" / "net_config.json")
    save_checkpoint(FunnelTFM(config), place / "ckpt" / "model.pt")
    return place / "ckpt" / "model.pt"


def classify(**flags: object) -> list[str]:
    """The command line of a small run; None leaves a flag out."""
    values = {
        "dataset": "custom", "data_dir": "data", "tokenizer_path": "vocab.txt", "model_dir": "run", "epochs": 1,
        "n_valid": 1, "device_id": -1, **MODEL,
    } | flags  # fmt: skip
    return ["classify", *(f"--{name}={value}" for name, value in values.items() if value is not None)]


def refused(capsys: pytest.CaptureFixture, argv: list[str]) -> str:
    """What is said of a mistake: exit code not 0, one paragraph on stderr, nothing on stdout, no traceback."""
    try:
        code = main(argv)
    except SystemExit as exit_:
        code = exit_.code
    out, err = capsys.readouterr()
    assert code in (1, 2)
    assert out == ""
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if "error: " in line]
    assert len(lines) == 1
    assert err.endswith(lines[0] + "\n")  # the last thing said, and one paragraph
    assert lines[0].startswith("funneltfm classify: error: ")
    assert len(lines[0]) < 1200
    return lines[0]


def write(place: Path, name: str, content: str | bytes) -> None:
    path = place / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


MISTAKES: dict[str, tuple[dict[str, str | bytes], dict[str, object], list[str]]] = {
    # name: (files to write first, flags, what must be said)
    "misspelt flag": ({}, {"learning_rate": 1}, ["--learning_rate"]),
    "nearly a flag": ({}, {"epoch": 1}, ["--epoch", "Did you mean --epochs?"]),
    "wrong choice": ({}, {"attn_type": "relshift"}, ["attn_type", "relshift", "rel_shift", "factorized"]),
    "not a number": ({}, {"lr": "fast"}, ["lr", "fast", "number"]),
    "out of range": ({}, {"warmup_prop": 2}, ["warmup_prop", "between 0 and 1", "2"]),
    "no dataset": ({}, {"dataset": None}, ["--dataset", "--data_dir"]),
    "no data_dir": ({}, {"data_dir": None}, ["--data_dir"]),
    "no vocabulary": ({}, {"tokenizer_path": None}, ["--tokenizer_path"]),
    "unknown dataset": ({}, {"dataset": "Cola2"}, ["Cola2", "Did you mean CoLA?", "MNLI"]),
    "missing folder": ({}, {"data_dir": "dta"}, ["dta", "no such folder"]),
    "missing file": ({}, {"dataset": "CoLA"}, ["train.tsv", "data", "train.jsonl", "download_glue.sh"]),
    "missing vocabulary": ({}, {"tokenizer_path": "none.txt"}, ["none.txt", "does not exist", "tokenizer_path"]),
    "vocabulary is a folder": ({}, {"tokenizer_path": "data"}, ["data is a folder"]),
    "label not in the set": (
        {"data/valid.jsonl": '{"text_a": "a", "label": "no"}\n{"text_a": "a", "label": "maybe"}\n'}, {},
        ["valid.jsonl, line 2", "no, yes", "maybe"],
    ),
    "empty file": ({"data/train.jsonl": ""}, {}, ["train.jsonl", "empty"]),
    "broken row": (
        {"data/train.jsonl": '{"text_a": "a", "label": "no"}\n{"text_a": "a", \n'}, {},
        ["train.jsonl, line 2", "JSON object", "bad_rows=skip"],
    ),
    "wrong column": ({}, {"text_a": "sentence"}, ["train.jsonl, line 1", "'sentence'", "text_a", "label"]),
    "columns of a known set": ({}, {"dataset": "CoLA", "text_a": "x"}, ["--text_a", "custom"]),
    "file as model_dir": ({"run": "mine"}, {}, ["run", "is a file"]),
    "file in model_dir": ({"up": "mine"}, {"model_dir": "up/run"}, ["up"]),
    "file as output_dir": ({"proc": "mine"}, {"output_dir": "proc"}, ["proc"]),
    "folder as log_path": ({}, {"log_path": "data"}, ["data"]),
    "model_dir with a run": ({"run/results.json": "{}"}, {}, ["run already holds a run", "--resume", "--overwrite"]),
    "nothing to resume": ({}, {"resume": "true"}, ["nothing to resume", "run/checkpoints", "without --resume"]),
    "nothing to test": ({}, {"test_only": "true"}, ["--test_only", "--init_ckpt", "--model_dir"]),
    "missing checkpoint": ({}, {"init_ckpt": "none.pt"}, ["none.pt", "no such file"]),
    "unreadable checkpoint": (
        {"bad/model.pt": b"no checkpoint", "bad/net_config.json": "{}"}, {"init_ckpt": "bad/model.pt"},
        ["bad/model.pt", "not a checkpoint", "torch.save"],
    ),
    "empty checkpoint": (
        {"bad/model.pt": b"", "bad/net_config.json": "{}"}, {"init_ckpt": "bad/model.pt"}, ["bad/model.pt"],
    ),
    "checkpoint without config": (
        {"bad/model.pt": b"x"}, {"init_ckpt": "bad/model.pt"}, ["net_config.json", "bad/model.pt", "--init_ckpt_config"]
    ),
    "corrupt config": (
        {"bad.json": '{"d_model": 8,'}, {"init_ckpt": "ckpt/model.pt", "init_ckpt_config": "bad.json"}, ["bad.json"]
    ),
    "unknown key in config": (
        {"bad.json": '{"d_modell": 8}'}, {"init_ckpt": "ckpt/model.pt", "init_ckpt_config": "bad.json"},
        ["bad.json", "d_modell", "d_model"],
    ),
    "config without checkpoint": ({}, {"init_ckpt_config": "ckpt/net_config.json"}, ["--init_ckpt"]),
    "vocabulary of another checkpoint": (
        {"vocab2.txt": "[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n"},
        {"init_ckpt": "ckpt/model.pt", "tokenizer_path": "vocab2.txt"},
        ["vocabulary does not match", "vocab2.txt has 5", "16"],
    ),
    "vocabulary without [CLS]": (
        {"vocab2.txt": "[PAD]\n[UNK]\na\n"}, {"tokenizer_path": "vocab2.txt"}, ["vocab2.txt", "[CLS]"]
    ),
    "no such model size": ({}, {"model_size": "H512"}, ["model_size", "H768", "H512"]),
    "bad block_size": ({}, {"block_size": "4-4"}, ["block_size", "4_4_4", "4-4"]),
    "odd d_model": ({}, {"d_model": 7}, ["d_model", "even", "7"]),
    "no such key to overwrite": (
        {}, {"init_ckpt": "ckpt/model.pt", "overwrite_keys": "dropuot"}, ["overwrite_keys", "dropuot", "dropout"]
    ),
    "missing yaml": ({}, {"config": "none.yaml"}, ["none.yaml"]),
    "bad yaml": ({"flags.yaml": "lr: [1\n"}, {"config": "flags.yaml"}, ["flags.yaml"]),
    "unknown key in yaml": (
        {"flags.yaml": "learning_rte: 1\n"}, {"config": "flags.yaml"}, ["learning_rte", "flags.yaml"]
    ),
    "no such gpu": ({}, {"device_id": 99}, ["device_id", "99", "-1"]),
    "level without precision": ({}, {"amp_opt": "O1"}, ["--amp_opt=O1", "--fp16", "--bf16"]),
    "two precisions": ({}, {"fp16": "true", "bf16": "true"}, ["fp16", "bf16", "exclude"]),
    "no such level": ({}, {"fp16": "true", "amp_opt": "O4"}, ["amp_opt", "O4", "O0", "O3"]),
    "nccl without gpus": ({}, {"distributed_backend": "nccl"}, ["--distributed_backend=nccl", "GPUs"]),
    "fewer than no processes": ({}, {"distributed_world_size": -2}, ["distributed_world_size", "-2"]),
    "no place to meet": (
        {}, {"distributed_init_method": "file:///x", "distributed_world_size": 2}, ["tcp://HOST:PORT", "file:///x"]
    ),
    "rank without place": (
        {}, {"distributed_init_method": "tcp://127.0.0.1:1", "distributed_world_size": 2, "distributed_rank": 2},
        ["distributed_rank", "below distributed_world_size, 2"],
    ),
    "seed too large": ({}, {"seed": 2**32}, ["seed", "4294967296"]),
}  # fmt: skip


@pytest.mark.usefixtures("checkpoint")
@pytest.mark.parametrize("name", list(MISTAKES))
def test_a_mistake_is_one_paragraph(name: str, place: Path, capsys: pytest.CaptureFixture) -> None:
    files, flags, said = MISTAKES[name]
    for path, content in files.items():
        write(place, path, content)
    message = refused(capsys, classify(**flags))
    assert [word for word in said if word not in message] == [], message
    if name not in ("model_dir with a run", "file as model_dir"):
        assert not (place / "run").exists()  # a mistake leaves no run behind


@pytest.mark.usefixtures("place")
def test_no_flags_at_all(capsys: pytest.CaptureFixture) -> None:
    message = refused(capsys, ["classify"])
    assert "--dataset" in message
    assert "--data_dir" in message


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("word", ["--debug", "--debug=true"])
def test_debug_shows_where(word: str) -> None:
    with pytest.raises(InputError, match="Expected a vocabulary file"):  # Python prints the traceback
        main([*classify(tokenizer_path="none.txt"), word])


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("word", ["--debug=false", "--no_debug"])
def test_no_debug_does_not(word: str, capsys: pytest.CaptureFixture) -> None:
    assert "none.txt" in refused(capsys, [*classify(tokenizer_path="none.txt"), word])


def test_debug_from_a_file_shows_where(place: Path) -> None:
    write(place, "flags.yaml", "debug: true\n")
    with pytest.raises(InputError, match="Expected a vocabulary file"):
        main(classify(tokenizer_path="none.txt", config="flags.yaml"))


# ---- runs


def test_a_run_from_the_command_line(place: Path, capsys: pytest.CaptureFixture) -> None:
    """Results on disk, what is said on stderr, nothing on stdout; relative paths mean where one is."""
    sub = place / "some where"
    sub.mkdir()
    done = run(*classify(data_dir="../data", tokenizer_path="../vocab.txt")[1:], cwd=sub)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert json.loads((sub / "run" / "results.json").read_text(encoding="utf-8"))["task"] == "data"
    assert "Warning" not in done.stderr
    assert "warning" not in done.stderr
    assert "\r" not in done.stderr  # no bar where there is no terminal
    assert "everything is in run" in done.stderr
    assert re.search(r"FunnelTFM +valid +\d\.\d{4}", done.stderr)
    # The folder may be used from anywhere afterwards: the one it was started in need not be known.
    assert main(["classify", "--test_only", f"--model_dir={sub / 'run'}"]) == 0, capsys.readouterr().err


def test_yaml_and_flags_together(place: Path, capsys: pytest.CaptureFixture) -> None:
    lines = [f"{argument[2:].replace('=', ': ', 1)}\n" for argument in classify(block_size=None, seed=5)[1:]]
    write(place, "flags.yaml", "".join(lines) + "block_size: '1_1'\n")
    assert main(["classify", "--model_dir=other", "--config", "flags.yaml", "--seed=6"]) == 0
    text = (place / "other" / "config.yaml").read_text(encoding="utf-8")
    assert "seed: 6\n" in text
    assert "d_model: 8\n" in text
    assert not (place / "run").exists()


def test_ctrl_c_says_how_to_go_on(place: Path) -> None:
    # A shell starts background jobs with SIGINT ignored, and children inherit that: a job of CI is no terminal.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            [*COMMAND, *classify(epochs=100000, n_valid=100000)[1:]], cwd=place, env=ENVIRONMENT, text=True,
            stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, handler)
    with process:
        try:
            deadline = time.monotonic() + 120
            while not (place / "run" / "checkpoints" / "last.ckpt").is_file() and time.monotonic() < deadline:
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 130
    assert out == ""
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert re.fullmatch(
        r"funneltfm classify: stopped\. Saved after step \d+; go on with --resume --model_dir=run", last
    )


def test_run_as_a_module() -> None:
    command = [sys.executable, "-m", "funneltfm"]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"funneltfm {__version__}\n", "")
    done = subprocess.run([*command, "clasify"], capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no verb 'clasify'" in done.stderr


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "\nfunneltfm classify: stopped.\n"),
        (KeyboardInterrupt("Nothing was saved yet."), 130, "\nfunneltfm classify: stopped. Nothing was saved yet.\n"),
        (Stopped(signal.SIGTERM, "Go on."), 143, "\nfunneltfm classify: stopped. Go on.\n"),
        (Stopped(signal.SIGUSR1, "Go on."), 138, "\nfunneltfm classify: stopped. Go on.\n"),
        (Stopped(signal.SIGINT), 130, ""),  # another process has said it
    ],
    ids=repr,
)
def test_the_exit_code_says_which_signal(
    error: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def stopped(argv: list[str]) -> None:
        raise error

    monkeypatch.setattr("funneltfm.cli.classify.main", stopped)
    assert main(["classify"]) == code
    assert capsys.readouterr() == ("", said)
