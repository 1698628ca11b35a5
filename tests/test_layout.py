"""The house stands as docs/architecture.md draws it, and what is installed is the package and the model's doorstep."""

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "pytorch"
PACKAGE = SOURCE / "funneltfm"
# Made by tools, in no checkout.
MADE = {".venv", ".git", "build", "dist", "__pycache__", ".hypothesis", ".pytest_cache", ".ruff_cache", ".mypy_cache"}

PLACES = (
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "CITATION.cff",
    "pyproject.toml",
    "constraints.txt",
    "download_all_ckpts.sh",
    "data-scripts/README.md",
    "data-scripts/make_sample.py",
    "data-scripts/split_corpus.py",
    "data-scripts/download_glue.sh",
    "data-scripts/download_textcls.sh",
    "scripts/setup.sh",
    "scripts/test.sh",
    "scripts/classifier.sh",
    "scripts/pretrain.sh",
    "scripts/run.sh",
    "tensorflow/README.md",
    "docs/architecture.md",
    ".ci/run",
    "pytorch/modeling.py",
    "pytorch/classifier.py",
    "pytorch/run.py",
    "pytorch/funneltfm/__init__.py",
)


def sources(*folders):
    """Python and shell files under folders, without what tools made."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            made = any(part in MADE or part.endswith(".egg-info") for part in path.relative_to(ROOT).parts)
            if path.suffix in (".py", ".sh") and not made:
                yield path


@pytest.mark.parametrize("place", PLACES)
def test_place_exists(place):
    path = ROOT / place
    assert path.exists()
    assert not path.is_dir() or any(path.iterdir())


def test_programs_can_be_run():
    programs = [ROOT / ".ci/run", ROOT / "download_all_ckpts.sh"]
    programs += [path for path in sources("scripts", "data-scripts") if path.suffix == ".sh"]
    for path in programs:
        assert os.access(path, os.X_OK), f"{path} is not executable"
        assert path.read_bytes().startswith(b"#!"), f"{path} names no interpreter"


def test_tensorflow_folder_shadows_nothing():
    assert not (ROOT / "tensorflow" / "__init__.py").exists()


def test_no_conftest_at_the_root():
    assert not (ROOT / "conftest.py").exists()


# ---- pytorch/


def test_exactly_one_package():
    folders = [p for p in SOURCE.iterdir() if p.is_dir() and p.name not in MADE and not p.name.endswith(".egg-info")]
    assert folders == [PACKAGE]
    for folder in {path.parent for path in PACKAGE.rglob("*.py")}:
        assert (folder / "__init__.py").exists(), f"{folder} is not a package: the wheel would leave it out"


@pytest.mark.parametrize("path", sorted(SOURCE.glob("*.py")), ids=lambda path: path.name)
def test_doorstep(path):
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert len(text.splitlines()) <= 15
    assert (ast.get_docstring(tree) or "").startswith("Doorstep")
    defining = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    assert not [node for node in ast.walk(tree) if isinstance(node, defining)]


def test_doorstep_opens_to_the_same_class():
    import funneltfm
    import modeling

    assert modeling.FunnelTFM is funneltfm.FunnelTFM
    assert modeling.ModelConfig is funneltfm.ModelConfig


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_sources_are_ascii():
    for path in sources("pytorch", "scripts", "data-scripts", "tensorflow", "tests"):
        data = path.read_bytes()
        line = next((n for n, text in enumerate(data.splitlines(), start=1) if not text.isascii()), None)
        assert line is None, f"{path}:{line} is not ASCII"


# ---- tests/


def test_names_that_importlib_mode_can_tell_apart():
    """A test file is imported as tests.folder.name: no packages, no file beside a folder of its name, no dots."""
    for path in sources("tests"):
        assert path.name != "__init__.py", f"{path}: tests are no package"
        assert path.stem.isidentifier(), f"{path} cannot be a module"
        assert not path.with_suffix("").is_dir(), f"{path} stands beside a folder of its name"
        assert path.stem.startswith("test_") or path.stem == "conftest", f"{path} would not be collected"


# ---- what is installed


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy so that the tree stays clean."""
    tree, out = tmp_path_factory.mktemp("tree") / "repo", tmp_path_factory.mktemp("wheel")
    names = [name for name in ("README.md", "LICENSE", "pyproject.toml") if (ROOT / name).exists()]
    folders = [p.name for p in ROOT.iterdir() if p.is_dir() and p.name not in MADE and not p.name.startswith(".")]
    tree.mkdir()
    for name in names:
        shutil.copy(ROOT / name, tree)
    for name in folders:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns(*MADE, "*.egg-info"))
    (tree / "tensorflow" / "stray.py").write_text("")  # as the converter will be: it must stay outside
    pip_wheel = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    env = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    result = subprocess.run([*pip_wheel, "-w", out, tree], capture_output=True, text=True, timeout=120, env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_wheel_holds_the_package_and_the_doorstep_of_the_model(wheel):
    installed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    package = {str(path.relative_to(SOURCE)) for path in PACKAGE.rglob("*.py")}
    assert {name for name in installed if name.endswith(".py")} == package | {"modeling.py"}
    assert {name.partition("/")[0] for name in installed} == {"funneltfm", "modeling.py"}
    data = {str(path.relative_to(SOURCE)) for kind in ("*.yaml", "*.csv") for path in PACKAGE.rglob(kind)}
    assert {name for name in installed if not name.endswith(".py")} == data


def test_wheel_says_who_it_is(wheel):
    import funneltfm

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (info,) = {name.partition("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    assert info == f"funneltfm-{project['version']}.dist-info"
    assert project["version"] == funneltfm.__version__
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert "License-Expression: MIT" in metadata
    assert f"{info}/licenses/LICENSE" in wheel.namelist()
    assert "funneltfm = funneltfm.cli.main:main" in wheel.read(f"{info}/entry_points.txt").decode()
