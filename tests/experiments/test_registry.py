"""Experiments by name: what extends what, and what is refused."""

import re
from pathlib import Path

import pytest
import torch
import transformers

from funneltfm.errors import InputError
from funneltfm.experiments.glue import task_flags
from funneltfm.experiments.registry import STAGE_KEYS, Experiments, merge
from funneltfm.experiments.runner import RESERVED, Runner, Settings
from funneltfm.sparse import attach
from funneltfm.training.sparse_run import sparsity_config
from funneltfm.training.train_config import make_train_args


def experiments(folder: Path, text: str) -> Experiments:
    path = folder / "some.yaml"
    path.write_text(text)
    return Experiments([path])


# ---- those that are shipped

SHIPPED = Experiments()


@pytest.mark.parametrize("name", SHIPPED.names)
def test_every_stage_that_is_shipped_is_a_run_that_train_takes(name: str) -> None:
    experiment = SHIPPED.get(name)
    assert experiment.about
    for flags in experiment.stages.values():
        assert not set(RESERVED) & set(flags)
        make_train_args(**{key: value for key, value in flags.items() if key not in STAGE_KEYS})


def test_the_four_rows_have_the_hyper_parameters_of_the_original() -> None:
    """The table of section 2.1 of the specification."""
    rows = ("bert_1mi", "bert_100k", "sparse_80_kd_onecycle_lr", "sparse_80_kd_onecycle_lr_rigl")
    common = {
        "model": "bert", "max_sequence_length": [512], "probability": 0.15, "whole_word_masking": True, "packing": True,
        "across_documents": True, "batch_size": 8, "global_batch_size": 256, "adamw_betas": [0.9, 0.999],
        "adamw_epsilon": 1e-8, "weight_decay": 0.01, "gradient_clip_val": 1.0,
    }  # fmt: skip
    linear = {"learning_rate": 1e-4, "scheduler": "linear_decay", "num_warmup_steps": 2000}
    one_cycle = {
        "scheduler": "one_cycle", "learning_rate": 1.2e-3, "one_cycle_pct_start": 0.3, "one_cycle_anneal": "linear",
        "one_cycle_betas": [0.85, 0.95], "one_cycle_div_factor": 25.0, "one_cycle_final_div_factor": 1e4,
        "precision": "16-mixed", "distill_from": ["{model:bert_1mi}"], "distill_weight": [1.0],
        "distill_temperature": [1.0], "sparsity": 0.8, "sparsity_embeddings": True,
    }  # fmt: skip
    rigl = {"sparsity_method": "rigl_2021", "rigl_drop": 0.3, "sparsity_interval": 100}
    own = {"bert_1mi": linear, "bert_100k": linear, rows[2]: one_cycle | {"sparsity_method": "static"}}
    own[rows[3]] = one_cycle | rigl
    losses = {"bert_1mi": 1.612, "bert_100k": 2.154, rows[2]: 2.28, rows[3]: 2.138}
    for name in rows:
        experiment = SHIPPED.get(name)
        (flags,) = experiment.stages.values()
        expected = common | own[name] | {"max_steps": 1_000_000 if name == "bert_1mi" else 100_000}
        assert {key: flags.get(key) for key in expected} == expected
        assert ("sparsity" in flags) == (name in rows[2:])
        assert experiment.original["loss"] == losses[name]


def test_what_is_sparse_is_what_was_sparse_there() -> None:
    """All linear maps of the encoder and the word embeddings: 107.2 of 107.7 million weights, so 79.6 % are off."""
    flags = SHIPPED.get("sparse_80_kd_onecycle_lr").stages["pretrain"]
    args = make_train_args(**{key: value for key, value in flags.items() if key not in STAGE_KEYS})
    small = transformers.BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=12, num_attention_heads=2,
                                    intermediate_size=32)  # fmt: skip
    model = transformers.BertForMaskedLM(small)
    attach(model, sparsity_config(args))
    names = {name.removesuffix("_mask") for name, _ in model.named_buffers() if name.endswith("_mask")}
    linear = {name for name, one in model.named_parameters() if ".encoder." in name and one.ndim == 2}
    assert len(linear) == 72
    assert names == linear | {"bert.embeddings.word_embeddings.weight"}
    masks = dict(model.named_buffers())
    assert all((masks[f"{name}_mask"].sum(1) == round(0.2 * masks[f"{name}_mask"].shape[1])).all() for name in names)
    with torch.device("meta"):
        base = transformers.BertModel(transformers.BertConfig(vocab_size=28996), add_pooling_layer=False)
    total = sum(one.numel() for one in base.parameters())
    sparse = sum(one.numel() for name, one in base.named_parameters() if f"bert.{name}" in names)
    assert (round(total / 1e6, 1), round(sparse / 1e6, 1)) == (107.7, 107.2)
    assert 0.8 * sparse / total == pytest.approx(0.796, abs=0.0006)


def test_the_examples_of_the_documentation(tmp_path: Path) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "experiments.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```yaml\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    found = experiments(tmp_path, "\n".join(blocks))
    for name in ("mine", "glue-mine", "search-mine"):
        for flags in found.get(name).stages.values():
            make_train_args(**{key: value for key, value in flags.items() if key not in STAGE_KEYS})
    made = Runner(found, Settings(dry_run=True))
    assert set(task_flags(made, found.get("glue-mine"))) == {"cola", "rte", "stsb"}
    made.run(["mine", "glue-mine", "search-mine"])
    for name in re.findall(
        r"`((?:tiny|mini|small|bert|sparse|glue|search)[a-z0-9_*-]*)`", text.partition("## Writing")[2]
    ):
        assert name in ("glue", "search", "small_bert") or found.select([name]), name


# ---- extending


def test_the_nearer_wins_and_null_removes(tmp_path: Path) -> None:
    found = experiments(
        tmp_path,
        """
_none: {stages: {one: {max_steps: null}}}
_a: {about: a, original: {loss: 1}, data: there, stages: {one: {max_steps: 1, seed: 1, loggers: [csv, wandb]}}}
_b: {extends: _a, stages: {one: {seed: 2}, two: {max_steps: 5}}}
c: {extends: [_b, _a, _none], about: c, stages: {one: {loggers: [none], learning_rate: 1e-4}}}
""",
    ).get("c")
    assert list(found.stages) == ["one", "two"]
    assert found.stages["one"] == {"seed": 1, "loggers": ["none"], "learning_rate": 1e-4}  # of _a, named last
    assert (found.about, found.data, found.original) == ("c", "there", {})
    assert (found.run_name("one"), found.run_name("two")) == ("c-one", "c-two")


def test_a_grid_is_an_experiment_for_each_combination(tmp_path: Path) -> None:
    all_of = experiments(
        tmp_path,
        """
_wide: {stages: {one: {batch_size: 64}}}
g:
  stages: {one: {max_steps: 1}}
  grid:
    - {a: , b: {extends: _wide, about: wide}}
    - {80: {stages: {one: {sparsity: 0.8}}}, 90: {stages: {one: {sparsity: 0.9}}}}
""",
    )
    names = all_of.select(["g-*"])
    assert names == ["g-a-80", "g-a-90", "g-b-80", "g-b-90"]
    assert "g" not in all_of.names
    assert all_of.get("g-a-80").stages["one"] == {"max_steps": 1, "sparsity": 0.8}
    assert all_of.get("g-b-90").stages["one"] == {"max_steps": 1, "sparsity": 0.9, "batch_size": 64}
    assert all_of.get("g-b-90").about == "wide"
    assert all_of.select(["g-b-90", "g-*-80"]) == ["g-b-90", "g-a-80", "g-b-80"]


def test_merge_leaves_its_arguments_alone() -> None:
    base = {"a": {"b": 1}}
    assert merge(base, {"a": {"c": 2}}) == {"a": {"b": 1, "c": 2}}
    assert base == {"a": {"b": 1}}


REFUSED = {
    "circle": ("a: {extends: b}\nb: {extends: c}\nc: {extends: a}", "a -> b -> c -> a"),
    "itself": ("a: {extends: a}", "a -> a"),
    "no parent": ("a: {extends: bert_10k}", "'bert_10k', which is not there. Did you mean bert_100k?"),
    "unknown key": ("a: {stage: {}}", "unknown key 'stage'.*Did you mean stages?"),
    "unknown flag": ("a: {stages: {one: {learning_rat: 1}}}", "a: one: 'learning_rat' is no flag.*learning_rate?"),
    "nothing to do": ("a: {about: nothing}", "there is nothing to run"),
    "no mapping": ("a: 3", "a must be a mapping"),
    "stages are no mapping": ("a: {stages: [1]}", "stages must be a mapping"),
    "a stage is no mapping": ("a: {stages: {one: 3}}", "one must be a mapping of flags"),
    "there already": ("bert_1mi: {stages: {}}", "there is an experiment bert_1mi already"),
    "a name like a path": ("a/b: {stages: {}}", "letters, digits"),
    "twice": ("a: {about: x}\na: {about: y}", "a is there twice"),
    "grid meets a name": ("a-x: {stages: {}}\na: {grid: [{x: {}}]}", "makes a-x, which is there"),
    "an axis is no mapping": ("a: {grid: [x]}", "an axis of grid is a mapping"),
    "a list": ("- a", "must hold a mapping"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(tmp_path: Path, case: str) -> None:
    text, said = REFUSED[case]
    with pytest.raises(InputError, match=said.replace("?", r"\?")) as caught:
        experiments(tmp_path, text).get("a")
    assert len(str(caught.value)) < 600


def test_unknown_names_and_templates() -> None:
    for name in ("bert_10k", "_mlm"):
        with pytest.raises(InputError, match=f"no experiment '{name}'"):
            SHIPPED.get(name)
    with pytest.raises(InputError, match=r"Did you mean bert_100k.*--list"):
        SHIPPED.select(["bert_10k"])
    with pytest.raises(InputError, match="no experiment 'none-"):
        SHIPPED.select(["none-*"])
