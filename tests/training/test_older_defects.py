"""The 22 defects of the framework whose flags and folders we keep, by their numbers: none of them is here.

Run as a program it puts each back, in a copy of the project, and tells whether its test notices.
"""

import ast
import dataclasses
import importlib
import inspect
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from packaging.requirements import Requirement

from funneltfm.cli.flags import FlagParser
from funneltfm.cli.train import main as show_help
from funneltfm.data.features import TrainLoader
from funneltfm.data.text import TextEncoder, get_text_tokenizer
from funneltfm.summaries import rouge
from funneltfm.tasks.base import Collate, Prepare, encode_rows, make_tasks
from funneltfm.tasks.retrieval import PAIR_LOSSES
from funneltfm.training.model_source import make_heads
from funneltfm.training.optimizer_flags import READS
from funneltfm.training.optimizers import make_optimizer, make_scheduler
from funneltfm.training.outputs import Outputs
from funneltfm.training.train import StepSampler, predict, train
from funneltfm.training.train_config import TRAIN_GROUPS, make_train_args

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["the", "cat", "dog", "sat", "ran", "on", "a", "mat", "home", "who", "where", "red", "blue", "?", "."]
TINY = ("hidden_size=16", "num_hidden_layers=1", "num_attention_heads=2", "intermediate_size=32")
TEXTS = [{"text": f"the {a} {b} home", "label": int(a == "cat")} for a in ("cat", "dog") for b in ("sat", "ran")] * 3
PAIRS = [
    {"q": q, "a": a, "label": int(a == "the red cat")}
    for q in ("who sat ?", "where ?")
    for a in ("the red cat", "a mat", "the dog ran")
]
QUESTIONS = [
    {"question": "who sat ?", "context": "the cat sat .", "answers": {"text": ["cat"], "answer_start": [4]}},
    {"question": "who ran ?", "context": "a dog ran home", "answers": {"text": ["dog"], "answer_start": [2]}},
]


def files(folder: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Flags of a tiny run on these rows."""
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": "bert", "name": "run", "additional_config_kwargs": TINY, "pre_trained_tokenizer": str(vocabulary),
        "output_dir": str(folder / "out"), "train_dataset": (str(data),), "valid_dataset": str(data),
        "max_sequence_length": 24, "batch_size": 4, "max_epochs": 2, "learning_rate": 1e-2,
    }  # fmt: skip


def heads_of(folder: Path, pipeline: str, **more: Any) -> Any:
    args = make_train_args(**files(folder, TEXTS) | {"pipeline": pipeline, **more})
    tasks = make_tasks(pipeline, args)
    for task in tasks:
        task.learn(TEXTS)
    tokenizer = get_text_tokenizer(args.pre_trained_tokenizer)
    return args, tasks, tokenizer, make_heads(args, tasks, tokenizer)


def batch_of(folder: Path, pipeline: str) -> Any:
    _, tasks, tokenizer, heads = heads_of(folder, pipeline)
    text = TextEncoder(tokenizer, 16)
    features = encode_rows(tasks, TEXTS, text, "data")
    examples = [Prepare(tasks, text, 1)(features[i], 0) for i in range(len(features))]
    return tasks, heads, Collate(tasks, tokenizer)(examples)


def test_01_the_setup_reads_files_that_are_there():
    named = set(re.findall(r"\$ROOT/([\w.-]+)", (ROOT / "scripts/setup.sh").read_text())) - {".venv"}
    assert {"pyproject.toml", "constraints.txt"} <= named
    assert all((ROOT / name).is_file() for name in named)


def test_02_requirements_are_valid_and_pin_and_fetch_nothing():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in [
        *project["dependencies"],
        *(line for lines in project["optional-dependencies"].values() for line in lines),
    ]:
        requirement = Requirement(line)
        assert requirement.url is None
        assert not any(spec.operator in ("==", "===") for spec in requirement.specifier)


def optional_modules() -> set[str]:
    """What the extras install, and what the older framework wanted of everybody."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (line for lines in project["optional-dependencies"].values() for line in lines)
    names = {Requirement(line).name for line in lines} - {project["name"]}
    assert {"datasets", "transformers", "ray", "bitsandbytes", "wandb", "tensorflow-cpu"} <= names
    modules = {"tensorflow-cpu": "tensorflow", "pytest-xdist": "xdist", "pytrec-eval-terrier": "pytrec_eval"}
    older = "deepspeed bitsandbytes boto3 sentence_transformers numba blingfire apex"
    return {modules.get(name, name.replace("-", "_")) for name in names} | {*older.split()}


@pytest.mark.parametrize(
    ("modules", "by_others"),
    [
        ("funneltfm", ()),
        # torchmetrics, which Lightning imports, takes transformers where it is, and that what it finds
        (
            "funneltfm.cli.main, funneltfm.training.classify, funneltfm.training.train",
            ("transformers", "safetensors", "accelerate", "psutil"),
        ),
    ],
)
def test_03_no_optional_dependency_is_imported(modules, by_others):
    code = f"import sys, {modules}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT / "pytorch"
    )
    loaded = set(done.stdout.split())
    assert "funneltfm" in loaded
    assert (loaded & optional_modules()).difference(by_others) == set()


def test_03_every_module_finds_its_optional_dependencies_late():
    """All but what is written for transformers alone import them where they are needed."""
    optional, bound = (
        optional_modules(),
        {"funnel/hf.py", "lsg/auto.py", "lsg/convert.py", "lsg/layer.py", "lsg/models.py"},
    )
    for path in (ROOT / "pytorch/funneltfm").rglob("*.py"):
        name = path.relative_to(ROOT / "pytorch/funneltfm").as_posix()
        at_once = set()
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            for inner in ast.walk(node) if isinstance(node, ast.Import | ast.ImportFrom | ast.Try | ast.If) else ():
                if isinstance(inner, ast.Import):
                    at_once |= {alias.name.partition(".")[0] for alias in inner.names}
                elif isinstance(inner, ast.ImportFrom):
                    at_once.add(str(inner.module).partition(".")[0])
        assert at_once & optional <= ({"transformers"} if name in bound else set()), name


def test_04_what_is_imported_of_transformers_is_there():
    found = 0
    for path in (ROOT / "pytorch/funneltfm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformers":
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), (path, node.lineno)
                found += 1
    assert found


def documented() -> list[tuple[str, str]]:
    """README.md and docs/, each with its name; a command that goes on in the next line is one line."""
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [(path.name, path.read_text(encoding="utf-8").replace("\\\n", " ")) for path in paths]


def test_05_help_lists_every_flag(capsys):
    with pytest.raises(SystemExit):
        show_help(["--help"])
    listed = set(re.findall(r"^ +--(\w+)", capsys.readouterr().out, re.MULTILINE))
    groups = [({field.name for field in dataclasses.fields(cls)}, skip) for _, cls, skip in TRAIN_GROUPS]
    fields = {name for names, skip in groups for name in names.difference(skip)}
    assert len(fields) > 100
    told = {name for page, text in documented() if page == "pipelines.md" for name in re.findall(r"--([a-z]\w+)", text)}
    assert len(told) > 50
    assert (fields | told) - listed == {"help", "output_file"}  # -h comes first; the other is a flag of predict


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with the defaults of devices, workers and folders, on a machine without a network."""
    folder = tmp_path_factory.mktemp("run")

    def connect(self, address):
        raise AssertionError(f"the run asked {address}")

    flags = files(folder, TEXTS) | {"pipeline": "seq_class", "precision": "16", "weight_decay": 0.1}
    flags |= {"test_dataset": flags["valid_dataset"]}
    del flags["output_dir"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(socket.socket, "connect", connect)
        results = train(**flags)
    return folder, results


def test_06_workers_and_devices_have_defaults_that_work(run):
    _, results = run
    assert (results["processes"], results["steps"]) == (1, 6)


def test_07_precision_16(run):
    _, results = run
    assert results["precision"] == "16-mixed"


def test_07_the_commands_of_the_documentation_are_understood():
    parser = FlagParser(TRAIN_GROUPS, prog="funneltfm train")
    text = "\n".join(text for _, text in documented())
    lines = re.findall(r"^ *\S*funneltfm train (--.+)", text, re.MULTILINE)
    commands = [shlex.split(line) for line in lines if not {"$", "`"} & {*line}]
    assert len(commands) > 7
    for words in commands:
        flags, given = parser.parse([word for word in words if word != "..."])
        make_train_args(**{name: flags[name] for name in given})


def test_08_nothing_is_written_outside_of_the_outputs_and_nothing_removed(run):
    folder, _ = run
    assert {path.name for path in folder.iterdir()} == {"vocab.txt", "rows.jsonl", "outputs"}
    defaults = FlagParser(TRAIN_GROUPS, prog="train", description="").defaults.values()
    assert not any(isinstance(value, str) and value.startswith("/") for value in defaults)


@pytest.mark.parametrize("scheduler", READS["scheduler"])
def test_09_every_schedule_runs_to_its_end(scheduler):
    more = {"sqrt_decay": {"num_warmup_steps": 1}, "polynomial_decay_layerwise": {"layerwise_lr_decay": 0.9}}
    args = make_train_args(pipeline="seq_class", scheduler=scheduler, **more.get(scheduler, {}))
    model = transformers.BertModel(transformers.BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1,
                                   num_attention_heads=2, intermediate_size=8))  # fmt: skip
    optimizer = make_optimizer(model, args)
    schedule = make_scheduler(optimizer, args, 8, 4)
    rates = []
    for _ in range(8):
        rates.append(optimizer.param_groups[-1]["lr"])
        optimizer.step()
        schedule.step()
    assert max(rates) > 0
    if scheduler == "one_cycle":  # torch's own: the last step has its end
        assert 0 < rates[-1] < max(rates) / 1e5
        return
    assert optimizer.param_groups[-1]["lr"] == (rates[0] if scheduler == "constant" else 0)


def test_10_the_bar_on_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    train(**files(tmp_path, TEXTS), pipeline="seq_class", log_every_n_steps=1)
    shown = capsys.readouterr().err
    assert "training" in shown
    assert "6/6 [" in shown
    train(**files(tmp_path, TEXTS), pipeline="seq_class", overwrite=True, enable_progress_bar=False)
    assert "6/6 [" not in capsys.readouterr().err


def test_11_jsonl_in_predictions_out(run):
    folder, _ = run
    lines = (Outputs(folder / "outputs", "run").predictions / "test.jsonl").read_text().splitlines()
    assert [json.loads(line)["label"] for line in lines] == [row["label"] for row in TEXTS]


def test_12_resume_and_test_on_the_best(run):
    folder, results = run
    out = Outputs(folder / "outputs", "run")
    assert results["test"] == results["valid"]  # the same rows: of the same model
    assert results["best"] == results["valid"]["seq_class/accuracy"]
    for path in out.checkpoints.iterdir():
        torch.load(path, weights_only=True)
    again = train(name="run", output_dir=str(out.root), resume=True)
    assert again["test"] == results["test"]


def test_13_biases_and_norms_train_under_weight_decay(tmp_path):
    args, _, _, heads = heads_of(tmp_path, "seq_class", weight_decay=0.1)
    optimizer = make_optimizer(heads, args)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1, 0.0}
    before = {name: p.detach().clone() for name, p in heads.named_parameters()}
    for parameter in heads.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(not torch.equal(before[name], p) for name, p in heads.named_parameters())


@pytest.mark.parametrize("pipeline", ["masked_lm", "masked_lm+seq_class", "random_token_detection", "electra"])
def test_14_an_encoder_gets_what_it_takes(tmp_path, pipeline):
    """Whatever an objective adds to its examples, the model sees input_ids and their like alone."""
    _, heads, batch = batch_of(tmp_path, pipeline)
    assert batch["inputs"].keys() <= inspect.signature(heads.backbone.forward).parameters.keys()
    heads(batch["inputs"])


def test_15_models_that_share_weights_are_whole_when_they_are_tied(tmp_path):
    tasks, heads, batch = batch_of(tmp_path, "masked_lm+seq_class")
    masked, classifier = heads.models["masked_lm"], heads.models["seq_class"]
    table = classifier.get_input_embeddings().weight
    assert masked.get_input_embeddings().weight is table
    assert masked.get_output_embeddings().weight is table
    hidden = heads(batch["inputs"])
    sum(task.loss(task.logits(heads.models[task.name], hidden, batch), batch) for task in tasks).backward()
    assert table.grad is not None


def test_15_electra_has_its_generator(tmp_path):
    train(**files(tmp_path, TEXTS), pipeline="electra", embedding_sharing="tied")
    best = Outputs(tmp_path / "out", "run").best
    generator = transformers.AutoModelForMaskedLM.from_pretrained(best / "generator")
    discriminator = transformers.AutoModelForTokenClassification.from_pretrained(best)
    tables = [model.get_input_embeddings().weight for model in (generator, discriminator)]
    assert torch.equal(*tables)


def test_16_one_process_evaluates_predicts_and_streams(tmp_path):
    flags = files(tmp_path, QUESTIONS) | {"pipeline": "question_answering", "doc_stride": 2, "streaming": True}
    results = train(**flags | {"max_epochs": None, "max_steps": 2, "batch_size": 2})
    assert set(results["valid"]) >= {"question_answering/exact_match", "question_answering/f1"}
    best = str(Outputs(tmp_path / "out", "run").best)
    assert len(predict(pre_trained_model=best, predict_dataset=flags["valid_dataset"])) == 2


def test_17_answer_selection_without_an_index_column(tmp_path):
    flags = files(tmp_path, PAIRS) | {"pipeline": "answer_selection", "input_columns": ("q", "a")}
    results = train(**flags)
    assert 0 < results["valid"]["answer_selection/mean_average_precision"] <= 1
    lines = (Outputs(tmp_path / "out", "run").predictions / "valid.jsonl").read_text().splitlines()
    assert [json.loads(line)["query"] for line in lines] == [0, 0, 0, 1, 1, 1]  # equal questions are one query


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_18_a_loss_is_a_scalar(name):
    cosine = torch.tensor([0.3, -0.2], requires_grad=True)
    loss = PAIR_LOSSES[name](cosine, torch.tensor([1, 0]), 0.5)
    assert loss.shape == ()
    loss.backward()
    assert cosine.grad is not None


@pytest.mark.parametrize(
    ("pipeline", "auto"),
    [
        ("cluster_random_token_detection", "AutoModelForTokenClassification"),
        ("masked_lm", "AutoModelForMaskedLM"),
    ],
)
def test_19_a_model_with_shared_tensors_is_saved_and_is_the_same(tmp_path, pipeline, auto):
    """An output layer that is the embedding table; clusters that are counted beside the model."""
    (tmp_path / "clusters.txt").write_text("".join(f"{i % 3}\n" for i in range(len(WORDS) + 5)))
    more = {"clusters_filename": str(tmp_path / "clusters.txt")} if "cluster" in pipeline else {}
    train(**files(tmp_path, TEXTS) | more, pipeline=pipeline)
    out = Outputs(tmp_path / "out", "run")
    state = torch.load(out.checkpoints / "best.ckpt", weights_only=True)["state_dict"]
    for name, value in getattr(transformers, auto).from_pretrained(out.best).state_dict().items():
        assert torch.equal(value, state[f"heads.models.{pipeline}.{name}"]), name


def test_20_masks_are_of_the_seed_and_the_epoch_whatever_the_workers(tmp_path):
    _, tasks, tokenizer, _ = heads_of(tmp_path, "masked_lm")
    text = TextEncoder(tokenizer, 16)
    features = encode_rows(tasks, TEXTS * 4, text, "data")

    def masks(seed: int, epoch: int, workers: int) -> list[list[int]]:
        batches, prepare = StepSampler(features.lengths, 6, 0), Prepare(tasks, text, seed)
        loader = TrainLoader(features, Collate(tasks, tokenizer), batches, prepare, num_workers=workers)
        loader.sampler.set_epoch(epoch)
        torch.rand(1)  # what the process draws elsewhere changes nothing
        found = [pair for b in loader for pair in zip(b["index"].tolist(), b["masked_lm_labels"].tolist(), strict=True)]
        return [labels for _, labels in sorted(found)]

    assert masks(1, 0, 0) == masks(1, 0, 2)
    assert masks(1, 1, 0) == masks(1, 1, 2)
    assert masks(1, 0, 0) != masks(1, 1, 0)
    assert masks(1, 0, 0) != masks(2, 0, 0)
    texts = {row["text"] for row in TEXTS}
    assert len({*map(tuple, masks(1, 0, 0))}) > len(texts)  # equal texts have masks of their own


def test_21_scores_need_no_download(run):
    """The whole run had no network."""
    _, results = run
    assert results["test"]


def test_21_rouge_of_sentences_needs_no_download():
    pytest.importorskip("rouge_score")
    assert rouge(["One cat. Two dogs."], [["Two dogs. One cat."]])["rougeLsum_fmeasure"] == 1


def test_22_defaults_are_whole(tmp_path):
    """k candidates with the default head, apart, of queries that have fewer."""
    rows = [row for row in PAIRS if row["q"] == "where ?" or row["a"] != "a mat"]
    flags = files(tmp_path, rows) | {"pipeline": "answer_selection", "input_columns": ("q", "a"), "k": 3}
    results = train(**flags, separated=True, pad_to_k=True)
    assert 0 < results["valid"]["answer_selection/mean_average_precision"] <= 1


def test_22_t5_is_denoised_by_default(tmp_path):
    names = ["<pad>", "</s>", "<unk>", *WORDS, *(f"<extra_id_{i}>" for i in range(20))]
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, "<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, additional_special_tokens=[name for name in names if "extra" in name], **special
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    sizes = ("d_model=16", "d_kv=8", "d_ff=32", "num_layers=1", "num_decoder_layers=1", "num_heads=2")
    flags = files(tmp_path, TEXTS) | {"pre_trained_tokenizer": str(tmp_path / "tokenizer"), "model": "t5"}
    results = train(**flags | {"additional_config_kwargs": sizes}, pipeline="denoising")
    assert results["valid"]["denoising/perplexity"] > 1


# ---- a test that cannot fail is none

# number, file, what is there, what was there in the older framework, or stands for it
PUT_BACK: list[tuple[int, str, str, str]] = [
    (1, "scripts/setup.sh", '"$ROOT/constraints.txt" <', '"$ROOT/requirements/constraints.txt" <'),
    (2, "pyproject.toml", "\ndependencies = [", '\ndependencies = [\n    "bleurt @ git+https://example.org/bleurt",'),
    (3, "pytorch/funneltfm/training/train.py", "import yaml\n", "import datasets\nimport yaml\n"),
    (3, "pytorch/funneltfm/training/optimizers.py", "import torch\n", "import torch\nimport transformers\n"),
    (4, "pytorch/funneltfm/funnel/formats.py", "import FunnelBaseModel, ", "import FunnelTokenizationFast, "),
    (5, "pytorch/funneltfm/cli/flags.py", '"help": text.replace("%", "%%")', '"help": argparse.SUPPRESS'),
    (6, "pytorch/funneltfm/training/train_config.py", "num_workers: int = 0", 'num_workers: int = "auto"'),
    (7, "pytorch/funneltfm/training/train_config.py", '{"16": "16-mixed", ', "{"),
    (7, "docs/pipelines.md", "train --pipeline answer_selection --pre", "train --model answer_selection --pre"),
    (8, "pytorch/funneltfm/training/train_config.py", 'output_dir: str = "outputs"', 'output_dir: str = "../outputs"'),
    (9, "pytorch/funneltfm/training/optimizers.py", "(optimizer, share)\n", "(optimizer, share, verbose=False)\n"),
    (10, "pytorch/funneltfm/training/callbacks.py", "self._bar.update()", "self._bar.clear_live()"),
    (11, "pytorch/funneltfm/data/textfiles.py", '".jsonl": TextFormat', '".other": TextFormat'),
    (12, "pytorch/funneltfm/training/pipeline.py", 'rng = {"cpu"', 'rng = checkpoint["a"] = {"args": self.args, "cpu"'),
    (
        13, "pytorch/funneltfm/training/optimizers.py",
        "decay_groups(model, args.weight_decay))", "decay_groups(model, 0.1)[:1])",
    ),
    (
        14, "pytorch/funneltfm/tasks/base.py", '        if "attention_mask" in examples[0]',
        '        inputs["original_input_ids"] = inputs["input_ids"]\n        if "attention_mask" in examples[0]',
    ),
    (15, "pytorch/funneltfm/tasks/electra.py", "    def make_beside(", "    def make_nothing("),
    (16, "pytorch/funneltfm/training/ranks.py", "    if size() == 1:\n        return [value]\n", ""),
    (17, "pytorch/funneltfm/tasks/queries.py", "text if column is None else row.get(column)", "row[column]"),
    (18, "pytorch/funneltfm/tasks/retrieval.py", "F.mse_loss(cosine, labels.to(cosine.dtype))", "cosine, labels"),
    (
        19, "pytorch/funneltfm/tasks/heads.py", "    state = None\n",
        "    model.register_buffer('count', backbone_of(model).get_input_embeddings().weight.data)\n    state = None\n",
    ),
    (20, "pytorch/funneltfm/tasks/base.py", 'epoch + 1, example["index"], number]', '0, example["index"], number]'),
    (20, "pytorch/funneltfm/tasks/base.py", "default_rng([self.seed, epoch + 1, e", "default_rng([0, epoch + 1, e"),
    (20, "pytorch/funneltfm/tasks/base.py", 'example["index"], number]', "number]"),
    (20, "pytorch/funneltfm/tasks/base.py", '[self.seed, epoch + 1, example["index"], number]', "torch.initial_seed()"),
    (
        21, "pytorch/funneltfm/summaries.py", '"\\n".join(sentences(prediction))',
        '"\\n".join(__import__("nltk").sent_tokenize(prediction))',
    ),
    (22, "pytorch/funneltfm/tasks/flags.py", ' = "RE_k"', ' = "RE"'),
    (22, "pytorch/funneltfm/tasks/joint.py", "parts + [_EMPTY] * missing", "parts"),
    (22, "pytorch/funneltfm/tasks/denoising.py", "own if self.args.max_number_of_spans is None else min(", "min("),
]  # fmt: skip
# Of these the tests are quick, and go through none of the others' places, so that one run of the tests can tell.
TOGETHER = (1, 2, 5, 9, 13, 14, 18, 20)


def put_back(rows: Iterable[tuple[int, str, str, str]], folder: Path) -> None:
    """A copy of the project with these defects."""
    for name in ("pytorch", "tests", "scripts", "docs", "README.md", "pyproject.toml", "constraints.txt"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / name, folder / name)
    for _, name, here, there in rows:
        text = (folder / name).read_text(encoding="utf-8")
        (folder / name).write_text(text.replace(here, there, 1), encoding="utf-8")


def failing(numbers: Iterable[int], folder: Path) -> set[int]:
    """The numbers whose tests fail in a copy of the project."""
    names = " or ".join(f"test_{number:02}_" for number in numbers)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/training/test_older_defects.py", "-k", names],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(folder / "pytorch")}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return {int(number) for number in re.findall(r"^(?:FAILED|ERROR) .*::test_(\d\d)_", done.stdout, re.MULTILINE)}


def test_what_can_be_put_back_is_there():
    assert {number for number, *_ in PUT_BACK} == set(range(1, 23))
    for _, name, here, there in PUT_BACK:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert here in text, name
        assert text.replace(here, there, 1) != text


@pytest.mark.slow
def test_what_is_put_back_is_noticed(tmp_path):
    firsts = {row[0]: row for row in reversed(PUT_BACK)}
    put_back([firsts[number] for number in TOGETHER], tmp_path)
    assert failing((*TOGETHER, 4), tmp_path) == {*TOGETHER}  # and 4, which is not put back, is well


if __name__ == "__main__":
    for row in PUT_BACK:
        if not sys.argv[1:] or str(row[0]) in sys.argv[1:]:
            with tempfile.TemporaryDirectory() as place:
                put_back([row], Path(place))
                found = "noticed" if failing([row[0]], Path(place)) else "NOT NOTICED"
                print(f"{row[0]:2}  {found:12} {row[1]}: {row[3]!r}", flush=True)
