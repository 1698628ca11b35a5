"""`funneltfm batch-size`: from flags to the table."""

import json
from pathlib import Path

import pytest

from funneltfm.cli.main import main
from funneltfm.training import batch_size
from funneltfm.training.batch_size import GIB, Case

OWN = ("--d_embed=16", "--d_model=16", "--n_head=2", "--d_head=8", "--d_inner=32", "--block_size=1_1")


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """Trials are made up: 1/2 GiB, and a byte for every (token * width * 1000); what was tried."""
    seen: list[Case] = []

    def measure(case: Case, batch: int, limit: int) -> int | None:
        seen.append(case)
        peak = GIB // 2 + batch * case.length * case.config.d_model * 1000
        return peak if peak <= limit else None

    monkeypatch.setitem(batch_size.MEASURE, "cpu", measure)
    return seen


def test_a_real_search(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "table.json"
    flags = ["--lengths=9", "--memory_limit=3", "--max_batch=1", "--device_id=-1", "--vocab_size=50"]
    assert main(["batch-size", *OWN, *flags, f"--output={output}"]) == 0
    out, err = capsys.readouterr()
    title, lengths, row = out.splitlines()
    assert title.startswith("batch size guideline: CPU (")
    assert title.endswith(", 3 GiB, fp32, gradient checkpointing off")
    assert lengths.split() == ["sequence", "length", "9"]
    assert row.split() == ["B1-1H16", "1+"]
    assert "B1-1H16, length 9: 1 takes 0." in err
    saved = json.loads(output.read_text())
    (cell,) = saved["cells"]
    assert saved["memory_limit"] == 3 * GIB
    assert (cell["batch_size"], cell["padded_length"], cell["max_batch_reached"]) == (1, 10, True)
    assert [trial["batch_size"] for trial in cell["trials"]] == [1]
    assert GIB / 8 < cell["peak_bytes"] < 2 * GIB


def test_sizes_by_lengths(cases: list[Case], capsys: pytest.CaptureFixture) -> None:
    flags = ["--model_size=B8-8-8H1024,H768", "--lengths=512,64", "--memory_limit=1", "--num_class=5", "--bf16"]
    assert main(["batch-size", *flags, "--device_id=-1", "--gradient_checkpointing", "--dropatt=0"]) == 0
    expected = [[GIB // 2 // (length * width * 1000) for length in (512, 64)] for width in (1024, 768)]
    title, _, *rows = capsys.readouterr().out.splitlines()
    assert title.endswith("1 GiB, bf16 O2, gradient checkpointing on")
    assert [row.split() for row in rows] == [
        ["B8-8-8H1024", *map(str, expected[0])],
        ["B4-4-4H768", *map(str, expected[1])],
    ]
    for case in cases:
        config = case.config
        assert (config.vocab_size, config.num_class, config.dropatt) == (30522, 5, 0)
        assert config.separate_cls
        assert config.pool_q_only
        assert config.truncate_seq
        assert case.flags == {"device_id": -1, "bf16": True, "gradient_checkpointing": True}


def test_the_flags_of_an_own_model(cases: list[Case]) -> None:
    assert main(["batch-size", *OWN, "--lengths=8", "--memory_limit=1", "--no_separate_cls", "--device_id=-1"]) == 0
    assert {(case.config.d_model, case.config.blocks, case.config.separate_cls) for case in cases} == {
        (16, ((1, 1), (1, 1)), False)
    }


def test_not_even_one_fits(cases: list[Case], capsys: pytest.CaptureFixture) -> None:
    assert main(["batch-size", *OWN, "--lengths=8", "--memory_limit=0.4", "--device_id=-1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["B1-1H16", "-"]
    assert len(cases) == 1


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        ({"lengths": "64,x"}, 2, "whole numbers separated by commas, as in 64,128; got '64,x'"),
        ({"lengths": ""}, 2, "whole numbers separated by commas"),
        ({"lengths": "0"}, 1, "at least 1; got 0"),
        ({"memory_limit": None}, 1, "on the CPU say how much memory training may take: --memory_limit=8"),
        ({"memory_limit": "much"}, 2, "memory_limit"),
        ({"max_batch": 0}, 1, "max_batch must be at least 1; got 0"),
        ({"model_size": "B4-4-4H768,H512"}, 1, "got 'H512'"),
        ({"model_size": "H768", "d_model": 512}, 1, "--model_size=H768 sets d_model to 768, but --d_model=512"),
        ({"d_model": 7}, 1, "d_model must be even"),
        ({"train_bsz": 8}, 2, "--train_bsz"),
        ({"output": "."}, 1, "output must be a file"),
    ],
)
def test_a_mistake_is_one_paragraph(
    cases: list[Case], capsys: pytest.CaptureFixture, flags: dict, code: int, said: str
) -> None:
    given = {"lengths": "8", "memory_limit": 1, "device_id": -1} | flags
    words = [f"--{name}={value}" for name, value in given.items() if value is not None]
    assert main(["batch-size", *words]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("funneltfm batch-size: error: ")
    assert err.count("\n") == 1
    assert said in err
    assert cases == []
